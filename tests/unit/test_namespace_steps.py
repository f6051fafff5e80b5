"""How a step in a pod is judged, on what an exec may bring and in whatever order."""

import struct
from collections.abc import Callable, Iterable
from typing import Any, cast

from service.core.boundary import Ended, Limit
from service.core.controls import Limits
from tests.sandboxes import Never, shell
from workers.kube import ExecEnded
from workers.pods.pod import Pod
from workers.pods.steps import Guest, play

CHUNK = b"x" * 65536
LIMITS = Limits(output=65536)


class AtOnce:
    """A pod whose API server brings all of a step, and its end, before anybody can ask for anything."""

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks

    def command(
        self, *words: str, stdin: Iterable[bytes], on_output: Callable[[str, bytes], None],
        begins: Callable[[], None], **_: Any,
    ) -> ExecEnded:  # fmt: skip
        if words == ("step",):
            begins()
            for _one in stdin:
                pass
            for _n in range(self.chunks):
                on_output("stdout", _frame(b"o", CHUNK))
            on_output("stdout", _frame(b"s", b"exited 0\ncpu_us 0\ntook_ms 1\ntasks 1\ndisk_full 0\n"))
        return ExecEnded("exited", exit_code=0)

    def kill_guest(self) -> None: ...


def _frame(kind: bytes, data: bytes) -> bytes:
    return struct.pack("<cI", kind, len(data)) + data


def _played(chunks: int) -> tuple[Ended, set[Limit]]:
    guest = Guest(cast("Pod", AtOnce(chunks)), LIMITS, Never(), wall_ends_at=float("inf"))
    seen = play(guest, shell("yes"))
    return seen.ended, set(seen.limits)


def test_a_flood_that_is_over_before_anybody_looks_has_not_passed() -> None:
    assert _played(64) == (Ended.EXITED, set()), "as much as is allowed"
    assert _played(65) == (Ended.LIMIT, {Limit.OUTPUT})
