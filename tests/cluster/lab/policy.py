"""The lab's network policy controller: watches pods, namespaces and NetworkPolicies, and enforces them with nftables.

Test equipment for one node, written because no published controller can be had from the package registries. It
covers networking.k8s.io/v1 for IPv4: both directions, pod and namespace selectors, IP blocks, named ports and ranges.
Like every real one it is asynchronous: a pod runs before its rules are in force. Connections that exist when a policy
comes are not cut.

SIGUSR1 makes it inert, installed and running but enforcing nothing, as a broken controller would be; SIGUSR2 ends that.
"""

import ipaddress
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import httpx

from tests.cluster.lab.client import connect

TABLE = "inet blastdoor_lab"
WATCHED = {
    "pods": "/api/v1/pods",
    "namespaces": "/api/v1/namespaces",
    "policies": "/apis/networking.k8s.io/v1/networkpolicies",
}
SETTLE_S = 0.02  # changes come in bursts, and each application is a process
IN_FORCE = "in force:"
Object = Mapping[str, Any]


# --- What to enforce: pure ------------------------------------------------------------------------------------------


def ruleset(pods: Iterable[Object], namespaces: Iterable[Object], policies: Iterable[Object]) -> str:
    """-> the whole table, for `nft -f`, which puts it in place of the old one in a single transaction."""
    addressed = {address: pod for pod in pods if (address := _address(pod))}
    labels = {one["metadata"]["name"]: one["metadata"].get("labels") or {} for one in namespaces}
    policies = list(policies)
    chains: list[str] = []
    maps: dict[str, list[str]] = {"ingress": [], "egress": []}
    for address, pod in addressed.items():
        for direction, elements in maps.items():
            chosen = [policy for policy in policies if _isolates(policy, pod, direction)]
            if chosen:
                chain = f"{direction}_{address.replace('.', '_')}"
                elements.append(f"{address} : jump {chain}")
                rules = [
                    line
                    for policy in chosen
                    for rule in policy["spec"].get(direction) or []
                    for line in _rule(rule, direction, policy["metadata"]["namespace"], pod, addressed, labels)
                ]
                chains.append(_block(f"chain {chain}", [*rules, "drop"]))
    for direction, elements in maps.items():
        lines = ["type ipv4_addr : verdict"]
        if elements:
            lines.append(f"elements = {{ {', '.join(sorted(elements))} }}")
        chains.append(_block(f"map {direction}", lines))
    passing = "ct state established,related accept"
    hook = "type filter hook {} priority filter; policy accept"
    # What a node itself sends to its pods passes, as the kubelet's probes must; what a pod sends to its node does not.
    chains.append(
        _block("chain forward", [hook.format("forward"), passing, "ip saddr vmap @egress", "ip daddr vmap @ingress"])
    )
    chains.append(_block("chain input", [hook.format("input"), passing, "ip saddr vmap @egress"]))
    return f"{removal()}{_block(f'table {TABLE}', chains)}\n"


def removal() -> str:
    return f"table {TABLE}\ndelete table {TABLE}\n"  # to name it makes it, so that there is one to delete


def _block(head: str, lines: Iterable[str]) -> str:
    return "\n".join([f"{head} {{", *lines, "}"])


def _address(pod: Object) -> str | None:
    status = pod.get("status") or {}
    if pod["spec"].get("hostNetwork") or status.get("phase") in {"Succeeded", "Failed"}:
        return None
    address: str | None = status.get("podIP")
    return address


def _isolates(policy: Object, pod: Object, direction: str) -> bool:
    spec = policy["spec"]
    types = {one.lower() for one in spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])]}
    same = policy["metadata"]["namespace"] == pod["metadata"]["namespace"]
    return direction in types and same and selects(spec.get("podSelector") or {}, pod["metadata"].get("labels") or {})


def _rule(
    rule: Object,
    direction: str,
    namespace: str,
    pod: Object,
    addressed: Mapping[str, Object],
    labels: Mapping[str, Mapping[str, str]],
) -> Iterator[str]:
    """The lines that let pass what one rule of a policy allows; `return` goes on to the check of the other end."""
    side = "ip saddr" if direction == "ingress" else "ip daddr"
    peers = rule.get("from" if direction == "ingress" else "to") or []
    ports = rule.get("ports") or []
    ends = [end for peer in peers for end in _peer(peer, side, namespace, addressed, labels)] if peers else [""]
    for end in ends:
        if not ports:
            yield f"{end} return"
        for port in ports:
            if not isinstance(port.get("port"), str):
                yield f"{end} {_port(port, port.get('port'))} return"
            elif direction == "ingress":  # a name means a port of the pod that is asked
                for number in _named(pod, port):
                    yield f"{end} {_port(port, number)} return"
            else:
                for address, other in addressed.items():
                    for number in _named(other, port):
                        yield f"{end} ip daddr {address} {_port(port, number)} return"


def _peer(
    peer: Object,
    side: str,
    namespace: str,
    addressed: Mapping[str, Object],
    labels: Mapping[str, Mapping[str, str]],
) -> Iterator[str]:
    if block := peer.get("ipBlock"):
        if ipaddress.ip_network(block["cidr"]).version == 4:
            without = [f"{side} != {one}" for one in block.get("except") or []]
            yield " ".join([f"{side} {block['cidr']}", *without])
        return
    members = [
        address
        for address, other in addressed.items()
        if selects(peer.get("podSelector") or {}, other["metadata"].get("labels") or {})
        and (
            selects(peer["namespaceSelector"], labels.get(other["metadata"]["namespace"], {}))
            if "namespaceSelector" in peer
            else other["metadata"]["namespace"] == namespace
        )
    ]
    if members:
        yield f"{side} {{ {', '.join(sorted(members))} }}"


def _port(port: Object, number: int | None) -> str:
    protocol = (port.get("protocol") or "TCP").lower()
    if number is None:
        return f"meta l4proto {protocol}"
    return f"{protocol} dport {number}" + (f"-{port['endPort']}" if port.get("endPort") else "")


def _named(pod: Object, port: Object) -> Iterator[int]:
    wanted = (port["port"], port.get("protocol") or "TCP")
    for container in pod["spec"]["containers"]:
        for one in container.get("ports") or []:
            if (one.get("name"), one.get("protocol") or "TCP") == wanted:
                yield one["containerPort"]


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a label selector chooses what has these labels; the empty one chooses everything."""
    return all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items()) and all(
        _holds(one, labels) for one in selector.get("matchExpressions") or []
    )


def _holds(expression: Object, labels: Mapping[str, str]) -> bool:
    key, operator, values = expression["key"], expression["operator"], expression.get("values") or []
    match operator:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    raise ValueError(f"unknown operator {operator}")


# --- Keeping it in force --------------------------------------------------------------------------------------------


def follow(client: httpx.Client, kind: str, news: "queue.SimpleQueue[tuple[str, str, Any]]") -> None:
    """Lists one kind and watches it, for ever; a watch that ends, for whatever reason, begins with a fresh list."""
    while True:
        try:
            answer = client.get(WATCHED[kind])
            answer.raise_for_status()  # by itself: in a node of kind httpx is an old one, where this returns nothing
            listed = answer.json()
            news.put((kind, "LISTED", listed["items"]))
            since = {"watch": "true", "resourceVersion": listed["metadata"]["resourceVersion"]}
            with client.stream("GET", WATCHED[kind], params=since, timeout=None) as stream:
                stream.raise_for_status()
                for line in stream.iter_lines():
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        break
                    news.put((kind, event["type"], event["object"]))
        except httpx.HTTPError as error:
            print(f"watch of {kind} ended: {error!r}", flush=True)
            time.sleep(0.3)


def enforce(rules: str) -> None:
    done = subprocess.run(["nft", "-f", "-"], input=rules, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"nft refused the rules:\n{done.stderr}\n{rules}")


class Controller:
    def __init__(self) -> None:
        self.news: queue.SimpleQueue[tuple[str, str, Any]] = queue.SimpleQueue()  # its put is safe in a signal handler
        self.objects: dict[str, dict[str, Object]] = {}
        self.inert = False
        self.in_force = ""

    def switch(self, number: int, _frame: object) -> None:
        self.inert = number == signal.SIGUSR1
        self.news.put(("", "SWITCHED", None))

    def take(self, kind: str, what: str, found: Any) -> None:
        match what:
            case "LISTED":
                self.objects[kind] = {one["metadata"]["uid"]: one for one in found}
            case "ADDED" | "MODIFIED":
                self.objects[kind][found["metadata"]["uid"]] = found
            case "DELETED":
                self.objects[kind].pop(found["metadata"]["uid"], None)

    def run(self) -> None:
        while True:
            self.take(*self.news.get())
            time.sleep(SETTLE_S)
            while not self.news.empty():
                self.take(*self.news.get())
            if len(self.objects) < len(WATCHED):
                continue
            rules = removal() if self.inert else ruleset(*(self.objects[kind].values() for kind in WATCHED))
            if rules != self.in_force:
                enforce(rules)
                self.in_force = rules
                print(f"{IN_FORCE}\n{rules}", flush=True)


def give_up(failure: threading.ExceptHookArgs) -> None:
    """A watch that ended unseen would leave old rules in force: the whole lab ends instead."""
    threading.__excepthook__(failure)
    os._exit(1)


def main(kubeconfig: str) -> None:
    threading.excepthook = give_up
    controller = Controller()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, controller.switch)
    for kind in WATCHED:
        threading.Thread(target=follow, args=(connect(kubeconfig), kind, controller.news), daemon=True).start()
    controller.run()


if __name__ == "__main__":
    main(sys.argv[1])
