"""The stream of a run's events: read however the network cuts it, and followed across connections that break."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.client import (
    Client,
    NotBlastdoor,
    NotFound,
    OutputEvent,
    PhaseEvent,
    ProgressEvent,
    ResultEvent,
    ServiceFailed,
    Unreachable,
)
from service.client import events as events_module
from service.client.events import Message, Messages, order, read_event

RUN = {"id": "run_1", "phase": "finished", "outcome": "passed"}
WHOLE: list[tuple[str, str, dict[str, Any]]] = [
    (
        "1.0",
        "phase",
        {"phase": "queued", "at": "t", "attempt": 0, "outcome": None, "reason": None, "queue_position": 2},
    ),
    ("3.0", "phase", {"phase": "running", "at": "t", "attempt": 1, "outcome": None, "reason": None}),
    ("3.1", "progress", {"at": "t", "stage": "step", "step": 1, "steps": 2, "name": "a", "state": "started"}),
    ("3.2", "output", {"step": 1, "stream": "stdout", "seq": 0, "text": "one\u2028two\x85\x1b[2J\n"}),
    ("3.10", "output", {"step": 1, "stream": "stdout", "seq": 1, "text": "", "omitted": True}),
    ("5.1", "result", RUN),
]


def wire(*rows: tuple[str, str, dict[str, Any]], end: str = "\r\n") -> bytes:
    """As the service writes them, characters unescaped, with a keep-alive between them."""
    return "".join(
        f"id: {id_}{end}event: {kind}{end}data: {json.dumps(data, ensure_ascii=False)}{end}{end}: ping{end}{end}"
        for id_, kind, data in rows
    ).encode()


@given(cuts=st.lists(st.integers(0, len(wire(*WHOLE))), max_size=8), end=st.sampled_from(["\n", "\r\n", "\r"]))
def test_messages_are_the_same_however_their_bytes_are_cut(cuts: list[int], end: str) -> None:
    data = wire(*WHOLE, end=end) + b"x"  # a lone \r ends its line when something follows
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    reader = Messages()
    found = [m for a, b in itertools.pairwise(places) for m in reader.feed(data[a:b]) if m.kind]
    assert [(m.id, m.kind, json.loads(m.data)) for m in found] == WHOLE


def test_every_kind_becomes_an_object_of_its_own_and_unknown_fields_are_let_go() -> None:
    made = [read_event(Message(kind, json.dumps({**data, "later": 1}), id_)) for id_, kind, data in WHOLE]
    assert [type(event) for event in made] == [
        PhaseEvent, PhaseEvent, ProgressEvent, OutputEvent, OutputEvent, ResultEvent,
    ]  # fmt: skip
    assert made[3] == OutputEvent(id="3.2", step=1, stream="stdout", text="one\u2028two\x85\x1b[2J\n")
    assert isinstance(made[4], OutputEvent)
    assert made[4].omitted


@pytest.mark.parametrize(
    ("kind", "data", "id_"),
    [("output", "[]", "1.1"), ("output", "{}", "1.1"), ("phase", "nonsense", "1.1"), ("phase", '{"phase": "x"}', "x"),
     ("phase", '{"phase": "x"}', ""), ("phase", '{"phase": "x"}', "1.1.1"), ("result", "3", "1.1")],
)  # fmt: skip
def test_what_is_not_as_the_contract_says_is_not_taken_for_an_event(kind: str, data: str, id_: str) -> None:
    with pytest.raises(NotBlastdoor):
        read_event(Message(kind, data, id_))


def test_a_kind_of_a_later_version_is_let_go() -> None:
    assert read_event(Message("weather", "{}", "1.1")) is None


def test_ids_are_ordered_as_numbers() -> None:
    assert order("3.10") > order("3.9") > order("2.999")


def test_an_event_without_end_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "MAX_EVENT_BYTES", 1000)
    for endless in (b"data: " + b"x" * 100, b"data: " + b"x" * 90 + b"\n"):
        reader = Messages()
        with pytest.raises(NotBlastdoor):
            list(itertools.chain.from_iterable(map(reader.feed, [endless] * 20)))


# --- following --------------------------------------------------------------------------------------------------------


class Breaking(httpx.SyncByteStream):
    """A body that breaks off after some bytes, or just ends."""

    def __init__(self, data: bytes, *, error: Exception | None = None) -> None:
        self._data, self._error = data, error

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, len(self._data), 7):
            yield self._data[start : start + 7]
        if self._error:
            raise self._error


class Wire:
    """Serves the events after Last-Event-ID, `each` bytes a connection; answers from `instead` come first."""

    def __init__(self, *, each: int | None = None, error: Exception | None = None) -> None:
        self.each, self.error = each, error
        self.asked: list[str | None] = []
        self.instead: list[httpx.Response | Exception] = []
        self.slept: list[float] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        last = request.headers.get("Last-Event-ID")
        self.asked.append(last)
        if self.instead:
            next_ = self.instead.pop(0)
            if isinstance(next_, Exception):
                raise next_
            return next_
        rest = [row for row in WHOLE if last is None or order(row[0]) > order(last)]
        data = wire(*rest)
        cut = self.each is not None and len(data) > self.each
        return httpx.Response(
            200, headers={"Content-Type": "text/event-stream; charset=utf-8"},
            stream=Breaking(data[: self.each] if cut else data, error=self.error if cut else None),
        )  # fmt: skip

    def client(self) -> Client:
        transport = httpx.MockTransport(self.answer)
        return Client("http://127.0.0.1:1", "bd_t_x", transport=transport, sleep=self.slept.append)


STREAM = {"Content-Type": "text/event-stream"}
IDS = [row[0] for row in WHOLE]
LONGEST = max(len(wire(row)) for row in WHOLE)


@pytest.mark.parametrize("error", [None, httpx.ReadError("reset"), httpx.ReadTimeout("silent")], ids=str)
@pytest.mark.parametrize("each", [LONGEST, LONGEST + 40, LONGEST + 90])
def test_a_stream_that_breaks_anywhere_is_followed_without_gap_or_repetition(each: int, error: Exception) -> None:
    served = Wire(each=each, error=error)
    lost: list[object] = []
    with served.client() as client:
        found = list(client.stream("run_1", on_lost=lost.append))
    assert [event.id for event in found] == IDS
    assert found[-1] == ResultEvent(id="5.1", run=RUN)
    assert len(served.asked) > 2
    assert len(lost) == len(served.slept) == len(served.asked) - 1


def test_it_begins_after_the_event_that_was_seen() -> None:
    served = Wire()
    with served.client() as client:
        assert [event.id for event in client.stream("run_1", "3.1")] == IDS[3:]
    assert served.asked == ["3.1"]
    with served.client() as client, pytest.raises(ValueError, match=r"12\.3"):
        client.stream("run_1", "yesterday")


def test_after_the_result_there_is_nothing() -> None:
    served = Wire()
    served.instead = [httpx.Response(204)]
    with served.client() as client:
        assert list(client.stream("run_1", "5.1")) == []
    assert served.asked == ["5.1"]


def test_what_the_service_tells_twice_is_told_once() -> None:
    twice = Wire()
    body = wire(*WHOLE[:3], *WHOLE)
    stream = httpx.Response(200, headers=STREAM, content=body)
    twice.instead = [stream]
    with twice.client() as client:
        assert [event.id for event in client.stream("run_1")] == IDS


def test_a_restart_of_the_service_is_sat_out() -> None:
    busy = {"code": "unavailable", "detail": "later", "status": 503}
    served = Wire()
    served.instead = [
        httpx.ConnectError("refused"), httpx.Response(503, json=busy, headers={"Retry-After": "2"}),
    ]  # fmt: skip
    with served.client() as client:
        assert [event.id for event in client.stream("run_1")] == IDS
    assert served.slept[1] == 2.0


def test_a_service_that_stays_away_is_given_up() -> None:
    served = Wire()
    served.instead = [httpx.ConnectError("refused") for _ in range(9)]
    with served.client() as client, pytest.raises(Unreachable):
        list(client.stream("run_1", patience=0))
    silent = Wire()
    silent.instead = [httpx.Response(200, headers=STREAM, content=b"") for _ in range(9)]
    with silent.client() as client, pytest.raises(Unreachable, match="closed the stream"):
        list(client.stream("run_1", patience=0))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (httpx.Response(404, json={"code": "not_found", "status": 404}), NotFound),
        (httpx.Response(500, json={"code": "internal", "status": 500}), ServiceFailed),
        (httpx.Response(200, json=RUN), NotBlastdoor),
        (httpx.Response(502, text="bad gateway"), NotBlastdoor),
        (httpx.Response(200, headers=STREAM, content=b"id: 1.1\nevent: phase\ndata: x\n\n"), NotBlastdoor),
    ],
    ids=["absent", "failed", "a document", "a gateway", "nonsense"],
)  # fmt: skip
def test_what_is_no_outage_is_not_tried_again(answer: httpx.Response, error: type[Exception]) -> None:
    served = Wire()
    served.instead = [answer]
    with served.client() as client, pytest.raises(error):
        list(client.stream("run_1"))
    assert len(served.asked) == 1


def test_so_far_ends_where_the_service_falls_silent_and_only_there() -> None:
    served = Wire(each=len(wire(*WHOLE[:4])), error=httpx.ReadTimeout("silent"))
    with served.client() as client:
        assert [event.id for event in client.events_so_far("run_1")] == IDS[:4]
    with Wire().client() as client:
        assert [event.id for event in client.events_so_far("run_1")] == IDS
    broken = Wire(each=200, error=httpx.ReadError("reset"))
    with broken.client() as client, pytest.raises(Unreachable):
        list(client.events_so_far("run_1"))
