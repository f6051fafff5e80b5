"""How long a line that a guest prints takes to whoever watches the run by server-sent events.

The line is the guest's own clock, read just before it is printed. gVisor keeps that clock in step with the host's; what
it is off by is bounded from one side here (no line may come before it was printed), and is microseconds. The guest
prints at uneven intervals, so that no period of ours hides or shows.
"""

import http.client
import json
import os
import time
from collections.abc import Iterator

from tests.bench.figures import of_latencies
from tests.bench.live import FORM, Document, Service, form, must_pass, progress

RUNS = int(os.environ.get("BENCH_SSE_RUNS", "3"))
LINES = 60
_TALK = f"""
import time
for n in range({LINES}):
    print(repr(time.time()), flush=True)
    time.sleep(0.03 + 0.001 * (n * 17 % 41))
"""
_STREAM_WITHIN_S = 60.0


def to_watcher(service: Service) -> Document:
    steps = [{"name": "talk", "run": ["/usr/bin/python3", "-I", "-S", "-c", _TALK]}]
    body = form(scenario=json.dumps({"name": "talk", "steps": steps}))
    took_ms: list[float] = []
    with service.client() as client:
        for number in range(RUNS):
            progress(f"output to a watcher {number + 1}/{RUNS}")
            run = client.ask("POST", "/v1/runs", body, **FORM)
            lines = list(_lines(service, run["id"]))
            must_pass(client.finished(run))
            if len(lines) != LINES:
                raise SystemExit(f"{len(lines)} of {LINES} lines came")
            took_ms += [(came - printed) * 1000 for printed, came in lines]
    if min(took_ms) < 0:
        raise SystemExit("a line came before it was printed: the guest's clock is not the host's")
    return of_latencies("output_to_sse", took_ms)


def _lines(service: Service, run_id: str) -> Iterator[tuple[float, float]]:
    """(when it was printed, when it had come) of each line of the output, until the stream ends."""
    begun = ""
    for came, event in _events(service, run_id):
        if event["stream"] != "stdout":
            raise SystemExit(f"the guest complains: {event}")
        *whole, begun = (begun + event["text"]).split("\n")
        for line in whole:
            yield float(line), came


def _events(service: Service, run_id: str) -> Iterator[tuple[float, Document]]:
    """The `output` events, each with the host's time at which all of it was there."""
    connection = http.client.HTTPConnection(service.address, timeout=_STREAM_WITHIN_S)
    try:
        key = {"Authorization": f"Bearer {service.ready['tenant_key']}", "Accept": "text/event-stream"}
        connection.request("GET", f"/v1/runs/{run_id}/events", headers=key)
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"watching a run: {answer.status} {answer.read()!r}")
        received = b""
        while piece := answer.read1(65536):
            came = time.time()
            *frames, received = (received + piece).split(b"\n\n")
            for frame in frames:
                fields = dict(line.split(": ", 1) for line in frame.decode().splitlines() if not line.startswith(":"))
                if fields.get("event") == "output":
                    yield came, json.loads(fields["data"])
    finally:
        connection.close()
