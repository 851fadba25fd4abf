"""Hand connections to the kernel's NBD client, /dev/nbdN, and take them back.

The generic netlink family "nbd" (include/uapi/linux/nbd-netlink.h of Linux): a message is a
header, a header of the family, and attributes of type and length. In contrast to the
ioctls nobody has to keep a thread in the kernel for as long as the device is attached.
"""

import errno
import os
import re
import socket
import struct
from collections.abc import Sequence
from typing import Final, Self

from nbdserve.errors import ConfigError

#: struct nlmsghdr and struct genlmsghdr: netlink(7), linux/genetlink.h
_HEADER: Final = struct.Struct("=IHHII")
_FAMILY_HEADER: Final = struct.Struct("=BBH")
_ATTRIBUTE: Final = struct.Struct("=HH")
_REQUEST_ACK: Final = 0x1 | 0x4
_ERROR: Final = 2
_NESTED: Final = 0x8000
_TYPE_MASK: Final = 0x3FFF

_GENERIC: Final = 16  # NETLINK_GENERIC, and the id of the family that knows the others
_GET_FAMILY: Final = 3
_FAMILY_ID: Final = 1
_FAMILY_NAME: Final = 2

_CONNECT: Final = 1
_DISCONNECT: Final = 2
_INDEX: Final = 1
_SIZE_BYTES: Final = 2
_BLOCK_SIZE_BYTES: Final = 3
_SERVER_FLAGS: Final = 5
_SOCKETS: Final = 7
_SOCKET_ITEM: Final = 1
_SOCKET_FD: Final = 1

#: Of the device: what file systems and partition tables expect.
_BLOCK_SIZE: Final = 512
#: The kernel answers at once, save for what is in flight when it disconnects.
_TIMEOUT_S: Final = 60.0


def device_index(path: str) -> int:
    """Return the number of a device such as /dev/nbd0.

    Raises:
        ConfigError: It is not named like one.
    """
    found = re.fullmatch(r"/dev/nbd(\d{1,4})", path)
    if found is None:
        raise ConfigError(f"{path} is not a device such as /dev/nbd0")
    return int(found[1])


def connect_device(
    index: int, size: int, flags: int, connections: Sequence[socket.socket]
) -> None:
    """Make /dev/nbdN of connections in the transmission phase.

    The kernel keeps them; the caller may close its own descriptors.

    Args:
        index: N.
        size: Bytes of the export.
        flags: Its transmission flags.
        connections: Stream sockets of any kind.

    Raises:
        ConfigError: The kernel refuses; the message says why.
    """
    sockets = b"".join(
        _attribute(_SOCKET_ITEM | _NESTED, _u32(_SOCKET_FD, each.fileno()))
        for each in connections
    )
    attributes = (
        _u32(_INDEX, index)
        + _u64(_SIZE_BYTES, size)
        + _u64(_BLOCK_SIZE_BYTES, _BLOCK_SIZE)
        + _u64(_SERVER_FLAGS, flags)
        + _attribute(_SOCKETS | _NESTED, sockets)
    )
    _ask(index, _CONNECT, attributes)


def disconnect_device(index: int) -> None:
    """Take /dev/nbdN from the kernel, which sends NBD_CMD_DISC to whoever serves it.

    Raises:
        ConfigError: It was not connected, or the kernel refuses.
    """
    _ask(index, _DISCONNECT, _u32(_INDEX, index))


def _ask(index: int, command: int, attributes: bytes) -> None:
    try:
        with _Family() as family:
            family.ask(command, attributes)
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
        raise ConfigError(f"/dev/nbd{index}: {reason}") from error


_REASONS: Final = {
    errno.ENOENT: "this kernel has no NBD client: modprobe nbd",
    errno.EPERM: "only root may connect and disconnect it",
    errno.EBUSY: "is connected already; nbdserve-qemu-nbd -d disconnects it",
    errno.EINVAL: "is not connected, or there is no such device (nbds_max= of nbd)",
}


class _Family:
    """A netlink socket that talks to the family "nbd"."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _GENERIC)
        self._sequence = 0
        try:
            self._socket.settimeout(_TIMEOUT_S)
            self._socket.bind((0, 0))
            name = _attribute(_FAMILY_NAME, b"nbd\0")
            reply = self._call(_GENERIC, _GET_FAMILY, name)
            (self._id,) = struct.unpack("=H", _attributes(reply)[_FAMILY_ID])
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, command: int, attributes: bytes) -> None:
        """Give a command.

        Raises:
            OSError: The kernel's answer.
        """
        self._call(self._id, command, attributes)

    def _call(self, family: int, command: int, attributes: bytes) -> bytes:
        """Send a message; return the attributes of the last answer before the end."""
        self._sequence += 1
        body = _FAMILY_HEADER.pack(command, 1, 0) + attributes
        length = _HEADER.size + len(body)
        header = _HEADER.pack(length, family, _REQUEST_ACK, self._sequence, 0)
        self._socket.send(header + body)
        answer = b""
        while True:
            data = self._socket.recv(1 << 16)
            while len(data) >= _HEADER.size:
                length, kind, _, sequence, _ = _HEADER.unpack_from(data)
                message, data = data[_HEADER.size : length], data[_aligned(length) :]
                if sequence != self._sequence:
                    continue
                if kind != _ERROR:
                    answer = message[_FAMILY_HEADER.size :]
                    continue
                (number,) = struct.unpack_from("=i", message)  # 0 is the ACK
                if number:
                    raise OSError(-number, os.strerror(-number))
                return answer


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _attribute(kind: int, data: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(_aligned(length) - length)


def _u32(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=I", value))


def _u64(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack("=Q", value))


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]
    return found
