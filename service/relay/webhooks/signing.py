"""What is sent, and what proves who sends it: Standard Webhooks 1.0."""

import json
from collections.abc import Sequence

from standardwebhooks.webhooks import Webhook

from service.core.errors import BlastdoorError
from service.core.webhooks.models import Claimed
from service.core.webhooks.ports import SecretBox

CONTENT_TYPE = "application/cloudevents+json"


def signed_headers(claimed: Claimed, body: str, secrets: Sequence[str]) -> dict[str, str]:
    """`secrets` in clear, the newest first: each signs. The id is the event's and stays; the time is this attempt's."""
    signatures = (Webhook(secret).sign(claimed.event_id, claimed.at, body) for secret in secrets)
    headers = {
        "content-type": CONTENT_TYPE,
        "webhook-id": claimed.event_id,
        "webhook-timestamp": str(int(claimed.at.timestamp())),
        "webhook-signature": " ".join(signatures),
    }
    traceparent = json.loads(body).get("traceparent")
    return headers | ({"traceparent": str(traceparent)} if traceparent else {})


def unsealed(box: SecretBox, sealed: Sequence[str]) -> list[str]:
    """Those that can be read with the keys of today. Raises BlastdoorError when the newest cannot: what only an old
    secret has signed, a receiver may no longer take."""
    newest, *older = sealed
    found = [box.unseal(newest)]
    for secret in older:
        try:
            found.append(box.unseal(secret))
        except BlastdoorError:
            continue  # it would have signed for a day at most, and the newest does
    return found
