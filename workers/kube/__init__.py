"""What the Kubernetes boundaries share: manifests as data, the rules that a pod of ours keeps, and a cluster to ask.

`manifests.py` and `lint.py` are pure; `connection.py` knows the way to an API server, `cluster.py` what can be asked of
it, `exec_.py` speaks to a process in a container.
"""

from workers.kube.cluster import Cluster, together
from workers.kube.errors import ClusterError, Denied, NoKubeconfig, NotBegun, Taken, Unreachable
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
    "NoKubeconfig",
    "NotBegun",
    "Taken",
    "Unreachable",
    "filled",
    "placeholders",
    "pod_faults",
    "templates",
    "together",
]
