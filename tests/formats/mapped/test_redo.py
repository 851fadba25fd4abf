"""The redo log: what a killed server acknowledged is linked at the next opening."""

import asyncio
import errno
import os
import random
import shutil
from pathlib import Path

import pytest

from nbdserve.block.device import BlockDevice
from nbdserve.formats.chain import ChainOptions, open_chain
from nbdserve.formats.check import check_image
from nbdserve.formats.mapped import redo as module
from nbdserve.formats.mapped.image import MappedImage
from nbdserve.formats.mapped.opening import EngineOptions
from nbdserve.formats.mapped.redo import Link, RedoLog, read_leftover, redo_path
from nbdserve.formats.open import drivers, open_image
from tests.helpers.engine import HEADER_INCOMPATIBLE, u64
from tests.helpers.tools import run

CLUSTER = 65536
SIZE = 32 * CLUSTER


def log_with(path: Path, *links: tuple[int, int, int]) -> RedoLog:
    log = RedoLog(path)
    for link in links:
        assert log.link(*link)
    return log


async def test_records_that_are_live_are_left_over(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = log_with(path, (1, 0, 10), (2, 0, 20), (1, 0, 11))
    assert read_leftover(path, 0).links == [Link(1, 0, 11), Link(2, 0, 20)]
    log.committed(2)
    assert read_leftover(path, 0).links == [Link(1, 0, 11)]
    log.committed(3)
    assert read_leftover(path, 0).links == []
    log.close(remove=False)
    assert path.exists()


def test_no_log_is_no_error(tmp_path: Path) -> None:
    assert read_leftover(tmp_path / "none", 0).links == []


@pytest.mark.parametrize("cut", [1, 20, 39, 55])
async def test_a_torn_last_record_is_ignored(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log"
    log_with(path, (1, 0, 10), (2, 0, 20)).close(remove=False)
    os.truncate(path, path.stat().st_size - cut)
    assert read_leftover(path, 0).links == [Link(1, 0, 10)]


async def test_nothing_is_believed_from_a_broken_record_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log_with(path, (1, 0, 10), (2, 0, 20), (3, 0, 30)).close(remove=False)
    data = bytearray(path.read_bytes())
    # records have 56 bytes: in the middle of the second one
    data[-84] ^= 1
    path.write_bytes(data)
    assert read_leftover(path, 0).links == [Link(1, 0, 10)]


async def test_the_log_of_another_boot_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    log_with(path, (1, 0, 10)).close(remove=False)
    monkeypatch.setattr(module, "_boot_id", lambda: b"another")
    leftover = read_leftover(path, 0)
    assert leftover.links == []
    assert leftover.refused is None


@pytest.mark.parametrize("content", [b"", b"nbd", b"x" * 500])
def test_what_is_no_log_is_ignored(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    assert read_leftover(path, 0).links == []


async def test_an_image_written_later_by_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log_with(path, (1, 0, 10)).close(remove=False)
    later = path.stat().st_mtime_ns + 11 * 10**9
    leftover = read_leftover(path, later)
    assert leftover.refused is not None
    assert "another program" in leftover.refused


async def test_the_log_is_touched_while_it_has_something_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the image's time stamp is compared with must not be older than a moment."""
    monkeypatch.setattr(module, "_BEAT_S", 0.001)
    path = tmp_path / "log"
    log = log_with(path, (1, 0, 10))

    async def touched() -> bool:
        os.utime(path, (0, 0))
        for _ in range(500):
            await asyncio.sleep(0.002)
            if path.stat().st_mtime_ns:
                return True
        return False

    assert await touched()
    assert await touched(), "again and again"
    log.committed(1)
    os.utime(path, (0, 0))
    await asyncio.sleep(0.02)
    assert not path.stat().st_mtime_ns, "all is in the image: nothing to say"
    log.close(remove=True)


async def test_a_steady_load_does_not_let_the_log_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is always a live record when a commit ends, and never a moment to truncate."""
    monkeypatch.setattr(module, "_TIDY", 4000)
    path = tmp_path / "log"
    log = RedoLog(path)
    largest = 0
    for number in range(1, 2001):
        assert log.link(number, 0, number << 16)
        if number % 10 == 0:
            log.committed(number - 3)
            assert [each.guest_cluster for each in read_leftover(path, 0).links] == [
                number - 2,
                number - 1,
                number,
            ]
        largest = max(largest, path.stat().st_size)
    assert largest < 6000
    log.close(remove=True)
    assert not list(tmp_path.iterdir())


async def test_a_log_that_can_t_be_copied_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TIDY", 100)
    path = tmp_path / "log"
    log = log_with(path, *((number, 0, number) for number in range(1, 11)))
    pwrite = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if len(data) > 100:
            raise OSError(errno.ENOSPC, "no space")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    log.committed(9)
    assert log.link(11, 0, 11)
    assert read_leftover(path, 0).links == [Link(10, 0, 10), Link(11, 0, 11)]
    assert list(tmp_path.iterdir()) == [path]
    log.close(remove=True)


async def test_without_a_descriptor_the_log_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TIDY", 100)
    path = tmp_path / "log"
    log = log_with(path, *((number, 0, number) for number in range(1, 11)))

    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", none_left)
        log.committed(9)
        assert log.link(11, 0, 11)
    assert read_leftover(path, 0).links == [Link(10, 0, 10), Link(11, 0, 11)]
    log.committed(10)
    assert path.stat().st_size < 200, "what was not dropped then is dropped later"
    assert read_leftover(path, 0).links == [Link(11, 0, 11)]
    log.close(remove=True)


async def test_a_log_that_was_removed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BEAT_S", 0.001)
    path = tmp_path / "log"
    log = log_with(path, (1, 0, 10), (2, 0, 20))
    log.committed(1)
    path.unlink()
    for _ in range(500):
        await asyncio.sleep(0.002)
        if path.exists():
            break
    assert read_leftover(path, 0).links == [Link(2, 0, 20)]
    log.committed(2)
    await asyncio.sleep(0.02)
    path.unlink()
    assert log.link(3, 0, 30), "and the first record after a pause"
    assert read_leftover(path, 0).links == [Link(3, 0, 30)]
    log.close(remove=True)
    assert not list(tmp_path.iterdir())


async def test_nothing_is_recorded_where_nobody_would_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TIDY", 100)
    monkeypatch.setattr(module, "_BEAT_S", 0.001)
    folder = tmp_path / "state"
    folder.mkdir()
    path = folder / "log"
    log = log_with(path, *((number, 0, number) for number in range(1, 11)))
    shutil.rmtree(folder)
    await asyncio.sleep(0.02)
    assert not log.link(11, 0, 11)
    log.committed(9)
    assert not log.link(11, 0, 11)
    folder.mkdir()
    assert log.link(12, 0, 12)
    assert read_leftover(path, 0).links == [Link(10, 0, 10), Link(12, 0, 12)]
    log.close(remove=True)


# -- with images


class Killed:
    """An overlay as a server left it that was killed before its commit."""

    def __init__(self, folder: Path, fmt: str, *, options: str = "") -> None:
        self.folder = folder
        self.fmt = fmt
        self.state = folder / "state"
        self.state.mkdir()
        self.path = folder / f"disk.{fmt}"
        self.content = bytearray(random.Random(1).randbytes(SIZE))
        base = folder / "base.raw"
        base.write_bytes(self.content)
        argv = ["qemu-img", "create", "-q", "-f", fmt, "-b", str(base), "-F", "raw"]
        if options:
            argv += ["-o", options]
        run(*argv, self.path, str(SIZE))

    async def open(self) -> BlockDevice:
        options = EngineOptions(state_dir=self.state, commit_interval_s=1e6)
        return await open_chain(self.path, ChainOptions(), drivers(options))

    async def write_and_die(self, *offsets: int) -> None:
        """Acknowledge writes; then restore what the files were at that moment."""
        image = await self.open()
        await image.write(5 * CLUSTER, b"committed")
        self.content[5 * CLUSTER : 5 * CLUSTER + 9] = b"committed"
        await image.flush()
        for offset in offsets:
            await image.write(offset, b"acknowledged")
            self.content[offset : offset + 12] = b"acknowledged"
        saved = self.folder / "saved"
        shutil.copyfile(self.path, saved)
        (log,) = self.state.iterdir()
        kept = log.read_bytes()
        await image.close()
        assert not any(self.state.iterdir()), "a clean close leaves no log"
        with saved.open("rb") as source, self.path.open("r+b") as target:
            target.truncate(0)
            shutil.copyfileobj(source, target)
        log.write_bytes(kept)


@pytest.fixture(params=["qcow", "qcow2"])
def killed(request: pytest.FixtureRequest, tmp_path: Path) -> Killed:
    return Killed(tmp_path, request.param)


async def test_acknowledged_copies_are_linked_again(killed: Killed) -> None:
    await killed.write_and_die(0, 7 * CLUSTER + 100, 7 * CLUSTER + 5000)
    image = await killed.open()
    assert isinstance(image, MappedImage)
    assert any("linked" in note for note in image.notes)
    assert await image.read(0, SIZE) == killed.content
    await image.close()
    image = await killed.open()
    assert isinstance(image, MappedImage)
    assert not image.notes
    assert await image.read(0, SIZE) == killed.content
    await image.close()
    if killed.fmt == "qcow2":
        run("qemu-img", "check", killed.path, expect=[0, 3])


async def test_subclusters_that_were_added_are_linked_again(tmp_path: Path) -> None:
    """In a cluster that the image names already, and in one that it does not."""
    killed = Killed(tmp_path, "qcow2", options="extended_l2=on")
    await killed.write_and_die(
        5 * CLUSTER + 5000, 5 * CLUSTER + 9000, 7 * CLUSTER + 100, 7 * CLUSTER + 5000
    )
    assert {link.guest_cluster for link in kept_words(killed)} == {5, 7}
    image = await killed.open()
    assert await image.read(0, SIZE) == killed.content
    await image.write(5 * CLUSTER + 5000, b"go on")
    killed.content[5 * CLUSTER + 5000 : 5 * CLUSTER + 5005] = b"go on"
    await image.close()
    assert undamaged(killed)
    image = await killed.open()
    assert await image.read(0, SIZE) == killed.content
    await image.close()


async def test_a_replay_that_is_killed_is_repeated(killed: Killed) -> None:
    await killed.write_and_die(0, 9 * CLUSTER)
    (log,) = killed.state.iterdir()
    kept = log.read_bytes()
    await (await killed.open()).close()
    log.write_bytes(kept)
    image = await killed.open()
    assert await image.read(0, SIZE) == killed.content
    await image.close()


async def test_links_that_somebody_has_made_differently_stay(tmp_path: Path) -> None:
    killed = Killed(tmp_path, "qcow2")
    await killed.write_and_die(0, 9 * CLUSTER)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", killed.path)
    killed.content[:CLUSTER] = b"\7" * CLUSTER
    image = await killed.open()
    assert await image.read(0, SIZE) == killed.content
    await image.close()


async def test_a_repair_of_leaks_between_is_no_corruption(tmp_path: Path) -> None:
    """The clusters of the log look leaked: a check may have freed them."""
    killed = Killed(tmp_path, "qcow2")
    before = bytes(killed.content)
    await killed.write_and_die(0, 9 * CLUSTER)
    run("qemu-img", "check", "-r", "leaks", killed.path)
    image = await killed.open()
    assert await image.read(0, 100) == before[:100]
    await image.write(0, b"goes on")
    await image.close()
    assert not u64(killed.path.read_bytes(), HEADER_INCOMPATIBLE)
    run("qemu-img", "check", killed.path)


def kept_words(killed: Killed) -> list[Link]:
    (log,) = killed.state.iterdir()
    return read_leftover(log, 0).links


def unit(killed: Killed) -> int:
    """Return the bytes of a cluster: qemu-img makes small ones for overlays of version 1."""
    return 512 if killed.fmt == "qcow" else CLUSTER


def undamaged(killed: Killed) -> bool:
    result = check_image(killed.path)
    assert result is not None
    return not result.corruptions and not result.check_errors


async def test_a_cluster_that_was_given_to_another_entry_is_not_shared(
    killed: Killed,
) -> None:
    """Another writer took what looked leaked, and the word is the old one again."""
    await killed.write_and_die(9 * CLUSTER)
    (link,) = kept_words(killed)
    content = bytearray(killed.path.read_bytes())
    mask = (1 << 55) - 1
    l2_offset = u64(content, u64(content, 40)) & mask
    other = 20 * CLUSTER // unit(killed)
    content[l2_offset + 8 * other : l2_offset + 8 * other + 8] = link.entry.to_bytes(
        8, "big"
    )
    killed.path.write_bytes(content)
    host_offset = link.entry & mask
    data = content[host_offset : host_offset + unit(killed)]
    image = await killed.open()
    assert await image.read(20 * CLUSTER, len(data)) == data
    await image.write(9 * CLUSTER, b"mine" * 128)
    assert await image.read(20 * CLUSTER, len(data)) == data
    await image.close()
    assert undamaged(killed)


async def test_two_records_of_one_cluster_link_it_once(killed: Killed) -> None:
    await killed.write_and_die(9 * CLUSTER)
    (link,) = kept_words(killed)
    (path,) = killed.state.iterdir()
    other = 21 * CLUSTER // unit(killed)
    log_with(path, link, (other, 0, link.entry)).close(remove=False)
    before = bytes(killed.content[21 * CLUSTER : 22 * CLUSTER])
    image = await killed.open()
    assert await image.read(21 * CLUSTER, CLUSTER) == before
    await image.close()
    assert undamaged(killed)


async def test_an_image_written_by_others_since_says_so(killed: Killed) -> None:
    await killed.write_and_die(0)
    (log,) = killed.state.iterdir()
    past = log.stat().st_mtime - 3600
    os.utime(log, (past, past))
    image = await killed.open()
    assert isinstance(image, MappedImage)
    assert any("lost" in note for note in image.notes)
    await image.close()


async def test_a_state_folder_that_is_gone_makes_copies_wait(tmp_path: Path) -> None:
    killed = Killed(tmp_path, "qcow2")
    killed.state.rmdir()
    image = await killed.open()
    assert isinstance(image, MappedImage)
    assert any("no redo log" in note for note in image.notes)
    await image.write(0, b"x")
    with killed.path.open("rb") as file:
        content = file.read()
    assert b"x" + bytes(killed.content[1:50]) in content
    await image.close()


async def test_a_log_that_is_gone_fails_no_flush(
    killed: Killed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TIDY", 100)
    image = await killed.open()
    for cluster in range(8):
        await image.write(cluster * CLUSTER, b"x")
    shutil.rmtree(killed.state)
    for cluster in range(8, 16):
        await image.trim((cluster - 8) * CLUSTER, CLUSTER)
        flush = asyncio.create_task(image.flush())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        # a record that lives on when the commit ends
        await image.write(cluster * CLUSTER, b"y")
        await flush
    await image.close()
    report = check_image(killed.path)
    assert report is None or not report.leaks


async def test_what_a_killed_server_had_reserved_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "killed.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    state = tmp_path / "state"
    state.mkdir()
    killed = tmp_path / "copy.qcow2"
    async with open_image(path, state_dir=state) as image:
        await image.write(5 << 20, b"acknowledged")
        # what is in the file now is what a killed server leaves
        shutil.copyfile(path, killed)
        (log,) = state.iterdir()
        number = os.stat(killed)
        shutil.copyfile(log, redo_path(state, number.st_dev, number.st_ino))
    before = check_image(killed)
    assert before is not None
    assert before.leaks > 0

    async with open_image(killed, state_dir=state) as image:
        assert any("gave back" in note for note in image.notes)
        assert await image.read(5 << 20, 12) == b"acknowledged"
        await image.write(9 << 20, b"more")

    run("qemu-img", "check", "-q", killed)
    assert killed.stat().st_size < 2 << 20
    assert not list(state.iterdir())
