"""`blastdoor up` as a process: ready on one line of JSON, real walls, one at a time, and gone when stopped."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from tests.summary import ran

COMMAND = (sys.executable, "-I", "-m", "service.cli.main")
READY_WITHIN_S, STOPPED_WITHIN_S = 60.0, 45.0

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="sandboxes need root"),
    pytest.mark.skipif(shutil.which("runsc") is None, reason="runsc is not installed"),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
    pytest.mark.timeout(180),
]


@dataclass
class Up:
    """A running `blastdoor up` and what it said."""

    process: subprocess.Popen[str]
    state: Path
    ready: dict[str, Any] = field(default_factory=dict)

    @property
    def children(self) -> dict[str, int]:
        rows = json.loads((self.state / "up.json").read_text())["processes"]
        return {name: row["pid"] for name, row in rows.items()}

    def client(self, key: str = "tenant_key") -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.ready[key]}"}
        return httpx.Client(base_url=self.ready["url"], headers=headers, trust_env=False, timeout=90.0)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(STOPPED_WITHIN_S)


@contextmanager
def running(state: Path, **environment: str) -> Iterator[Up]:
    """Start it, wait for its line, and end this very process afterwards."""
    log = state.with_name(f"{state.name}.stderr")
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*COMMAND, "up", "--state", str(state), "--port", "0", "--json"],
            stdout=subprocess.PIPE, stderr=errors, text=True, env={"PATH": os.environ["PATH"], **environment},
        )  # fmt: skip
    up = Up(process, state)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        up.ready = json.loads(line)
        yield up
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOPPED_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One `up` that tests share as long as they leave it running."""
    with running(tmp_path_factory.mktemp("up") / "state") as up:
        ran("boundary", "gvisor")
        yield up


def test_it_says_on_one_line_where_it_is_and_with_which_keys(started: Up) -> None:
    names = {"url", "tenant", "tenant_key", "service_key", "admin_key", "redis_url"}
    assert set(started.ready) == names
    assert started.ready["tenant"] == "demo"
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", started.ready["url"])
    prefixes = [started.ready[name][:5] for name in ("tenant_key", "service_key", "admin_key")]
    assert prefixes == ["bd_t_", "bd_s_", "bd_a_"]


def test_two_runs_behind_a_real_wall_pass_and_fail_as_they_should(started: Up, tmp_path: Path) -> None:
    code = _code(tmp_path, "python3 -c 'print(6 * 7)'")
    passed = _blastdoor(started.state, "run", str(code), "--json")
    assert passed.returncode == 0, passed.stderr
    run = json.loads(passed.stdout)
    assert run["outcome"] == "passed"
    assert run["steps"][0]["stdout"]["text"] == "42\n"
    assert run["placement"]["guarantees"]["kernel"] == "sandboxed"
    failed = _blastdoor(started.state, "run", str(_code(tmp_path, "echo no >&2; exit 3")))
    assert failed.returncode == 1
    assert "! no" in failed.stdout
    assert "expected 0" in failed.stdout


def test_what_is_refused_and_what_is_not_there_have_their_exit_codes(started: Up, tmp_path: Path) -> None:
    assert _blastdoor(started.state, "runs", "show", "run_" + "0" * 32).returncode == 2
    (tmp_path / "empty").mkdir()
    refused = _blastdoor(started.state, "run", str(tmp_path / "empty"))
    assert refused.returncode == 2
    assert "scenario" in refused.stderr


def test_operators_manage_tenants_through_the_same_file(started: Up) -> None:
    added = _blastdoor(started.state, "tenants", "add", "acme", "--concurrent", "3", "--json")
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["tenant"]["quota"]["concurrent"] == 3
    assert "acme" in _blastdoor(started.state, "tenants").stdout


def test_no_secret_stands_on_a_command_line_or_in_a_log(started: Up) -> None:
    secrets = [started.ready[name] for name in ("tenant_key", "service_key", "admin_key")]
    secrets.append(started.ready["redis_url"].split(":")[2].split("@")[0])
    for pid in (*started.children.values(), started.process.pid):
        command = Path(f"/proc/{pid}/cmdline").read_text()
        assert not [secret for secret in secrets if secret in command], command
    for log in (started.state / "logs").iterdir():
        assert not [secret for secret in secrets if secret in log.read_text()], log.name


def test_state_and_client_file_are_for_their_owner_alone(started: Up) -> None:
    assert stat.S_IMODE(started.state.stat().st_mode) == 0o700
    assert stat.S_IMODE((started.state / "client.json").stat().st_mode) == 0o600


def test_redis_knows_nobody_without_a_password_and_gives_processes_no_dangerous_command(started: Up) -> None:
    with redis.Redis.from_url(started.ready["redis_url"], decode_responses=True) as operator:
        assert operator.acl_log() == [], "our own processes asked for something that they may not do"
    port = int(started.ready["redis_url"].rpartition(":")[2].partition("/")[0])
    with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    environment = Path(f"/proc/{started.children['worker']}/environ").read_bytes().decode()
    url = re.search(r"BLASTDOOR_REDIS_URL=([^\0]+)", environment)
    assert url is not None
    with redis.Redis.from_url(url[1]) as process:
        assert process.ping()
        for command in (("CONFIG", "GET", "*"), ("FLUSHALL",), ("KEYS", "*"), ("REPLICAOF", "NO", "ONE")):
            with pytest.raises(redis.exceptions.NoPermissionError):
                process.execute_command(*command)


def test_a_second_one_on_the_same_state_is_refused(started: Up) -> None:
    second = subprocess.run(
        [*COMMAND, "up", "--state", str(started.state), "--port", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert second.returncode == 2
    assert f"another `blastdoor up` (pid {started.process.pid}) runs" in second.stderr
    with started.client() as client:
        assert client.get("/v1/runs").status_code == 200


def test_a_process_that_dies_is_named_and_started_again(started: Up) -> None:
    before = started.children["relay"]
    os.kill(before, signal.SIGKILL)
    assert _eventually(lambda: started.children["relay"] != before, seconds=15)
    log = started.state.with_name(f"{started.state.name}.stderr").read_text()
    assert "relay was killed by signal 9; it starts again" in log


def test_a_directory_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    refused = subprocess.run(
        [*COMMAND, "up", "--state", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert refused.returncode == 2
    assert "has other things in it" in refused.stderr


def test_stopping_leaves_nothing_behind_and_a_restart_keeps_runs_but_not_keys(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(state) as first:
        code = _code(tmp_path, "true")
        assert _blastdoor(state, "run", str(code)).returncode == 0
        children, redis_url = first.children, first.ready["redis_url"]
        assert sorted(children) == ["api", "reaper", "redis", "relay", "webhooks", "worker"]
        installation = _installation(state)
        assert first.stop(signal.SIGINT) == 0
        assert not [name for name, pid in children.items() if Path(f"/proc/{pid}").exists()]
        assert not _marked(installation, state)
    with running(state) as second:
        assert second.ready["redis_url"].rpartition(":")[2] == redis_url.rpartition(":")[2]
        with second.client() as client:
            assert [run["outcome"] for run in client.get("/v1/runs").json()["items"]] == ["passed"]
        for name in ("tenant_key", "service_key", "admin_key"):
            assert first.ready[name] != second.ready[name]
            old = {"Authorization": f"Bearer {first.ready[name]}"}
            path = "/v1/admin/tenants" if name == "admin_key" else "/v1/runs"
            assert httpx.get(second.ready["url"] + path, headers=old, trust_env=False).status_code == 401


def test_stopping_while_a_run_goes_on_cancels_it_and_takes_its_wall_down(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(state) as up:
        with up.client() as client:
            run_id = _submit(client, _code(tmp_path, "sleep 50"))
            assert _eventually(lambda: client.get(f"/v1/runs/{run_id}").json()["phase"] == "running", seconds=15)
        installation = _installation(state)
        assert _marked(installation, state)
        assert up.stop() == 0
        assert not _marked(installation, state)
    with running(state) as again, again.client() as client:
        run = client.get(f"/v1/runs/{run_id}").json()
        assert (run["outcome"], run["reason"]) == ("cancelled", "cancelled_by_operator")


def test_killing_it_leaves_no_process_behind(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(state) as up:
        children = up.children
        up.process.kill()
        up.process.wait()
        gone = _eventually(lambda: not [pid for pid in children.values() if Path(f"/proc/{pid}").exists()], seconds=30)
        assert gone, {name: pid for name, pid in children.items() if Path(f"/proc/{pid}").exists()}
    with running(state) as again, again.client() as client:
        assert client.get("/v1/runs").status_code == 200


def _code(tmp_path: Path, command: str) -> Path:
    directory = tmp_path / f"code-{len(list(tmp_path.iterdir()))}"
    directory.mkdir()
    (directory / "scenario.yaml").write_text(json.dumps({"name": "n", "steps": [{"name": "s", "run": command}]}))
    return directory


def _submit(client: httpx.Client, code: Path) -> str:
    answer = client.post("/v1/runs", files={"scenario": ("scenario.yaml", (code / "scenario.yaml").read_bytes())})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def _blastdoor(state: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [*COMMAND, *arguments, "--state", str(state)]
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=90, env=environment)


def _installation(state: Path) -> str:
    from service.adapters.sql_store import SqlStore

    store = SqlStore(f"sqlite:///{state / 'blastdoor.db'}")
    try:
        return store.installation_id()
    finally:
        store.close()


def _marked(installation: str, state: Path) -> list[str]:
    """What carries the installation's mark on this machine."""
    marks = (installation.encode(), os.fsencode(state))
    found = [
        f"mount {line.decode()}"
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines()
        if any(mark in line for mark in marks)
    ]
    for top, directories, _ in os.walk("/sys/fs/cgroup"):
        found += [f"cgroup {top}/{name}" for name in directories if installation in name]
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit() and int(directory.name) != os.getpid():
            for name in ("cmdline", "environ", "cgroup"):
                try:
                    content = (directory / name).read_bytes()
                except OSError:
                    continue
                if any(mark in content for mark in marks):
                    found.append(f"process {directory.name} {content[:200]!r}")
    home = Path("/run/blastdoor") / installation
    return found + [f"directory {path}" for path in (home,) if path.exists()]


def _eventually(holds: Callable[[], bool], *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (now := holds()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return now
