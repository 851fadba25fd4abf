"""When a changed table word may be in the file: epochs, barriers, acknowledgements.

A word that may be there at once is *published*: written before the request is
acknowledged, so that killing the server loses nothing. A word that must not be
durable before its data (or before a refcount) is *held*: it waits for the next commit.

One commit at a time; flushes that arrive meanwhile share the next one.

    freeze   held words and freed clusters of this epoch are set aside
    A        barrier: data, new tables and refcounts are durable  (if words are held)
    B        the held words are written; barrier; flushes are acknowledged
    C        later: the freed clusters lose their reference and can be used again

Killing the server between a held word's acknowledgement and its commit is what
the redo log (`redo.py`) is for. Without one, such a write waits for its commit.
"""

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Mapping
from errno import EIO
from typing import TYPE_CHECKING, Final

from nbdserve.errors import ImageCorruptError
from nbdserve.formats.mapped.entries import (
    BITMAP_SHIFT,
    COMPRESSED,
    OWNED,
    SPLIT_OWNED,
    SPLIT_UNPUBLISHED,
    UNPUBLISHED,
)
from nbdserve.formats.mapped.tables import Table, encode_entries, encode_words
from nbdserve.formats.mapped.waits import Pins
from nbdserve.storage.base import Storage

if TYPE_CHECKING:
    from nbdserve.formats.mapped.redo import Redo

#: A held word: its table and its index there.
Key = tuple[Table, int]
#: Space that lost a reference: host offset and length in bytes.
Freed = tuple[int, int]


#: What a cluster of our own is as long as its link is only in memory, and back.
_UNPUBLISHED: Final = {OWNED: UNPUBLISHED, SPLIT_OWNED: SPLIT_UNPUBLISHED}
_PUBLISHED: Final = {UNPUBLISHED: OWNED, SPLIT_UNPUBLISHED: SPLIT_OWNED}

#: Words written between two looks at the event loop: about 0.2 ms.
_WRITES_PER_TURN: Final = 128


#: Held words that start a commit before its time: each takes 200 bytes of memory.
_MOST_HELD: Final = 1 << 16
#: Held words beyond which another one waits for a commit.
_WAIT_HELD: Final = 1 << 18
#: Bytes that an entry takes in memory, with its kind.
_ENTRY_BYTES: Final = 9


class Committer:
    """Publishes, holds and commits the words of one image.

    Attributes:
        dirty: Whether something was written since the last commit began. Writers
            of data set it when their write has completed.
        writethrough: Whether every change is to be durable before it is acknowledged.
        redo: The redo log, None if there is no place for one. It may come later.
        refusal: Why no more changes are taken, while flushes still are.
        failed: The error of a barrier that failed. From then on nothing is
            acknowledged: nobody knows what is durable (fsync reports an error once).
    """

    def __init__(
        self,
        storage: Storage,
        pins: Pins,
        *,
        interval_s: float,
        writethrough: bool,
        table_bytes: int = 32 << 20,
        data: Storage | None = None,
    ) -> None:
        """Begin with nothing to commit.

        Args:
            storage: The image's file.
            pins: Input and output under way.
            interval_s: How long a held word waits for a flush.
            writethrough: See the class.
            table_bytes: Memory for tables, which those with held words can't leave:
                half of it starts a commit, and twice of it makes writers wait for one.
            data: The file that guest data lie in, if that is another one.
        """
        self.writethrough = writethrough
        self.dirty = False
        self.redo: Redo | None = None
        self.failed: OSError | None = None
        self.refusal: str | None = None
        self._storage = storage
        self._data = data
        self._pins = pins
        self._interval_s = interval_s
        self._held: dict[Key, int | None] = {}
        # words held without a record so far, and how many of them commits have written
        self._exposures = self._covered = 0
        self._committing: dict[Key, int | None] = {}
        self._commit_ended: list[asyncio.Future[None]] = []
        self._table_bytes = table_bytes
        self._pinned_bytes = 0
        self._freed: list[Freed] = []
        # why the clusters freed by the last commit could not be given back, if so
        self._owed: OSError | None = None
        self._mark: Callable[[], Awaitable[None]] | None = None
        self._release: Callable[[list[Freed]], Awaitable[None]] | None = None
        self._vacated: list[Freed] = []
        self._clear: Callable[[list[Freed]], Awaitable[None]] | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._running: asyncio.Task[None] | None = None
        self._releasing: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def on_release(self, release: Callable[[list[Freed]], Awaitable[None]]) -> None:
        """Name the coroutine that takes freed clusters once nobody knows them."""
        self._release = release

    def on_vacated(self, clear: Callable[[list[Freed]], Awaitable[None]]) -> None:
        """Name the coroutine that takes guest ranges without data of their own."""
        self._clear = clear

    def on_damage(self, mark: Callable[[], Awaitable[None]]) -> None:
        """Name the coroutine that notes in the file that the image is damaged."""
        self._mark = mark

    def damage(self) -> None:
        """Take no more changes: metadata were found to contradict themselves.

        Without somebody to note it in the file (the format has no place for that), it is
        the one request that fails.
        """
        if self._mark is None or self.refusal is not None:
            return
        self.refusal = "its metadata contradict themselves"
        task = asyncio.get_running_loop().create_task(self._note_damage(self._mark))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def _note_damage(self, mark: Callable[[], Awaitable[None]]) -> None:
        try:
            await mark()
        except OSError as error:
            self.failed = error

    def check(self) -> None:
        """Refuse to go on after a failed barrier.

        Raises:
            OSError: EIO.
        """
        if self.failed is not None:
            raise OSError(
                EIO,
                f"{self._storage.name}: an earlier sync failed ({self.failed}); "
                "nothing more is written until the image is opened anew",
            )

    def check_writable(self) -> None:
        """Refuse a change after a failed barrier, or if the image is damaged.

        Raises:
            OSError: EIO.
            ImageCorruptError: Its metadata contradict themselves.
        """
        self.check()
        if self.refusal is not None:
            raise ImageCorruptError(
                f"{self._storage.name}: {self.refusal}; nothing more is written until "
                "it is repaired"
            )

    async def barrier(self) -> None:
        """Make everything durable that was written before."""
        self.check()
        try:
            if self._data is not None:
                # first: metadata never are more durable than what they name
                await self._data.flush()
            await self._storage.flush()
        except OSError as error:
            self.failed = error
            raise
        # Of two that overlap, one may have taken the error of both.
        self.check()

    async def barrier_of(self, offset: int, length: int) -> None:
        """Make a range of the file durable, and its length as far as the range's end."""
        self.check()
        try:
            await self._storage.flush_range(offset, length)
        except OSError as error:
            self.failed = error
            raise
        self.check()

    # -- words

    async def change(
        self,
        table: Table,
        index: int,
        words: "array[int]",
        kind: int,
        *,
        hold: bool,
        bitmaps: "array[int] | None" = None,
    ) -> bool:
        """Make `words` the entries from `index` on, in the file and then in memory.

        Args:
            table: What to change.
            index: The first entry.
            words: Their new values.
            kind: What all of them are now (`entries.py`).
            hold: Whether they must wait for the barrier of the next commit.
            bitmaps: The other half of each of them in a table of extended entries, None
                for zeros. It lies in the same sector as its word, so that one is
                durable if the other is.

        Returns:
            Whether the change survives a killed server, so that it may be
            acknowledged; otherwise the request must wait for `flush` as well.

        Raises:
            OSError: Memory is unchanged; the file may hold the new words, so the
                old ones are written again by the next commit. Whatever the
                new words name must go through `free`.
        """
        count = len(words)
        while self._committing and self._meets(self._committing, table, index, count):
            # a commit is about to write these: the last one has to win
            waiter = asyncio.get_running_loop().create_future()
            self._commit_ended.append(waiter)
            await waiter
        if hold and self._is_crowded(table):
            await self._make_room(table)
            return await self.change(
                table, index, words, kind, hold=True, bitmaps=bitmaps
            )
        if hold or (self._held and self._meets(self._held, table, index, count)):
            return self._hold(table, index, words, kind, bitmaps)
        if table.bitmaps is None:
            offset = table.host_offset + 8 * index
            data = encode_words(words)
        else:
            offset = table.place(index)
            bitmaps = bitmaps or array("Q", bytes(8 * count))
            data = encode_entries(words, bitmaps)
        try:
            await self._storage.put(offset, data)
        except BaseException:
            for position in range(index, index + count):
                # What is written there now may not be what the file names.
                known = table.kinds[position]
                table.kinds[position] = _UNPUBLISHED.get(known, known)
                self._keep(table, position, None)
            self._exposures += 1
            raise
        self.dirty = True
        table.words[index : index + count] = words
        if table.bitmaps is not None and bitmaps is not None:
            table.bitmaps[index : index + count] = bitmaps
        table.kinds[index : index + count] = bytes((kind,)) * count
        return True

    def _is_crowded(self, table: Table) -> bool:
        """Return whether another held word would take more memory than there is."""
        if len(self._held) >= _WAIT_HELD:
            return True
        return not table.held and self._pinned_bytes > 2 * self._table_bytes

    async def _make_room(self, table: Table) -> None:
        """Commit until there is room for a held word.

        Raises:
            OSError: It can't be made.
        """
        while self._is_crowded(table):
            await self.flush()

    @property
    def exposed(self) -> bool:
        """Whether killing the server now would bring back words of before.

        Who finds that there is nothing to do must not say so before the next commit.
        """
        return self._exposures != self._covered

    def holds(self, table: Table, index: int) -> bool:
        """Return whether the file may say something else than this word."""
        return (table, index) in self._held or (table, index) in self._committing

    @staticmethod
    def _meets(
        keys: Mapping[Key, object], table: Table, index: int, count: int
    ) -> bool:
        return any(
            (table, position) in keys for position in range(index, index + count)
        )

    def _hold(
        self,
        table: Table,
        index: int,
        words: "array[int]",
        kind: int,
        bitmaps: "array[int] | None" = None,
    ) -> bool:
        """Change words in memory only, with a record in the redo log for each."""
        survives = True
        for position, word in enumerate(words, index):
            # what the file says as long as the word is held; None if nobody knows
            in_file = self._held.get((table, position), table.entry(position))
            entry = word
            if table.bitmaps is not None:
                bitmap = bitmaps[position - index] if bitmaps is not None else 0
                entry |= bitmap << BITMAP_SHIFT
                table.bitmaps[position] = bitmap
            logged = (
                self.redo is not None
                # moved by compaction: the word of before says the same
                and kind != COMPRESSED
                and in_file is not None
                and self.redo.link(
                    table.number * len(table.words) + position,
                    in_file,
                    entry,
                )
            )
            survives &= logged
            table.words[position] = word
            table.kinds[position] = kind if logged else _UNPUBLISHED.get(kind, kind)
            self._keep(table, position, in_file)
        if not survives:
            self._exposures += 1
        return survives

    def _keep(self, table: Table, index: int, in_file: int | None) -> None:
        """Let the next commit write a word."""
        key = (table, index)
        if key not in self._held:
            table.users += 1
            if not table.held and table.number >= 0:
                self._pinned_bytes += len(table.words) * _ENTRY_BYTES
            table.held += 1
        self._held[key] = in_file
        self.dirty = True
        self._schedule()
        many = len(self._held) >= _MOST_HELD
        if many or self._pinned_bytes > self._table_bytes // 2:
            self._start()

    def _let_go(self, table: Table) -> None:
        """One held word of a table is in the file."""
        table.users -= 1
        table.held -= 1
        if not table.held and table.number >= 0:
            self._pinned_bytes -= len(table.words) * _ENTRY_BYTES

    def free(self, host_offset: int, length: int) -> None:
        """Take a reference from clusters that no entry names any more.

        They are used again only after a commit that begins from now on has ended,
        and after all input and output that may still name them.
        """
        self._freed.append((host_offset, length))
        self.dirty = True
        self._schedule()

    def vacate(self, guest_offset: int, length: int) -> None:
        """Give back a range of the data file when nothing durable names it any more.

        What is written there meanwhile is not for this class to know: a cluster of an
        external data file has its place for ever, and may be in use again.
        """
        self._vacated.append((guest_offset, length))
        self.dirty = True
        self._schedule()

    # -- commits

    async def flush(self) -> None:
        """Return when everything that completed before this call is durable."""
        self.check()
        if not self.dirty and self._running is None:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._start()
        await waiter
        self.check()

    def _schedule(self) -> None:
        if self._timer is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._interval_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        if self.failed is None and (self._held or self._freed or self._vacated):
            self._start()

    def _start(self) -> None:
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        """Commit until nobody waits for another one."""
        try:
            while True:
                waiters, self._waiters = self._waiters, []
                failure: BaseException | None = None
                try:
                    await self._commit()
                except BaseException as error:  # noqa: BLE001 - every waiter gets it
                    failure = error
                for waiter in waiters:
                    if waiter.done():
                        continue
                    if failure is None:
                        waiter.set_result(None)
                    else:
                        waiter.set_exception(failure)
                if failure is not None and not isinstance(failure, OSError):
                    raise failure
                if not self._waiters:
                    break
        finally:
            self._running = None
        if self.failed is None and (self._held or self._freed or self._vacated):
            self._schedule()

    async def _commit(self) -> None:
        self.check()
        if not self.dirty:
            return
        # The freeze: from here to the next await nothing else runs.
        self.dirty = False
        held, self._held = self._held, {}
        exposures = self._exposures
        self._committing = held
        words = {key: key[0].entry(key[1]) for key in held}
        freed, self._freed = self._freed, []
        vacated, self._vacated = self._vacated, []
        sequence = self.redo.sequence if self.redo is not None else 0
        done = False
        try:
            if words:
                await self.barrier()
                await self._write_words(words)
            await self.barrier()
            done = True
            self._covered = exposures
        finally:
            self._committing = {}
            if not done:
                self.dirty = True
                # some of them may be in the file now
                for key in held:
                    if key in self._held:
                        # held again meanwhile, and counted twice
                        self._let_go(key[0])
                    self._held[key] = None
                self._freed = freed + self._freed
                self._vacated = vacated + self._vacated
            ended, self._commit_ended = self._commit_ended, []
            for waiter in ended:
                if not waiter.done():
                    waiter.set_result(None)
        for table, index in held:
            self._let_go(table)
            kind = table.kinds[index]
            table.kinds[index] = _PUBLISHED.get(kind, kind)
        if self.redo is not None:
            self.redo.committed(sequence)
        if freed or vacated:
            task = asyncio.get_running_loop().create_task(
                self._give_back(freed, vacated)
            )
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def _write_words(self, words: dict[Key, int]) -> None:
        """Step B: write the words, neighbours in one call."""
        ordered = sorted(words, key=lambda key: (key[0].host_offset, key[1]))
        position = writes = 0
        while position < len(ordered):
            table, first = ordered[position]
            values: list[int] = []
            while position < len(ordered) and ordered[position] == (
                table,
                first + len(values),
            ):
                values.append(words[ordered[position]])
                position += 1
            await self._storage.put(table.place(first), table.encode(values))
            writes += 1
            if not writes % _WRITES_PER_TURN:
                await asyncio.sleep(0)

    async def _give_back(self, freed: list[Freed], vacated: list[Freed]) -> None:
        """Step C: hand freed clusters on once no input or output names them."""
        await self._pins.drained()
        if self.failed is not None:
            return
        try:
            if self._release is not None and freed:
                await self._release(freed)
                freed = []
            if self._clear is not None and vacated:
                await self._clear(vacated)
        except OSError as error:
            # None of them was given back: they are freed by the next commit as well.
            self._owed = error
            self._freed = freed + self._freed
            self._vacated = vacated + self._vacated
            self.dirty = True
            self._schedule()
        except ImageCorruptError:
            # Their refcounts can't be changed: they are leaked, which harms nobody.
            self.damage()
        else:
            self._owed = None

    async def settle(self) -> None:
        """Commit, and wait for step C of every epoch: then the file is what memory says.

        What can't be given back is a leak, and no reason to stop.

        Raises:
            OSError: Something could not be made durable.
        """
        await self.flush()
        while self._releasing:
            await asyncio.wait(self._releasing)

    async def released(self) -> None:
        """Wait for step C of the epochs that have ended so far."""
        if self._releasing:
            await asyncio.wait(set(self._releasing))

    async def close(self) -> None:
        """Commit what is left and wait for step C of every epoch.

        Raises:
            OSError: Something could not be made durable, or is leaked.
        """
        # Even if this fails: the storage will be closed, so nothing is tried again.
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        await self.settle()
        if self._owed is not None and self._freed:
            raise self._owed
