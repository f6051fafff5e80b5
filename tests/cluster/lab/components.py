"""What runs in the lab, and with which configuration; everything lies below the lab's own folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.lab import images
from tests.cluster.lab.parts import Parts

NODE = "lab"
ADDRESS = "10.30.0.1"
"""The node's, on the loopback interface of the lab's own network namespace; nothing outside can reach it."""
API_PORT = 6443
SERVICES, SERVICE_OF_API = "10.96.0.0/16", "10.96.0.1"
PODS = "10.244.0.0/16"
UNLIMITED = ("--kube-api-qps=200", "--kube-api-burst=400")
"""Their own limit, made for clusters of thousands of nodes, would cost seconds at each start."""
ETCD = "http://127.0.0.1:2379"
_OWN = ("system:kube-controller-manager", "system:kube-scheduler", "system:apiserver", "system:node:lab", "inside")
AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "None", "users": [*_OWN]},
        {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},
        {"level": "Metadata"},
    ],
}


@dataclass(frozen=True)
class Place:
    """Where a lab keeps what; `volatile` is in memory and goes with its mount namespace."""

    state: Path

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def config(self) -> Path:
        return self.state / "config"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def images(self) -> Path:
        return self.state / "images"

    @property
    def volatile(self) -> Path:
        return self.state / "volatile"

    @property
    def disk(self) -> Path:
        """Layers of images and what pods write: on disk, since memory is for the pods."""
        return self.state / "disk"

    @property
    def audit(self) -> Path:
        """A line of JSON for each request that the API server was asked, but for the control plane's own."""
        return self.logs / "audit.jsonl"

    @property
    def containerd(self) -> Path:
        return self.state / "containerd.sock"

    def kubeconfig(self, user: str) -> Path:
        return self.config / f"{user}.kubeconfig"

    def make(self) -> None:
        for folder in (self.pki, self.config, self.logs, self.images, self.volatile, self.disk):
            folder.mkdir(parents=True, mode=0o755)


def etcd(place: Place) -> list[str]:
    return [
        "etcd",
        f"--data-dir={place.volatile}/etcd",
        f"--listen-client-urls={ETCD}",
        f"--advertise-client-urls={ETCD}",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]


def api_server(place: Place) -> list[str]:
    pki = place.pki
    return [
        "kube-apiserver",
        f"--etcd-servers={ETCD}",
        f"--advertise-address={ADDRESS}",
        f"--secure-port={API_PORT}",
        f"--tls-cert-file={pki}/api.crt",
        f"--tls-private-key-file={pki}/api.key",
        f"--client-ca-file={pki}/ca.crt",
        "--anonymous-auth=false",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",  # so that it is PodSecurity that refuses, where it does
        f"--service-cluster-ip-range={SERVICES}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={pki}/service-accounts.key",
        f"--service-account-signing-key-file={pki}/service-accounts.key",
        f"--kubelet-client-certificate={pki}/api-to-kubelet.crt",
        f"--kubelet-client-key={pki}/api-to-kubelet.key",
        f"--kubelet-certificate-authority={pki}/ca.crt",
        "--kubelet-preferred-address-types=InternalIP",
        f"--audit-policy-file={place.config}/audit.json",
        f"--audit-log-path={place.audit}",
    ]


def controllers(place: Place) -> list[str]:
    return [
        "kube-controller-manager",
        f"--kubeconfig={place.kubeconfig('controllers')}",
        f"--service-account-private-key-file={place.pki}/service-accounts.key",
        f"--root-ca-file={place.pki}/ca.crt",
        "--use-service-account-credentials",
        "--leader-elect=false",
        *UNLIMITED,
    ]


def scheduler(place: Place) -> list[str]:
    return ["kube-scheduler", f"--kubeconfig={place.kubeconfig('scheduler')}", "--leader-elect=false", *UNLIMITED]


def containerd(place: Place) -> list[str]:
    return ["containerd", f"--config={place.config}/containerd.toml"]


def kubelet(place: Place) -> list[str]:
    return [
        "kubelet",
        f"--config={place.config}/kubelet.json",
        f"--kubeconfig={place.kubeconfig('kubelet')}",
        f"--root-dir={place.disk}/kubelet",
        f"--hostname-override={NODE}",
        f"--node-ip={ADDRESS}",
    ]


def write_configuration(place: Place, parts: Parts, *, cgroup: str) -> None:
    """`cgroup` is the lab's own folder in every hierarchy, as the kernel names it: "/blastdoor-lab-0123abcd"."""
    _write_json(place.config / "kubelet.json", _kubelet(place, cgroup))
    _write_json(place.config / "audit.json", AUDIT)
    (place.config / "containerd.toml").write_text(_containerd(place, parts))
    (place.config / "runsc.toml").write_text(_runsc(parts))
    (place.config / "resolv.conf").write_text("")
    (place.config / "cni").mkdir()
    _write_json(place.config / "cni" / "lab.conflist", _cni(place))


def _kubelet(place: Place, cgroup: str) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{place.pki}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{place.pki}/kubelet.crt",
        "tlsPrivateKeyFile": f"{place.pki}/kubelet.key",
        "containerRuntimeEndpoint": f"unix://{place.containerd}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "enforceNodeAllocatable": ["none"],
        "failCgroupV1": False,
        "failSwapOn": False,
        "oomScoreAdj": 0,  # a lower one takes CAP_SYS_RESOURCE
        "podLogsDir": f"{place.disk}/pod-logs",
        "volumePluginDir": f"{place.disk}/volume-plugins",
        "resolvConf": f"{place.config}/resolv.conf",
        "makeIPTablesUtilChains": False,
        "seccompDefault": True,
        "serializeImagePulls": False,
        "podPidsLimit": 4096,
        # A test machine's full disk is its owner's to see to; the kubelet would end pods and delete our only images.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "0%", "imagefs.available": "0%"},
    }


def _containerd(place: Place, parts: Parts) -> str:
    return f"""\
version = 3
root = "{place.disk}/containerd"
state = "{place.volatile}/containerd"
disabled_plugins = ["io.containerd.nri.v1.nri"]

[grpc]
address = "{place.containerd}"

[plugins."io.containerd.internal.v1.opt"]
path = "{place.disk}/opt"

[timeouts]
"io.containerd.timeout.shim.load" = "30s"
"io.containerd.timeout.task.state" = "30s"

[plugins."io.containerd.cri.v1.images"]
snapshotter = "overlayfs"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{images.PAUSE}"

[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{parts.folders["cni"]}/bin"]
conf_dir = "{place.config}/cni"

[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "runc"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{parts.program("runc")}"
SystemdCgroup = false

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runsc]
runtime_type = "io.containerd.runsc.v1"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runsc.options]
TypeUrl = "io.containerd.runsc.v1.options"
ConfigPath = "{place.config}/runsc.toml"
"""


def _runsc(parts: Parts) -> str:
    return f"""\
binary_name = "{parts.program("runsc")}"

[runsc_config]
platform = "systrap"
"""


def _cni(place: Place) -> dict[str, Any]:
    """Every pod on a link of its own, routed: all that goes from pod to pod passes the node's packet filter."""
    ranges = [[{"subnet": PODS, "rangeStart": "10.244.0.10"}]]
    ipam = {
        "type": "host-local",
        "dataDir": f"{place.volatile}/addresses",
        "ranges": ranges,
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    return {
        "cniVersion": "1.0.0",
        "name": "lab",
        "plugins": [{"type": "ptp", "ipMasq": False, "mtu": 1500, "ipam": ipam}],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))
