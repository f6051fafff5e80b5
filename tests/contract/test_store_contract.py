"""Runs as their owners see them, on every store: submit, read, list, cancel, delete."""

from datetime import UTC, datetime, timedelta

import pytest

from service.core.boundary import Artifact
from service.core.errors import Conflict, IdempotencyInFlight, NotFound, QuotaExceeded
from service.core.run import Outcome, Phase, Reason
from tests.contract.conftest import Store
from tests.contract.store_steps import (
    LEASE,
    RUN_OUT,
    add_run,
    add_tenant,
    bring_to,
    claim,
    claimed,
    finished_run,
    told,
    types_told,
)
from tests.factories import make_result, make_run_id, make_scenario, make_step_result

A, B = "sha256:" + "a" * 64, "sha256:" + "c" * 64


class TestSubmitting:
    def test_a_submitted_run_waits_with_the_databases_time_and_its_place_in_the_queue(self, store: Store) -> None:
        add_tenant(store)
        before = store.now()
        first, second = add_run(store), add_run(store)

        assert (first.phase, first.queue_position, second.queue_position) == (Phase.QUEUED, 1, 2)
        assert before <= first.created_at <= store.now()
        assert store.get_run(second.id, "acme") == second

    def test_the_databases_clock_is_near_ours_and_aware(self, store: Store) -> None:
        assert store.now().tzinfo == UTC
        assert abs(store.now() - datetime.now(UTC)) < timedelta(seconds=5)

    def test_the_place_in_the_queue_counts_only_runs_for_the_same_boundary(self, store: Store) -> None:
        add_tenant(store)
        add_run(store, boundary="microvm")

        assert add_run(store, boundary="gvisor").queue_position == 1

    def test_every_field_comes_back_as_it_was_given(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(
            store, bundle=A, metadata={"ticket": "NUL \0 and é"}, scenario=make_scenario(name="odd é \U0001f600 name")
        )

        assert store.get_run(run.id, None) == run

    def test_the_queued_event_is_the_first_of_the_run(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store, metadata={"ticket": "7"})
        (event,) = told(store, run.id)

        assert event["type"] == "dev.blastdoor.run.queued"
        assert (event["subject"], event["tenant"], event["sequence"]) == (run.id, "acme", "0000000001")
        assert event["data"]["metadata"] == {"ticket": "7"}
        assert event["source"] == f"urn:blastdoor:{store.installation_id()}"

    def test_a_full_queue_refuses_and_stores_nothing(self, store: Store) -> None:
        add_tenant(store)
        for _ in range(3):
            add_run(store, max_queued=3)
        with pytest.raises(QuotaExceeded):
            add_run(store, max_queued=3)

        assert len(store.list_runs("acme", phase=None, outcome=None, limit=10, before=None).items) == 3

    def test_a_claimed_run_leaves_room_in_the_queue(self, store: Store) -> None:
        add_tenant(store)
        add_run(store, max_queued=1)
        claimed(store)

        assert add_run(store, max_queued=1).phase is Phase.QUEUED

    def test_a_tenant_that_is_not_there_or_was_deleted_submits_nothing(self, store: Store) -> None:
        add_tenant(store)
        store.delete_tenant("acme")
        for name in ("acme", "nobody"):
            with pytest.raises(NotFound):
                add_run(store, tenant=name)


class TestIdempotency:
    def test_the_first_holder_has_no_answer_and_the_next_is_told_to_wait(self, store: Store) -> None:
        assert store.begin_idempotent("acme", "k", stale_after=LEASE).answer is None
        with pytest.raises(IdempotencyInFlight):
            store.begin_idempotent("acme", "k", stale_after=LEASE)

    def test_a_completed_key_replays_the_first_answer_with_what_it_was_for(self, store: Store) -> None:
        add_tenant(store)
        token = store.begin_idempotent("acme", "k", stale_after=LEASE).token
        run = add_run(store, idempotency=("k", token, A))
        again = store.begin_idempotent("acme", "k", stale_after=RUN_OUT)

        assert again.content_digest == A
        assert again.answer == run.model_dump(mode="json")

    def test_keys_of_two_tenants_are_two_keys(self, store: Store) -> None:
        store.begin_idempotent("acme", "k", stale_after=LEASE)

        assert store.begin_idempotent("other", "k", stale_after=LEASE).answer is None

    def test_a_released_key_is_free(self, store: Store) -> None:
        token = store.begin_idempotent("acme", "k", stale_after=LEASE).token
        store.release_idempotent("acme", "k", token)

        assert store.begin_idempotent("acme", "k", stale_after=LEASE).token != token

    def test_a_completed_key_cannot_be_released(self, store: Store) -> None:
        add_tenant(store)
        token = store.begin_idempotent("acme", "k", stale_after=LEASE).token
        add_run(store, idempotency=("k", token, A))
        store.release_idempotent("acme", "k", token)

        assert store.begin_idempotent("acme", "k", stale_after=LEASE).answer is not None

    def test_a_silent_holder_is_replaced_and_its_late_submission_stores_nothing(self, store: Store) -> None:
        add_tenant(store)
        silent = store.begin_idempotent("acme", "k", stale_after=LEASE).token
        second = store.begin_idempotent("acme", "k", stale_after=RUN_OUT).token
        store.release_idempotent("acme", "k", silent)
        with pytest.raises(IdempotencyInFlight):
            add_run(store, idempotency=("k", silent, A))
        run = add_run(store, idempotency=("k", second, A))

        assert store.list_runs("acme", phase=None, outcome=None, limit=10, before=None).items == (run,)


class TestReading:
    def test_another_tenants_run_is_the_same_not_found_as_what_never_was(self, store: Store) -> None:
        add_tenant(store)
        add_tenant(store, name="other")
        run = add_run(store)
        refusals = []
        for ask in (store.get_run, store.delete_run, lambda id_, who: store.request_cancel(id_, who, by="tenant")):
            for id_, who in ((run.id, "other"), (make_run_id(), "other"), ("run_\0", "other"), ("", None)):
                with pytest.raises(NotFound) as refusal:
                    ask(id_, who)
                refusals.append((refusal.value.detail, refusal.value.extra, refusal.value.code))

        assert len(set(map(repr, refusals))) == 1
        assert store.get_run(run.id, "acme") == run == store.get_run(run.id, None)

    def test_pages_go_from_the_newest_to_the_oldest_with_nothing_twice_or_missing(self, store: Store) -> None:
        add_tenant(store)
        add_tenant(store, name="other")
        made = [add_run(store).id for _ in range(7)]
        add_run(store, tenant="other")
        seen: list[str] = []
        before = None
        while True:
            page = store.list_runs("acme", phase=None, outcome=None, limit=3, before=before)
            seen += [run.id for run in page.items]
            if page.next_before is None:
                break
            before = page.next_before
            add_run(store)  # what arrives meanwhile is newer, and moves nothing

        assert seen == made[::-1]

    def test_an_exact_last_page_says_that_it_is_the_last(self, store: Store) -> None:
        add_tenant(store)
        add_run(store)

        assert store.list_runs("acme", phase=None, outcome=None, limit=1, before=None).next_before is None

    def test_lists_are_filtered_by_phase_and_outcome(self, store: Store) -> None:
        add_tenant(store)
        done, waiting = finished_run(store), add_run(store)

        def ids(phase: Phase | None, outcome: Outcome | None) -> list[str]:
            return [run.id for run in store.list_runs("acme", phase=phase, outcome=outcome, limit=9, before=None).items]

        assert ids(Phase.QUEUED, None) == [waiting.id]
        assert ids(Phase.FINISHED, Outcome.PASSED) == ids(None, Outcome.PASSED) == [done.id]
        assert ids(Phase.FINISHED, Outcome.FAILED) == ids(Phase.RUNNING, None) == []

    def test_runs_of_internal_tenants_are_in_no_list(self, store: Store) -> None:
        add_tenant(store, name="_canary")
        run = add_run(store, tenant="_canary")

        for who in (None, "_canary"):
            assert store.list_runs(who, phase=None, outcome=None, limit=9, before=None).items == ()
        assert store.get_run(run.id, "_canary") == run


class TestCancelling:
    def test_a_queued_run_is_finished_at_once(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        cancelled = store.request_cancel(run.id, "acme", by="tenant")

        assert (cancelled.phase, cancelled.outcome, cancelled.reason) == (
            Phase.FINISHED, Outcome.CANCELLED, Reason.CANCELLED_BY_TENANT,
        )  # fmt: skip
        assert cancelled == store.get_run(run.id, "acme")
        assert (cancelled.started_at, cancelled.queue_position) == (None, None)
        assert types_told(store, run.id) == ["run.queued", "run.finished"]
        assert claim(store) is None

    @pytest.mark.parametrize("phase", [Phase.PROVISIONING, Phase.RUNNING, Phase.COLLECTING])
    def test_a_claimed_run_is_marked_for_its_worker_and_the_first_to_ask_is_remembered(
        self, store: Store, phase: Phase
    ) -> None:
        add_tenant(store)
        add_run(store)
        held = bring_to(store, phase)

        assert store.look(held.run.id, held.fence).cancel_requested_by is None
        assert store.request_cancel(held.run.id, "acme", by="tenant").phase is phase
        store.request_cancel(held.run.id, None, by="operator")
        assert store.look(held.run.id, held.fence).cancel_requested_by == "tenant"
        assert store.heartbeat(held.run.id, held.fence, lease=LEASE).cancel_requested_by == "tenant"

    def test_a_finished_run_is_left_as_it_is(self, store: Store) -> None:
        add_tenant(store)
        done = finished_run(store)

        assert store.request_cancel(done.id, "acme", by="tenant") == done
        assert types_told(store, done.id).count("run.finished") == 1


class TestDeleting:
    def test_only_a_finished_run_can_be_deleted_and_then_it_never_was(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        for _ in range(2):
            with pytest.raises(Conflict) as refusal:
                store.delete_run(run.id, "acme")
            assert refusal.value.code == "not_finished"
        store.request_cancel(run.id, "acme", by="tenant")
        store.delete_run(run.id, "acme")
        with pytest.raises(NotFound):
            store.get_run(run.id, "acme")
        assert store.lease_of(run.id) is None

    def test_the_events_of_a_deleted_run_are_still_told(self, store: Store) -> None:
        add_tenant(store)
        done = finished_run(store)
        store.delete_run(done.id, "acme")

        assert "run.finished" in types_told(store, done.id)

    def test_only_blobs_that_no_other_run_of_the_tenant_uses_are_given_up(self, store: Store) -> None:
        add_tenant(store)
        add_tenant(store, name="other")
        first = add_run(store, bundle=A)
        held = bring_to(store, Phase.COLLECTING)
        artifacts = (Artifact(path="out/a", bytes=1, sha256="d" * 64), Artifact(path="out/b", bytes=1, sha256="a" * 64))
        store.finish(held.run.id, held.fence, make_result(artifacts=artifacts))
        second = add_run(store, bundle=A)
        add_run(store, tenant="other", bundle=A)
        store.request_cancel(second.id, "acme", by="tenant")

        assert store.delete_run(first.id, "acme") == ("sha256:" + "d" * 64,)
        assert store.delete_run(second.id, "acme") == (A,)


class TestResults:
    def test_the_result_comes_back_as_it_was_given(self, store: Store) -> None:
        add_tenant(store)
        run = add_run(store)
        held = bring_to(store, Phase.COLLECTING)
        result = make_result(
            outcome=Outcome.FAILED, reason=Reason.EXPECTATION, steps=(make_step_result(text="NUL \0, é, \u2028"),),
            artifacts=(Artifact(path="out/\0", bytes=3, sha256="e" * 64),), evidence={"runtime": "runsc", "uid": 65532},
        )  # fmt: skip
        store.finish(run.id, held.fence, result)
        done = store.get_run(run.id, "acme")

        assert (done.phase, done.outcome, done.reason) == (Phase.FINISHED, Outcome.FAILED, Reason.EXPECTATION)
        assert (done.steps, done.usage, done.artifacts) == (result.steps, result.usage, result.artifacts)
        assert done.evidence == result.evidence
        assert done.started_at is not None
        assert done.finished_at is not None
        assert done.created_at <= done.started_at <= done.finished_at <= store.now()
        assert done.boundary_destroyed_at is None
