"""Compressed clusters: read, decompressed once for everyone who waits, kept for a while."""

import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
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

try:
    # libdeflate: 66 us where isal takes 81 (source code), 71 of 96 (half of it noise). It
    # holds the GIL, so not for what a thread decompresses.
    from deflate import DeflateError, deflate_decompress

    _whole: Callable[[bytes | bytearray | memoryview, int], bytearray] | None
    _whole = deflate_decompress
    _WholeError: type[Exception] = DeflateError
except ImportError:
    _whole, _WholeError = None, Exception

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdDecompressor, ZstdError
else:
    from backports.zstd import ZstdDecompressor, ZstdError

# isal's type stub says that this is an instance
_DeflateError: Final[type[Exception]] = deflate.error  # type: ignore[assignment]

#: Bytes in, exact size of the cluster; raises ValueError if that is not what comes out.
Decompress = Callable[[bytes | bytearray | memoryview, int], bytes | bytearray]

#: Bytes of decompressed clusters kept: neighbours of a small read are usually next.
_CACHE_BYTES: Final = 8 << 20
#: Clusters up to this size are decompressed on the loop: that takes libdeflate 39 us, isal
#: 50 to 250, and the way to a thread and back 100 (measured with both cores busy).
_INLINE: Final = 64 << 10


def inflate(data: bytes | bytearray | memoryview, size: int) -> bytes | bytearray:
    """Decompress raw deflate, as qcow and qcow2 with compression type 0 store it.

    Any window is accepted (-15): qemu writes -12.
    """
    if _whole is not None and size <= _INLINE:
        # a stream without an end, or with more than a cluster, is for the other one
        with suppress(_WholeError):
            whole = _whole(data, size)
            if len(whole) == size:
                return whole
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
    """Decompresses clusters of one image, the last ones used from memory.

    A cluster is named by its L2 entry, which says where its data are.
    """

    def __init__(self, parts: Parts, decompress: Decompress) -> None:
        """`decompress` is what the image's compression type asks for."""
        self._storage = parts.storage
        self._codec = parts.codec
        self._pins = parts.pins
        self._cluster_size = parts.geometry.cluster_size
        self._decompress = decompress
        self._most = max(1, _CACHE_BYTES // self._cluster_size)
        self._kept: OrderedDict[int, memoryview] = OrderedDict()
        self._busy: Turnstile[int] = Turnstile()

    def try_read(self, word: int, within: int, view: memoryview) -> bool:
        """Fill `view` with a part of a cluster, or say False if that takes a wait.

        Args:
            word: The L2 entry of the cluster.
            within: Where in the cluster `view` begins, in bytes.
            view: What to fill.

        Raises:
            ImageCorruptError: The data don't make exactly one cluster.
        """
        data = self._kept.get(word)
        if data is not None:
            self._kept.move_to_end(word)
        else:
            data = self._decompress_now(word)
            if data is None:
                return False
            # Who reads all of it has no use for it any more. The memory is used again at
            # once, while it is in the processor's cache: 59 instead of 73 us a cluster.
            if len(view) < self._cluster_size:
                self._keep(word, data)
        view[:] = data[within : within + len(view)]
        return True

    async def read(self, word: int, within: int, view: memoryview) -> None:
        """Fill `view` as `try_read` does, once whatever is needed for it is there.

        Raises:
            ImageCorruptError: The data don't make exactly one cluster.
            OSError: They can't be read.
        """
        # Pinned while waiting too: if the one before fails, the data are read again.
        generation = self._pins.enter()
        try:
            data = await self._shared(word)
        finally:
            self._pins.leave(generation)
        view[:] = data[within : within + len(view)]

    def forget(self, word: int) -> None:
        """Let an entry name other data from now on; nobody reads the old ones any more."""
        self._kept.pop(word, None)

    def _keep(self, word: int, data: memoryview) -> None:
        self._kept[word] = data
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def _decompress_now(self, word: int) -> memoryview | None:
        """Decompress a small cluster whose data are in the page cache."""
        if self._cluster_size > _INLINE:
            return None
        host_offset, data = self._room(word)
        if not self._storage.try_read(host_offset, memoryview(data)):
            return None
        try:
            return memoryview(self._decompress(data, self._cluster_size))
        except ValueError as error:
            raise self._broken(host_offset, error) from error

    async def _shared(self, word: int) -> memoryview:
        """Wait for whoever decompresses this cluster already, or do it."""
        while word in self._busy:
            await self._busy.wait(word)
            kept = self._kept.get(word)
            if kept is not None:
                return kept
        self._busy.enter(word)
        try:
            result = memoryview(await self._load(word))
            self._keep(word, result)
        finally:
            self._busy.leave(word)
        return result

    async def _load(self, word: int) -> bytes | bytearray:
        host_offset, data = self._room(word)
        view = memoryview(data)
        try:
            if self._cluster_size <= _INLINE:
                # they were not in the page cache
                await self._storage.read(host_offset, view)
                return self._decompress(data, self._cluster_size)
            if not self._storage.try_read(host_offset, view):
                await self._storage.read(host_offset, view)
            return await run(self._decompress, data, self._cluster_size)
        except ValueError as error:
            raise self._broken(host_offset, error) from error

    def _room(self, word: int) -> tuple[int, bytearray]:
        """Return where the data of a cluster begin, and room for them."""
        host_offset, length = self._codec.compressed_extent(word)
        if host_offset >= self._storage.size:
            raise ImageCorruptError(
                f"{self._storage.name}: the compressed cluster at {host_offset:#x} "
                "lies past the end of the file"
            )
        return host_offset, bytearray(min(length, self._storage.size - host_offset))

    def _broken(self, host_offset: int, error: ValueError) -> ImageCorruptError:
        return ImageCorruptError(
            f"{self._storage.name}: the compressed cluster at {host_offset:#x} "
            f"can't be decompressed ({error})"
        )
