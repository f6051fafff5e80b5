"""Pods for the tests of the lab, over plain HTTP: made, waited for, read and removed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

from tests.cluster.lab.images import BUSYBOX

WITHIN_S = 90.0
T = TypeVar("T")
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 65534,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def pod(name: str, command: str, *, runtime: str | None = None, **container: Any) -> dict[str, Any]:
    """A pod with one container that runs a shell command, as PodSecurity `restricted` would have it."""
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 0,
        "containers": [
            {
                "name": "main",
                "image": BUSYBOX,
                "imagePullPolicy": "Never",
                "command": ["/bin/sh", "-c", command],
                "securityContext": RESTRICTED,
            }
            | container
        ],
    }
    if runtime:
        spec["runtimeClassName"] = runtime
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"name": name}}, "spec": spec}


class Namespace:
    """A namespace of the cluster, and what a test does in it."""

    def __init__(self, client: httpx.Client, name: str) -> None:
        self.client = client
        self.name = name
        self.path = f"/api/v1/namespaces/{name}"

    def start(self, manifest: dict[str, Any]) -> str:
        """-> the name of the pod."""
        self.client.post(f"{self.path}/pods", json=manifest).raise_for_status()
        name: str = manifest["metadata"]["name"]
        return name

    def read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"{self.path}/pods/{name}").raise_for_status().json()
        return found

    def log(self, name: str) -> str:
        return self.client.get(f"{self.path}/pods/{name}/log").raise_for_status().text

    def in_phase(self, name: str, *phases: str) -> dict[str, Any]:
        """-> the pod, once it is in one of these phases."""

        def look() -> dict[str, Any]:
            found = self.read(name)
            return found if found["status"]["phase"] in phases else {}

        return eventually(look, lambda: self.explain(name))

    def ran(self, manifest: dict[str, Any]) -> str:
        """Runs a pod to its end -> what it printed; it must not have failed."""
        name = self.start(manifest)
        self.in_phase(name, "Succeeded")
        return self.log(name)

    def explain(self, name: str) -> str:
        events = self.client.get(f"{self.path}/events").json()["items"]
        return f"{self.read(name)['status']}\n" + "\n".join(f"{one['reason']}: {one['message']}" for one in events)


@contextmanager
def namespace(client: httpx.Client, name: str, **labels: str) -> Iterator[Namespace]:
    manifest = {"metadata": {"name": name, "labels": labels}}
    client.post("/api/v1/namespaces", json=manifest).raise_for_status()
    try:
        account = f"/api/v1/namespaces/{name}/serviceaccounts/default"  # a pod is refused without it
        eventually(lambda: client.get(account).is_success)
        yield Namespace(client, name)
    finally:
        client.delete(f"/api/v1/namespaces/{name}")


def eventually(look: Callable[[], T], explain: Callable[[], str] = lambda: "", seconds: float = WITHIN_S) -> T:
    """The first answer that is true."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {explain()}"
        time.sleep(0.05)
    return found
