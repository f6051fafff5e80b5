"""What each process may do to each table of a PostgreSQL: one table, given to the login roles by `migrate`.

A right is in PostgreSQL's own words and goes into GRANT as it stands. SELECT ... FOR UPDATE asks for UPDATE of any one
column, so some rights to UPDATE are there for the lock alone. Foreign keys and their cascades act as the tables' owner.
"""

import re
from collections.abc import Mapping
from enum import StrEnum

import sqlalchemy as sa

from service.adapters.sql.engine import Database
from service.adapters.sql.schema import metadata
from service.core.errors import BlastdoorError


class Role(StrEnum):
    """One for each process; the login role is `<prefix>_<role>`."""

    API = "api"
    RELAY = "relay"
    WEBHOOKS = "webhooks"
    WORKER = "worker"
    REAPER = "reaper"


ALEMBIC = "alembic_version"
"""Alembic's own table: which schema this is."""
_NOTHING = ""
_ALL = "SELECT, INSERT, UPDATE, DELETE"


def _row(*, api: str, relay: str, webhooks: str, worker: str, reaper: str) -> Mapping[Role, str]:
    return {Role.API: api, Role.RELAY: relay, Role.WEBHOOKS: webhooks, Role.WORKER: worker, Role.REAPER: reaper}


_COURSE = (  # of a run, for whoever acts on it; never whose it is, what it is, or where it was placed
    "phase, outcome, reason, destroyed_fence, last_seq, phase_seq, lease_owner, lease_until, queued_at, finished_at, "
    "boundary_destroyed_at"
)
_WHETHER_WANTED = "SELECT (enabled, tenant, service_id)"  # does anybody want this event; not where, nor the secret
_TELLING = "INSERT, SELECT (id)"  # the database numbers events, and says the number

RIGHTS: Mapping[str, Mapping[Role, str]] = {
    "installation": _row(api="SELECT", relay="SELECT", webhooks="SELECT", worker="SELECT", reaper="SELECT"),
    "service": _row(
        api="SELECT, INSERT, UPDATE (name)", relay=_NOTHING, webhooks=_NOTHING, worker=_NOTHING, reaper=_NOTHING
    ),
    "tenant": _row(
        api="SELECT, INSERT, UPDATE",
        relay="SELECT, INSERT, UPDATE (affinity, ceilings, purged_at)",
        webhooks="SELECT (name, service_id)",
        worker="SELECT (name, service_id, concurrent, storage_bytes, ceilings, last_served), UPDATE (last_served)",
        reaper="SELECT (name, service_id)",
    ),
    "api_key": _row(
        api="SELECT, INSERT, UPDATE (revoked_at)", relay="SELECT (tenant), DELETE", webhooks=_NOTHING,
        worker=_NOTHING, reaper=_NOTHING,
    ),
    "run": _row(
        api=_ALL, relay="SELECT, INSERT, UPDATE (blobs_purged_at), DELETE", webhooks=_NOTHING,
        worker=f"SELECT, UPDATE ({_COURSE}, attempt, fence, site, started_at)",
        reaper=f"SELECT, UPDATE ({_COURSE}, quarantined_fence, cancel_requested_by)",
    ),
    "run_input": _row(api="INSERT", relay="INSERT", webhooks=_NOTHING, worker="SELECT", reaper=_NOTHING),
    "run_result": _row(
        api="SELECT, INSERT", relay=_NOTHING, webhooks=_NOTHING, worker="INSERT", reaper="SELECT, INSERT"
    ),
    "run_blob": _row(
        api="SELECT, INSERT, DELETE", relay="SELECT, DELETE", webhooks=_NOTHING,
        worker="SELECT, INSERT", reaper="INSERT",
    ),
    "run_news": _row(
        api="SELECT, DELETE", relay="SELECT (run_id), DELETE", webhooks=_NOTHING,
        worker="SELECT, INSERT", reaper="SELECT (run_id, kind, data)",
    ),
    "idempotency": _row(api=_ALL, relay="SELECT (tenant, taken_at), DELETE", webhooks=_NOTHING, worker=_NOTHING,
                        reaper=_NOTHING),
    "outbox": _row(
        api="SELECT, INSERT, DELETE", relay="SELECT, INSERT, UPDATE (pub_seq, published), DELETE",
        webhooks="SELECT, UPDATE (fanned)", worker=_TELLING, reaper=_TELLING,
    ),
    "relay_state": _row(api=_NOTHING, relay="SELECT, UPDATE", webhooks=_NOTHING, worker=_NOTHING, reaper=_NOTHING),
    "worker": _row(
        api="SELECT, UPDATE (draining)", relay="SELECT", webhooks=_NOTHING,
        worker="SELECT, INSERT, UPDATE (host, site, capabilities, slots, measured_at), DELETE", reaper=_NOTHING,
    ),
    "webhook_endpoint": _row(
        api=_ALL, relay=f"{_WHETHER_WANTED}, DELETE",
        webhooks="SELECT, UPDATE (enabled, disabled_reason)", worker=_WHETHER_WANTED, reaper=_WHETHER_WANTED,
    ),
    "webhook_delivery": _row(
        api="SELECT, UPDATE, DELETE", relay="SELECT, DELETE", webhooks="SELECT, INSERT, UPDATE", worker=_NOTHING,
        reaper=_NOTHING,
    ),
    "webhook_attempt": _row(
        api="SELECT", relay=_NOTHING, webhooks="INSERT, SELECT (id)", worker=_NOTHING, reaper=_NOTHING
    ),
    "site": _row(api="SELECT, UPDATE", relay=_NOTHING, webhooks=_NOTHING, worker=_NOTHING,
                 reaper="SELECT, INSERT, UPDATE (last_seen_at, asked_at, forgotten_at)"),
    "inventory": _row(api="SELECT, DELETE", relay=_NOTHING, webhooks=_NOTHING, worker=_NOTHING, reaper=_ALL),
    "cleanup": _row(
        api="SELECT, INSERT, UPDATE", relay=_NOTHING, webhooks=_NOTHING, worker=_NOTHING,
        reaper="SELECT (id, applied_at, done_at), UPDATE (done_at)",
    ),
    "cleanup_action": _row(
        api="SELECT, INSERT, UPDATE", relay=_NOTHING, webhooks=_NOTHING, worker=_NOTHING,
        reaper="SELECT, UPDATE (result, done_at)",
    ),
    "audit": _row(
        api="SELECT, INSERT, UPDATE (result)", relay=_NOTHING, webhooks=_NOTHING, worker=_NOTHING,
        reaper="INSERT, SELECT (id, result), UPDATE (result)",  # `blastdoor admin cleanup --local`, with its user
    ),
    ALEMBIC: _row(api="SELECT", relay=_NOTHING, webhooks=_NOTHING, worker=_NOTHING, reaper=_NOTHING),
}  # fmt: skip

_RIGHT = re.compile(r"(SELECT|INSERT|UPDATE|DELETE)( \(([^)]*)\))?")


def rights_of(role: Role, table: str) -> Mapping[str, tuple[str, ...]]:
    """Each privilege with its columns; no columns: the whole table."""
    found = _RIGHT.findall(RIGHTS[table][role])
    return {privilege: tuple(columns.split(", ")) if columns else () for privilege, _, columns in found}


def give_rights(url: str, prefix: str) -> None:
    """Give the login roles `<prefix>_api`, ... exactly what RIGHTS says, and take from them and from PUBLIC what it
    does not; all of it or nothing, by the owner of the tables. May be repeated. Raises BlastdoorError when a role is
    missing or the database is not a PostgreSQL, Unavailable."""
    db = Database(url)
    if db.is_sqlite:
        raise BlastdoorError("SQLite has no roles: leave BLASTDOOR_DATABASE_ROLES empty")
    try:
        with db.write() as connection:
            quoted = connection.dialect.identifier_preparer.quote
            roles = {role: f"{prefix}_{role}" for role in Role}
            there = set(connection.scalars(sa.text("SELECT rolname FROM pg_roles")))
            if missing := sorted(set(roles.values()) - there):
                raise BlastdoorError(
                    f"PostgreSQL has no role {', '.join(missing)}; deploy/postgres-roles.sh makes them"
                )
            database = quoted(connection.execute(sa.text("SELECT current_database()")).scalar_one())
            _do(connection, f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
            _do(connection, "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
            for role, name in roles.items():
                _do(connection, f"REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {quoted(name)}")
                _do(connection, f"REVOKE ALL ON ALL SEQUENCES IN SCHEMA public FROM {quoted(name)}")
                _do(connection, f"GRANT CONNECT ON DATABASE {database} TO {quoted(name)}")
                for table in RIGHTS:
                    _give(connection, role, table, to=quoted(name))
    finally:
        db.close()


def _give(connection: sa.Connection, role: Role, table: str, *, to: str) -> None:
    if rights := RIGHTS[table][role]:
        _do(connection, f"GRANT {rights} ON {table} TO {to}")
    numbered = table in metadata.tables and metadata.tables[table].autoincrement_column is not None
    if numbered and "INSERT" in rights_of(role, table):
        _do(connection, f"GRANT USAGE ON SEQUENCE {table}_id_seq TO {to}")


def _do(connection: sa.Connection, statement: str) -> None:
    connection.exec_driver_sql(statement)
