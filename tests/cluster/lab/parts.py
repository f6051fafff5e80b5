"""What the lab is made of: Go programs built from their published modules, and a few Debian packages, unpacked.

Every part has a folder of its own in the cache, named for its version and for how it is built, so that a changed
recipe is a new part and an old checkout still finds its own. Nothing is installed on the machine.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KUBERNETES = "1.36.2"
ETCD = "3.7.3"
CONTAINERD = "2.4.2"
CNI_PLUGINS = "1.9.1"
GVISOR = "0.0.0-20260905035102-160fafc42237"  # of its `go` branch: only there can the go command build it

# gVisor's shim lowers its own OOM score and gives up when it may not, which takes CAP_SYS_RESOURCE.
SHIM_SOURCE = "pkg/shim/v1/manager.go"
SHIM_STRICT = "if err := sys.SetOOMScore(cmd.Process.Pid, oomScoreMax); err != nil {"
SHIM_LENIENT = "if err := sys.SetOOMScore(cmd.Process.Pid, oomScoreMax); err != nil && !os.IsPermission(err) {"


class NoParts(Exception):
    """A part of the lab cannot be had on this machine; the message says which and why."""


@dataclass(frozen=True)
class GoPart:
    """Programs of one Go module, built in a module of our own, so that its pins touch nothing else."""

    name: str
    module: str
    version: str
    programs: dict[str, str]
    """What a program is called here -> its package below the module."""
    tags: str = ""
    ldflags: str = ""
    staging: str = ""
    """The version of the modules that this one requires at v0.0.0, since they live in its own repository."""
    changed: tuple[str, str, str] | None = None
    """A file of the module, a text in it that occurs once, and what stands there in our build."""


@dataclass(frozen=True)
class DebianPart:
    """Debian packages of this machine's own release, unpacked; none of their scripts is run."""

    name: str
    packages: tuple[str, ...]
    version: str = "1"


@dataclass(frozen=True)
class CPart:
    """One C file out of a Go module, linked statically."""

    name: str
    module: str
    version: str
    source: str
    program: str


_VERSION_FLAGS = " ".join(
    f"-X k8s.io/component-base/version.{name}={value}"
    for name, value in {
        "gitVersion": f"v{KUBERNETES}",
        "gitMajor": KUBERNETES.split(".")[0],
        "gitMinor": KUBERNETES.split(".")[1],
    }.items()
)

# The quick ones first: what cannot be had shows early.
PARTS: tuple[GoPart | DebianPart | CPart, ...] = (
    DebianPart("busybox", ("busybox-static",)),
    DebianPart("runc", ("runc", "libseccomp2")),
    DebianPart(
        "nftables",
        (
            "nftables",
            "libnftables1",
            "libnftnl11",
            "libmnl0",
            "libjansson4",
            "libxtables12",
            "libedit2",
            "libbsd0",
            "libmd0",
        ),
    ),
    GoPart(
        "cni",
        "github.com/containernetworking/plugins",
        CNI_PLUGINS,
        {"ptp": "plugins/main/ptp", "loopback": "plugins/main/loopback", "host-local": "plugins/ipam/host-local"},
    ),
    GoPart("etcd", "go.etcd.io/etcd/server/v3", ETCD, {"etcd": ""}),
    GoPart(
        "gvisor",
        "gvisor.dev/gvisor",
        GVISOR,
        {"runsc": "runsc", "containerd-shim-runsc-v1": "shim"},
        changed=(SHIM_SOURCE, SHIM_STRICT, SHIM_LENIENT),
    ),
    GoPart(
        "containerd",
        "github.com/containerd/containerd/v2",
        CONTAINERD,
        {
            "containerd": "cmd/containerd",
            "ctr": "cmd/ctr",
            "containerd-shim-runc-v2": "cmd/containerd-shim-runc-v2",
        },
        tags="no_btrfs,no_devmapper,no_zfs",
    ),
    GoPart(
        "kubernetes",
        "k8s.io/kubernetes",
        KUBERNETES,
        {
            "kube-scheduler": "cmd/kube-scheduler",
            "kubelet": "cmd/kubelet",
            "kube-controller-manager": "cmd/kube-controller-manager",
            "kube-apiserver": "cmd/kube-apiserver",
        },
        ldflags=_VERSION_FLAGS,
        staging=f"v0.{KUBERNETES.split('.', 1)[1]}",
    ),
    CPart("pause", "k8s.io/kubernetes", KUBERNETES, "build/pause/linux/pause.c", "pause"),
)


@dataclass(frozen=True)
class Parts:
    """Where everything is once it is built."""

    folders: dict[str, Path]

    @property
    def path(self) -> str:
        """PATH for the lab's processes: its own programs, then the machine's."""
        own = [str(folder / below) for folder in self.folders.values() for below in ("bin", "usr/sbin", "usr/bin")]
        return ":".join([*own, "/usr/sbin", "/usr/bin", "/sbin", "/bin"])

    @property
    def libraries(self) -> str:
        """LD_LIBRARY_PATH for the two programs from Debian that may need one: runc and nft."""
        return ":".join(
            str(folder) for name in ("runc", "nftables") for folder in self.folders[name].glob("usr/lib/*-linux-gnu")
        )

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({name: str(folder) for name, folder in self.folders.items()}))

    @classmethod
    def read(cls, path: Path) -> "Parts":
        return cls({name: Path(folder) for name, folder in json.loads(path.read_text()).items()})

    def program(self, name: str) -> Path:
        found = shutil.which(name, path=self.path)
        assert found, f"no program {name} in {self.path}"
        return Path(found)


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "blastdoor-lab"


def missing() -> list[str]:
    """The names of the parts that are not built yet."""
    return [part.name for part in PARTS if not _folder(part).is_dir()]


def build(say: Callable[[str], None]) -> Parts:
    """-> all parts, those that are missing built first, at the lowest priority; GOMAXPROCS limits the cores it takes.

    Raises NoParts when one cannot be had.
    """
    with one_at_a_time("build"):
        for part in PARTS:
            if not _folder(part).is_dir():
                say(f"building {part.name} {part.version}")
                _make(part)
    return Parts({part.name: _folder(part) for part in PARTS})


def _folder(part: GoPart | DebianPart | CPart) -> Path:
    recipe = hashlib.sha256(repr(part).encode()).hexdigest()[:8]
    return cache() / f"{part.name}-{part.version}-{recipe}"


@contextmanager
def one_at_a_time(what: str) -> Iterator[None]:
    """Of all processes of this user."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(part: GoPart | DebianPart | CPart) -> None:
    with tempfile.TemporaryDirectory(dir=cache(), prefix=f".{part.name}-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        match part:
            case GoPart():
                _make_go(part, Path(scratch), made)
            case DebianPart():
                _make_debian(part, Path(scratch), made)
            case CPart():
                _make_c(part, Path(scratch), made)
        made.rename(_folder(part))


def _make_go(part: GoPart, scratch: Path, made: Path) -> None:
    module = scratch / "module"
    module.mkdir()
    details = _module(part.module, part.version, module)
    for required in _required_at_zero(Path(details["GoMod"]), module) if part.staging else []:
        _run(["go", "mod", "edit", f"-replace={required}={required}@{part.staging}"], cwd=module)
    if part.changed:
        _run(["go", "mod", "edit", f"-replace={part.module}={_changed(part.changed, details, scratch)}"], cwd=module)
    for program, below in part.programs.items():
        package = f"{part.module}/{below}".rstrip("/")
        flags = ["-mod=mod", "-trimpath", f"-tags={part.tags}", f"-ldflags=-s -w {part.ldflags}"]
        _run(["nice", "-n", "19", "go", "build", *flags, "-o", str(made / "bin" / program), package], cwd=module)


def _module(module: str, version: str, folder: Path) -> dict[str, Any]:
    """Makes `folder` a Go module that requires this one -> what the go command says of its download."""
    (folder / "go.mod").write_text(f"module lab\n\ngo 1.26.0\n\nrequire {module} v{version}\n")
    said = _run(["go", "mod", "download", "-json", f"{module}@v{version}"], cwd=folder)
    details: dict[str, Any] = json.loads(said)
    return details


def _required_at_zero(go_mod: Path, folder: Path) -> list[str]:
    required = json.loads(_run(["go", "mod", "edit", "-json", str(go_mod)], cwd=folder))["Require"]
    return [one["Path"] for one in required if one["Version"] == "v0.0.0"]


def _changed(change: tuple[str, str, str], details: dict[str, Any], scratch: Path) -> Path:
    """-> a copy of the module with the change made; the go command lets none be made to what it downloaded."""
    file, before, after = change
    copy = scratch / "source"
    shutil.copytree(details["Dir"], copy, copy_function=shutil.copyfile)
    text = (copy / file).read_text()
    if text.count(before) != 1:
        raise NoParts(f"{file} is not what the lab expects of it: {text.count(before)} times {before!r}")
    (copy / file).write_text(text.replace(before, after))
    return copy


def _make_debian(part: DebianPart, scratch: Path, made: Path) -> None:
    try:
        _run(["apt-get", "download", *part.packages], cwd=scratch)
    except NoParts:  # the machine's list of packages may be old, or empty
        _run(["apt-get", "update"], cwd=scratch)
        _run(["apt-get", "download", *part.packages], cwd=scratch)
    for archive in sorted(scratch.glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(archive), str(made)], cwd=scratch)


def _make_c(part: CPart, scratch: Path, made: Path) -> None:
    source = Path(_module(part.module, part.version, scratch)["Dir"]) / part.source
    (made / "bin").mkdir()
    _run(["cc", "-Os", "-static", "-o", str(made / "bin" / part.program), str(source)], cwd=scratch)


def _run(argv: list[str], *, cwd: Path) -> str:
    """-> standard output. Raises NoParts with the end of what the program said when it fails."""
    environment = os.environ | {"CGO_ENABLED": "0", "GOWORK": "off"}
    try:
        done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as absent:
        raise NoParts(f"{argv[0]} is not installed") from absent
    if done.returncode != 0:
        raise NoParts(f"{' '.join(argv)}\n{(done.stderr or done.stdout)[-2000:]}")
    return done.stdout
