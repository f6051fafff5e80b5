"""What a run leaves in its tenant's storage, on the worker's line and the shipped fakes."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import structlog

from service.adapters.memory import MemoryBlobs, MemoryStore
from service.core.boundary import ArtifactLimits, SkippedArtifact
from service.core.errors import QuotaExceeded, StorageFull, Unavailable
from service.core.news import START
from service.core.run import Outcome, Phase, Run
from tests.scenes import Stage, Theatre, steps
from workers.boundaries.fake import DyingBoundary
from workers.boundaries.gvisor.collect import collect_tree
from workers.run_scenario import run_waiting


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
def theatre() -> Theatre:
    return Theatre()


def give(theatre: Theatre, storage_bytes: int) -> None:
    """Let the tenant keep so many bytes."""
    tenant = theatre.store.get_tenant("acme")
    quota = tenant.quota.model_copy(update={"storage_bytes": storage_bytes})
    theatre.store.update_tenant(tenant.model_copy(update={"quota": quota}))


def kept(theatre: Theatre, run: Run) -> dict[str, bytes]:
    """The stored bytes of each stream that has any."""
    outputs = theatre.store.get_kept(run.id, "acme").outputs
    return {name: theatre.blobs.path("acme", digest).read_bytes() for name, digest in outputs.items()}


def test_every_stream_that_has_bytes_is_kept(theatre: Theatre) -> None:
    run = theatre.play(steps(["print", "one"], ["complain", "two"], ["exit", "0"]))

    assert run.outcome is Outcome.PASSED
    assert kept(theatre, run) == {"1.stdout": b"one", "2.stderr": b"two"}


def test_of_a_flood_the_head_and_the_tail_are_kept(theatre: Theatre) -> None:
    run = theatre.play(steps(["flood", "5000"]), limits={"output": 1024})

    assert len(kept(theatre, run)["1.stdout"]) == 1024
    assert run.steps[0].stdout.bytes == 5000


def test_they_count_among_the_tenants_storage_and_go_with_the_run(theatre: Theatre) -> None:
    before = theatre.store.storage_left("acme")
    run = theatre.play(steps(["print", "four"], ["complain", "four"], ["write", "a", "six"], artifacts=["*"]))

    told = [one for one in theatre.store.read_news(run.id, None, after=START, limit=100).news if one.kind == "output"]
    live = sum(len(one.data) for one in told)
    assert len(told) == 2
    assert before - theatre.store.storage_left("acme") == len("four") + len("six") + live
    assert len(theatre.store.delete_run(run.id, "acme")) == 2
    assert theatre.store.storage_left("acme") == before


def test_a_cancelled_run_keeps_what_was_printed(theatre: Theatre) -> None:
    run = theatre.submit(steps(["print", "one"], ["print", "two"]))
    calls: list[None] = []

    def cancel_second() -> None:
        calls.append(None)
        if len(calls) == 2:
            theatre.store.request_cancel(run.id, "acme", by="tenant")
            theatre.stage.saw()

    theatre.stage.acts["step"] = cancel_second
    assert run_waiting(theatre.line)
    done = theatre.store.get_run(run.id, "acme")

    assert done.outcome is Outcome.CANCELLED
    assert kept(theatre, done)["1.stdout"] == b"one"


def test_a_run_that_errs_keeps_what_was_printed(theatre: Theatre) -> None:
    def fails() -> None:
        raise RuntimeError("a defect of ours")

    theatre.stage.acts["evidence"] = fails
    run = theatre.play(steps(["print", "one"]))

    assert run.outcome is Outcome.ERRORED
    assert kept(theatre, run) == {"1.stdout": b"one"}


def test_a_sandbox_that_dies_takes_no_output_with_it() -> None:
    theatre = Theatre(stage=Stage(DyingBoundary()))
    run = theatre.play(steps(["print", "one"], ["print", "two"]))

    assert run.outcome is Outcome.ERRORED
    assert set(kept(theatre, run)) <= {"1.stdout", "2.stdout"}


# --- the quota --------------------------------------------------------------------------------------------------------


def test_artifacts_beyond_the_quota_are_skipped_and_the_run_is_what_it_was(theatre: Theatre) -> None:
    give(theatre, 10)
    scenario = steps(["write", "a", "12345678"], ["write", "b", "123"], ["write", "c", "12"], artifacts=["*"])

    run = theatre.play(scenario)

    assert (run.phase, run.outcome) == (Phase.FINISHED, Outcome.PASSED)
    assert [artifact.path for artifact in run.artifacts] == ["a", "c"]
    assert run.skipped_artifacts == (SkippedArtifact(path="b", why="storage quota"),)
    assert theatre.store.storage_left("acme") == 0


def test_what_is_too_large_for_the_runs_own_limit_is_not_called_the_quotas(theatre: Theatre) -> None:
    give(theatre, 100)

    run = theatre.play(steps(["write", "a", "12345678901"], artifacts=["*"]), limits={"artifacts": 10})

    assert run.artifacts == ()
    assert "too large" in run.skipped_artifacts[0].why


def test_an_output_beyond_the_quota_is_left_out_and_the_run_passes(theatre: Theatre) -> None:
    give(theatre, 5)
    run = theatre.play(steps(["print", "123456"], ["print", "12345"], ["complain", "1"]))

    assert run.outcome is Outcome.PASSED
    assert run.steps[0].stdout.text == "123456"
    assert kept(theatre, run) == {"2.stdout": b"12345"}


def test_outputs_leave_less_for_artifacts(theatre: Theatre) -> None:
    give(theatre, 5)
    run = theatre.play(steps(["print", "1234"], ["write", "a", "12"], artifacts=["*"]))

    assert kept(theatre, run) == {"1.stdout": b"1234"}
    assert run.skipped_artifacts == (SkippedArtifact(path="a", why="storage quota"),)


def test_room_that_was_made_while_it_ran_is_used(theatre: Theatre) -> None:
    give(theatre, 1)
    theatre.stage.acts["step"] = lambda: give(theatre, 100)
    run = theatre.play(steps(["write", "a", "12"], artifacts=["*"]))

    assert [artifact.path for artifact in run.artifacts] == ["a"]


# --- the world's weather ----------------------------------------------------------------------------------------------


class FullBlobs(MemoryBlobs):
    """There is no room on the disk for bytes; artifacts come as streams."""

    def put_bytes(self, tenant: str, data: bytes) -> str:
        raise StorageFull("there is no room left")

    def put_stream(self, tenant: str, source: BinaryIO, *, max_bytes: int) -> tuple[str, int]:
        raise AssertionError("not asked")


def test_a_full_disk_loses_the_output_and_not_the_run(theatre: Theatre, logged: list[Any]) -> None:
    theatre.line = replace(theatre.line, blobs=FullBlobs())
    run = theatre.play(steps(["print", "one"]))

    assert run.outcome is Outcome.PASSED
    assert theatre.store.get_kept(run.id, "acme").outputs == {}
    assert any(entry["event"] == "a step's output was not kept" for entry in logged)


class ForgetfulStore(MemoryStore):
    """Does not know at first how much room there is."""

    failures = 3

    def storage_left(self, tenant: str) -> int:
        self.failures -= 1
        if self.failures >= 0:
            raise Unavailable("the database is away")
        return super().storage_left(tenant)


def test_a_database_that_is_away_for_a_moment_is_asked_again() -> None:
    theatre = Theatre(store=ForgetfulStore())
    run = theatre.play(steps(["print", "one"]))

    assert run.outcome is Outcome.PASSED
    assert kept(theatre, run) == {"1.stdout": b"one"}


class NoRoom:
    def put(self, source: BinaryIO, *, max_bytes: int) -> tuple[str, int]:
        raise QuotaExceeded("no room")


def test_the_real_collector_says_the_same_of_what_has_no_room(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = collect_tree(root, ["*"], limits=ArtifactLimits(total_bytes=100), sink=NoRoom())
    finally:
        os.close(root)

    assert found.kept == []
    assert found.skipped == [SkippedArtifact(path="a", why="storage quota")]
