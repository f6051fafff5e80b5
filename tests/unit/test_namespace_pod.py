"""Who ended the first process of a pod, by what the node says of it."""

from copy import deepcopy
from typing import Any

import pytest

from workers.kube import Manifest
from workers.pods.pod import ended_from_within

KILLED_BY_ITS_GUEST: Manifest = {
    "metadata": {"name": "bd-x", "uid": "1"},
    "spec": {"runtimeClassName": "gvisor"},
    "status": {
        "phase": "Failed",
        "containerStatuses": [{"state": {"terminated": {"reason": "Error", "exitCode": 137}}}],
    },
}
"""As it was read on the lab after `kill -9 1`."""


def pod(**changed: Any) -> Manifest:
    found = deepcopy(KILLED_BY_ITS_GUEST)
    terminated = found["status"]["containerStatuses"][0]["state"]["terminated"]
    for key, value in changed.items():
        part = {"spec": found["spec"], "metadata": found["metadata"], "status": found["status"], "ended": terminated}
        where, _, name = key.partition("_")
        part[where].pop(name, None)
        if value is not None:
            part[where][name] = value
    return found


def test_a_first_process_that_a_signal_ended_was_ended_by_the_guest() -> None:
    assert ended_from_within(pod())
    assert ended_from_within(pod(ended_exitCode=139))


@pytest.mark.parametrize(
    "changed",
    [
        {"ended_reason": "OOMKilled"},
        {"ended_exitCode": 128},  # the sandbox died as a whole
        {"ended_exitCode": 70},  # our own program gave up
        {"ended_reason": "ContainerStatusUnknown"},
        {"status_reason": "Evicted"},
        {"status_reason": "DeadlineExceeded"},
        {"metadata_deletionTimestamp": "2026-01-01T00:00:00Z"},
        {"spec_runtimeClassName": None},  # on the node's own kernel no guest can
    ],
    ids=str,
)
def test_what_somebody_else_may_have_done_is_not_the_guests(changed: dict[str, Any]) -> None:
    assert not ended_from_within(pod(**changed))


def test_one_that_runs_was_ended_by_nobody() -> None:
    running = pod()
    running["status"]["containerStatuses"][0]["state"] = {"running": {}}
    assert not ended_from_within(running)
