"""What every boundary kind promises, whatever it is made of. A new kind is one more parameter of `kind`."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from service.core.boundary import Ended, Limit
from service.core.errors import BoundaryError, ProvisionFailed
from tests.contract.boundary_kinds import Kind, fake_kind, gvisor_kind
from tests.sandboxes import Never, Sink, artifact_limits, make_spec


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtimes")


@pytest.fixture(params=["fake", "gvisor"])
def kind(request: pytest.FixtureRequest, tmp_path: Path, store: Path) -> Iterator[Kind]:
    if request.param == "fake":
        with fake_kind() as fake:
            yield fake
    else:
        with gvisor_kind(tmp_path, store) as gvisor:
            yield gvisor


class Cancelled:
    """A Cancellation that comes after some seconds."""

    def __init__(self, after_s: float) -> None:
        self._at = time.monotonic() + after_s

    def is_set(self) -> bool:
        return time.monotonic() >= self._at


class TestSteps:
    def test_exit_codes_signals_and_missing_programs_are_three_different_things(self, kind: Kind) -> None:
        ref = kind.ref()
        with kind.boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            seen = [sandbox.execute(step) for step in (kind.exits(139), kind.segfaults(), kind.exits(128))]
            absent = sandbox.execute(kind.missing())
            after = sandbox.execute(kind.exits(0))
        kind.boundary.destroy(ref)
        assert [(e.ended, e.exit_code, e.signal) for e in seen] == [
            (Ended.EXITED, 139, None),
            (Ended.EXITED, None, 11),
            (Ended.EXITED, 128, None),
        ]
        assert (absent.ended, absent.exit_code, absent.signal) == (Ended.NOT_STARTED, None, None)
        assert absent.message
        assert absent.sandbox_alive
        assert (after.ended, after.exit_code) == (Ended.EXITED, 0)

    def test_stdout_and_stderr_are_separate_and_stdin_arrives_whole(self, kind: Kind) -> None:
        text = bytes(range(256)) * 4096  # 1 MiB: more than any pipe holds
        ref = kind.ref()
        with kind.boundary.open(make_spec(output=4 * 2**20), ref, cancelled=Never()) as sandbox:
            out = sandbox.execute(kind.prints("to stdout"))
            err = sandbox.execute(kind.complains("to stderr"))
            echoed = sandbox.execute(kind.echoes(text))
        kind.boundary.destroy(ref)
        assert (out.stdout.data, out.stderr.data) == (b"to stdout", b"")
        assert (err.stdout.data, err.stderr.data) == (b"", b"to stderr")
        assert echoed.stdout.data == text

    def test_output_beyond_the_cap_keeps_head_and_tail_and_counts_the_rest(self, kind: Kind) -> None:
        ref = kind.ref()
        with kind.boundary.open(make_spec(output=64 * 1024), ref, cancelled=Never()) as sandbox:
            small = sandbox.execute(kind.floods(64 * 1024))
            large = sandbox.execute(kind.floods(1024 * 1024))
        kind.boundary.destroy(ref)
        assert not small.stdout.truncated
        assert len(small.stdout.data) == 64 * 1024
        assert large.stdout.truncated
        assert (len(large.stdout.head), len(large.stdout.tail)) == (32 * 1024, 32 * 1024)
        assert large.stdout.total_bytes == 1024 * 1024
        assert large.exit_code == 0

    def test_a_listener_is_told_all_of_each_stream_as_it_is_also_what_is_not_kept(self, kind: Kind) -> None:
        text = bytes(range(256)) * 1024
        ref = kind.ref()
        with kind.boundary.open(make_spec(output=64 * 1024), ref, cancelled=Never()) as sandbox:
            heard: list[dict[str, bytes]] = []
            for step in (kind.echoes(text), kind.complains("to stderr"), kind.exits(3), kind.missing()):
                heard.append({"stdout": b"", "stderr": b""})

                def listen(stream: str, chunk: bytes, told: dict[str, bytes] = heard[-1]) -> None:
                    told[stream] += chunk

                execution = sandbox.execute(step, listener=listen)
                assert len(heard[-1]["stdout"]) == execution.stdout.total_bytes
        kind.boundary.destroy(ref)
        assert [told["stdout"] for told in heard] == [text, b"", b"", b""]
        assert [told["stderr"] for told in heard] == [b"", b"to stderr", b"", b""]

    def test_a_listener_hears_what_a_step_prints_while_it_goes_on(self, kind: Kind) -> None:
        heard: list[bytes] = []

        class OnceHeard:
            """Ends the step when something was heard: before that it has minutes to go."""

            def is_set(self) -> bool:
                return bool(heard)

        ref = kind.ref()
        with kind.boundary.open(make_spec(), ref, cancelled=OnceHeard()) as sandbox:
            execution = sandbox.execute(kind.talks("first", 300, "second"), listener=lambda _, text: heard.append(text))
        kind.boundary.destroy(ref)
        assert (execution.ended, b"".join(heard)) == (Ended.CANCELLED, b"first")
        assert execution.stdout.data == b"first"

    def test_a_run_that_prints_64_times_its_output_is_ended(self, kind: Kind) -> None:
        ref = kind.ref()
        with kind.boundary.open(make_spec(output=64 * 1024), ref, cancelled=Never()) as sandbox:
            allowed = sandbox.execute(kind.floods(63 * 64 * 1024))
            ended = sandbox.execute(kind.floods(8 * 2**20))
        kind.boundary.destroy(ref)
        assert (allowed.ended, allowed.limits) == (Ended.EXITED, frozenset())
        assert ended.ended is Ended.LIMIT
        assert Limit.OUTPUT in ended.limits
        assert not ended.sandbox_alive

    def test_a_timeout_is_a_result_and_the_sandbox_lives_on(self, kind: Kind) -> None:
        ref = kind.ref()
        with kind.boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            late = sandbox.execute(kind.sleeps(30, timeout_s=0.3))
            after = sandbox.execute(kind.prints("still here"))
        kind.boundary.destroy(ref)
        assert (late.ended, late.exit_code, late.signal) == (Ended.STEP_TIMEOUT, None, None)
        assert 0.3 <= late.duration_s < 1.0
        assert late.sandbox_alive
        assert after.stdout.data == b"still here"

    def test_a_background_child_that_holds_stdout_delays_nothing(self, kind: Kind) -> None:
        ref = kind.ref()
        with kind.boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            started = time.monotonic()
            left = sandbox.execute(kind.leaves_a_child_holding_stdout("early"))
            took_s = time.monotonic() - started
            after = sandbox.execute(kind.prints("mine alone"))
        kind.boundary.destroy(ref)
        assert (left.ended, left.exit_code, left.stdout.data) == (Ended.EXITED, 0, b"early")
        assert took_s < 2
        assert after.stdout.data == b"mine alone"

    def test_a_cancelled_run_ends_at_once(self, kind: Kind) -> None:
        ref = kind.ref()
        with kind.boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            assert sandbox.execute(kind.exits(0)).exit_code == 0
        kind.boundary.destroy(ref)
        ref = kind.ref()
        cancelled = Cancelled(after_s=60)
        with kind.boundary.open(make_spec(), ref, cancelled=cancelled) as sandbox:
            cancelled._at = time.monotonic() + (0.3 if kind.installation != "fake" else 0)
            started = time.monotonic()
            ended = sandbox.execute(kind.sleeps(30, timeout_s=20))
            took_s = time.monotonic() - started
        kind.boundary.destroy(ref)
        assert ended.ended is Ended.CANCELLED
        assert took_s < 2


class TestCollecting:
    def test_what_was_written_is_collected_with_its_digest(self, kind: Kind) -> None:
        ref, sink = kind.ref(), Sink()
        with kind.boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            sandbox.execute(kind.writes("out/report.txt", "done"))
            sandbox.execute(kind.writes("private.txt", "not asked for"))
            limits = artifact_limits(expected=("out/report.txt", "absent.txt"))
            found = sandbox.collect(["out/**"], limits=limits, sink=sink)
        kind.boundary.destroy(ref)
        assert [artifact.path for artifact in found.kept] == ["out/report.txt"]
        assert sink.stored[found.kept[0].sha256] == b"done"
        assert found.expected["out/report.txt"].data == b"done"
        assert found.expected["absent.txt"].data is None
        assert found.expected["absent.txt"].absent_why == "absent"

    def test_nothing_runs_during_or_after_collect(self, kind: Kind) -> None:
        ref = kind.ref()
        with kind.boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            sandbox.execute(kind.leaves_a_child_holding_stdout("x"))
            assert kind.running(ref)
            sandbox.collect([], limits=artifact_limits(), sink=Sink())
            assert not kind.running(ref)
            with pytest.raises(BoundaryError):
                sandbox.execute(kind.exits(0))
            with pytest.raises(BoundaryError):
                sandbox.collect([], limits=artifact_limits(), sink=Sink())
        kind.boundary.destroy(ref)

    def test_artifacts_beyond_the_limit_are_skipped_and_said(self, kind: Kind) -> None:
        ref, sink = kind.ref(), Sink()
        with kind.boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            sandbox.execute(kind.writes("out/a", "12345"))
            sandbox.execute(kind.writes("out/b", "12345"))
            found = sandbox.collect(["out/*"], limits=artifact_limits(total_bytes=8), sink=sink)
        kind.boundary.destroy(ref)
        assert [artifact.path for artifact in found.kept] == ["out/a"]
        assert [(skipped.path, skipped.why.split(":")[0]) for skipped in found.skipped] == [("out/b", "too large")]


class TestLife:
    def test_discover_finds_what_open_made_and_nothing_afterwards(self, kind: Kind) -> None:
        ref = kind.ref()
        elsewhere = kind.another_process()
        assert list(elsewhere.discover()) == []
        with kind.boundary.open(make_spec(), ref, cancelled=Never()):
            assert list(elsewhere.discover()) == [kind.as_discovered(ref)]
        assert list(elsewhere.discover()) == [kind.as_discovered(ref)]
        kind.boundary.destroy(ref)
        assert list(elsewhere.discover()) == []

    def test_destroying_twice_or_what_never_was_is_success(self, kind: Kind) -> None:
        ref = kind.ref()
        kind.boundary.destroy(ref)
        with kind.boundary.open(make_spec(), ref, cancelled=Never()):
            pass
        kind.boundary.destroy(ref)
        kind.boundary.destroy(ref)
        assert list(kind.boundary.discover()) == []

    def test_another_process_can_destroy_a_living_boundary(self, kind: Kind) -> None:
        ref = kind.ref()
        with kind.boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
            sandbox.execute(kind.leaves_a_child_holding_stdout("x"))
            assert kind.running(ref)
            with suppress(BoundaryError):  # our descriptors hold its file system; dead, it goes when we let go
                kind.another_process().destroy(ref)
            assert not kind.running(ref)
            ended = sandbox.execute(kind.exits(0))
            assert (ended.ended, ended.sandbox_alive) == (Ended.LOST, False)
            sandbox.collect([], limits=artifact_limits(), sink=Sink())
        kind.boundary.destroy(ref)
        assert list(kind.boundary.discover()) == []

    def test_an_exception_inside_leaves_nothing_running(self, kind: Kind) -> None:
        ref = kind.ref()

        def fails_inside() -> None:
            with kind.boundary.open(make_spec(), ref, cancelled=Never()) as sandbox:
                sandbox.execute(kind.leaves_a_child_holding_stdout("x"))
                assert kind.running(ref)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fails_inside()
        assert not kind.running(ref)
        kind.boundary.destroy(ref)

    def test_a_name_is_made_once(self, kind: Kind) -> None:
        ref = kind.ref()
        with kind.boundary.open(make_spec(), ref, cancelled=Never()):
            pass
        with pytest.raises(ProvisionFailed), kind.boundary.open(make_spec(), ref, cancelled=Never()):
            pass
        assert list(kind.boundary.discover()) == [kind.as_discovered(ref)], (
            "the failed attempt must not undo what has the name"
        )
        kind.boundary.destroy(ref)

    def test_fences_of_one_run_are_different_boundaries(self, kind: Kind) -> None:
        old = kind.ref(fence=1)
        new = kind.ref(run_id=old.run_id, fence=2)
        with kind.boundary.open(make_spec(), old, cancelled=Never()):
            with kind.boundary.open(make_spec(), new, cancelled=Never()) as sandbox:
                kind.boundary.destroy(new.model_copy(update={"fence": 3}))
                assert sandbox.execute(kind.prints("new")).stdout.data == b"new"
            assert {ref.fence for ref in kind.boundary.discover()} == {1, 2}
        kind.boundary.destroy(old)
        kind.boundary.destroy(new)

    def test_a_killed_worker_leaves_a_guest_that_ends_by_itself_and_is_then_reaped(self, kind: Kind) -> None:
        ref = kind.ref()
        kind.worker_killed_in(ref)
        deadline = time.monotonic() + 5
        while kind.running(ref) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not kind.running(ref)
        assert list(kind.boundary.discover()) == [kind.as_discovered(ref)]
        kind.boundary.destroy(ref)
        assert list(kind.boundary.discover()) == []


def test_the_probe_says_what_can_be_built(kind: Kind) -> None:
    (row,) = kind.boundary.probe()
    assert row.available, row.missing
    assert row.boundary == "gvisor"
    assert row.runtimes["default"].startswith("sha256:")
    assert list(kind.boundary.discover()) == []
