"""What a cluster answers when it does not do what it was asked; the vendor's errors end here."""

from service.core.errors import BoundaryError


class ClusterError(BoundaryError):
    """The API server, or the way to it, said no. `status` is its HTTP status, 0 when there was none; `reason` its one
    word for it (`NotFound`, `Invalid`, ...); the detail its own sentence."""

    code = "cluster"

    def __init__(self, detail: str, *, status: int = 0, reason: str = "") -> None:
        super().__init__(detail, extra={"status": status, "reason": reason})
        self.status = status
        self.reason = reason


class NoKubeconfig(ClusterError):
    """The file does not lead to an API server; nothing was asked."""


class Denied(ClusterError):
    """401 or 403: by RBAC, admission, PodSecurity or a quota; the detail says which."""


class Taken(ClusterError):
    """409: something else has that name, or is not what it was when we looked."""


class Unreachable(ClusterError):
    """No answer, 429 or 5xx, for as long as we had patience. What was asked may have been done all the same."""


class NotBegun(Unreachable):
    """Nor was it done: what was asked never came to be."""
