"""compose.yaml against the Compose specification's schema, and against our own rules.

The schema is tests/unit/compose-spec.json: schema/compose-spec.json of github.com/compose-spec/compose-go v2.16.2
(Apache License 2.0), unchanged.
"""

import copy
import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from cryptography.fernet import Fernet

from service.settings import Settings
from tests.deployment import COMPOSE, ROOT, compose, environment_of, rendered

CLUSTER = ("worker-cluster", "reaper-cluster")
OURS = ("migrate", "api", "relay", "webhooks", "worker", "reaper", *CLUSTER)
SITES = ("worker", "reaper")
SCHEMA = jsonschema_rs.validator_for(json.loads(Path(__file__).with_name("compose-spec.json").read_text()))
_IS_PINNED = re.compile(r"^[a-z-]+:\d+(\.\d+)+(-[a-z]+)?$")
_SECRET = re.compile(r"PASSWORD|SECRET|_KEY|_URL")


def complaints(described: Mapping[str, Any]) -> list[str]:
    """What our rules say against it; those that each service must keep."""
    found = []
    for name, service in described["services"].items():
        wrong = {
            "is privileged": service.get("privileged"),
            "shares the host's network": service.get("network_mode"),
            "shares the host's pids": service.get("pid") == "host",
            "shares the host's ipc": service.get("ipc"),
            "has the engine's socket": "docker.sock" in str(service.get("volumes")),
            "has devices of the host": service.get("devices"),
            "publishes a port": name != "api" and service.get("ports"),
            "is reached from outside": not all("127.0.0.1" in port for port in service.get("ports", ())),
            "has no health check": not service.get("healthcheck"),
            "is never looked at": name != "migrate" and not (service.get("healthcheck") or {}).get("test"),
            "keeps capabilities": service.get("cap_drop") != ["ALL"],
            "adds capabilities": name not in SITES and service.get("cap_add"),
            "may gain privileges": "no-new-privileges:true" not in service.get("security_opt", ()),
            "has no seccomp": "seccomp:unconfined" in service.get("security_opt", ()),
            "writes on its root": service.get("read_only") is not True,
            "is not pinned": not _IS_PINNED.match(service.get("image", "")),
            "has a literal secret": any(
                _SECRET.search(variable) and not re.search(r"\$\{[A-Z_]+:\?", str(value))
                for variable, value in service.get("environment", {}).items()
            ),
            "is given more than its own": bool(service.get("env_file")),
        }
        found += [f"{name} {what}" for what, is_so in wrong.items() if is_so]
    return found


def test_the_file_is_what_the_specification_says() -> None:
    assert [str(error) for error in SCHEMA.iter_errors(compose())] == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda services: services["api"].update(portz=["80:80"]),
        lambda services: services["redis"].update(cap_drop="ALL"),
        lambda services: services["worker"]["healthcheck"].update(intervall="1s"),
    ],
)
def test_the_schema_can_say_no(spoil: Callable[[dict[str, Any]], None]) -> None:
    described = copy.deepcopy(dict(compose()))
    spoil(described["services"])

    assert not SCHEMA.is_valid(described)


def test_our_rules_are_kept() -> None:
    assert complaints(compose()) == []


@pytest.mark.parametrize(
    ("service", "change", "complaint"),
    [
        ("worker", {"privileged": True}, "is privileged"),
        ("reaper", {"pid": "host"}, "shares the host's pids"),
        ("api", {"network_mode": "host"}, "shares the host's network"),
        ("worker", {"volumes": ["/var/run/docker.sock:/var/run/docker.sock"]}, "has the engine's socket"),
        ("redis", {"ports": ["127.0.0.1:6379:6379"]}, "publishes a port"),
        ("api", {"ports": ["8700:8700"]}, "is reached from outside"),
        ("relay", {"healthcheck": None}, "has no health check"),
        ("relay", {"healthcheck": {"disable": True}}, "is never looked at"),
        ("api", {"cap_add": ["SYS_ADMIN"]}, "adds capabilities"),
        ("worker", {"security_opt": ["seccomp:unconfined", "no-new-privileges:true"]}, "has no seccomp"),
        ("postgres", {"image": "postgres:latest"}, "is not pinned"),
        ("postgres", {"environment": {"POSTGRES_PASSWORD": "postgres"}}, "has a literal secret"),
        ("relay", {"environment": {"BLASTDOOR_REDIS_URL": "redis://:${PASSWORD:-x}@redis"}}, "has a literal secret"),
        ("webhooks", {"env_file": [".env"]}, "is given more than its own"),
    ],
)
def test_a_rule_that_is_broken_is_noticed(service: str, change: dict[str, Any], complaint: str) -> None:
    described = copy.deepcopy(dict(compose()))
    described["services"][service] |= change

    assert f"{service} {complaint}" in complaints(described)


def test_servers_are_on_the_network_that_leads_nowhere_and_nobody_else_is_reached() -> None:
    services, networks = compose()["services"], compose()["networks"]
    assert networks["backend"] == {"internal": True}
    for name, service in services.items():
        beyond = set(service["networks"]) - {"backend"}
        outside = {"api": {"front"}, "webhooks": {"egress"}} | {one: {"egress"} for one in CLUSTER}
        assert beyond == outside.get(name, set()), name


def test_each_process_has_only_its_own_user_in_each_server() -> None:
    variables = {name: name.lower() for name in re.findall(r"\$\{([A-Z_]+):\?", COMPOSE.read_text())}
    for name in OURS:
        text = json.dumps(environment_of(name, variables))
        role = "owner" if name == "migrate" else name.removesuffix("-cluster")
        assert re.findall(r"//(\w+):(\w+)@postgres", text) == [(f"blastdoor_{role}", f"postgres_{role}_password")]
        users = [] if name == "migrate" else [(role, f"redis_{role}_password")]
        assert re.findall(r"//(\w+):(\w+)@redis", text) == users
        assert ("blastdoor_secrets_key" in text) is (name in ("api", "webhooks"))


def test_every_setting_exists() -> None:
    known = {f"BLASTDOOR_{name.upper()}" for name in Settings.model_fields}
    named = set(re.findall(r"BLASTDOOR_[A-Z_]+", COMPOSE.read_text()))

    assert named <= known
    assert {name for service in OURS for name in compose()["services"][service]["environment"]} <= named


def test_what_is_missing_is_said_before_anything_starts() -> None:
    assert set(re.findall(r"\$\{[A-Z_]+:\?([^}]*)\}", COMPOSE.read_text())) == {"run scripts/secrets.sh"}
    with pytest.raises(KeyError, match=r"run scripts/secrets\.sh"):
        rendered("${REDIS_API_PASSWORD:?run scripts/secrets.sh}", {})


def test_secrets_are_made_once_each_another_and_for_their_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    script = [ROOT / "scripts" / "secrets.sh", file]
    subprocess.run(script, check=True, capture_output=True)
    made = dict(line.split("=", 1) for line in file.read_text().splitlines())

    assert set(made) == set(re.findall(r"\$\{([A-Z_]+):\?", COMPOSE.read_text()))
    assert len(set(made.values())) == len(made)
    assert all(len(value) >= 43 and re.fullmatch(r"[\w=-]+", value) for value in made.values()), (
        "as they stand in a URL"
    )
    assert file.stat().st_mode & 0o777 == 0o600
    Fernet(made["BLASTDOOR_SECRETS_KEY"])
    again = subprocess.run(script, check=False, capture_output=True, text=True)
    assert again.returncode == 1
    assert "keeps its secrets" in again.stderr
    assert file.read_text() == "".join(f"{name}={value}\n" for name, value in made.items())


@pytest.mark.parametrize("name", ["site", "worker", "reaper"])
def test_the_units_environments_have_settings_that_exist_and_no_password(name: str) -> None:
    lines = (ROOT / "deploy" / "systemd" / f"{name}.env.example").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))

    assert set(given) <= {f"BLASTDOOR_{setting.upper()}" for setting in Settings.model_fields}
    assert set(re.findall(r"//\w+:(\w+)@", "".join(given.values()))) <= {"PASSWORD"}


def test_the_files_that_it_names_are_there() -> None:
    text = COMPOSE.read_text()
    named = set(re.findall(r"(?:dockerfile: |seccomp:|\./)(deploy/[\w./-]+)", text))

    assert named == {"deploy/Dockerfile", "deploy/seccomp-worker.json", "deploy/postgres-roles.sh", "deploy/redis.sh"}
    assert all((ROOT / name).is_file() for name in named)


def test_worker_and_reaper_may_do_the_same_and_see_the_same_processes() -> None:
    worker, reaper = (compose()["services"][name] for name in SITES)
    for what in ("cap_add", "security_opt", "volumes", "cgroup", "read_only"):
        assert worker[what] == reaper[what], what
    assert reaper["pid"] == "service:worker"


def test_what_makes_pods_in_a_cluster_has_no_privilege_here_and_starts_only_when_asked_for() -> None:
    for service in (compose()["services"][name] for name in CLUSTER):
        assert service["profiles"] == ["cluster"]
        assert not service.keys() & {"cap_add", "cgroup", "pid"}
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["volumes"] == ["state:/var/lib/blastdoor", "./kubernetes:/etc/blastdoor/kubernetes:ro"]
