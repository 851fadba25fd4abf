"""Faults planted into the engine, each of which the crash tests have to find."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest

from nbdserve.block.dirty_bitmap import DirtyBitmap
from nbdserve.formats.mapped import move
from nbdserve.formats.mapped.allocator import Allocator
from nbdserve.formats.mapped.commit import Committer
from nbdserve.formats.mapped.entries import OWNED, WORD_MASK
from nbdserve.formats.mapped.external import ExternalZeros
from nbdserve.formats.mapped.pieces import Pieces
from nbdserve.formats.mapped.pool import Pool
from nbdserve.formats.mapped.redo import RedoLog
from nbdserve.formats.mapped.tables import Table, Tables
from nbdserve.formats.mapped.waits import Pins
from nbdserve.formats.qcow2.bitmap_changes import BitmapChanges
from nbdserve.formats.qcow2.bitmaps import Bitmaps
from nbdserve.formats.qcow2.compacting_pool import CompactingPool
from nbdserve.formats.qcow2.refcount_block import Block
from nbdserve.formats.qcow2.refcounts import RefcountedPool
from tests.crash.disk import SECTOR

Patch = pytest.MonkeyPatch


@dataclass(frozen=True, slots=True)
class Planted:
    """A fault.

    Attributes:
        plant: Patches the engine.
        flavours: Images on which it shows.
        redo: Whether there is a redo log.
        live: Whether it shows without a crash, in many busy runs.
        restart: Whether it shows only when another server goes on after a kill.
    """

    plant: Callable[[Patch], None]
    flavours: tuple[str, ...]
    redo: bool = True
    live: bool = False
    restart: bool = False


async def _nothing(*_: object, **__: object) -> None:
    """Be skipped."""


class _NoBarrier:
    """Makes nothing durable."""

    barrier = barrier_of = _nothing


def _follow_commits(patch: Patch, skip: Callable[[Committer, bool], bool]) -> None:
    """Skip barriers of commits; `skip` is told whether the held words are written."""
    barrier, commit, write = (
        Committer.barrier,
        Committer._commit,
        Committer._write_words,
    )
    written: set[int] = set()

    async def new_barrier(self: Committer) -> None:
        if not skip(self, id(self) in written):
            await barrier(self)

    async def new_commit(self: Committer) -> None:
        written.discard(id(self))
        await commit(self)

    async def new_write(self: Committer, words: Any) -> None:
        await write(self, words)
        written.add(id(self))

    patch.setattr(Committer, "barrier", new_barrier)
    patch.setattr(Committer, "_commit", new_commit)
    patch.setattr(Committer, "_write_words", new_write)


def no_barrier_a(patch: Patch) -> None:
    """Held words are written before their data is durable."""
    _follow_commits(patch, lambda commit, done: bool(commit._committing) and not done)


def no_barrier_b(patch: Patch) -> None:
    """A flush is acknowledged before the held words are durable."""
    _follow_commits(patch, lambda commit, done: bool(commit._committing) and done)


def refcount_after_link(patch: Patch) -> None:
    """Clusters are linked before their refcount is durable."""
    take = Pool.take

    def new_take(self: Pool, count: int, *, soft: bool = False) -> Any:
        grant = take(self, count, soft=True)
        return grant and grant._replace(durable=True)

    patch.setattr(Pool, "take", new_take)


def l1_before_l2(patch: Patch) -> None:
    """An L2 table is linked before its refcount and its zeros are durable."""

    def take_whole(self: Pool, count: int) -> Any:
        for run in self._runs:
            if run.count >= count:
                return self._cut(run, count)
        return None

    patch.setattr(Pool, "take_whole", take_whole)


def copied_table_not_durable(patch: Patch) -> None:
    """The copy of a shared L2 table is linked before it is durable."""
    alloc = Allocator._l2_alloc

    async def l2_alloc(self: Allocator, allocation: Any) -> None:
        self._commit.barrier = _nothing  # type: ignore[method-assign]
        try:
            await alloc(self, allocation)
        finally:
            del self._commit.barrier

    patch.setattr(Allocator, "_l2_alloc", l2_alloc)


async def _release(commit: Committer, host_offset: int, length: int) -> None:
    assert commit._release is not None
    await commit._release([(host_offset, length)])


def reuse_before_commit(patch: Patch) -> None:
    """Freed clusters are free at once."""

    def free(self: Committer, host_offset: int, length: int) -> None:
        task = asyncio.get_running_loop().create_task(
            _release(self, host_offset, length)
        )
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)
        self.dirty = True

    patch.setattr(Committer, "free", free)


def punch_before_commit(patch: Patch) -> None:
    """Freed clusters are punched at once, though reused only after their commit."""
    old_free = Committer.free

    def free(self: Committer, host_offset: int, length: int) -> None:
        old_free(self, host_offset, length)
        task = asyncio.get_running_loop().create_task(
            self._storage.punch(host_offset, length)
        )
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    patch.setattr(Committer, "free", free)


def no_pins(patch: Patch) -> None:
    """Freed clusters are reused while reads and writes that name them are under way."""

    async def give_back(self: Committer, freed: Any, vacated: Any) -> None:
        assert self._release is not None
        await self._release(freed)

    patch.setattr(Committer, "_give_back", give_back)


def early_acknowledgement(patch: Patch) -> None:
    """A held word is acknowledged though nothing would bring it back."""
    hold = Committer._hold

    def new_hold(self: Committer, *words: Any) -> bool:
        hold(self, *words)
        return True

    patch.setattr(Committer, "_hold", new_hold)


def copies_not_held(patch: Patch) -> None:
    """What had to copy is linked before its data is durable."""
    change = Committer.change

    async def new_change(self: Committer, *what: Any, **how: Any) -> bool:
        return await change(self, *what, **{**how, "hold": False})

    patch.setattr(Committer, "change", new_change)


def whole_sectors(patch: Patch) -> None:
    """A published word takes its held neighbours with it."""
    change = Committer.change

    async def new_change(
        self: Committer, table: Table, index: int, *what: Any, **how: Any
    ) -> bool:
        survives = await change(self, table, index, *what, **how)
        if not how["hold"]:
            fit = SECTOR // (table.place(1) - table.place(0))
            first = index // fit * fit
            last = min(first + fit, len(table.words))
            sector = [table.entry(each) for each in range(first, last)]
            await self._storage.write(table.place(first), table.encode(sector))
        return survives

    patch.setattr(Committer, "change", new_change)


def dirty_tables_evicted(patch: Patch) -> None:
    """Tables leave the cache while words of them are in memory only."""
    keep, commit, create = Committer._keep, Committer._commit, Tables.__init__

    def new_keep(
        self: Committer, table: Table, index: int, in_file: int | None
    ) -> None:
        users = table.users
        keep(self, table, index, in_file)
        table.users = users

    async def new_commit(self: Committer) -> None:
        for table, _ in self._held:
            table.users += 1
        await commit(self)

    def new_create(self: Tables, *parts: Any, **options: Any) -> None:
        create(self, *parts, **options)
        self._capacity = 1

    patch.setattr(Committer, "_keep", new_keep)
    patch.setattr(Committer, "_commit", new_commit)
    patch.setattr(Tables, "__init__", new_create)


def block_not_durable(patch: Patch) -> None:
    """A refcount block is entered into the table before it is durable."""
    write_fresh = RefcountedPool._write_fresh

    async def new_write(self: RefcountedPool, *blocks: Any) -> Any:
        durability = self._durability
        self._durability = _NoBarrier()
        try:
            return await write_fresh(self, *blocks)
        finally:
            self._durability = durability

    patch.setattr(RefcountedPool, "_write_fresh", new_write)


def blocks_in_any_order(patch: Patch) -> None:
    """A refcount block is entered before the one that counts it."""
    enter = RefcountedPool._enter

    async def new_enter(self: RefcountedPool, blocks: dict[int, Block]) -> None:
        await enter(self, dict(reversed(blocks.items())))

    patch.setattr(RefcountedPool, "_enter", new_enter)
    patch.setattr(RefcountedPool, "_counted_in", lambda _self, _block: -1)


def block_entry_not_durable(patch: Patch) -> None:
    """Clusters are linked before the refcount table durably names the block that counts them."""
    enter = RefcountedPool._enter

    async def new_enter(self: RefcountedPool, blocks: dict[int, Block]) -> None:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(RefcountedPool, "_persist", _nothing)
            await enter(self, blocks)

    patch.setattr(RefcountedPool, "_enter", new_enter)


def table_moved_too_early(patch: Patch) -> None:
    """The header names a new refcount table before that is durable."""
    move = RefcountedPool._move_table

    async def new_move(self: RefcountedPool, *place: Any) -> None:
        durability = self._durability
        self._durability = _NoBarrier()
        try:
            await move(self, *place)
        finally:
            self._durability = durability

    patch.setattr(RefcountedPool, "_move_table", new_move)


def flush_joins_a_running_commit(patch: Patch) -> None:
    """A flush is content with a commit that began before it."""
    flush = Committer.flush

    async def new_flush(self: Committer) -> None:
        if self._running is not None:
            await asyncio.wait([self._running])
            self.check()
        else:
            await flush(self)

    patch.setattr(Committer, "flush", new_flush)


def flush_does_not_wait(patch: Patch) -> None:
    """A flush is acknowledged when its commit has begun."""

    async def new_flush(self: Committer) -> None:
        self._start()

    patch.setattr(Committer, "flush", new_flush)


def redo_dead_too_early(patch: Patch) -> None:
    """Records are declared dead before their words are in the file."""
    commit = Committer._commit

    async def new_commit(self: Committer) -> None:
        if self.redo is not None:
            self.redo.committed(self.redo.sequence)
        await commit(self)

    patch.setattr(Committer, "_commit", new_commit)


def reserved_length_not_durable(patch: Patch) -> None:
    """Entries name clusters past what is durably the end of the file."""
    make_durable = Pool._make_durable

    async def new_make_durable(self: Pool, tail: Any, written: Any) -> None:
        if tail is None:
            await make_durable(self, tail, written)
        else:
            await make_durable(self, (0, 1), written)

    patch.setattr(Pool, "_make_durable", new_make_durable)


def reserved_references_not_durable(patch: Patch) -> None:
    """Entries name clusters whose references are not durable."""
    make_durable = Pool._make_durable

    async def new_make_durable(self: Pool, tail: Any, written: Any) -> None:
        await make_durable(self, tail, [] if tail else written)

    patch.setattr(Pool, "_make_durable", new_make_durable)


def reused_without_zeroing(patch: Patch) -> None:
    """Clusters keep the bytes that they had in their earlier life."""
    patch.setattr(Pool, "_zero", _nothing)


def no_barrier_at_opening(patch: Patch) -> None:
    """What a killed server left in the page cache is taken for durable."""
    barrier = Committer.barrier
    opened: set[Committer] = set()

    async def new_barrier(self: Committer) -> None:
        if self in opened:
            await barrier(self)
        opened.add(self)

    patch.setattr(Committer, "barrier", new_barrier)


def bitmaps_not_flagged(patch: Patch) -> None:
    """Bitmaps record without being in use in the file."""
    patch.setattr(Bitmaps, "write_flags", _nothing)


def bitmap_flags_not_durable(patch: Patch) -> None:
    """Changes begin before the file durably says that bitmaps miss them."""
    announce = Bitmaps.announce

    async def new_announce(self: Bitmaps, barrier: object) -> None:
        await announce(self, _nothing)

    patch.setattr(Bitmaps, "announce", new_announce)


def bitmaps_not_durable(patch: Patch) -> None:
    """The header names a directory before what it leads to is durable."""
    switch = BitmapChanges._switch

    async def new_switch(self: BitmapChanges, *arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as within:
            within.setattr(Committer, "barrier", _nothing)
            return await switch(self, *arguments)

    patch.setattr(BitmapChanges, "_switch", new_switch)


def bitmaps_without_marks(patch: Patch) -> None:
    """Bitmaps are stored without what they have recorded."""
    patch.setattr(DirtyBitmap, "mark", lambda *_: None)


_BITMAPS: Final = ("v3-bitmaps", "v3-512-bitmaps")


def moved_beside_writers(patch: Patch) -> None:
    """Compaction moves a cluster while others write to it in place."""
    patch.setattr(move, "SHARED", OWNED)


def moved_before_writers_ended(patch: Patch) -> None:
    """Compaction copies a cluster while writes that began earlier are under way."""
    old_move = move.Mover._move

    async def new_move(self: move.Mover, *what: Any) -> None:
        self._parts = replace(self._parts, pins=Pins())
        await old_move(self, *what)

    patch.setattr(move.Mover, "_move", new_move)


def cut_before_commit(patch: Patch) -> None:
    """The file is cut before its entries durably name the new places."""
    cut = CompactingPool.cut_end

    async def cut_end(self: CompactingPool) -> None:
        durability = self._durability
        self._durability = _NoBarrier()
        try:
            await cut(self)
        finally:
            self._durability = durability

    reuse_before_commit(patch)
    patch.setattr(CompactingPool, "cut_end", cut_end)


def block_moved_too_early(patch: Patch) -> None:
    """The refcount table names a moved block before that is durable."""
    move_block = CompactingPool.move_block

    async def new_move(self: CompactingPool, *place: Any) -> None:
        durability = self._durability
        self._durability = _NoBarrier()
        try:
            await move_block(self, *place)
        finally:
            self._durability = durability

    patch.setattr(CompactingPool, "move_block", new_move)


def added_subclusters_not_held(patch: Patch) -> None:
    """Subclusters count as there before what was written to them is durable."""
    add, change = Allocator._add_subclusters, Committer.change
    adding: set[int] = set()

    async def new_add(self: Allocator, *what: Any) -> bool:
        adding.add(id(self._commit))
        try:
            return await add(self, *what)
        finally:
            adding.discard(id(self._commit))

    async def new_change(self: Committer, *what: Any, **how: Any) -> bool:
        if id(self) in adding:
            how["hold"] = False
        return await change(self, *what, **how)

    patch.setattr(Allocator, "_add_subclusters", new_add)
    patch.setattr(Committer, "change", new_change)


def subclusters_not_filled(patch: Patch) -> None:
    """The place of a missing subcluster is taken to hold what it shows."""
    around = Pieces.around

    async def new_around(self: Pieces, *what: Any) -> Any:
        _, zeros = await around(self, *what)
        _, _, _, within, data = what
        return [(within, data)], zeros

    patch.setattr(Pieces, "around", new_around)


def bitmaps_not_logged(patch: Patch) -> None:
    """The redo log knows words only."""
    link = RedoLog.link

    def new_link(self: RedoLog, cluster: int, in_file: int, entry: int) -> bool:
        kept = in_file & ~WORD_MASK | entry & WORD_MASK
        return link(self, cluster, in_file, kept)

    patch.setattr(RedoLog, "link", new_link)


_SPLIT: Final = ("sub-backed", "sub-filled")


def data_file_not_flushed(patch: Patch) -> None:
    """Barriers leave out the external data file."""
    barrier = Committer.barrier

    async def new_barrier(self: Committer) -> None:
        data, self._data = self._data, None
        try:
            await barrier(self)
        finally:
            self._data = data

    patch.setattr(Committer, "barrier", new_barrier)


def data_file_not_filled(patch: Patch) -> None:
    """What lies in a data file beside a first write is taken for zeros."""
    old_shows = Allocator._old_shows

    def new_old_shows(self: Allocator, kind: int, cluster: int) -> bool:
        external, self._external = self._external, False
        try:
            return old_shows(self, kind, cluster)
        finally:
            self._external = external

    patch.setattr(Allocator, "_old_shows", new_old_shows)


def data_file_punched_in_use(patch: Patch) -> None:
    """A data file is punched though its clusters were written again."""

    async def clear(self: ExternalZeros, vacated: Any) -> None:
        for offset, length in vacated:
            await self._data.punch(offset, length)

    patch.setattr(ExternalZeros, "clear", clear)


_COPYING: Final = ("v3-backed", "v3-snapshot", "v3-compressed", "v3-data")


def encrypted_link_at_once(patch: Patch) -> None:
    """A first write to an encrypted image is linked before its cluster is durable."""
    change = Committer.change

    async def new_change(self: Committer, *words: Any, **how: Any) -> bool:
        return await change(self, *words, **{**how, "hold": False})

    patch.setattr(Committer, "change", new_change)


def encrypted_cluster_in_part(patch: Patch) -> None:
    """A first write to an encrypted image leaves the rest of the cluster as it was."""

    def old_shows(self: Allocator, kind: int, cluster: int) -> bool:
        return False

    patch.setattr(Allocator, "_old_shows", old_shows)


PLANTED: Final = {
    each.plant.__name__: each
    for each in (
        Planted(encrypted_link_at_once, ("v3-luks", "v1-aes")),
        Planted(encrypted_cluster_in_part, ("v3-luks", "v1-aes")),
        Planted(no_barrier_a, _COPYING),
        Planted(no_barrier_b, _COPYING),
        Planted(refcount_after_link, ("v3", "v2", "v3-512")),
        Planted(l1_before_l2, ("v3-512", "v3-512-refcount-1")),
        Planted(copied_table_not_durable, ("v3-snapshot", "v3-512-snapshot")),
        Planted(reuse_before_commit, ("v3-filled", "v3-compressed", "v1")),
        Planted(punch_before_commit, ("v3-filled", "v3-compressed")),
        Planted(no_pins, ("v3-filled", "v1", "v2"), live=True),
        Planted(early_acknowledgement, _COPYING, redo=False),
        Planted(copies_not_held, _COPYING),
        Planted(whole_sectors, _COPYING),
        Planted(dirty_tables_evicted, ("v3-512-snapshot",)),
        Planted(block_not_durable, ("v3-512-many-blocks",)),
        Planted(blocks_in_any_order, ("v3-512-many-blocks",)),
        Planted(block_entry_not_durable, ("v3-512-next-block",)),
        Planted(table_moved_too_early, ("v3-512-table-grows",)),
        Planted(flush_joins_a_running_commit, ("v3-filled", "v3-backed")),
        Planted(flush_does_not_wait, ("v3", "v1")),
        Planted(redo_dead_too_early, _COPYING),
        Planted(no_barrier_at_opening, ("v3", "v1", "v3-snapshot"), restart=True),
        Planted(reserved_length_not_durable, ("v3", "v2", "v1")),
        Planted(reserved_references_not_durable, ("v3", "v2")),
        Planted(data_file_not_flushed, ("v3-data", "v3-data-filled", "v3-data-raw")),
        Planted(data_file_not_filled, ("v3-data", "v3-data-512")),
        Planted(data_file_punched_in_use, ("v3-data-filled", "v3-data-512")),
        Planted(reused_without_zeroing, ("v3-filled", "v1")),
        Planted(bitmaps_not_flagged, _BITMAPS),
        Planted(bitmap_flags_not_durable, _BITMAPS),
        Planted(bitmaps_not_durable, _BITMAPS),
        Planted(bitmaps_without_marks, _BITMAPS),
        Planted(moved_beside_writers, ("v3-compacting",), live=True),
        Planted(moved_before_writers_ended, ("v3-compacting",), live=True),
        Planted(cut_before_commit, ("v3-compacting",)),
        Planted(block_moved_too_early, ("v3-512-compacting",)),
        Planted(added_subclusters_not_held, _SPLIT),
        Planted(subclusters_not_filled, _SPLIT),
        Planted(bitmaps_not_logged, _SPLIT),
    )
}
