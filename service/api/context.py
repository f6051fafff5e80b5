"""What the routers work with: ports and values from the composition root, and the bounded threads that call them."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Annotated, ParamSpec, TypeVar

import anyio
import anyio.to_thread
from fastapi import Depends, Request

from service.api.key_watch import KeyWatch
from service.api.metrics import ApiMetrics
from service.api.notifier import Notifier
from service.api.readiness import Readiness
from service.api.slots import UploadSlots
from service.core.custody import Custody, Leftovers
from service.core.placement import Policy
from service.core.ports.blobs import Blobs
from service.core.ports.publishing import Doorbell, Hints
from service.core.ports.runs import NewsStore, Retention
from service.core.ports.tenants import TenantStore, WorkerStore
from service.core.webhooks.addresses import Address
from service.core.webhooks.ports import Resolver, SecretBox, WebhookStore
from service.core.webhooks.urls import Pairs
from service.intake.archive import ArchiveCaps
from service.usecases.bundles import Bundles
from service.usecases.keys import is_valid
from service.usecases.submit import Submitting

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What one API process takes on. `requests_at_once` counts those that wait, too; beyond it 503."""

    upload_max_bytes: int = 50 * 2**20
    upload_deadline_s: float = 120.0
    uploads_at_once: int = 16
    body_max_bytes: int = 64 * 1024
    body_deadline_s: float = 10.0
    requests_at_once: int = 4000
    store_threads: int = 12
    judging_threads: int = 4
    following_threads: int = 4
    resolving_threads: int = 8
    resolving_deadline_s: float = 5.0
    worker_fresh: timedelta = timedelta(seconds=90)
    site_silent: timedelta = timedelta(minutes=5)
    look_deadline_s: float = 2.0
    cleanup_wait_s: float = 30.0
    deletion_wait_s: float = 5.0

    @property
    def idempotency_stale_after(self) -> timedelta:
        """Longer than any upload and its judging may take: who still holds a key after that is dead."""
        return timedelta(seconds=self.upload_deadline_s + 120)


@dataclass(frozen=True, kw_only=True)
class Deps:
    """`checks`: what readiness asks, by name; one that fails raises."""

    runs: NewsStore
    tenants: TenantStore
    workers: WorkerStore
    blobs: Blobs
    hints: Hints
    doorbell: Doorbell
    webhooks: WebhookStore
    resolver: Resolver
    custody: Custody
    leftovers: Leftovers
    retention: Retention
    secret_box: SecretBox | None = None
    webhook_allow: Pairs = frozenset()
    policy: Policy = field(default_factory=Policy)
    checks: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    bounds: Bounds = Bounds()
    archive_caps: ArchiveCaps = field(default_factory=ArchiveCaps)
    version: str = "0"
    metrics: ApiMetrics = field(default_factory=ApiMetrics)


class Context:
    """One per application. Store calls have threads of their own, so that judging an archive never delays them."""

    def __init__(self, deps: Deps) -> None:
        self.deps = deps
        self.bundles = Bundles(deps.blobs)
        self.submitting = Submitting(
            runs=deps.runs, tenants=deps.tenants, workers=deps.workers, bundles=self.bundles, hints=deps.hints,
            doorbell=deps.doorbell, policy=deps.policy, archive_caps=deps.archive_caps,
            worker_fresh=deps.bounds.worker_fresh,
        )  # fmt: skip
        self.notifier = Notifier(deps.hints, deps.runs.newest)
        self.readiness = Readiness(deps.checks)
        self.slots = UploadSlots(deps.bounds.uploads_at_once)
        self._store = anyio.CapacityLimiter(deps.bounds.store_threads)
        self._following = anyio.CapacityLimiter(deps.bounds.following_threads)
        self._resolving = anyio.CapacityLimiter(deps.bounds.resolving_threads)
        self._judging = anyio.CapacityLimiter(deps.bounds.judging_threads)
        self.keys = KeyWatch(lambda key_hash: self.follow(is_valid, deps.tenants, key_hash))
        deps.metrics.watch(uploads=lambda: self.slots.held, waiters=lambda: self.notifier.waiters)

    async def store(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call what reads or writes the store, or a small file."""
        return await anyio.to_thread.run_sync(partial(function, *args, **kwargs), limiter=self._store)

    async def follow(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call what reads the store for one of many who watch: they keep no thread from those who ask."""
        return await anyio.to_thread.run_sync(partial(function, *args, **kwargs), limiter=self._following)

    async def judge(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call what may take seconds of CPU."""
        return await anyio.to_thread.run_sync(partial(function, *args, **kwargs), limiter=self._judging)

    async def resolve(self, host: str, port: int) -> Sequence[Address] | None:
        """What the name leads to now, on threads of its own; None when nobody says so in time. A thread that still
        asks is left behind, and counted until it ends."""
        ask = partial(self.deps.resolver, host, port)
        try:
            with anyio.fail_after(self.deps.bounds.resolving_deadline_s):
                return await anyio.to_thread.run_sync(ask, limiter=self._resolving, abandon_on_cancel=True)
        except (OSError, UnicodeError):  # TimeoutError is an OSError
            return None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.notifier.start()
        try:
            yield
        finally:
            self.notifier.close()
            await anyio.to_thread.run_sync(self.notifier.join)


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


InContext = Annotated[Context, Depends(_context)]
