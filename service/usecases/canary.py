"""Keeps canary runs going through the whole pipeline: submitted as any other run, by a tenant of the platform's own.

Its runs appear in no list, on no bus, in no webhook and in nobody's quota; all but the newest are deleted.
"""

from contextlib import suppress
from datetime import timedelta

from service.core.canary import CANARY_TENANT, SCENARIO, due
from service.core.errors import Conflict
from service.core.ports.tenants import Canaries
from service.core.tenancy import Quota, Tenant
from service.intake.multipart import Upload
from service.usecases.submit import Submitting, submit

KEPT = 2
"""The newest that passed, and the one before."""


def enrol(world: Submitting) -> None:
    """Make the canaries' tenant: untrusted, since that is the wall that has to stand."""
    with suppress(Conflict):  # it is there already
        world.tenants.create_tenant(Tenant(name=CANARY_TENANT, quota=Quota(concurrent=1, queued=1)))


def send(world: Submitting, canaries: Canaries, *, every: timedelta, fresh: timedelta) -> str | None:
    """Submit the next one when it is due, and forget the old. -> its id. Raises what submission raises: above all
    PlacementRefused while no worker could build its wall."""
    if not due(canaries.canary_view(fresh=fresh), every=every):
        return None
    for run_id in canaries.old_canaries(keep=KEPT):
        with suppress(Conflict):  # unfinished after all
            world.runs.delete_run(run_id, CANARY_TENANT)
    return submit(world, tenant=CANARY_TENANT, upload=Upload(scenario=SCENARIO)).run.id
