"""What an operator does, written down before it is done."""

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import anyio

from service.api.context import Context
from service.core.tenancy import Principal
from service.usecases.audit import audited
from service.usecases.leftovers import finish_deletion

T = TypeVar("T")
_POLL_S = 0.2


async def acting(
    context: Context, who: Principal, what: str, target: str, act: Callable[[], T], *,
    detail: Mapping[str, Any] | None = None, result: Callable[[T], str] = lambda _: "done",
) -> T:  # fmt: skip
    """`act` calls the store, and is called once its entry in the audit log is committed. `detail`: no secrets."""
    return await context.store(
        audited, context.deps.custody, act, who=who.key_id, what=what, target=target, detail=detail, result=result
    )


async def purged(context: Context, name: str) -> None:
    """Wait a little until nothing of the deleted tenant is left; the relay finishes what takes longer."""
    deps, deadline = context.deps, time.monotonic() + context.deps.bounds.deletion_wait_s
    while not await context.store(finish_deletion, deps.leftovers, deps.blobs, name=name):
        if time.monotonic() > deadline:
            return
        await anyio.sleep(_POLL_S)
