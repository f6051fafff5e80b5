"""The container images that a node of kind has to have already, packed by hand and put into its containerd."""

import io
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

from tests.cluster.lab import images
from tests.cluster.lab.parts import ETCD, KUBERNETES, Parts
from tests.cluster.lab.toolchain import NoParts

WITHIN_S = 60.0
ENTRYPOINTS = {"coredns": ["/usr/bin/coredns"], "pause": ["/usr/bin/pause"]}
"""Of those whose manifests name no command."""


def wanted(parts: Parts) -> dict[str, str]:
    """-> what kubeadm asks for: the name of each image, by that of its program; pauses are ours to choose."""
    ask = [str(parts.program("kubeadm")), "config", "images", "list", f"--kubernetes-version=v{KUBERNETES}"]
    listed = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
    named = {name.rpartition(":")[0].rpartition("/")[2]: name for name in listed}
    named.pop("pause")
    if ETCD.split(".")[:2] < named["etcd"].rpartition(":")[2].split(".")[:2]:
        raise NoParts(f"etcd {ETCD} is older than what kubeadm wants: {named['etcd']}")
    return named


def fill(root: Path, parts: Parts, pause: str) -> None:
    """Puts the images into the containerd of the tree below `root`."""
    with tempfile.TemporaryDirectory(prefix="blastdoor-images-") as folder:
        scratch = Path(folder)
        for program, name in (wanted(parts) | {"pause": pause}).items():
            tree = scratch / program
            (tree / "usr/bin").mkdir(parents=True)
            if program == "kube-proxy":
                _give_iptables(tree, root)
                (tree / "usr/local/bin").mkdir(parents=True)
                shutil.copy(parts.program(program), tree / "usr/local/bin")
            else:
                shutil.copy(parts.program(program), tree / "usr/bin")
            archive = scratch / f"{program}.tar"
            images.write_image(archive, name, _layer(tree), entrypoint=ENTRYPOINTS.get(program))
        images.write_busybox(scratch / "busybox.tar", parts.program("busybox"))
        _import(root, parts, sorted(scratch.glob("*.tar")), scratch)


def _layer(tree: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(tree, arcname=".")
    return buffer.getvalue()


def _give_iptables(tree: Path, root: Path) -> None:
    """iptables with all its extensions and what they need, out of the node's own files."""
    extensions = next((root / "usr/lib").glob("*-linux-gnu/xtables"))
    program = root / "usr/sbin/xtables-nft-multi"
    inside = [f"/{path.relative_to(root)}" for path in (program, *sorted(extensions.glob("*.so")))]
    said = subprocess.run(["chroot", root, "ldd", *inside], capture_output=True, text=True, check=True).stdout
    libraries = {word for line in said.splitlines() for word in line.split() if word.startswith(("/lib", "/usr/lib"))}
    for name in [*inside, *(one.rstrip(":") for one in libraries)]:
        target = tree / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name.lstrip("/"), target)
    for family in ("iptables", "ip6tables"):
        for name in (family, f"{family}-save", f"{family}-restore"):
            (tree / "usr/bin" / name).symlink_to("/usr/sbin/xtables-nft-multi")


def _import(root: Path, parts: Parts, archives: list[Path], scratch: Path) -> None:
    """By a containerd of our own, which runs for as long as that takes."""
    address = scratch / "containerd.sock"
    config = scratch / "containerd.toml"
    config.write_text(
        f'version = 3\nroot = "{root}/var/lib/containerd"\nstate = "{scratch}/state"\n'
        f'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.nri.v1.nri"]\n'
        f'[grpc]\naddress = "{address}"\n[plugins."io.containerd.internal.v1.opt"]\npath = "{scratch}/opt"\n'
    )
    apart = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net"]
    with (scratch / "containerd.log").open("wb") as log:
        serving = subprocess.Popen(
            [*apart, parts.program("containerd"), f"--config={config}"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        ctr = [str(parts.program("ctr")), f"--address={address}", "--namespace=k8s.io"]
        _wait(ctr, scratch)
        for archive in archives:
            done = subprocess.run([*ctr, "images", "import", str(archive)], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise NoParts(f"containerd did not take {archive.name}: {done.stderr}")
    finally:
        serving.terminate()
        serving.wait()


def _wait(ctr: list[str], scratch: Path) -> None:
    deadline = time.monotonic() + WITHIN_S
    while subprocess.run([*ctr, "version"], capture_output=True, check=False).returncode != 0:
        if time.monotonic() > deadline:
            raise NoParts(f"containerd did not start:\n{(scratch / 'containerd.log').read_text()[-2000:]}")
        time.sleep(0.1)
