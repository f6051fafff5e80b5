"""The fakes that misbehave do so as their names say."""

import pytest

from service.core.boundary import Ended
from service.core.errors import NotYetDestroyed, ProvisionFailed
from tests.sandboxes import Never, make_ref, make_spec, make_step
from workers.boundaries.fake import (
    DyingBoundary,
    FakeBoundary,
    NeverReadyBoundary,
    ResistingBoundary,
    SlowBoundary,
)


def test_the_slow_one_takes_its_time() -> None:
    slept: list[float] = []
    boundary = SlowBoundary(sleep=slept.append)
    with boundary.open(make_spec(), make_ref(installation="fake"), cancelled=Never()):
        assert slept == [boundary.open_s]


def test_the_one_that_is_never_ready_leaves_nothing() -> None:
    boundary = NeverReadyBoundary()
    ref = make_ref(installation="fake")
    with pytest.raises(ProvisionFailed), boundary.open(make_spec(), ref, cancelled=Never()):
        pass
    assert list(boundary.discover()) == []


def test_the_dying_one_is_lost_in_its_first_step_and_stays_so() -> None:
    with DyingBoundary().open(make_spec(), make_ref(installation="fake"), cancelled=Never()) as sandbox:
        lost, again = sandbox.execute(make_step("exit", "0")), sandbox.execute(make_step("exit", "0"))
    assert (lost.ended, lost.sandbox_alive, again.ended) == (Ended.LOST, False, Ended.LOST)


def test_the_resisting_one_gives_in_after_its_refusals() -> None:
    boundary = ResistingBoundary()
    ref = make_ref(installation="fake")
    with boundary.open(make_spec(), ref, cancelled=Never()):
        pass
    for _ in range(boundary.refusals):
        with pytest.raises(NotYetDestroyed):
            boundary.destroy(ref)
    boundary.destroy(ref)
    assert list(boundary.discover()) == []


def test_no_registry_offers_a_fake() -> None:
    from workers.registry import DRIVERS

    assert not any("fake" in driver for driver in DRIVERS.values())
    assert FakeBoundary().kind in DRIVERS
