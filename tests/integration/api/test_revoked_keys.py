"""A key that is revoked ends what was opened with it, and nothing else."""

from collections.abc import Iterator

import httpx
import pytest

from service.core.errors import Unavailable
from tests.integration.api.conftest import DATABASES, Served
from tests.integration.api.test_events import Played, output
from tests.scenes import eventually
from tests.sse import watching

on_both_databases = pytest.mark.parametrize("settings", DATABASES, indirect=True)


@pytest.fixture
def played(served: Served) -> Played:
    served.app.state.context.keys.look_again_s = 0.05
    played = Played(served)
    played.run()
    return played


@pytest.fixture
def second_key(served: Served) -> Iterator[tuple[str, httpx.Client]]:
    made = served.client("operator").post("/v1/admin/tenants/acme/keys").json()
    headers = {"Authorization": f"Bearer {made['key']}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=30, trust_env=False) as client:
        yield made["id"], client


@on_both_databases
def test_a_silent_stream_ends_soon_after_its_key_was_revoked_and_those_of_others_go_on(
    served: Served, played: Played, second_key: tuple[str, httpx.Client]
) -> None:
    key_id, revoked = second_key
    with watching(served.client("acme"), played.id) as others, watching(revoked, played.id) as events:
        assert [next(events).event, next(events).event, next(events).event] == ["phase"] * 3
        served.client("operator").delete(f"/v1/admin/tenants/acme/keys/{key_id}").raise_for_status()
        assert list(events) == [], "it ends, and the run does not"
        played.say(output(1, "still told"))
        assert [next(others).event for _ in range(4)][-1] == "output"

    assert revoked.get(f"/v1/runs/{played.id}/events").status_code == 401
    assert served.client("acme").get(f"/v1/runs/{played.id}").json()["phase"] == "running"


def test_a_stream_that_always_has_more_to_tell_ends_as_well(
    served: Served, played: Played, second_key: tuple[str, httpx.Client]
) -> None:
    key_id, revoked = second_key
    told = 0
    with watching(revoked, played.id) as events:
        next(events)
        served.client("operator").delete(f"/v1/admin/tenants/acme/keys/{key_id}").raise_for_status()
        for k in range(1, 2000):
            played.say(output(k, "more"))
            if not any(event.event == "output" for event in _some(events)):
                break
            told += 1

    assert told < 1999


def _some(events: Iterator) -> Iterator:  # type: ignore[type-arg]
    """The next event, if the stream goes on."""
    event = next(events, None)
    while event is not None and event.event != "output":
        event = next(events, None)
    if event is not None:
        yield event


def test_a_deleted_tenants_streams_end(served: Served, played: Played) -> None:
    with watching(served.client("acme"), played.id) as events:
        next(events)
        served.client("operator").delete("/v1/admin/tenants/acme").raise_for_status()
        assert [event.event for event in events if event.event == "result"] == []


def test_a_store_that_does_not_answer_revokes_no_key(
    served: Served, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def find_key(hash_: str) -> None:
        asked.append(hash_)
        raise Unavailable("away")

    with watching(served.client("acme"), played.id) as events:
        seen = [next(events) for _ in range(3)]
        with monkeypatch.context() as patch:
            patch.setattr(served.app.state.context.deps.tenants, "find_key", find_key)
            eventually(lambda: len(asked) > 2)
            played.say(output(1, "after all"))
            seen.append(next(events))

    assert seen[-1].event == "output"
