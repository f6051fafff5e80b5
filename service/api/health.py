"""/healthz, /readyz, /openapi.json and /docs: open to all, so they say little and cost little."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from service.api.context import InContext
from service.api.documentation import PAGE_POLICY, openapi, page, problems
from service.api.errors import error_response
from service.api.schemas import Health, Ready
from service.core.errors import Unavailable

router = APIRouter(tags=["health"])


@router.get("/healthz", operation_id="getHealth", summary="The process answers")
async def get_health() -> Health:
    """Touches nothing: it says that the process is alive, not that it can do anything."""
    return Health(status="ok")


@router.get(
    "/readyz", operation_id="getReadiness", summary="Runs can be accepted and played", response_model=Ready,
    responses=problems("unavailable"),
)  # fmt: skip
async def get_readiness(request: Request, context: InContext) -> Ready | Response:
    """200 while the store and Redis answer, a live worker exists, and a canary run passed through the whole pipeline
    lately; a long queue is not unreadiness."""
    answers = {name: "ok" if passes else "failing" for name, passes in (await context.readiness.ask()).items()}
    if "failing" in answers.values():
        failing = ", ".join(name for name, answer in answers.items() if answer == "failing")
        error = Unavailable(f"not ready: {failing}")
        error.extra["checks"] = answers
        return error_response(request.scope, error=error)
    return Ready(status="ready", checks=answers)


@router.get("/openapi.json", include_in_schema=False)
async def get_openapi(request: Request) -> dict[str, object]:
    return dict(openapi(request.app))


@router.get("/docs", include_in_schema=False)
async def get_docs(request: Request) -> HTMLResponse:
    return HTMLResponse(page(openapi(request.app)), headers={"Content-Security-Policy": PAGE_POLICY})
