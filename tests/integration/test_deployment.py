"""compose.yaml's processes with compose.yaml's settings, on a real PostgreSQL and a real Redis, each under its own role
in both; worker and reaper with its capabilities and its seccomp profile. Two sites stand for two hosts."""

import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import redis

from tests.deployment import Deployment, deployed
from tests.sandboxes import require_gvisor
from tests.servers import NotInstalled, PostgresServer
from tests.stack import eventually, finished, read, submit
from tests.summary import ran
from tests.sweep import swept

pytestmark = pytest.mark.timeout(300)  # nine processes start at once, and two cores may have other things to do

SITES = ("north", "south")
TIMES = {
    "BLASTDOOR_HOUSEKEEPING_S": "1", "BLASTDOOR_ORDERS_POLL_S": "0.2", "BLASTDOOR_RING_AFTER_S": "2",
    "BLASTDOOR_LEASE_S": "4", "BLASTDOOR_HEARTBEAT_S": "1", "BLASTDOOR_SELF_FENCE_S": "3",
    "BLASTDOOR_WORKER_CONCURRENCY": "1", "BLASTDOOR_PROBE_S": "2", "BLASTDOOR_CANARY_S": "5",
}  # fmt: skip
"""Scaled down, as `make test` does; all else is compose.yaml's."""


@pytest.fixture(scope="module")
def deployment(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    require_gvisor()
    directory = tmp_path_factory.mktemp("deployment")
    try:
        with deployed(directory, postgres_server, **TIMES) as made:
            ran("database", f"postgresql {postgres_server.version}")
            ((installation,),) = made.rows("SELECT id FROM installation")
            for service in ("api", "relay", "webhooks"):
                made.start(service)
            for site in SITES:
                made.start("worker", site=site)
                made.start("reaper", site=site)
            yield made
            made.end()
            left = swept(str(installation), within_s=10)
            for site in SITES:
                shutil.rmtree(made.runtime_dir(site), ignore_errors=True)
            assert not left, f"left behind: {left}"
    except NotInstalled as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def complaints(postgres_server: PostgresServer) -> Callable[[], list[str]]:
    """What PostgreSQL has refused since this module began, for want of a right."""
    with psycopg.connect(postgres_server.url("postgres").replace("+psycopg", "")) as connection:
        ((data,),) = connection.execute("SHOW data_directory").fetchall()
    log = Path(data).with_name("log")
    before = log.stat().st_size
    return lambda: [line for line in log.read_bytes()[before:].decode().splitlines() if "permission denied" in line]


@contextmanager
def told(deployment: Deployment) -> Iterator[None]:
    """What failed, with the ends of all logs."""
    try:
        yield
    except BaseException:
        print(deployment.told())
        raise


@pytest.fixture(scope="module")
def admin(deployment: Deployment) -> Iterator[httpx.Client]:
    key = deployment.run("api", "operator-key").strip()
    with deployment.client(key) as client:
        with told(deployment):
            assert eventually(lambda: _is_ready(client)), client.get("/readyz").text
            eventually(lambda: len(client.get("/v1/admin/workers").json()["items"]) == len(SITES))
        yield client


def _is_ready(client: httpx.Client) -> bool:
    with suppress(httpx.TransportError):
        return client.get("/readyz").status_code == 200
    return False


@pytest.fixture(scope="module")
def tenant(deployment: Deployment, admin: httpx.Client) -> Iterator[httpx.Client]:
    answer = admin.post("/v1/admin/tenants", json={"name": "acme", "trust": "untrusted", "quota": {"concurrent": 8}})
    assert answer.status_code == 201, answer.text
    with deployment.client(answer.json()["key"]) as client:
        yield client


def sites_of(deployment: Deployment) -> dict[str, str]:
    """Where each run was played."""
    return {str(run): str(site) for run, site in deployment.rows("SELECT id, site FROM run WHERE tenant = 'acme'")}


def test_every_process_is_healthy_by_its_own_check(deployment: Deployment, admin: httpx.Client) -> None:
    with told(deployment):
        for name in list(deployment.processes):
            assert eventually(lambda name=name: deployment.is_healthy(name)), name
    worker = deployment.processes["worker-north"]
    worker.popen.send_signal(signal.SIGSTOP)
    try:
        assert not deployment.is_healthy("worker-north"), "the control: one that stands still is not well"
    finally:
        worker.popen.send_signal(signal.SIGCONT)


def test_two_sites_share_the_work_and_one_goes_on_when_the_other_dies(
    deployment: Deployment, admin: httpx.Client, tenant: httpx.Client
) -> None:
    with told(deployment):
        first = [submit(tenant, "sleep 1; id -u", artifacts=[]) for _ in range(6)]
        ends = [finished(tenant, run_id) for run_id in first]
        assert Counter((end["outcome"], end["reason"]) for end in ends) == {("passed", None): 6}
        assert set(sites_of(deployment).values()) == set(SITES), "both sites played"

        long = [submit(tenant, "sleep 5") for _ in range(2)]
        eventually(lambda: all(read(tenant, run_id)["phase"] == "running" for run_id in long))
        where = sites_of(deployment)
        assert {where[run_id] for run_id in long} == set(SITES)
        later = [submit(tenant, "true") for _ in range(3)]
        deployment.processes["worker-north"].kill()
        outcomes = {where[run_id]: finished(tenant, run_id) for run_id in long}

        assert (outcomes["north"]["outcome"], outcomes["north"]["reason"]) == ("errored", "worker_lost")
        assert outcomes["south"]["outcome"] == "passed"
        assert {finished(tenant, run_id)["outcome"] for run_id in later} == {"passed"}
        assert {sites_of(deployment)[run_id] for run_id in later} == {"south"}
        every = [*first, *long, *later]
        assert eventually(lambda: all(read(tenant, run_id)["boundary_destroyed_at"] for run_id in every))


def test_an_operators_clean_up_reaches_both_sites(
    deployment: Deployment, admin: httpx.Client, tenant: httpx.Client
) -> None:
    with told(deployment):
        deployment.start("worker", site="north")
        assert eventually(lambda: deployment.is_healthy("worker-north"))
        held = [submit(tenant, "sleep 60") for _ in range(2)]
        assert eventually(lambda: all(read(tenant, run_id)["phase"] == "running" for run_id in held))
        assert {sites_of(deployment)[run_id] for run_id in held} == set(SITES)
        asked = {"scope": {"tenant": "acme"}, "force": True, "dry_run": True}
        plan = admin.post("/v1/admin/cleanup", json=asked).json()
        assert len(plan["actions"]) == len(held), plan
        answer = admin.post("/v1/admin/cleanup", json={"plan": plan["id"], "force": True, "dry_run": False})
        assert answer.status_code in (200, 202), answer.text
        done = eventually(lambda: _done(admin, plan["id"]))

        assert {action["result"] for action in done["actions"]} == {"destroyed"}, done
        assert {action["ref"]["site"] for action in done["actions"]} == set(SITES)
        assert {finished(tenant, run_id)["outcome"] for run_id in held} == {"cancelled"}


def _done(admin: httpx.Client, plan_id: str) -> Any:
    plan = admin.get(f"/v1/admin/cleanup/{plan_id}").json()
    return plan if all(action["result"] for action in plan["actions"]) else None


def test_the_application_reads_the_events_of_both_sites(deployment: Deployment, tenant: httpx.Client) -> None:
    run_id = submit(tenant, "true")
    finished(tenant, run_id)
    with deployment.redis.client("application") as client:

        def ended() -> set[str]:
            events = [json.loads(fields["event"]) for _, fields in client.xrange("blastdoor:events")]
            return {event["subject"] for event in events if event["type"] == "dev.blastdoor.run.finished"}

        assert eventually(lambda: run_id in ended()), ended()
        assert ended() == set(sites_of(deployment))


def test_a_new_operators_key_takes_the_place_of_the_last(deployment: Deployment, admin: httpx.Client) -> None:
    assert admin.get("/v1/admin/tenants").status_code == 200
    key = deployment.run("api", "operator-key").strip()

    assert admin.get("/v1/admin/tenants").status_code == 401
    with deployment.client(key) as client:
        assert client.get("/v1/admin/tenants").status_code == 200


def test_no_process_was_refused_anything_by_its_servers(
    deployment: Deployment, complaints: Callable[[], list[str]], tenant: httpx.Client
) -> None:
    """After all of the above: the rights that were given are enough."""
    assert complaints() == []
    with deployment.redis.client("relay") as client:
        assert "errorstat_NOPERM" not in client.info("errorstats")
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.get("anything")
        assert "errorstat_NOPERM" in client.info("errorstats"), "the control: it is counted"
    worker = deployment.database_url("worker").replace("+psycopg", "")
    with psycopg.connect(worker) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("SELECT * FROM audit")
    assert complaints(), "the control: it is in the log"
