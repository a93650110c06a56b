#!/bin/sh
# First process (PID 1) of one machine of the test cluster. Started inside fresh mount, network,
# pid, uts, ipc and cgroup namespaces, it gives the machine its own view of the file system and
# then becomes `pause`, which collects orphans.
#
#   init.sh NAME FOLDER BIN IMAGES HIERARCHIES
#
#   NAME         host name of the machine
#   FOLDER       the machine's private data on the host
#   BIN          the Kubernetes programs
#   IMAGES       the image cache
#   HIERARCHIES  "folder:mount-option" of each cgroup version 1 mount, with commas between
#
# What the machine sees:
#   /                 the host's root, read-only: a privileged pod cannot damage the host
#   /run              a private tmpfs: containerd's socket, network namespaces, xtables.lock
#   /run/machine      bin and images (read-only), state (= FOLDER): where settings files point
#   /var/lib          private: kubelet, containerd, cni, hostPath volumes
#   /var/log, /tmp    private, and so are /etc/{hosts,hostname,resolv.conf,machine-id}
#   /proc, /sys, /sys/fs/cgroup   mounted anew, so that they show this machine only
# Every mount made here goes with the machine's last process.
set -eu
name=$1 folder=$2 bin=$3 images=$4 hierarchies=$5

mount --make-rprivate /          # nothing done here may reach the host's mount table
hostname "$name"

# --- private folders
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/machine/bin /run/machine/images /run/machine/state /run/netns /run/lock
mount --bind "$bin" /run/machine/bin
mount -o remount,bind,ro /run/machine/bin
mount --bind "$images" /run/machine/images
mount -o remount,bind,ro /run/machine/images
mount --bind "$folder" /run/machine/state
# Now the root goes read-only. A bind mount inherits that from the mount it is taken from, so from
# here on they are taken from the writable /run/machine/state, not from FOLDER.
mount -o remount,bind,ro /
folder=/run/machine/state
mount --bind "$folder/var-lib" /var/lib
mount --bind "$folder/var-log" /var/log
for file in hosts hostname resolv.conf machine-id; do
    if [ -e "/etc/$file" ]; then mount --bind "$folder/etc/$file" "/etc/$file"; fi
done

# --- kernel file systems
mount -t proc proc /proc         # of the new pid namespace
mount -t sysfs sysfs /sys        # of the new network namespace (/sys/class/net)
# kubelet reports it as nodeInfo.bootID: one a boot and machine.
mount --bind "$folder/etc/boot_id" /proc/sys/kernel/random/boot_id || true
mount -t bpf bpf /sys/fs/bpf 2>/dev/null || true
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null || true
# In the new cgroup namespace a fresh mount of a hierarchy shows the machine's own part as "/".
# After /sys, because that mount hides the host's cgroups (which is why `ip netns exec` breaks
# kubelet).
mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
oldifs=$IFS; IFS=,
for hierarchy in $hierarchies; do
    mkdir -p "/sys/fs/cgroup/${hierarchy%%:*}"
    mount -t cgroup -o "${hierarchy#*:}" cgroup "/sys/fs/cgroup/${hierarchy%%:*}"
done
IFS=$oldifs

# /tmp comes last: FOLDER, BIN and this script may have been under it.
mount --bind "$folder/tmp" /tmp
# Mounts propagate inside the machine (kubelet's volumes reach containerd, pods may use
# Bidirectional), and not out of it.
mount --make-rshared /
ip link set lo up

: > /run/machine/state/booted
exec /run/machine/state/pause
