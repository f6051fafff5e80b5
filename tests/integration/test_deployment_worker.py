"""What builds boundaries, held to what compose.yaml and the systemd units give it: capabilities and system calls.

Each is shown to be needed, too: without it no run can be played. What an engine does besides (namespaces of its own, a
root of its own, masked paths) is not tested: there is none here.
"""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contained import argv_of
from tests.deployment import DEPLOY, ROOT, compose
from tests.one_run import driver
from tests.sandboxes import new_installation, require_gvisor

PROFILE = DEPLOY / "seccomp-worker.json"
CAPABILITIES = compose()["services"]["worker"]["cap_add"]
OWN_CALLS = {"chroot", "clone", "mount", "pivot_root", "ptrace", "umount2"}
UNITS = [DEPLOY / "systemd" / f"blastdoor-{name}.service" for name in ("worker", "reaper")]
Play = Callable[[list[str], Path | None], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    """Plays a run with these capabilities under this profile, and clears away afterwards what it could not."""
    require_gvisor()
    installation = new_installation()

    def played(capabilities: list[str], profile: Path | None) -> "subprocess.CompletedProcess[str]":
        program = [sys.executable, "-m", "tests.one_run", installation, str(tmp_path)]
        argv = argv_of(program, capabilities=capabilities, profile=profile)
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)

    yield played
    boundary = driver(installation, tmp_path)
    for ref in boundary.discover():
        boundary.destroy(ref)
    boundary.close()


def test_a_run_is_played_with_what_compose_gives(play: Play) -> None:
    done = play(CAPABILITIES, PROFILE)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("one", CAPABILITIES)
def test_every_capability_is_needed(play: Play, one: str) -> None:
    done = play([name for name in CAPABILITIES if name != one], None)

    assert done.returncode != 0
    assert any(word in done.stderr.lower() for word in ("not permitted", "permission denied")), done.stderr


@pytest.mark.parametrize("one", sorted(OWN_CALLS))
def test_every_system_call_beyond_the_engines_own_profile_is_needed(play: Play, tmp_path: Path, one: str) -> None:
    less = json.loads(PROFILE.read_text())
    for rule in less["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name != one]
    (tmp_path / "less.json").write_text(json.dumps(less))

    assert play(CAPABILITIES, tmp_path / "less.json").returncode != 0


REFUSED = "import ctypes, os; c = ctypes.CDLL(None, use_errno=True); r = {}; print(r, os.strerror(ctypes.get_errno()))"


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("swapon", "c.swapon(b'/nowhere', 0)"),
        ("unshare", "c.unshare(0x20000)"),
        ("kexec_load", "c.syscall(246, 0, 0, 0, 0)"),
        ("init_module", "c.init_module(0, 0, b'')"),
        ("keyctl", "c.syscall(250, 0, -3, 0)"),
        ("bpf", "c.syscall(321, 99, 0, 0)"),
        ("perf_event_open", "c.syscall(298, 0, 0, 0, 0, 0)"),
        ("io_uring_setup", "c.syscall(425, 0, 0)"),
        ("open_by_handle_at", "c.open_by_handle_at(-1, 0, 0)"),
        ("setns", "c.setns(-1, 0)"),
        ("reboot", "c.reboot(1)"),
        ("a packet socket", "c.socket(17, 3, 0)"),
        ("a vsock", "c.socket(40, 1, 0)"),
    ],
)
def test_a_system_call_outside_the_profile_is_refused_and_would_else_not_be(name: str, call: str) -> None:
    """With every capability: it is the profile that says no. What is called could do no harm."""
    if platform.machine() != "x86_64":
        pytest.skip("the numbers of the system calls are x86-64's")
    program = [sys.executable, "-c", REFUSED.format(call)]
    everything = _said(["setpriv", "--list-caps"]).split()
    under, without = (_said(argv_of(program, capabilities=everything, profile=profile)) for profile in (PROFILE, None))

    assert under.strip() == "-1 Operation not permitted", under
    assert without.strip() != under.strip(), "the control: without the profile it goes another way"


def _said(argv: list[str]) -> str:
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_profile_allows_nothing_by_default() -> None:
    profile = json.loads(PROFILE.read_text())
    allowed = {name for rule in profile["syscalls"] for name in rule["names"]}

    assert (profile["defaultAction"], profile["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", 1)
    assert allowed >= OWN_CALLS
    assert not allowed & {"bpf", "keyctl", "kexec_load", "init_module", "perf_event_open", "setns", "unshare"}


# --- systemd ----------------------------------------------------------------------------------------------------------


def settings_of(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_is_one_that_systemd_takes(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    runnable = tmp_path / unit.name
    runnable.write_text(unit.read_text().replace("/opt/blastdoor/bin/python", sys.executable))
    verify = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no"]
    done = subprocess.run([*verify, runnable], capture_output=True, text=True, check=False)
    runnable.write_text(runnable.read_text() + "\nKilMode=mixed\n")
    spoilt = subprocess.run([*verify, runnable], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert "KilMode" in spoilt.stderr, "the control: it sees what is wrong"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_run_is_played_with_what_a_unit_gives(play: Play, tmp_path: Path, unit: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    given = settings_of(unit)
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps(_profile_of(given["SystemCallFilter"])))
    capabilities = [name.removeprefix("CAP_") for name in given["CapabilityBoundingSet"][0].split()]
    done = play(capabilities, profile)

    assert done.returncode == 0, done.stderr
    assert sorted(capabilities) == sorted(CAPABILITIES)
    assert given["NoNewPrivileges"] == ["yes"]


def _profile_of(filters: list[str]) -> dict[str, object]:
    """As systemd understands them: the first says what is allowed, `~` takes away again."""
    allowed: set[str] = set()
    for line in filters:
        takes_away = line.startswith("~")
        names = {name for word in line.removeprefix("~").split() for name in _expanded(word)}
        allowed = allowed - names if takes_away else allowed | names
    allowed |= _expanded("@default")
    rule = {"names": sorted(allowed), "action": "SCMP_ACT_ALLOW"}
    return {"defaultAction": "SCMP_ACT_ERRNO", "archMap": [], "syscalls": [rule]}


def _expanded(word: str) -> set[str]:
    if not word.startswith("@"):
        return {word}
    lines = _said(["systemd-analyze", "syscall-filter", word]).splitlines()[1:]
    names = {line.strip() for line in lines if line.strip() and not line.strip().startswith("#")}
    return {name for one in names for name in _expanded(one)}
