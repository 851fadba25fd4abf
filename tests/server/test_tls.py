"""TLS from the wire: what is encrypted works as ever, and what attackers try fails."""

import asyncio
import random
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import AsyncIterator, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdserve.config.access import AccessRule, parse_network
from nbdserve.config.tls import TlsConfig
from nbdserve.errors import ConfigError
from nbdserve.exports.access import Policy
from nbdserve.exports.export import Export
from nbdserve.exports.registry import Registry
from nbdserve.server.limits import Limits
from nbdserve.server.listeners import listen_unix
from nbdserve.server.server import Server
from nbdserve.server.tls import TlsCredentials, TlsSocket, certificate_names
from nbdserve.wire.client_handshake import OptionRefused, info_data
from nbdserve.wire.constants import Option, OptionReply, TransmissionFlag
from tests.helpers.certificates import Certificates, make_certificates
from tests.helpers.nbd_client import NbdClient
from tests.helpers.tls_client import TlsClient
from tests.server.conftest import until
from tests.server.memory_disk import MemoryDisk

Logs = list[MutableMapping[str, Any]]
MIB = 1 << 20
GREETING = 18
STARTTLS = b"\0\0\0\1IHAVEOPT" + struct.pack(">II", Option.STARTTLS, 0)
ACK = struct.pack(">QIII", 0x3E889045565A9, Option.STARTTLS, OptionReply.ACK, 0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("pki"))


class Encrypted:
    """A server with TLS, and clients of it."""

    def __init__(self, path: Path, config: TlsConfig) -> None:
        self.path = path
        self.registry = Registry()
        self.disk = MemoryDisk(8 * MIB)
        self.disk.data[:] = random.Random(1).randbytes(8 * MIB)
        self.export = Export("disk", self.disk)
        self.registry.add(self.export)
        self.credentials = TlsCredentials(config)
        limits = Limits(linger_s=0.2, drain_timeout_s=5)
        self.server = Server(
            self.registry, [listen_unix(str(path))], limits, self.credentials
        )
        self.clients = AsyncExitStack()

    async def client(
        self, folder: Path, version: ssl.TLSVersion | None = None
    ) -> TlsClient:
        client = await TlsClient.start(self.path, folder, version)
        return await self.clients.enter_async_context(client)

    def plain(self) -> socket.socket:
        """Return a blocking socket behind the greeting, for use in threads."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(str(self.path))
        assert len(sock.recv(GREETING, socket.MSG_WAITALL)) == GREETING
        return sock


@asynccontextmanager
async def encrypted(path: Path, config: TlsConfig) -> AsyncIterator[Encrypted]:
    running = Encrypted(path, config)
    running.server.start()
    try:
        yield running
    finally:
        await running.clients.aclose()
        await running.server.shut_down()
    assert running.server._pool.lent == 0
    assert running.server._shared.budget.used == 0


@pytest.fixture
async def required(
    tmp_path: Path, certificates: Certificates
) -> AsyncIterator[Encrypted]:
    config = TlsConfig.build(certificates=str(certificates.server))
    async with encrypted(tmp_path / "s", config) as running:
        yield running


@pytest.fixture
async def verified(
    tmp_path: Path, certificates: Certificates
) -> AsyncIterator[Encrypted]:
    folder = str(certificates.server)
    config = TlsConfig.build(certificates=folder, verify_client=True)
    async with encrypted(tmp_path / "s", config) as running:
        yield running


VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.mark.parametrize("version", VERSIONS)
async def test_requests_of_all_sizes_in_flight_together(
    required: Encrypted, certificates: Certificates, version: ssl.TLSVersion, logs: Logs
) -> None:
    client = await required.client(certificates.clients["nobody"], version)
    await client.go("disk")
    randomly = random.Random(2)
    expected = bytearray(required.disk.data)
    for _ in range(12):
        writes = []
        for slot in range(8):  # each in a MiB of its own
            length = randomly.choice([1, 28, 4096, 16384, 33000, 65536, 900_000])
            offset = slot * MIB + randomly.randrange(MIB - length)
            data = randomly.randbytes(length)
            expected[offset : offset + length] = data
            writes.append(client.write(offset, data))
        await asyncio.gather(*writes)
        ranges = [(randomly.randrange(7 * MIB), randomly.choice([7, 4096, MIB]))
                  for _ in range(24)]  # fmt: skip
        for (offset, length), data in zip(
            ranges,
            await asyncio.gather(*(client.read(*place) for place in ranges)),
            strict=True,
        ):
            assert data == expected[offset : offset + length]
    assert required.disk.data == expected
    await client.disconnect()
    await until(lambda: required.server.connections == 0)
    opened = next(log for log in logs if log["event"] == "connection opened")
    assert opened["tls"] == str(version.name).replace("TLSv1_", "TLSv1.")
    assert logs[-1]["reason"] == "disconnected"


@pytest.mark.parametrize("piece", [1000, 12_000, 16_384])
async def test_long_payloads_are_received_in_turns(
    required: Encrypted,
    certificates: Certificates,
    monkeypatch: pytest.MonkeyPatch,
    piece: int,
) -> None:
    """However fast a client sends, others are not kept waiting for its last byte."""
    offered = []
    receive = TlsSocket.recv_into

    def note_room(sock: TlsSocket, buffer: memoryview) -> int:
        offered.append(len(buffer))
        return receive(sock, buffer)

    monkeypatch.setattr(TlsSocket, "recv_into", note_room)
    client = await required.client(certificates.clients["nobody"])
    modest = await required.client(certificates.clients["nobody"])
    await client.go("disk")
    await modest.go("disk")
    payload = random.Random(4).randbytes(6 * MIB)
    written = client.reply_to(client.transmission.write(0, payload))
    data = memoryview(bytes(client.transmission.data_to_send()))

    async def send() -> None:
        for start in range(0, len(data), piece):
            await client._send_raw(data[start : start + piece])  # a record each

    sending = asyncio.create_task(send())
    while not sending.done():
        await modest.read(7 * MIB, 512)
    assert not (await written).error
    assert required.disk.data[: 6 * MIB] == payload
    assert max(offered) <= MIB


async def test_replies_that_are_not_read_wait_and_arrive_whole(
    required: Encrypted, certificates: Certificates
) -> None:
    client = await required.client(certificates.clients["nobody"])
    await client.go("disk")
    pause, client._receiver = client._receiver, None
    assert pause is not None
    pause.cancel()
    await asyncio.gather(pause, return_exceptions=True)
    wanted = {}
    randomly = random.Random(3)
    for number in range(400):
        offset = randomly.randrange(7 * MIB)
        length = randomly.choice([5, 300, 4096, 100_000, MIB])
        cookie = client.transmission.read(offset, length)
        wanted[cookie] = bytes(required.disk.data[offset : offset + length])
        if number % 40 == 0:
            await client.send_queued()
            await asyncio.sleep(0.01)
    await client.send_queued()
    await asyncio.sleep(0.05)
    while wanted:
        while (reply := client.transmission.next_reply()) is not None:
            assert bytes(reply.data) == wanted.pop(reply.request.cookie)
        if wanted:
            client.transmission.feed(await client._receive_raw())


async def test_shutdown_says_goodbye(
    required: Encrypted, certificates: Certificates
) -> None:
    client = await required.client(certificates.clients["nobody"])
    await client.go("disk")
    stopping = asyncio.create_task(required.server.shut_down())
    await client.wait_closed()
    await stopping


# Before TLS


async def test_before_a_required_tls_only_starttls_and_abort_work(
    required: Encrypted,
) -> None:
    plain = await required.clients.enter_async_context(
        await NbdClient.connect_unix(required.path)
    )
    for attempt in (plain.list_exports, plain.info, plain.go):
        with pytest.raises(OptionRefused) as refused:
            await attempt()
        assert refused.value.reply == OptionReply.ERR_TLS_REQD
    await plain.option(Option.ABORT)


async def test_export_name_does_not_get_around_a_required_tls(
    required: Encrypted,
) -> None:
    def attack() -> bytes:
        with required.plain() as sock:
            sock.sendall(b"\0\0\0\3IHAVEOPT" + struct.pack(">II", 1, 4) + b"disk")
            return sock.recv(100)

    assert await asyncio.to_thread(attack) == b""


@pytest.mark.parametrize("apart", [False, True])
async def test_plain_text_behind_starttls_ends_the_connection(
    required: Encrypted, apart: bool, logs: Logs
) -> None:
    def attack() -> bytes:
        listing = b"IHAVEOPT" + struct.pack(">II", Option.LIST, 0)
        with required.plain() as sock:
            if apart:
                sock.sendall(b"\0\0\0\3" + STARTTLS[4:])
                assert sock.recv(20, socket.MSG_WAITALL) == ACK
                sock.sendall(listing)
            else:
                sock.sendall(b"\0\0\0\3" + STARTTLS[4:] + listing)
            return _rest_of(sock)

    received = await asyncio.to_thread(attack)
    assert b"disk" not in received
    await until(lambda: required.server.connections == 0)
    assert [log["event"] for log in logs] == ["handshake failed"]
    assert ("TLS: what" if apart else "plaintext") in logs[0]["reason"]


async def test_tls_forgets_what_was_negotiated_in_plain_text(
    tmp_path: Path, certificates: Certificates
) -> None:
    config = TlsConfig.build(mode="allow", certificates=str(certificates.server))
    async with encrypted(tmp_path / "s", config) as running:
        plain = await running.clients.enter_async_context(
            await NbdClient.connect_unix(running.path)
        )
        await plain.go("disk")
        assert await plain.read(0, 4) == running.disk.data[:4]
        client = await running.client(certificates.clients["nobody"])
        with pytest.raises(OptionRefused) as refused:
            await client.option(Option.STARTTLS)
        assert refused.value.reply == OptionReply.ERR_INVALID
        assert await client.list_exports() == [("disk", "")]


async def test_what_needs_tls_and_what_is_missing_are_the_same_without_it(
    tmp_path: Path, certificates: Certificates
) -> None:
    config = TlsConfig.build(mode="allow", certificates=str(certificates.server))
    async with encrypted(tmp_path / "s", config) as running:
        secret = Export("secret", MemoryDisk(512))
        running.registry.add(secret)
        plain = await running.clients.enter_async_context(
            await NbdClient.connect_unix(running.path)
        )

        async def refusal(name: str, option: Option) -> tuple[int, str]:
            with pytest.raises(OptionRefused) as refused:
                await plain.option(option, info_data(name))
            return refused.value.reply, str(refused.value).replace(name, "")

        with pytest.raises(OptionRefused) as refused:
            await plain.info("absent")
        assert refused.value.reply == OptionReply.ERR_UNKNOWN  # TLS is of no use here
        secret.policy = Policy.of([], tls_only=True)
        for option in (Option.INFO, Option.GO):
            hidden = await refusal("secret", option)
            assert hidden[0] == OptionReply.ERR_TLS_REQD
            assert hidden == await refusal("absent", option)
        assert await plain.list_exports() == [("disk", "")]
        client = await running.client(certificates.clients["nobody"])
        assert (await client.info("secret")).size == 512
        with pytest.raises(OptionRefused) as refused:
            await client.info("absent")
        assert refused.value.reply == OptionReply.ERR_UNKNOWN


async def test_without_tls_starttls_is_refused(tmp_path: Path) -> None:
    async with encrypted(tmp_path / "s", TlsConfig()) as running:
        plain = await running.clients.enter_async_context(
            await NbdClient.connect_unix(running.path)
        )
        with pytest.raises(OptionRefused) as refused:
            await plain.option(Option.STARTTLS)
        assert refused.value.reply == OptionReply.ERR_POLICY
        await plain.go("disk")


async def test_old_versions_are_refused(
    required: Encrypted, certificates: Certificates, logs: Logs
) -> None:
    def attack() -> None:
        with required.plain() as sock:
            sock.sendall(b"\0\0\0\3" + STARTTLS[4:])
            assert sock.recv(20, socket.MSG_WAITALL) == ACK
            # a ClientHello that offers TLS 1.0 at most, with one cipher
            hello = b"\3\1" + bytes(32) + b"\0" + b"\0\2\xc0\x09" + b"\1\0"
            body = b"\1" + len(hello).to_bytes(3, "big") + hello
            sock.sendall(b"\x16\3\1" + len(body).to_bytes(2, "big") + body)
            _rest_of(sock)

    await asyncio.to_thread(attack)
    await until(lambda: bool(logs))
    assert "offers no TLS 1.2" in logs[0]["reason"]


async def test_renegotiation_is_refused(
    required: Encrypted, certificates: Certificates, logs: Logs
) -> None:
    """`openssl s_client` behind a socket that has done STARTTLS; R renegotiates."""

    def attack() -> str:
        with required.plain() as sock, socket.create_server(("127.0.0.1", 0)) as door:
            sock.sendall(b"\0\0\0\3" + STARTTLS[4:])
            assert sock.recv(20, socket.MSG_WAITALL) == ACK
            port = door.getsockname()[1]
            with subprocess.Popen(
                ["openssl", "s_client", "-tls1_2", "-connect", f"127.0.0.1:{port}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as client:
                inside, _ = door.accept()
                with inside:
                    threads = [
                        threading.Thread(target=_copy, args=pair)
                        for pair in [(inside, sock), (sock, inside)]
                    ]
                    for thread in threads:
                        thread.start()
                    assert client.stdin is not None
                    assert client.stdout is not None
                    said = ""
                    while "Verify return code" not in said:
                        said += client.stdout.readline()
                    client.stdin.write("R\n")
                    client.stdin.flush()
                    said, _ = client.communicate(timeout=20)
                    for thread in threads:
                        thread.join(20)
                return said

    assert "no renegotiation" in await asyncio.to_thread(attack)
    await until(lambda: required.server.connections == 0)
    client = await required.client(certificates.clients["nobody"])
    assert await client.list_exports() == [("disk", "")]


def _rest_of(sock: socket.socket) -> bytes:
    """Return what comes until the end; a reset is one too."""
    received = b""
    try:
        while part := sock.recv(4096):
            received += part
    except ConnectionResetError:
        return received
    return received


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # one side is gone; the test looks at what was said


# Certificates


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ("nobody", "TLS: the client has no certificate"),
        ("expired", "TLS: the client's certificate: certificate has expired"),
        ("foreign", "TLS: the client's certificate: unable to get local issuer"),
        ("self-signed", "TLS: the client's certificate: self-signed certificate"),
        ("stranger", "TLS: the client does not know who signed our certificate"),
    ],
)
async def test_wrong_certificates_are_one_line_that_says_why(
    verified: Encrypted,
    certificates: Certificates,
    who: str,
    reason: str,
    version: ssl.TLSVersion,
    logs: Logs,
) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        # in TLS 1.3 a client learns only later that it is not welcome
        await (await verified.client(certificates.clients[who], version)).go("disk")
    await until(lambda: verified.server.connections == 0)
    assert [log["event"] for log in logs] == ["handshake failed"]
    assert str(logs[0]["reason"]).startswith(reason)


async def test_a_client_is_who_its_certificate_says(
    verified: Encrypted, certificates: Certificates, logs: Logs
) -> None:
    verified.export.policy = Policy.of(
        [
            AccessRule("read-write", certificates=("alice",)),
            AccessRule("read-only", certificates=("bob",)),
        ]
    )
    hidden = Export("hidden", MemoryDisk(512))
    hidden.policy = Policy.of([AccessRule("none")])
    verified.registry.add(hidden)
    alice = await verified.client(certificates.clients["alice"])
    assert await alice.list_exports() == [("disk", "")]
    assert not (await alice.info()).transmission_flags & TransmissionFlag.READ_ONLY
    refusals = []
    for name in ("hidden", "absent"):
        with pytest.raises(OptionRefused) as refused:
            await alice.go(name)
        refusals.append((refused.value.reply, str(refused.value).replace(name, "")))
    assert refusals[0] == refusals[1]
    bob = await verified.client(certificates.clients["bob"])
    flags = (await bob.go("disk")).transmission_flags
    assert flags & TransmissionFlag.READ_ONLY
    assert not flags & TransmissionFlag.SEND_TRIM
    await until(lambda: any("certificate" in log for log in logs))  # after the reply
    assert "CN=bob" in next(log["certificate"] for log in logs if "certificate" in log)
    # whoever loses its access loses its connection; others notice nothing
    await alice.go("disk")
    verified.export.policy = Policy.of([AccessRule("read-write", ("alice",))])
    await verified.server.recheck(verified.export)
    await bob.wait_closed()
    await alice.write(0, b"still here")


@pytest.mark.parametrize(
    ("organisation", "shown"),
    [
        ("Us, Inc.", "CN=a,O=Us\\, Inc."),
        ("x,CN=root", "CN=a,O=x\\,CN=root"),
        (" #+ ", "CN=a,O=\\ #\\+\\ "),
        ("#1", "CN=a,O=\\#1"),
        ('\\"<>;', 'CN=a,O=\\\\\\"\\<\\>\\;'),
    ],
)
def test_names_in_certificates_are_escaped(organisation: str, shown: str) -> None:
    class Verified:
        def getpeercert(self) -> dict[str, Any]:
            parts = (("organizationName", organisation),), (("commonName", "a"),)
            return {"subject": parts}

    assert certificate_names(Verified()) == ("a", shown)  # type: ignore[arg-type]


async def test_rules_for_the_address_need_the_address(
    required: Encrypted, certificates: Certificates
) -> None:
    everywhere = (parse_network("0.0.0.0/0"), parse_network("::/0"))
    required.export.policy = Policy.of([AccessRule("read-write", networks=everywhere)])
    client = await required.client(certificates.clients["nobody"])
    assert await client.list_exports() == []  # over a Unix socket


async def test_new_files_are_for_new_connections(
    tmp_path: Path, certificates: Certificates, required: Encrypted
) -> None:
    old = await required.client(certificates.clients["nobody"])
    await old.go("disk")
    other = make_certificates(tmp_path)
    required.credentials.replace(TlsConfig.build(certificates=str(other.server)))
    new = await required.client(other.clients["nobody"])
    await new.go("disk")
    assert await old.read(0, 4) == await new.read(0, 4)
    with pytest.raises(ssl.SSLError):
        await required.client(certificates.clients["nobody"])
    (other.server / "server-key.pem").write_text("garbage")
    with pytest.raises(ConfigError, match=r"server-key\.pem is not PEM"):
        required.credentials.replace(TlsConfig.build(certificates=str(other.server)))
    await (await required.client(other.clients["nobody"])).go("disk")


def test_pre_shared_keys_need_a_newer_python_or_work(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:0123456789abcdef0123456789abcdef\n")
    if getattr(ssl, "HAS_PSK", False):
        assert TlsCredentials(TlsConfig.build(psk=str(keys))).mode.value == "required"
    else:
        with pytest.raises(ConfigError, match=r"needs Python 3\.13"):
            TlsCredentials(TlsConfig.build(psk=str(keys)))
    keys.write_text("alice:secret\n")
    with pytest.raises(ConfigError, match="line 1") as complaint:
        TlsCredentials(TlsConfig.build(psk=str(keys)))
    assert "secret" not in str(complaint.value)
