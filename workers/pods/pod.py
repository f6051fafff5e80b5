"""A pod of ours in the cluster, and the words that our program in it knows: one command each, by the engine's exec."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from service.core.boundary import Cancellation, Listener
from service.core.errors import BoundaryLost, ProvisionFailed, SandboxBroken
from workers.kube import Cluster, ClusterError, ExecEnded, Manifest
from workers.pods.protocol import read_finding
from workers.pods.render import CONTAINER

_HOPELESS = frozenset({"ErrImageNeverPull", "InvalidImageName", "CreateContainerConfigError", "CreateContainerError"})
_WATCH_S = 2.0
_WORD_S = 20.0
_SHUT_S = 25.0
_SAYS_WITHIN_S, _LOOK_S = 5.0, 0.1
_MOST_SAID = 1024
_KILL_TRIES = 5
_SIGNALLED = 128
KILLED = _SIGNALLED + 9
ENDED_FROM_WITHIN = "the guest ended the first process of its pod"


@dataclass(frozen=True)
class Pod:
    cluster: Cluster
    namespace: str
    name: str
    uid: str
    init: str

    def read(self) -> Manifest | None:
        """As the API server has it; None when it is gone, or another has its name. Raises ClusterError."""
        found = self.cluster.get("Pod", self.name, self.namespace)
        return found if found is not None and found["metadata"]["uid"] == self.uid else None

    def command(
        self, *words: str, deadline: float, on_output: Listener, stdin: Iterable[bytes] | None = None,
        stop: Callable[[], bool] = lambda: False, begins: Callable[[], None] = lambda: None,
    ) -> ExecEnded:  # fmt: skip
        """`deadline` is monotonic; `begins` is called when the word is about to be said. Raises ClusterError when it
        could not even be asked."""
        return self.cluster.exec_(
            self.namespace, self.name, CONTAINER, [self.init, *words],
            stdin=stdin, on_output=on_output, deadline=deadline, stop=stop, begins=begins,
        )  # fmt: skip

    def says(
        self, *words: str, most_bytes: int = _MOST_SAID, seconds: float = _WORD_S,
        stop: Callable[[], bool] = lambda: False,
    ) -> bytes:  # fmt: skip
        """What a word prints, when it ends well. Raises BoundaryLost."""
        said = bytearray()

        def hear(stream: str, data: bytes) -> None:
            if stream == "stdout" and len(said) <= most_bytes:
                said.extend(data)

        deadline = time.monotonic() + seconds
        try:
            ended = self.command(
                *words, deadline=deadline, on_output=hear, stop=lambda: len(said) > most_bytes or stop()
            )
        except ClusterError as error:
            raise BoundaryLost(f"our program in the pod could not be asked to {words[0]}: {error}") from error
        if ended.why == "exited" and ended.exit_code == KILLED:
            raise SandboxBroken(f"the guest killed what was sent to {words[0]}")
        if ended.why != "exited" or ended.exit_code != 0:
            raise BoundaryLost(f"our program in the pod could not {words[0]}: {shown(ended)}")
        return bytes(said)

    def kill_guest(self) -> None:
        """Ends every process of the guest's, and has seen that none is left. A guest of the same uid may end our
        program first, and so may our own step that sees us gone: more than once, then. Raises BoundaryLost."""
        for left in range(_KILL_TRIES - 1, -1, -1):
            try:
                self.says("kill")
            except BoundaryLost:
                if not left or self.is_over():
                    raise
            else:
                return

    def blamed(self, error: BoundaryLost) -> BoundaryLost:
        """The same, or SandboxBroken where it is known that the guest did it: the node says so moments after nothing
        runs in the pod any more."""
        deadline = time.monotonic() + _SAYS_WITHIN_S
        while True:
            try:
                found = self.read()
            except ClusterError:
                return error
            if found is not None and ended_from_within(found):
                return SandboxBroken(ENDED_FROM_WITHIN)
            if is_over(found) or time.monotonic() > deadline:
                return error
            time.sleep(_LOOK_S)

    def is_over(self) -> bool:
        """Whether the node says that nothing of it runs any more, or that it does not exist."""
        try:
            return is_over(self.read())
        except ClusterError:
            return False

    def await_running(self, cancelled: Cancellation, *, within_s: float) -> Manifest:
        """-> the pod as it runs. Raises ProvisionFailed, ClusterError."""
        deadline = time.monotonic() + within_s
        seen: Manifest = {}
        while time.monotonic() < deadline:
            seconds = min(_WATCH_S, deadline - time.monotonic())
            for what, seen in self.cluster.watch("Pod", self.namespace, name=self.name, seconds=seconds):
                if cancelled.is_set():
                    break
                if what == "DELETED" or seen["metadata"]["uid"] != self.uid:
                    raise ProvisionFailed("the pod was deleted while it started")
                if is_running(seen):
                    return seen
                if is_over(seen):
                    raise ProvisionFailed(f"the pod ended while it started: {explained(seen)}")
                if waiting_for(seen) in _HOPELESS:
                    raise ProvisionFailed(f"the pod cannot start: {explained(seen)}")
            if cancelled.is_set():
                raise ProvisionFailed("cancelled while the pod started")
        raise ProvisionFailed(f"the pod did not run within {within_s:g} s: {explained(seen)}")

    def await_shut(self, cancelled: Cancellation) -> tuple[int, float]:
        """Until network policy is in force for this very pod -> `read_finding`. Raises ProvisionFailed."""
        try:
            return read_finding(self.says("wait", seconds=_SHUT_S, stop=cancelled.is_set))
        except BoundaryLost as error:
            raise ProvisionFailed(f"network policy did not come into force for the pod: {error}") from error

    def await_end(self, *, within_s: float) -> Manifest | None:
        """Until the node says that nothing of it runs -> the pod as it is then, None when it is gone. Raises
        BoundaryLost when it goes on; ClusterError."""
        deadline = time.monotonic() + within_s
        found = self.read()
        while not is_over(found) and (left := deadline - time.monotonic()) > 0:
            for what, found in self.cluster.watch("Pod", self.namespace, name=self.name, seconds=min(_WATCH_S, left)):
                if what == "DELETED":
                    return None
                if is_over(found):
                    break
        if not is_over(found):
            raise BoundaryLost("the pod goes on")
        return found


def is_running(pod: Manifest) -> bool:
    return "running" in _state(pod)


def is_over(pod: Manifest | None) -> bool:
    return pod is None or pod.get("status", {}).get("phase") in ("Succeeded", "Failed") or "terminated" in _state(pod)


def waiting_for(pod: Manifest) -> str:
    return str(_state(pod).get("waiting", {}).get("reason", ""))


def ended_by(pod: Manifest) -> str:
    """Why the node ended the container, in its own word: `OOMKilled`, `Error`, `Completed`; or why the pod: `Evicted`,
    `DeadlineExceeded`."""
    status = pod.get("status", {})
    return str(status.get("reason") or _state(pod).get("terminated", {}).get("reason", ""))


def ended_from_within(pod: Manifest) -> bool:
    """Whether our first process was ended by a signal, and the node did not send it: it says so when it does. On the
    node's own kernel no guest can; gVisor lets it. A sandbox that dies as a whole (its kernel crashed, somebody on the
    node killed it) has status 128 (measured with containerd), which is no signal's."""
    by_the_node = pod.get("status", {}).get("reason") or "deletionTimestamp" in pod["metadata"]
    own_kernel = "runtimeClassName" in pod["spec"]
    return bool(own_kernel and not by_the_node and ended_by(pod) == "Error" and (exit_code(pod) or 0) > _SIGNALLED)


def exit_code(pod: Manifest) -> int | None:
    """Of the first process, as the node says; None while it runs or when nobody knows."""
    code: int | None = _state(pod).get("terminated", {}).get("exitCode")
    return code


def explained(pod: Manifest) -> str:
    """For people: what the node and the scheduler say of it."""
    status = pod.get("status", {})
    state = _state(pod)
    said = [part for key in ("waiting", "terminated") for part in (_words(state.get(key, {})),) if part]
    said += [row["message"] for row in status.get("conditions", ()) if row["status"] != "True" and row.get("message")]
    return "; ".join([*said, status.get("message", "")]).strip("; ") or str(status.get("phase", "nothing was heard"))


def shown(ended: ExecEnded) -> str:
    return ended.message or (f"status {ended.exit_code}" if ended.why == "exited" else ended.why)


def _words(part: Manifest) -> str:
    return ": ".join(str(part[key]) for key in ("reason", "message") if part.get(key))


def _state(pod: Manifest) -> dict[str, Any]:
    statuses = pod.get("status", {}).get("containerStatuses") or [{}]
    state: dict[str, Any] = statuses[0].get("state") or {}
    return state
