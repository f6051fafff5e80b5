"""A worker that answers bells by writing a line to a file: `python -m tests.integration.bell_worker BOUNDARY FILE`.

The broker's URL is in BLASTDOOR_REDIS_URL; RING_S is how long an answer takes, CONCURRENCY how many are given at once.
"""

import os
import sys
import time
from pathlib import Path

from service import logs
from service.adapters.celery_queue import RING_TASK, WORKER_OPTIONS, celery_app, queue_name


def main(boundary: str, answered: str) -> None:
    logs.configure("info", program="worker")
    app = celery_app(os.environ["BLASTDOOR_REDIS_URL"])

    @app.task(name=RING_TASK)  # type: ignore[untyped-decorator]  # Celery has no types
    def ring(*args: object, **kwargs: object) -> None:
        with Path(answered).open("a") as file:
            print("rung", list(args), kwargs, file=file)
        time.sleep(float(os.environ.get("RING_S", "0")))
        with Path(answered).open("a") as file:
            print("answered", file=file)

    concurrency = os.environ.get("CONCURRENCY", "1")
    options = ["--queues", queue_name(boundary), "--concurrency", concurrency, "--loglevel", "INFO", *WORKER_OPTIONS]
    app.worker_main(["worker", *options])


if __name__ == "__main__":
    main(*sys.argv[1:])
