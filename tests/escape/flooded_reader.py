"""The real driver as a process of its own, whose memory its parent watches while a guest floods it.

Run as `python -m tests.escape.flooded_reader RUNTIME_DIR STORE OUTPUT_BYTES [keep-everything]`. It says `open` before
the flood and `played` after it, and each time waits for a line on stdin. `keep-everything` is the weakened reader.
"""

import sys
from pathlib import Path
from typing import Any

from service.core.boundary import Limit
from tests.sandboxes import Never, gvisor_boundary, make_ref, make_spec, make_step
from workers.boundaries.gvisor import steps
from workers.capture import HeadAndTail


class _Everything(HeadAndTail):
    def __init__(self, limit_bytes: int, **more: Any) -> None:
        super().__init__(2**40, **more)


def _say(word: str) -> None:
    print(f"\n{word}", flush=True)
    sys.stdin.readline()


def main() -> None:
    runtime_dir, store, output, *weak = sys.argv[1:]
    if weak == ["keep-everything"]:
        steps.HeadAndTail = _Everything  # type: ignore[misc]
    with gvisor_boundary(Path(runtime_dir), store=Path(store)) as boundary:
        ref = make_ref(installation=boundary.host.installation)
        with boundary.open(make_spec(output=int(output)), ref, cancelled=Never()) as sandbox:
            _say("open")
            played = sandbox.execute(make_step("yes", "AAAAAAAA", timeout_s=60))
            assert Limit.OUTPUT in played.limits, played.limits
            _say("played")
        boundary.destroy(ref)


if __name__ == "__main__":
    main()
