"""The worker's line on the shipped fakes: what becomes of a run, whatever the guest and the world do."""

from collections.abc import Callable, Iterator, MutableMapping
from datetime import timedelta
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from service.adapters.memory import MemoryStore
from service.core.errors import BoundaryLost, ProvisionFailed, SandboxBroken, Unavailable
from service.core.lease import Recovery, recover
from service.core.run import MAX_ATTEMPTS, Outcome, Phase, Reason, Result, Run, StepOutcome
from service.core.scenario import Step
from tests.contract.store_steps import add_tenant, told
from tests.scenes import DEAF, RUN_OUT, Clock, Stage, Theatre, steps
from workers.boundaries.fake import DyingBoundary, FakeBoundary, NeverReadyBoundary, ResistingBoundary
from workers.run_scenario import ALWAYS_GRACE_S, allowed, run_waiting
from workers.watch import Watch

WHOLE_LIFE = ["run.queued", "run.provisioning", "run.running", "run.collecting", "run.finished", "boundary.destroyed"]
PASSES = steps(["print", "hello"])


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[MutableMapping[str, Any]]]:
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
def theatre() -> Theatre:
    return Theatre()


def outcomes(run: Run) -> list[str]:
    return [str(step.outcome) for step in run.steps]


# --- what a run comes to ---------------------------------------------------------------------------------------------


def test_nothing_waiting_is_said_and_nothing_is_done(theatre: Theatre) -> None:
    assert run_waiting(theatre.line) is False
    assert (theatre.stage.refs, theatre.hints.given, theatre.doorbell.rings) == ([], [], [])


def test_a_run_whose_steps_do_what_is_expected_passes(theatre: Theatre) -> None:
    scenario = steps(["exit", "0"], {"run": ["print", "42"], "expect": {"stdout": {"json": 42}}})

    run = theatre.play(scenario)

    assert (run.phase, run.outcome, run.reason, run.message) == (Phase.FINISHED, Outcome.PASSED, None, None)
    assert outcomes(run) == ["passed", "passed"]
    assert run.steps[1].stdout.text == "42"
    assert run.attempt == 1
    assert run.evidence is not None
    assert run.evidence["runtime"] == "fake"
    assert run.boundary_destroyed_at is not None
    assert theatre.told(run) == WHOLE_LIFE
    assert theatre.stage.is_empty


def test_the_boundary_is_named_and_marked_for_its_run_before_anything_exists(theatre: Theatre) -> None:
    seen: list[Run] = []
    theatre.stage.acts["opening"] = lambda: seen.extend(theatre.store.list_runs(
        None, phase=None, outcome=None, limit=10, before=None).items)  # fmt: skip

    run = theatre.play(limits={"wall": "7s"})

    (ref,) = theatre.stage.refs
    assert [found.phase for found in seen] == [Phase.PROVISIONING]
    assert (ref.installation, ref.site, ref.tenant, ref.run_id, ref.fence) == ("fake", "host-1", "acme", run.id, 1)
    lifetime = ref.expires_at - theatre.store.now()
    assert timedelta(seconds=7) < lifetime < timedelta(minutes=5)


def test_a_step_gets_exactly_its_argv_environment_and_input(theatre: Theatre) -> None:
    scenario = steps(
        {"run": ["echo"], "stdin": "in", "env": {"B": "2"}, "timeout": "3s", "expect": {"stdout": {"equals": "in"}}},
        env={"A": "1", "B": "1"},
    )

    run = theatre.play(scenario)

    (spec,) = theatre.stage.specs
    assert run.outcome is Outcome.PASSED
    assert (spec.n, spec.argv, spec.stdin, spec.timeout_s) == (1, ("echo",), b"in", 3.0)
    assert {name: spec.env[name] for name in ("A", "B", "HOME")} == {"A": "1", "B": "2", "HOME": "/work"}
    assert set(spec.env) == {"PATH", "HOME", "LANG", "TMPDIR", "A", "B"}


def test_the_bundle_is_uploaded_from_the_tenants_own_blobs(theatre: Theatre) -> None:
    digest = theatre.blobs.put_bytes("acme", b"an archive")
    theatre.blobs.put_bytes("other", b"an archive")

    run = theatre.play(bundle=digest)

    (bundle,) = theatre.stage.uploads
    assert run.outcome is Outcome.PASSED
    assert bundle.digest == digest
    assert bundle.path == theatre.blobs.path("acme", digest)


def test_a_run_without_a_bundle_uploads_nothing(theatre: Theatre) -> None:
    assert theatre.play().outcome is Outcome.PASSED
    assert theatre.stage.uploads == []


@pytest.mark.parametrize(
    ("step", "outcome", "reason", "words"),
    [
        ({"run": ["exit", "3"]}, Outcome.FAILED, Reason.EXIT_CODE, "expected 0, got 3"),
        ({"run": ["exit", "139"]}, Outcome.FAILED, Reason.EXIT_CODE, "got 139"),
        ({"run": ["signal", "11"]}, Outcome.FAILED, Reason.EXIT_CODE, "signal 11 (SIGSEGV)"),
        ({"run": ["nonexistent"]}, Outcome.FAILED, Reason.EXIT_CODE, "no such program"),
        (
            {"run": ["print", "4"], "expect": {"stdout": {"equals": "5"}}},
            Outcome.FAILED,
            Reason.EXPECTATION,
            'stdout.equals: expected "5", got "4"',
        ),
        ({"run": ["sleep", "9"], "timeout": "1s"}, Outcome.TIMED_OUT, Reason.STEP_TIMEOUT, "the step took longer"),
        ({"run": ["sleep", "900"]}, Outcome.TIMED_OUT, Reason.WALL_TIMEOUT, "the run took longer"),
        ({"run": ["limit", "memory"]}, Outcome.LIMIT_EXCEEDED, Reason.MEMORY, "the memory limit was hit"),
        ({"run": ["limit", "pids"]}, Outcome.LIMIT_EXCEEDED, Reason.PIDS, "the pids limit was hit"),
        ({"run": ["limit", "disk"]}, Outcome.LIMIT_EXCEEDED, Reason.DISK, "the disk limit was hit"),
        ({"run": ["flood", str(80 * 2**20)]}, Outcome.LIMIT_EXCEEDED, Reason.OUTPUT, "the output limit was hit"),
        ({"run": ["die"]}, Outcome.ERRORED, Reason.BOUNDARY_LOST, "the sandbox ended"),
    ],
    ids=lambda value: " ".join(value["run"])[:30] if isinstance(value, dict) else None,
)
def test_how_a_step_ends_decides_outcome_reason_and_words(
    theatre: Theatre, step: dict[str, Any], outcome: Outcome, reason: Reason, words: str
) -> None:
    run = theatre.play(steps(step))

    assert (run.phase, run.outcome, run.reason) == (Phase.FINISHED, outcome, reason)
    assert words in (run.message or "")
    assert theatre.told(run) == WHOLE_LIFE
    assert theatre.stage.is_empty


def test_a_lost_sandbox_ends_the_run_as_boundary_lost_and_plays_nothing_more() -> None:
    theatre = Theatre(stage=Stage(DyingBoundary()))

    run = theatre.play(steps(["exit", "0"], ["exit", "0"], {"run": ["exit", "0"], "always": True}))

    assert (run.outcome, run.reason, run.message) == (Outcome.ERRORED, Reason.BOUNDARY_LOST, "the sandbox ended")
    assert outcomes(run) == ["skipped", "skipped", "skipped"]
    assert len(theatre.stage.specs) == 1
    assert theatre.stage.is_empty


def test_a_sandbox_that_is_lost_while_it_is_collected_is_not_our_own_error(theatre: Theatre) -> None:
    def lose() -> None:
        raise BoundaryLost("processes of the sandbox do not end: [7]")

    theatre.stage.acts["collecting"] = lose

    run = theatre.play(PASSES)

    assert (run.outcome, run.reason) == (Outcome.ERRORED, Reason.BOUNDARY_LOST)
    assert run.message == "processes of the sandbox do not end: [7]"
    assert theatre.stage.is_empty


def test_a_sandbox_that_the_guest_broke_while_it_is_collected_has_failed(theatre: Theatre) -> None:
    def break_() -> None:
        raise SandboxBroken("the guest killed what was sent to list")

    theatre.stage.acts["collecting"] = break_

    run = theatre.play(PASSES)

    assert (run.outcome, run.reason) == (Outcome.FAILED, Reason.EXIT_CODE)
    assert run.message == "the guest killed what was sent to list"
    assert theatre.stage.is_empty


# --- which steps are played ------------------------------------------------------------------------------------------


def test_after_a_failure_the_rest_is_skipped_but_for_always(theatre: Theatre) -> None:
    run = theatre.play(
        steps(["exit", "0"], ["exit", "1"], ["print", "never"], {"run": ["print", "cleaning"], "always": True})
    )

    assert outcomes(run) == ["passed", "failed", "skipped", "passed"]
    assert (run.outcome, run.reason) == (Outcome.FAILED, Reason.EXIT_CODE)
    assert (run.message or "").startswith("step 2:")
    assert [spec.n for spec in theatre.stage.specs] == [1, 2, 4]
    assert run.steps[3].stdout.text == "cleaning"


def test_a_failure_that_may_happen_neither_skips_nor_fails(theatre: Theatre) -> None:
    run = theatre.play(steps({"run": ["exit", "1"], "continue_on_failure": True}, ["exit", "0"]))

    assert outcomes(run) == ["failed", "passed"]
    assert run.outcome is Outcome.PASSED


def test_a_time_out_stops_the_run_even_where_failures_may_happen(theatre: Theatre) -> None:
    late = {"run": ["sleep", "9"], "timeout": "1s", "continue_on_failure": True}

    run = theatre.play(steps(late, ["exit", "0"]))

    assert outcomes(run) == ["timed_out", "skipped"]
    assert run.reason is Reason.STEP_TIMEOUT


def test_a_failing_always_step_does_not_hide_the_first_failure(theatre: Theatre) -> None:
    run = theatre.play(steps(["exit", "1"], {"run": ["sleep", "9"], "timeout": "1s", "always": True}))

    assert outcomes(run) == ["failed", "timed_out"]
    assert (run.outcome, run.reason) == (Outcome.FAILED, Reason.EXIT_CODE)


def test_when_the_runs_time_is_over_always_steps_share_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Time:
        now_s = 1000.0

        @classmethod
        def monotonic(cls) -> float:
            return cls.now_s

        @classmethod
        def passes(cls, seconds: float) -> None:
            cls.now_s += seconds

    monkeypatch.setattr("workers.run_scenario.time", Time)
    theatre = Theatre(stage=Stage(FakeBoundary(sleep=Time.passes)))
    always = {"run": ["sleep", "500"], "always": True}

    run = theatre.play(
        steps(["sleep", "500"], ["exit", "0"], always | {"timeout": "4s"}, always, always), limits={"wall": "20s"}
    )

    assert [spec.timeout_s for spec in theatre.stage.specs] == [20.0, 4.0, 6.0, 0.001]
    assert outcomes(run) == ["timed_out", "skipped", "timed_out", "timed_out", "timed_out"]
    assert (run.outcome, run.reason) == (Outcome.TIMED_OUT, Reason.WALL_TIMEOUT)


@pytest.mark.parametrize(
    ("own", "left_s", "stopped", "expected"),
    [
        (None, 40.0, False, (40.0, True)),
        ("5s", 40.0, False, (5.0, False)),
        ("50s", 40.0, False, (40.0, True)),
        ("40s", 40.0, False, (40.0, True)),
        (None, -1.0, False, (0.001, True)),
        (None, 40.0, True, (40.0, True)),
        (None, 3.0, True, (ALWAYS_GRACE_S, True)),
        ("5s", 3.0, True, (5.0, False)),
        (None, 0.0, True, (ALWAYS_GRACE_S, True)),
        (None, -4.0, True, (ALWAYS_GRACE_S - 4, True)),
        ("60s", -4.0, True, (ALWAYS_GRACE_S - 4, True)),
        (None, -11.0, True, (0.001, True)),
    ],
)
def test_the_time_a_step_may_take(own: str | None, left_s: float, stopped: bool, expected: tuple[float, bool]) -> None:
    step = Step.model_validate({"name": "s", "run": "true"} | ({"timeout": own} if own else {}))

    assert allowed(step, left_s=left_s, stopped=stopped) == expected


PROGRAMS = st.sampled_from(
    [["exit", "0"], ["exit", "1"], ["sleep", "900"], ["limit", "memory"], ["die"], ["signal", "9"]]
)
ANY_STEP = st.fixed_dictionaries({"run": PROGRAMS, "always": st.booleans(), "continue_on_failure": st.booleans()})


@settings(deadline=None, max_examples=60)
@given(st.lists(ANY_STEP, min_size=1, max_size=6))
def test_whatever_the_steps_do_the_run_ends_once_as_a_model_says(documents: list[dict[str, Any]]) -> None:
    theatre = Theatre(times=DEAF)

    run = theatre.play(steps(*documents))

    assert outcomes(run) == list(_modelled(documents))
    first = next((n for n, (d, o) in enumerate(zip(documents, run.steps, strict=True)) if _stops(d, o.outcome)), None)
    if [d["run"] for d, spec in zip(documents, run.steps, strict=True) if spec.duration_s is not None].count(["die"]):
        assert run.reason is Reason.BOUNDARY_LOST
    elif first is None:
        assert run.outcome is Outcome.PASSED
    else:
        assert run.outcome == Outcome(run.steps[first].outcome)
    assert theatre.told(run) == WHOLE_LIFE
    assert theatre.stage.is_empty


def _modelled(documents: list[dict[str, Any]]) -> Any:
    stopped = dead = False
    for document in documents:
        word = document["run"][0]
        if dead or (stopped and not document["always"]):
            yield "skipped"
            continue
        dead = word in ("die", "limit")
        failed = {"sleep": "timed_out", "limit": "limit_exceeded", "die": "skipped"}.get(word, "failed")
        passes = document["run"] == ["exit", "0"]
        stopped = stopped or not (passes or (failed == "failed" and document["continue_on_failure"]))
        yield "passed" if passes else failed


def _stops(document: dict[str, Any], outcome: StepOutcome) -> bool:
    if outcome in (StepOutcome.PASSED, StepOutcome.SKIPPED):
        return False
    return not (outcome is StepOutcome.FAILED and document["continue_on_failure"])


# --- what is collected -----------------------------------------------------------------------------------------------


def test_artifacts_are_in_the_tenants_blobs_and_in_nobody_elses(theatre: Theatre) -> None:
    scenario = steps(["write", "out/report.txt", "42"], ["write", "scratch", "x"], artifacts=["out/*"])

    run = theatre.play(scenario)

    (artifact,) = run.artifacts
    assert (artifact.path, artifact.bytes) == ("out/report.txt", 2)
    assert theatre.blobs.path("acme", f"sha256:{artifact.sha256}").read_bytes() == b"42"
    with pytest.raises(Exception, match="no such thing"):
        theatre.blobs.path("other", f"sha256:{artifact.sha256}")


def test_what_exceeds_the_artifacts_limit_is_named_and_not_kept(theatre: Theatre) -> None:
    scenario = steps(["write", "a", "12345678"], ["write", "b", "123"], artifacts=["*"])

    run = theatre.play(scenario, limits={"artifacts": 5})

    assert [artifact.path for artifact in run.artifacts] == ["b"]
    assert [skipped.path for skipped in run.skipped_artifacts] == ["a"]
    assert run.outcome is Outcome.PASSED


def test_a_file_expectation_is_judged_after_the_run_and_charged_to_its_step(theatre: Theatre) -> None:
    scenario = steps(
        {"run": ["write", "result", "1"], "expect": {"files": {"result": {"equals": "2"}}}},
        ["write", "result", "2"],
        {"run": ["exit", "0"], "expect": {"files": {"absent": {"exists": True}}}, "continue_on_failure": True},
        {"run": ["exit", "0"], "expect": {"files": {"absent": {"exists": False}}}},
    )

    run = theatre.play(scenario)

    assert outcomes(run) == ["passed", "passed", "failed", "passed"]
    assert [failure.expectation for failure in run.steps[2].failures] == ["files.absent.exists"]
    assert run.outcome is Outcome.PASSED


def test_a_step_that_leaves_the_wrong_file_fails_the_run(theatre: Theatre) -> None:
    wrong = {"run": ["write", "result", "1"], "expect": {"files": {"result": {"equals": "2"}}}}

    run = theatre.play(steps(["exit", "0"], wrong))

    assert outcomes(run) == ["passed", "failed"]
    assert (run.outcome, run.reason) == (Outcome.FAILED, Reason.EXPECTATION)
    assert (run.message or "").startswith("step 2: files.result.equals")


# --- cancellation ----------------------------------------------------------------------------------------------------


WRITES = steps(["write", "a", "1"], ["sleep", "900"], {"run": ["exit", "0"], "always": True}, artifacts=["*"])


def cancel(theatre: Theatre, *, by: str = "tenant", seen: bool = True) -> Callable[[], None]:
    """Once: ask for cancellation of the run, and wait until its worker has seen it."""

    def act() -> None:
        run = theatre.store.list_runs(None, phase=None, outcome=None, limit=1, before=None).items[0]
        theatre.store.request_cancel(run.id, None, by=by)
        if seen:
            theatre.stage.saw()

    return act


def test_a_run_cancelled_in_the_queue_is_never_claimed(theatre: Theatre) -> None:
    run = theatre.submit()
    theatre.store.request_cancel(run.id, None, by="tenant")

    assert run_waiting(theatre.line) is False
    assert theatre.store.get_run(run.id, None).reason is Reason.CANCELLED_BY_TENANT
    assert theatre.stage.refs == []


@pytest.mark.parametrize("moment", ["opening", "uploading", "step", "evidence", "collecting"])
@pytest.mark.parametrize("by", ["tenant", "operator"])
def test_a_run_cancelled_while_it_is_played_ends_cancelled_without_artifacts(
    theatre: Theatre, moment: str, by: str
) -> None:
    theatre.stage.acts[moment] = cancel(theatre, by=by)

    run = theatre.play(WRITES, bundle=theatre.blobs.put_bytes("acme", b"an archive"))

    assert (run.phase, run.outcome, run.reason) == (Phase.FINISHED, Outcome.CANCELLED, Reason(f"cancelled_by_{by}"))
    assert (run.artifacts, run.skipped_artifacts) == ((), ())
    assert theatre.told(run).count("run.finished") == 1
    assert theatre.told(run).count("boundary.destroyed") == 1
    assert theatre.stage.is_empty


def test_the_same_run_when_nobody_cancels_it_keeps_its_artifact(theatre: Theatre) -> None:
    run = theatre.play(WRITES)

    assert (run.outcome, run.reason) == (Outcome.TIMED_OUT, Reason.WALL_TIMEOUT)
    assert [artifact.path for artifact in run.artifacts] == ["a"]


def test_a_cancelled_run_plays_no_further_step_not_even_always(theatre: Theatre) -> None:
    theatre.stage.acts["step"] = cancel(theatre)

    run = theatre.play(WRITES)

    assert [spec.n for spec in theatre.stage.specs] == [1]
    assert outcomes(run)[1:] == ["skipped", "skipped"]
    assert theatre.stage.patterns == [()]


def test_a_run_cancelled_while_its_wall_is_built_asks_for_no_second_attempt() -> None:
    theatre = Theatre(stage=Stage(NeverReadyBoundary()))
    theatre.stage.acts["opening"] = cancel(theatre)

    run = theatre.play()

    assert (run.phase, run.outcome, run.attempt) == (Phase.FINISHED, Outcome.CANCELLED, 1)


# --- provisioning ----------------------------------------------------------------------------------------------------


def test_a_wall_that_cannot_be_built_returns_the_run_to_the_queue_and_the_third_time_ends_it() -> None:
    theatre = Theatre(stage=Stage(NeverReadyBoundary()))
    run = theatre.submit()
    seen = []

    while run_waiting(theatre.line):
        found = theatre.store.get_run(run.id, None)
        seen.append((found.phase, found.attempt, found.reason))

    assert seen == [
        (Phase.QUEUED, 1, None),
        (Phase.QUEUED, 2, None),
        (Phase.FINISHED, MAX_ATTEMPTS, Reason.PROVISION_FAILED),
    ]
    assert "the sandbox was not ready in time" in (theatre.store.get_run(run.id, None).message or "")
    assert [ref.fence for ref in theatre.stage.refs] == [1, 2, 3]
    assert theatre.told(run).count("boundary.destroyed") == MAX_ATTEMPTS
    assert theatre.told(run).count("run.finished") == 1
    assert theatre.stage.is_empty


def test_a_run_is_not_tried_again_before_its_last_wall_is_gone() -> None:
    boundary = ResistingBoundary()
    theatre = Theatre(stage=Stage(boundary))

    def fail() -> None:
        raise ProvisionFailed("the bundle cannot be unpacked")

    theatre.stage.acts["uploading"] = fail
    run = theatre.submit(bundle=theatre.blobs.put_bytes("acme", b"an archive"))

    assert run_waiting(theatre.line) is True
    assert theatre.store.get_run(run.id, None).phase is Phase.QUEUED
    assert run_waiting(theatre.line) is False, "fence 1 is still there"

    boundary.refusals = 0
    boundary.destroy(theatre.stage.refs[0])
    theatre.store.record_destroyed(run.id, 1)
    assert run_waiting(theatre.line) is True


# --- a lease that is lost --------------------------------------------------------------------------------------------


class TakenOver(MemoryStore):
    """Just before the worker's write named `at`, its lease runs out and the reconciler acts, as after a long pause."""

    at = ""

    def __init__(self) -> None:
        self.time = Clock()
        super().__init__(clock=self.time)

    def _before(self, write: str) -> None:
        if write != self.at:
            return
        self.time.now += RUN_OUT
        for view in self.leases():
            decision = recover(view, now=self.now(), max_queue=timedelta(hours=1))
            assert decision is not None
            if decision.action is Recovery.REQUEUE:
                assert self.recover_requeue(view)
            else:
                assert decision.verdict is not None
                assert self.recover_finish(view, decision.verdict)

    def mark_running(self, run_id: str, fence: int, **more: Any) -> None:
        self._before("mark_running")
        super().mark_running(run_id, fence, **more)

    def mark_collecting(self, run_id: str, fence: int, **more: Any) -> None:
        self._before("mark_collecting")
        super().mark_collecting(run_id, fence, **more)

    def finish(self, run_id: str, fence: int, result: Result, **more: Any) -> None:
        self._before("finish")
        super().finish(run_id, fence, result, **more)

    def requeue(self, run_id: str, fence: int, **more: Any) -> Phase:
        self._before("requeue")
        return super().requeue(run_id, fence, **more)


LOST_AT: dict[str, tuple[Callable[[], Stage], list[str], Phase, Reason | None]] = {
    "mark_running": (Stage, WHOLE_LIFE[:2], Phase.QUEUED, None),
    "mark_collecting": (Stage, WHOLE_LIFE[:3], Phase.FINISHED, Reason.WORKER_LOST),
    "finish": (Stage, WHOLE_LIFE[:4], Phase.FINISHED, Reason.WORKER_LOST),
    "requeue": (lambda: Stage(NeverReadyBoundary()), WHOLE_LIFE[:2], Phase.QUEUED, None),
}


@pytest.mark.parametrize("write", LOST_AT)
def test_a_worker_that_lost_its_lease_writes_nothing_more_and_ends_its_boundary(write: str) -> None:
    make_stage, before, phase, reason = LOST_AT[write]
    store = TakenOver()
    store.at = write
    theatre = Theatre(store=store, stage=make_stage(), times=DEAF)

    run = theatre.play(steps(["write", "a", "1"], artifacts=["*"]))

    others = ["run.requeued" if phase is Phase.QUEUED else "run.finished"]
    assert (run.phase, run.reason, run.steps, run.artifacts) == (phase, reason, (), ())
    assert theatre.told(run) == [*before, *others, "boundary.destroyed"]
    assert theatre.stage.is_empty


def test_the_same_worker_that_keeps_its_lease_writes_all_of_it() -> None:
    theatre = Theatre(store=TakenOver(), times=DEAF)

    run = theatre.play(steps(["write", "a", "1"], artifacts=["*"]))

    assert run.outcome is Outcome.PASSED
    assert theatre.told(run) == WHOLE_LIFE


def test_an_error_of_ours_under_a_lost_lease_is_not_written_either() -> None:
    store = TakenOver()
    store.at = "finish"
    theatre = Theatre(store=store, times=DEAF)
    theatre.stage.acts["evidence"] = _defect

    run = theatre.play(PASSES)

    assert run.reason is Reason.WORKER_LOST
    assert theatre.told(run) == [*WHOLE_LIFE[:4], "run.finished", "boundary.destroyed"]
    assert theatre.stage.is_empty


@pytest.mark.parametrize(("moment", "played"), [("opening", 0), ("step", 1), ("collecting", 3)])
def test_a_lease_that_the_watch_sees_lost_ends_the_run_at_the_next_step(moment: str, played: int) -> None:
    clock = Clock()
    theatre = Theatre(store=MemoryStore(clock=clock))

    def pass_time() -> None:
        clock.now += RUN_OUT
        theatre.stage.saw()

    theatre.stage.acts[moment] = pass_time

    run = theatre.play(WRITES)

    assert run.phase in {Phase.PROVISIONING, Phase.RUNNING, Phase.COLLECTING}, "what becomes of it is for others to say"
    assert len(theatre.stage.specs) == played
    assert "run.finished" not in theatre.told(run)
    assert theatre.stage.is_empty


# --- a world that is away for a moment -------------------------------------------------------------------------------


class Away(MemoryStore):
    """The database does not answer the first `times` calls of each of these."""

    def __init__(self, *names: str, times: int = 2) -> None:
        super().__init__()
        self.left = dict.fromkeys(names, times)

    def _there(self, name: str) -> None:
        if self.left.get(name, 0) > 0:
            self.left[name] -= 1
            raise Unavailable("the database cannot be used at the moment")

    def mark_running(self, run_id: str, fence: int, **more: Any) -> None:
        self._there("mark_running")
        super().mark_running(run_id, fence, **more)

    def mark_collecting(self, run_id: str, fence: int, **more: Any) -> None:
        self._there("mark_collecting")
        super().mark_collecting(run_id, fence, **more)

    def finish(self, run_id: str, fence: int, result: Result, **more: Any) -> None:
        self._there("finish")
        super().finish(run_id, fence, result, **more)

    def requeue(self, run_id: str, fence: int, **more: Any) -> Phase:
        self._there("requeue")
        return super().requeue(run_id, fence, **more)

    def record_destroyed(self, run_id: str, fence: int) -> bool:
        self._there("record_destroyed")
        return super().record_destroyed(run_id, fence)

    def waiting(self, boundaries: Any) -> bool:
        self._there("waiting")
        return super().waiting(boundaries)


def test_a_database_that_is_away_for_a_moment_costs_no_run() -> None:
    store = Away("mark_running", "mark_collecting", "finish")
    theatre = Theatre(store=store)

    run = theatre.play(PASSES)

    assert run.outcome is Outcome.PASSED
    assert theatre.told(run) == WHOLE_LIFE
    assert set(store.left.values()) == {0}


def test_a_database_that_stays_away_costs_the_run_and_never_the_wall() -> None:
    theatre = Theatre(store=Away("finish", times=10**9))
    theatre.stage.acts["closed"] = lose(theatre)

    run = theatre.play(PASSES)

    assert run.phase is Phase.COLLECTING, "the reconciler says what becomes of it"
    assert theatre.stage.is_empty


def test_a_worker_that_fenced_itself_while_it_built_the_wall_does_not_put_the_run_back() -> None:
    theatre = Theatre(stage=Stage(NeverReadyBoundary()))
    theatre.stage.acts["opening"] = lose(theatre)

    run = theatre.play(PASSES)

    assert run.phase is Phase.PROVISIONING, "the reconciler says what becomes of it"
    assert theatre.stage.is_empty


def lose(theatre: Theatre) -> Callable[[], None]:
    """As the watch does after a long silence."""

    def act() -> None:
        watch = theatre.stage.watch
        assert isinstance(watch, Watch)
        watch.lost = "no successful heartbeat for 20.0 s"

    return act


def test_what_could_not_be_recorded_as_destroyed_is_left_to_the_reaper() -> None:
    theatre = Theatre(store=Away("record_destroyed"))

    run = theatre.play(PASSES)

    assert run.outcome is Outcome.PASSED
    assert run.boundary_destroyed_at is None
    assert theatre.stage.is_empty
    assert [view.run_id for view in theatre.store.undestroyed("host-1")] == [run.id]


# --- errors of our own -----------------------------------------------------------------------------------------------


def _defect() -> None:
    raise RuntimeError("a secret of the host: /root/key")


@pytest.mark.parametrize("moment", ["opening", "uploading", "step", "evidence", "collecting", "closed"])
def test_an_error_of_ours_ends_the_run_as_internal_and_its_owner_learns_nothing_of_the_host(
    theatre: Theatre, moment: str, logged: list[MutableMapping[str, Any]]
) -> None:
    theatre.stage.acts[moment] = _defect

    run = theatre.play(PASSES, bundle=theatre.blobs.put_bytes("acme", b"an archive"))

    assert (run.phase, run.outcome, run.reason) == (Phase.FINISHED, Outcome.ERRORED, Reason.INTERNAL)
    assert run.message == "an error inside the platform"
    assert "secret" not in str(told(theatre.store, run.id))
    assert [entry["run_id"] for entry in logged if entry.get("exc_info")] == [run.id], "the operator reads why"
    assert run.boundary_destroyed_at is not None
    assert theatre.stage.is_empty


def test_a_bundle_that_is_not_there_is_our_error(theatre: Theatre) -> None:
    run = theatre.play(PASSES, bundle="sha256:" + "0" * 64)

    assert run.reason is Reason.INTERNAL
    assert theatre.stage.is_empty


def test_a_worker_that_is_told_to_exit_takes_its_boundary_with_it(theatre: Theatre) -> None:
    def leave() -> None:
        raise SystemExit(0)

    theatre.stage.acts["step"] = leave
    run = theatre.submit()

    with pytest.raises(SystemExit):
        run_waiting(theatre.line)

    assert theatre.stage.is_empty
    assert theatre.told(run) == [*WHOLE_LIFE[:3], "boundary.destroyed"]


# --- the end of the boundary -----------------------------------------------------------------------------------------


def test_a_boundary_that_resists_is_not_recorded_as_gone_and_is_left_to_the_reaper() -> None:
    boundary = ResistingBoundary()
    theatre = Theatre(stage=Stage(boundary))

    run = theatre.play(PASSES)

    assert run.outcome is Outcome.PASSED
    assert run.boundary_destroyed_at is None
    assert theatre.told(run) == WHOLE_LIFE[:-1]
    assert [ref.name for ref in boundary.discover()] == [theatre.stage.refs[0].name]
    assert theatre.doorbell.rings == []


def test_a_destruction_that_the_reaper_recorded_first_is_not_recorded_twice(theatre: Theatre) -> None:
    def reap() -> None:
        (ref,) = theatre.stage.refs
        theatre.store.record_destroyed(ref.run_id, ref.fence)

    theatre.stage.acts["destroying"] = reap

    assert theatre.told(theatre.play()) == WHOLE_LIFE


# --- bells and hints -------------------------------------------------------------------------------------------------


def test_the_bell_is_passed_on_when_another_run_waits_and_not_otherwise(theatre: Theatre) -> None:
    theatre.submit()
    theatre.submit()

    run_waiting(theatre.line)
    assert theatre.doorbell.rings == ["gvisor"]
    run_waiting(theatre.line)
    assert theatre.doorbell.rings == ["gvisor"]


def test_the_bell_is_passed_on_for_a_tenant_that_was_at_its_cap() -> None:
    theatre = Theatre()
    add_tenant(theatre.store, name="small", concurrent=1)
    theatre.submit(tenant="small")
    theatre.submit(tenant="small")
    heard: list[bool] = []
    theatre.stage.acts["step"] = lambda: heard.append(run_waiting(theatre.line))

    assert run_waiting(theatre.line)

    assert heard == [False], "the second ring was used up while the tenant was at its cap"
    assert theatre.doorbell.rings == ["gvisor"]


def test_no_bell_is_passed_on_for_what_this_worker_cannot_build(theatre: Theatre) -> None:
    theatre.submit()
    theatre.submit(boundary="microvm")

    run_waiting(theatre.line)

    assert theatre.doorbell.rings == []


@pytest.mark.parametrize("away", ["doorbell", "database"])
def test_a_bell_that_cannot_be_passed_on_is_left_to_the_reconciler(away: str) -> None:
    theatre = Theatre(store=Away(*(["waiting"] if away == "database" else [])))
    theatre.doorbell.away = away == "doorbell"
    first = theatre.submit()
    theatre.submit()

    assert run_waiting(theatre.line)

    assert theatre.store.get_run(first.id, None).outcome is Outcome.PASSED
    assert theatre.doorbell.rings == []


def test_every_change_is_hinted_and_nothing_depends_on_it(theatre: Theatre) -> None:
    run = theatre.play()
    assert theatre.hints.given.count(("run", run.id)) == 1, "those who wait, at the end"
    assert theatre.hints.given.count(("outbox", run.id)) >= 4, "the relay, at each transition"
    assert theatre.hints.given[-1] == ("outbox", run.id)

    theatre.hints.lost = True
    assert theatre.play().outcome is Outcome.PASSED


def test_the_oldest_run_is_played_first_and_each_only_once(theatre: Theatre) -> None:
    runs = [theatre.submit() for _ in range(3)]

    while run_waiting(theatre.line):
        pass

    assert [ref.run_id for ref in theatre.stage.refs] == [run.id for run in runs]
    assert all(theatre.told(run) == WHOLE_LIFE for run in runs)
