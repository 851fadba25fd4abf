"""Adding and removing passphrases of a LUKS image.

The write order, so that after a crash every passphrase that worked before still does, and
no slot is half one and half another (`→` is a barrier):

    add      key material → the slot's fields → the word that makes it active →
    remove   the word that makes it inactive → random bytes over the key material,
             zeros over the slot's fields →

That word lies within one sector. Removing can't reach copies that a drive or a file
system has kept of the old sectors.
"""

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from nbdserve.errors import ConfigError, ImageLockedError
from nbdserve.formats.crypto.luks import (
    SALT_LENGTH,
    SLOTS,
    STRIPES,
    KeySlot,
    LuksHeader,
    slot_fields,
    slot_state,
)
from nbdserve.formats.crypto.new_luks import DEFAULT_ITER_TIME_MS, judge_iter_time
from nbdserve.formats.crypto.secret import Secret
from nbdserve.formats.crypto.unlock import read_luks_header, try_slot
from nbdserve.storage.base import Storage
from nbdserve.storage.executor import run


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotChange:
    """What is to become of the key slots; additions come first.

    Attributes:
        add: A passphrase that is to open the image as well.
        slot: Where it goes; None is the first free one.
        remove: A passphrase that is not to open it any more.
        remove_slot: A slot that is not to open it any more.
        iter_time_ms: How long trying the new passphrase shall take.
    """

    add: Secret | None = None
    slot: int | None = None
    remove: Secret | None = None
    remove_slot: int | None = None
    iter_time_ms: int = DEFAULT_ITER_TIME_MS

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return not (
            self.add is None and self.remove is None and self.remove_slot is None
        )

    def judge(self) -> None:
        """Refuse what can't be meant.

        Raises:
            ConfigError: Names it.
        """
        for number in (self.slot, self.remove_slot):
            if number is not None and not 0 <= number < SLOTS:
                raise ConfigError(f"key slot {number}: must be 0 to {SLOTS - 1}")
        if self.slot is not None and self.add is None:
            raise ConfigError("a key slot is chosen for a passphrase that is added")
        judge_iter_time(self.iter_time_ms)
        if self.add is not None:
            self.add.require_text()


class KeySlots:
    """The key slots of one image, which nobody else changes meanwhile."""

    def __init__(
        self,
        storage: Storage,
        host_offset: int,
        header: LuksHeader,
        barrier: Callable[[], Awaitable[None]],
    ) -> None:
        """Change the header at `host_offset`; `barrier` makes what was written durable."""
        self._storage = storage
        self._host_offset = host_offset
        self._barrier = barrier
        self.header = header

    @classmethod
    async def read(
        cls,
        storage: Storage,
        host_offset: int,
        length: int,
        barrier: Callable[[], Awaitable[None]],
    ) -> "KeySlots":
        """Read the header; see `read_luks_header`."""
        header = await read_luks_header(storage, host_offset, length)
        return cls(storage, host_offset, header, barrier)

    async def change(self, change: SlotChange, key: bytes) -> None:
        """Add, then remove.

        Args:
            change: What is wanted.
            key: The master key.

        Raises:
            ConfigError: There is no free slot, or only one slot is left.
            ImageLockedError: No slot opens with what is to be removed.
            ImageError: The header is broken.
            OSError: It can't be written.
        """
        change.judge()
        doomed = await self._doomed(change)
        if change.add is not None:
            await self._add(change, key)
        left = [
            each
            for each, slot in enumerate(self.header.slots)
            if slot.active and each not in doomed
        ]
        if doomed and not left:
            raise ConfigError(
                f"{self._storage.name}: no key slot would be left, and nothing could ever"
                " be read again; add another passphrase first"
            )
        for each in sorted(doomed):
            await self._remove(each)

    async def _doomed(self, change: SlotChange) -> set[int]:
        """Return the slots that are to be removed."""
        slots = self.header.slots
        doomed: set[int] = set()
        if change.remove_slot is not None:
            if not slots[change.remove_slot].active:
                raise ConfigError(
                    f"{self._storage.name}: key slot {change.remove_slot} is not in use"
                )
            doomed.add(change.remove_slot)
        if change.remove is not None:
            found = [
                number for number in range(SLOTS) if await self._opens(number, change)
            ]
            if not found:
                raise ImageLockedError(
                    f"{self._storage.name}: no key slot opens with"
                    f" {change.remove.name}{change.remove.hint}, so none is removed"
                )
            doomed.update(found)
        return doomed

    async def _opens(self, number: int, change: SlotChange) -> bool:
        """Return whether the passphrase that is to be removed opens a slot."""
        if change.remove is None or not self.header.slots[number].active:
            return False
        key = await try_slot(
            self._storage, self._host_offset, self.header, number, change.remove
        )
        return key is not None

    async def _add(self, change: SlotChange, key: bytes) -> None:
        from nbdserve.formats.crypto.keys import fill_slot  # noqa: PLC0415 -- hashlib, uuid

        if change.add is None:
            return
        number = self._free_slot(change.slot)
        made = await run(
            fill_slot,
            self.header,
            number,
            key,
            change.add.value,
            change.iter_time_ms,
        )
        await self._write(made.slot.offset, made.material)
        await self._barrier()
        await self._write(*slot_fields(number, made.slot))
        await self._barrier()
        await self._write(*slot_state(number, active=True))
        await self._barrier()
        self.header = self.header.with_slot(number, made.slot)

    def _free_slot(self, wanted: int | None) -> int:
        slots = self.header.slots
        if wanted is not None and slots[wanted].active:
            raise ConfigError(f"{self._storage.name}: key slot {wanted} is in use")
        if wanted is not None:
            return wanted
        for number, slot in enumerate(slots):
            if not slot.active:
                return number
        raise ConfigError(
            f"{self._storage.name}: all {SLOTS} key slots are in use; remove one first"
        )

    async def _remove(self, number: int) -> None:
        slot = self.header.slots[number]
        await self._write(*slot_state(number, active=False))
        await self._barrier()
        await self._write(slot.offset, secrets.token_bytes(self.header.material_bytes))
        empty = KeySlot(False, 0, bytes(SALT_LENGTH), slot.sector, STRIPES)
        await self._write(*slot_fields(number, empty))
        await self._barrier()
        self.header = self.header.with_slot(number, empty)

    async def _write(self, offset: int, data: bytes) -> None:
        await self._storage.put(self._host_offset + offset, data)
