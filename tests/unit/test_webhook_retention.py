"""A webhook's deliveries are given up by their age, in batches, and by themselves."""

from datetime import timedelta

import pytest

from service.adapters.memory import MemoryBlobs, MemoryStore
from service.core.webhooks.models import Owner, SealedEndpoint, Settlement
from service.core.webhooks.schedule import State
from service.usecases import retention
from service.usecases.retention import purge
from tests.contract.store_steps import add_run, add_tenant

ACME = Owner(tenant="acme")
AT_ONCE, LONG = timedelta(0), timedelta(days=1)


def test_what_was_delivered_long_ago_goes_in_batches_and_what_waits_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_BATCH", 2)
    store, blobs = MemoryStore(), MemoryBlobs()
    add_tenant(store)
    made = SealedEndpoint(id="whk_1", owner=ACME, url="https://a.example/", types=("*",), secret="x")
    store.add_endpoint(made, most=1)
    for _ in range(6):
        add_run(store)
    store.fan_out(limit=9)
    claimed = store.claim_deliveries({"whk_1": 5}, lease=LONG)
    store.settle_deliveries(
        [
            Settlement(
                delivery_id=one.delivery_id, endpoint_id="whk_1", fence=one.fence, state=State.DELIVERED, status=200,
                error=None,
            )
            for one in claimed
        ]
    )  # fmt: skip

    assert purge(store, blobs, deliveries_older_than=LONG).deliveries == 0
    assert purge(store, blobs, deliveries_older_than=AT_ONCE, dry_run=True).deliveries == 5
    assert len(store.list_attempts("whk_1", ACME, limit=9, before=None).items) == 5
    assert purge(store, blobs, deliveries_older_than=AT_ONCE).deliveries == 5
    page = store.list_attempts("whk_1", ACME, limit=9, before=None)
    assert (page.items, page.pending) == ((), 1)
