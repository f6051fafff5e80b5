"""Which paths a list of artifact patterns means, in time linear in both, whoever wrote either of them."""

from collections.abc import Sequence


class Matcher:
    """`*` and `?` within one part, `**` any number of parts, none too."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = [pattern.split("/") for pattern in patterns]

    def matches(self, path: str) -> bool:
        parts = path.split("/")
        return any(_match(pattern, parts) for pattern in self._patterns)

    def reaches_beneath(self, path: str) -> bool:
        """Whether something beneath this directory could match."""
        parts = path.split("/")
        return any(_reach(pattern, parts) for pattern in self._patterns)


_Pattern = list[str]


def _matches_part(pattern: str, name: str) -> bool:
    """Wildcards by the two-pointer method: at most len(pattern) * len(name) steps, whoever wrote either of them."""
    at = star = resume = -1
    at, position = 0, 0
    while position < len(name):
        if at < len(pattern) and pattern[at] == "*":
            star, resume = at, position
            at += 1
        elif at < len(pattern) and pattern[at] in ("?", name[position]):
            at, position = at + 1, position + 1
        elif star >= 0:
            resume += 1
            at, position = star + 1, resume
        else:
            return False
    return not pattern[at:].strip("*")


def _states(pattern: _Pattern, parts: list[str]) -> set[int]:
    """How far into the pattern the parts can lead: the positions reached, all at once (no backtracking)."""
    states = _closure(pattern, {0})
    for part in parts:
        following = set()
        for state in states:
            if state >= len(pattern):
                continue
            wanted = pattern[state]
            if wanted == "**":
                following.add(state)
            elif _matches_part(wanted, part):
                following.add(state + 1)
        states = _closure(pattern, following)
    return states


def _closure(pattern: _Pattern, states: set[int]) -> set[int]:
    """`**` also stands for no part at all."""
    closed = set(states)
    for state in states:
        while state < len(pattern) and pattern[state] == "**":
            state += 1
            closed.add(state)
    return closed


def _match(pattern: _Pattern, parts: list[str]) -> bool:
    return len(pattern) in _states(pattern, parts)


def _reach(pattern: _Pattern, parts: list[str]) -> bool:
    return any(state < len(pattern) for state in _states(pattern, parts))
