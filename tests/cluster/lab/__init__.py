"""The cluster lab: a real one-node Kubernetes for tests, on a machine that reaches no image registry.

etcd, the API server, its controllers, the scheduler, containerd and the kubelet run as plain processes in pid, mount
and network namespaces of their own, so ending one process ends all of them and drops every mount and link. Pods run
under runc, or under gVisor by the RuntimeClass `gvisor`. Network policy is enforced, by `policy.py`. It is test
equipment and nothing of the product imports it.

    python -m tests.cluster.lab build             build what the lab is made of, once for each version
    python -m tests.cluster.lab up [--state DIR]  start it; the last line is the path of its kubeconfig
    python -m tests.cluster.lab down              end it, without a trace

`parts.py` says what is built and from where, `node.py` what runs inside, `outside.py` how a test starts and ends it.
"""
