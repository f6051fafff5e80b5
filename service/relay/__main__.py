"""The relay's process: `python -m service.relay`. SIGTERM and SIGINT stop it within a second, and another may lead."""

import signal
from datetime import timedelta
from types import FrameType

from service import logs
from service.adapters.redis_bus import RedisBus, RedisHints
from service.adapters.sql_store import SqlStore
from service.core.ids import new_id
from service.relay.relay import Relay, run
from service.settings import Settings


def main() -> None:
    settings = Settings()
    logs.configure(settings.log_level, program="relay")
    stopped = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    relay = Relay(
        SqlStore(settings.sql_url),
        RedisBus(settings.stream_url),
        owner=f"{settings.site}/{new_id('rly')}",
        lease=timedelta(seconds=settings.relay_lease_s),
    )
    run(relay, RedisHints(settings.broker_url), stopping=lambda: stopped)


if __name__ == "__main__":
    main()
