"""The corpus of attacks on resources, life cycle and identity, as a tenant submits them to the whole service.

Each case is also played with its one limit four times as high, and there the same check must fire: else it could not
fail. What is checked is what the host sees (control groups, processes, mounts) and what the API answers.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
import redis

from tests.stack import (
    Document,
    Stack,
    finished,
    python,
    read,
    started,
    submit,
    watched,
    watching,
)
from tests.sweep import sweep

MIB, KIB = 2**20, 2**10
pytestmark = pytest.mark.timeout(240)

FORK = python("import os\nwhile 1: os.fork()")
SHELL_BOMB = ["bash", "-c", "b() { b | b & }; b; sleep 60"]
MEMORY = python("b=[]\nwhile 1: b.append(bytearray(1<<24))")
DAEMON = "setsid sh -c 'trap \"\" TERM HUP INT; sleep 3600' >/dev/null 2>&1 & exit 0"
DEAF = "trap '' TERM INT HUP QUIT; while :; do sleep 1; done"


def stranded(stack: Stack, run: Document) -> list[str]:
    """What is left of the run on this host, 15 s at most after its end."""
    return [str(found) for found in stack.left_of(run["id"])]


@pytest.fixture
def same_worker(stack: Stack) -> Iterator[None]:
    """No attack may cost us a process."""
    with stack.no_worker_dies():
        yield


@pytest.mark.usefixtures("same_worker")
class TestD11ForkBombs:
    """The memory limit is far off, so that it is the processes that are counted."""

    LIMITS = {"pids": 64, "memory": "2GiB", "wall": "6s"}  # noqa: RUF012
    CAP = 96 + 3 * 64
    """Host threads that the control group allows with 64 pids (`render.group_limits`)."""

    @pytest.mark.parametrize("bomb", [FORK, SHELL_BOMB], ids=["python", "bash"])
    def test_a_fork_bomb_ends_with_its_reason_and_its_host_threads_stay_below_the_cap(
        self, stack: Stack, bomb: list[str]
    ) -> None:
        run, seen = watched(stack.tenant, stack, bomb, limits=self.LIMITS)
        assert (run["outcome"], run["reason"]) in (("limit_exceeded", "pids"), ("timed_out", "wall_timeout"))
        assert run["evidence"]["limits"]["host_tasks"] == self.CAP
        assert 64 < seen.tasks <= self.CAP
        assert stranded(stack, run) == []

    def test_control_with_four_times_the_pids_the_same_bomb_is_over_the_cap(self, stack: Stack) -> None:
        run, seen = watched(stack.tenant, stack, FORK, limits=self.LIMITS | {"pids": 4 * 64})
        assert run["outcome"] in ("limit_exceeded", "timed_out")
        assert seen.tasks > self.CAP
        assert stranded(stack, run) == []


@pytest.mark.usefixtures("same_worker")
class TestD12MemoryBombs:
    def test_a_memory_bomb_ends_at_its_limit_and_the_worker_lives(self, stack: Stack) -> None:
        run, seen = watched(stack.tenant, stack, MEMORY, limits={"memory": "64MiB"})
        assert (run["outcome"], run["reason"]) == ("limit_exceeded", "memory")
        assert 32 * MIB < seen.memory_bytes <= 64 * MIB
        assert 32 * MIB < run["usage"]["peak_memory_bytes"] <= 64 * MIB
        assert stranded(stack, run) == []

    def test_control_with_four_times_the_memory_the_peak_is_over_the_limit(self, stack: Stack) -> None:
        run, seen = watched(stack.tenant, stack, MEMORY, limits={"memory": "256MiB"})
        assert run["reason"] == "memory"
        assert seen.memory_bytes > 64 * MIB
        assert run["usage"]["peak_memory_bytes"] > 64 * MIB


@pytest.mark.usefixtures("same_worker")
class TestD16Floods:
    FLOOD = "yes AAAAAAAA"
    OUTPUT = 256 * KIB
    BOUND = 64 * OUTPUT + 2 * MIB
    """What may be read before the run is ended, and what the pipes hold."""

    def test_a_flood_is_ended_and_neither_we_nor_the_answer_grow_with_it(self, stack: Stack) -> None:
        before = stack.worker_rss_bytes()
        run_id = submit(stack.tenant, self.FLOOD, limits={"output": self.OUTPUT, "wall": "30s"})
        highest = 0
        while read(stack.tenant, run_id)["phase"] != "finished":
            highest = max(highest, stack.worker_rss_bytes())
        run = finished(stack.tenant, run_id)
        stdout = run["steps"][0]["stdout"]
        assert (run["outcome"], run["reason"]) == ("limit_exceeded", "output")
        assert stdout["truncated"]
        assert 64 * self.OUTPUT < stdout["bytes"] <= self.BOUND
        assert 8 * KIB < len(stdout["text"].encode()) <= 16 * KIB
        assert len(stack.tenant.get(f"/v1/runs/{run_id}").content) < 3 * MIB
        assert highest - before < 32 * MIB, "the worker's resident memory grows with the flood"
        assert stranded(stack, run) == []

    def test_a_step_that_prints_much_and_ends_passes_with_its_output_cut(self, stack: Stack) -> None:
        command = f"{self.FLOOD} | head -c {2 * MIB}"
        run, _ = watched(stack.tenant, stack, command, limits={"output": self.OUTPUT})
        stdout = run["steps"][0]["stdout"]
        assert run["outcome"] == "passed"
        assert (stdout["truncated"], stdout["bytes"]) == (True, 2 * MIB)
        assert len(stdout["text"].encode()) <= 16 * KIB

    def test_control_with_four_times_the_output_more_is_read_than_the_bound(self, stack: Stack) -> None:
        run, _ = watched(stack.tenant, stack, self.FLOOD, limits={"output": 4 * self.OUTPUT, "wall": "30s"})
        assert run["steps"][0]["stdout"]["bytes"] > self.BOUND


@pytest.mark.usefixtures("same_worker")
class TestD17Daemons:
    def test_a_daemon_neither_delays_the_result_nor_outlives_it(self, stack: Stack) -> None:
        run, _ = watched(stack.tenant, stack, DAEMON)
        assert run["outcome"] == "passed"
        assert run["usage"]["wall_s"] < 5
        assert stack.left_of(run["id"], within_s=5) == []

    def test_control_while_a_run_with_a_daemon_goes_on_the_sweep_finds_it(self, stack: Stack) -> None:
        run_id = submit(stack.tenant, DAEMON, "touch plays; sleep 60")
        stack.wait_for_file(run_id, "plays")
        assert {"process", "cgroup", "mount"} <= {found.kind for found in sweep(stack.mark(run_id))}
        assert stack.tenant.post(f"/v1/runs/{run_id}/cancel").status_code == 202
        finished(stack.tenant, run_id)
        assert stack.left_of(run_id, within_s=5) == []


@pytest.mark.usefixtures("same_worker")
class TestD18DeafToSignals:
    @staticmethod
    def took_s(stack: Stack, wall: str) -> tuple[Document, float]:
        """Seconds as a client of the API measures them, from the first step to the answer."""
        run_id = submit(stack.tenant, DEAF, limits={"wall": wall})
        started(stack.tenant, run_id)
        at = time.monotonic()
        run = finished(stack.tenant, run_id)
        return run, time.monotonic() - at

    def test_a_guest_that_ignores_signals_is_over_within_five_seconds_of_its_deadline(self, stack: Stack) -> None:
        run, took_s = self.took_s(stack, "2s")
        assert (run["outcome"], run["reason"]) == ("timed_out", "wall_timeout")
        assert took_s < 2 + 5
        assert stack.left_of(run["id"], within_s=5) == []

    def test_a_step_of_its_own_time_is_ended_as_surely_and_the_next_one_can_run(self, stack: Stack) -> None:
        steps = {"run": DEAF, "timeout": "1s"}, {"run": "echo after", "always": True}
        run, _ = watched(stack.tenant, stack, *steps)
        assert (run["outcome"], run["reason"]) == ("timed_out", "step_timeout")
        assert run["steps"][0]["duration_s"] < 1 + 5
        assert run["steps"][1]["stdout"]["text"] == "after\n"
        assert stack.left_of(run["id"], within_s=5) == []

    def test_control_with_four_times_the_time_it_is_not_over_by_then(self, stack: Stack) -> None:
        run, took_s = self.took_s(stack, "8s")
        assert run["outcome"] == "timed_out"
        assert took_s > 2 + 5


@pytest.mark.usefixtures("same_worker")
class TestD19HeldPipes:
    """The weakened reader, which waits for the end of the pipe, is in test_corpus_at_the_driver.py."""

    def test_a_child_that_holds_and_fills_stdout_does_not_delay_the_result(self, stack: Stack) -> None:
        child = "(trap '' TERM HUP PIPE; while :; do echo late; sleep 0.05; done) & echo main; exit 3"
        run_id = submit(stack.tenant, child, {"run": "echo next", "always": True})
        run = finished(stack.tenant, run_id)
        first, second = run["steps"]
        assert (run["outcome"], first["exit_code"]) == ("failed", 3)
        assert "main\n" in first["stdout"]["text"]
        assert first["duration_s"] < 2
        assert second["stdout"]["text"] == "next\n", "the child's output reached the next step"
        assert stack.left_of(run_id, within_s=5) == []


@pytest.mark.usefixtures("same_worker")
class TestD20PastTheWallLimit:
    WALL_S = 4.0
    TOLERANCE = 0.1

    def problems(self, run: Document) -> list[str]:
        """What is not as it should be of a run that was to be ended at its wall limit."""
        step, usage = run["steps"][0], run["usage"]
        measured = {"step": step["duration_s"], "usage": usage["wall_s"]}
        return [
            f"{name} took {seconds} s"
            for name, seconds in measured.items()
            if not abs(seconds - self.WALL_S) <= self.TOLERANCE * self.WALL_S
        ] + [f"{run['outcome']}/{run['reason']}"] * ((run["outcome"], run["reason"]) != ("timed_out", "wall_timeout"))

    def test_busy_and_idle_are_both_ended_at_the_limit_with_their_cpu_and_wall_time(self, stack: Stack) -> None:
        busy_id = submit(stack.tenant, python("while 1: pass"), limits={"wall": f"{self.WALL_S:g}s"})
        with watching(stack, busy_id) as seen:
            busy = finished(stack.tenant, busy_id)
        idle = finished(stack.tenant, submit(stack.tenant, "sleep 60", limits={"wall": f"{self.WALL_S:g}s"}))
        assert (self.problems(busy), self.problems(idle)) == ([], [])
        assert busy["usage"]["cpu_s"] == pytest.approx(seen.cpu_s, rel=0.1, abs=0.3), "the control group's own figure"
        assert 0 < idle["usage"]["cpu_s"] < busy["usage"]["cpu_s"]
        assert busy["steps"][0]["cpu_s"] > idle["steps"][0]["cpu_s"] + 0.1 * self.WALL_S, "a core may be a shared one"

    def test_control_with_four_times_the_limit_the_same_check_fires(self, stack: Stack) -> None:
        limits = {"wall": f"{4 * self.WALL_S:g}s"}
        run = finished(stack.tenant, submit(stack.tenant, "sleep 60", limits=limits))
        assert len(self.problems(run)) == 2


@pytest.mark.usefixtures("same_worker")
class TestD29Environment:
    """The worker that hands on its own environment is the control, in test_corpus_at_the_driver.py."""

    LOOK = python("import json,os,sys; print(json.dumps([dict(os.environ), os.getcwd(), sys.argv, os.getuid()]))")
    PLAIN = {"PATH", "HOME", "LANG", "TMPDIR"}  # noqa: RUF012

    def test_a_step_sees_exactly_the_documented_names_and_nothing_of_ours(self, stack: Stack) -> None:
        run, _ = watched(stack.tenant, stack, self.LOOK)
        environment, directory, argv, uid = json.loads(run["steps"][0]["stdout"]["text"])
        assert set(environment) == self.PLAIN
        assert (environment["HOME"], environment["TMPDIR"], directory) == ("/work", "/tmp", "/work")
        assert (argv, uid, run["evidence"]["uid"]) == (["-c"], 65532, 65532)

    def test_declared_names_are_added_a_steps_own_wins_and_no_other_step_sees_it(self, stack: Stack) -> None:
        steps = {"run": self.LOOK, "env": {"MODE": "step", "OWN": "1"}}, {"run": self.LOOK}
        run, _ = watched(stack.tenant, stack, *steps, env={"MODE": "all", "TMPDIR": "/work"})
        first, second = (json.loads(step["stdout"]["text"])[0] for step in run["steps"])
        assert (set(first), set(second)) == (self.PLAIN | {"MODE", "OWN"}, self.PLAIN | {"MODE"})
        assert (first["MODE"], second["MODE"], first["TMPDIR"]) == ("step", "all", "/work")

    def test_the_token_in_our_own_environment_is_nowhere_in_what_a_guest_can_read(self, stack: Stack) -> None:
        search = "cat /proc/*/environ /proc/*/cmdline /proc/self/mountinfo /etc/* 2>/dev/null; hostname; env"
        run, _ = watched(stack.tenant, stack, f"{search}; true", limits={"output": "2MiB"})
        worker = stack.children["worker"]
        with open(f"/proc/{worker}/environ") as environ:
            assert stack.token in environ.read(), "control: the token is there to be found"
        assert "HOME=/work" in run["steps"][0]["stdout"]["text"]
        assert stack.token not in json.dumps(run)


class TestD27OurOwnServices:
    """The room of test_corpus_network.py has every address; here it is the service that runs the code itself."""

    KNOCK = """
import socket, sys
for port in map(int, sys.argv[2:]):
    for host in ("127.0.0.1", "::1", "localhost"):
        try:
            with socket.create_connection((host, port), 2) as s:
                s.sendall(b"AUTH %s x\\r\\n" % sys.argv[1].encode())
                s.recv(100)
        except OSError as error:
            print(host, port, error)
"""

    def test_a_guest_reaches_neither_redis_nor_the_api_nor_any_listener_of_the_host(self, stack: Stack) -> None:
        bus, api = urlsplit(stack.ready["redis_url"]), urlsplit(stack.ready["url"])
        with socket.create_server(("127.0.0.1", 0)) as listener, redis.Redis.from_url(stack.ready["redis_url"]) as bell:
            listener.setblocking(False)
            ports = [str(bus.port), str(api.port), str(listener.getsockname()[1])]

            def heard(token: str, argv: list[str] | None) -> tuple[bool, bool]:
                """-> whether Redis was asked for the token's password, and whether the listener was called."""
                if argv is None:
                    run = finished(stack.tenant, submit(stack.tenant, [*python(self.KNOCK), token, *ports]))
                    assert (run["outcome"], run["evidence"]["network"]) == ("passed", "none")
                else:
                    subprocess.run([*argv, token, *ports], check=True, capture_output=True, timeout=60)
                asked = token in [row["username"] for row in bell.acl_log()]
                try:
                    connection, _ = listener.accept()
                except BlockingIOError:
                    return asked, False
                connection.close()
                return asked, True

            assert heard("guest-of-d27", None) == (False, False)
            on_host = [sys.executable, "-I", "-S", "-c", self.KNOCK]
            assert heard("control-of-d27", on_host) == (True, True), "control: from the host both can be reached"
