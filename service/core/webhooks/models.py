"""Endpoints, deliveries and attempts, as stores keep them and owners see them."""

from datetime import datetime, timedelta

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.core.events import EventType
from service.core.webhooks.schedule import Fault, State

ANY_TYPE = "*"
MOST_ENDPOINTS = 20
"""Of one owner."""
OLD_SECRET_SIGNS = timedelta(hours=24)
"""After a rotation, so that a receiver may change its own in its own time."""
EVENT_TYPES = tuple(str(type_) for type_ in EventType)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Owner(_Frozen):
    """A tenant, for its own events; or a service, for those of all its tenants."""

    tenant: str | None = None
    service_id: str | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "Owner":
        if (self.tenant is None) == (self.service_id is None):
            raise ValueError("an endpoint belongs to a tenant or to a service")
        return self


class Endpoint(_Frozen):
    """As its owner sees it: without its secret. `disabled_reason`: gone, when it has answered 410."""

    id: str
    url: str
    types: tuple[str, ...]
    enabled: bool = True
    disabled_reason: str | None = None
    created_at: datetime
    old_secret_until: datetime | None = Field(
        None, description="until then deliveries are signed with the secret before the last rotation, too"
    )


class SealedEndpoint(_Frozen):
    """A new endpoint for the store. `secret` is sealed: no store ever sees one in clear."""

    id: str
    owner: Owner
    url: str
    types: tuple[str, ...]
    secret: str = Field(repr=False)


class Attempt(_Frozen):
    """A line of the delivery log. `id` is the delivery's: what a replay names. `next_at`: when the next attempt was to
    be made, None after the last."""

    id: str
    event_id: str
    attempt: int
    at: datetime
    status: int | None
    error: str | None
    next_at: datetime | None
    duration_s: float
    type: str


class AttemptPage(_Frozen):
    """Newest first. `pending`: how many deliveries still wait, counted to 1000."""

    items: tuple[Attempt, ...]
    next_before: int | None
    pending: int


class DeadLetter(_Frozen):
    """A delivery that was given up: after its last attempt, or with its endpoint."""

    id: str
    webhook_id: str
    url: str
    tenant: str
    event_id: str
    type: str
    attempts: int
    at: datetime
    status: int | None
    error: str | None


class DeadLetterPage(_Frozen):
    items: tuple[DeadLetter, ...]
    next_before: str | None


class Due(_Frozen):
    """An endpoint for which something is to be sent now."""

    endpoint_id: str
    owner: Owner


class Claimed(_Frozen):
    """One delivery that may be attempted now, until its lease ends. `secrets` are sealed, the newest first. `body` is
    None when the event was purged. `at`: the database's clock. `tries`: attempts since its creation or last replay."""

    delivery_id: str
    endpoint_id: str
    fence: int
    tries: int
    at: datetime
    url: str
    secrets: tuple[str, ...] = Field(repr=False)
    event_id: str
    body: str | None = Field(repr=False)


class Settlement(_Frozen):
    """What came of a claimed delivery's attempt. `wait`: until the next one, for a pending one."""

    delivery_id: str
    endpoint_id: str
    fence: int
    state: State
    status: int | None
    error: Fault | None
    wait: timedelta | None = None
    disable: bool = False
    duration: timedelta = timedelta(0)
