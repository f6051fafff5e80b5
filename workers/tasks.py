"""The Celery tasks: a doorbell, and nothing else. The message carries no run; who hears it claims what is fairest."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from workers.run_scenario import Line, run_waiting


def register(
    app: Any, line: Callable[[], Line], *, ring_task: str, playing: Callable[[], AbstractContextManager[None]]
) -> None:
    """`line` is asked for inside the worker's child process, which builds its own connections; `playing` tells the
    parent for how long the child is busy."""

    @app.task(name=ring_task)  # type: ignore[untyped-decorator, unused-ignore]
    def ring() -> None:
        with playing():
            run_waiting(line())
