"""What the engine and its node image are made of, beyond the parts of the lab."""

import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.lab import parts as lab
from tests.cluster.lab.parts import KUBERNETES, VERSION_FLAGS, DebianPart, GoPart, Recipes, Say, cache
from tests.cluster.lab.toolchain import NoParts, toolchain

KIND = "0.33.0"
COREDNS = "1.14.7"

PARTS: Recipes = (
    DebianPart("debootstrap", ("debootstrap",)),
    DebianPart(
        "iptables",
        ("iptables", "libip4tc2", "libip6tc2", "libnetfilter-conntrack3", "libnfnetlink0"),
    ),
    GoPart("kind", "sigs.k8s.io/kind", KIND, {"kind": ""}),
    GoPart("coredns", "github.com/coredns/coredns", COREDNS, {"coredns": ""}),
    GoPart(
        "kubernetes-node",
        "k8s.io/kubernetes",
        KUBERNETES,
        {"kubeadm": "cmd/kubeadm", "kubectl": "cmd/kubectl", "kube-proxy": "cmd/kube-proxy"},
        ldflags=VERSION_FLAGS,
        staging=f"v0.{KUBERNETES.split('.', 1)[1]}",
    ),
)


@dataclass(frozen=True)
class LaterPart:
    """Debian packages of a later release than this machine's, unpacked; what they depend on has to be here already."""

    name: str
    release: str
    packages: tuple[str, ...]
    version: str


DOCKER = LaterPart("docker", "forky", ("docker.io", "docker-cli", "tini-static"), "28.5")
"""Programs that need no later libc than this machine's."""

RELEASE = "bookworm"
"""Of Debian, for the nodes: its systemd still knows version 1 of control groups."""
BASE = (
    "systemd",
    "conntrack",
    "iptables",
    "nftables",
    "iproute2",
    "util-linux",
    "mount",
    "kmod",
    "libseccomp2",
    "ca-certificates",
    "jq",
    "procps",
    "python3-minimal",
    "python3-httpx",
)


def folder(part: LaterPart) -> Path:
    recipe = hashlib.sha256(repr(part).encode()).hexdigest()[:8]
    return cache() / f"{part.name}-{part.version}-{recipe}"


def missing() -> list[str]:
    later = [] if folder(DOCKER).is_dir() else [DOCKER.name]
    return [*later, *lab.missing((*lab.PARTS, *PARTS))]


def build(say: Say) -> lab.Parts:
    """-> the parts of the lab and those of the engine, which are built together since they have most sources in common.

    Raises NoParts when one cannot be had.
    """
    if not folder(DOCKER).is_dir():
        with lab.one_at_a_time("build"):
            if not folder(DOCKER).is_dir():
                say(f"{DOCKER.name} {DOCKER.version}")
                _unpack(DOCKER)
    built = lab.build(say, (*lab.PARTS, *PARTS))
    return lab.Parts({**built.folders, DOCKER.name: folder(DOCKER)})


def base(say: Say) -> Path:
    """-> the tree of a small Debian with what a node needs of it."""
    recipe = hashlib.sha256(repr((RELEASE, BASE)).encode()).hexdigest()[:8]
    return _once(f"node-base-{RELEASE}-{recipe}", lambda made: _debootstrap(made, say))


def kind_files(say: Say) -> Path:
    """-> what kind's own base image has in it beside Debian: `images/base/files` of its module."""
    return _once(f"kind-files-{KIND}", lambda made: _download_kind(made, say))


def _once(name: str, make: Callable[[Path], None]) -> Path:
    """-> the folder of that name in the cache, made when it is not there."""
    found = cache() / name
    if not found.is_dir():
        with tempfile.TemporaryDirectory(dir=cache(), prefix=f".{name}-") as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            make(made)
            made.rename(found)
    return found


def _debootstrap(made: Path, say: Say) -> None:
    say(f"Debian {RELEASE} for the nodes: about a minute")
    unpacked = lab.build(say, PARTS[:1]).folders["debootstrap"]
    # In a mount namespace of its own, which takes what it mounts with it.
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    settings = ["env", f"DEBOOTSTRAP_DIR={unpacked}/usr/share/debootstrap"]
    chosen = ["--variant=minbase", f"--include={','.join(BASE)}", RELEASE, str(made), mirror()]
    _run(*apart, *settings, "sh", f"{unpacked}/usr/sbin/debootstrap", *chosen)
    for left in (*made.glob("var/cache/apt/archives/*.deb"), *made.glob("var/lib/apt/lists/*_*")):
        left.unlink()


def _download_kind(made: Path, say: Say) -> None:
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "go.mod").write_text("module lab\n")
        go = toolchain(here, say)
        ask = ["go", "mod", "download", "-json", f"sigs.k8s.io/kind@v{KIND}"]
        done = subprocess.run(ask, cwd=here, env=go.environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NoParts(f"{' '.join(ask)}\n{done.stdout}{done.stderr}")
        files = Path(json.loads(done.stdout)["Dir"]) / "images/base/files"
        shutil.copytree(files, made, dirs_exist_ok=True)


def mirror() -> str:
    """Where this machine's own packages come from."""
    for update in (True, False):
        wanted = "$(COMPONENT)|$(CODENAME)|$(REPO_URI)|$(ORIGIN)"
        for line in _run("apt-get", "indextargets", "--format", wanted, "Created-By: Packages").splitlines():
            component, codename, address, origin = line.split("|")
            if (component, origin) == ("main", "Debian") and "-" not in codename:
                return address.rstrip("/")
        if update:
            _run("apt-get", "update")
    raise NoParts("this machine has no source of Debian's packages")


def _unpack(part: LaterPart) -> None:
    with tempfile.TemporaryDirectory(dir=cache(), prefix=f".{part.name}-") as scratch:
        here = Path(scratch)
        options = _apart(here, part.release)
        _run("apt-get", *options, "update", cwd=here)
        _run("apt-get", *options, "download", *part.packages, cwd=here)
        made = here / "made"
        made.mkdir()
        for archive in sorted(here.glob("*.deb")):
            _run("dpkg-deb", "--extract", str(archive), str(made), cwd=here)
        (made / "packages.json").write_text(json.dumps(sorted(one.name for one in here.glob("*.deb"))))
        made.chmod(0o755)
        made.rename(folder(part))


def _apart(here: Path, release: str) -> list[str]:
    """Options for a package list of its own, beside the machine's, which stays as it is."""
    for below in ("lists/partial", "cache/archives/partial"):
        (here / below).mkdir(parents=True)
    (here / "status").touch()
    (here / "sources.list").write_text(
        f"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror()} {release} main\n"
    )
    settings = {
        "Dir::Etc::sourcelist": here / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::Lists": here / "lists",
        "Dir::State::status": here / "status",
        "Dir::Cache": here / "cache",
        "APT::Sandbox::User": "root",
    }
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]


def _run(*argv: str, cwd: Path | None = None) -> str:
    done = subprocess.run(argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoParts(f"{' '.join(argv)}\n{(done.stderr or done.stdout)[-2000:]}")
    return done.stdout
