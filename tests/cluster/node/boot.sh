# The first process of a node: it runs in mount, network, PID and host name namespaces of its own. When it dies, the
# kernel ends every process of the node and its mounts, interfaces and rules are gone with it, as in a power cut.
#
# Environment: NAME ADDRESS GATEWAY POD_ROUTES ("subnet,node address" ...) FOLDER (of this node) BIN LOGS KUBECONFIG
# KUBE_PROXY_KUBECONFIG POD_NETWORK
set -eu

# The parent says on standard input that eth0 is here.
read -r _

# The daemons' usual paths, all below the cluster's folder.
mkdir -p "$FOLDER/var/lib" "$FOLDER/var/log"
mount --bind "$FOLDER/var/lib" /var/lib
mount --bind "$FOLDER/var/log" /var/log
mount -t tmpfs -o mode=755 run /run

hostname "$NAME"
ip link set lo up
ip address add "$ADDRESS/24" dev eth0
ip link set eth0 up
ip route add default via "$GATEWAY"
for route in $POD_ROUTES; do
    ip route add "${route%,*}" via "${route#*,}"
done
echo 1 >/proc/sys/net/ipv4/ip_forward

export PATH="$BIN:/usr/sbin:/usr/bin:/sbin:/bin"

# keep LOG COMMAND...: starts it again when it ends, as an init system does; the kubelet ends when containerd is late.
keep() {
    log="$LOGS/$NAME-$1.log"
    shift
    while true; do
        "$@" >>"$log" 2>&1 || true
        sleep 0.2
    done
}

keep containerd containerd --config "$FOLDER/containerd.toml" &
keep kubelet kubelet --config="$FOLDER/kubelet.yaml" --kubeconfig="$KUBECONFIG" --hostname-override="$NAME" \
    --node-ip="$ADDRESS" &
# Sysctls of connection tracking belong to the host: leave them alone.
keep kube-proxy kube-proxy --kubeconfig="$KUBE_PROXY_KUBECONFIG" --hostname-override="$NAME" --proxy-mode=nftables \
    --detect-local-mode=ClusterCIDR --cluster-cidr="$POD_NETWORK" --conntrack-max-per-core=0 \
    --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0 &
wait
