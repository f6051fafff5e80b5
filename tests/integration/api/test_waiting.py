"""Why a run waits, as its owner sees it over HTTP: on the run, in lists and in the stream; on both databases."""

from collections.abc import Callable

import httpx
import pytest

from service.core.ports.tenants import WorkerRecord
from service.core.tenancy import Quota
from tests.factories import make_capabilities
from tests.integration.api.conftest import DATABASES, Served
from tests.sse import watching

pytestmark = pytest.mark.parametrize("settings", DATABASES, indirect=True)


def show_worker(served: Served, *, slots: int) -> None:
    record = WorkerRecord(id="wrk_1", host="here", site="here", capabilities=(make_capabilities(),), slots=slots)
    served.store.record_worker(record)


def fill_the_cap(served: Served) -> None:
    show_worker(served, slots=9)
    served.add_tenant("small", quota=Quota(concurrent=1))
    served.submit("small")
    served.claim()


def fill_the_workers(served: Served) -> None:
    show_worker(served, slots=1)
    served.add_tenant("small")
    served.submit("acme")
    served.claim()


def drain(served: Served) -> None:
    served.add_tenant("small")
    assert served.client("operator").post("/v1/admin/drain", json={"worker": "wrk_1"}).status_code < 300


def lose_the_worker(served: Served) -> None:
    """Between its submission, which needs one, and the question."""
    served.add_tenant("small")


CASES: dict[str, tuple[Callable[[Served], None], str]] = {
    "tenant_at_cap": (fill_the_cap, "tenant small has 1 run under way and may have 1"),
    "workers_busy": (fill_the_workers, "every worker that builds gvisor is busy"),
    "draining": (drain, "every worker that builds gvisor is draining: it takes no more runs"),
    "no_worker": (lose_the_worker, "no live worker builds gvisor"),
}


@pytest.mark.parametrize("reason", list(CASES))
def test_a_queued_run_says_where_it_stands_and_why(served: Served, reason: str) -> None:
    prepare, message = CASES[reason]
    prepare(served)
    run_id = served.submit("small")["id"]
    if reason == "no_worker":
        served.store.forget_worker("wrk_1")
    small = served.client("small")
    run = small.get(f"/v1/runs/{run_id}").json()
    (listed,) = small.get("/v1/runs", params={"phase": "queued"}).json()["items"]
    with watching(small, run_id) as events:
        told = next(events).json

    for shown in (run, listed, told, small.get(f"/v1/runs/{run_id}", params={"wait": 0.01}).json()):
        assert (shown["phase"], shown["queue_reason"], shown["message"]) == ("queued", reason, message)
        assert (shown["reason"], shown["queue_position"]) == (None, 1)


def test_nothing_is_in_the_way_of_a_run_whose_turn_it_is_nor_of_one_that_has_left_the_queue(served: Served) -> None:
    acme = served.client("acme")
    run_id = served.submit()["id"]

    def shown() -> httpx.Response:
        return acme.get(f"/v1/runs/{run_id}")

    assert (shown().json()["queue_reason"], shown().json()["message"]) == (None, None)
    served.claim()
    assert (shown().json()["phase"], shown().json()["queue_reason"]) == ("provisioning", None)
    waits = served.submit()["id"]
    assert acme.get(f"/v1/runs/{waits}").json()["queue_reason"] == "workers_busy"
    cancelled = acme.post(f"/v1/runs/{waits}/cancel").json()
    assert (cancelled["queue_reason"], cancelled["message"]) == (None, "cancelled by the tenant")
