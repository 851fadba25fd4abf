#!/bin/busybox sh
# The first process of a guest whose disk has Python and this server: attaches an image
# to the guest's own /dev/nbd0 as qemu-nbd does.
. /start.sh
mount -t ext4 /dev/vda /mnt || fail "no disk"
for folder in proc sys dev; do mount --bind /$folder /mnt/$folder; done
mkdir -p /mnt/dev/shm && mount -t tmpfs shm /mnt/dev/shm
mount -t tmpfs run /mnt/run
mkdir -p /disk

program() { chroot /mnt /bin/sh -c "$(cat /command) $*"; }
mkdir -p /mnt/bin && cp /bin/busybox /mnt/bin/busybox && ln -sf busybox /mnt/bin/sh

sum() { sha256sum <"$1" | cut -d' ' -f1; }
until_gone() {
    for _ in $(seq 100); do
        [ -d "/proc/$1" ] || return 0
        sleep 0.2
    done
    fail "the server does not end"
}

program -c /dev/nbd0 -f qcow2 --pid-file /run/pid /image.qcow2 >/tmp/said 2>&1 ||
    fail "attach: $(cat /tmp/said)"
say attached "$(cat /tmp/said)"
say size "$(blockdev --getsize64 /dev/nbd0)"
say discard "$(cat /sys/block/nbd0/queue/discard_max_bytes)"
say write_cache "$(cat /sys/block/nbd0/queue/write_cache)"
/sbin/mke2fs -q -t ext4 -F /dev/nbd0 >/tmp/mkfs 2>&1 || fail "mkfs: $(cat /tmp/mkfs)"
mount -t ext4 /dev/nbd0 /disk || fail mount
dd if=/dev/urandom of=/disk/kept bs=1M count=4 conv=fsync 2>/dev/null || fail write
written=$(sum /disk/kept)
umount /disk || fail umount
pid=$(cat /mnt/run/pid)
program -d /dev/nbd0 >/tmp/said 2>&1 || fail "detach: $(cat /tmp/said)"
say detached "$(cat /tmp/said)"
until_gone "$pid"
say size_then "$(blockdev --getsize64 /dev/nbd0)"

program -r -c /dev/nbd0 -f qcow2 --pid-file /run/pid /image.qcow2 >/tmp/said 2>&1 ||
    fail "attach again: $(cat /tmp/said)"
say read_only "$(blockdev --getro /dev/nbd0)"
mount -t ext4 -o ro,noload /dev/nbd0 /disk || fail "mount again"
[ "$(sum /disk/kept)" = "$written" ] || fail "read something else"
umount /disk || fail "umount again"
kill "$(cat /mnt/run/pid)"
until_gone "$(cat /mnt/run/pid)"
say size_last "$(blockdev --getsize64 /dev/nbd0)"
for folder in run dev/shm dev sys proc; do umount /mnt/$folder; done
umount /mnt || fail "umount the disk"
say PASS
poweroff -f
