"""Ready means: a run of our own went through the whole pipeline lately. Every process is real."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.stack import NoStack, Stack, eventually, finished, run_stack, submit

EVERY_S, WITHIN_S = 0.5, 3.0


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of its own, whose canaries follow each other closely and whose worker plays one run at a time."""
    times = {
        "BLASTDOOR_CANARY_S": str(EVERY_S), "BLASTDOOR_CANARY_WITHIN_S": str(WITHIN_S),
        "BLASTDOOR_WORKER_CONCURRENCY": "1", "BLASTDOOR_PROBE_S": "1",
    }  # fmt: skip
    try:
        with run_stack(tmp_path_factory.mktemp("ready"), **times) as stack:
            yield stack
    except NoStack as lacking:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(lacking))


def checks(stack: Stack) -> dict[str, str]:
    answer = httpx.get(f"{stack.ready['url']}/readyz", trust_env=False, timeout=30)
    assert answer.status_code in (200, 503), answer.text
    said: dict[str, str] = answer.json()["checks"]
    assert (answer.status_code == 200) == all(one == "ok" for one in said.values())
    return said


def is_ready(stack: Stack) -> bool:
    return all(one == "ok" for one in checks(stack).values())


@contextmanager
def hanging(stack: Stack) -> Iterator[None]:
    """The worker's pool does nothing any more, while its parent goes on saying that it lives."""
    pool = stack.pool()
    assert pool
    for pid in pool:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pool:
            os.kill(pid, signal.SIGCONT)


def test_it_is_ready_once_a_canary_has_passed(quick: Stack) -> None:
    assert eventually(lambda: is_ready(quick))


def test_a_consumer_that_hangs_with_its_connections_open_is_found_and_forgiven(quick: Stack) -> None:
    assert eventually(lambda: is_ready(quick))
    with hanging(quick):
        assert eventually(lambda: not is_ready(quick)), "nothing was noticed"
        said = checks(quick)
        assert said["canary"] == "failing"
        assert {name for name, one in said.items() if one == "ok"} >= {"database", "redis", "worker"}, (
            "nothing else notices it, which is why there are canaries"
        )
    assert eventually(lambda: is_ready(quick))


def test_an_overloaded_queue_is_not_unready(quick: Stack) -> None:
    assert eventually(lambda: is_ready(quick))
    busy = submit(quick.tenant, f"sleep {2 * WITHIN_S + 2}")
    waiting = submit(quick.tenant, "true")
    deadline = time.monotonic() + 2 * WITHIN_S
    while time.monotonic() < deadline:
        assert is_ready(quick)
        time.sleep(0.2)
    for run_id in (busy, waiting):
        assert finished(quick.tenant, run_id)["outcome"] == "passed"


def test_canaries_are_nobodys_business(quick: Stack) -> None:
    assert eventually(lambda: is_ready(quick))
    for client in (quick.tenant, quick.admin):
        rows = client.get("/v1/runs" if client is quick.tenant else "/v1/admin/tenants").json()["items"]
        assert not [row for row in rows if "canary" in str(row)]
