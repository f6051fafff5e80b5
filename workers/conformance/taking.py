"""The cases of what a guest may take. As corpus.py, of which they are the first part."""

from typing import Any

from service.core.boundary import Ended, Limit
from workers.conformance import programs
from workers.conformance.cases import Corpus, Make, Seen, Severity, always, not_hit, python

MIB, KIB = 2**20, 2**10
TAKING = Corpus()
_case = TAKING.case


def _limited(program: str, *, times: int, given: dict[str, Any] | None = None, **limits: Any) -> Make:
    """`times`: how many times as high the first of the limits is."""
    first = next(iter(limits))
    patterns = ("big", "many/*", "held/*")
    return always(python(program, given=given, limits=limits | {first: limits[first] * times}, patterns=patterns))


PIDS, TASKS = 16, 96 + 3 * 16
"""TASKS: host threads that so many processes of a guest may come to, the sandbox's own with them."""


def _bomb(pids: int) -> Make:
    return always(
        python(
            programs.FORK_BOMB, patterns=("count",), limits={"pids": pids, "memory": 1024 * MIB, "cpu": 2}, timeout_s=2
        )
    )


@_case("D11", "a fork bomb", Severity.HOST_DOS, attack=_bomb(PIDS), control=_bomb(4 * PIDS), ends=False)
def _fork_bomb(seen: Seen) -> str | None:
    """Opened: the limit of processes."""
    if seen.here and seen.peak_tasks is None:
        return "nobody counts the host threads of the boundary"
    if seen.peak_tasks is not None and seen.peak_tasks > TASKS:
        return f"{seen.peak_tasks} host threads, more than {TASKS}"
    if seen.execution.ended is Ended.EXITED:
        return "the bomb ended by itself"
    there = sum(artifact.bytes for artifact in seen.artifacts.kept)  # none of them ends, and each has written a byte
    if there > PIDS:
        return f"{there} processes were there at once, with a limit of {PIDS}"
    if there and not seen.here:  # a pod's processes are counted as its step ends, and this one takes all of its time
        return None
    return not_hit(seen, Limit.PIDS)


MEMORY, BOMB_MIB = 64 * MIB, 215
"""A bomb is larger than the limit and what a RuntimeClass adds to it, and fits into four times the limit."""


def _memory(seen: Seen) -> str | None:
    """Opened: the memory limit."""
    peak = seen.artifacts.usage.peak_memory_bytes
    if peak > MEMORY + MIB:  # the kernel charges in batches
        return f"{peak // MIB} MiB were used, with a limit of {MEMORY // MIB} MiB"
    return not_hit(seen, Limit.MEMORY)


def _shared_memory(seen: Seen) -> str | None:
    """Opened: the memory limit, and the file lies in /tmp, since /dev/shm may be closed to a step altogether."""
    refused = seen.said("REFUSED") and seen.artifacts.usage.peak_memory_bytes < MEMORY
    return None if refused else _memory(seen)


def _holding_memory(program: str, *, times: int, **given: Any) -> Make:
    return _limited(program, times=times, given=given | {"mib": BOMB_MIB}, memory=MEMORY, disk=256 * MIB)


_case(
    "D12", "a memory bomb", Severity.HOST_DOS, ends=False,
    attack=_holding_memory(programs.MEMORY_BOMB, times=1), control=_holding_memory(programs.MEMORY_BOMB, times=4),
)(_memory)  # fmt: skip
_case(
    "D12b", "a memory bomb in /dev/shm", Severity.HOST_DOS, ends=False,
    attack=_holding_memory(programs.TMPFS_BOMB, times=1, place="/dev/shm"),  # noqa: S108 - the guest's own
    control=_holding_memory(programs.TMPFS_BOMB, times=4, place="/tmp"),  # noqa: S108
)(_shared_memory)  # fmt: skip
_case(
    "D12c", "a memory bomb in a memfd", Severity.HOST_DOS, ends=False,
    attack=_holding_memory(programs.MEMFD_BOMB, times=1), control=_holding_memory(programs.MEMFD_BOMB, times=4),
)(_memory)  # fmt: skip
_case(
    "D12d", "a memory bomb in files of /tmp", Severity.HOST_DOS, ends=False,
    attack=_holding_memory(programs.TMPFS_BOMB, times=1, place="/tmp"),  # noqa: S108 - the guest's own
    control=_holding_memory(programs.TMPFS_BOMB, times=4, place="/tmp"),  # noqa: S108
)(_memory)  # fmt: skip


def _kept_bytes(seen: Seen) -> int:
    return sum(artifact.bytes for artifact in seen.artifacts.kept)


@_case(
    "D13", "filling the disk", Severity.HOST_DOS,
    attack=_limited(programs.FILL_DISK, times=1, given={"mib": 16}, disk=8 * MIB),
    control=_limited(programs.FILL_DISK, times=4, given={"mib": 16}, disk=8 * MIB),
)  # fmt: skip
def _disk(seen: Seen) -> str | None:
    """Opened: the disk limit."""
    if _kept_bytes(seen) > 8 * MIB:
        return f"{_kept_bytes(seen)} bytes stood in /work, with a limit of {8 * MIB}"
    return not_hit(seen, Limit.DISK)


@_case(
    "D14", "filling the inodes", Severity.HOST_DOS,
    attack=_limited(programs.FILL_INODES, times=1, given={"count": 300}, files=100),
    control=_limited(programs.FILL_INODES, times=4, given={"count": 300}, files=100), ends=False,
)  # fmt: skip
def _inodes(seen: Seen) -> str | None:
    """Opened: the limit of files."""
    # A wall that cannot refuse a file ends the run that has too many; one that lets it go on has refused them.
    ended_for_it = seen.execution.ended is Ended.LIMIT and seen.execution.limits == {Limit.FILES}
    if len(seen.artifacts.kept) > 100 and not ended_for_it:
        return f"{len(seen.artifacts.kept)} files stood in /work, with a limit of 100"
    return not_hit(seen, Limit.FILES)


@_case(
    "D15", "holding many files open", Severity.HOST_DOS,
    attack=_limited(programs.HOLD_FILES, times=1, given={"count": 200}, open_files=64),
    control=_limited(programs.HOLD_FILES, times=4, given={"count": 200}, open_files=64),
)  # fmt: skip
def _open_files(seen: Seen) -> str | None:
    """Opened: the limit of open files. Each of them is a new file in /work, where the host can count."""
    held = len(seen.artifacts.kept)
    return f"{held} files were held open at once, with a limit of 64" if held > 64 else None


OUTPUT, READ = 16 * KIB, 64 * 16 * KIB + MIB
"""READ: what may be read before the run is ended, and what the pipes hold."""


@_case(
    "D16", "a flood of output", Severity.HOST_DOS, ends=False,
    attack=_limited(programs.FLOOD, times=1, output=OUTPUT), control=_limited(programs.FLOOD, times=4, output=OUTPUT),
)  # fmt: skip
def _flood(seen: Seen) -> str | None:
    """Opened: the limit of output."""
    stdout = seen.execution.stdout
    if stdout.total_bytes > READ or len(stdout.data) > OUTPUT:
        return f"{stdout.total_bytes} bytes were read and {len(stdout.data)} kept"
    return not_hit(seen, Limit.OUTPUT)


@_case(
    "D17", "a daemon left behind", Severity.HOST_DOS,
    attack=always(python(programs.DAEMON)), control=always(python(programs.DAEMON, standing=True)),
)  # fmt: skip
def _daemon(seen: Seen) -> str | None:
    """Opened: the teardown, which has not come yet when the host is looked over."""
    return f"on this host: {', '.join(seen.left[:5])}" if seen.left else None
