"""PURE: what a run with `needs: [kubernetes-api]` gets, in a cluster that belongs to it alone.

    the cluster      policies and a cluster role, from `cluster_templates/own-api/cluster`: once, before any scenario
    `scenario`       a namespace for all that the scenario makes, with what its account may do: `own-api/scenario`
    the run's pod    stands in its own namespace, as every pod of ours; a way out to the API server is added
                     (`own-api/run`), and to the pod the token of its account `sandbox`, renewed by the kubelet

The policies are on who asks (`writes`, `contents`, `definitions`) and on what comes of it (`pods`), so that neither a
controller of the cluster nor one that the scenario installs can be told to make what the scenario may not.

An administrator applies the first two; of namespaces of ours the engine alone writes the third.
"""

import ipaddress
import json
import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from service.core.boundary import BoundaryRef, BoundarySpec
from workers.kube import PREFIX, Manifest, filled, placeholders, templates
from workers.pods.evidence import network
from workers.pods.render import namespace_name

Endpoint = tuple[str, int]
"""Address and port of an API server, as the EndpointSlice `kubernetes` in `default` has it."""
NAMESPACE = "scenario"
VOLUME = "kubernetes-api"
FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where clients look for it by themselves."""
KUBECONFIG = f"{FOLDER}/kubeconfig"
_ANNOTATION = f"{PREFIX}kubeconfig"
_NAME = re.compile(r"[a-z0-9.-]{1,253}")
_IMAGE = re.compile(r"[A-Za-z0-9._:/-]+@sha256:[a-f0-9]{64}")
"""These become part of expressions, so they have no quotation mark. Parameters would be the other way; a policy that
does not find its own refuses everybody."""
_TOKEN_S = 600
"""The shortest that a kubelet asks for; it renews it before its end, and with the pod it is void."""
_PODS, _PODS_KEPT, _SHARE = 8, 24, 4
"""Pods at once, those that have ended as well, and which part of the whole a container has that says nothing."""
_OVERHEAD_CPU_M, _OVERHEAD_BYTES = 250, 160 * 2**20
"""What a RuntimeClass may add to each pod, the largest that `cluster_templates/runtimeclass` has."""
_STORAGE_BYTES = 64 * 2**20
"""Of local disk for one container, its log and its root filesystem."""


def own_api_cluster(
    groups: Sequence[str], *, images: Sequence[str], runtime_class: str, api_endpoints: Sequence[Endpoint]
) -> Sequence[Manifest]:
    """What an administrator applies once, in this order, after `workers.kube.install.wanted` with `own_api=True`.

    `groups`: the names of all API groups that the cluster serves now (GET /apis); none is the scenario's to write.
    `images`: those that its pods may have, by digest. `runtime_class`: every pod's. Needs Kubernetes 1.36
    (MutatingAdmissionPolicy in v1). Raises ValueError.
    """
    if not groups or not all(map(_NAME.fullmatch, (runtime_class, *groups))):
        raise ValueError("a scenario's pods need a runtime class, and a cluster's groups and classes have names")
    host, port = _first(api_endpoints)
    if not images or not all(map(_IMAGE.fullmatch, images)):
        raise ValueError(f"a scenario's pods need images by digest (NAME@sha256:...), and not {', '.join(images)!r}")
    return _filled(
        "own-api/cluster",
        {
            "images": ",".join(sorted(images)),  # whole names: nothing can follow a digest
            "runtime_class": runtime_class,
            "groups": ",".join(sorted(groups)),
            "api_host": host,
            "api_port": str(port),
        },
    )


def render_own_api(ref: BoundaryRef, spec: BoundarySpec, *, api_endpoints: Sequence[Endpoint]) -> Sequence[Manifest]:
    """The scenario's namespace and rights, in the order in which an administrator applies them, before the pod. Its
    pods may have together what the run's own pod has, once more."""
    limits = spec.limits
    cpu = math.ceil(limits.cpu * 1000)
    return _filled(
        f"own-api/{NAMESPACE}",
        {
            "egress": _to(api_endpoints),
            "run_namespace": namespace_name(ref),
            "run_group": f"system:serviceaccounts:{namespace_name(ref)}",
            "pods": str(_PODS),
            "pods_kept": str(_PODS_KEPT),
            "cpu": f"{cpu + _PODS * _OVERHEAD_CPU_M}m",
            "memory": str(limits.memory + _PODS * _OVERHEAD_BYTES),
            "storage": str(_PODS * _STORAGE_BYTES),
            "container_cpu": f"{cpu}m",
            "container_memory": str(limits.memory),
            "container_storage": str(_STORAGE_BYTES),
            "default_cpu": f"{math.ceil(cpu / _SHARE)}m",
            "default_request_cpu": f"{math.ceil(cpu / _SHARE / _PODS)}m",
            "default_memory": str(limits.memory // _SHARE),
            "default_storage": str(_STORAGE_BYTES // 2),
        },
    )


def render_way_to_api(ref: BoundaryRef, *, api_endpoints: Sequence[Endpoint]) -> Sequence[Manifest]:
    """What the engine applies in the run's own namespace, before the pod."""
    return _filled("own-api/run", {"namespace": namespace_name(ref), "egress": _to(api_endpoints)})


def network_with_own_api(policies: Sequence[Manifest], ref: BoundaryRef, *, api_endpoints: Sequence[Endpoint]) -> str:
    """What all policies of the run's own namespace let pass together, as they were read back: "own-api" for the way to
    that API server at its addresses of now and no other, else the word for a pod without one."""
    (way,) = render_way_to_api(ref, api_endpoints=api_endpoints)
    found = {one["metadata"]["name"]: one for one in policies}
    mine = found.pop(way["metadata"]["name"], None)
    if mine is not None and _rules(mine) == _rules(way) and network([*found.values()]) == "none":
        return "own-api"
    return network(policies)


def _rules(policy: Manifest) -> Manifest:
    """In whichever order the API server has its addresses."""
    spec: Manifest = policy["spec"]
    return {**spec, "egress": sorted(json.dumps(one, sort_keys=True) for one in spec.get("egress") or ())}


def with_own_api(pod: Manifest, *, api_endpoints: Sequence[Endpoint]) -> Manifest:
    """The same pod, with a kubeconfig, the token of its account and the cluster's authority in a folder that it can
    only read. No ConfigMap is needed: the kubeconfig has nothing secret in it, and is an annotation of the pod."""
    changed = deepcopy(pod)
    changed["metadata"].setdefault("annotations", {})[_ANNOTATION] = _kubeconfig(api_endpoints)
    sources: list[dict[str, Any]] = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": _TOKEN_S}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {
            "downwardAPI": {
                "items": [{"path": "kubeconfig", "fieldRef": {"fieldPath": f"metadata.annotations['{_ANNOTATION}']"}}]
            }
        },
    ]
    changed["spec"]["volumes"].append({"name": VOLUME, "projected": {"defaultMode": 0o444, "sources": sources}})
    changed["spec"]["containers"][0]["volumeMounts"].append({"name": VOLUME, "mountPath": FOLDER, "readOnly": True})
    return changed


def own_api_environment(pod: Manifest, *, api_endpoints: Sequence[Endpoint]) -> Mapping[str, str]:
    """What every step's environment has more of: where `kubectl` finds its kubeconfig, where a library that looks for
    itself finds the API server, and the name of the image that a scenario's own pods can have."""
    host, port = _first(api_endpoints)
    return {
        "KUBECONFIG": KUBECONFIG,
        "KUBERNETES_SERVICE_HOST": host,
        "KUBERNETES_SERVICE_PORT": str(port),
        "BLASTDOOR_IMAGE": str(pod["spec"]["containers"][0]["image"]),
    }


def _kubeconfig(api_endpoints: Sequence[Endpoint]) -> str:
    """JSON, which is YAML. Its files lie beside it."""
    host, port = _first(api_endpoints)
    server = f"https://{f'[{host}]' if ':' in host else host}:{port}"
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "own", "cluster": {"server": server, "certificate-authority": "ca.crt"}}],
            "users": [{"name": NAMESPACE, "user": {"tokenFile": "token"}}],
            "contexts": [{"name": "own", "context": {"cluster": "own", "user": NAMESPACE, "namespace": NAMESPACE}}],
            "current-context": "own",
        },
        separators=(",", ":"),
    )


def _to(api_endpoints: Sequence[Endpoint]) -> list[Manifest]:
    """The rules of a NetworkPolicy. Raises ValueError for what is no address: a name could become another's."""
    _first(api_endpoints)
    return [
        {
            "to": [{"ipBlock": {"cidr": str(ipaddress.ip_network(address))}}],
            "ports": [{"protocol": "TCP", "port": port}],
        }
        for address, port in api_endpoints
    ]


def _first(api_endpoints: Sequence[Endpoint]) -> Endpoint:
    if not api_endpoints:
        raise ValueError("an API server without an address cannot be reached")
    return api_endpoints[0]


def _filled(folder: str, values: Mapping[str, Any]) -> Sequence[Manifest]:
    """Each template takes what it has a place for; together they must take all."""
    found = templates(folder)
    if unused := values.keys() - frozenset[str]().union(*map(placeholders, found)):
        raise ValueError(f"cluster_templates/{folder} has no place for {', '.join(sorted(unused))}")
    return [filled(one, {key: values[key] for key in placeholders(one) & values.keys()}) for one in found]
