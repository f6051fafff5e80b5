"""`make bench`: run the service and the bare runtime side by side, print the figures, write bench.json.

Interleaved: each round submits one run and does the same program by hand, so that a slow moment of the machine hits
both. Times are this process's monotonic clock, which is the host's.
"""

import ctypes
import http.client
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.bench.bare import PROGRAM, Bare
from workers.runtimes.store import RuntimeStore

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "50"))
LOOP = int(os.environ.get("BENCH_LOOP", "20"))
CORES = os.cpu_count() or 1
PR_SET_CHILD_SUBREAPER = 36
SCENARIO = json.dumps({"name": "one line", "steps": [{"name": "hello", "run": list(PROGRAM)}]})
UPLOAD = f'--bench\r\nContent-Disposition: form-data; name="scenario"\r\n\r\n{SCENARIO}\r\n--bench--\r\n'.encode()


class Service:
    """`blastdoor up` in a directory of its own."""

    def __init__(self, state: Path) -> None:
        self.state = state
        command = [sys.executable, "-m", "service.cli.main", "up", "--json", "--state", str(state), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("`blastdoor up` did not start; see the logs in " + str(state))
        self.ready: dict[str, str] = json.loads(line)

    def client(self) -> "Client":
        return Client(urlsplit(self.ready["url"]).netloc, self.ready["tenant_key"])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)


class Client:
    """The least that a client can be, on one kept connection: what is measured is the service."""

    def __init__(self, address: str, key: str) -> None:
        self._connection = http.client.HTTPConnection(address, timeout=90)
        self._headers = {"Authorization": f"Bearer {key}"}

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> dict[str, Any]:
        self._connection.request(method, path, body, self._headers | headers)
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise SystemExit(f"{method} {path}: {answer.status} {text.decode()}")
        document: dict[str, Any] = json.loads(text)
        return document


def submit(client: Client) -> tuple[str, float, float]:
    """One run from POST to its result; -> (id, start, end) on the monotonic clock."""
    started = time.monotonic()
    run = client.ask("POST", "/v1/runs", UPLOAD, **{"Content-Type": "multipart/form-data; boundary=bench"})
    while run["phase"] != "finished":
        run = client.ask("GET", f"/v1/runs/{run['id']}?wait=30")
    ended = time.monotonic()
    if run["outcome"] != "passed":
        raise SystemExit(f"the benchmark's run did not pass: {json.dumps(run, indent=1)}")
    return run["id"], started, ended


def runsc_seconds(log: Path, runs: dict[str, tuple[float, float]]) -> dict[str, float]:
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


def bare_at(place: Path, runsc: Path, store: Path) -> Bare:
    root = RuntimeStore(store).get("default")
    mounts: list[dict[str, object]] = [
        {"destination": str(at), "type": "bind", "source": str(source), "options": ["rbind", "ro"]}
        for source, at in root.binds
    ]
    mounts += [{"destination": str(at), "type": "tmpfs", "source": "tmpfs", "options": ["ro"]} for at in root.masks]
    place.mkdir(parents=True)
    return Bare(runsc=runsc, place=place, root=root.path, mounts=tuple(mounts))


def sequential(service: Service, bare: Bare) -> dict[str, float]:
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
            _progress(f"sequential {number + 1}/{ROUNDS}")
    time.sleep(0.5)
    took = [ended - started for started, ended in runs.values()]
    inside = runsc_seconds(service.state / "logs" / "worker.log", runs)
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


def throughput(service: Service, bares: list[Bare]) -> dict[str, float]:
    """Runs a second with as many in flight as cores: ours and by hand, in alternating blocks."""
    ours, by_hand = [], []
    for block in range(3):
        _progress(f"throughput block {block + 1}/3")
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
    become_subreaper()
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


def percentile(values: list[float], percent: int) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def become_subreaper() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def versions(runsc: Path) -> dict[str, str]:
    def of(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()[0]

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "blastdoor_commit": commit.stdout.strip(),
        "runsc": of(str(runsc), "--version"),
        "redis": of("redis-server", "--version"),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def _progress(text: str) -> None:
    sys.stderr.write(f"\r\033[K{text}" if sys.stderr.isatty() else "")
    sys.stderr.flush()


def main() -> None:
    runsc = Path(os.environ.get("BLASTDOOR_RUNSC") or shutil.which("runsc") or "/usr/bin/runsc")
    scratch = Path(tempfile.mkdtemp(prefix="blastdoor-bench-"))
    service = Service(scratch / "state")
    try:
        bares = [bare_at(scratch / f"bare{n}", runsc, scratch / "runtimes") for n in range(CORES)]
        # A child of its own, so that this process never has to reap what a bare run detached.
        figures = sequential_in_child(service, bares[0]) | throughput(service, bares)
    finally:
        service.stop()
        shutil.rmtree(scratch, ignore_errors=True)
    _progress("")
    rounded = {name: round(value, 4) for name, value in figures.items()}
    for name, value in rounded.items():
        print(f"{name:<28}{value:>10}")
    machine = {"cores": CORES, "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    document = rounded | {"versions": versions(runsc), "machine": machine}
    Path("bench.json").write_text(json.dumps(document, indent=2) + "\n")
    print("written to bench.json")


def sequential_in_child(service: Service, bare: Bare) -> dict[str, float]:
    context = get_context("fork")
    queue = context.SimpleQueue()

    def measure() -> None:
        become_subreaper()
        queue.put(sequential(service, bare))

    child = context.Process(target=measure)
    child.start()
    child.join()
    if child.exitcode != 0:
        raise SystemExit("the sequential measurement failed")
    figures: dict[str, float] = queue.get()
    return figures


if __name__ == "__main__":
    main()
