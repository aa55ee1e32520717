#!/usr/bin/sh
# The first process of the machine: mounts what a node has mounted, runs the steps, switches off.
# The kernel writes to the console; what the steps write goes to the device that $steps names, a word of
# the kernel's command line.

/usr/bin/busybox mkdir -p /busybox /dev /proc /sys /run /tmp /root
/usr/bin/busybox --install -s /busybox
# Real tools come first: busybox has an ip and a sysctl of its own that can do less.
export PATH=/usr/sbin:/usr/bin:/busybox HOME=/root

mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
mount -t tmpfs none /run
mount -t tmpfs none /tmp
mkdir -p /dev/pts /dev/shm /run/lock
mount -t devpts none /dev/pts
mount -t tmpfs none /dev/shm
mount -t securityfs none /sys/kernel/security
mount -t cgroup2 none /sys/fs/cgroup
hostname vm
ip link set lo up

# So that a lab can fill the table, whatever the machine's memory.
modprobe nf_conntrack && echo 8192 > /proc/sys/net/netfilter/nf_conntrack_max

stty -F /dev/$steps raw -echo
. /steps </dev/$steps >/dev/$steps 2>&1
sync
poweroff -f
