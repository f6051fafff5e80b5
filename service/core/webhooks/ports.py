"""What webhooks ask of the world. As in `service.core.ports`: one adapter for production, one shipped fake."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Protocol

from service.core.webhooks.addresses import Address
from service.core.webhooks.models import (
    AttemptPage,
    Claimed,
    DeadLetterPage,
    Due,
    Endpoint,
    Owner,
    SealedEndpoint,
    Settlement,
)
from service.core.webhooks.schedule import Answer


class WebhookStore(Protocol):
    """Endpoints as their owners see them: what is another owner's is NotFound, as what never was."""

    def add_endpoint(self, endpoint: SealedEndpoint, *, most: int) -> Endpoint:
        """Raises QuotaExceeded when the owner has `most` already, NotFound when the owner is gone."""
        ...

    def list_endpoints(self, owner: Owner) -> Sequence[Endpoint]:
        """Oldest first."""
        ...

    def get_endpoint(self, endpoint_id: str, owner: Owner) -> Endpoint: ...

    def delete_endpoint(self, endpoint_id: str, owner: Owner) -> None:
        """With its deliveries and their log; what is being sent this moment may still arrive."""
        ...

    def rotate_secret(self, endpoint_id: str, owner: Owner, *, secret: str, old_signs: timedelta) -> Endpoint:
        """`secret` is sealed. The one it replaces signs too for `old_signs`; one before that no longer does."""
        ...

    def list_attempts(self, endpoint_id: str, owner: Owner, *, limit: int, before: int | None) -> AttemptPage: ...

    def replay_delivery(self, delivery_id: str, *, endpoint_id: str | None, owner: Owner | None) -> str:
        """Send it again at once, with a whole schedule before it; None for an operator, who may replay any. -> its
        endpoint's id. Raises Conflict(webhook_disabled)."""
        ...

    def dead_letters(self, *, limit: int, before: str | None) -> DeadLetterPage:
        """Newest first, of all owners."""
        ...


class Deliveries(Protocol):
    """The dispatcher's side. Any number of dispatchers may share one store."""

    def fan_out(self, *, limit: int) -> int:
        """Make a delivery of each committed event for each endpoint that wants it, once. -> how many events were looked
        at. Events of internal tenants never become any, nor those that are older than the endpoint."""
        ...

    def due_endpoints(self, *, not_now: Sequence[str], limit: int) -> Sequence[Due]:
        """Enabled endpoints that have something to be sent now, but for those of `not_now`; the longest due first. One
        read, whatever is pending."""
        ...

    def claim_deliveries(self, wanted: Mapping[str, int], *, lease: timedelta) -> Sequence[Claimed]:
        """Up to so many due deliveries of each endpoint, the oldest first. Nobody else gets them before the lease ends;
        then they are due again."""
        ...

    def settle_deliveries(self, settlements: Sequence[Settlement]) -> int:
        """Record attempts, in one transaction. -> how many were recorded: none of a delivery that was claimed again
        since, or deleted."""
        ...

    def delivery_counts(self) -> tuple[int, int]:
        """-> how many are pending, and how many dead."""
        ...

    def give_back_deliveries(self, claimed: Sequence[Claimed]) -> None:
        """They were not attempted, or not to the end: due again at once."""
        ...


class SecretBox(Protocol):
    """Encrypts what is kept. `unseal` raises BlastdoorError for what was sealed with a key that is no longer known."""

    def seal(self, plain: str) -> str: ...
    def unseal(self, sealed: str) -> str: ...


class Sender(Protocol):
    async def send(self, url: str, *, headers: Mapping[str, str], body: bytes) -> Answer:
        """POST it to where the URL leads now, if that may be sent to. What the other side does, or does not, is in
        the answer, within a bounded time; nothing of it is raised."""
        ...


class Resolver(Protocol):
    def __call__(self, host: str, port: int) -> Sequence[Address]:
        """Every address of the name, in the order to try them; blocks. Raises OSError when there is none."""
        ...
