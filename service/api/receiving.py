"""From a request's body to an `Upload` in a private directory that lives as long as the request.

The body is read as it streams in, never by the framework's form parser, which would spool it without our bounds.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from fastapi import Request

from service.api.context import Context
from service.core.errors import TooLarge
from service.intake.multipart import Upload, UploadCaps, receive_upload

_TEXT = {"type": "string"}
UPLOAD_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "bundle": {
                        "type": "string",
                        "contentMediaType": "application/octet-stream",
                        "description": ".zip, .tar, .tar.gz or .tar.zst, told by its content; only regular files and "
                        "directories. May be absent when the scenario needs no files",
                    },
                    "scenario": _TEXT | {"description": "YAML or JSON; absent: `scenario.yaml` at the bundle's root"},
                    "controls": _TEXT
                    | {"description": "YAML or JSON; absent: `controls.yaml` at the bundle's root, else defaults"},
                    "metadata": _TEXT | {"description": "JSON object of at most 16 text pairs, echoed with the run"},
                },
            },
            "encoding": {
                "scenario": {"contentType": "application/yaml, application/json"},
                "controls": {"contentType": "application/yaml, application/json"},
                "metadata": {"contentType": "application/json"},
            },
            "examples": {
                "without a bundle": {
                    "value": {
                        "scenario": "name: hello\nsteps:\n  - {name: say it, run: echo hello}\n",
                        "controls": "limits: {memory: 64MiB, wall: 10s}\n",
                        "metadata": '{"order": "17"}',
                    }
                }
            },
        }
    },
}


@asynccontextmanager
async def receiving(request: Request, context: Context, *, tenant: str) -> AsyncIterator[Upload]:
    """The upload, once it is complete. The slot is given back then: what is judged is no longer being received.

    Raises TooLarge, DocumentInvalid("request"), UploadTimedOut, Unavailable, StorageFull, ClientDisconnect.
    """
    bounds = context.deps.bounds
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > bounds.upload_max_bytes:
        raise _too_large(bounds.upload_max_bytes)
    staging = context.deps.blobs.staging()
    directory = await context.store(staging.__enter__)
    try:
        async with context.slots.take(tenant):
            upload = await receive_upload(
                _counted(request, max_bytes=bounds.upload_max_bytes),
                content_type=request.headers.get("content-type", ""),
                staging=directory,
                caps=UploadCaps(bundle_bytes=bounds.upload_max_bytes, deadline_s=bounds.upload_deadline_s),
            )
        yield upload
    finally:
        with anyio.CancelScope(shield=True):
            await context.store(staging.__exit__, None, None, None)


async def _counted(request: Request, *, max_bytes: int) -> AsyncIterator[bytes]:
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            raise _too_large(max_bytes)
        yield chunk


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"an upload may have at most {max_bytes} bytes, all parts together", extra={"max_bytes": max_bytes})
