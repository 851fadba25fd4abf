"""Several passphrases for one image: added and removed by us, and by qemu."""

from pathlib import Path

import pytest

import nbdserve
from nbdserve.errors import ConfigError, ImageLockedError
from nbdserve.formats.create import create_image
from nbdserve.formats.crypto.key_slots import SlotChange
from nbdserve.formats.crypto.secret import Secret
from nbdserve.formats.info import image_info
from nbdserve.formats.qcow2.image import Qcow2Image
from tests.helpers.encrypted import PASSPHRASE, Qemu, create_luks, secret_file

SIZE = 1 << 20
OTHER = b"another one"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    create_luks(path, SIZE)
    return path


def added(passphrase: bytes, slot: int | None = None) -> SlotChange:
    return SlotChange(add=Secret(passphrase), slot=slot, iter_time_ms=1)


async def change(path: Path, change: SlotChange, known: bytes = PASSPHRASE) -> None:
    async with nbdserve.open_image(path, secrets=[known]) as disk:
        assert isinstance(disk, Qcow2Image)
        await disk.change_key_slots(change)


async def content(path: Path, passphrase: bytes) -> bytes:
    opened = nbdserve.open_image(path, read_only=True, secrets=[passphrase])
    async with opened as disk:
        return await disk.read(0, SIZE)


def active(path: Path) -> list[int]:
    info = image_info(path).as_json()
    slots = info["format-specific"]["data"]["encrypt"]["slots"]
    return [number for number, slot in enumerate(slots) if slot["active"]]


async def test_each_passphrase_opens_the_same_disk(image: Path) -> None:
    qemu = Qemu(image)
    qemu.io("write -P 7 0 64k")
    mirror = qemu.content()
    # slot 6 lies across two sectors of the header
    for slot in (None, 6, 7):
        await change(image, added(OTHER + str(slot).encode(), slot))
    assert active(image) == [0, 1, 6, 7]
    for slot in (None, 6, 7):
        passphrase = OTHER + str(slot).encode()
        assert await content(image, passphrase) == mirror
        assert Qemu(image, passphrase=passphrase).content() == mirror
    await change(image, SlotChange(remove=Secret(PASSPHRASE)), OTHER + b"6")
    assert active(image) == [1, 6, 7]
    await change(image, SlotChange(remove_slot=1), OTHER + b"7")
    assert active(image) == [6, 7]
    with pytest.raises(ImageLockedError, match="none of its 2 key slots"):
        await content(image, PASSPHRASE)
    qemu = Qemu(image, passphrase=OTHER + b"7")
    assert qemu.content() == mirror
    qemu.check()


async def test_a_passphrase_is_changed_by_adding_and_removing(image: Path) -> None:
    wanted = SlotChange(add=Secret(OTHER), remove=Secret(PASSPHRASE), iter_time_ms=1)
    await change(image, wanted)
    assert active(image) == [1]
    assert await content(image, OTHER) == bytes(SIZE)
    with pytest.raises(ImageLockedError):
        await content(image, PASSPHRASE)


async def test_what_qemu_adds_and_removes(image: Path) -> None:
    qemu = Qemu(image)
    more = ["--object", f"secret,id=more,file={secret_file(image.parent, OTHER)}"]
    options = "encrypt.state=active,encrypt.new-secret=more,encrypt.iter-time=10"
    qemu.amend(*more, "-o", options)
    assert active(image) == [0, 1]
    assert await content(image, OTHER) == bytes(SIZE)
    qemu.amend("-o", "encrypt.state=inactive,encrypt.keyslot=1")
    with pytest.raises(ImageLockedError):
        await content(image, OTHER)
    # the slot that qemu has emptied is used again
    await change(image, added(b"third"))
    assert active(image) == [0, 1]
    assert await content(image, b"third") == bytes(SIZE)


async def test_the_last_slot_stays(image: Path) -> None:
    before = image.read_bytes()
    for wanted in (SlotChange(remove_slot=0), SlotChange(remove=Secret(PASSPHRASE))):
        with pytest.raises(ConfigError, match="no key slot would be left"):
            await change(image, wanted)
    assert active(image) == [0]
    assert image.read_bytes() == before


async def test_what_can_not_be_meant_is_refused(image: Path, tmp_path: Path) -> None:
    for wanted, words in (
        (added(OTHER, 0), "slot 0 is in use"),
        (added(OTHER, 8), "key slot 8: must be 0 to 7"),
        (SlotChange(remove_slot=-1), "key slot -1"),
        (SlotChange(remove_slot=3), "slot 3 is not in use"),
        (SlotChange(slot=3, remove_slot=0), "for a passphrase that is added"),
        (added(b"\xff\xfe"), "not UTF-8"),
        (added(b"with\0nul"), "NUL"),
    ):
        with pytest.raises(ConfigError, match=words):
            await change(image, wanted)
    with pytest.raises(ImageLockedError, match="no key slot opens with"):
        await change(image, SlotChange(remove=Secret(OTHER)))
    for number in range(1, 8):
        await change(image, added(OTHER + bytes([48 + number])))
    with pytest.raises(ConfigError, match="all 8 key slots are in use"):
        await change(image, added(OTHER))
    plain = tmp_path / "plain.qcow2"
    create_image(plain, SIZE)
    with pytest.raises(ConfigError, match="not encrypted"):
        await change(plain, added(OTHER))
