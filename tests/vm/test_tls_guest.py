"""nbd-client in a guest attaches /dev/nbd0 over TLS; wrong certificates don't get in."""

from pathlib import Path

import pytest

from tests.helpers.certificates import make_certificates
from tests.helpers.servers import nbdserve
from tests.helpers.tools import run
from tests.vm.guest import boot
from tests.vm.initramfs import build_initramfs
from tests.vm.kernel import find_kernel

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

SIZE = 64 << 20
INIT = Path(__file__).with_name("tls.sh")
#: What the server's log says, in one line each.
REASONS = {
    "nobody": "TLS: the client has no certificate",
    "expired": "TLS: the client's certificate: certificate has expired",
    "self-signed": "TLS: the client's certificate: self-signed certificate",
    "foreign": "TLS: the client's certificate: unable to get local issuer certificate",
}


def test_dev_nbd0_over_tls(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE))
    kernel, initramfs = find_kernel(), tmp_path / "initramfs.gz"
    files = {
        f"tls/{who}/{file.name}": file.read_text()
        for who, folder in certificates.clients.items()
        for file in folder.iterdir()
    }
    initramfs.write_bytes(build_initramfs(kernel, INIT.read_text(), files))
    options = ["--tls-certificates", str(certificates.server), "--tls-verify-client"]
    with nbdserve(
        image, tmp_path / "server", transports=["tcp"], options=options
    ) as server:
        append = f"nbd_port={server.port} nbd_name={server.export}"
        guest = boot(kernel.image, initramfs, append=append)
        guest.assert_passed()
    assert guest.said["size"] == str(SIZE)
    log = server.stderr.splitlines()
    for reason in REASONS.values():
        assert sum(reason in line for line in log) == 1, server.stderr
    assert sum("handshake failed" in line for line in log) <= 1 + len(REASONS)
    opened = [line for line in log if "connection opened" in line]
    assert len(opened) == 1
    assert "CN=alice" in opened[0]
    content = tmp_path / "content.raw"
    run("qemu-img", "check", image)
    run("qemu-img", "convert", "-O", "raw", image, content)
    run("/sbin/e2fsck", "-fn", content)
