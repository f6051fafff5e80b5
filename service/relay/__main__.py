"""The relay's process: `python -m service.relay`. SIGTERM and SIGINT stop it within a second, and another may lead."""

import signal
from datetime import timedelta
from types import FrameType

from service import logs
from service.adapters.blobs import FileBlobs
from service.adapters.redis_bus import RedisBus, RedisHints
from service.adapters.sql_store import SqlStore
from service.core.ids import new_id
from service.relay.housekeeping import Housekeeping, keep_house
from service.relay.relay import Relay, run
from service.settings import Settings
from service.usecases.retention import Purged, purge


def main() -> None:
    settings = Settings()
    logs.configure(settings.log_level, program="relay")
    stopped = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    store = SqlStore(settings.sql_url)
    relay = Relay(
        store,
        RedisBus(settings.stream_url),
        owner=f"{settings.site}/{new_id('rly')}",
        lease=timedelta(seconds=settings.relay_lease_s),
    )

    def retention() -> Purged:
        return purge(
            store,
            FileBlobs(
                settings.state_dir
            ),  # made when it is due: a relay that has no such directory relays all the same
            older_than=timedelta(seconds=settings.keep_runs_s),
            blobs_older_than=timedelta(seconds=settings.keep_blobs_s),
        )

    keep_house(Housekeeping(retention, leading=lambda: relay.leading), stopping=lambda: stopped)
    run(relay, RedisHints(settings.broker_url), stopping=lambda: stopped)


if __name__ == "__main__":
    main()
