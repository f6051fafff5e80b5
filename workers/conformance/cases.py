"""The cases: what is played, and what must be true of it as the host sees it. `corpus.py` is the list of them.

Every case has a positive control: the same check on a play in which exactly the one defence is opened in a harmless
way. There the check must fire; where it does not, the case proves nothing and is called vacuous.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from service.core.boundary import Artifacts, Ended, Execution, Limit
from service.core.controls import Limits
from workers.conformance.programs import BEGUN, ENDED, KILLS
from workers.conformance.stage import Stage

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/work", "LANG": "C.UTF-8"}
"""All that a step is given here, beside what a play adds."""


class Severity(StrEnum):
    """How bad it is when a case gets through, in the words of gVisor's taxonomy of vulnerabilities."""

    ESCAPE = "Escape"
    HOST_LEAK = "HostLeak"
    EXFIL = "Exfil"
    LATERAL = "Lateral"
    HOST_DOS = "HostDoS"
    INTEGRITY = "Integrity"


@dataclass(frozen=True, kw_only=True)
class Play:
    """One program in one new boundary. `then`: a second step, played when the first is over. `env` is added to
    ENVIRONMENT. `standing`: the host is looked over before the teardown instead of after it."""

    argv: tuple[str, ...]
    limits: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    then: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    timeout_s: float = 15.0
    standing: bool = False
    neighbour: bool = False
    """Another run is there meanwhile, with a token in its memory and its files, and must survive."""

    @property
    def wanted(self) -> Limits:
        return Limits(**self.limits)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the host saw of a play. `leaks`: where the tokens had been planted that came out. `left`: what of the
    boundary is on this host. `grown`: what carries the stage's mark outside of it. `here`: a control group of this host
    is the boundary's. `peak_tasks`: its host threads at most; None where nobody could count them."""

    play: Play
    execution: Execution
    then: Execution | None = None
    artifacts: Artifacts = field(default_factory=Artifacts)
    leaks: tuple[str, ...] = ()
    heard: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    grown: tuple[str, ...] = ()
    here: bool = False
    peak_tasks: int | None = None
    neighbour_lives: bool = True
    collect_s: float = 0.0

    def said(self, word: str) -> list[str]:
        """What the steps printed after this word, line by line."""
        data = self.execution.stdout.data + (self.then.stdout.data if self.then else b"")
        lines = data.decode("utf-8", "replace").splitlines()
        return [line.removeprefix(word).strip() for line in lines if line.startswith(f"{word} ")]

    @property
    def begun(self) -> bool:
        return BEGUN.encode() in self.execution.stdout.data

    @property
    def to_its_end(self) -> bool:
        """Also one that ended its own sandbox, when it had come to that: there is nothing after it then."""
        if self.ended_itself:
            return KILLS.encode() in self.execution.stdout.data
        steps = [self.execution, *([self.then] if self.then else [])]
        whole = len(steps) == 1 + bool(self.play.then)
        return whole and all(step.ended is Ended.EXITED and ENDED.encode() in step.stdout.data for step in steps)

    @property
    def ended_itself(self) -> bool:
        """The guest ended what holds or watches it, and the driver says so: never a success, and its own harm."""
        return self.execution.ended is Ended.BROKEN


Wrong = Callable[[Seen], str | None]
Make = Callable[[Stage], Play]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`wrong`: what of a play breaks the promise; None when it is kept. `opened`: what the control opens. `ends`: the
    attack ends by itself, and proves something only when it came so far."""

    id: str
    title: str
    severity: Severity
    attack: Make
    control: Make
    wrong: Wrong
    opened: str
    ends: bool = True


class Corpus:
    """Cases in the order in which they are written down."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def case(
        self, id_: str, title: str, severity: Severity, *, attack: Make, control: Make, ends: bool = True
    ) -> Callable[[Wrong], Wrong]:
        """The function below it is the check; its docstring says what the control opens."""

        def register(wrong: Wrong) -> Wrong:
            opened = " ".join((wrong.__doc__ or "").removeprefix("Opened: ").split())
            made = Case(
                id=id_, title=title, severity=severity, attack=attack, control=control, wrong=wrong, opened=opened,
                ends=ends,
            )  # fmt: skip
            self.cases.append(made)
            return wrong

        return register


def python(program: str, *, given: Mapping[str, Any] | None = None, **play: Any) -> Play:
    """-I -S: nothing of the working directory or the environment changes what the program is."""
    return Play(argv=_argv(program, given or {}), **play)


def followed_by(play: Play, program: str, given: Mapping[str, Any]) -> Play:
    return Play(**{**vars(play), "then": _argv(program, given)})


def _argv(program: str, given: Mapping[str, Any]) -> tuple[str, ...]:
    return ("/usr/bin/env", "python3", "-I", "-S", "-c", program, json.dumps(given))


def always(play: Play) -> Make:
    return lambda stage: play


def leaked(seen: Seen) -> str | None:
    return f"came out: the token of {' and of '.join(seen.leaks)}" if seen.leaks else None


def claims(seen: Seen, *words: str) -> str | None:
    """The attack is ours and says what it got hold of. Its word counts against the wall, never for it."""
    got = [f"{word.lower()} {what}" for word in words for what in seen.said(word)]
    return ", ".join(got[:5]) or None


def not_hit(seen: Seen, limit: Limit) -> str | None:
    return None if limit in seen.execution.limits else f"the host did not see the {limit} limit being hit"
