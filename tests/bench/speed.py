"""How long a run takes, beside the same program by hand.

Interleaved: each round submits one run and does the same program by hand, so that a slow moment of the machine hits
both. Times are this process's monotonic clock, which is the host's.
"""

import ctypes
import json
import math
import os
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.bench.bare import Bare
from tests.bench.figures import percentile
from tests.bench.live import Service, progress, running, scratch, submit
from workers.runtimes.store import RuntimeStore

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "50"))
LOOP = int(os.environ.get("BENCH_LOOP", "20"))
CORES = os.cpu_count() or 1
PR_SET_CHILD_SUBREAPER = 36


def measure(runsc: Path) -> dict[str, Any]:
    with scratch() as place, running() as service:
        bares = [_bare_at(place / f"bare{n}", runsc, place / "runtimes") for n in range(CORES)]
        # A child of its own, so that this process never has to reap what a bare run detached.
        return _sequential_in_child(service, bares[0]) | _throughput(service, bares)


def _bare_at(place: Path, runsc: Path, store: Path) -> Bare:
    root = RuntimeStore(store).get("default")
    mounts: list[dict[str, object]] = [
        {"destination": str(at), "type": "bind", "source": str(source), "options": ["rbind", "ro"]}
        for source, at in root.binds
    ]
    mounts += [{"destination": str(at), "type": "tmpfs", "source": "tmpfs", "options": ["ro"]} for at in root.masks]
    place.mkdir(parents=True)
    return Bare(runsc=runsc, place=place, root=root.path, mounts=tuple(mounts))


def _sequential(service: Service, bare: Bare) -> dict[str, float]:
    runs: dict[str, tuple[float, float]] = {}
    bare_runs, lifecycles = [], []
    with service.client() as client:
        submit(client)
        bare.run("warm")
        for number in range(ROUNDS):
            run_id, started, ended = submit(client)
            runs[run_id] = started, ended
            lifecycles.append(bare.lifecycle(f"l{number}"))
            if number % 2 == 0:
                bare_runs.append(bare.run(f"r{number}"))
            progress(f"sequential {number + 1}/{ROUNDS}")
    time.sleep(0.5)
    took = [ended - started for started, ended in runs.values()]
    inside = _runsc_seconds(service.state / "logs" / "worker.log", runs)
    outside = [(ended - started - inside[run_id]) for run_id, (started, ended) in runs.items() if run_id in inside]
    p50 = statistics.median(took)
    return {
        "bare_run_p50_s": statistics.median(bare_runs),
        "bare_lifecycle_p50_s": statistics.median(lifecycles),
        "submit_to_result_p50_s": p50,
        "submit_to_result_p95_s": percentile(took, 95),
        "sequential_ratio": p50 / statistics.median(lifecycles),
        "sequential_ratio_to_run": p50 / statistics.median(bare_runs),
        "control_plane_p50_ms": statistics.median(outside) * 1000 if outside else math.nan,
    }


def _runsc_seconds(log: Path, runs: dict[str, tuple[float, float]]) -> dict[str, float]:
    """For each run, how long its runsc command was executing between submission and result, from the worker's log
    (`sandbox_ended`, with the supervisor's own monotonic times)."""
    found: dict[str, float] = {}
    for line in log.read_text().splitlines():
        if '"sandbox_ended"' not in line:
            continue
        record = json.loads(line)
        if record["run_id"] in runs:
            started, ended = runs[record["run_id"]]
            born, gone = record["runsc_lived"]
            inside = min(gone, ended) - max(born, started)
            found[record["run_id"]] = max(inside, 0.0)
    return found


def _throughput(service: Service, bares: list[Bare]) -> dict[str, float]:
    """Runs a second with as many in flight as cores: ours and by hand, in alternating blocks."""
    ours, by_hand = [], []
    for block in range(3):
        progress(f"throughput block {block + 1}/3")
        ours.append(_rate(lambda _: _submit_loop(service), threads=True))
        by_hand.append(_rate(lambda n, b=block: _bare_loop(bares[n], b), threads=False))
    return {
        "throughput_runs_per_s": statistics.median(ours),
        "bare_throughput_per_s": statistics.median(by_hand),
        "throughput_ratio": statistics.median(a / b for a, b in zip(ours, by_hand, strict=True)),
    }


def _submit_loop(service: Service) -> None:
    with service.client() as client:
        for _ in range(LOOP):
            submit(client)


def _bare_loop(bare: Bare, block: int) -> None:
    _become_subreaper()
    for number in range(LOOP):
        bare.lifecycle(f"t{block}-{number}")


def _rate(loop: Callable[[int], None], *, threads: bool) -> float:
    """A bare loop is a process of its own, since it reaps its own orphans."""
    make: Any = threading.Thread if threads else get_context("fork").Process
    workers = [make(target=loop, args=(number,)) for number in range(CORES)]
    started = time.monotonic()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if not threads and worker.exitcode != 0:
            raise SystemExit("a bare loop failed")
    return CORES * LOOP / (time.monotonic() - started)


def _sequential_in_child(service: Service, bare: Bare) -> dict[str, float]:
    context = get_context("fork")
    queue = context.SimpleQueue()

    def measured() -> None:
        _become_subreaper()
        queue.put(_sequential(service, bare))

    child = context.Process(target=measured)
    child.start()
    child.join()
    if child.exitcode != 0:
        raise SystemExit("the sequential measurement failed")
    figures: dict[str, float] = queue.get()
    return figures


def _become_subreaper() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
