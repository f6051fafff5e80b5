"""The file tree of kind's node image, made without a registry: Debian, kind's own files, and programs of the lab.

The differences to what `kind build node-image` makes: systemd of bookworm, which still knows version 1 of control
groups; cgroupfs as the kubelet's driver, the one with which gVisor finds its groups there; gVisor's runtime; no
kindnetd but `network.py`, which enforces network policy on kernels without packet queues; no volume provisioner; and
nothing in it changes settings of the whole machine.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

from tests.cluster.engine import preload
from tests.cluster.engine.parts import KIND, base, kind_files
from tests.cluster.lab.outside import ROOT
from tests.cluster.lab.parts import KUBERNETES, Parts, Say

PAUSE = "registry.k8s.io/pause:3.10"
"""As kind's containerd configuration says."""
PROGRAMS = {
    "usr/bin": ("kubeadm", "kubelet", "kubectl"),
    "usr/local/bin": ("containerd", "ctr", "containerd-shim-runc-v2", "containerd-shim-runsc-v1"),
    "opt/cni/bin": ("ptp", "loopback", "host-local"),
}
ENABLED = ("kubelet.service", "containerd.service", "undo-mount-hacks.service", "blastdoor-network.service")
MASKED = ("systemd-binfmt.service", "systemd-sysctl.service", "systemd-modules-load.service")
"""What they change is the whole machine's."""
UNWANTED = (
    "lib/systemd/system/sysinit.target.wants/systemd-tmpfiles-setup.service",
    "lib/systemd/system/multi-user.target.wants/*",
    "etc/systemd/system/*.wants/*",
    "lib/systemd/system/local-fs.target.wants/*",
    "lib/systemd/system/sockets.target.wants/*udev*",
    "lib/systemd/system/sockets.target.wants/*initctl*",
    "lib/systemd/system/basic.target.wants/*",
)
OWN_MODULES = ("cluster/engine/network.py", "cluster/lab/client.py", "cluster/lab/policy.py")

GVISOR = """
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runsc]
  runtime_type = "io.containerd.runsc.v1"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runsc.options]
    TypeUrl = "io.containerd.runsc.v1.options"
    ConfigPath = "/etc/containerd/runsc.toml"
"""
RUNSC_TOML = """\
binary_name = "/usr/local/bin/runsc"

[runsc_config]
platform = "systrap"
"""
RUNSC = r"""#!/bin/sh
# kind binds the kubelet's control groups onto themselves, and gVisor cannot tell where it is below such a mount.
exec /usr/bin/unshare --mount --propagation private /bin/sh -c '
    while read -r _ _ _ _ place _; do
        case $place in /sys/fs/cgroup/*/kubelet|/sys/fs/cgroup/*/kubelet.slice) umount "$place" ;; esac
    done </proc/self/mountinfo
    exec /usr/local/bin/runsc.real "$@"' runsc "$@"
"""
NETWORK_SERVICE = """\
[Unit]
Description=links and routes of pods, and network policy
StartLimitIntervalSec=0

[Service]
WorkingDirectory=/kind/lab
ExecStart=/usr/bin/python3 -m tests.cluster.engine.network
Restart=always
RestartSec=1

[Install]
WantedBy=multi-user.target
"""
PRODUCT = ROOT / "cluster_templates/kind/node-image"
POLICIES = ("admission.yaml", "audit.yaml", "authentication.yaml")
"""What the product's configuration of kind tells the API server to read."""
KUBELET = {
    "apiVersion": "kubelet.config.k8s.io/v1beta1",
    "kind": "KubeletConfiguration",
    "cgroupDriver": "cgroupfs",
    "failCgroupV1": False,
    "oomScoreAdj": 0,  # a lower one takes CAP_SYS_RESOURCE
}
SHADOWED = {  # the kubelet sets these, which are the whole machine's
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
}
SHADOW = """#!/bin/sh -e
# Gives the kubelet settings of its own to find as it wants them, in place of the whole machine's.
cd /kind/sysctl
find . -type f | while read -r name; do
    mountpoint -q "/proc/sys/$name" || mount --bind "$name" "/proc/sys/$name"
done
"""
NETWORK_RIGHTS = """\
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: blastdoor-network
rules:
- apiGroups: [""]
  resources: [pods, namespaces, nodes]
  verbs: [get, list, watch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: blastdoor-network
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: blastdoor-network
subjects:
- apiGroup: rbac.authorization.k8s.io
  kind: Group
  name: system:nodes
"""
STORAGE = """\
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata:
  name: standard
  annotations:
    storageclass.kubernetes.io/is-default-class: "true"
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
"""
TEXTS = {
    "usr/local/bin/runsc": RUNSC,
    "etc/containerd/runsc.toml": RUNSC_TOML,
    "etc/systemd/system/blastdoor-network.service": NETWORK_SERVICE,
    "etc/systemd/system/kubelet.service.d/12-blastdoor.conf": "[Service]\nExecStartPre=/kind/bin/shadow-sysctls.sh\n",
    "etc/default/kubelet": "KUBELET_EXTRA_ARGS=--runtime-cgroups=/system.slice/containerd.service"
    " --config-dir=/etc/kubernetes/kubelet.conf.d\n",
    "etc/kubernetes/kubelet.conf.d/50-blastdoor.conf": json.dumps(KUBELET, indent=1),
    "kind/bin/shadow-sysctls.sh": SHADOW,
    "kind/version": f"v{KUBERNETES}",
    "kind/manifests/default-cni.yaml": NETWORK_RIGHTS,
    "kind/manifests/default-storage.yaml": STORAGE,
    **{f"kind/sysctl/{name}": f"{value}\n" for name, value in SHADOWED.items()},
}


def write(root: Path, parts: Parts, say: Say) -> None:
    """Fills an empty folder with the tree. As root."""
    say(f"node image: Debian, with what kind {KIND} needs of it")
    subprocess.run(["cp", "--archive", f"{base(say)}/.", str(root)], check=True)
    _write_kinds_own(root, kind_files(say))
    for folder, names in PROGRAMS.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(parts.program(name), root / folder / name)
    shutil.copy(parts.program("runc"), root / "usr/local/sbin/runc")
    shutil.copy(parts.program("runsc"), root / "usr/local/bin/runsc.real")
    _write_modules(root)
    for name, text in TEXTS.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)
    _write_containerd(root, parts)
    _write_services(root)
    policies = root / "etc/kubernetes/blastdoor"
    policies.mkdir()
    for name in POLICIES:
        shutil.copyfile(PRODUCT / name, policies / name)
    say("node image: the images that kubeadm wants")
    preload.fill(root, parts, PAUSE)


def _write_kinds_own(root: Path, files: Path) -> None:
    shutil.copytree(files, root, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for path in files.rglob("*"):
        runs = path.is_dir() or path.parent.name == "bin"
        (root / path.relative_to(files)).chmod(0o755 if runs else 0o644)


def _write_modules(root: Path) -> None:
    for name in OWN_MODULES:
        target = root / "kind/lab/tests" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "tests" / name, target)


def _write_containerd(root: Path, parts: Parts) -> None:
    config = root / "etc/containerd/config.toml"
    text = config.read_text()
    for before, after in {
        "SystemdCgroup = true": "SystemdCgroup = false",
        "restrict_oom_score_adj = false": "restrict_oom_score_adj = true",  # or it takes CAP_SYS_RESOURCE
    }.items():
        assert before in text, f"kind's containerd configuration has no {before!r}"
        text = text.replace(before, after)
    assert PAUSE in text, f"kind's containerd configuration has another sandbox image than {PAUSE}"
    config.write_text(text + GVISOR)
    spec = json.loads(subprocess.run([parts.program("ctr"), "oci", "spec"], capture_output=True, check=True).stdout)
    spec.setdefault("hooks", {})["createContainer"] = [{"path": "/kind/bin/mount-product-files.sh"}]
    del spec["process"]["rlimits"]
    (root / "etc/containerd/cri-base.json").write_text(json.dumps(spec))


def _write_services(root: Path) -> None:
    for pattern in UNWANTED:
        for path in root.glob(pattern):
            path.unlink()
    system = root / "etc/systemd/system"
    wanted = system / "multi-user.target.wants"
    wanted.mkdir(exist_ok=True)
    for name in ENABLED:
        (wanted / name).symlink_to(f"/etc/systemd/system/{name}")
    for name in MASKED:
        (system / name).unlink(missing_ok=True)
        (system / name).symlink_to("/dev/null")
    with (root / "etc/systemd/journald.conf").open("a") as journal:
        journal.write("ReadKMsg=no\n")
    if not os.path.lexists(root / "sbin/init"):
        (root / "sbin/init").symlink_to("/usr/lib/systemd/systemd")
    (root / "etc/kubernetes/manifests").mkdir(parents=True, exist_ok=True)
    (root / "etc/machine-id").write_text("")
