"""The application, built from what the composition root hands in. Nothing happens here before the server starts it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from service.api import admin, capabilities, downloads, errors, following, health, operations, runs, tenants, webhooks
from service.api.context import Context, Deps
from service.api.frame import Frame

DESCRIPTION = (
    "Runs code that nobody trusts behind a wall made for that one run. Times are RFC 3339 UTC, fields that end in "
    "`_s` are seconds, sizes are bytes; errors are RFC 9457 problems with a stable `code`."
)


def build(deps: Deps) -> FastAPI:
    """Its context is at `app.state.context`."""
    context = Context(deps)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with context.running():
            yield

    app = FastAPI(
        title="Blastdoor", summary="Untrusted code in short-lived boundaries", description=DESCRIPTION,
        version=deps.version, lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    app.state.context = context
    errors.install(app)
    app.add_middleware(Frame, bounds=deps.bounds, metrics=deps.metrics)
    for part in (runs, following, downloads, capabilities, tenants, webhooks, admin, operations, health):
        app.include_router(part.router)
    return app
