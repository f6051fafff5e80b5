"""What can go wrong between an application and the service.

ClientError
├── Problem                  the service answered with a problem document (RFC 9457)
│   ├── Refused              4xx: the request is at fault, and will be again
│   │   └── NotFound         404: absent, or another tenant's; the two are never told apart
│   └── ServiceFailed        5xx: the platform is at fault
├── Unreachable              no answer, for as long as it was tried; what was asked may have been done all the same
│   └── NotBlastdoor         something answered, but not Blastdoor
├── NotFinishedInTime        `wait` is over; the run goes on
├── CannotPack               the directory is not one that can be uploaded
├── CannotSave               a name that leads elsewhere, or bytes that are not those of the record
└── WebhookInvalid           not from who holds the secret, or too old
"""

from collections.abc import Mapping
from typing import Any

Document = dict[str, Any]


class ClientError(Exception):
    """The root of all of them."""


class Problem(ClientError):
    """`document` is the problem as it came; `code` the contract's stable word for it, `detail` a sentence.
    `retry_after_s`: when the service said that it is worth asking again, in seconds."""

    def __init__(self, status: int, document: Mapping[str, Any], *, retry_after_s: float | None = None) -> None:
        self.status = status
        self.document = dict(document)
        self.code = str(document.get("code", ""))
        self.detail = str(document.get("detail") or document.get("title") or f"HTTP status {status}")
        self.retry_after_s = retry_after_s
        super().__init__(self.detail)


class Refused(Problem):
    pass


class NotFound(Refused):
    pass


class ServiceFailed(Problem):
    pass


class Unreachable(ClientError):
    """The message says where and how it failed. `unsent`: the service cannot have seen the request."""

    def __init__(self, message: str, *, unsent: bool = False) -> None:
        super().__init__(message)
        self.unsent = unsent


class NotBlastdoor(Unreachable):
    pass


class NotFinishedInTime(ClientError):
    """`run` is the last that was seen of it."""

    def __init__(self, run: Document) -> None:
        super().__init__(f"{run.get('id')} is still {run.get('phase')}")
        self.run = run


class CannotPack(ClientError):
    """The message names the place and what to do."""


class CannotSave(ClientError):
    """The message names the file, which is not kept; those before it are."""


class WebhookInvalid(ClientError):
    pass


def problem(status: int, document: Mapping[str, Any], *, retry_after_s: float | None = None) -> Problem:
    """The class that the status asks for."""
    kind = NotFound if status == 404 else Refused if status < 500 else ServiceFailed
    return kind(status, document, retry_after_s=retry_after_s)
