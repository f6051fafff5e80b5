"""What the lab is made of: Go programs built from their published modules, and a few Debian packages, unpacked.

Every part has a folder of its own in the cache, named for its version and for how it is built, so that a changed
recipe is a new part and an old checkout still finds its own. Nothing is installed on the machine, and what only the
build needed (sources, object files) goes when all parts are there.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.lab.toolchain import NoParts, Toolchain, toolchain

KUBERNETES = "1.36.2"
ETCD = "3.7.3"
CONTAINERD = "2.4.2"
CNI_PLUGINS = "1.9.1"
GVISOR = "0.0.0-20260905035102-160fafc42237"  # of its `go` branch: only there can the go command build it

# gVisor's shim lowers its own OOM score and gives up when it may not, which takes CAP_SYS_RESOURCE.
SHIM_SOURCE = "pkg/shim/v1/manager.go"
SHIM_STRICT = "if err := sys.SetOOMScore(cmd.Process.Pid, oomScoreMax); err != nil {"
SHIM_LENIENT = "if err := sys.SetOOMScore(cmd.Process.Pid, oomScoreMax); err != nil && !os.IsPermission(err) {"

BUILD_TAKES = 8_000_000_000
"""Bytes of disk, for the time of a build of everything; 600 MB stay."""
TRIES = 3
"""Of what fetches something: a network has its moments."""
SAY_EVERY_S = 60.0
Say = Callable[[str], None]


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


VERSION_FLAGS = " ".join(
    f"-X k8s.io/component-base/version.{name}={value}"
    for name, value in {
        "gitVersion": f"v{KUBERNETES}",
        "gitMajor": KUBERNETES.split(".")[0],
        "gitMinor": KUBERNETES.split(".")[1],
    }.items()
)

Recipes = tuple[GoPart | DebianPart | CPart, ...]

# The quick ones first: what cannot be had shows early.
PARTS: Recipes = (
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
        ldflags=VERSION_FLAGS,
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


def missing(parts: Recipes = PARTS) -> list[str]:
    """The names of the parts that are not built yet."""
    return [part.name for part in parts if not _folder(part).is_dir()]


def build(say: Say, parts: Recipes = PARTS) -> Parts:
    """-> all parts, those that are missing built first, at the lowest priority; GOMAXPROCS limits the cores it takes.

    One process builds, any other waits for it. Raises NoParts when one cannot be had.
    """
    if missing(parts):
        with one_at_a_time("build"):
            _build_missing(say, parts)
    return Parts({part.name: _folder(part) for part in parts})


def _build_missing(say: Say, parts: Recipes) -> None:
    todo = [part for part in parts if not _folder(part).is_dir()]
    if not todo:  # another process was quicker
        return
    if (free := shutil.disk_usage(cache()).free) < BUILD_TAKES:
        raise NoParts(
            f"a build needs {BUILD_TAKES / 1e9:g} GB below {cache()} for its time: {free / 1e9:.1f} GB are free"
        )
    for left in cache().glob(".*-????????"):  # by a build that was killed
        shutil.rmtree(left, ignore_errors=True)
    began = time.monotonic()
    for_now = cache() / ".build"
    go = toolchain(for_now, say) if any(not isinstance(part, DebianPart) for part in todo) else None
    for at, part in enumerate(todo, 1):
        say(f"{at} of {len(todo)}: {part.name} {part.version}")
        _make(part, go, say)
    shutil.rmtree(for_now, ignore_errors=True)
    say(f"built in {(time.monotonic() - began) / 60:.1f} minutes; kept in {cache()}")


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


def _make(part: GoPart | DebianPart | CPart, go: Toolchain | None, say: Say) -> None:
    with tempfile.TemporaryDirectory(dir=cache(), prefix=f".{part.name}-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        match part:
            case DebianPart():
                _make_debian(part, Path(scratch), made)
            case GoPart():
                assert go
                _make_go(part, go, Path(scratch), made, say)
            case CPart():
                assert go
                _make_c(part, go, Path(scratch), made)
        made.rename(_folder(part))


def _make_go(part: GoPart, go: Toolchain, scratch: Path, made: Path, say: Say) -> None:
    module = scratch / "module"
    module.mkdir()
    details = _module(part.module, part.version, module, go)
    for required in _required_at_zero(Path(details["GoMod"]), module, go) if part.staging else []:
        _run(["go", "mod", "edit", f"-replace={required}={required}@{part.staging}"], cwd=module, go=go)
    if part.changed:
        copy = _changed(part.changed, details, scratch)
        _run(["go", "mod", "edit", f"-replace={part.module}={copy}"], cwd=module, go=go)
    for program, below in part.programs.items():
        package = f"{part.module}/{below}".rstrip("/")
        flags = ["-mod=mod", "-trimpath", f"-tags={part.tags}", f"-ldflags=-s -w {part.ldflags}"]
        build = ["nice", "-n", "19", "go", "build", *flags, "-o", str(made / "bin" / program), package]
        _fetch(build, cwd=module, go=go, still=lambda s, program=program: say(f"  {program}: {s / 60:.0f} min"))


def _module(module: str, version: str, folder: Path, go: Toolchain) -> dict[str, Any]:
    """Makes `folder` a Go module that requires this one -> what the go command says of its download."""
    (folder / "go.mod").write_text(f"module lab\n\ngo 1.26.0\n\nrequire {module} v{version}\n")
    said = _fetch(["go", "mod", "download", "-json", f"{module}@v{version}"], cwd=folder, go=go)
    details: dict[str, Any] = json.loads(said)
    return details


def _required_at_zero(go_mod: Path, folder: Path, go: Toolchain) -> list[str]:
    required = json.loads(_run(["go", "mod", "edit", "-json", str(go_mod)], cwd=folder, go=go))["Require"]
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
        with suppress(NoParts):  # of one source that does not answer; what is needed may be of another
            _run(["apt-get", "update"], cwd=scratch)
        _fetch(["apt-get", "download", *part.packages], cwd=scratch)
    for archive in sorted(scratch.glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(archive), str(made)], cwd=scratch)


def _make_c(part: CPart, go: Toolchain, scratch: Path, made: Path) -> None:
    source = Path(_module(part.module, part.version, scratch, go)["Dir"]) / part.source
    (made / "bin").mkdir()
    _run(["cc", "-Os", "-static", "-o", str(made / "bin" / part.program), str(source)], cwd=scratch)


def _fetch(
    argv: list[str], *, cwd: Path, go: Toolchain | None = None, still: Callable[[float], None] | None = None
) -> str:
    """`_run` of what needs the network, tried again when it fails."""
    for _ in range(TRIES - 1):
        with suppress(NoParts):
            return _run(argv, cwd=cwd, go=go, still=still)
        time.sleep(2)
    return _run(argv, cwd=cwd, go=go, still=still)


def _run(
    argv: list[str], *, cwd: Path, go: Toolchain | None = None, still: Callable[[float], None] | None = None
) -> str:
    """-> standard output; `still` hears each minute for how many seconds it has been running.

    Raises NoParts with the end of what the program said when it fails.
    """
    environment: Mapping[str, str] = go.environment if go else os.environ
    began = time.monotonic()
    program = shutil.which(argv[0], path=environment.get("PATH"))
    if not program:
        raise NoParts(f"{argv[0]} is not installed")
    with subprocess.Popen(
        [program, *argv[1:]], cwd=cwd, env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        while True:
            try:
                said, complained = process.communicate(timeout=SAY_EVERY_S)
                break
            except subprocess.TimeoutExpired:
                if still:
                    still(time.monotonic() - began)
            except BaseException:
                process.kill()
                raise
    if process.returncode != 0:
        raise NoParts(f"{' '.join(argv)}\n{(complained or said)[-2000:]}")
    return said
