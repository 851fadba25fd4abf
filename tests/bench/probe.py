"""A client that costs little: blocking, compact replies, reads in batches."""

import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from nbdserve.wire.constants import REQUEST_MAGIC

#: "Newstyle negotiation": both magics and the server's flags.
_GREETING = 18
_FIXED_NO_ZEROES = 3
_EXPORT_NAME = struct.Struct(">I8sII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = 16
_LENGTH = 4096


class Probe:
    """One connection in the transmission phase."""

    def __init__(self, path: Path, export: str) -> None:
        """Connect and choose the export."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(path))
        self._receive(_GREETING)
        name = export.encode()
        option = _EXPORT_NAME.pack(_FIXED_NO_ZEROES, b"IHAVEOPT", 1, len(name))
        self._socket.sendall(option + name)
        self._receive(10)

    def read(self, offsets: Sequence[int]) -> None:
        """Read 4 KiB at each offset, all at once."""
        requests = (
            _REQUEST.pack(REQUEST_MAGIC, 0, 0, number, offset, _LENGTH)
            for number, offset in enumerate(offsets)
        )
        self._socket.sendall(b"".join(requests))
        self._receive(len(offsets) * (_REPLY + _LENGTH))

    def _receive(self, length: int) -> None:
        while length:
            received = len(self._socket.recv(min(length, 1 << 20)))
            if not received:
                raise ConnectionError("the server closed the connection")
            length -= received

    def close(self) -> None:
        """Close without a word."""
        self._socket.close()

    def __enter__(self) -> Self:
        """Nothing more to do."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()
