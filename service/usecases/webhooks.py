"""Webhooks as their owners make, rotate and watch them."""

import base64
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from service.core.errors import BlastdoorError, DocumentInvalid
from service.core.ids import new_id
from service.core.ports.publishing import Hints
from service.core.webhooks.addresses import Address
from service.core.webhooks.models import MOST_ENDPOINTS, OLD_SECRET_SIGNS, Endpoint, Owner, SealedEndpoint
from service.core.webhooks.ports import SecretBox, WebhookStore
from service.core.webhooks.urls import Pairs, Target, UrlRefused, judge_answers, judge_url

SECRET_PREFIX = "whsec_"  # noqa: S105 - the standard's, not a secret
_SECRET_BYTES = 32


class NotConfigured(BlastdoorError):
    """The operator has not set what this needs."""

    code = "not_configured"


@dataclass(frozen=True, kw_only=True)
class WithSecret:
    """An endpoint and its secret, which is shown this once."""

    endpoint: Endpoint
    secret: str = field(repr=False)


def judged_url(url: str, *, excepted: Pairs) -> Target:
    """Raises DocumentInvalid with `url` as the path."""
    try:
        return judge_url(url, excepted=excepted)
    except UrlRefused as refusal:
        raise _refused(str(refusal)) from refusal


def judge_resolved(target: Target, answers: Sequence[Address] | None) -> None:
    """What the name leads to now; None or nothing: it leads nowhere. Each delivery is judged again. Raises
    DocumentInvalid."""
    if not answers:
        raise _refused(f"should have a host name that resolves; {target.host} does not, at the moment")
    if why := judge_answers(target, answers):
        raise _refused(f"should not lead to {why}")


def create_webhook(
    store: WebhookStore, box: SecretBox | None, *, owner: Owner, url: str, types: Sequence[str]
) -> WithSecret:
    """`url` and what it resolves to have been judged. Raises NotConfigured, QuotaExceeded."""
    secret, sealed = _new_secret(box)
    endpoint = SealedEndpoint(id=new_id("whk"), owner=owner, url=url, types=tuple(types), secret=sealed)
    return WithSecret(endpoint=store.add_endpoint(endpoint, most=MOST_ENDPOINTS), secret=secret)


def rotate_webhook(store: WebhookStore, box: SecretBox | None, *, endpoint_id: str, owner: Owner) -> WithSecret:
    """The new secret; the one before it signs too for a day. Raises NotConfigured, NotFound."""
    secret, sealed = _new_secret(box)
    endpoint = store.rotate_secret(endpoint_id, owner, secret=sealed, old_signs=OLD_SECRET_SIGNS)
    return WithSecret(endpoint=endpoint, secret=secret)


def replay(store: WebhookStore, hints: Hints, *, delivery_id: str, endpoint_id: str | None, owner: Owner | None) -> str:
    """Send it again now; an operator (`owner=None`) may replay anybody's. -> its endpoint's id. Raises NotFound,
    Conflict(webhook_disabled)."""
    endpoint = store.replay_delivery(delivery_id, endpoint_id=endpoint_id, owner=owner)
    hints.hint("outbox", delivery_id)
    return endpoint


def require(box: SecretBox | None) -> SecretBox:
    """Raises NotConfigured. Asked first, so that nothing is judged or resolved in vain."""
    if box is None:
        raise NotConfigured(
            "webhooks are off: their secrets are kept encrypted, and the operator has set no BLASTDOOR_SECRETS_KEY"
        )
    return box


def _new_secret(box: SecretBox | None) -> tuple[str, str]:
    """-> it, and it sealed."""
    secret = SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode("ascii")
    return secret, require(box).seal(secret)


def _refused(message: str) -> DocumentInvalid:
    return DocumentInvalid("request", [{"path": "url", "message": message}])
