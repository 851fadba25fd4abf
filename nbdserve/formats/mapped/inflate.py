"""Compressed clusters: read, decompressed once for everyone who waits, kept for a while."""

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.mapped.parts import Parts
from nbdserve.formats.mapped.waits import Turnstile
from nbdserve.storage.executor import run

try:
    # Measured: 50 instead of 120 us for 64 KiB of text, 260 instead of 530 of base64.
    from isal import isal_zlib as deflate
except ImportError:
    # no wheel for this processor
    import zlib as deflate  # type: ignore[no-redef]

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdDecompressor, ZstdError
else:
    from backports.zstd import ZstdDecompressor, ZstdError

# isal's type stub says that this is an instance
_DeflateError: Final[type[Exception]] = deflate.error  # type: ignore[assignment]

#: Bytes in, exact size of the cluster; raises ValueError if that is not what comes out.
Decompress = Callable[[bytes | bytearray | memoryview, int], bytes]

#: Bytes of decompressed clusters kept: neighbours of a small read are usually next.
_CACHE_BYTES: Final = 8 << 20
#: Clusters up to this size are decompressed on the loop: that takes 50 to 250 us, and
#: the way to a thread and back 100 (measured with both cores busy).
_INLINE: Final = 64 << 10


def inflate(data: bytes | bytearray | memoryview, size: int) -> bytes:
    """Decompress raw deflate, as qcow and qcow2 with compression type 0 store it.

    Any window is accepted (-15): qemu writes -12.
    """
    try:
        result = deflate.decompressobj(-15).decompress(data, size)
    except _DeflateError as error:
        raise ValueError(str(error)) from error
    if len(result) != size:
        raise ValueError(f"{len(result)} bytes came out, not {size}")
    return result


def unzstd(data: bytes | bytearray | memoryview, size: int) -> bytes:
    """Decompress zstd, perhaps in several frames, as compression type 1 stores it."""
    result = b""
    left = bytes(data)
    while len(result) < size:
        frame = ZstdDecompressor()
        try:
            piece = frame.decompress(left, size - len(result))
        except ZstdError as error:
            raise ValueError(str(error)) from error
        left = frame.unused_data
        result += piece
        if not frame.eof or (not piece and not left):
            break
    if len(result) != size:
        raise ValueError(f"{len(result)} bytes came out, not {size}")
    return result


class Inflater:
    """Decompresses clusters of one image, the last ones used from memory."""

    def __init__(self, parts: Parts, decompress: Decompress) -> None:
        """`decompress` is what the image's compression type asks for."""
        self._storage = parts.storage
        self._pins = parts.pins
        self._cluster_size = parts.geometry.cluster_size
        self._decompress = decompress
        self._most = max(1, _CACHE_BYTES // self._cluster_size)
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._busy: Turnstile[int] = Turnstile()

    async def cluster(self, word: int, host_offset: int, length: int) -> bytes:
        """Return the bytes of a compressed cluster.

        Args:
            word: Its L2 entry, which names it in the cache.
            host_offset: Bytes.
            length: Bytes to read at most.

        Raises:
            ImageCorruptError: The data don't make exactly one cluster.
            OSError: They can't be read.
        """
        kept = self._kept.get(word)
        if kept is not None:
            self._kept.move_to_end(word)
            return kept
        # Pinned while waiting too: if the one before fails, the data are read again.
        generation = self._pins.enter()
        try:
            return await self._shared(word, host_offset, length)
        finally:
            self._pins.leave(generation)

    def forget(self, word: int) -> None:
        """Let an entry name other data from now on; nobody reads the old ones any more."""
        self._kept.pop(word, None)

    async def _shared(self, word: int, host_offset: int, length: int) -> bytes:
        """Wait for whoever decompresses this cluster already, or do it."""
        while word in self._busy:
            await self._busy.wait(word)
            kept = self._kept.get(word)
            if kept is not None:
                return kept
        self._busy.enter(word)
        try:
            result = await self._load(host_offset, length)
            self._kept[word] = result
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        finally:
            self._busy.leave(word)
        return result

    async def _load(self, host_offset: int, length: int) -> bytes:
        if host_offset >= self._storage.size:
            raise ImageCorruptError(
                f"{self._storage.name}: the compressed cluster at {host_offset:#x} "
                "lies past the end of the file"
            )
        data = bytearray(min(length, self._storage.size - host_offset))
        view = memoryview(data)
        try:
            if not self._storage.try_read(host_offset, view):
                await self._storage.read(host_offset, view)
            if self._cluster_size <= _INLINE:
                return self._decompress(data, self._cluster_size)
            return await run(self._decompress, data, self._cluster_size)
        except ValueError as error:
            raise ImageCorruptError(
                f"{self._storage.name}: the compressed cluster at {host_offset:#x} "
                f"can't be decompressed ({error})"
            ) from error
