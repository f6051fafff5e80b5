"""Where the service is: options, then the environment, then the file of `up`; and a key never goes astray."""

import os
import stat
from pathlib import Path

import pytest

from service.cli.address import (
    CLIENT_FILE,
    Address,
    NoAddress,
    default_state_dir,
    find_address,
    read_client_file,
    write_client_file,
)

FILE = {
    "url": "http://127.0.0.1:8700",
    "tenant": "demo",
    "tenant_key": "bd_t_1",
    "service_key": "bd_s_1",
    "admin_key": "bd_a_1",
    "redis_url": "redis://...",
}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    write_client_file(tmp_path / CLIENT_FILE, FILE)
    return tmp_path


def test_options_come_before_the_environment_and_that_before_the_file(state: Path) -> None:
    environment = {"BLASTDOOR_URL": "http://127.0.0.1:2", "BLASTDOOR_KEY": "bd_t_2"}
    given = find_address(url="http://127.0.0.1:1", key="bd_t_1", state=state, environment=environment)
    assert (given.url, given.key_for("tenant")) == ("http://127.0.0.1:1", "bd_t_1")
    from_environment = find_address(url=None, key=None, state=state, environment=environment)
    assert (from_environment.url, from_environment.key_for("tenant")) == ("http://127.0.0.1:2", "bd_t_2")
    from_file = find_address(url=None, key=None, state=state, environment={})
    assert (from_file.url, from_file.key_for("tenant")) == ("http://127.0.0.1:8700", "bd_t_1")


def test_the_file_has_a_key_for_each_role(state: Path) -> None:
    address = find_address(url=None, key=None, state=state, environment={})
    assert [address.key_for(role) for role in ("tenant", "service", "admin")] == ["bd_t_1", "bd_s_1", "bd_a_1"]


def test_a_given_key_goes_to_the_file_s_address(state: Path) -> None:
    address = find_address(url=None, key="bd_t_9", state=state, environment={})
    assert (address.url, address.key_for("admin")) == ("http://127.0.0.1:8700", "bd_t_9")


def test_the_file_s_keys_never_go_to_another_address(state: Path) -> None:
    with pytest.raises(NoAddress, match="no key for http://elsewhere"):
        find_address(url="http://elsewhere", key=None, state=state, environment={})


def test_a_file_that_others_could_read_is_not_used(state: Path) -> None:
    (state / CLIENT_FILE).chmod(0o640)
    with pytest.raises(NoAddress, match="not for its owner alone"):
        read_client_file(state / CLIENT_FILE)


def test_a_link_in_its_place_is_not_followed(state: Path) -> None:
    (state / CLIENT_FILE).rename(state / "elsewhere")
    (state / CLIENT_FILE).symlink_to(state / "elsewhere")
    with pytest.raises(NoAddress):
        read_client_file(state / CLIENT_FILE)


def test_the_file_is_its_owner_s_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_client_file(tmp_path / CLIENT_FILE, FILE)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / CLIENT_FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"url": "http://x"}'])
def test_a_file_that_is_something_else_is_said_to_be_so(tmp_path: Path, content: str) -> None:
    path = tmp_path / CLIENT_FILE
    path.touch(mode=0o600)
    path.write_text(content)
    with pytest.raises(NoAddress, match="not what `blastdoor up` writes"):
        read_client_file(path)


@pytest.mark.parametrize("url", ["127.0.0.1:8700", "ftp://x", "http://", "nonsense"])
def test_what_is_no_address_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(NoAddress, match="no address of a service"):
        find_address(url=url, key="bd_t_1", state=tmp_path, environment={})


@pytest.mark.parametrize(
    ("url", "exposes"),
    [
        ("http://127.0.0.1:8700", False),
        ("http://[::1]:8700", False),
        ("http://localhost:8700", False),
        ("http://localhost.evil.example", True),
        ("http://10.0.0.1:8700", True),
        ("https://blastdoor.example", False),
    ],
)
def test_plain_http_to_another_machine_exposes_the_key(url: str, exposes: bool) -> None:
    assert Address(url=url).exposes_key is exposes


def test_keys_are_not_in_the_text_of_an_address() -> None:
    assert "bd_" not in repr(Address(url="http://x", key="bd_t_1", keys={"admin": "bd_a_1"}))


def test_state_is_where_xdg_says(tmp_path: Path) -> None:
    assert default_state_dir({"XDG_STATE_HOME": str(tmp_path)}) == tmp_path / "blastdoor"
    assert default_state_dir({"XDG_STATE_HOME": "relative"}) == Path.home() / ".local/state/blastdoor"
    assert default_state_dir({"BLASTDOOR_STATE_DIR": "/srv/b"}) == Path("/srv/b")
