# Executed in a node as soon as it is there: what no pod reaches, whatever becomes of network policy. In a kind node policy is
# the work of a program that lets packets pass when it is overrun or gone (kindnetd: fail open), and that does not promise to
# judge what goes from a pod to its own node. These rules are the kernel's. A packet that came neither from the cluster's
# network (eth0) nor from the node itself (lo) came from a pod; mangle is asked after a Service's address was resolved.
set -eu
pods=$1
iptables -w -t mangle -N BLASTDOOR-TO-NODE
iptables -w -t mangle -A BLASTDOOR-TO-NODE -i eth0 -j RETURN
iptables -w -t mangle -A BLASTDOOR-TO-NODE -i lo -j RETURN
iptables -w -t mangle -A BLASTDOOR-TO-NODE -m conntrack --ctstate ESTABLISHED -j RETURN # what the kubelet's probes asked for
iptables -w -t mangle -A BLASTDOOR-TO-NODE -p tcp --dport 6443 -j RETURN # the API server, which answers nobody without a name
iptables -w -t mangle -A BLASTDOOR-TO-NODE -j DROP # kubelet, etcd, the container's own services
iptables -w -t mangle -A INPUT -j BLASTDOOR-TO-NODE
iptables -w -t mangle -N BLASTDOOR-BEYOND
iptables -w -t mangle -A BLASTDOOR-BEYOND -i eth0 -j RETURN
iptables -w -t mangle -A BLASTDOOR-BEYOND -d "$pods" -j RETURN # from pod to pod is policy's business
iptables -w -t mangle -A BLASTDOOR-BEYOND -j DROP # the engine's host, its other networks, the metadata address, everything
iptables -w -t mangle -A FORWARD -j BLASTDOOR-BEYOND
for which in all default; do # no way past it
    [ ! -e "/proc/sys/net/ipv6/conf/$which/disable_ipv6" ] || echo 1 > "/proc/sys/net/ipv6/conf/$which/disable_ipv6"
done
