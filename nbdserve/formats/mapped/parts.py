"""What the operations on an open image share."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from nbdserve.block.device import BlockDevice
from nbdserve.formats.crypto.image_cipher import ImageCipher
from nbdserve.formats.mapped.commit import Committer
from nbdserve.formats.mapped.entries import EntryCodec
from nbdserve.formats.mapped.gate import Gate
from nbdserve.formats.mapped.geometry import Geometry
from nbdserve.formats.mapped.pool import Pool
from nbdserve.formats.mapped.tables import Tables
from nbdserve.formats.mapped.waits import Pins
from nbdserve.storage.base import Buffer, Storage


@dataclass(frozen=True, slots=True)
class Parts:
    """An open image, to read.

    Attributes:
        storage: Its file: header and tables, and compressed clusters.
        data: The file that plain clusters lie in: `storage`, unless the format keeps
            guest data elsewhere.
        geometry: Its numbers.
        codec: How it spells entries.
        tables: Its tables in memory.
        pins: Input and output under way.
        backing: The disk below, if there is one.
        raw: Whether `data`, a file of its own, has to be what the guest sees by itself.
        cipher: What plain clusters are encrypted with; None if they are not.
        gate: Passed by everything that changes the mapping.
    """

    storage: Storage
    data: Storage
    geometry: Geometry
    codec: EntryCodec
    tables: Tables
    pins: Pins
    backing: BlockDevice | None
    raw: bool = False
    cipher: ImageCipher | None = None
    gate: Gate = field(default_factory=Gate)

    async def put_encrypted(
        self, cipher: ImageCipher, guest_offset: int, host_offset: int, data: Buffer
    ) -> None:
        """Encrypt and write sectors of a cluster that the caller may write to.

        Encrypting may take a while, in which nobody may use the cluster for something
        else.
        """
        generation = self.pins.enter()
        try:
            encrypted = await cipher.encrypt(data, guest_offset, host_offset)
            await self.data.put(host_offset, encrypted)
        finally:
            self.pins.leave(generation)

    @property
    def external(self) -> bool:
        """Whether guest data have a file of their own.

        Each cluster then has its place there, at its guest offset: nothing is reserved
        or counted for it, and nobody else can have it.
        """
        return self.data is not self.storage

    @property
    def backing_size(self) -> int:
        """Bytes of the backing file, 0 without one."""
        return self.backing.size if self.backing is not None else 0


@dataclass(frozen=True, slots=True)
class Space:
    """What a writable image has besides.

    Attributes:
        pool: Where free clusters come from.
        commit: Decides when words are written.
        owned: Called with a host offset and whether a table should be there; returns
            whether one entry alone uses it. Raises ImageCorruptError if it is no
            place to write such a thing to.
        prepare: Awaited before each change of the mapping; does what the header
            must say before the first one.
    """

    pool: Pool
    commit: Committer
    owned: Callable[[int, bool], Awaitable[bool]]
    prepare: Callable[[], Awaitable[None]]
