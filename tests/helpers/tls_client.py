"""A client that encrypts."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

from nbdserve.wire.constants import Option
from tests.helpers.nbd_client import NbdClient


class TlsClient(NbdClient):
    """The usual client, which encrypts."""

    @classmethod
    async def start(
        cls, path: Path, folder: Path, version: ssl.TLSVersion | None = None
    ) -> "TlsClient":
        client = await cls.connect_unix(path)
        try:
            await client.option(Option.STARTTLS)
            context = ssl.create_default_context(cafile=str(folder / "ca-cert.pem"))
            if version is not None:
                context.minimum_version = context.maximum_version = version
            certificate = folder / "client-cert.pem"
            if certificate.exists():
                context.load_cert_chain(certificate, folder / "client-key.pem")
            client.sock = context.wrap_socket(
                client.sock, server_hostname="localhost", do_handshake_on_connect=False
            )
            await client.when_ready(client.sock.do_handshake)
        except BaseException:
            client.sock.close()
            raise
        return client

    async def when_ready(self, call: Any, *arguments: Any) -> Any:
        while True:
            try:
                return call(*arguments)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
                await asyncio.sleep(0.001)

    async def _send_raw(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(bytes(data))
        async with self._send_lock:
            while view:
                view = view[await self.when_ready(self.sock.send, view[:65536]) :]

    async def _receive_raw(self) -> bytes:
        data: bytes = await self.when_ready(self.sock.recv, 1 << 20)
        if not data:
            raise ConnectionResetError("closed by the server")
        return data
