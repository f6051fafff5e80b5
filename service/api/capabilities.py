"""GET /v1/capabilities: what this tenant can have now, and what it cannot and why."""

from fastapi import APIRouter

from service.api.auth import ACaller
from service.api.context import InContext
from service.api.documentation import problems
from service.api.schemas import CapabilitiesShown, OfferedBoundary, OfferedLimits, OfferedRuntime
from service.core.controls import PLATFORM_CEILINGS
from service.usecases.capabilities import show_capabilities

router = APIRouter(tags=["capabilities"])


@router.get(
    "/v1/capabilities",
    operation_id="getCapabilities",
    summary="What can be had now",
    responses=problems("unauthenticated", "forbidden", "not_found", "request_invalid"),
)
async def get_capabilities(context: InContext, caller: ACaller) -> CapabilitiesShown:
    """Every boundary that the platform knows, whether a live worker can build it, and for each that none can, why."""
    deps = context.deps
    shown = await context.store(
        show_capabilities, deps.tenants, deps.workers, tenant=caller.tenant, worker_fresh=deps.bounds.worker_fresh
    )
    return CapabilitiesShown(
        boundaries=[OfferedBoundary.model_validate(row, from_attributes=True) for row in shown.boundaries],
        runtimes=[OfferedRuntime(name=name, digest=digest) for name, digest in shown.runtimes],
        limits=OfferedLimits(
            ceilings=shown.ceilings.model_dump(mode="json"),
            defaults=shown.defaults.model_dump(mode="json"),
            platform=PLATFORM_CEILINGS.model_dump(mode="json"),
            upload_bytes=deps.bounds.upload_max_bytes,
            bundle_content_bytes=deps.archive_caps.total_bytes,
            bundle_entries=deps.archive_caps.entries,
        ),
        quota=shown.quota,
    )
