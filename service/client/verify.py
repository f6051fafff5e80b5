"""Whether a webhook is from Blastdoor: Standard Webhooks 1.0, by the library of its authors."""

import base64
from collections.abc import Iterable, Mapping
from typing import Any

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from service.client.errors import WebhookInvalid

_HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")


def verify_webhook(secrets: str | Iterable[str], headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """-> the CloudEvent, when one of the secrets (`whsec_...`) signed it, at most five minutes ago by our clock.

    `headers` in any case; `body` the bytes as they came, before anything parsed them. Give the old and the new secret
    while one is rotated. A webhook may come more than once: deduplicate on the event's `id`.

    Raises WebhookInvalid (answer 400 then), and ValueError for a secret that is none.
    """
    verifiers = [_verifier(secret) for secret in ([secrets] if isinstance(secrets, str) else secrets)]
    if not verifiers:
        raise ValueError("no secret to verify with")
    lowered = {str(name).lower(): str(value) for name, value in headers.items()}
    signed = {name: lowered[name] for name in _HEADERS if name in lowered}
    why: Exception = WebhookInvalid("no secret fits")
    for verifier in verifiers:
        try:
            event = verifier.verify(body, signed)
        except (WebhookVerificationError, ValueError) as error:  # ValueError: a header, or a body, that cannot be read
            why = error
            continue
        if not isinstance(event, dict):
            raise WebhookInvalid("the body is signed, but is no event")
        return event
    raise WebhookInvalid(f"not a webhook of ours: {why}") from why


def _verifier(secret: str) -> Webhook:
    """The library reads base64 leniently; a secret that lost a part on its way into a setting is better said."""
    encoded = secret.removeprefix("whsec_")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        key = b""
    if encoded == secret or not key:
        raise ValueError("this is no secret of a webhook; it looks like whsec_ and letters")
    return Webhook(secret)
