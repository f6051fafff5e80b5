"""The sentry's answers are hostile bytes. A sentry of the test's own gives them over a real socket."""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from workers.boundaries.gvisor.control import (
    CONTAINER,
    Connection,
    ControlLost,
    ControlRefused,
    GuestProcess,
    guest_processes,
    wait_status,
)


@contextmanager
def sentry(directory: Path, answer: Callable[[bytes], list[bytes]]) -> Iterator[Connection]:
    """One that gives these packets to the first call, then closes."""
    root_fd = os.open(directory, os.O_RDONLY)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"/proc/self/fd/{root_fd}/runsc-{CONTAINER}.sock")
    listener.listen(1)

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            request = peer.recv(65536)
            try:
                for packet in answer(request):
                    peer.sendall(packet)
            except (BrokenPipeError, ConnectionResetError):
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with Connection(root_fd) as connection:
            yield connection
    finally:
        thread.join()
        listener.close()
        os.close(root_fd)


def test_a_call_is_json_with_a_method_and_an_argument(tmp_path: Path) -> None:
    seen: list[bytes] = []
    with sentry(tmp_path, lambda request: [seen.append(request) or b'{"success":true,"err":"","result":7}']) as sentry_:
        assert sentry_.call("WaitPID", {"PID": 3, "CID": CONTAINER}) == 7
    assert json.loads(seen[0]) == {"method": "containerManager.WaitPID", "arg": {"PID": 3, "CID": CONTAINER}}


def test_an_answer_in_pieces_is_put_together(tmp_path: Path) -> None:
    whole = json.dumps({"success": True, "err": "", "result": [{"a": "}"}] * 10000}).encode()
    pieces = [whole[i : i + 5000] for i in range(0, len(whole), 5000)]
    with sentry(tmp_path, lambda _: pieces) as sentry_:
        assert len(sentry_.call("Processes", CONTAINER)) == 10000


def test_a_refusal_carries_its_words_cut_to_a_sane_length(tmp_path: Path) -> None:
    answer = json.dumps({"success": False, "err": "no " * 1000, "result": None}).encode()
    with sentry(tmp_path, lambda _: [answer]) as sentry_, pytest.raises(ControlRefused) as refused:
        sentry_.call("ExecuteAsync", {})
    assert len(str(refused.value)) == 1024


@pytest.mark.parametrize(
    "packets",
    [
        [],
        [b"{"],
        [b"[]}"],
        [b'{"result": 1}'],
        [b'{"success": "yes"}'],
        [b"null"],
        [b"x" * 70000] * 20,
    ],
)
def test_anything_else_is_a_lost_sandbox(tmp_path: Path, packets: list[bytes]) -> None:
    with sentry(tmp_path, lambda _: packets) as sentry_, pytest.raises(ControlLost):
        sentry_.call("WaitPID", {}, timeout_s=5)


def test_silence_ends_after_the_time_it_was_given(tmp_path: Path) -> None:
    waiting = threading.Event()

    def silent(_: bytes) -> list[bytes]:
        waiting.wait(5)
        return []

    with sentry(tmp_path, silent) as sentry_:
        with pytest.raises(ControlLost, match="did not answer"):
            sentry_.call("WaitPID", {}, timeout_s=0.05)
        waiting.set()


def test_descriptors_in_an_answer_are_never_taken(tmp_path: Path) -> None:
    root_fd = os.open(tmp_path, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{root_fd}/runsc-{CONTAINER}.sock")
        listener.listen(1)
        with Connection(root_fd) as connection:
            peer, _ = listener.accept()
            connection.ask("Processes", CONTAINER)
            before = len(os.listdir("/proc/self/fd"))
            socket.send_fds(peer, [b'{"success":true,"err":"","result":null}'], [0, 1, 2])
            assert connection.receive() == (True, None)
            assert len(os.listdir("/proc/self/fd")) == before
            peer.close()
    os.close(root_fd)


def test_no_sentry_is_a_lost_sandbox(tmp_path: Path) -> None:
    root_fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(ControlLost):
        Connection(root_fd)
    os.close(root_fd)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [(0, (0, None)), (139 << 8, (139, None)), (255 << 8, (255, None)), (11, (None, 11)), (128 | 6, (None, 6))],
)
def test_wait_statuses(raw: int, expected: tuple[int | None, int | None]) -> None:
    assert wait_status(raw) == expected


@pytest.mark.parametrize("raw", [-1, 0x1_0000, 0x7F, 0x137F, True, "0", None, 1.0])
def test_what_is_no_exit_is_no_wait_status(raw: object) -> None:
    with pytest.raises(ControlLost):
        wait_status(raw)


def test_processes_count_threads() -> None:
    rows = [{"uid": 65532, "pid": 2, "threads": [2, 3]}, {"uid": 0, "pid": 1, "threads": None}]
    assert guest_processes(rows) == [
        GuestProcess(pid=2, uid=65532, threads=2),
        GuestProcess(pid=1, uid=0, threads=0),
    ]
    assert guest_processes(None) == []


@pytest.mark.parametrize(
    "rows", [[{}], [1], "x", [{"uid": "x", "pid": 1, "threads": []}], [{"uid": 1, "pid": -1, "threads": []}]]
)
def test_a_malformed_process_list_is_a_lost_sandbox(rows: object) -> None:
    with pytest.raises(ControlLost):
        guest_processes(rows)
