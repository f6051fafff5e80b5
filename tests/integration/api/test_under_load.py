"""Two hundred who wait cost nobody else anything, by comparison with the same server at rest."""

import asyncio
import statistics
import time

import httpx

from tests.integration.api.conftest import Served

WAITERS = 200
PROBES = 60


def test_two_hundred_waiters_slow_neither_health_nor_each_other(served: Served) -> None:
    served.client("operator").patch("/v1/admin/tenants/acme", json={"quota": {"queued": 1000}})
    runs = [served.submit()["id"] for _ in range(3)]
    asyncio.run(_play(served, runs))


async def _play(served: Served, runs: list[str]) -> None:
    headers = {"Authorization": f"Bearer {served.keys['acme']}"}
    limits = httpx.Limits(max_connections=WAITERS + 10)
    async with (
        httpx.AsyncClient(base_url=served.url, headers=headers, timeout=60, limits=limits) as many,
        httpx.AsyncClient(base_url=served.url) as prober,
    ):
        at_rest = await _median_s(prober)
        waiting = [asyncio.create_task(many.get(f"/v1/runs/{runs[n % len(runs)]}?wait=50")) for n in range(WAITERS)]
        notifier = served.app.state.context.notifier
        for _ in range(2000):
            if notifier.waiters == WAITERS:
                break
            await asyncio.sleep(0.01)
        assert notifier.waiters == WAITERS

        under_load = await _median_s(prober)
        assert under_load < 5 * at_rest + 0.002, (at_rest, under_load)

        for _ in runs:
            await asyncio.to_thread(served.play)
        answers = await asyncio.gather(*waiting)
        assert {answer.json()["phase"] for answer in answers} == {"finished"}
        assert notifier.waiters == 0


async def _median_s(client: httpx.AsyncClient) -> float:
    took = []
    for _ in range(PROBES):
        began = time.perf_counter()
        assert (await client.get("/healthz")).status_code == 200
        took.append(time.perf_counter() - began)
    return statistics.median(took)
