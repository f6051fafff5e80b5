"""The shipped fakes: every port, kept in memory, with the promises of the real ones. For tests, and for trying things.

`tests/contract` holds MemoryStore to the same tests as SQLite and PostgreSQL.
"""

from service.adapters.memory.canaries import MemoryCanaries
from service.adapters.memory.custody import MemoryCustody
from service.adapters.memory.fakes import MemoryBlobs, MemoryBus, MemoryDoorbell, MemoryHints
from service.adapters.memory.leftovers import MemoryLeftovers
from service.adapters.memory.line import MemoryRunLine
from service.adapters.memory.news import MemoryNews
from service.adapters.memory.outbox import MemoryOutbox
from service.adapters.memory.runs import MemoryRuns
from service.adapters.memory.standing import MemoryStanding
from service.adapters.memory.tenants import MemoryTenants, MemoryWorkers
from service.adapters.memory.waiting import MemoryWaiting
from service.adapters.memory.webhooks import MemoryWebhooks

__all__ = ["MemoryBlobs", "MemoryBus", "MemoryDoorbell", "MemoryHints", "MemoryStore"]


class MemoryStore(
    MemoryRuns,
    MemoryRunLine,
    MemoryNews,
    MemoryTenants,
    MemoryWaiting,
    MemoryWorkers,
    MemoryWebhooks,
    MemoryCanaries,
    MemoryOutbox,
    MemoryStanding,
    MemoryCustody,
    MemoryLeftovers,
):
    """RunStore, RunLine, NewsStore, Retention, TenantStore, WorkerStore and Outbox of `service.core.ports`, and the
    ports of `core.custody`, one lock around each call.

    `clock` stands for the database's: the only time there is.
    """
