"""How things stand: the numbers that the relay's metrics show."""

import pytest

from service.core.events import EventType
from service.core.run import Phase
from tests.contract.conftest import Store
from tests.contract.store_steps import LEASE, add_run, add_tenant, bring_to, claimed, told

NOBODY = {Phase.QUEUED: 0, Phase.PROVISIONING: 0, Phase.RUNNING: 0, Phase.COLLECTING: 0}


def test_of_an_empty_store_every_unfinished_phase_is_there_and_nothing_waits(store: Store) -> None:
    standing = store.standing()

    assert standing.runs == NOBODY
    assert (standing.waited.total_seconds(), standing.unpublished, standing.lag.total_seconds()) == (0, 0, 0)


def test_unfinished_runs_are_counted_by_phase_whoever_owns_them(store: Store) -> None:
    for name in ("acme", "globex", "_canary"):
        add_tenant(store, name=name, concurrent=10)
    for phase in (Phase.PROVISIONING, Phase.RUNNING, Phase.COLLECTING, Phase.FINISHED):
        add_run(store)
        bring_to(store, phase)
    for tenant in ("acme", "globex", "_canary"):
        add_run(store, tenant=tenant)

    assert store.standing().runs == {
        Phase.QUEUED: 3, Phase.PROVISIONING: 1, Phase.RUNNING: 1, Phase.COLLECTING: 1
    }  # fmt: skip


def test_the_first_in_the_queue_tells_how_long_it_has_waited(store: Store) -> None:
    add_tenant(store, concurrent=10)
    add_run(store)
    first = store.standing().waited
    add_run(store)
    assert store.standing().waited >= first, "a later one changes nothing"

    held = claimed(store)
    assert held.waited >= first
    claimed(store)
    assert store.standing().waited.total_seconds() == 0


@pytest.mark.parametrize("tenant", ["acme", "_canary"])
def test_events_lag_until_they_are_known_to_be_published_and_internal_ones_never(store: Store, tenant: str) -> None:
    add_tenant(store, name=tenant)
    add_run(store, tenant=tenant)
    internal = tenant.startswith("_")
    assert store.standing().unpublished == (0 if internal else 1)

    assert store.lead("relay", lease=LEASE)
    stamped = store.stamp("relay", limit=10)
    before = store.standing()
    assert before.unpublished == len(stamped) == (0 if internal else 1)

    store.mark_published([row.pub_seq for row in stamped])
    after = store.standing()
    assert (after.unpublished, after.lag.total_seconds()) == (0, 0)


def test_the_trace_of_a_submission_is_in_every_event_of_its_run_and_in_the_claim_and_not_in_the_run(
    store: Store,
) -> None:
    given = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    add_tenant(store, concurrent=10)
    run = add_run(store, traceparent=given)
    held = bring_to(store, Phase.FINISHED)
    store.record_destroyed(run.id, held.fence)

    assert (held.traceparent, held.trace_id) == (given, "4bf92f3577b34da6a3ce929d0e0e4736")
    events = told(store, run.id)
    assert len(events) == len(EventType) - 2, "all but requeued and quarantined"
    assert {event["traceparent"] for event in events} == {given}
    assert given not in store.get_run(run.id, None).model_dump_json()

    plain = add_run(store)
    assert claimed(store).trace_id is None
    assert all("traceparent" not in event for event in told(store, plain.id))
