"""`limits.files` in a pod, where no file system keeps it: counted outside the guest, and the run is ended above it."""

from collections.abc import Iterator

import pytest

from service.core.boundary import Ended, Execution, Limit, Share
from tests.cluster.namespaces import NamespaceKind, Site, sweep
from tests.sandboxes import Never, Sink, artifact_limits, make_spec, shell
from workers.boundaries.namespace.driver import NamespaceBoundary

FILES = 64


@pytest.fixture(scope="module")
def boundary(site: Site) -> Iterator[NamespaceBoundary]:
    boundary = NamespaceBoundary(site.host())
    boundary.listener.address()
    yield boundary
    for ref in boundary.discover():  # all at once: a namespace takes five seconds to go
        if ref.variant != "runc":
            site.ready.engine.delete("Namespace", ref.name)
    assert sweep(boundary, site.ready) == []


@pytest.fixture(params=["runc", "gvisor"])
def kind(request: pytest.FixtureRequest, boundary: NamespaceBoundary) -> NamespaceKind:
    return NamespaceKind(boundary, request.param)


def played(kind: NamespaceKind, *commands: str) -> list[Execution]:
    spec = make_spec(files=FILES).model_copy(update={"share": Share(runs=16)})  # of a tenant whose pods still end
    with kind.boundary.open(spec, kind.ref(), cancelled=Never()) as sandbox:
        steps = [sandbox.execute(shell(command, timeout_s=30)) for command in commands]
        sandbox.collect([], limits=artifact_limits(), sink=Sink())
    return steps


def making(files: int, then: str) -> str:
    """In /work and /tmp together: half of them directories."""
    half = files // 2
    each = f"i=0; while [ $i -lt {half} ]; do mkdir d$i; : > /tmp/f$i; i=$((i+1)); done"
    return f"{each}; {then}"


def test_as_many_files_as_are_allowed_are_allowed_and_more_that_are_gone_again(kind: NamespaceKind) -> None:
    """The control: the very last one is no more than the limit, for as long as somebody might look."""
    churn = "rm -r d0; i=0; while [ $i -lt 300 ]; do : > /tmp/f; rm /tmp/f; i=$((i+1)); done; exit 5"
    made, after = played(kind, making(FILES, "sleep 0.5; exit 3"), churn)
    assert (made.ended, made.exit_code, made.limits) == (Ended.EXITED, 3, frozenset())
    assert (after.ended, after.exit_code, after.limits) == (Ended.EXITED, 5, frozenset())


def test_a_run_with_more_files_is_ended_while_it_goes_on(kind: NamespaceKind) -> None:
    made, after = played(kind, making(FILES + 2, "trap '' TERM; sleep 25; exit 0"), "echo still here")
    assert (made.ended, made.exit_code, made.limits) == (Ended.LIMIT, None, {Limit.FILES})
    assert made.duration_s < 15
    assert not made.sandbox_alive
    assert after.stdout.data == b"", "nothing runs after it"


def test_a_step_that_ends_with_more_files_has_not_passed(kind: NamespaceKind) -> None:
    (made,) = played(kind, making(FILES + 2, "exit 0"))
    assert (made.ended, made.exit_code, made.limits) == (Ended.LIMIT, None, {Limit.FILES})
