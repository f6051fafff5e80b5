"""The answer that streams a stored file: what it is called, and that it lets go of the file whatever happens."""

import asyncio
import hashlib
import io
from typing import Any, cast

import anyio
import pytest

from service.api import downloads
from service.api.context import Context
from service.api.downloads import DownloadAnswer, safe_name
from service.usecases.downloads import Download


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("out/report.json", "report.json"), ("run_1-1.stdout", "run_1-1.stdout"), ("", "file"), ("..", "file"),
        ("a/", "file"), (".bashrc", "bashrc"), ("-rf", "rf"), ("a\r\nX-Evil: 1", "a_X-Evil_1"), ('q"; x=y', "q_x_y"),
        ("Ümläut", "_ml_ut"), ("\u202egpj.exe", "_gpj.exe"), ("x" * 300 + ".txt", "x" * 96 + ".txt"),
        ("a\\..\\b", "a_.._b"), ("%2e%2e", "_2e_2e"),
    ],
)  # fmt: skip
def test_a_download_is_called_something_harmless(name: str, safe: str) -> None:
    assert safe_name(name) == safe


class Direct:
    async def store(self, function: Any, *args: Any) -> Any:
        return function(*args)


def answer(file: io.BytesIO, size: int) -> DownloadAnswer:
    download = Download(file=file, bytes=size, sha256=hashlib.sha256(file.getvalue()).hexdigest(), name="a")
    return DownloadAnswer(cast(Context, Direct()), download)


async def _nothing() -> Any:
    raise AssertionError("nothing is received")


def test_a_reader_who_takes_nothing_is_hung_up_on_and_the_file_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PIECE_WITHIN_S", 0.01)
    file = io.BytesIO(b"x" * 10)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await anyio.sleep_forever()

    with pytest.raises(TimeoutError):
        asyncio.run(answer(file, 10)({"type": "http"}, _nothing, send))
    assert file.closed


def test_a_file_that_became_shorter_breaks_the_answer_off_instead_of_ending_it() -> None:
    file, sent = io.BytesIO(b"x" * 10), []

    async def send(message: Any) -> None:
        sent.append(message)

    with pytest.raises(OSError, match="shorter"):
        asyncio.run(answer(file, 11)({"type": "http"}, _nothing, send))
    assert file.closed
    assert sent[-1]["more_body"] is True
