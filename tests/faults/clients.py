"""The callers: they submit, ask, cancel now and then, and try what is not theirs. What they are told is written down.

A request whose answer was lost is sent again with the same Idempotency-Key until it is answered, as api.md says;
under a new one when the old one stays taken.
"""

import json
import random
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.faults.recorder import Recorder

_ID, _TOKEN = re.compile(r"run_[0-9a-f]{32}"), re.compile(r"token-[0-9a-f]{12}")
_TIMEOUT_S, _GIVE_UP_S, _INSISTS_S = 10.0, 3.0, 180.0
_CANCELLED_SHARE, _ASKED_SHARE = 0.06, 0.5


class Clients:
    """One for each tenant."""

    def __init__(self, url: str, keys: Mapping[str, str], recorder: Recorder, *, seed: int) -> None:
        self._http = {
            tenant: httpx.Client(
                base_url=url, headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=_TIMEOUT_S
            )
            for tenant, key in keys.items()
        }
        self._recorder, self._seed = recorder, seed
        self.accepted: dict[str, str] = {}
        """Run to tenant."""

    def load(self, runs: int, *, pace_s: float) -> None:
        """As many of each tenant, side by side: `pace_s` between two runs of all together. Raises what one of them
        raised."""
        tenants = sorted(self._http)
        shares = [len(range(n, runs, len(tenants))) for n in range(len(tenants))]
        with ThreadPoolExecutor(len(tenants)) as pool:
            loads = [
                pool.submit(self._load, tenant, share, pace_s=pace_s * len(tenants))
                for tenant, share in zip(tenants, shares, strict=True)
            ]
            for load in loads:
                load.result()

    def _load(self, tenant: str, runs: int, *, pace_s: float) -> None:
        chance, began = random.Random(f"{self._seed}/{tenant}"), time.monotonic()
        for n in range(runs):
            time.sleep(max(0.0, began + n * pace_s - time.monotonic()))
            token, works_s = f"token-{chance.getrandbits(48):012x}", chance.uniform(0.02, 0.3)
            run = self.submit(tenant, key=f"key-{n}", token=token, works_s=works_s)
            if chance.random() < _CANCELLED_SHARE:
                self._send(tenant, "POST", f"/v1/runs/{run}/cancel", about=run)
            if chance.random() < _ASKED_SHARE:
                self._ask_about(chance.choice(list(self.accepted)))

    def submit(self, tenant: str, *, key: str, token: str, works_s: float = 0.1) -> str:
        """-> the id of the run, however long it takes to be told."""
        steps = [
            {"name": "say", "run": ["printf", token]},
            {"name": "work", "run": ["sleep", f"{works_s:.2f}"]},
        ]
        scenario = json.dumps({"name": "under faults", "steps": steps}).encode()
        in_flight_since: float | None = None
        deadline = time.monotonic() + _INSISTS_S
        while True:
            assert time.monotonic() < deadline, f"nobody accepts {key}"
            answer = self._send(
                tenant, "POST", "/v1/runs", files={"scenario": ("scenario.json", scenario)},
                headers={"Idempotency-Key": key},
            )  # fmt: skip
            if answer is not None and answer.status_code == 202:
                run = str(answer.json()["id"])
                self.accepted[run] = tenant
                self._recorder.add("accepted", run=run, tenant=tenant, key=key, token=token)
                return run
            if answer is not None and answer.status_code == 409:
                in_flight_since = in_flight_since or time.monotonic()
            if in_flight_since is not None and time.monotonic() - in_flight_since > _GIVE_UP_S:
                # Whoever held the key died before it had stored anything: it is free again after minutes.
                key, in_flight_since = f"{key}+", None
            assert answer is None or answer.status_code >= 500 or answer.status_code in (409, 429), answer.text
            time.sleep(0.2)

    def read_all(self) -> None:
        """At the end: each by its owner, some by a stranger too, and both lists."""
        for n, (run, owner) in enumerate(self.accepted.items()):
            self._send(owner, "GET", f"/v1/runs/{run}", about=run)
            if n % 5 == 0:
                self._ask_about(run)
        for tenant in self._http:
            self._send(tenant, "GET", "/v1/runs?limit=100")

    def close(self) -> None:
        for client in self._http.values():
            client.close()

    def _ask_about(self, run: str) -> None:
        for tenant in self._http:
            self._send(tenant, "GET", f"/v1/runs/{run}", about=run)

    def _send(
        self, tenant: str, method: str, path: str, *, about: str | None = None, **more: Any
    ) -> httpx.Response | None:
        """None when there was no answer."""
        asked_at = time.time()
        try:
            answer = self._http[tenant].request(method, path, **more)
        except httpx.HTTPError:
            return None
        body = answer.json() if answer.headers.get("content-type", "").startswith("application/json") else {}
        shown = {name: body.get(name) for name in ("phase", "outcome", "reason")} if answer.is_success and about else {}
        if answer.status_code < 500:
            self._recorder.add(
                "answer", asker=tenant, asked_at=asked_at, status=answer.status_code, about=about,
                runs=sorted(set(_ID.findall(answer.text))), tokens=sorted(set(_TOKEN.findall(answer.text))), **shown,
            )  # fmt: skip
        return answer
