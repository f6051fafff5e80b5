"""Asking a cluster's API server without its administrator's certificate: what whoever reaches it is told."""

import ssl
from base64 import b64decode
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

import yaml

KNOWN_TOKEN = "abcdef.0123456789abcdef"  # noqa: S105 - a secret to nobody
"""By which the nodes of every cluster by kind join (kind, pkg/cluster/internal/kubeadm/const.go): whoever it makes a
node of is past every policy for the run's account. Examples of kubeadm's name the same one."""


def answer(kubeconfig: Path, path: str, *, within_s: float, token: str | None = None) -> int | None:
    """-> the status of a GET, as the cluster's own authority vouches for it; None when nobody answers."""
    try:
        (cluster,) = yaml.safe_load(kubeconfig.read_text())["clusters"]
        address = urlsplit(cluster["cluster"]["server"])
        authority = b64decode(cluster["cluster"]["certificate-authority-data"]).decode()
        trusted = ssl.create_default_context(cadata=authority)
        connection = HTTPSConnection(str(address.hostname), address.port, timeout=within_s, context=trusted)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
            return connection.getresponse().status
        finally:
            connection.close()
    except (OSError, HTTPException, KeyError, TypeError, ValueError, yaml.YAMLError):
        return None
