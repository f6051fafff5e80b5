"""Whether a webhook is from who holds the secret: what passes, and everything that must not."""

import base64
import json
from datetime import UTC, datetime, timedelta

import pytest
from standardwebhooks.webhooks import Webhook

from service.client import WebhookInvalid, verify_webhook

OLD, NEW = (f"whsec_{base64.b64encode(bytes([n]) * 32).decode()}" for n in (1, 2))
EVENT = {"id": "evt_1", "type": "dev.blastdoor.run.finished", "data": {"outcome": "passed", "text": "\u2028é"}}
BODY = json.dumps(EVENT, ensure_ascii=False).encode()


def signed(*secrets: str, body: bytes = BODY, at: datetime | None = None, id_: str = "evt_1") -> dict[str, str]:
    """The headers, as a sender with these secrets makes them."""
    moment = at or datetime.now(UTC)
    signatures = " ".join(Webhook(secret).sign(id_, moment, body.decode()) for secret in secrets)
    return {"webhook-id": id_, "webhook-timestamp": str(int(moment.timestamp())), "webhook-signature": signatures}


def test_what_the_secret_signed_is_the_event() -> None:
    assert verify_webhook(NEW, signed(NEW), BODY) == EVENT


def test_headers_may_be_in_any_case_and_beside_others() -> None:
    headers = {name.title(): value for name, value in signed(NEW).items()} | {"Content-Type": "application/json"}
    assert verify_webhook(NEW, headers, BODY) == EVENT


def test_while_a_secret_is_rotated_either_is_enough_on_either_side() -> None:
    assert verify_webhook(OLD, signed(NEW, OLD), BODY) == EVENT
    assert verify_webhook([NEW, OLD], signed(OLD), BODY) == EVENT
    assert verify_webhook([OLD, NEW], signed(NEW), BODY) == EVENT


def test_a_secret_that_was_rotated_away_is_none() -> None:
    with pytest.raises(WebhookInvalid):
        verify_webhook([NEW], signed(OLD), BODY)


@pytest.mark.parametrize("minutes", [-6, 6])
def test_an_old_recording_and_a_postdated_one_are_refused(minutes: int) -> None:
    with pytest.raises(WebhookInvalid, match="too"):
        verify_webhook(NEW, signed(NEW, at=datetime.now(UTC) + timedelta(minutes=minutes)), BODY)


@pytest.mark.parametrize(
    "change",
    [
        {"webhook-id": "evt_2"}, {"webhook-timestamp": str(int(datetime.now(UTC).timestamp()) + 60)},
        {"webhook-timestamp": "now"}, {"webhook-timestamp": "nan"}, {"webhook-signature": ""},
        {"webhook-signature": "v1"}, {"webhook-signature": "v1,%%%"}, {"webhook-signature": "v1,é"},
        {"webhook-signature": "v2,AAAA"}, {"webhook-signature": "v1,AAAA"},
    ],
    ids=" ".join,
)  # fmt: skip
def test_any_change_of_the_headers_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(WebhookInvalid):
        verify_webhook([NEW, OLD], signed(NEW) | change, BODY)


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_every_header_is_needed(name: str) -> None:
    headers = signed(NEW)
    del headers[name]
    with pytest.raises(WebhookInvalid):
        verify_webhook(NEW, headers, BODY)


@pytest.mark.parametrize("body", [BODY + b" ", BODY.replace(b"passed", b"failed"), b"", b"\xff"])
def test_any_change_of_the_body_is_refused(body: bytes) -> None:
    with pytest.raises(WebhookInvalid):
        verify_webhook(NEW, signed(NEW), body)


@pytest.mark.parametrize("body", [b"[]", b"nonsense", b"3"])
def test_what_is_signed_but_no_event_is_refused(body: bytes) -> None:
    with pytest.raises(WebhookInvalid):
        verify_webhook(NEW, signed(NEW, body=body), body)


@pytest.mark.parametrize("secrets", [[], "", "whsec_", "secret", "whsec_!", [NEW, "bd_t_x"]])
def test_a_secret_that_is_none_is_the_caller_s_mistake_and_never_passes(secrets: str | list[str]) -> None:
    with pytest.raises(ValueError, match="secret"):
        verify_webhook(secrets, signed(NEW), BODY)
