"""D11 to D17 in pods, the whole way (S1 to S7 of the corpus): what a guest may take, and that it is given back.

Each attack is also played with its one limit four times as high, where the outcome must be another or the amount more:
else nothing would show that it was this limit that held. All runs of a variant are submitted at once.

Where the expectation differs from that of the boundary `gvisor`: a limit of files is counted by our program in the pod,
since a memory volume has no limit of inodes that could be set. The number of processes is a limit for each user, and
each pod has a user of its own. A pod of a RuntimeClass has its memory limit and the class's overhead together, so that
a guest behind gVisor may have up to 128 MiB more than its limit: the bomb is larger than both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from tests.cluster.whole_way import VARIANTS, Ground, landed
from tests.stack import Document, eventually, finished, python, read, submit
from tests.sweep import sweep, swept

MIB, KIB = 2**20, 2**10


@dataclass(frozen=True)
class Attack:
    """`ends`: the outcomes and reasons that are as they should be; `opened`: those of the control."""

    run: Any
    limits: Mapping[str, Any]
    ends: frozenset[tuple[str, str | None]]
    opened: frozenset[tuple[str, str | None]]

    @property
    def wider(self) -> dict[str, Any]:
        """The first of the limits four times as high."""
        first = next(iter(self.limits))
        return dict(self.limits) | {first: 4 * self.limits[first]}


def outcomes(*rows: tuple[str, str | None]) -> frozenset[tuple[str, str | None]]:
    return frozenset(rows)


FORK = """
import os, time
for _ in range(40):
    try:
        if not os.fork():
            time.sleep(3)
            os._exit(0)
    except OSError:
        time.sleep(1)
        raise
"""
PASSED = outcomes(("passed", None))
ATTACKS = {
    "D11 S1 a fork bomb": Attack(
        python(FORK),
        {"pids": 16, "memory": 512 * MIB}, outcomes(("limit_exceeded", "pids")), PASSED,
    ),
    "D12 S2 a memory bomb": Attack(
        python("b = []\nfor _ in range(215): b.append(bytearray(b'x' * (1 << 20)))"),
        {"memory": 64 * MIB}, outcomes(("limit_exceeded", "memory")), PASSED,
    ),
    "D13 S3 filling the disk": Attack(
        "dd if=/dev/zero of=/work/f bs=1M count=20; code=$?; sleep 0.5; exit $code",
        {"disk": 8 * MIB}, outcomes(("limit_exceeded", "disk")), PASSED,
    ),
    "D14 S4 filling the inodes": Attack(
        python("import time\nfor n in range(300): open(str(n), 'w').close()\ntime.sleep(.3)"),
        {"files": 100}, outcomes(("limit_exceeded", "files")), PASSED,
    ),
    "D15 S5 holding files open": Attack(
        python("import os\nheld = [os.open('/dev/null', 0) for _ in range(100)]"),
        {"open_files": 64}, outcomes(("failed", "exit_code")), PASSED,
    ),
    "D16 S6 a flood": Attack(
        "yes AAAAAAAA | head -c 6000000",
        {"output": 64 * KIB}, outcomes(("limit_exceeded", "output")), PASSED,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Played:
    attack: Document
    control: Document


@pytest.fixture(scope="module")
def played(ground: Ground) -> dict[tuple[str, str], Played]:
    """Every attack and its control, behind each wall."""
    ids = {
        (variant, name, open_): submit(
            ground.tenant(variant), attack.run, limits=attack.wider if open_ else attack.limits
        )
        for variant in VARIANTS
        for name, attack in ATTACKS.items()
        for open_ in (False, True)
    }
    with ground.same_worker():
        runs = {key: finished(ground.tenant(key[0]), run_id, within_s=240) for key, run_id in ids.items()}
    return {
        (variant, name): Played(runs[variant, name, False], runs[variant, name, True])
        for variant in VARIANTS
        for name in ATTACKS
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_taken_beyond_a_limit_ends_the_run_with_its_reason(
    played: dict[tuple[str, str], Played], name: str, variant: str
) -> None:
    attack, runs = ATTACKS[name], played[variant, name]
    assert (runs.attack["outcome"], runs.attack["reason"]) in attack.ends, runs.attack
    assert (runs.control["outcome"], runs.control["reason"]) in attack.opened, f"the control: {runs.control}"
    landed(runs.control, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_of_any_of_them_is_left_on_the_node(played: dict[tuple[str, str], Played], variant: str) -> None:
    uids = [played[variant, name].control["evidence"]["pod_spec"]["uid"] for name in ATTACKS]
    assert [str(found) for found in swept(*uids, within_s=30)] == []


DAEMON = "setsid sh -c 'trap \"\" TERM HUP INT; sleep 3600' >/dev/null 2>&1 & exit 0"


@pytest.mark.parametrize("variant", VARIANTS)
class TestD17S7Daemons:
    def test_a_daemon_neither_delays_the_result_nor_outlives_it(self, ground: Ground, variant: str) -> None:
        client = ground.tenant(variant)
        run = landed(finished(client, submit(client, DAEMON)), variant)
        assert run["outcome"] == "passed"
        assert run["usage"]["wall_s"] < 30, "it sleeps for an hour"
        assert swept(run["evidence"]["pod_spec"]["uid"], within_s=30) == []

    def test_control_while_a_run_with_a_daemon_goes_on_the_sweep_finds_it(self, ground: Ground, variant: str) -> None:
        client = ground.tenant(variant)
        run_id = submit(client, DAEMON, "touch plays; sleep 600")
        ground.wait_for_file(run_id, "plays")
        uid = ground.pod(run_id)["metadata"]["uid"]
        assert {"process", "cgroup", "mount"} <= {found.kind for found in sweep(uid)}
        assert client.post(f"/v1/runs/{run_id}/cancel").status_code == 202
        assert eventually(lambda: read(client, run_id)["phase"] == "finished")
        assert swept(uid, within_s=30) == []
