"""What `blastdoor up` decides before it starts anything: where it may work, and what its processes are told."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from service.cli.up import command
from service.cli.up.programs import SECRETS_KEY, Plan, processes, redis_server
from service.cli.up.redis import RedisPlan, render_configuration
from service.cli.up.state import CannotUse, StateDirectory, open_state, process_identity
from service.settings import Settings


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDirectory]:
    opened = open_state(tmp_path / "state")
    yield opened
    opened.close()


@pytest.fixture
def plan(state: StateDirectory) -> Plan:
    redis = RedisPlan(port=6390, directory=state.redis)
    environment = {"BLASTDOOR_REDIS_URL": redis.process_url, "BLASTDOOR_STATE_DIR": str(state.path)}
    environment[SECRETS_KEY] = state.secrets_key()
    return Plan(state=state, redis=redis, settings=Settings(port=8701), environment=environment)


def test_a_new_state_directory_is_its_owner_s_alone(tmp_path: Path) -> None:
    opened = open_state(tmp_path / "a" / "b")
    assert stat.S_IMODE(opened.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((opened.path / "lock").stat().st_mode) == 0o600
    opened.close()


def test_a_directory_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    open_state(tmp_path).close()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_a_directory_with_other_things_in_it_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    tmp_path.chmod(0o755)
    with pytest.raises(CannotUse, match="has other things in it"):
        open_state(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.txt"]
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_the_key_for_webhooks_is_made_once_and_only_its_owner_reads_it(state: StateDirectory, tmp_path: Path) -> None:
    key = state.secrets_key()
    assert stat.S_IMODE((state.path / "secrets.key").stat().st_mode) == 0o600
    assert Fernet(key).decrypt(Fernet(state.secrets_key()).encrypt(b"x")) == b"x"
    other = open_state(tmp_path / "other")
    assert other.secrets_key() != key
    other.close()


def test_only_one_at_a_time_and_the_next_one_when_it_is_gone(tmp_path: Path) -> None:
    first = open_state(tmp_path)
    with pytest.raises(CannotUse, match=rf"another `blastdoor up` \(pid {os.getpid()}\)"):
        open_state(tmp_path)
    first.close()
    open_state(tmp_path).close()


def test_processes_of_an_earlier_start_are_known_by_pid_and_start_time(state: StateDirectory) -> None:
    state.remember_process("api", os.getpid())
    assert [(left.name, left.pid) for left in state.left_over()] == [("api", os.getpid())]
    memory = json.loads((state.path / "up.json").read_text())
    memory["processes"]["api"]["identity"] = "another boot/1"  # the pid was given to somebody else since
    (state.path / "up.json").write_text(json.dumps(memory))
    assert state.left_over() == []


def test_a_process_that_is_not_there_has_no_identity() -> None:
    assert process_identity(2**22 + 1) is None


def test_redis_is_told_hashes_of_passwords_and_listens_on_loopback_only(plan: Plan) -> None:
    text = render_configuration(plan.redis)
    assert plan.redis.process_password not in text
    assert plan.redis.operator_password not in text
    assert hashlib.sha256(plan.redis.operator_password.encode()).hexdigest() in text
    lines = text.splitlines()
    assert "bind 127.0.0.1" in lines
    assert "protected-mode yes" in lines
    assert "appendonly yes" in lines
    assert not [line for line in lines if "nopass" in line]


def test_every_user_of_redis_has_a_password_of_its_own_and_every_start_new_ones(plan: Plan) -> None:
    again = RedisPlan(port=1, directory=plan.redis.directory)
    passwords = [plan.redis.process_password, plan.redis.operator_password]
    passwords += [again.process_password, again.operator_password]
    assert len(set(passwords)) == 4
    assert min(map(len, passwords)) >= 40


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "spa ce", "ümlaut"])
def test_the_directory_of_redis_may_have_any_printable_name(tmp_path: Path, name: str) -> None:
    text = render_configuration(RedisPlan(port=1, directory=tmp_path / name))
    (line,) = [line for line in text.splitlines() if line.startswith("dir ")]
    assert line[5:-1].replace('\\"', '"').replace("\\\\", "\\") == str(tmp_path / name)


def test_a_directory_s_name_cannot_smuggle_a_line_into_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be given to Redis"):
        render_configuration(RedisPlan(port=1, directory=tmp_path / "x\nuser default on nopass"))


def test_no_program_has_a_secret_on_its_command_line_or_in_its_text(plan: Plan) -> None:
    secrets = (plan.redis.process_password, plan.redis.operator_password, plan.environment[SECRETS_KEY])
    for program in (redis_server(plan), *processes(plan)):
        assert not [secret for secret in secrets if secret in " ".join(program.argv) or secret in repr(program)]
    assert not [secret for secret in secrets if secret in repr(plan)]


def test_processes_get_what_was_decided_and_nothing_of_our_own_environment(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "theirs")
    monkeypatch.setenv("PYTHONPATH", "/tmp/evil")
    for program in processes(plan):
        sealing = {SECRETS_KEY} if program.name in ("api", "webhooks") else set()
        assert set(program.env) == {"PATH", "LANG", *plan.environment} - {SECRETS_KEY} | sealing
    assert set(redis_server(plan).env) == {"PATH", "LANG"}


def test_python_takes_no_module_from_the_directory_it_was_started_in(plan: Plan) -> None:
    assert all("-I" in program.argv for program in processes(plan))


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("os.geteuid", lambda: 1000, "sudo blastdoor up"),
        ("shutil.which", lambda name: None, "apt-get install redis-server"),
        ("platform.system", lambda: "Darwin", "runs on Linux"),
    ],
)
def test_what_the_machine_lacks_is_said_with_its_remedy(
    attribute: str, value: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    command.check_machine()
    monkeypatch.setattr(attribute, value)
    with pytest.raises(CannotUse, match=words):
        command.check_machine()
