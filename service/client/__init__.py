"""Blastdoor for applications: submit, follow, fetch, and verify what comes back.

from service.client import Client, verify_webhook
"""

from service.client.client import Client
from service.client.errors import (
    CannotPack,
    CannotSave,
    ClientError,
    Document,
    NotBlastdoor,
    NotFinishedInTime,
    NotFound,
    Problem,
    Refused,
    ServiceFailed,
    Unreachable,
    WebhookInvalid,
)
from service.client.events import Event, OutputEvent, PhaseEvent, ProgressEvent, ResultEvent
from service.client.verify import verify_webhook

__all__ = [
    "CannotPack",
    "CannotSave",
    "Client",
    "ClientError",
    "Document",
    "Event",
    "NotBlastdoor",
    "NotFinishedInTime",
    "NotFound",
    "OutputEvent",
    "PhaseEvent",
    "Problem",
    "ProgressEvent",
    "Refused",
    "ResultEvent",
    "ServiceFailed",
    "Unreachable",
    "WebhookInvalid",
    "verify_webhook",
]
