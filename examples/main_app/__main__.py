"""`python -m examples.main_app --url URL --redis REDIS_URL --port N --state DIR`, with the service key in
BLASTDOOR_SERVICE_KEY. Prints each customer's link."""

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

import uvicorn

from examples.main_app.app import Settings, create
from examples.main_app.inbox import Inbox


class _Server(uvicorn.Server):
    """Says where the customers' pages are once it is up."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._settings = settings

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        inbox = Inbox(self._settings.state / "main-app.db")
        for customer in inbox.customers():
            print(f"{customer.name}: {self._settings.public_url}/c/{customer.link}", flush=True)
        inbox.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.main_app", description=__doc__)
    parser.add_argument("--url", required=True, help="where Blastdoor is")
    parser.add_argument("--redis", required=True, help="where its event stream is")
    parser.add_argument("--port", type=int, default=8800)
    parser.add_argument("--state", type=Path, required=True, help="a directory for this application's database")
    told = parser.parse_args()
    key = os.environ.get("BLASTDOOR_SERVICE_KEY")
    if not key:
        sys.exit("set BLASTDOOR_SERVICE_KEY to a service key (`blastdoor services create NAME`)")
    told.state.mkdir(parents=True, exist_ok=True)
    settings = Settings(told.url, key, told.redis, f"http://127.0.0.1:{told.port}", told.state)
    config = uvicorn.Config(create(settings), host="127.0.0.1", port=told.port, log_level="warning")
    with suppress(KeyboardInterrupt):  # uvicorn raises it once more when it has ended politely
        _Server(config, settings).run()


if __name__ == "__main__":
    main()
