"""The arithmetic of the figures, apart from what measures them: pure, and tested by itself."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIB = 2**20


def percentile(values: Sequence[float], percent: int) -> float:
    """Nearest rank: always one of the values."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def ratio_of_pairs(ours_s: Sequence[float], theirs_s: Sequence[float]) -> float:
    """How fast we are, as a multiple of the other: the median of what each pair says, so that a slow moment of the
    machine, which hits both of a pair, counts for neither. Above 1: we are faster."""
    return statistics.median(theirs / ours for ours, theirs in zip(ours_s, theirs_s, strict=True))


def status_bytes(status: str, field: str) -> int:
    """A field such as VmRSS of /proc/PID/status, in bytes."""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            number, unit = value.split()
            if unit != "kB":
                raise ValueError(f"{field} is given in {unit}")
            return int(number) * 1024
    raise ValueError(f"no {field}")


@dataclass(frozen=True, kw_only=True)
class Overshoot:
    """How far beyond a limit the host ever saw a run: `limit` and the most that was `seen`, of the play (`by`) that
    came furthest beyond. `plays`: how many there were; each reached the limit, or its figure would say nothing."""

    unit: str
    limit: float
    seen: float
    by: str
    plays: int = 1

    @property
    def beyond(self) -> float:
        return max(self.seen - self.limit, 0)

    def document(self) -> dict[str, Any]:
        return {
            "unit": self.unit, "limit": _short(self.limit), "seen": _short(self.seen), "beyond": _short(self.beyond),
            "by": self.by, "plays": self.plays,
        }  # fmt: skip


def worst(plays: Iterable[Overshoot]) -> Overshoot:
    """Of several plays against one kind of limit, the one furthest beyond it; of none beyond, the nearest to it."""
    all_ = list(plays)
    most = max(all_, key=lambda play: play.seen - play.limit)
    return Overshoot(
        unit=most.unit, limit=most.limit, seen=most.seen, by=most.by, plays=sum(play.plays for play in all_)
    )


def rate(samples: Sequence[tuple[float, float]]) -> float:
    """Of a counter that only grows, its growth per second from the first (time, value) to the last."""
    (began, first), (ended, last) = samples[0], samples[-1]
    return (last - first) / (ended - began)


def latencies_ms(committed: Mapping[str, float], arrived: Mapping[str, float]) -> list[float]:
    """Milliseconds from one to the other for each id. Raises ValueError when something that was committed never came:
    a figure over what did arrive would hide it."""
    missing = committed.keys() - arrived.keys()
    if missing:
        raise ValueError(f"{len(missing)} of {len(committed)} never came, {min(missing)} among them")
    return [(arrived[name] - at) * 1000 for name, at in committed.items()]


def of_latencies(name: str, took_ms: Sequence[float]) -> dict[str, Any]:
    return {
        f"{name}_p95_ms": percentile(took_ms, 95),
        name: {"samples": len(took_ms), "p50_ms": statistics.median(took_ms), "max_ms": max(took_ms)},
    }


def _short(value: float) -> float:
    return int(value) if float(value).is_integer() else round(value, 4)
