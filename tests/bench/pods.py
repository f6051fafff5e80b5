"""How long a run takes as a pod, beside the same pod by hand: bare, in a namespace that is there already, created with
the same client, one exec, deleted.

Interleaved, as `speed` is, and neither begins before what the other made is gone. How often a run asks the API server
is what that server itself counted.

On the cluster that KUBECONFIG names, with BLASTDOOR_KUBE_IMAGE_FOR_TESTS an image of ours that its nodes can have; else
on the lab (tests/cluster/lab).
"""

import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from service.core.boundary import BoundaryKind, BoundaryRef, BoundarySpec
from service.core.controls import Limits, Network
from service.core.ids import new_run_id
from tests.bench.live import Client, Service, form, must_pass, progress, running, scratch
from tests.cluster.engines import Ready, make_ready
from tests.cluster.lab.client import connect
from tests.cluster.lab.outside import running_lab
from tests.cluster.namespaces import GIVEN_IMAGE, load_runtime
from workers.kube import Cluster, Manifest
from workers.pods.pod import is_running
from workers.pods.render import CONTAINER, LISTENER_PORT, init_at, render_namespace, render_pod

PAIRS = int(os.environ.get("BENCH_PODS", "20"))
COUNTED = int(os.environ.get("BENCH_PODS_COUNTED", "5"))
VARIANT = "gvisor"
WITHIN_S = 60.0
PROGRAM = ("/bin/echo", "hello")
SCENARIO = '{"name": "one line", "steps": [{"name": "hello", "run": ["/bin/echo", "hello"]}]}'
FORM = {"Content-Type": "multipart/form-data; boundary=bench"}
_AN_HOUR = 3600
_LEVEL = re.compile(r'apiserver_flowcontrol_dispatched_requests_total\{.*flow_schema="blastdoor-engine".*\} (\S+)')
_EXEC = re.compile(r'apiserver_request_total\{.*subresource="exec".*\} (\S+)')


def measure(runsc: Path) -> dict[str, Any]:
    with scratch() as place, _cluster(place) as (ready, image):
        settings = {
            "boundaries": '["namespace"]', "namespace_variants": f'["{VARIANT}"]', "kube_image": image,
            "kubeconfig": ready.engine_kubeconfig,
            "housekeeping_s": _AN_HOUR, "canary_s": _AN_HOUR,  # what only the run asks is counted
        }  # fmt: skip
        with running(**settings) as service, service.client() as client:
            return _pairs(client, ready, image) | _calls(service, client, ready)


@contextmanager
def _cluster(place: Path) -> Iterator[tuple[Ready, str]]:
    if image := os.environ.get(GIVEN_IMAGE):
        yield make_ready(Path(os.environ["KUBECONFIG"]), place), image
        return
    with running_lab(place / "lab", lambda line: print(line, file=sys.stderr)) as lab:
        image = load_runtime(lab, place / "runtime.tar")
        yield make_ready(lab.kubeconfig, place), image


def _pairs(client: Client, ready: Ready, image: str) -> dict[str, Any]:
    ours, by_hand, asked = [], [], []
    with _Bare(ready.engine, image) as bare:
        _one(client)
        bare.lifecycle()
        for number in range(PAIRS):
            progress(f"pods {number + 1}/{PAIRS}")
            ours.append(_one(client))
            until_asked_s, until_gone_s = bare.lifecycle()
            asked.append(until_asked_s)
            by_hand.append(until_gone_s)
    run, pod = statistics.median(ours), statistics.median(by_hand)
    return {
        "pod_ratio": run / pod,
        "pod_run_p50_s": run,
        "pod_bare_p50_s": pod,
        # When the one by hand goes on as soon as its deletion is accepted, and sees nothing of it:
        "pod_ratio_deletion_unseen": run / statistics.median(asked),
    }


def _one(client: Client) -> float:
    """POST to result -> seconds; returns when its namespace is gone."""
    started = time.monotonic()
    run = client.finished(client.ask("POST", "/v1/runs", form(scenario=SCENARIO), **FORM))
    took_s = time.monotonic() - started
    must_pass(run)
    if run["placement"]["boundary"] != f"namespace/{VARIANT}":
        raise SystemExit(f"the run was not on namespace/{VARIANT} but on {run['placement']['boundary']}")
    _until(lambda: client.ask("GET", f"/v1/runs/{run['id']}")["boundary_destroyed_at"])
    return took_s


def _until(look: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not look():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {WITHIN_S:g} s")
        time.sleep(0.05)


class _Bare:
    """A pod as ours is, and nothing around it: its namespace is there before."""

    def __init__(self, cluster: Cluster, image: str) -> None:
        self._cluster, self._image = cluster, image
        self._in = self._ref()
        self._spec = BoundarySpec(limits=Limits(), network=Network())

    def __enter__(self) -> "_Bare":
        for manifest in render_namespace(self._in, self._spec):
            if manifest["kind"] == "ResourceQuota":
                manifest["spec"]["hard"] = {"pods": "8"}  # the one before may still be counted
            self._cluster.apply(manifest)
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.delete("Namespace", self._in.name)

    def lifecycle(self) -> tuple[float, float]:
        """-> seconds until its deletion was accepted, and until it is gone."""
        manifest = self._manifest()
        name, namespace = manifest["metadata"]["name"], self._in.name
        started = time.monotonic()
        uid = self._cluster.create(manifest, ours=manifest["metadata"]["labels"])["metadata"]["uid"]
        self._await(name, lambda what, pod: is_running(pod))
        ended = self._cluster.exec_(
            namespace, name, CONTAINER, PROGRAM, on_output=lambda *_: None, deadline=started + WITHIN_S
        )
        self._cluster.delete("Pod", name, namespace, uid=uid)
        asked_s = time.monotonic() - started
        self._await(name, lambda what, pod: what == "DELETED")
        if ended.exit_code != 0:
            raise SystemExit(f"the bare pod's program: {ended}")
        return asked_s, time.monotonic() - started

    def _await(self, name: str, look: Callable[[str, Manifest], bool]) -> None:
        for what, pod in self._cluster.watch("Pod", self._in.name, name=name, seconds=WITHIN_S):
            if look(what, pod):
                return
        raise SystemExit(f"the bare pod did not come as far within {WITHIN_S:g} s")

    def _manifest(self) -> Manifest:
        ref = self._ref()
        words = ["first", "127.0.0.1", str(LISTENER_PORT)]  # nobody is there: no wait for network policy
        pod = render_pod(ref, self._spec, image=self._image, words=words, seconds=60)
        if pod["spec"]["containers"][0]["command"][0] != init_at(VARIANT):
            raise SystemExit("the bare pod is not as ours are")
        pod["metadata"]["namespace"] = self._in.name
        return pod

    def _ref(self) -> BoundaryRef:
        return BoundaryRef(
            installation="bench", kind=BoundaryKind.NAMESPACE, variant=VARIANT, site="bench", tenant="bench",
            run_id=new_run_id(), fence=1, expires_at=datetime.now(UTC) + timedelta(hours=1),
        )  # fmt: skip


def _calls(service: Service, client: Client, ready: Ready) -> dict[str, Any]:
    """Every request of the engine's during some runs and their destruction, as the API server counted them; a command
    in a pod, which it counts apart, is one. The listener is looked at now and then: that is in it."""
    before = _counted(ready)
    for number in range(COUNTED):
        progress(f"counting {number + 1}/{COUNTED}")
        _one(client)
    return {"kube_calls_per_run": (_counted(ready) - before) / COUNTED}


def _counted(ready: Ready) -> float:
    with connect(ready.kubeconfig) as client:
        text = client.get("/metrics").raise_for_status().text
    found = [*_LEVEL.findall(text), *_EXEC.findall(text)]
    if not found:
        raise SystemExit("this API server counts no requests")
    return sum(map(float, found))
