import errno
import struct

import pytest

from nbdserve.wire import replies
from nbdserve.wire.constants import NbdError

COOKIE = 0x0102030405060708

# Copied by hand from doc/proto.md: "Simple reply message", "Structured reply types".
SIMPLE_OK = bytes.fromhex("67446698 00000000 0102030405060708")
SIMPLE_EIO = bytes.fromhex("67446698 00000005 0102030405060708")
DONE = bytes.fromhex("668e33ef 0001 0000 0102030405060708 00000000")
DATA = bytes.fromhex("668e33ef 0000 0001 0102030405060708 00000208 0000000000001000")
LAST_DATA = bytes.fromhex(
    "668e33ef 0001 0001 0102030405060708 00000208 0000000000001000"
)
HOLE = bytes.fromhex(
    "668e33ef 0001 0002 0102030405060708 0000000c 0000000000001000 00000200"
)
STATUS = bytes.fromhex(
    "668e33ef 0001 0005 0102030405060708 00000014 00000007"
    "00010000 00000000 00000200 00000003"
)
ERROR = bytes.fromhex(
    "668e33ef 0001 8001 0102030405060708 00000009 00000016 0003 626164"
)
ERROR_OFFSET = bytes.fromhex(
    "668e33ef 0001 8002 0102030405060708 00000011 00000005 0003 626164 0000000000002000"
)


def test_replies_as_bytes() -> None:
    assert replies.simple_reply(COOKIE) == SIMPLE_OK
    assert replies.simple_reply(COOKIE, NbdError.EIO) == SIMPLE_EIO
    assert replies.done_chunk(COOKIE) == DONE
    assert replies.data_header(COOKIE, 4096, 512, done=False) == DATA
    assert replies.data_header(COOKIE, 4096, 512, done=True) == LAST_DATA
    assert replies.hole_chunk(COOKIE, 4096, 512, done=True) == HOLE
    assert replies.error_chunk(COOKIE, 22, "bad") == ERROR
    assert replies.error_chunk(COOKIE, 5, "bad", offset=8192) == ERROR_OFFSET
    extents = [(65536, 0), (512, 3)]
    assert replies.block_status_chunk(COOKIE, 7, extents, done=True) == STATUS


def test_replies_written_into_a_buffer() -> None:
    buffer = bytearray(b"\xee" * 160)

    end = replies.put_simple(buffer, 1, COOKIE)
    end = replies.put_simple(buffer, end, COOKIE, NbdError.EIO)
    end = replies.put_done(buffer, end, COOKIE)
    end = replies.put_data_header(
        memoryview(buffer), end, COOKIE, 4096, 512, done=False
    )
    end = replies.put_data_header(buffer, end, COOKIE, 4096, 512, done=True)
    end = replies.put_hole(buffer, end, COOKIE, 4096, 512, done=True)

    written = SIMPLE_OK + SIMPLE_EIO + DONE + DATA + LAST_DATA + HOLE
    assert end == 1 + len(written)
    assert buffer[:1] == b"\xee"
    assert buffer[1:end] == written
    assert buffer[end:] == b"\xee" * (160 - end)


def test_with_structured_replies_no_error_is_a_simple_reply() -> None:
    assert replies.error_chunk(COOKIE, 22, "bad") == ERROR
    assert replies.simple_reply(COOKIE, 5) == SIMPLE_EIO
    assert replies.error_chunk(COOKIE, 5, "bad", offset=8192) == ERROR_OFFSET


def test_an_error_text_is_cut_at_4096_bytes_between_characters() -> None:
    chunk = replies.error_chunk(COOKIE, 5, "x" + "\N{SNOWMAN}" * 2000)
    (length,) = struct.unpack_from(">H", chunk, 24)

    assert 4090 <= length <= 4096
    assert len(chunk) == 26 + length
    assert chunk[26:].decode() == "x" + "\N{SNOWMAN}" * ((length - 1) // 3)


def test_an_error_text_has_no_nul_and_no_stray_surrogate() -> None:
    assert replies.clipped("a\0b\udc80") == b"a\xef\xbf\xbdb?"


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EPERM, NbdError.EPERM),
        (errno.EROFS, NbdError.EPERM),
        (errno.EACCES, NbdError.EPERM),
        (errno.ENOSPC, NbdError.ENOSPC),
        (errno.EDQUOT, NbdError.ENOSPC),
        (errno.EFBIG, NbdError.ENOSPC),
        (errno.EINVAL, NbdError.EINVAL),
        (errno.EOPNOTSUPP, NbdError.ENOTSUP),
        (errno.ESHUTDOWN, NbdError.ESHUTDOWN),
        (errno.EBADF, NbdError.EIO),
        (errno.ESTALE, NbdError.EIO),
        (0, NbdError.EIO),
        (None, NbdError.EIO),
    ],
)
def test_errno_becomes_an_error_of_the_protocol(
    number: int | None, expected: NbdError
) -> None:
    assert replies.nbd_error(number) is expected
