"""A power cut while passphrases change: each active slot opens, and one that worked still does."""

import asyncio
import random

import pytest

from nbdserve.formats.crypto.key_slots import KeySlots, SlotChange
from nbdserve.formats.crypto.keys import open_slot
from nbdserve.formats.crypto.luks import parse_luks_header
from nbdserve.formats.crypto.secret import Secret
from tests.crash.cuts import Cache
from tests.crash.disk import Disk, Files
from tests.helpers.encrypted import PASSPHRASE, quick_luks

#: Slot 6 lies across two sectors.
SLOT = 6
OTHER = b"another one"
PER_EVENT = 30

pytestmark = pytest.mark.crash


def opens(content: bytes | bytearray) -> frozenset[bytes]:
    """Return the passphrases that open a header; each active slot must have one."""
    header = parse_luks_header(bytes(content[:592]), len(content))
    found = set()
    for number, slot in enumerate(header.slots):
        if slot.active:
            passphrase = OTHER if number == SLOT else PASSPHRASE
            end = slot.offset + header.material_bytes
            material = bytes(content[slot.offset : end])
            assert open_slot(header, slot, material, passphrase), number
            found.add(passphrase)
    return frozenset(found)


def test_power_cuts_while_passphrases_change() -> None:
    luks = quick_luks("aes-128")
    start = luks.encode().ljust(luks.length, b"\0")
    disk = Disk(start, record=True)

    async def change() -> None:
        slots = await KeySlots.read(disk, 0, luks.length, disk.flush)
        added = SlotChange(add=Secret(OTHER), slot=SLOT, iter_time_ms=1)
        await slots.change(added, luks.key)
        await slots.change(SlotChange(remove=Secret(PASSPHRASE)), luks.key)

    asyncio.run(change())
    assert opens(disk.data) == {OTHER}
    chance = random.Random(1)
    cache = Cache(Files(start))
    seen = []
    for now, event in enumerate(disk.log or []):
        fresh = cache.take(event, now)
        if not fresh:
            continue
        judged: set[int] = set()
        for choice in cache.choices(fresh, PER_EVENT, chance):
            if cache.key(choice) not in judged:
                judged.add(cache.key(choice))
                found = opens(cache.build(choice))
                assert found, cache.story(choice)
                seen.append(found)
    both = frozenset({PASSPHRASE, OTHER})
    assert set(seen) == {frozenset({PASSPHRASE}), both, frozenset({OTHER})}
    # once there are two, nothing loses the new one
    assert all(OTHER in each for each in seen[seen.index(both) :])


async def _nothing() -> None:
    """Make nothing durable."""


def test_missing_barriers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Disk, "flush", lambda _: _nothing())
    with pytest.raises(AssertionError):
        test_power_cuts_while_passphrases_change()
