#!/bin/busybox sh
# The first process of a guest that attaches /dev/nbd0 over TLS with nbd-client: with a good
# certificate it makes a file system, with others it must fail. From the kernel's command
# line: nbd_port and nbd_name.
. /start.sh
connect_to_host

with() {
    tls="-enable-tls -tlshostname localhost -cacertfile /tls/$1/ca-cert.pem"
    [ -f "/tls/$1/client-cert.pem" ] &&
        tls="$tls -certfile /tls/$1/client-cert.pem -keyfile /tls/$1/client-key.pem"
    echo "$tls"
}

# plain, no certificate, expired, of another authority or none, and a client that trusts another
for who in plain nobody expired foreign self-signed stranger; do
    tls=
    [ "$who" != plain ] && tls=$(with "$who")
    if timeout 20 /sbin/nbd-client 10.0.2.2 "$nbd_port" /dev/nbd0 -N "$nbd_name" $tls \
        >/tmp/refused 2>&1 && [ "$(blockdev --getsize64 /dev/nbd0)" != 0 ]; then
        fail "$who was let in: $(cat /tmp/refused)"
    fi
    say "$who" "$(tail -n 1 /tmp/refused)"
    /sbin/nbd-client -d /dev/nbd0 >/dev/null 2>&1
done

/sbin/nbd-client 10.0.2.2 "$nbd_port" /dev/nbd0 -N "$nbd_name" -b 512 $(with alice) \
    >/tmp/attach 2>&1 || fail "attach: $(cat /tmp/attach)"
say size "$(blockdev --getsize64 /dev/nbd0)"
/sbin/mke2fs -q -t ext4 -F /dev/nbd0 >/tmp/mkfs 2>&1 || fail "mkfs: $(cat /tmp/mkfs)"
mount -t ext4 /dev/nbd0 /mnt || fail mount
dd if=/dev/urandom of=/mnt/kept bs=1M count=4 conv=fsync 2>/dev/null || fail write
written=$(sha256sum </mnt/kept)
umount /mnt || fail umount
echo 3 >/proc/sys/vm/drop_caches
blockdev --flushbufs /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt || fail "mount again"
[ "$(sha256sum </mnt/kept)" = "$written" ] || fail "read something else"
umount /mnt || fail "umount again"
/sbin/nbd-client -d /dev/nbd0 >/tmp/detach 2>&1 || fail "detach: $(cat /tmp/detach)"
say PASS
poweroff -f
