"""A namespace for trying things, and a pod that breaks no rule: what every check of a cluster begins with."""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from workers.kube.cluster import Cluster
from workers.kube.errors import Denied
from workers.kube.lint import ACCOUNT, CONTAINER, PRIORITY
from workers.kube.manifests import PREFIX, Manifest, filled, placeholders, templates

SETTLES_WITHIN_S = 30.0
"""The quota of a new namespace is counted within moments."""
_LOOK_S = 0.02
LIVES_S = 600
T = TypeVar("T")


def namespace_manifests(name: str, *, variant: str = "runc") -> list[Manifest]:
    """The templates of a run's namespace, with small ceilings; the quota is below what one container may have."""
    values: dict[str, Any] = {
        "namespace": name, "kind": "check", "variant": variant, "site": "check", "installation": "check",
        "tenant_hash": "check", "run": "", "fence": "", "expires_at": round(time.time()) + LIVES_S,
        "pods": "1", "cpu": "300m", "memory": "256Mi", "storage": "256Mi",
        "container_cpu": "500m", "container_memory": "128Mi", "container_storage": "128Mi",
    }  # fmt: skip
    return [filled(one, {key: values[key] for key in placeholders(one)}) for one in templates("namespace")]


@contextmanager
def canary_namespace(engine: Cluster, *, variant: str = "runc") -> Iterator[Manifest]:
    """-> the namespace, as the API server has it; gone, or going, at the end."""
    manifests = namespace_manifests(f"bd-check-{secrets.token_hex(4)}", variant=variant)
    made = engine.apply(manifests[0])
    try:
        for manifest in manifests[1:]:
            engine.apply(manifest)
        yield made
    finally:
        engine.delete("Namespace", made["metadata"]["name"], uid=made["metadata"]["uid"])


def plain_pod(namespace: Manifest, image: str) -> Manifest:
    """A pod that breaks no rule in this namespace, under the namespace's own variant."""
    labels = namespace["metadata"]["labels"]
    amounts = {"cpu": "100m", "memory": "64Mi", "ephemeral-storage": "64Mi"}
    container: Manifest = {
        "name": CONTAINER,
        "image": image,
        "resources": {"limits": amounts, "requests": amounts},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "scratch", "mountPath": "/work"}],
    }
    spec: Manifest = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": 60,
        "terminationGracePeriodSeconds": 1,
        "serviceAccountName": ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "dnsPolicy": "None",
        "dnsConfig": {"nameservers": ["127.0.0.1"]},
        "priorityClassName": PRIORITY,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}}],
    }
    if (variant := labels[f"{PREFIX}variant"]) != "runc":
        spec["runtimeClassName"] = variant
    ours = {key: value for key, value in labels.items() if key.startswith(PREFIX)}
    metadata = {"name": "canary", "namespace": namespace["metadata"]["name"], "labels": ours}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def any_image(prefix: str) -> str:
    """A name that the rules take; a dry run pulls nothing."""
    return prefix + ("canary@" if prefix.endswith("/") else "") + f"sha256:{'0' * 64}"


def settled(ask: Callable[[], T]) -> T:
    """The answer, once the quota of a new namespace has been counted; until then the API server refuses every pod."""
    deadline = time.monotonic() + SETTLES_WITHIN_S
    while True:
        try:
            return ask()
        except Denied as error:
            if "status unknown for quota" not in error.detail or time.monotonic() > deadline:
                raise
        time.sleep(_LOOK_S)
