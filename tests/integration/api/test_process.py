"""`python -m service.main` as a process: it starts from nothing, and ends politely while clients wait."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from service.adapters.sql_store import SqlStore
from service.core.errors import BlastdoorError
from service.core.ports.tenants import WorkerRecord
from service.core.tenancy import KeyKind, Trust
from service.intake.policy import read_policy
from service.usecases.keys import mint
from tests.factories import make_capabilities, make_tenant
from tests.integration.api.conftest import SCENARIO
from tests.servers import LOOPBACK, RedisServer


def _environment(tmp_path: Path, database: str, redis_url: str, **more: str) -> dict[str, str]:
    settings = {"STATE_DIR": str(tmp_path / "state"), "DATABASE_URL": database, "REDIS_URL": redis_url} | more
    return {"PATH": os.defpath, **{f"BLASTDOOR_{name}": value for name, value in settings.items()}}


@contextmanager
def _started(environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    environment["BLASTDOOR_PORT"] = str(port)
    argv = [sys.executable, "-m", "service.main"]
    process = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        url = f"http://{LOOPBACK}:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{url}/healthz").status_code == 200
                break
            except httpx.TransportError:
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def test_it_ends_in_time_with_an_answer_for_everybody_who_waits(
    tmp_path: Path, sqlite_database: str, redis_server: RedisServer
) -> None:
    with _started(_environment(tmp_path, sqlite_database, redis_server.url)) as (process, url):
        store = SqlStore(sqlite_database)
        store.create_tenant(make_tenant())
        store.record_worker(WorkerRecord(id="w", host="h", site="h", capabilities=(make_capabilities(),)))
        headers = {"Authorization": f"Bearer {mint(store, kind=KeyKind.TENANT, tenant='acme').key}"}
        store.close()
        run = httpx.post(f"{url}/v1/runs", files={"scenario": (None, SCENARIO)}, headers=headers).json()
        with ThreadPoolExecutor(5) as pool:
            waiting = [
                pool.submit(httpx.get, f"{url}/v1/runs/{run['id']}?wait=60", headers=headers, timeout=70)
                for _ in range(5)
            ]
            time.sleep(1.0)
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            answers = [each.result() for each in waiting]

        assert [answer.json()["phase"] for answer in answers] == ["queued"] * 5
        assert process.wait(10) == 0
        assert time.monotonic() - began < 5


def test_migrate_makes_the_schema_and_serves_nothing(tmp_path: Path, sqlite_database: str) -> None:
    argv = [sys.executable, "-m", "service.main", "migrate"]
    environment = _environment(tmp_path, sqlite_database, "redis://127.0.0.1:1/0")

    for _ in range(2):
        assert subprocess.run(argv, env=environment, timeout=60, check=False).returncode == 0

    store = SqlStore(sqlite_database)
    assert store.list_tenants() == []
    store.close()


def test_a_policy_that_cannot_be_understood_stops_the_start(tmp_path: Path, sqlite_database: str) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("floors: {untrusted: {kernal: dedicated}}")
    argv = [sys.executable, "-m", "service.main"]
    environment = _environment(tmp_path, sqlite_database, "redis://127.0.0.1:1/0", POLICY_FILE=str(policy))

    ended = subprocess.run(argv, env=environment, timeout=60, capture_output=True, text=True, check=False)

    assert ended.returncode == 1
    assert "the policy file cannot be used" in ended.stderr


@pytest.mark.parametrize(
    "text",
    [
        "floors: {untrusted: {kernel: strong}}", "minimum_versions: {gviser: '1'}", "ranks: {gvisor: low}",
        "weaken: true", "[", "floors: {}\nfloors: {}",
    ],
)  # fmt: skip
def test_every_mistake_in_a_policy_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)

    with pytest.raises(BlastdoorError):
        read_policy(path)


def test_a_policy_is_read(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("floors: {untrusted: {kernel: dedicated}}\nminimum_versions: {gvisor: {runsc: '20260901'}}\n")

    assert read_policy(path).floors == {Trust.UNTRUSTED: {"kernel": "dedicated"}}
    path.write_text("")
    assert read_policy(path) == read_policy(None)
