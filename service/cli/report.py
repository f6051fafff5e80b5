"""A finished run as a person reads it: how it went, step by step, and the wall it ran in.

Lines that a guest printed begin with `| `, so that none of them can pass for a line of ours.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from service.cli.printing import (
    bytes_text,
    outcome_text,
    print_fields,
    print_line,
    print_table,
    quoted,
    seconds_text,
    visible,
)

TAIL_LINES = 12
TAIL_CHARACTERS = 4000


def print_run(console: Console, run: Mapping[str, Any], *, tails: bool = True) -> None:
    """Outcome first, then the steps, then what failed with the end of its output, then the wall. `tails`: whether to
    show that end; not to who has just read it."""
    scenario = run["scenario"] or {}
    print_line(console, outcome_text(run["outcome"] or run["phase"]), "  ", quoted(scenario.get("name", ""), "bold"))
    print_fields(console, _how_it_went(run))
    if steps := run["steps"]:
        console.print()
        print_table(console, ("#", "step", "outcome", "exit", "time"), map(_step_row, steps), wide="step")
        for step in steps:
            if step["outcome"] not in ("passed", "skipped"):
                _print_failed_step(console, step, tails=tails)
    console.print()
    print_fields(console, _wall(run))


def _how_it_went(run: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield "run", run["id"]
    if run["phase"] == "queued":
        place = run["queue_position"] and f"{run['queue_position']} in the queue"
        yield "waits", ": ".join(part for part in (place, run["message"]) if part)
    else:
        yield "reason", ": ".join(str(part) for part in (run["reason"], run["message"]) if part)
    if usage := run["usage"]:
        times = f"{seconds_text(usage['wall_s'])} wall, {seconds_text(usage['cpu_s'])} CPU"
        peak = usage["peak_memory_bytes"]  # 0 where nobody could look: no guest gets by without any
        yield "used", f"{times}, {f'{bytes_text(peak)} memory at most' if peak else 'memory not known'}"
    for artifact in run["artifacts"]:
        yield "artifact", f"{artifact['path']} ({bytes_text(artifact['bytes'])})"
    for skipped in run["skipped_artifacts"]:
        yield "not taken", f"{skipped['path']}: {skipped['why']}"


def _step_row(step: Mapping[str, Any]) -> tuple[object, ...]:
    if step["signal"] is not None:
        ended = f"signal {step['signal']}"
    else:
        ended = "" if step["exit_code"] is None else str(step["exit_code"])
    return step["n"], step["name"], outcome_text(step["outcome"]), ended, seconds_text(step["duration_s"])


def _print_failed_step(console: Console, step: Mapping[str, Any], *, tails: bool) -> None:
    print_line(console, (f"\nstep {step['n']}: ", "bold"), quoted(step["name"], "bold"))
    for failure in step["failures"]:
        expected, actual = failure["expected"], failure["actual"]
        print_line(console, "  ", quoted(failure["expectation"], "red"))
        print_line(console, "    expected ", quoted(_shown(expected)))
        print_line(console, "    got      ", quoted(_shown(actual)))
    for name in ("stdout", "stderr") if tails else ():
        _print_tail(console, name, step[name])


def _print_tail(console: Console, name: str, stream: Mapping[str, Any]) -> None:
    if not stream["text"]:
        return
    text = stream["text"][-TAIL_CHARACTERS:]
    lines = text.removesuffix("\n").split("\n")
    cut = len(lines) > TAIL_LINES or len(text) < len(stream["text"]) or stream["truncated"]
    print_line(console, f"  {name}, {'the end of ' if cut else ''}{bytes_text(stream['bytes'])}")
    for line in lines[-TAIL_LINES:]:
        for part in _folded(visible(line), console.width - 6):
            console.print(Text("  | " + part), soft_wrap=True)


def _folded(line: str, width: int) -> Iterator[str]:
    """Cut to the width, so that what a terminal wraps does not begin a line without its mark."""
    line = line.expandtabs(4)
    yield from (line[start : start + width] for start in range(0, max(len(line), 1), max(width // 2, 20) * 2))


def _shown(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


def _wall(run: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """What stood around the code, why that wall, and what the host saw of it."""
    placement = run["placement"]
    if not placement:
        return
    guarantees = ", ".join(f"{name.replace('_', ' ')} {level}" for name, level in placement["guarantees"].items())
    yield "wall", Text.assemble(quoted(placement["boundary"], "bold"), ": ", quoted(guarantees))
    for why in placement["why"]:
        yield "why", why
    if evidence := run["evidence"]:
        yield "evidence", ", ".join(_evidence(evidence))
    yield "destroyed", run["boundary_destroyed_at"]


def _evidence(evidence: Mapping[str, Any]) -> Iterator[str]:
    yield f"{evidence['runtime']} {evidence['runtime_version'] or ''}".strip()
    for name in ("platform", "network", "uid"):
        if evidence[name] is not None:
            yield f"{name} {evidence[name]}"
    for name, value in evidence["limits"].items():
        if name.endswith("_bytes"):
            yield f"{name.removesuffix('_bytes')} <= {bytes_text(value)}"
        else:
            yield f"{name} <= {value}"
    if node := evidence.get("node"):
        its = (f"{name} {node[name]}" for name in ("engine", "kubelet", "kernel") if node.get(name))
        yield f"on a node with {', '.join(its)}"
