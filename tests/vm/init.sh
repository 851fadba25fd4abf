#!/bin/busybox sh
# The first process of a test guest that uses a disk: /dev/nbd0 from the host if the kernel's
# command line has nbd_port and nbd_name, else /dev/vda.
. /start.sh
say booted "$(uname -r)"

if [ -n "$nbd_port" ]; then
    disk=/dev/nbd0
    connect_to_host
    /sbin/nbd-client -l 10.0.2.2 "$nbd_port" >/tmp/list 2>&1 || fail "list: $(cat /tmp/list)"
    grep -qx "$nbd_name" /tmp/list || fail "list has no $nbd_name: $(cat /tmp/list)"
    /sbin/nbd-client 10.0.2.2 "$nbd_port" "$disk" -N "$nbd_name" -C 2 -b 512 \
        >/tmp/attach 2>&1 || fail "attach: $(cat /tmp/attach)"
else
    disk=/dev/vda
    [ -b "$disk" ] || fail "no $disk"
fi
say size "$(blockdev --getsize64 "$disk")"
queue=/sys/block/${disk#/dev/}/queue
say discard "$(cat "$queue/discard_max_bytes")"
say write_cache "$(cat "$queue/write_cache")"

sum() { sha256sum <"$1" | cut -d' ' -f1; }

/sbin/mke2fs -q -t ext4 -F "$disk" >/tmp/mkfs 2>&1 || fail "mkfs: $(cat /tmp/mkfs)"
mount -t ext4 -o discard "$disk" /mnt || fail mount
dd if=/dev/urandom of=/mnt/kept bs=1M count=8 conv=fsync 2>/dev/null || fail write
dd if=/dev/urandom of=/mnt/removed bs=64k count=64 conv=fsync 2>/dev/null || fail write
for number in 1 2 3 4 5 6 7 8; do
    echo "small file $number" >"/mnt/small$number"
    sync
done
written=$(sum /mnt/kept)
say written "$written"
rm /mnt/removed
umount /mnt || fail umount

echo 3 >/proc/sys/vm/drop_caches
blockdev --flushbufs "$disk"
mount -t ext4 "$disk" /mnt || fail "mount again"
read_back=$(sum /mnt/kept)
[ "$written" = "$read_back" ] || fail "wrote $written, read $read_back"
[ "$(cat /mnt/small8)" = "small file 8" ] || fail "small file"
say read_back "$read_back"
fstrim -v /mnt >/tmp/trim 2>&1 || fail "fstrim: $(cat /tmp/trim)"
say trimmed "$(cat /tmp/trim)"
[ "$(sum /mnt/kept)" = "$written" ] || fail "fstrim changed a file"
umount /mnt || fail "umount again"

echo 3 >/proc/sys/vm/drop_caches
blockdev --flushbufs "$disk"
/sbin/e2fsck -fn "$disk" >/tmp/fsck 2>&1 || fail "fsck: $(cat /tmp/fsck)"
say fsck clean
if [ -n "$nbd_port" ]; then
    /sbin/nbd-client -d "$disk" >/tmp/detach 2>&1 || fail "detach: $(cat /tmp/detach)"
fi
dmesg | grep -iE 'I/O error|blk_update_request|EXT4-fs error' >/tmp/errors && fail "$(cat /tmp/errors)"
say PASS
poweroff -f
