"""The judge itself: a clean history is clean, and each planted violation is found and named."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest

from tests.faults.history import INVARIANTS, Entry, judge, main

RUN, OTHER = "run_" + "a" * 32, "run_" + "b" * 32
Change = Callable[[list[Entry]], object]


def clean() -> list[Entry]:
    """Two tenants, a run each; the first was requeued once, and told of by webhook twice under one id."""
    lives = {
        RUN: [("queued", 0), ("provisioning", 1), ("requeued", 1), ("provisioning", 2), ("running", 2),
              ("collecting", 2), ("finished", None)],
        OTHER: [("queued", 0), ("provisioning", 1), ("running", 1), ("collecting", 1), ("finished", None)],
    }  # fmt: skip
    entries: list[Entry] = [{"kind": "endpoint", "receiver": "acme"}]
    for run, tenant in ((RUN, "acme"), (OTHER, "umbrella")):
        token = f"token-{tenant}"
        fence = max(known for _, known in lives[run] if known is not None)
        seen = {"kind": "answer", "asker": tenant, "about": run, "status": 200, "runs": [run], "tokens": [token]}
        entries += [
            {"kind": "accepted", "run": run, "tenant": tenant, "key": f"key-{tenant}", "token": token, "at": 1.0},
            seen | {"asked_at": 2.0, "at": 2.1, "phase": "running", "outcome": None, "reason": None},
            seen | {"asked_at": 4.0, "at": 4.1, "phase": "finished", "outcome": "passed", "reason": None},
            seen | {"asked_at": 5.0, "at": 5.1, "phase": "finished", "outcome": "passed", "reason": None},
        ]
        destroyed: list[tuple[str, int | None]] = [("boundary.destroyed", n) for n in range(1, fence + 1)]
        for seq, (name, known) in enumerate([*lives[run], *destroyed], start=1):
            event = {
                "run": run, "tenant": tenant, "id": f"evt_{run[-1]}{seq}", "seq": seq, "fence": known,
                "type": name if "." in name else f"run.{name}", "outcome": "passed" if name == "finished" else None,
            }  # fmt: skip
            entries += [{"kind": "event"} | event, {"kind": "bus", "entry": f"{len(entries)}-0"} | event]
            if name == "finished":
                told = {"kind": "webhook", "id": event["id"], "run": run, "type": event["type"], "receiver": tenant}
                entries += [told, dict(told)]
        for n in range(1, fence + 1):
            entries.append({"kind": "boundary", "what": "opened", "run": run, "fence": n, "beside": []})
            if n == fence:
                entries.append({"kind": "boundary", "what": "played", "run": run, "fence": n, "n": 1})
            entries.append({"kind": "boundary", "what": "closed", "run": run, "fence": n})
        entries.append({"kind": "write", "run": run, "fence": fence, "held": fence, "accepted": True})
        entries.append({"kind": "row", "run": run, "tenant": tenant, "phase": "finished", "outcome": "passed",
                        "reason": None, "fence": fence, "destroyed_fence": fence})  # fmt: skip
    stranger = {"kind": "answer", "asker": "umbrella", "about": RUN, "asked_at": 3.0, "at": 3.1}
    entries += [
        stranger | {"status": 404, "runs": [RUN], "tokens": []},
        {"kind": "write", "run": RUN, "fence": 1, "held": 2, "accepted": False},
        {"kind": "world", "at": 2.0, "live": [[RUN, 2], [OTHER, 1]]},
        {"kind": "sweep", "planted": True, "found": ["cgroup planted"]},
        {"kind": "sweep", "planted": False, "found": []},
    ]
    return entries


def only(entries: list[Entry], kind: str, **words: object) -> Entry:
    """The first such entry, to be changed in place."""
    return next(e for e in entries if e["kind"] == kind and all(e.get(name) == word for name, word in words.items()))


def without(kind: str, **words: object) -> Change:
    return lambda entries: entries.remove(only(entries, kind, **words))


def changed(kind: str, *, to: dict[str, object], **words: object) -> Change:
    return lambda entries: only(entries, kind, **words).update(to)


def again(kind: str, *, to: dict[str, object], **words: object) -> Change:
    def change(entries: list[Entry]) -> None:
        found = only(entries, kind, **words)
        entries.insert(entries.index(found) + 1, deepcopy(found) | to)

    return change


PLANTED: list[tuple[str, str, Change]] = [
    ("I1", "a run that never ends", changed("row", run=RUN, to={"phase": "running", "outcome": None})),
    ("I1", "no terminal event", without("event", run=RUN, type="run.finished")),
    ("I1", "two terminal events", again("event", run=RUN, type="run.finished", to={"id": "evt_x", "seq": 60})),
    ("I2", "shown as another outcome later", changed("answer", about=RUN, asked_at=5.0, to={"outcome": "failed"})),
    ("I2", "running again", changed("answer", about=RUN, asked_at=5.0, to={"phase": "running", "outcome": None})),
    ("I2", "the row says otherwise", changed("row", run=RUN, to={"outcome": "errored"})),
    ("I2", "an event after the end", again("event", run=RUN, type="run.running", to={"id": "evt_x", "seq": 70})),
    ("I3", "two terminal ids on the bus", again("bus", run=RUN, type="run.finished", to={"id": "evt_x"})),
    ("I3", "none on the bus", without("bus", run=RUN, type="run.finished")),
    ("I3", "an event that is not on the bus", without("bus", run=RUN, type="run.running")),
    ("I3", "a webhook with an id of its own", again("webhook", run=RUN, to={"id": "evt_x"})),
    ("I3", "no webhook told of its end", lambda entries: [without("webhook", run=RUN)(entries) for _ in range(2)]),
    ("I3", "out of order", lambda entries: _swap(entries, "run.running", "run.collecting")),
    ("I4", "opened beside another", changed("boundary", run=RUN, what="opened", fence=2, to={"beside": [1]})),
    ("I4", "opened before the first was closed", without("boundary", run=RUN, what="closed", fence=1)),
    ("I4", "two stand", changed("world", to={"live": [[RUN, 1], [RUN, 2]]})),
    ("I4", "a step played under two fences", again("boundary", run=RUN, what="played", to={"fence": 1})),
    ("I4", "a step played twice", again("boundary", run=RUN, what="played", to={})),
    ("I5", "claimed twice under a fence", changed("event", run=RUN, type="run.provisioning", fence=2, to={"fence": 1})),
    ("I5", "an old fence wrote", changed("event", run=RUN, type="run.running", to={"fence": 1})),
    ("I5", "a stale write was taken", changed("write", run=RUN, fence=1, to={"accepted": True})),
    ("I5", "a write was taken when nobody held it", changed("write", run=RUN, fence=2, to={"held": 0})),
    ("I5", "a boundary that nothing claimed", again("boundary", run=RUN, what="closed", fence=2,
                                                    to={"what": "opened", "fence": 9, "beside": []})),
    ("I6", "something is left", changed("sweep", planted=False, to={"found": ["mount /left"]})),
    ("I6", "nobody swept", without("sweep", planted=False)),
    ("I6", "the sweep is blind", changed("sweep", planted=True, to={"found": []})),
    ("I6", "a boundary nobody saw go", changed("row", run=RUN, to={"destroyed_fence": 1})),
    ("I7", "a stranger may read it", changed("answer", about=RUN, asker="umbrella", to={"status": 200})),
    ("I7", "a stranger sees its output", changed("answer", about=OTHER, to={"tokens": ["token-acme"]})),
    ("I7", "a stranger's list has it", changed("answer", about=OTHER, to={"runs": [OTHER, RUN]})),
    ("I7", "its event is called another's", changed("bus", run=RUN, to={"tenant": "umbrella"})),
    ("I7", "its webhook goes elsewhere", changed("webhook", run=RUN, to={"receiver": "umbrella"})),
    ("I8", "it is in no database", without("row", run=RUN)),
    ("I8", "one request, two runs", again("accepted", run=RUN, to={"run": "run_" + "c" * 32})),
]  # fmt: skip


def _swap(entries: list[Entry], one: str, other: str) -> None:
    first, second = (entries.index(only(entries, "bus", run=RUN, type=name)) for name in (one, other))
    entries[first], entries[second] = entries[second], entries[first]


def test_a_clean_history_is_clean() -> None:
    assert judge(clean()) == []


@pytest.mark.parametrize(("invariant", "what", "change"), PLANTED, ids=[f"{i}: {what}" for i, what, _ in PLANTED])
def test_a_planted_violation_is_found_and_named(invariant: str, what: str, change: Change) -> None:
    entries = clean()
    change(entries)

    found = judge(entries)

    assert invariant in {violation.invariant for violation in found}, f"{what}: {found}"
    assert all(INVARIANTS[violation.invariant] in str(violation) for violation in found)


def test_every_invariant_has_a_planted_violation() -> None:
    assert {invariant for invariant, _, _ in PLANTED} == set(INVARIANTS)


def test_nothing_recorded_shows_nothing() -> None:
    with pytest.raises(ValueError, match="no accepted run"):
        judge([])


def test_an_answer_that_was_asked_for_before_the_end_may_come_after_it() -> None:
    entries = clean()
    only(entries, "answer", about=RUN, asked_at=2.0)["at"] = 9.0

    assert judge(entries) == []


def test_the_command_says_what_did_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = clean()
    without("row", run=RUN)(entries)
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    assert main([str(path)]) == 1

    assert "I8 (what was accepted survives)" in capsys.readouterr().out
