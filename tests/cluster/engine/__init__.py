"""A Docker engine and kind for tests, on a machine that reaches no image registry: real clusters, each a run's own.

dockerd runs in pid, mount, network, ipc and uts namespaces of its own, so ending one process ends it with all its
containers, and drops every mount and link. It is test equipment and nothing of the product imports it.

    python -m tests.cluster.engine build             build what it is made of, once for each version; the lab as well
    python -m tests.cluster.engine up [--state DIR]  start it and print what docker and kind have to be told
    python -m tests.cluster.engine down              end it, without a trace

`parts.py` says what is built and from where, `rootfs.py` what a node is made of, `network.py` runs in each node,
`forward.py` opens what is published in there on this machine's loopback, `run.py` is what tests use.

What had to be found out, on kernel 6.18 with version 1 of control groups and without CAP_SYS_RESOURCE:

- dockerd binds its data folder onto itself, which hides whatever was mounted below: that bind comes first, then the
  image's layer, read-only and from the cache. A warm start takes 2 seconds and copies nothing.
- A kernel without modules has no /lib/modules, which kind shares with its nodes: an overlay on /lib has one.
- With the systemd driver gVisor does not find its control groups, with cgroupfs it does, once the kubelet's groups,
  which kind binds onto themselves, are unmounted for it alone (`rootfs.RUNSC`).
- What kubelets need here is in the image, in a folder that they read after kind's configuration: failCgroupV1 false,
  the cgroupfs driver, no lower OOM score. A cluster's own configuration has to say nothing of it.
- kindnetd's policy needs packet queues. The nodes' own network service takes its place, as the kubelet's user, whom
  the default CNI manifest lets see pods and policies; a node is not ready before its rules are in force.
- The volume provisioner is left out: the default storage class has none.
"""
