"""The Python client against the API as it is served, over a wire that loses answers and breaks streams."""

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree import ElementTree

import pytest

from service.client import (
    CannotSave,
    Client,
    NotFinishedInTime,
    NotFound,
    OutputEvent,
    Refused,
    ResultEvent,
    Unreachable,
)
from service.core.boundary import Artifact
from tests.factories import make_result, make_step_result
from tests.integration.api.conftest import Served
from tests.integration.api.test_events import Played, output
from tests.servers import LOOPBACK

SCENARIO = b"name: hello\nsteps: [{name: only, run: 'true'}]\n"
Cut = Callable[[int], int | None]


class Wire:
    """A TCP proxy. `cut` says of each connection, from 0, after how many bytes of answer it breaks; None: never."""

    def __init__(self, url: str, cut: Cut) -> None:
        parts = urlsplit(url)
        self._to, self._cut = (parts.hostname, parts.port), cut
        self._listening = socket.create_server((LOOPBACK, 0))
        self.url = f"http://{LOOPBACK}:{self._listening.getsockname()[1]}"
        self.connections = 0
        self._threads: list[threading.Thread] = []
        self._ends: list[socket.socket] = []
        self._start(self._accept)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join(10)
        for end in self._ends:
            end.close()

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                left, self.connections = self._cut(self.connections), self.connections + 1
                far = socket.create_connection(self._to)
                self._ends += (near, far)
                self._start(self._pump, near, far, None)
                self._start(self._pump, far, near, left)

    def _pump(self, source: socket.socket, target: socket.socket, left: int | None) -> None:
        """Until either side ends, or `left` bytes were passed on; then both ends hear of it."""
        with suppress(OSError):
            while data := source.recv(65536):
                if left is not None and len(data) > left:
                    target.sendall(data[:left])
                    break
                left = None if left is None else left - len(data)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def wired(served: Served, cut: Cut) -> Iterator[Wire]:
    wire = Wire(served.url, cut)
    try:
        yield wire
    finally:
        wire.close()


def client(served: Served, url: str | None = None, who: str = "acme", tenant: str | None = None) -> Client:
    return Client(url or served.url, served.keys[who], tenant)


# --- submitting -------------------------------------------------------------------------------------------------------


def test_an_upload_whose_first_answer_is_lost_is_one_run(served: Served, tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "main.py").write_bytes(os.urandom(1_000_000))
    with (
        wired(served, lambda connection: 0 if connection == 0 else None) as wire,
        client(served, wire.url) as blastdoor,
    ):
        run = blastdoor.submit(code, scenario=SCENARIO, metadata={"order": "7"})
        assert wire.connections == 2
    with client(served) as blastdoor:
        assert [each["id"] for each in blastdoor.list()] == [run["id"]]
        assert blastdoor.get(run["id"])["metadata"] == {"order": "7"}


def test_without_the_key_the_same_loss_would_be_two_runs(served: Served) -> None:
    """The positive control: the first upload does arrive, though nobody hears of it."""
    with (
        wired(served, lambda connection: 0 if connection == 0 else None) as wire,
        client(served, wire.url) as blastdoor,
    ):
        for key in ("one", "two"):
            with suppress(Exception):
                blastdoor.submit(scenario=SCENARIO, idempotency_key=key)
    with client(served) as blastdoor:
        assert len(list(blastdoor.list())) == 2


def test_the_same_directory_is_the_same_content_for_the_service(served: Served, tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "a").write_text("1")
    with client(served) as blastdoor:
        runs = [blastdoor.submit(code, scenario=SCENARIO, idempotency_key="order-7") for _ in range(2)]
        assert runs[0]["id"] == runs[1]["id"]
        (code / "a").write_text("2")
        with pytest.raises(Refused) as raised:
            blastdoor.submit(code, scenario=SCENARIO, idempotency_key="order-7")
    assert raised.value.code == "idempotency_mismatch"
    assert raised.value.document["status"] == 422


def test_a_refusal_names_each_place(served: Served) -> None:
    with client(served) as blastdoor, pytest.raises(Refused) as raised:
        blastdoor.submit(scenario={"name": "x", "steps": [{"name": "y"}], "surprise": 1})
    assert raised.value.code == "scenario_invalid"
    assert {"steps.1.run", "surprise"} <= {row["path"] for row in raised.value.document["errors"]}


def test_a_service_acts_for_its_tenant(served: Served) -> None:
    with client(served, who="shop", tenant="corner") as blastdoor:
        run = blastdoor.submit(scenario=SCENARIO)
        assert run["tenant"] == "corner"
        assert [tenant["name"] for tenant in blastdoor.tenants.list()["items"]] == ["corner"]
    with client(served) as stranger, pytest.raises(NotFound):
        stranger.get(run["id"])


# --- waiting and following --------------------------------------------------------------------------------------------


def test_waiting_ends_with_the_run_or_with_the_time(served: Served) -> None:
    with client(served) as blastdoor:
        run_id = blastdoor.submit(scenario=SCENARIO)["id"]
        with pytest.raises(NotFinishedInTime) as raised:
            blastdoor.wait(run_id, timeout=0.05)
        assert raised.value.run["phase"] == "queued"
        served.play()
        assert blastdoor.wait(run_id, timeout=30)["outcome"] == "passed"


def tell(served: Served, *, at_once: threading.Event | None = None) -> str:
    """A run with twenty lines of output; with `at_once` its end comes only when that is set. -> its id."""
    played = Played(served)
    played.run()
    played.say(*(output(k, f"line {k}\u2028\x1b[2J\n" + "x" * 200) for k in range(1, 21)))

    def end() -> None:
        if at_once is not None:
            assert at_once.wait(60)
        played.finish()

    threading.Thread(target=end, daemon=True).start() if at_once else end()
    return played.id


def test_a_stream_is_typed_events_and_ends_with_the_run(served: Served) -> None:
    goes_on = threading.Event()
    run_id = tell(served, at_once=goes_on)
    with client(served) as blastdoor:
        events = []
        for event in blastdoor.stream(run_id):
            events.append(event)
            if isinstance(event, OutputEvent) and event.seq == 19:
                assert blastdoor.get(run_id)["phase"] == "running", "it is told while it happens"
                goes_on.set()
    assert [e.text[:7] for e in events if isinstance(e, OutputEvent)] == [f"line {k}\u2028"[:7] for k in range(1, 21)]
    assert isinstance(events[-1], ResultEvent)
    assert events[-1].run["outcome"] == "passed"


@pytest.mark.parametrize("each", [2400, 3301])
def test_a_stream_that_breaks_again_and_again_is_told_without_gap_or_repetition(served: Served, each: int) -> None:
    run_id = tell(served)
    with client(served) as blastdoor:
        whole = list(blastdoor.stream(run_id))
    lost: list[object] = []
    with wired(served, lambda connection: each if connection < 5 else None) as wire, client(served, wire.url) as cut:
        found = list(cut.stream(run_id, on_lost=lost.append))
        assert wire.connections >= 3
    assert [event.id for event in found] == [event.id for event in whole]
    assert [e for e in found if isinstance(e, OutputEvent)] == [e for e in whole if isinstance(e, OutputEvent)]
    assert len(lost) >= 2


def test_a_stream_resumes_after_any_event_and_has_nothing_after_the_last(served: Served) -> None:
    run_id = tell(served)
    with client(served) as blastdoor:
        whole = [event.id for event in blastdoor.stream(run_id)]
        for place, id_ in enumerate(whole):
            assert [event.id for event in blastdoor.stream(run_id, id_)] == whole[place + 1 :]


def test_so_far_is_what_has_happened_and_does_not_wait_for_the_rest(served: Served) -> None:
    played = Played(served)
    played.run()
    played.say(output(1, "one"))
    with client(served) as blastdoor:
        events = list(blastdoor.events_so_far(played.id, quiet=1.0))
    assert [event.id for event in events] == ["1.0", "2.0", "3.0", "3.1"]


def test_the_stream_of_a_run_that_is_not_ours_is_absent(served: Served) -> None:
    run_id = tell(served)
    with client(served, who="globex") as stranger, pytest.raises(NotFound):
        next(stranger.stream(run_id))


# --- what it left -----------------------------------------------------------------------------------------------------


def left(served: Served, files: dict[str, bytes], *, says: dict[str, bytes] | None = None) -> str:
    """A finished run with these artifacts; `says`: what its record has for them instead."""
    blobs = served.app.state.context.deps.blobs
    run_id = str(served.submit()["id"])
    claim = served.claim()
    served.store.mark_running(run_id, claim.fence)
    served.store.mark_collecting(run_id, claim.fence)
    artifacts = []
    for path, data in files.items():
        blobs.put_bytes("acme", data)
        recorded = (says or {}).get(path, data)
        artifacts.append(Artifact(path=path, bytes=len(recorded), sha256=hashlib.sha256(recorded).hexdigest()))
    result = make_result(
        steps=(make_step_result(text="x"),), artifacts=tuple(artifacts),
        outputs={"1.stdout": blobs.put_bytes("acme", b"\xff\x00all of it")}, output_bytes={"1.stdout": 11},
    )  # fmt: skip
    served.store.finish(run_id, claim.fence, result)
    served.store.record_destroyed(run_id, claim.fence)
    return run_id


def test_output_artifacts_and_report_come_back_as_they_were_left(served: Served, tmp_path: Path) -> None:
    files = {"out/a b%.json": b"{}", "Ümläut": b"\x00\xff", "steps/1/stdout": b"x" * 700_000}
    run_id = left(served, files)
    with client(served) as blastdoor:
        run = blastdoor.get(run_id)
        assert blastdoor.output(run_id, 1) == b"\xff\x00all of it"
        assert blastdoor.output(run_id, 1, "stderr") == b""
        assert {path: blastdoor.artifact(run_id, path) for path in files} == files
        assert set(blastdoor.save_artifacts(run, tmp_path / "new")) == set(files)
        assert ElementTree.fromstring(blastdoor.junit(run_id)).attrib["tests"] == "1"
        with pytest.raises(NotFound):
            blastdoor.artifact(run_id, "../steps/1/stdout")
        blastdoor.delete(run_id)
        with pytest.raises(NotFound):
            blastdoor.get(run_id)
    assert {path: (tmp_path / "new" / path).read_bytes() for path in files} == files


def test_a_download_that_is_cut_short_is_an_error_and_no_short_file(served: Served, tmp_path: Path) -> None:
    run_id = left(served, {"a": b"x" * 700_000})
    with wired(served, lambda _: 300_000) as wire, client(served, wire.url) as blastdoor, pytest.raises(Unreachable):
        blastdoor.artifact(run_id, "a")
    with wired(served, lambda connection: 300_000 if connection else None) as wire:
        with client(served, wire.url) as blastdoor:
            run = blastdoor.get(run_id)
        with client(served, wire.url) as blastdoor, pytest.raises(Unreachable):
            blastdoor.save_artifacts(run, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


# --- a service that lies ----------------------------------------------------------------------------------------------


class Liar:
    """A hostile service on a real socket: every artifact it names is answered with the same bytes."""

    def __init__(self) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = b"owned"
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self.url = f"http://{LOOPBACK}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.fixture
def liar() -> Iterator[Liar]:
    liar = Liar()
    yield liar
    liar.close()


def claimed(*paths: str, data: bytes = b"owned", size: int | None = None) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    rows = [{"path": path, "bytes": len(data) if size is None else size, "sha256": digest} for path in paths]
    return {"id": "run_1", "artifacts": rows}


def test_a_hostile_service_writes_nothing_outside_of_the_directory(liar: Liar, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with Client(liar.url, "bd_t_x") as blastdoor:
        for n, path in enumerate(("../evil", "/etc/evil", "a/../../evil", "..", "a/..", "./a", "a//b", "nul\0", "")):
            with pytest.raises(CannotSave):
                blastdoor.save_artifacts(claimed("good", path), home / str(n))
        assert list(home.iterdir()) == []
        for n, paths in enumerate((("a", "a"), ("a", "a/b"), ("a/b", "a"))):
            with pytest.raises(CannotSave):
                blastdoor.save_artifacts(claimed(*paths), home / f"twice {n}")
        for n, wrong in enumerate((claimed("a", data=b"other"), claimed("a", size=2))):
            with pytest.raises(CannotSave):
                blastdoor.save_artifacts(wrong, home / f"wrong {n}")
            assert list((home / f"wrong {n}").iterdir()) == []
        assert blastdoor.save_artifacts(claimed("a/b", "c"), home / "fine") == ("a/b", "c")  # and so it does write
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (home / "fine" / "a" / "b").read_bytes() == b"owned"
