"""/v1/webhooks: where events are delivered to, and how that went. A tenant's endpoints hear of its own runs; a
service's, made with its key and no tenant, of all its tenants'."""

import re
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from service.api.acting import acting
from service.api.auth import AnOperator, AnOwner
from service.api.context import InContext
from service.api.documentation import problems
from service.api.schemas import CreateWebhook, DeadLettersShown, DeliveryPage, Replayed, WebhookCreated, WebhookPage
from service.core.errors import DocumentInvalid
from service.core.webhooks.models import Endpoint
from service.usecases import webhooks

router = APIRouter(tags=["webhooks"])
_KEY = ("unauthenticated", "forbidden", "not_found")
_ATTEMPT = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)
_DELIVERY = re.compile(r"dlv_[0-9a-f]{32}", re.ASCII)
ById = Annotated[str, Path(description="the webhook's id")]
ByDelivery = Annotated[str, Path(description="the delivery's id, as the log has it")]
Limit = Annotated[int, Query(ge=1, le=100)]
Cursor = Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before")]


@router.post(
    "/v1/webhooks", status_code=201, operation_id="createWebhook", summary="Add an endpoint",
    responses=problems(*_KEY, "request_invalid", "not_configured", "quota_exceeded", "too_large", "upload_timed_out"),
)  # fmt: skip
async def create_webhook(context: InContext, owner: AnOwner, body: CreateWebhook) -> WebhookCreated:
    """Its address is judged now and again at each delivery. The secret is shown once."""
    deps = context.deps
    webhooks.require(deps.secret_box)
    target = webhooks.judged_url(body.url, excepted=deps.webhook_allow)
    if target.address is None:
        webhooks.judge_resolved(target, await context.resolve(target.host, target.port))
    made = await context.store(
        webhooks.create_webhook,
        deps.webhooks,
        deps.secret_box,
        owner=owner,
        url=body.url,
        types=[str(type_) for type_ in body.types],
    )
    return WebhookCreated(**dict(made.endpoint), secret=made.secret)


@router.get("/v1/webhooks", operation_id="listWebhooks", summary="List the endpoints", responses=problems(*_KEY))
async def list_webhooks(context: InContext, owner: AnOwner) -> WebhookPage:
    return WebhookPage(items=list(await context.store(context.deps.webhooks.list_endpoints, owner)))


@router.get(
    "/v1/webhooks/{webhook_id}", operation_id="getWebhook", summary="Read an endpoint", responses=problems(*_KEY)
)
async def get_webhook(context: InContext, owner: AnOwner, webhook_id: ById) -> Endpoint:
    return await context.store(context.deps.webhooks.get_endpoint, webhook_id, owner)


@router.delete(
    "/v1/webhooks/{webhook_id}", status_code=204, operation_id="deleteWebhook", summary="Remove an endpoint",
    responses=problems(*_KEY), response_class=Response,
)  # fmt: skip
async def delete_webhook(context: InContext, owner: AnOwner, webhook_id: ById) -> None:
    """With its deliveries and their log."""
    await context.store(context.deps.webhooks.delete_endpoint, webhook_id, owner)


@router.post(
    "/v1/webhooks/{webhook_id}/rotate", operation_id="rotateWebhook", summary="Replace the secret",
    responses=problems(*_KEY, "not_configured"),
)  # fmt: skip
async def rotate_webhook(context: InContext, owner: AnOwner, webhook_id: ById) -> WebhookCreated:
    """Deliveries are signed with both secrets for 24 h."""
    deps = context.deps
    made = await context.store(
        webhooks.rotate_webhook, deps.webhooks, deps.secret_box, endpoint_id=webhook_id, owner=owner
    )
    return WebhookCreated(**dict(made.endpoint), secret=made.secret)


@router.get(
    "/v1/webhooks/{webhook_id}/deliveries", operation_id="listDeliveries", summary="The log of attempts",
    responses=problems(*_KEY, "request_invalid"),
)  # fmt: skip
async def list_deliveries(
    context: InContext, owner: AnOwner, webhook_id: ById, limit: Limit = 50, cursor: Cursor = None
) -> DeliveryPage:
    """Newest first; one line an attempt."""
    before = None if cursor is None else int(_read(cursor, _ATTEMPT))
    page = await context.store(context.deps.webhooks.list_attempts, webhook_id, owner, limit=limit, before=before)
    following = None if page.next_before is None else str(page.next_before)
    return DeliveryPage(items=list(page.items), next_cursor=following, pending=page.pending)


@router.post(
    "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}/replay", status_code=202, operation_id="replayDelivery",
    summary="Deliver once more", responses=problems(*_KEY, "webhook_disabled"),
)  # fmt: skip
async def replay_delivery(context: InContext, owner: AnOwner, webhook_id: ById, delivery_id: ByDelivery) -> Replayed:
    """At once, and with a whole schedule before it. The same `webhook-id` goes with it."""
    deps = context.deps
    endpoint = await context.store(
        webhooks.replay, deps.webhooks, deps.hints, delivery_id=delivery_id, endpoint_id=webhook_id, owner=owner
    )
    return Replayed(id=delivery_id, webhook_id=endpoint)


@router.get(
    "/v1/admin/dead-letters", tags=["operators"], operation_id="adminListDeadLetters",
    summary="Deliveries that were given up", responses=problems("unauthenticated", "forbidden", "request_invalid"),
)  # fmt: skip
async def list_dead_letters(
    context: InContext, operator: AnOperator, limit: Limit = 50, cursor: Cursor = None
) -> DeadLettersShown:
    """Of all owners, newest first."""
    before = None if cursor is None else _read(cursor, _DELIVERY)
    page = await context.store(context.deps.webhooks.dead_letters, limit=limit, before=before)
    return DeadLettersShown(items=list(page.items), next_cursor=page.next_before)


@router.post(
    "/v1/admin/dead-letters/{delivery_id}/replay", status_code=202, tags=["operators"],
    operation_id="adminReplayDeadLetter", summary="Deliver once more", responses=problems(*_KEY, "webhook_disabled"),
)  # fmt: skip
async def replay_dead_letter(context: InContext, operator: AnOperator, delivery_id: ByDelivery) -> Replayed:
    deps = context.deps
    replay = partial(webhooks.replay, deps.webhooks, deps.hints, delivery_id=delivery_id, endpoint_id=None, owner=None)
    endpoint = await acting(context, operator, "dead_letter.replay", delivery_id, replay)
    return Replayed(id=delivery_id, webhook_id=endpoint)


def _read(cursor: str, form: re.Pattern[str]) -> str:
    """Not signed: it says only where in the caller's own list to go on. One spelling is read."""
    if not form.fullmatch(cursor):
        row = {"path": "query.cursor", "message": "should be a next_cursor as it was given"}
        raise DocumentInvalid("request", [row])
    return cursor
