"""The judge: reads what was recorded of many runs and says which of the invariants I1 to I8 did not hold.

Pure, and apart from what it judges: it imports nothing of Blastdoor. A history is a sequence of JSON objects, one a
line, in the order in which they were recorded; `kind` says what each is:

accepted  the API answered 202: run, tenant, key (idempotency), token (a word that only this run prints)
answer    what a client was told: asker (its tenant), asked_at, at, status; about (the run that was asked for, or null),
          runs and tokens (every run id and token anywhere in the body); of a run's own document: phase, outcome, reason
event     a row of the outbox, by run and seq: run, tenant, id, seq, type, fence (null where its data has none), outcome
bus       an entry of the stream as a consumer read it: entry, id, run, tenant, seq, type, outcome; read again: again
endpoint  a tenant's webhook stood, from before its first run, and wants the end of each: receiver
webhook   a delivery as its receiver got it: id, run, type, receiver (the tenant it speaks for)
boundary  the platform's journal, in its own order: what (opened, played, closed), run, fence, and when it was opened
          `beside`: the other fences of this run that stood then
world     what stood when the host was looked at: live, a list of [run, fence]
write     a worker's attempt to write: run, fence, held (the fence of who acted on the run then; 0: nobody), accepted
row       the run in the database at the end: run, tenant, phase, outcome, reason, fence, destroyed_fence
sweep     what was found of the installation on this machine: found; planted is true where something had been put there
Instants are seconds of one clock. Other kinds are notes, and are passed over.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Entry = dict[str, Any]

FINISHED = "run.finished"
PROVISIONING = "run.provisioning"
AFTER_THE_END = ("boundary.destroyed", "boundary.quarantined")
INVARIANTS = {
    "I1": "each accepted run reaches exactly one terminal state",
    "I2": "a terminal state never changes",
    "I3": "exactly one terminal event per run on the bus and the webhook, and every event, in order",
    "I4": "at most one live boundary per run at any instant, and no step is played twice",
    "I5": "fences strictly increase, and nothing is written under an old one",
    "I6": "after quiescence the sweep is empty, and it is shown to find what was planted",
    "I7": "no tenant sees another's id, output or event",
    "I8": "what was accepted survives",
}


@dataclass(frozen=True)
class Violation:
    invariant: str
    run: str | None
    detail: str

    def __str__(self) -> str:
        return f"{self.invariant} ({INVARIANTS[self.invariant]}): {self.run or 'as a whole'}: {self.detail}"


@dataclass
class _History:
    """The entries, by kind; those that are about a run also by run."""

    of_kind: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    of_run: dict[str, dict[str, list[Entry]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))

    def add(self, entry: Entry) -> None:
        kind = str(entry["kind"])
        self.of_kind[kind].append(entry)
        run = entry.get("run") if kind != "answer" else entry.get("about")
        if run is not None:
            self.of_run[str(run)][kind].append(entry)

    @property
    def accepted(self) -> dict[str, Entry]:
        """By run; a repeated answer to the same request counts once."""
        return {str(entry["run"]): entry for entry in reversed(self.of_kind["accepted"])}


def read(path: Path) -> list[Entry]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def judge(entries: Iterable[Entry]) -> list[Violation]:
    """Everything that did not hold. An empty history is refused: nothing would have been shown. Raises ValueError."""
    history = _History()
    for entry in entries:
        history.add(entry)
    if not history.of_kind["accepted"]:
        raise ValueError("the history has no accepted run")
    checks = (_ends_once, _stays_ended, _is_told_once, _stands_alone, _fences, _swept, _private, _survives)
    return [violation for check in checks for violation in check(history)]


def _ends_once(history: _History) -> Iterator[Violation]:
    for run in history.accepted:
        rows, told = history.of_run[run]["row"], _terminal(history.of_run[run]["event"])
        for row in rows:
            if row["phase"] != "finished" or not row["outcome"]:
                yield Violation("I1", run, f"at the end it is {row['phase']} with outcome {row['outcome']}")
        if rows and len(told) != 1:
            yield Violation("I1", run, f"{len(told)} terminal events in the outbox")


def _stays_ended(history: _History) -> Iterator[Violation]:
    for run in history.accepted:
        entries = history.of_run[run]
        answers = [answer for answer in entries["answer"] if answer.get("phase")]
        ends = [answer for answer in answers if answer["phase"] == "finished"]
        first = min(ends, key=lambda answer: float(answer["at"]), default=None)
        for answer in answers:
            later = first is not None and float(answer["asked_at"]) >= float(first["at"])
            if first is not None and later and _state(answer) != _state(first):
                yield Violation("I2", run, f"was shown as {_state(first)}, and later as {_state(answer)}")
        outcomes = {str(entry["outcome"]) for kind in ("event", "bus") for entry in _terminal(entries[kind])}
        outcomes |= {str(entry["outcome"]) for entry in (*ends, *entries["row"]) if entry["phase"] == "finished"}
        if len(outcomes) > 1:
            yield Violation("I2", run, f"ended as each of {sorted(outcomes)}")
        yield from _quiet_after_the_end(run, _by_seq(entries["event"]))


def _quiet_after_the_end(run: str, events: Sequence[Entry]) -> Iterator[Violation]:
    ended = False
    for event in events:
        if ended and event["type"] not in AFTER_THE_END and event["type"] != FINISHED:
            yield Violation("I2", run, f"{event['type']} came after its end")
        ended = ended or event["type"] == FINISHED


def _is_told_once(history: _History) -> Iterator[Violation]:
    listening = {entry["receiver"] for entry in history.of_kind["endpoint"]}
    for run in history.accepted:
        entries = history.of_run[run]
        terminal = {str(entry["id"]) for entry in _terminal(entries["bus"])}
        if len(terminal) != 1:
            yield Violation("I3", run, f"{len(terminal)} terminal events on the bus: {sorted(terminal)}")
        hooked = {str(entry["id"]) for entry in _terminal(entries["webhook"])}
        if hooked - terminal:
            yield Violation("I3", run, f"a webhook told of another terminal event: {sorted(hooked - terminal)}")
        if not hooked and history.accepted[run]["tenant"] in listening:
            yield Violation("I3", run, "no webhook told of its end")
        stored = [str(event["id"]) for event in _by_seq(entries["event"])]
        first_read = list(dict.fromkeys(str(entry["id"]) for entry in entries["bus"]))
        if lacking := set(stored) - set(first_read):
            yield Violation("I3", run, f"not on the bus: {sorted(lacking)}")
        if unknown := set(first_read) - set(stored):
            yield Violation("I3", run, f"on the bus, and in no outbox: {sorted(unknown)}")
        if not lacking and not unknown and first_read != stored:
            yield Violation("I3", run, f"read in another order than written: {first_read} instead of {stored}")


def _stands_alone(history: _History) -> Iterator[Violation]:
    for run, entries in history.of_run.items():
        live: set[int] = set()
        played: dict[int, set[int]] = defaultdict(set)
        for entry in entries["boundary"]:
            fence = int(entry["fence"])
            if entry["what"] == "opened":
                others = (live | set(entry.get("beside", ()))) - {fence}
                if others:
                    yield Violation("I4", run, f"fence {fence} was opened beside {sorted(others)}")
                live.add(fence)
            elif entry["what"] == "closed":
                live.discard(fence)
            elif entry["what"] == "played":
                if fence in played[int(entry["n"])]:
                    yield Violation("I4", run, f"step {entry['n']} was played twice under fence {fence}")
                played[int(entry["n"])].add(fence)
        for n, fences in played.items():
            if len(fences) > 1:
                yield Violation("I4", run, f"step {n} was played under each of the fences {sorted(fences)}")
    for look in history.of_kind["world"]:
        standing: dict[str, set[int]] = defaultdict(set)
        for run, fence in look["live"]:
            standing[str(run)].add(int(fence))
        for run, fences in standing.items():
            if len(fences) > 1:
                yield Violation("I4", run, f"the boundaries of fences {sorted(fences)} stood at the same time")


def _fences(history: _History) -> Iterator[Violation]:
    for run, entries in history.of_run.items():
        now, seen = 0, set[int]()
        for event in _by_seq(entries["event"]):
            fence = event.get("fence")
            if fence is None:
                continue
            if event["type"] == PROVISIONING:
                if int(fence) <= now:
                    yield Violation("I5", run, f"claimed under fence {fence} after fence {now}")
                now = int(fence)
                seen.add(now)
            elif event["type"] in AFTER_THE_END:
                if int(fence) not in seen:
                    yield Violation("I5", run, f"{event['type']} of fence {fence}, which claimed nothing")
            elif int(fence) != now:
                yield Violation("I5", run, f"{event['type']} was written under fence {fence} while it is {now}")
        for write in entries["write"]:
            if write["accepted"] and int(write["fence"]) != int(write["held"]):
                yield Violation("I5", run, f"a write under fence {write['fence']} was taken at {write['held']}")
        opened = [int(entry["fence"]) for entry in entries["boundary"] if entry["what"] == "opened"]
        if opened != sorted(set(opened)):
            yield Violation("I5", run, f"boundaries were opened under the fences {opened}")
        for fence in opened:
            if entries["event"] and fence not in seen:
                yield Violation("I5", run, f"a boundary was opened under fence {fence}, which claimed nothing")


def _swept(history: _History) -> Iterator[Violation]:
    sweeps = history.of_kind["sweep"]
    if not any(entry["planted"] and entry["found"] for entry in sweeps):
        yield Violation("I6", None, "the sweep was not shown to find a planted leak")
    plain = [entry for entry in sweeps if not entry["planted"]]
    if not plain:
        yield Violation("I6", None, "nobody swept")
    elif plain[-1]["found"]:
        yield Violation("I6", None, f"left behind: {plain[-1]['found']}")
    for row in history.of_kind["row"]:
        if int(row["destroyed_fence"]) != int(row["fence"]):
            detail = f"fence {row['fence']} is not known to be gone ({row['destroyed_fence']} is)"
            yield Violation("I6", str(row["run"]), detail)


def _private(history: _History) -> Iterator[Violation]:
    accepted = history.accepted
    owner = {run: str(entry["tenant"]) for run, entry in accepted.items()}
    owner_of_token = {str(entry["token"]): str(entry["tenant"]) for entry in accepted.values() if entry.get("token")}
    for answer in history.of_kind["answer"]:
        asker, about = str(answer["asker"]), answer.get("about")
        if about is not None and owner.get(about, asker) != asker and int(answer["status"]) != 404:
            yield Violation("I7", about, f"{asker} asked for it and was answered {answer['status']}")
        # An id that the asker named itself, and is told back in a refusal, tells it nothing.
        foreign = [run for run in answer.get("runs", ()) if owner.get(run, asker) != asker and run != about]
        foreign += [token for token in answer.get("tokens", ()) if owner_of_token.get(token, asker) != asker]
        if foreign:
            yield Violation("I7", about, f"{asker} was shown {foreign}")
    for kind, whose in (("bus", "tenant"), ("event", "tenant"), ("webhook", "receiver")):
        for entry in history.of_kind[kind]:
            run = str(entry["run"])
            if run in owner and str(entry[whose]) != owner[run]:
                yield Violation("I7", run, f"an event of {owner[run]} went to {entry[whose]} by {kind}")


def _survives(history: _History) -> Iterator[Violation]:
    by_key: dict[tuple[str, str], set[str]] = defaultdict(set)
    for entry in history.of_kind["accepted"]:
        if entry.get("key"):
            by_key[str(entry["tenant"]), str(entry["key"])].add(str(entry["run"]))
    for run in history.accepted:
        if not history.of_run[run]["row"]:
            yield Violation("I8", run, "was accepted, and is in no database")
    for (tenant, key), runs in by_key.items():
        if len(runs) > 1:
            yield Violation("I8", None, f"{tenant} asked once ({key}) and has {sorted(runs)}")


def _terminal(entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry["type"] == FINISHED]


def _by_seq(events: Iterable[Entry]) -> list[Entry]:
    return sorted(events, key=lambda event: int(event["seq"]))


def _state(answer: Entry) -> tuple[Any, ...]:
    return tuple(answer.get(name) for name in ("phase", "outcome", "reason"))


def main(argv: Sequence[str]) -> int:
    """`python -m tests.faults.history FILE`: says what did not hold. -> 0 when everything did, 1 otherwise."""
    (path,) = argv
    violations = judge(read(Path(path)))
    for violation in violations:
        print(violation)
    print(f"{len(violations)} violations" if violations else "every invariant held")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
