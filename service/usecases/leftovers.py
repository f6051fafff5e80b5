"""What is still there of what nobody wants: blobs without a run, events that were told long ago, deleted tenants.

Called from the relay's process, beside `retention`, and for a tenant that was just deleted from the API's.
"""

from datetime import timedelta

import structlog

from service.core.custody import Leftovers
from service.core.errors import BlastdoorError
from service.core.ports.blobs import Blobs

log = structlog.get_logger()


def sweep_blobs(store: Leftovers, blobs: Blobs, *, older_than: timedelta) -> int:
    """Delete the bytes that no run of their tenant uses and that were stored so long ago. -> how many blobs.

    Storing always writes a new file, and `older_than` is longer than any upload or run lasts: so what is old and
    unused now was left behind by a refusal or a crash, or is being stored again at this instant, which `discard` sees.
    """
    removed = 0
    for tenant in store.tenant_names():
        try:
            old = blobs.older_than(tenant, older_than)
            removed += sum(blobs.discard(tenant, digest, age=older_than) for digest in store.unused_blobs(tenant, old))
        except (BlastdoorError, OSError) as error:
            log.warning("blobs_left_behind", tenant=tenant, error=str(error))
    return removed


def finish_deletion(store: Leftovers, blobs: Blobs, *, name: str) -> bool:
    """Purge what may go of a deleted tenant. -> False while something has to be waited for: a run that its worker ends,
    a boundary that is not yet gone, an event that is not yet told."""
    if not store.purge_tenant(name):
        return False
    try:
        blobs.clear(name)
    except OSError as error:
        log.warning("blobs_left_behind", tenant=name, error=str(error))
        return False
    store.tenant_purged(name)
    log.info("tenant_purged", tenant=name)
    return True


def finish_deletions(store: Leftovers, blobs: Blobs) -> int:
    """-> how many deleted tenants have nothing left now."""
    return sum(finish_deletion(store, blobs, name=name) for name in store.deleted_tenants())
