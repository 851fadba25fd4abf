"""The committer: what is written when, what a flush covers, and what a failure leaves."""

import asyncio
import errno
from array import array
from pathlib import Path

import pytest

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.mapped.commit import Committer, Freed
from nbdserve.formats.mapped.entries import OWNED, UNALLOCATED, UNPUBLISHED, ZERO
from nbdserve.formats.mapped.redo import RedoLog, read_leftover
from nbdserve.formats.mapped.tables import Table
from nbdserve.formats.mapped.waits import Pins
from nbdserve.storage.faults import NO_FAULT, Fault, FaultyStorage, RecordingStorage
from nbdserve.storage.memory import MemoryStorage
from tests.helpers.engine import u64

TABLE = 4096
OLD, NEW, NEWER = 0x1000, 0x2000, 0x3000


def words(*values: int) -> "array[int]":
    return array("Q", values)


class Bench:
    """A committer with one table of 64 words and a storage that remembers."""

    def __init__(
        self, *, interval_s: float = 1000.0, writethrough: bool = False
    ) -> None:
        self.memory = MemoryStorage(bytes(2 * TABLE))
        self.recorder = RecordingStorage(self.memory)
        self.storage = FaultyStorage(self.recorder)
        self.pins = Pins()
        self.commit = Committer(
            self.storage, self.pins, interval_s=interval_s, writethrough=writethrough
        )
        self.table = Table.empty(3, TABLE, 64)
        self.released: list[Freed] = []
        self.commit.on_release(self.release)

    async def release(self, freed: list[Freed]) -> None:
        self.released += freed

    async def change(self, index: int, *values: int, hold: bool) -> bool:
        return await self.commit.change(
            self.table, index, words(*values), OWNED, hold=hold
        )

    def in_file(self, index: int) -> int:
        return u64(self.memory.content(), TABLE + 8 * index)

    def fail(self, kind: str, *, error: int = errno.EIO, written: int = 0) -> None:
        """Let the next call of this kind fail."""
        self.storage.fault = Fault(
            at=self.storage.calls,
            kinds=frozenset({kind}),
            error=error,
            written=written,
        )

    @property
    def calls(self) -> list[str]:
        return [each.kind for each in self.recorder.operations]


async def turn() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_published_word_is_in_the_file_before_it_is_acknowledged() -> None:
    bench = Bench()
    assert await bench.change(5, NEW, NEWER, hold=False)
    assert bench.in_file(5) == bench.table.words[5] == NEW
    assert bench.in_file(6) == bench.table.words[6] == NEWER
    assert bench.calls == ["write"]
    await bench.commit.flush()
    assert bench.calls == ["write", "flush"], "nothing is held: one barrier"
    await bench.commit.close()


async def test_a_held_word_waits_for_the_barrier_of_its_data() -> None:
    bench = Bench()
    assert not await bench.change(5, NEW, hold=True), "without a log: wait for a flush"
    assert bench.table.words[5] == NEW
    assert bench.table.kinds[5] == UNPUBLISHED
    assert bench.in_file(5) == 0
    assert bench.table.users == 1, "it must stay in the cache"
    await bench.commit.flush()
    assert bench.calls == ["flush", "write", "flush"]
    assert bench.in_file(5) == NEW
    assert bench.table.kinds[5] == OWNED
    assert bench.table.users == 0
    await bench.commit.close()


async def test_a_word_that_is_held_is_superseded_and_written_once() -> None:
    """A later change of a held word must not overtake it in the file."""
    bench = Bench()
    await bench.change(5, NEW, hold=True)
    await bench.commit.change(bench.table, 5, words(1), ZERO, hold=False)
    assert bench.in_file(5) == 0
    assert bench.table.kinds[5] == ZERO
    await bench.commit.flush()
    assert bench.in_file(5) == 1
    assert bench.calls == ["flush", "write", "flush"]
    await bench.commit.close()


async def test_neighbours_of_different_standing_in_one_sector() -> None:
    """Publishing a word never publishes its held neighbour with it."""
    bench = Bench()
    await bench.change(5, NEW, hold=True)
    await bench.change(4, OLD, hold=False)
    await bench.change(6, OLD, hold=False)
    assert [bench.in_file(index) for index in (4, 5, 6)] == [OLD, 0, OLD]
    await bench.commit.close()
    assert [bench.in_file(index) for index in (4, 5, 6)] == [OLD, NEW, OLD]


async def test_neighbouring_held_words_are_written_in_one_call() -> None:
    bench = Bench()
    for index in (9, 7, 8, 20):
        await bench.change(index, NEW + index, hold=True)
    await bench.commit.flush()
    assert bench.calls == ["flush", "write", "write", "flush"]
    assert [bench.in_file(index) for index in (7, 8, 9, 20)] == [
        NEW + index for index in (7, 8, 9, 20)
    ]
    await bench.commit.close()


async def test_flushes_share_a_commit_and_what_comes_later_gets_the_next() -> None:
    bench = Bench()
    bench.storage.suspending = True
    await bench.change(1, NEW, hold=True)
    flushes = [asyncio.create_task(bench.commit.flush()) for _ in range(5)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # the first commit has begun
    assert bench.in_file(1) == 0
    await bench.change(2, NEW, hold=True)
    late = [asyncio.create_task(bench.commit.flush()) for _ in range(5)]
    await asyncio.gather(*flushes, *late)
    one = ["flush", "write", "flush"]
    assert bench.calls == one + one, "the second word changed after the freeze"
    first, second = bench.recorder.operations[1], bench.recorder.operations[4]
    assert (first.offset, second.offset) == (TABLE + 8, TABLE + 16)
    await bench.commit.close()


async def test_a_flush_with_nothing_to_do_costs_nothing() -> None:
    bench = Bench()
    await bench.commit.flush()
    assert bench.calls == []
    bench.commit.dirty = True
    await bench.commit.flush()
    await bench.commit.flush()
    assert bench.calls == ["flush"]
    await bench.commit.close()


async def test_a_change_of_a_word_that_is_being_committed_waits() -> None:
    """Whichever came last has to win in the file as well."""
    bench = Bench()
    bench.storage.suspending = True
    await bench.change(1, NEW, hold=True)
    flush = asyncio.create_task(bench.commit.flush())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    change = asyncio.create_task(bench.change(1, NEWER, hold=False))
    await flush
    assert await change
    assert bench.in_file(1) == bench.table.words[1] == NEWER
    await bench.commit.close()


async def test_held_words_are_written_within_the_interval_unasked() -> None:
    bench = Bench(interval_s=0.001)
    await bench.change(1, NEW, hold=True)
    async with asyncio.timeout(20):
        while bench.in_file(1) != NEW:  # noqa: ASYNC110 -- a file tells nobody
            await asyncio.sleep(0.001)
    await bench.commit.close()


async def test_freed_clusters_are_released_after_the_commit_and_the_pins() -> None:
    bench = Bench()
    pin = bench.pins.enter()
    bench.commit.free(65536, 512)
    await turn()
    assert bench.released == []
    await bench.commit.flush()
    await turn()
    assert bench.released == [], "a read of it may be under way"
    bench.commit.free(70000, 512)
    bench.pins.leave(pin)
    await turn()
    assert bench.released == [(65536, 512)], "the second belongs to the next epoch"
    await bench.commit.close()
    assert bench.released == [(65536, 512), (70000, 512)]


@pytest.mark.parametrize("held", [True, False])
async def test_a_failed_barrier_is_final(held: bool) -> None:
    """After a failed fsync nobody knows what is durable: no retry, no acknowledgement."""
    bench = Bench()
    await bench.change(1, NEW, hold=held)
    bench.commit.free(65536, 512)
    bench.fail("flush")
    flushes = await asyncio.gather(
        *(bench.commit.flush() for _ in range(3)), return_exceptions=True
    )
    assert all(isinstance(each, OSError) for each in flushes)
    for again in (bench.commit.flush(), bench.commit.barrier(), bench.commit.close()):
        with pytest.raises(OSError, match="earlier sync failed") as caught:
            await again
        assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="earlier sync failed"):
        bench.commit.check()
    assert bench.released == []
    assert bench.calls.count("flush") == 0
    assert bench.in_file(1) == (0 if held else NEW)


async def test_a_held_word_that_could_not_be_written_is_tried_again() -> None:
    bench = Bench()
    await bench.change(1, NEW, hold=True)
    bench.commit.free(65536, 512)
    bench.fail("write", error=errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        await bench.commit.flush()
    assert bench.table.users == 1
    await turn()
    assert bench.released == [], "its old pointer is in the file still"
    await bench.commit.flush()
    assert bench.in_file(1) == NEW
    await bench.commit.close()
    assert bench.released == [(65536, 512)]
    assert bench.table.users == 0


@pytest.mark.parametrize("written", [0, 3, 8])
async def test_a_published_word_that_failed_is_undone_by_the_next_commit(
    written: int,
) -> None:
    """Memory keeps the old word; what a short write left is written over."""
    bench = Bench()
    assert await bench.change(1, OLD, hold=False)
    bench.fail("write", written=written)
    with pytest.raises(OSError, match="Input/output"):
        await bench.change(1, NEW, hold=False)
    assert bench.table.words[1] == OLD
    bench.commit.free(NEW, 512)
    await bench.commit.flush()
    assert bench.in_file(1) == OLD
    await bench.commit.close()
    assert bench.released == [(NEW, 512)]


async def test_a_closed_committer_leaves_no_timer(tmp_path: Path) -> None:
    bench = Bench(interval_s=0.001)
    await bench.change(1, NEW, hold=True)
    bench.storage.fault = Fault(at=0, kinds=frozenset({"write"}), lasting=True)
    with pytest.raises(OSError, match="Input/output"):
        await bench.commit.close()
    calls = bench.storage.calls
    await asyncio.sleep(0.02)
    assert bench.storage.calls == calls


# -- with a redo log


def live_links(log: RedoLog) -> list[tuple[int, int, int]]:
    leftover = read_leftover(log.path, 0)
    assert leftover.refused is None
    return [tuple(link) for link in leftover.links]  # type: ignore[misc]


async def test_a_held_word_is_acknowledged_once_it_is_logged(tmp_path: Path) -> None:
    bench = Bench()
    bench.commit.redo = log = RedoLog(tmp_path / "log")
    assert await bench.change(5, NEW, hold=True)
    assert bench.table.kinds[5] == OWNED
    cluster = 3 * 64 + 5
    assert live_links(log) == [(cluster, 0, NEW)]
    # superseded before it was committed: the file still has the first word
    assert await bench.commit.change(bench.table, 5, words(1), ZERO, hold=False)
    assert live_links(log) == [(cluster, 0, 1)]
    await bench.commit.flush()
    assert live_links(log) == []
    assert await bench.change(5, NEWER, hold=True)
    assert live_links(log) == [(cluster, 1, NEWER)]
    await bench.commit.close()
    assert live_links(log) == []
    log.close(remove=True)
    assert not log.path.exists()


async def test_a_record_made_during_a_commit_stays_alive(tmp_path: Path) -> None:
    bench = Bench()
    bench.storage.suspending = True
    bench.commit.redo = log = RedoLog(tmp_path / "log")
    await bench.change(1, NEW, hold=True)
    flush = asyncio.create_task(bench.commit.flush())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await bench.change(2, NEW, hold=True)
    await flush
    assert live_links(log) == [(3 * 64 + 2, 0, NEW)]
    await bench.commit.close()
    log.close(remove=True)


async def test_a_full_log_makes_the_write_wait_for_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench()
    bench.commit.redo = log = RedoLog(tmp_path / "log")
    monkeypatch.setattr(log, "link", lambda *_: False)
    assert not await bench.change(5, NEW, hold=True)
    assert bench.table.kinds[5] == UNPUBLISHED
    await bench.commit.close()
    assert bench.table.kinds[5] == OWNED
    log.close(remove=True)


async def test_what_may_or_may_not_be_in_the_file_is_not_logged(tmp_path: Path) -> None:
    """A record says what the file has; after a failed write nobody knows."""
    bench = Bench()
    bench.commit.redo = log = RedoLog(tmp_path / "log")
    assert await bench.change(5, NEW, hold=True)
    bench.fail("write", written=8)
    with pytest.raises(OSError, match="Input/output"):
        await bench.commit.flush()
    assert bench.in_file(5) == NEW, "the write failed and had happened all the same"
    assert not await bench.change(5, NEWER, hold=True)
    await bench.commit.close()
    assert bench.in_file(5) == NEWER
    log.close(remove=True)


# -- step C that fails


async def test_what_could_not_be_given_back_is_given_back_with_the_next_commit() -> (
    None
):
    bench = Bench()
    failing = True

    async def release(freed: list[Freed]) -> None:
        if failing:
            raise OSError(errno.EIO, "a refcount block can't be read")
        bench.released += freed

    bench.commit.on_release(release)
    bench.commit.free(0x5000, 0x1000)
    await bench.commit.settle()
    assert bench.released == []
    bench.commit.free(0x9000, 0x1000)
    failing = False
    await bench.commit.settle()
    assert sorted(bench.released) == [(0x5000, 0x1000), (0x9000, 0x1000)]
    await bench.commit.close()


async def test_what_stays_leaked_is_said_when_closing() -> None:
    bench = Bench()

    async def release(freed: list[Freed]) -> None:
        raise OSError(errno.EIO, "a refcount block can't be read")

    bench.commit.on_release(release)
    bench.commit.free(0x5000, 0x1000)
    await bench.commit.settle()
    with pytest.raises(OSError, match="can't be read"):
        await bench.commit.close()


async def test_refcounts_that_can_not_be_changed_are_damage() -> None:
    bench = Bench()
    marked = 0

    async def mark() -> None:
        nonlocal marked
        marked += 1

    async def release(freed: list[Freed]) -> None:
        raise ImageCorruptError("a refcount block is nowhere")

    bench.commit.on_damage(mark)
    bench.commit.on_release(release)
    bench.commit.free(0x5000, 0x1000)
    await bench.commit.settle()
    with pytest.raises(ImageCorruptError, match="until it is repaired"):
        bench.commit.check_writable()
    await bench.commit.close()
    assert marked == 1


# -- memory


def tables(count: int) -> list[Table]:
    return [Table.empty(number, (number + 1) * TABLE, 64) for number in range(count)]


async def test_held_words_keep_only_so_many_tables_in_memory() -> None:
    """One word in each of many tables: they can't leave the cache before a commit."""
    one = 64 * 9
    memory = MemoryStorage(bytes(400 * TABLE))
    storage = FaultyStorage(memory)
    storage.suspending = True
    limit = 10 * one
    commit = Committer(
        storage, Pins(), interval_s=1000.0, writethrough=False, table_bytes=limit
    )
    used = tables(300)
    most = 0

    async def hold(table: Table) -> None:
        nonlocal most
        await commit.change(table, 7, words(NEW), OWNED, hold=True)
        most = max(most, sum(one for each in used if each.users))

    await asyncio.gather(*map(hold, used))
    assert most <= 2 * limit + one
    await commit.close()
    assert not any(each.users or each.held for each in used)
    assert all(u64(memory.content(), each.host_offset + 8 * 7) == NEW for each in used)


async def test_a_commit_that_fails_keeps_count_of_who_holds_what() -> None:
    bench = Bench()
    bench.storage.suspending = True
    await bench.change(1, NEW, hold=True)
    await bench.change(2, NEW, hold=True)
    bench.fail("write", error=errno.ENOSPC)
    flush = asyncio.create_task(bench.commit.flush())
    await turn()
    with pytest.raises(OSError, match="No space"):
        await flush
    await bench.commit.change(bench.table, 1, words(1), ZERO, hold=True)
    bench.storage.fault = NO_FAULT
    await bench.commit.flush()
    assert bench.table.users == bench.table.held == 0
    assert (bench.in_file(1), bench.in_file(2)) == (1, NEW)
    await bench.commit.close()


async def test_an_empty_table_maps_nothing() -> None:
    table = Table.empty(0, 512, 8)
    assert set(table.kinds) == {UNALLOCATED}
    assert not any(table.words)
