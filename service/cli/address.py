"""Where the service is and with which key we come: options, then the environment, then the file of `blastdoor up`.

Keys are secrets. The file is only read when nobody else could have read or written it, and a key goes over plain HTTP
to another machine only with a warning.
"""

import ipaddress
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

CLIENT_FILE = "client.json"
Role = Literal["tenant", "service", "admin"]


class NoAddress(Exception):
    """It cannot be told where the service is, or with which key to ask; the message says what would help."""


class NoService(NoAddress):
    """None was named, and none was started here."""


@dataclass(frozen=True)
class Address:
    """`key` is what was given for this command; `keys` are those of the client file, by role."""

    url: str
    key: str | None = field(default=None, repr=False)
    keys: Mapping[Role, str] = field(default_factory=dict, repr=False)

    def key_for(self, *roles: Role) -> str:
        """The key given, else the client file's first one among `roles`. Raises NoAddress."""
        key = self.key or next((self.keys[role] for role in roles if role in self.keys), None)
        if key is None:
            raise NoAddress(f"no key for {self.url}: give --key or set BLASTDOOR_KEY")
        return key

    @property
    def on_this_machine(self) -> bool:
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def exposes_key(self) -> bool:
        """Whether a key would cross a network in the clear."""
        return urlsplit(self.url).scheme == "http" and not self.on_this_machine


def default_state_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """Where `blastdoor up` keeps everything: BLASTDOOR_STATE_DIR, else `blastdoor` in the XDG state home."""
    if given := environment.get("BLASTDOOR_STATE_DIR"):
        return Path(given)
    home = environment.get("XDG_STATE_HOME", "")
    base = Path(home) if home.startswith("/") else Path.home() / ".local" / "state"
    return base / "blastdoor"


def find_address(
    *, url: str | None, key: str | None, state: Path | None, environment: Mapping[str, str] = os.environ
) -> Address:
    """`--url`/`--key`, then BLASTDOOR_URL/BLASTDOOR_KEY, then the state directory's client file. Raises NoAddress.

    A key is never sent to a place it does not belong to: the file's keys are used for the file's URL only.
    """
    url, key = url or environment.get("BLASTDOOR_URL"), key or environment.get("BLASTDOOR_KEY")
    if url:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise NoAddress(f"{url!r} is no address of a service; it looks like http://127.0.0.1:8700")
        if key is None:
            raise NoAddress(f"no key for {url}: give --key or set BLASTDOOR_KEY")
        return Address(url=url.rstrip("/"), key=key)
    path = (state or default_state_dir(environment)) / CLIENT_FILE
    found = read_client_file(path)
    return Address(url=found.url, key=key, keys=found.keys)


def read_client_file(path: Path) -> Address:
    """Raises NoAddress when it is not there, not ours alone, or not what `up` writes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise NoService(
            f"no service is known here ({path}: {error.strerror}); start one with `blastdoor up`, "
            "or say where it is: --url and --key, or BLASTDOOR_URL and BLASTDOOR_KEY"
        ) from error
    with open(descriptor, encoding="utf-8") as file:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise NoAddress(f"{path} holds keys but is not for its owner alone; `blastdoor up` writes it anew")
        try:
            content = json.load(file)
            keys: dict[Role, str] = {
                "tenant": content["tenant_key"], "service": content["service_key"], "admin": content["admin_key"],
            }  # fmt: skip
            return Address(url=content["url"], keys=keys)
        except (ValueError, KeyError, TypeError) as error:
            raise NoAddress(f"{path} is not what `blastdoor up` writes; start it again") from error


def write_client_file(path: Path, content: Mapping[str, object]) -> None:
    """Replace the file as a whole, 0600 from its first byte on."""
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    unfinished.replace(path)
