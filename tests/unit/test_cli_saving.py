"""`blastdoor runs output` and `runs artifacts`: a stranger's bytes and names on this machine."""

import hashlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest
from typer.testing import CliRunner, Result

from service.cli.main import make_app
from service.cli.printing import write_bytes

ID = "run_0192f0c1d2e37a4b8c9d0e1f2a3b4c5d"
_AT = {"BLASTDOOR_URL": "http://127.0.0.1:1", "BLASTDOOR_KEY": "bd_t_x"}


def service(
    files: dict[str, bytes], *, says: dict[str, bytes] | None = None
) -> Callable[[httpx.Request], httpx.Response]:
    """A run with these artifacts; `says`: what it answers when asked for them."""
    rows = [
        {"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for path, data in files.items()
    ]

    def answer(request: httpx.Request) -> httpx.Response:
        _, found, path = request.url.raw_path.decode().partition("/artifacts/")
        if found:
            return httpx.Response(200, content=(says or files)[unquote(path)])
        return httpx.Response(200, json={"id": ID, "artifacts": rows})

    return answer


def invoke(*arguments: str, answer: Callable[[httpx.Request], httpx.Response]) -> Result:
    return CliRunner().invoke(make_app(), ["runs", *arguments], obj=httpx.MockTransport(answer), env=_AT)


# --- output -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "stream"), [((), "stdout"), (("--stderr",), "stderr")])
def test_into_a_pipe_go_the_bytes_themselves(option: tuple[str, ...], stream: str) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return httpx.Response(200, content=b"\x1b]0;owned\x07\xff\x00")

    result = invoke("output", ID, "2", *option, answer=answer)

    assert (result.exit_code, result.stdout_bytes) == (0, b"\x1b]0;owned\x07\xff\x00")
    assert asked == [f"/v1/runs/{ID}/steps/2/{stream}"]


def test_on_a_terminal_nothing_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)

    write_bytes([b"caf\xc3", b"\xa9\x1b[2J\r", b"\xe2\x80\xae\n", b"\xff"])

    assert terminal.getvalue() == "caf\u00e9\\x1b[2J\\r\\u202e\n\ufffd"


def test_what_the_service_refuses_is_said_and_not_printed_as_output() -> None:
    problem = {"code": "not_found", "detail": "there is no such thing here", "status": 404, "title": "Not found"}
    result = invoke("output", ID, "9", answer=lambda _: httpx.Response(404, json=problem))

    assert (result.exit_code, result.stdout) == (2, "")
    assert "no such thing" in result.stderr


# --- artifacts --------------------------------------------------------------------------------------------------------


def test_artifacts_are_saved_beneath_a_new_directory(tmp_path: Path) -> None:
    files = {"out/deep/r.json": b"{}", "out/a b%.txt": b"\x00\xff", "top": b""}
    target = tmp_path / "new"

    result = invoke("artifacts", ID, str(target), "--json", answer=service(files))

    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["saved"] == list(files)
    assert {path: (target / path).read_bytes() for path in files} == files
    assert not (target / "top").stat().st_mode & 0o111


@pytest.mark.parametrize(
    "path",
    ["../evil", "/etc/evil", "a/../../evil", "a//b", "", ".", "a/.", "new\nline", "\x1b[2J", "\u202etxt", "nul\0"],
)
def test_a_name_that_leads_elsewhere_saves_nothing_at_all(tmp_path: Path, path: str) -> None:
    target = tmp_path / "new"

    result = invoke("artifacts", ID, str(target), answer=service({"good": b"1", path: b"2"}))

    assert result.exit_code == 2
    assert not target.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_or_link_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    there, link = tmp_path / "there", tmp_path / "link"
    there.mkdir()
    link.symlink_to(there)
    for target in (there, link):
        result = invoke("artifacts", ID, str(target), answer=service({"a": b"1"}))
        assert result.exit_code == 2

    assert list(there.iterdir()) == []


def test_a_name_that_is_file_and_directory_at_once_is_an_error(tmp_path: Path) -> None:
    result = invoke("artifacts", ID, str(tmp_path / "new"), answer=service({"a": b"1", "a/b": b"2"}))

    assert result.exit_code == 2


def test_other_bytes_than_the_record_names_are_an_error(tmp_path: Path) -> None:
    result = invoke("artifacts", ID, str(tmp_path / "new"), answer=service({"a": b"1"}, says={"a": b"2"}))

    assert result.exit_code == 2
    assert "not the bytes" in result.stderr
