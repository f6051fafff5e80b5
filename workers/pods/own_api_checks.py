"""What the API server of a run's own cluster is asked in the scenario's name, before the scenario is: one request that
each of the policies alone refuses, and the same without what is wrong with it, which has to be taken. All in dry run.

    defaults       a pod that says nothing of its runtime is given the sandboxed one
    pods           one that names another runtime is refused
    writes         a network policy is refused, and a ConfigMap taken
    contents       a service for the node's own ports is refused
    definitions    one with a webhook is refused, and one in each group that the cluster had before
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from workers.kube import Cluster, Denied, Manifest
from workers.pods.own_api import NAMESPACE

_ANOTHER_CLASS = "kata-qemu"
"""Every cluster has it that `workers.kube.install` was used on (cluster_templates/runtimeclass); it isolates as well,
but not as the scenario's pods are to be."""
_DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions?dryRun=All"
_SERVICES = f"/api/v1/namespaces/{NAMESPACE}/services?dryRun=All"
_OURS = ("k8s.io", "kubernetes.io")
"""Groups that end so are refused by their end."""
_NEW = "blastdoor-canary.example"
"""A group that nobody has."""


def own_api_fault(scenario: Cluster, *, image: str, runtime_class: str, groups: Sequence[str]) -> str | None:
    """`scenario`: acts as the account of the run's pod; `image`: one that its pods may have; `groups`: those that are
    not its to define. -> what does not hold, or None. Raises ClusterError."""
    try:
        scenario.create(_object("ConfigMap", "v1"), dry_run=True)
        scenario.raw("POST", _DEFINITIONS, body=_definition(_NEW))
        scenario.raw("POST", _SERVICES, body=_service("ClusterIP"))
        pod = scenario.create(_pod(image), dry_run=True)
    except Denied as error:
        return f"the scenario may not write what it must: {error} {error.detail}"
    if (given := pod["spec"].get("runtimeClassName")) != runtime_class:
        return f"a pod of the scenario's that names no runtime is given {given!r}"
    policy = _object("NetworkPolicy", "networking.k8s.io/v1", spec={"podSelector": {}})
    webhook = {"strategy": "Webhook", "webhook": {
        "clientConfig": {"url": "https://192.0.2.1/"}, "conversionReviewVersions": ["v1"]}}  # fmt: skip
    asked: list[tuple[str, str, Callable[[], object]]] = [
        ("network policies", "kinds: ", lambda: scenario.create(policy, dry_run=True)),
        ("pods in another runtime", "runtime-class: ", lambda: scenario.create(
            _pod(image, runtimeClassName=_ANOTHER_CLASS), dry_run=True)),
        ("services for the node's ports", "services: ", lambda: scenario.raw(
            "POST", _SERVICES, body=_service("NodePort"))),
        ("definitions with a webhook", "conversion: ", lambda: scenario.raw(
            "POST", _DEFINITIONS, body=_definition(_NEW, conversion=webhook))),
    ]  # fmt: skip
    asked += [
        (f"definitions in {group}", "group: ", partial(scenario.raw, "POST", _DEFINITIONS, body=_definition(group)))
        for group in groups
        if "." in group and not group.endswith(_OURS)
    ]
    return next((fault for what, rule, ask in asked if (fault := _fault(what, rule, ask)) is not None), None)


def _fault(what: str, rule: str, ask: Callable[[], object]) -> str | None:
    try:
        ask()
    except Denied as error:
        return None if rule in error.detail else f"it was another rule that refused {what}: {error} {error.detail}"
    return f"the scenario may write {what}"


def _object(kind: str, version: str, **more: Any) -> Manifest:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": "canary", "namespace": NAMESPACE}, **more}


def _pod(image: str, **more: Any) -> Manifest:
    return _object("Pod", "v1", spec={"containers": [{"name": "main", "image": image}], **more})


def _service(type_: str) -> Manifest:
    return _object("Service", "v1", spec={"type": type_, "selector": {"app": "canary"}, "ports": [{"port": 80}]})


def _definition(group: str, **more: Any) -> Manifest:
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": f"canaries.{group}"},
        "spec": {"group": group, "scope": "Namespaced", "versions": [version],
                 "names": {"plural": "canaries", "singular": "canary", "kind": "Canary"}, **more},
    }  # fmt: skip
