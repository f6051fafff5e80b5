"""Asks what the service stands on, seldom and without waiting long: whoever asks us cannot make us ask more."""

import time
from collections.abc import Callable, Mapping

import anyio
import anyio.to_thread
import structlog

from service.core.errors import BlastdoorError

CHECK_WITHIN_S = 2.0
KEPT_S = 1.0

log = structlog.get_logger()


class Readiness:
    """The last answers are kept for `KEPT_S`. One that hangs is failing, and is not asked again until it is back."""

    def __init__(self, checks: Mapping[str, Callable[[], object]]) -> None:
        self._checks = checks
        self._threads = anyio.CapacityLimiter(max(1, len(checks)))
        self._one_at_a_time = anyio.Lock()
        self._hanging: set[str] = set()
        self._answers: dict[str, bool] = {}
        self._asked_at = float("-inf")

    async def ask(self) -> Mapping[str, bool]:
        async with self._one_at_a_time:
            if time.monotonic() - self._asked_at >= KEPT_S:
                answers: dict[str, bool] = {}
                async with anyio.create_task_group() as group:
                    for name in self._checks:
                        group.start_soon(self._ask_one, name, answers)
                self._answers = {name: answers.get(name, False) for name in self._checks}
                self._asked_at = time.monotonic()
            return self._answers

    async def _ask_one(self, name: str, answers: dict[str, bool]) -> None:
        if name in self._hanging:
            return
        self._hanging.add(name)
        with anyio.move_on_after(CHECK_WITHIN_S):
            answers[name] = await anyio.to_thread.run_sync(
                self._passes, name, abandon_on_cancel=True, limiter=self._threads
            )

    def _passes(self, name: str) -> bool:
        try:
            self._checks[name]()
        except (BlastdoorError, OSError) as error:
            log.warning("not_ready", check=name, error=str(error))
            return False
        except Exception:
            log.exception("not_ready", check=name)
            return False
        finally:
            self._hanging.discard(name)
        return True
