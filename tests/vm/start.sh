#!/bin/busybox sh
# What every guest's first process does first; sourced by it. A guest says "@@ KEY VALUE" on
# the serial console for each thing that it did; the last is "@@ PASS", or "@@ FAIL reason".
# From the kernel's command line come nbd_port and nbd_name, where there are such.
/bin/busybox --install -s /bin
# Programs with a path in front: busybox prefers its own applets of that name.
export PATH=/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev

say() { echo "@@ $*"; }
fail() {
    dmesg | tail -n 25
    say FAIL "$*"
    poweroff -f
}
connect_to_host() {
    ip link set lo up
    ip link set eth0 up
    ip addr add 10.0.2.15/24 dev eth0
    ip route add default via 10.0.2.2
}

for module in $(cat /lib/modules/order); do
    parameters=
    [ "$module" = nbd ] && parameters=nbds_max=1
    insmod "/lib/modules/$module" $parameters || fail "insmod $module"
done
for word in $(cat /proc/cmdline); do
    case $word in nbd_*=*) eval "$word" ;; esac
done
