"""A disk as clients see it: a name, and facts that are true for this disk."""

import asyncio
from collections.abc import Iterable, Mapping

from nbdserve.block.device import BlockDevice
from nbdserve.block.dirty_bitmap import DirtyBitmap
from nbdserve.block.layers.dirty import DirtyTracking
from nbdserve.exports.access import OPEN
from nbdserve.exports.contexts import Describe, contexts_of
from nbdserve.wire.constants import (
    MAX_PAYLOAD,
    MIN_PREFERRED_BLOCK,
    TransmissionFlag,
)
from nbdserve.wire.handshake import ExportInfo

#: "Size constraints": the preferred size SHOULD NOT exceed the payload, and clients
#: were seen to use it as the unit of their own caches: 2 MiB clusters are the most.
_MAX_PREFERRED_BLOCK = 2 << 20


class Export:
    """An open disk under its name.

    Attributes:
        name: What clients ask for; matched exactly.
        device: The disk, as clients use it.
        disk: The same without what is recorded about it.
        description: For people; may be empty.
        contexts: The meta contexts that clients can select, by name.
        clients: How many have chosen it; the server counts.
        policy: Who may use it, and how.
        multi_conn: Whether one client may use several connections at once.
        retired: Whether it is no longer offered, and its disk about to be closed.
        change: Held while the disk itself is changed, exchanged or closed.
    """

    device: BlockDevice
    disk: BlockDevice

    policy = OPEN
    multi_conn = True
    retired = False

    def __init__(
        self,
        name: str,
        device: BlockDevice,
        description: str = "",
        *,
        allocation_depth: bool = False,
        bitmaps: Iterable[str] = (),
        persistent: Iterable[DirtyBitmap] = (),
    ) -> None:
        """`bitmaps` are recorded from now on, those in `persistent` by the disk itself."""
        names = tuple(bitmaps)
        self._tracking = DirtyTracking(device, names) if names else None
        self._depth = allocation_depth
        self.name = name
        self.description = description
        self.contexts: Mapping[str, Describe] = {}
        self.clients = 0
        self.change = asyncio.Lock()
        self.put(device, persistent)

    def put(
        self, device: BlockDevice, persistent: Iterable[DirtyBitmap] | None = None
    ) -> None:
        """Let another disk be the one of this export; whoever has the old one closes it.

        Args:
            device: The disk.
            persistent: Its bitmaps, those of the old one if None.
        """
        tracking = self._tracking
        if tracking is not None:
            self._tracking = tracking = tracking.around(device)
        if persistent is not None:
            self._persistent = tuple(persistent)
        self.disk = device
        self.device = tracking or device
        self.contexts = contexts_of(
            self.device,
            depth=self._depth,
            bitmaps=(
                *self._persistent,
                *(tracking.bitmaps if tracking is not None else ()),
            ),
        )

    def become(self, opened: "Export") -> None:
        """Have the disk of another export, which nobody uses."""
        self._tracking = opened._tracking  # noqa: SLF001 -- one of us
        self._depth = opened._depth  # noqa: SLF001
        self._persistent = opened._persistent  # noqa: SLF001
        self.device, self.disk = opened.device, opened.disk
        self.contexts = opened.contexts

    @property
    def is_open(self) -> bool:
        """Whether there is a disk in this process; otherwise `device` can't be used."""
        return True

    @property
    def size(self) -> int | None:
        """Bytes, if it is known yet."""
        return self.device.size

    @property
    def read_only(self) -> bool:
        """Whether it is known that nobody can write."""
        return self.device.read_only

    async def ready(self) -> None:
        """Make sure that `info` can be told, and clients be served.

        Raises:
            ConfigError: The image's path can't be opened.
            ImageError: It can't be used.
        """

    async def flush(self) -> None:
        """Make everything durable that was written.

        Raises:
            OSError: It is not.
            ImageError: The same, found by the engine.
        """
        await self.device.flush()

    async def close(self) -> None:
        """Close the disk, once nobody uses it any more.

        Raises:
            OSError: Something could not be made durable.
            ImageError: The same, found by the engine.
        """
        await self.device.close()

    def transmission_flags(self, *, read_only: bool = False) -> TransmissionFlag:
        """Return what a client can do ("Transmission flags" of doc/proto.md).

        Each flag only where it is true. SEND_DF depends on the client, so that the
        handshake adds it.
        """
        device = self.device
        flags = (
            TransmissionFlag.HAS_FLAGS
            | TransmissionFlag.SEND_FLUSH
            | TransmissionFlag.SEND_FUA
            | TransmissionFlag.SEND_CACHE
        )
        if self.multi_conn:
            # every connection works on the same device, whose flush covers
            # whatever completed before it, no matter on which connection
            flags |= TransmissionFlag.CAN_MULTI_CONN
        if read_only or device.read_only:
            return flags | TransmissionFlag.READ_ONLY
        flags |= TransmissionFlag.SEND_WRITE_ZEROES
        if device.can_trim:
            flags |= TransmissionFlag.SEND_TRIM
        if device.can_fast_zero:
            flags |= TransmissionFlag.SEND_FAST_ZERO
        return flags

    def info(self, *, read_only: bool = False) -> ExportInfo:
        """Return what a client is told that may perhaps only read."""
        preferred = min(self.device.preferred_block, _MAX_PREFERRED_BLOCK)
        return ExportInfo(
            name=self.name,
            size=self.device.size,
            transmission_flags=int(self.transmission_flags(read_only=read_only)),
            description=self.description,
            minimum_block=self.device.minimum_block,
            # smaller requests are slow, and work: not every client asks for this
            only_whole_blocks=False,
            preferred_block=max(preferred, MIN_PREFERRED_BLOCK),
            maximum_payload=MAX_PAYLOAD,
            meta_contexts=tuple(self.contexts),
        )
