"""A run as an answer. Written by the model itself, so that what is stored and what is shown are one spelling."""

from collections.abc import Mapping

from fastapi import Response

from service.core.run import Run

RunAnswer = Response


def run_answer(run: Run, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(run.model_dump_json(), status, dict(headers or {}), "application/json")
