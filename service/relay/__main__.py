"""The relay's process: `python -m service.relay`. SIGTERM and SIGINT stop it within a second, and another may lead."""

import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache
from types import FrameType

from service import logs, metrics
from service.adapters import failpoints
from service.adapters.blobs import FileBlobs
from service.adapters.celery_queue import CeleryDoorbell
from service.adapters.redis_bus import RedisBus, RedisHints
from service.adapters.sql_store import SqlStore
from service.core.ids import new_id
from service.intake.archive import ArchiveCaps
from service.intake.policy import read_policy
from service.relay.canary import CanaryKeeper, keep_canaries
from service.relay.housekeeping import Housekeeping, keep_house
from service.relay.metrics import RelayMetrics, StandingCollector
from service.relay.relay import Relay, run
from service.settings import Settings, unknown_names
from service.usecases.bundles import Bundles
from service.usecases.canary import enrol, send
from service.usecases.leftovers import finish_deletions, sweep_blobs
from service.usecases.retention import Purged, purge
from service.usecases.submit import Submitting


def main() -> None:
    settings = Settings()
    logs.configure(settings.log_level, program="relay")
    logs.own_the_streams()
    logs.say_unknown(unknown_names())
    failpoints.arm(settings.failpoints, environment=settings.environment)
    stopped = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    store = SqlStore(settings.sql_url)
    registry = metrics.new_registry("relay")
    relay = Relay(
        store,
        RedisBus(settings.stream_url, max_length=settings.stream_entries),
        owner=f"{settings.site}/{new_id('rly')}",
        lease=timedelta(seconds=settings.relay_lease_s),
        metrics=RelayMetrics(registry),
    )
    registry.register(StandingCollector(store, store, worker_fresh=timedelta(seconds=settings.worker_fresh_s)))
    metrics.serve_if_asked(registry, settings.metrics_address)

    def blobs() -> FileBlobs:
        """Made when it is due: a relay that has no such directory relays all the same."""
        return FileBlobs(settings.state_dir)

    def retention() -> Purged:
        purged = purge(
            store,
            blobs(),
            older_than=timedelta(seconds=settings.keep_runs_s),
            blobs_older_than=timedelta(seconds=settings.keep_blobs_s),
            deliveries_older_than=timedelta(seconds=settings.keep_deliveries_s),
        )
        events = store.purge_events(older_than=timedelta(seconds=settings.keep_runs_s), dry_run=False)
        orphans = sweep_blobs(store, blobs(), older_than=timedelta(seconds=settings.keep_orphan_blobs_s))
        return replace(purged, events=events, blobs=purged.blobs + orphans)

    keep_canaries(_canaries(settings, store, leading=lambda: relay.leading), stopping=lambda: stopped)
    house = Housekeeping(
        retention,
        leading=lambda: relay.leading,
        often=lambda: finish_deletions(store, blobs()) if store.deleted_tenants() else 0,
    )
    keep_house(house, stopping=lambda: stopped)
    run(relay, RedisHints(settings.broker_url), stopping=lambda: stopped)


def _canaries(settings: Settings, store: SqlStore, *, leading: Callable[[], bool]) -> CanaryKeeper:
    every, fresh = timedelta(seconds=settings.canary_s), timedelta(seconds=settings.worker_fresh_s)
    policy = read_policy(settings.policy_file)

    @cache
    def world() -> Submitting:
        return Submitting(
            runs=store, tenants=store, workers=store, bundles=Bundles(FileBlobs(settings.state_dir)),
            hints=RedisHints(settings.broker_url), doorbell=CeleryDoorbell(settings.broker_url),
            policy=policy, archive_caps=ArchiveCaps(), worker_fresh=fresh,
        )  # fmt: skip

    return CanaryKeeper(lambda: enrol(world()), lambda: send(world(), store, every=every, fresh=fresh), leading=leading)


if __name__ == "__main__":
    main()
