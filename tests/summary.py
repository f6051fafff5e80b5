"""What the tests really ran on: a green run that skipped the sandbox must not look like one that used it."""

from collections import Counter, defaultdict
from collections.abc import Mapping

_seen: defaultdict[str, Counter[str]] = defaultdict(Counter)


def ran(category: str, name: str) -> None:
    """Say that a test uses this one; `ran("boundary", "gvisor")`, `ran("database", "postgresql 15.18")`."""
    _seen[category][name] += 1


def taken() -> dict[str, dict[str, int]]:
    """All that was said in this process, as plain data for another one."""
    return {category: dict(names) for category, names in _seen.items()}


def add(said: Mapping[str, Mapping[str, int]]) -> None:
    """What another process of the same session has `taken`."""
    for category, names in said.items():
        _seen[category].update(names)


def lines() -> list[str]:
    """One line a category; the two that matter most are there even when nothing of theirs ran."""
    return [
        f"{category}: {_counted(_seen.get(category))}" for category in sorted({"boundary", "database"} | set(_seen))
    ]


def _counted(names: Counter[str] | None) -> str:
    return ", ".join(f"{name} ({uses})" for name, uses in sorted(names.items())) if names else "none"
