"""Where a run's things are on this host, by names alone: any process that knows the reference can find them.

<runtime_dir>/<installation>/<name>/     0700, ours; the name is the run's id and its fence
    ref.json                             the label: who and what this is; removed last
    bundle/config.json                   the OCI configuration
    runsc/                               runsc's own `--root`, of this run only
    fs/                                  the run's tmpfs; `work` and `tmp` in it are the guest's
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from service.core.boundary import BoundaryKind, BoundaryRef

_NAME = re.compile(r"^bd-([0-9a-f]{32})-f([0-9]{1,18})$")
_SAFE = re.compile(r"^[A-Za-z0-9_-]{1,64}$")
_REF = "ref.json"
_LABELLED_WITHIN = timedelta(seconds=60)
_LONG_AGO = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True)
class Place:
    """One run's directory."""

    directory: Path

    @property
    def bundle(self) -> Path:
        return self.directory / "bundle"

    @property
    def runsc(self) -> Path:
        return self.directory / "runsc"

    @property
    def fs(self) -> Path:
        return self.directory / "fs"

    @property
    def unlabelled(self) -> Path:
        """The directory before it has its label."""
        return self.directory.with_name(f".{self.directory.name}")

    def make(self, ref: BoundaryRef) -> None:
        """It appears with its label in it, or not at all. Raises FileExistsError when the name is taken."""
        new = self.unlabelled
        new.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.directory.exists():
            raise FileExistsError(f"{self.directory} exists")
        new.mkdir(mode=0o700)
        (new / _REF).write_text(ref.model_dump_json())
        new.rename(self.directory)
        for part in (self.bundle, self.runsc, self.fs):
            part.mkdir(mode=0o700)

    def remove(self) -> None:
        """What we and runsc wrote, by name; nothing in here was ever writable by a guest. `fs` must be unmounted: then
        it is empty. The label goes last. Raises OSError when something else is found."""
        for directory in (self.unlabelled, self.directory):
            for part in ("bundle", "runsc"):
                _remove_flat(directory / part)
            # Whose tmpfs was unmounted under it while it was still being made has put its directories below.
            for part in ("fs/work", "fs/tmp", "fs"):
                with suppress(FileNotFoundError):  # not made yet, or another process removes it too
                    (directory / part).rmdir()
            with suppress(FileNotFoundError):
                (directory / _REF).unlink()
            with suppress(FileNotFoundError):
                directory.rmdir()

    @property
    def exists(self) -> bool:
        return self.directory.exists() or self.unlabelled.exists()


def _label(directory: Path) -> BoundaryRef | None:
    try:
        return BoundaryRef.model_validate_json((directory / _REF).read_text())
    except (OSError, ValidationError):
        return None


def _soon(directory: Path) -> datetime:
    """Just made, it may get its label yet."""
    try:
        return datetime.fromtimestamp(directory.stat().st_mtime, UTC) + _LABELLED_WITHIN
    except OSError:
        return _LONG_AGO


def _remove_flat(directory: Path) -> None:
    with suppress(FileNotFoundError):  # as above
        for name in os.listdir(directory):
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()


@dataclass(frozen=True, kw_only=True)
class Places:
    """All runs of one installation and site on this host."""

    runtime_dir: Path
    installation: str
    site: str

    def __post_init__(self) -> None:
        if not _SAFE.match(self.installation):
            raise ValueError("installation should be letters, digits, - and _")

    @property
    def home(self) -> Path:
        return self.runtime_dir / self.installation

    @property
    def group_prefix(self) -> str:
        """Of the site's own: control groups are the whole machine's, and two sites may be on one."""
        site = hashlib.sha256(self.site.encode()).hexdigest()[:8]
        return f"blastdoor-{self.installation}.{site}."

    def place(self, name: str) -> Place:
        if not _NAME.match(name):
            raise ValueError(f"{name!r} is no boundary's name")
        return Place(self.home / name)

    def group_name(self, name: str) -> str:
        return self.group_prefix + name

    def labels(self) -> Iterator[BoundaryRef]:
        """One for each directory. A directory that lost its label is still found by its name."""
        if not self.home.is_dir():
            return
        for entry in sorted(os.scandir(self.home), key=lambda found: found.name):
            name = entry.name.removeprefix(".")
            if _NAME.match(name):  # the directory may have got its name since it was listed
                ref = _label(Path(entry.path)) or _label(self.home / name)
                if ref is not None:
                    yield ref
                elif os.path.lexists(entry.path):
                    yield self.unlabelled(name, expires_at=_soon(Path(entry.path)))

    def unlabelled(self, name: str, *, expires_at: datetime = _LONG_AGO) -> BoundaryRef:
        """What a name alone says; long expired, so that whoever reaps takes it."""
        match = _NAME.match(name)
        if match is None:
            raise ValueError(f"{name!r} is no boundary's name")
        return BoundaryRef(
            installation=self.installation,
            kind=BoundaryKind.GVISOR,
            site=self.site,
            tenant="",
            run_id=f"run_{match[1]}",
            fence=int(match[2]),
            expires_at=expires_at,
        )

    def is_name(self, name: str) -> bool:
        return _NAME.match(name) is not None
