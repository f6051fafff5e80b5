"""What the Kubernetes boundaries share: manifests as data, the rules that a pod of ours keeps, and a cluster to ask.

`manifests.py` and `lint.py` are pure; `cluster.py` speaks to an API server, `exec_.py` to a process in a container.
"""

from workers.kube.cluster import Cluster
from workers.kube.errors import ClusterError, Denied, Taken, Unreachable
from workers.kube.exec_ import ExecEnded
from workers.kube.lint import Admission, pod_faults
from workers.kube.manifests import PREFIX, Manifest, filled, placeholders, templates

__all__ = [
    "PREFIX",
    "Admission",
    "Cluster",
    "ClusterError",
    "Denied",
    "ExecEnded",
    "Manifest",
    "Taken",
    "Unreachable",
    "filled",
    "placeholders",
    "pod_faults",
    "templates",
]
