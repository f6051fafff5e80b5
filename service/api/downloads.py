r"""What a guest wrote, for whoever asks: /v1/runs/{id}/steps/{n}/stdout, /stderr, /artifacts/{path} and /junit.xml.

It is hostile in a browser: always `application/octet-stream` (but for the report, which is of our making), always an
attachment under a name of our making, never sniffed, and sandboxed should one be shown all the same. Bytes are streamed
from the file, a piece at a time, so that a hundred readers of the largest artifact cost a hundred pieces of memory.
"""

import base64
import re
from typing import Annotated

import anyio
from fastapi import APIRouter, Path, Response
from starlette.convertors import Convertor, register_url_convertor
from starlette.types import Receive, Scope, Send

from service.api.auth import ACaller
from service.api.context import Context, InContext
from service.api.documentation import Responses, problems
from service.core.errors import NotFound
from service.usecases import downloads, fetch
from service.usecases.downloads import Download, Stream

MEDIA_TYPE = "application/octet-stream"
JUNIT_TYPE = "application/xml"
PIECE_BYTES = 256 * 1024
PIECE_WITHIN_S = 60.0
"""A reader that takes longer for one piece is hung up on: it holds a file open."""
_POLICY = "sandbox; default-src 'none'; frame-ancestors 'none'"
_STEP = re.compile(r"[1-9][0-9]{0,2}", re.ASCII)
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+", re.ASCII)
_MAX_NAME = 100


class _AnyPath(Convertor[str]):
    """Starlette's own `path` does not match a newline, and a guest's file may have one in its name."""

    regex = r"[\s\S]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("anypath", _AnyPath())
router = APIRouter(prefix="/v1/runs", tags=["runs"])


class DownloadAnswer(Response):
    """Closes the file, whatever becomes of the reader."""

    media_type = MEDIA_TYPE

    def __init__(self, context: Context, download: Download) -> None:
        digest = base64.b64encode(bytes.fromhex(download.sha256)).decode()
        headers = {
            "Content-Length": str(download.bytes),
            "Content-Disposition": f'attachment; filename="{safe_name(download.name)}"',
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": _POLICY,
            "Repr-Digest": f"sha-256=:{digest}:",
        }
        super().__init__(headers=headers)
        self._context, self._download = context, download

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._download.file as file:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            left = self._download.bytes
            while left > 0:
                piece = await self._context.store(file.read, min(PIECE_BYTES, left))
                if not piece:
                    raise OSError("a stored file is shorter than it was when it was opened")
                left -= len(piece)
                with anyio.fail_after(PIECE_WITHIN_S):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def safe_name(name: str) -> str:
    """The last part of the name, of letters and digits that no shell, file system or header takes for anything else."""
    last = _UNSAFE.sub("_", name.rpartition("/")[2]).lstrip(".-")
    return last[-_MAX_NAME:].lstrip(".-") or "file"


def _text(description: str) -> dict[str, object]:
    return {"description": description, "schema": {"type": "string"}}


_BYTES: Responses = {
    200: {
        "description": "the bytes",
        "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        "headers": {
            "Content-Disposition": _text("`attachment`, with a name that is safe to save under"),
            "Content-Length": _text("bytes"),
            "Repr-Digest": _text("RFC 9530, SHA-256"),
        },
    }
}
_PROBLEMS = problems("unauthenticated", "forbidden", "request_invalid", "not_found")
StepNumber = Annotated[str, Path(description="the step's `n`, from 1")]


@router.get(
    "/{run_id}/steps/{n}/stdout", operation_id="getStepStdout", summary="What a step printed", response_class=Response,
    responses=_BYTES | _PROBLEMS,
)  # fmt: skip
async def get_stdout(context: InContext, caller: ACaller, run_id: str, n: StepNumber) -> DownloadAnswer:
    """As it was kept: of more than `limits.output`, head and tail. Nothing printed is nothing in the body."""
    return await _output(context, tenant=caller.tenant, run_id=run_id, n=n, stream="stdout")


@router.get(
    "/{run_id}/steps/{n}/stderr", operation_id="getStepStderr", summary="What a step printed as errors",
    response_class=Response, responses=_BYTES | _PROBLEMS,
)  # fmt: skip
async def get_stderr(context: InContext, caller: ACaller, run_id: str, n: StepNumber) -> DownloadAnswer:
    """As it was kept: of more than `limits.output`, head and tail. Nothing printed is nothing in the body."""
    return await _output(context, tenant=caller.tenant, run_id=run_id, n=n, stream="stderr")


async def _output(context: Context, *, tenant: str, run_id: str, n: str, stream: Stream) -> DownloadAnswer:
    if not _STEP.fullmatch(n):
        raise NotFound
    deps = context.deps
    download = await context.store(
        downloads.open_output, deps.runs, deps.blobs, run_id=run_id, tenant=tenant, n=int(n), stream=stream
    )
    return DownloadAnswer(context, download)


@router.get(
    "/{run_id}/artifacts/{path:anypath}", operation_id="getArtifact", summary="Download an artifact",
    response_class=Response, responses=_BYTES | _PROBLEMS,
)  # fmt: skip
async def get_artifact(
    context: InContext,
    caller: ACaller,
    run_id: str,
    path: Annotated[str, Path(description="as the run's `artifacts` spell it, URL-encoded")],
) -> DownloadAnswer:
    """One file that the run left and its scenario asked for."""
    deps = context.deps
    download = await context.store(
        downloads.open_artifact, deps.runs, deps.blobs, run_id=run_id, tenant=caller.tenant, path=path
    )
    return DownloadAnswer(context, download)


_JUNIT: Responses = {
    200: {
        "description": "the report",
        "content": {JUNIT_TYPE: {"schema": {"type": "string"}}},
        "headers": {"Content-Disposition": _text("`attachment`, with a name that is safe to save under")},
    }
}


@router.get(
    "/{run_id}/junit.xml", operation_id="getJunit", summary="A finished run as JUnit XML", response_class=Response,
    responses=_JUNIT | problems("unauthenticated", "forbidden", "request_invalid", "not_found", "not_finished"),
)  # fmt: skip
async def get_junit(context: InContext, caller: ACaller, run_id: str) -> Response:
    """A step is a testcase; `failure` is what the code did, `error` our infrastructure. Characters that XML has no
    place for are spelled out, as `\\x1b`."""
    report = await context.store(fetch.junit_report, context.deps.runs, run_id=run_id, tenant=caller.tenant)
    headers = {
        "Content-Disposition": f'attachment; filename="{safe_name(run_id)}.junit.xml"',
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": _POLICY,
    }
    return Response(report.encode(), headers=headers, media_type=JUNIT_TYPE)
