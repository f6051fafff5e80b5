"""A program as the engine would start it in a container: with these capabilities at most, no new privileges, and under
a seccomp profile. `python -m tests.contained PROFILE PROGRAM ...` loads the profile into itself and becomes PROGRAM.

The profile is read as an engine reads it (compose.yaml names it) and given to libseccomp, which engines use, too. It
holds for all that the program starts, as a container's does. What a container has besides is not here: namespaces of
its own, a root of its own.
"""

import ctypes
import errno
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ALLOW, ERRNO = 0x7FFF0000, 0x00050000
COMPARISONS = {"SCMP_CMP_NE": 1, "SCMP_CMP_LT": 2, "SCMP_CMP_LE": 3, "SCMP_CMP_EQ": 4, "SCMP_CMP_GE": 5,
               "SCMP_CMP_GT": 6, "SCMP_CMP_MASKED_EQ": 7}  # fmt: skip
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
NATIVE = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
TOKENS = {"SCMP_ARCH_X86": 0x40000003, "SCMP_ARCH_X32": 0x4000003E, "SCMP_ARCH_ARM": 0x40000028}
_UNKNOWN_SYSCALL = -1


class _Comparison(ctypes.Structure):
    _fields_ = (("index", ctypes.c_uint), ("op", ctypes.c_int), ("value", ctypes.c_uint64), ("second", ctypes.c_uint64))


def argv_of(program: Sequence[str], *, capabilities: Iterable[str], profile: Path | None) -> list[str]:
    """`capabilities` as compose.yaml lists them; no `profile`: any system call."""
    kept = "".join(f",+{name.lower()}" for name in sorted(capabilities))
    prefix = ["setpriv", "--bounding-set", f"-all{kept}", "--inh-caps", "-all", "--no-new-privs"]
    filtered = [sys.executable, "-m", "tests.contained", str(profile)] if profile else []
    return [*prefix, *filtered, *program]


def load(profile: Mapping[str, Any]) -> None:
    """From now on this process and its children are held to it. Raises OSError."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    default = ERRNO | profile.get("defaultErrnoRet", errno.EPERM)
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    for row in profile["archMap"]:
        if row["architecture"] == NATIVE[platform.machine()]:
            for name in row["subArchitectures"]:
                _check(library.seccomp_arch_add(context, ctypes.c_uint32(TOKENS[name])), name)
    for rule in profile["syscalls"]:
        arches = rule.get("includes", {}).get("arches")
        if arches and ARCHITECTURES[platform.machine()] not in arches:
            continue
        assert rule["action"] == "SCMP_ACT_ALLOW", "all that a rule of ours does"
        for name in rule["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number == _UNKNOWN_SYSCALL:
                continue  # newer than this libseccomp; engines leave it out as well
            wanted = [
                _Comparison(one["index"], COMPARISONS[one["op"]], one["value"], one.get("valueTwo", 0))
                for one in rule.get("args") or ()
            ]
            array = (_Comparison * len(wanted))(*wanted)
            _check(library.seccomp_rule_add_array(context, ctypes.c_uint32(ALLOW), number, len(wanted), array), name)
    _check(library.seccomp_load(context), "the whole")
    library.seccomp_release(context)


def _check(status: int, what: str) -> None:
    if status < 0:
        raise OSError(-status, f"the profile was not taken: {os.strerror(-status)}", what)


if __name__ == "__main__":
    load(json.loads(Path(sys.argv[1]).read_text()))
    os.execvp(sys.argv[2], sys.argv[2:])
