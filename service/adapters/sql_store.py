"""The SQL store: every port that is about state, over one database."""

from service.adapters.sql.audit import SqlAudit
from service.adapters.sql.canaries import SqlCanaries
from service.adapters.sql.custody import SqlCustody
from service.adapters.sql.deliveries import SqlDeliveries
from service.adapters.sql.engine import Database, Synchronous
from service.adapters.sql.idempotency import SqlIdempotency
from service.adapters.sql.keeping import SqlKeeping
from service.adapters.sql.leftovers import SqlLeftovers
from service.adapters.sql.line import SqlRunLine
from service.adapters.sql.news import SqlNews
from service.adapters.sql.orders import SqlOrders
from service.adapters.sql.outbox import SqlOutbox
from service.adapters.sql.runs import SqlRuns
from service.adapters.sql.standing import SqlStanding
from service.adapters.sql.tenants import SqlTenants
from service.adapters.sql.waiting import SqlWaiting
from service.adapters.sql.webhooks import SqlWebhooks
from service.adapters.sql.workers import SqlWorkers


class SqlStore(
    SqlRuns, SqlIdempotency, SqlKeeping, SqlRunLine, SqlNews, SqlTenants, SqlWorkers, SqlWebhooks, SqlDeliveries,
    SqlCanaries, SqlOutbox, SqlWaiting, SqlStanding, SqlCustody, SqlOrders, SqlAudit, SqlLeftovers,
):  # fmt: skip
    """RunStore, RunLine, NewsStore, Retention, TenantStore, WorkerStore and Outbox of `service.core.ports`.

    `url` is SQLAlchemy's (`sqlite:///FILE`, `postgresql+psycopg://...`); `service.adapters.sql.migrate.upgrade` has
    made the tables. One may be made before a fork and used on both sides. `synchronous` is SQLite's: FULL survives
    power loss, NORMAL may lose the last commits then.
    """

    def __init__(self, url: str, *, synchronous: Synchronous = "FULL") -> None:
        super().__init__(Database(url, synchronous=synchronous))

    def migrate(self) -> None:
        """Make the tables, or bring them to this version. Safe when several processes do it at once."""
        from service.adapters.sql.migrate import upgrade  # Alembic is loaded only where a schema is made

        upgrade(self._db.url.render_as_string(hide_password=False))

    def close(self) -> None:
        """Close this process's connections; the next use opens them again."""
        self._db.close()
