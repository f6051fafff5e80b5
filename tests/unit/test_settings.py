"""What is refused at the start, because it would only be seen much later."""

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from service.logs import say_unknown
from service.settings import Settings, unknown_names


@pytest.mark.parametrize(
    "times",
    [
        {"heartbeat_s": 20}, {"heartbeat_s": 25}, {"self_fence_s": 30}, {"self_fence_s": 10}, {"lease_s": 20},
        {"lease_s": 3, "heartbeat_s": 1},
    ],
)  # fmt: skip
def test_a_worker_must_end_its_sandbox_before_its_lease_ends(times: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=r"heartbeat_s < self_fence_s < lease_s must hold"):
        Settings(**times)


def test_times_in_their_order_are_taken() -> None:
    assert Settings(lease_s=3, self_fence_s=2, heartbeat_s=1).lease_s == 3


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("BLASTDOOR_LEASE_SEC", "BLASTDOOR_LEASE_S"),
        ("BLASTDOOR_DATABASE_URI", "BLASTDOOR_DATABASE_URL"),
        ("BLASTDOOR_SECRET_KEY", "BLASTDOOR_SECRETS_KEY"),
        ("BLASTDOOR_CONCURRENCY", "BLASTDOOR_WORKER_CONCURRENCY"),
        ("blastdoor_redisurl", "BLASTDOOR_REDIS_URL"),
    ],
)
def test_a_misspelt_name_is_an_error_that_says_which_was_meant(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "30")
    with pytest.raises(ValidationError, match=f"{name} is no setting; did you mean {meant}\\?"):
        Settings()


def test_what_is_like_no_setting_is_said_and_what_clients_read_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes puts such names into every container beside a service called blastdoor."""
    for name in ("BLASTDOOR_SERVICE_HOST", "BLASTDOOR_URL", "BLASTDOOR_KEY", "BLASTDOOR_SERVICE_KEY", "BLASTDOOR_SITE"):
        monkeypatch.setenv(name, "x")

    Settings()

    assert [name for name in unknown_names() if name != "BLASTDOOR_TEST_REQUESTS"] == ["BLASTDOOR_SERVICE_HOST"]


def test_every_setting_is_known_by_its_own_name() -> None:
    assert unknown_names({f"BLASTDOOR_{name.upper()}": "" for name in Settings.model_fields}) == []


def test_an_error_shows_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLASTDOOR_REDIS_URL", "redis://:hunter2@127.0.0.1:6379/0")
    monkeypatch.setenv("BLASTDOOR_LEASE_S", "1")
    with pytest.raises(ValidationError) as refusal:
        Settings()

    assert "heartbeat_s" in str(refusal.value)
    assert "hunter2" not in str(refusal.value)


def test_what_is_unknown_is_said_in_the_log() -> None:
    with capture_logs() as logs:
        say_unknown(["BLASTDOOR_FOO"])

    assert logs == [{"event": "unknown_setting", "name": "BLASTDOOR_FOO", "log_level": "warning"}]
