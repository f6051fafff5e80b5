"""The network of one node of a kind cluster, in place of kindnetd: links and routes of pods, and network policy.

kindnetd enforces policy by way of a queue that the kernels here lack, and fails without a word. This one is a service
of the node (`python3 -m tests.cluster.engine.network`), with the identity that the node's kubelet has, and the rules
are those of the lab's controller. A node only gets its CNI configuration, without which it is not ready, once the
rules are in force; each link is routed, so that all that goes from pod to pod passes the packet filter of the node.
"""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.cluster.lab import policy
from tests.cluster.lab.client import connect

IDENTITY = Path("/etc/kubernetes/kubelet.conf")
KUBECONFIG = Path("/run/blastdoor-network.kubeconfig")
CNI = Path("/etc/cni/net.d/10-blastdoor.conflist")
LINK = "eth0"
LOOK_EVERY_S = 0.3
THEN_EVERY_S = 2.0
TABLE = "ip blastdoor_node"
SYSCTLS = {  # of the node's network namespace
    "net/ipv4/ip_forward": "1",
    "net/ipv4/conf/all/rp_filter": "1",  # a pod may use no address but its own
    "net/ipv4/conf/default/rp_filter": "1",
    "net/ipv6/conf/all/disable_ipv6": "1",  # no way past the packet filter, which is for IPv4
    "net/ipv6/conf/default/disable_ipv6": "1",
}
Node = Mapping[str, Any]


def conflist(subnet: str, mtu: int) -> str:
    ranges = [[{"subnet": subnet}]]
    ipam = {"type": "host-local", "dataDir": "/run/cni-ipam-state", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]}
    plugin = {"type": "ptp", "ipMasq": False, "mtu": mtu, "ipam": ipam}
    return json.dumps({"cniVersion": "1.0.0", "name": "blastdoor", "plugins": [plugin]})


def masquerade(mine: str, subnets: Iterable[str]) -> str:
    """-> for `nft -f`: what pods send out of the cluster leaves under the node's address."""
    inside = ", ".join(sorted(subnets))
    return f"""\
table {TABLE}
delete table {TABLE}
table {TABLE} {{
chain postrouting {{
type nat hook postrouting priority srcnat; policy accept
ip saddr {mine} ip daddr != {{ {inside} }} oifname "{LINK}" masquerade
}}
}}
"""


def routes(me: str, nodes: Iterable[Node]) -> dict[str, str]:
    """-> the subnet of each other node, and the address that it is reached by."""
    return {
        subnet: address
        for node in nodes
        if node["metadata"]["name"] != me and (subnet := subnet_of(node)) and (address := _address(node))
    }


def subnet_of(node: Node) -> str | None:
    found: str | None = node["spec"].get("podCIDR")
    return found


def _address(node: Node) -> str | None:
    for one in node["status"].get("addresses") or []:
        if one["type"] == "InternalIP":
            address: str = one["address"]
            return address
    return None


def keep_connected(client: httpx.Client, me: str) -> None:
    """Gives the node its links and routes, for ever."""
    in_force: object = None
    while True:
        nodes = _nodes(client)
        mine = next((subnet_of(node) for node in nodes if node["metadata"]["name"] == me), None)
        if mine and _policy_is_in_force():
            subnets = {subnet for node in nodes if (subnet := subnet_of(node))}
            wanted = (mine, subnets, routes(me, nodes))
            if wanted != in_force:
                subprocess.run(["nft", "-f", "-"], input=masquerade(mine, subnets), text=True, check=True)
                for subnet, address in wanted[2].items():
                    subprocess.run(["ip", "route", "replace", subnet, "via", address, "dev", LINK], check=True)
                _write(CNI, conflist(mine, int(Path(f"/sys/class/net/{LINK}/mtu").read_text())))
                print(f"pods here: {mine}; elsewhere: {wanted[2]}", flush=True)
                in_force = wanted
        time.sleep(THEN_EVERY_S if in_force else LOOK_EVERY_S)


def _nodes(client: httpx.Client) -> list[Node]:
    try:
        answer = client.get("/api/v1/nodes")
        answer.raise_for_status()
        items: list[Node] = answer.json()["items"]
    except httpx.HTTPError as error:
        print(f"no list of nodes: {error!r}", flush=True)
        return []
    return items


def _policy_is_in_force() -> bool:
    listed = subprocess.run(["nft", "list", "table", *policy.TABLE.split()], capture_output=True, check=False)
    return listed.returncode == 0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def identify() -> str:
    """Waits until the node's kubelet may speak to the API server -> the name of the node."""
    while True:
        view = ["kubectl", "config", "view", f"--kubeconfig={IDENTITY}", "--raw", "--flatten", "--output=json"]
        if IDENTITY.is_file():
            said = subprocess.run(view, capture_output=True, text=True, check=False)
            if said.returncode == 0:
                KUBECONFIG.touch(mode=0o600)
                KUBECONFIG.write_text(said.stdout)
                return os.uname().nodename
            print(said.stderr, flush=True)
        time.sleep(LOOK_EVERY_S)


def main() -> None:
    for name, value in SYSCTLS.items():
        Path("/proc/sys", name).write_text(value)
    threading.excepthook = policy.give_up
    me = identify()
    threading.Thread(target=keep_connected, args=(connect(KUBECONFIG), me), daemon=True).start()
    policy.main(str(KUBECONFIG))


if __name__ == "__main__":
    main()
