"""How a pool's processes are added up, and scraped from the parent's event loop: real forks and sockets."""

import fcntl
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from billiard.process import current_process
from prometheus_client import CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector

from service.adapters.memory import MemoryStore
from workers.metrics import MeteredLine, PoolMetrics, place

GVISOR = {"boundary": "gvisor"}


def read(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PoolMetrics]:
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)  # put back afterwards
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    pool = PoolMetrics(tmp_path / "run")
    yield pool
    if pool._server is not None:
        pool._server.server_close()
    values.close_all_multiprocess_files()  # type: ignore[no-untyped-call, unused-ignore]
    pool.close()


def in_child(index: int, act: Callable[[], Any]) -> None:
    """As Celery's child in that place."""
    pid = os.fork()
    if pid == 0:
        try:
            current_process().index = index
            act()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def added_up(pool: PoolMetrics) -> CollectorRegistry:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(pool.directory))  # type: ignore[no-untyped-call, unused-ignore]
    return registry


def test_children_are_added_up_and_no_number_falls_when_one_is_replaced(pool: PoolMetrics) -> None:
    def play() -> None:
        pool.metrics.built.labels("gvisor").inc()
        pool.metrics.phase.labels("gvisor", "playing").observe(0.2)

    for index in (0, 1, 0, 0, 1):
        in_child(index, play)

    registry = added_up(pool)
    assert read(registry, "blastdoor_boundaries_built_total", **GVISOR) == 5
    assert read(registry, "blastdoor_run_phase_duration_seconds_count", phase="playing", **GVISOR) == 5
    assert place() == "parent"
    names = {path.name for path in pool.directory.iterdir()}
    assert {name.rpartition("_")[2] for name in names} == {"parent.db", "child0.db", "child1.db"}


def test_who_takes_a_killed_childs_place_does_not_count_its_run_as_active(pool: PoolMetrics) -> None:
    in_child(0, lambda: pool.metrics.active.set(1))
    assert read(added_up(pool), "blastdoor_active_runs") == 1

    in_child(0, lambda: MeteredLine(MemoryStore(), pool.metrics).rest())

    assert read(added_up(pool), "blastdoor_active_runs") == 0
    assert read(added_up(pool), "blastdoor_leases_lost_total", **GVISOR) == 0


def test_what_a_killed_worker_left_is_swept_and_what_a_living_one_has_is_not(pool: PoolMetrics, tmp_path: Path) -> None:
    runtime_dir = pool.directory.parent
    left = runtime_dir / "metrics-left"
    left.mkdir()
    (left / "counter_child0.db").write_bytes(b"")
    (runtime_dir / "another").mkdir()

    other = PoolMetrics(runtime_dir)
    try:
        assert {path.name for path in runtime_dir.iterdir()} == {pool.directory.name, other.directory.name, "another"}
    finally:
        other.close()
    assert not other.directory.exists()
    held = os.open(pool.directory, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(held)


def test_a_scrape_is_answered_by_whoever_holds_the_loop(pool: PoolMetrics) -> None:
    fd, answer = pool.listen(CollectorRegistry(), "127.0.0.1", 0)
    in_child(3, lambda: pool.metrics.built.labels("gvisor").inc(3))
    served = threading.Thread(target=_once, args=(fd, answer))
    served.start()

    text = httpx.get(f"http://127.0.0.1:{pool.port}/metrics", trust_env=False, timeout=30).text

    served.join(30)
    assert 'blastdoor_boundaries_built_total{boundary="gvisor"} 3.0' in text


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\nX: "])
def test_a_client_that_says_nothing_or_not_enough_does_not_keep_the_loop(pool: PoolMetrics, sent: bytes) -> None:
    fd, answer = pool.listen(CollectorRegistry(), "127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", pool.port)) as client:
        client.sendall(sent)
        loop = threading.Thread(target=_once, args=(fd, answer))
        loop.start()
        client.settimeout(60)
        assert client.recv(100) == b""  # hung up, though the client never did
        loop.join(30)
        assert not loop.is_alive()


def _once(fd: int, answer: Callable[[], None]) -> None:
    """As the worker's event loop does, when somebody has connected."""
    select.select([fd], [], [], 30)
    answer()
