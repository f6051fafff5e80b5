"""D13, D14 and D15 as a tenant submits them: what is used up is the run's own, and is there again when it is over."""

import os

import pytest

from tests.escape.whole_way import Held, descriptors, held_by, work_of
from tests.stack import Document, Stack, eventually, finished, python, submit

MIB = 2**20
pytestmark = pytest.mark.timeout(240)
SLACK = Held(bytes=3 * MIB, inodes=100)
"""Rows, logs and the bytes that the run may keep, all together."""


def settled(stack: Stack, before: Held) -> bool:
    """Whether the installation again holds no more than before, but for the record of what was run."""
    grown = held_by(stack) - before
    return grown.bytes <= SLACK.bytes and grown.inodes <= SLACK.inodes


def standing(stack: Stack, run_id: str, *, before: Held) -> Held:
    """What the installation holds more while the run, which has done its worst, still stands; then the run is ended."""
    stack.wait_for_file(run_id, "done")
    grown = held_by(stack) - before
    work_of(stack, run_id).joinpath("go").touch()
    return grown


def then_wait(attack: str) -> list[str]:
    """A control: the same, but the run stands until the host has looked."""
    waits = "import os, time\nopen('done', 'w').close()\nwhile not os.path.exists('go'): time.sleep(0.02)\n"
    return python(f"{attack}\n{waits}")


class TestD13Disk:
    FILL = "dd if=/dev/zero of=/work/f bs=1M"

    def test_the_disk_ends_with_its_reason_and_the_hosts_bytes_are_free_again(self, stack: Stack) -> None:
        before = held_by(stack)
        run = finished(stack.tenant, submit(stack.tenant, self.FILL, limits={"disk": "24MiB"}))
        assert (run["outcome"], run["reason"]) == ("limit_exceeded", "disk")
        assert "No space left on device" in run["steps"][0]["stderr"]["text"]
        assert run["evidence"]["limits"]["disk_bytes"] == 24 * MIB
        assert eventually(lambda: settled(stack, before), within_s=15), held_by(stack) - before
        assert stack.left_of(run["id"]) == []

    def test_control_while_such_a_run_stands_its_bytes_are_seen(self, stack: Stack) -> None:
        before = held_by(stack)
        attack = "with open('f', 'wb') as f: f.write(bytes(16 << 20))"
        run_id = submit(stack.tenant, then_wait(attack), limits={"disk": "24MiB"})
        assert 16 * MIB <= standing(stack, run_id, before=before).bytes <= 24 * MIB + SLACK.bytes
        assert finished(stack.tenant, run_id)["outcome"] == "passed"
        assert eventually(lambda: settled(stack, before), within_s=15)

    def test_control_with_four_times_the_disk_the_same_amount_fits(self, stack: Stack) -> None:
        run = finished(stack.tenant, submit(stack.tenant, f"{self.FILL} count=25", limits={"disk": "96MiB"}))
        assert run["outcome"] == "passed"


class TestD14Inodes:
    FILL = "n = 0\nwhile True:\n    open(str(n), 'w').close()\n    n += 1"
    FILES = 500

    def test_the_files_end_with_their_reason_and_the_hosts_inodes_are_free_again(self, stack: Stack) -> None:
        before = held_by(stack)
        run = finished(stack.tenant, submit(stack.tenant, python(self.FILL), limits={"files": self.FILES}))
        assert (run["outcome"], run["reason"]) == ("limit_exceeded", "files")
        assert "No space left on device" in run["steps"][0]["stderr"]["text"]
        assert run["evidence"]["limits"]["files"] == self.FILES
        assert eventually(lambda: settled(stack, before), within_s=15), held_by(stack) - before
        assert stack.left_of(run["id"]) == []

    def test_control_while_such_a_run_stands_its_inodes_are_seen(self, stack: Stack) -> None:
        before = held_by(stack)
        attack = f"for n in range({self.FILES - 10}): open(str(n), 'w').close()"
        run_id = submit(stack.tenant, then_wait(attack), limits={"files": self.FILES})
        assert self.FILES - 10 <= standing(stack, run_id, before=before).inodes <= self.FILES + SLACK.inodes
        assert finished(stack.tenant, run_id)["outcome"] == "passed"
        assert eventually(lambda: settled(stack, before), within_s=15)


class TestD15Descriptors:
    FILL = "import os\nn = 0\ntry:\n    while True: n += os.open('/dev/null', 0) > 0\nfinally: print(n)"
    LIMIT = 64

    def held(self, run: Document) -> int:
        return int(run["steps"][0]["stdout"]["text"])

    def test_open_files_end_inside_and_ours_stay_as_many_as_they_were(self, stack: Stack) -> None:
        """A descriptor lost with each run would be as many as there are runs; a connection opened late is one."""
        for run_id in [submit(stack.tenant, "sleep 0.2") for _ in range(4)]:
            finished(stack.tenant, run_id)
        before = eventually(lambda: _at_rest(stack))
        for run_id in [submit(stack.tenant, python(self.FILL), limits={"open_files": self.LIMIT}) for _ in range(12)]:
            run = finished(stack.tenant, run_id)
            assert (run["outcome"], run["reason"]) == ("failed", "exit_code")
            assert "Too many open files" in run["steps"][0]["stderr"]["text"]
            assert self.LIMIT - 10 < self.held(run) < self.LIMIT
        after = eventually(lambda: _at_rest(stack))
        assert 0 < after < before + 12, f"{before} before, {after} after"

    def test_control_with_four_times_the_limit_more_are_held(self, stack: Stack) -> None:
        limits = {"open_files": 4 * self.LIMIT}
        run = finished(stack.tenant, submit(stack.tenant, python(self.FILL), limits=limits))
        assert self.LIMIT < self.held(run) < 4 * self.LIMIT

    def test_control_a_run_that_goes_on_is_seen_in_our_own_descriptors(self, stack: Stack) -> None:
        before = eventually(lambda: _at_rest(stack))
        run_id = submit(stack.tenant, then_wait("pass"))
        stack.wait_for_file(run_id, "done")
        assert descriptors(stack) > before
        work_of(stack, run_id).joinpath("go").touch()
        finished(stack.tenant, run_id)


def _at_rest(stack: Stack) -> int:
    """The count when nothing has changed it for a moment: the next supervisor is made ready behind a run's back."""
    seen = [descriptors(stack)]
    for _ in range(5):
        os.sched_yield()
        seen.append(descriptors(stack))
    waiting = [name for name in os.listdir(stack.runtime_dir / stack.installation) if not name.startswith(".")]
    return seen[0] if len(set(seen)) == 1 and not waiting else 0
