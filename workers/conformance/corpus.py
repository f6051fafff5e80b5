"""The corpus of guest cases, in the order in which they are played. The ids are those of the project's attack corpus.

Each check's docstring says what its positive control opens. A limit that a control opens is four times as high.
"""

import json
from typing import Any

from service.core.run import StepOutcome
from service.core.scenario import Step
from service.core.verdict import judge_step
from workers.conformance import programs
from workers.conformance.cases import (
    ENVIRONMENT,
    Case,
    Corpus,
    Make,
    Play,
    Seen,
    Severity,
    always,
    claims,
    followed_by,
    leaked,
    python,
)
from workers.conformance.stage import Stage
from workers.conformance.taking import TAKING

MIB, KIB = 2**20, 2**10
_corpus = Corpus()
_case = _corpus.case


# --- what a guest may see and touch ---


def _holding(program: str, **play: Any) -> Make:
    """The token is in the step's own environment."""
    return lambda stage: python(program, env={"TOKEN": stage.given}, **play)


@_case(
    "D21", "searching /proc for secrets", Severity.HOST_LEAK,
    attack=always(python(programs.SEARCH_PROC, neighbour=True)),
    control=_holding(programs.SEARCH_PROC, neighbour=True),
)  # fmt: skip
def _proc(seen: Seen) -> str | None:
    """Opened: a token stands in the environment that the step itself declares."""
    return leaked(seen)


_READ_ONLY = (
    "/", "/etc", "/usr", "/usr/bin", "/usr/local", "/var", "/var/tmp", "/home", "/root", "/run", "/lib", "/dev",  # noqa: S108
)  # fmt: skip
_SETTINGS = (
    "/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/proc/sys/vm/overcommit_memory",
    "/proc/sys/net/ipv4/ip_forward", "/proc/sysrq-trigger", "/sys/kernel/uevent_helper", "/etc/passwd",
    "/usr/bin/env", "/.blastdoor/init",
)  # fmt: skip


def _writing(*more: str) -> Make:
    def make(stage: Stage) -> Play:
        new = [f"{place.rstrip('/')}/{stage.mark}" for place in (*_READ_ONLY, *more)]
        return python(programs.WRITE_PLACES, given={"new": new, "settings": _SETTINGS})

    return make


@_case(
    "D22", "writing to read-only places and /proc/sys", Severity.ESCAPE, attack=_writing(), control=_writing("/work")
)
def _writes(seen: Seen) -> str | None:
    """Opened: /work, which may be written to, is one of the places."""
    return claims(seen, "WROTE") or (f"on this host: {', '.join(seen.grown)}" if seen.grown else None)


def _among_processes(stage: Stage, env: dict[str, str]) -> Play:
    play = python(programs.REACH_PROCESSES, env=env, neighbour=True)
    return followed_by(play, programs.LOOK_FOR_MARK, {"mark": stage.mark, "places": []})


@_case(
    "D23", "tracing, reading and killing other processes", Severity.LATERAL,
    attack=lambda stage: _among_processes(stage, {}),
    control=lambda stage: _among_processes(stage, {"TOKEN": stage.given}),
)  # fmt: skip
def _processes(seen: Seen) -> str | None:
    """Opened: one of the processes is a child of the attack's own, and a token is in its memory."""
    if not seen.neighbour_lives:
        return "the run beside it was killed"
    killed = seen.then.exit_code != 0 if seen.then is not None else not seen.ended_itself
    if killed:
        return "the sandbox's first process was killed"
    return claims(seen, "ATTACHED") or leaked(seen)


_MOUNT_PLACES = ("/usr", "/etc", "/tmp", "/work")  # noqa: S108 - the guest's own /tmp


def _mounting(*, private: bool) -> Make:
    def make(stage: Stage) -> Play:
        given = {"mark": stage.mark, "places": _MOUNT_PLACES}
        look = given | {"places": (*_MOUNT_PLACES, "/usr/bin")}
        return followed_by(
            python(programs.MOUNT_OVER, given=given | {"private": private}), programs.LOOK_FOR_MARK, look
        )

    return make


@_case(
    "D24", "namespaces and mounts of its own", Severity.ESCAPE,
    attack=_mounting(private=True), control=_mounting(private=False),
)  # fmt: skip
def _mounts(seen: Seen) -> str | None:
    """Opened: the attack leaves its mark where it stands, without a namespace and a mount around it."""
    return claims(seen, "STANDS") or (f"on this host: {', '.join(seen.grown)}" if seen.grown else None)


def _searching(stage: Stage) -> dict[str, Any]:
    run = "/run/"
    return {
        "sockets": (
            *(f"{run}{name}.sock" for name in ("docker", "containerd/containerd", "crio/crio", "podman/podman")),
            "/var/run/docker.sock", f"{run}dbus/system_bus_socket", f"{run}systemd/private",
        ),
        "devices": tuple(
            f"/dev/{name}" for name in ("kvm", "mem", "kmsg", "sda", "vda", "nvme0n1", "vhost-net", "loop0")
        ),
        "nodes": ((1, 1), (8, 0), (10, 232)),
        "files": (str(stage.host_file),),
        "trees": ("/work", "/tmp", "/var", "/run", "/home", "/root", "/srv", "/opt", "/mnt", "/media", "/dev", "/etc",  # noqa: S108
                  "/sys/fs"),
    }  # fmt: skip


@_case(
    "D25", "sockets, devices and other runs' files", Severity.LATERAL,
    attack=lambda stage: python(programs.SEARCH_FILES, given=_searching(stage), neighbour=True),
    control=lambda stage: python(
        programs.SEARCH_FILES, given=_searching(stage), env={"TOKEN": stage.given}, neighbour=True
    ),
)  # fmt: skip
def _files(seen: Seen) -> str | None:
    """Opened: a file with a token lies in the run's own /work. gVisor's own /dev/net/tun may be opened: what counts is
    that no interface can be made of it."""
    return claims(seen, "REACHED", "OPENED") or leaked(seen)


# --- whom a guest may reach ---

_METADATA = (("169.254.169.254", 80), ("fd00:ec2::254", 80), ("100.100.100.200", 80), ("169.254.170.2", 80))
_OWN = ("127.0.0.1", 47113)


def _connecting(*, host: bool, own: bool) -> Make:
    def make(stage: Stage) -> Play:
        targets = [*((*stage.ears.targets, *stage.nearby) if host else _METADATA), *([_OWN] if own else [])]
        given = {"targets": targets, "own": _OWN if own else None}
        return python(programs.CONNECT, given=given, env={"TOKEN": stage.given} if own else {})

    return make


def _reached(seen: Seen) -> str | None:
    """Opened: one more address, at which the guest itself listens within its wall."""
    if seen.heard:
        return f"this host heard it: {', '.join(seen.heard)}"
    return claims(seen, "REACHED") or leaked(seen)


_case(
    "D26", "the metadata service of a cloud", Severity.EXFIL,
    attack=_connecting(host=False, own=False), control=_connecting(host=False, own=True),
)(_reached)  # fmt: skip
_case(
    "D27", "listeners of this host or its cluster", Severity.LATERAL,
    attack=_connecting(host=True, own=False), control=_connecting(host=True, own=True),
)(_reached)  # fmt: skip


def _resolving(name: str) -> Make:
    def make(stage: Stage) -> Play:
        given = {"targets": [*stage.ears.targets, ("192.0.2.53", 53)], "name": name.format(stage.mark)}
        return python(programs.RESOLVE, given=given)

    return make


@_case(
    "D28", "names, raw sockets and packets", Severity.EXFIL,
    attack=_resolving("{}.canary.test"), control=_resolving("localhost"),
)  # fmt: skip
def _names(seen: Seen) -> str | None:
    """Opened: the name to be resolved is one that the guest's own /etc/hosts has."""
    if seen.heard:
        return f"this host heard it: {', '.join(seen.heard)}"
    return claims(seen, "RESOLVED", "OPENED")


@_case(
    "D29", "the environment of a step", Severity.HOST_LEAK,
    attack=always(python(programs.ENVIRONMENT)), control=_holding(programs.ENVIRONMENT),
)  # fmt: skip
def _environment(seen: Seen) -> str | None:
    """Opened: one variable more than the case declares."""
    said = seen.said("SEES")
    sees = json.loads(said[-1]) if said else {}
    declared = sorted(f"{name}={value}" for name, value in ENVIRONMENT.items())
    if sorted(sees.get("environ", [])) != declared:
        names = sorted(word.partition("=")[0] for word in sees.get("environ", []))
        return f"a step sees {', '.join(names) or 'nothing'} in its environment"
    if sees["cwd"] != "/work" or sees["uid"] == 0:
        return f"a step works in {sees['cwd']} as uid {sees['uid']}"
    return leaked(seen)


_ACCOUNT = ("/var/run/secrets", "/run/secrets")
_API = (("kubernetes.default.svc", 443), ("kubernetes.default", 443))


def _asking(*more: str) -> Make:
    def make(stage: Stage) -> Play:
        given = {"places": (*_ACCOUNT, *more), "targets": [*_API, *stage.nearby]}
        return python(programs.SERVICE_ACCOUNT, given=given, env={"TOKEN": stage.given} if more else {})

    return make


@_case(
    "D30", "an account of a cluster, and its API server", Severity.LATERAL,
    attack=_asking(), control=_asking("/work/serviceaccount"),
)  # fmt: skip
def _account(seen: Seen) -> str | None:
    """Opened: a file with a token lies in one more place that is looked at, in the run's own /work."""
    return claims(seen, "REACHED", "HOLDS", "NAMED") or leaked(seen)


# --- what a guest leaves behind and says ---

_BAIT = ("link", "environ", "pipe", "socket", "hard", "passwd")


def _planting(stage: Stage, env: dict[str, str]) -> Play:
    given = {"file": str(stage.host_file), "names": _BAIT}
    return python(programs.PLANT, given=given, env=env, patterns=("out/**",))


@_case(
    "D31", "links, FIFOs and sockets as artifacts", Severity.HOST_LEAK,
    attack=lambda stage: _planting(stage, {}), control=lambda stage: _planting(stage, {"TOKEN": stage.given}),
)  # fmt: skip
def _artifacts(seen: Seen) -> str | None:
    """Opened: regular files of the same names, with a token in them."""
    if kept := [artifact.path for artifact in seen.artifacts.kept]:
        return f"kept {', '.join(kept[:5])}"
    if not seen.artifacts.skipped:
        return "nothing is said of what was skipped"
    if seen.collect_s > 5:
        return f"collecting took {seen.collect_s:.1f} s"
    return leaked(seen)


_STEP = Step.model_validate({"name": "tests", "run": "tests", "expect": {"stdout": {"contains": "42 tests passed"}}})


@_case(
    "D33", "exit 0 before the tests have run", Severity.INTEGRITY, ends=False,
    attack=always(python(programs.EXIT_EARLY, given={"honest": False})),
    control=always(python(programs.EXIT_EARLY, given={"honest": True})),
)  # fmt: skip
def _verdict(seen: Seen) -> str | None:
    """Opened: the tests do run, and print what is expected of them."""
    outcome = judge_step(1, _STEP, seen.execution).result.outcome
    return None if outcome is StepOutcome.FAILED else f"the verdict is {outcome}"


CASES: tuple[Case, ...] = (*TAKING.cases, *_corpus.cases)
