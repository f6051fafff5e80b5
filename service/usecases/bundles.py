"""A bundle's blob and the run that uses it come and go together.

A blob is stored before its run, so that no worker ever claims a run without its bundle; a refused run must not leave
its blob behind, or a tenant whose queue is full could fill the disk. Whether a blob is still used and its removal are
two steps, so one tenant's are done one at a time: within this process. Two processes that serve the same tenant at the
same instant can at worst lose the bundle of a run that repeats the bytes of one being refused or deleted; that run
ends `errored`, and nothing of another tenant is touched. It is the same with what a worker has stored of a run that it
has not recorded yet: a run with the same bytes, deleted by its owner just then, takes that output or artifact with it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from service.core.errors import BlastdoorError, NotFound, Refused
from service.core.ports.blobs import Blobs

_STRIPES = 64

log = structlog.get_logger()


class Bundles:
    """Blobs as submission and deletion use them."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._locks = tuple(threading.Lock() for _ in range(_STRIPES))

    @contextmanager
    def stored(self, tenant: str, *, path: Path, digest: str) -> Iterator[None]:
        """Take the file; if the block refuses the run, a blob that was not there before is removed again. After any
        other error the run may be there all the same (a commit whose answer was lost), and needs it."""
        with self.alone(tenant):
            known = self._known(tenant, digest)
            self._blobs.put_file(tenant, path, digest)
            try:
                yield
            except Refused:
                if not known:
                    self.remove(tenant, digest)
                raise
            except BaseException:
                log.warning("blob_may_be_left_behind", tenant=tenant, digest=digest)
                raise

    @contextmanager
    def alone(self, tenant: str) -> Iterator[None]:
        """Nobody else in this process stores or removes blobs of this tenant meanwhile."""
        with self._locks[hash(tenant) % _STRIPES]:
            yield

    def remove(self, tenant: str, digest: str) -> None:
        """What cannot be removed is left, and said: a blob without a run is rubbish, not damage."""
        try:
            self._blobs.delete(tenant, digest)
        except (BlastdoorError, OSError) as error:
            log.warning("blob_left_behind", tenant=tenant, digest=digest, error=str(error))

    def _known(self, tenant: str, digest: str) -> bool:
        try:
            self._blobs.path(tenant, digest)
        except NotFound:
            return False
        return True
