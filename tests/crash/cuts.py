"""What a power cut may leave of a recorded run.

Between two barriers each sector may end as any version that it had since the last
barrier covered it, and so may the file's length; all of them independently. That is more
than any file system does, which keeps the order of its metadata at least.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.crash.disk import (
    SECTOR,
    ZERO_SECTOR,
    Applied,
    Ended,
    Event,
    Sized,
    Synced,
    SyncedRange,
)

#: Stands for the file's length where others are sector numbers.
LENGTH = -1


@dataclass(frozen=True, slots=True)
class State:
    """One file that a cut may leave.

    Attributes:
        content: The file.
        key: Equal for equal files (with overwhelming probability).
        story: Which versions it has, for messages.
    """

    content: bytearray
    key: int
    story: str


def _digest(place: int, value: bytes | int) -> int:
    return 0 if value == ZERO_SECTOR else hash((place, value))


@dataclass(slots=True)
class _Version:
    call: int
    value: bytes | int


@dataclass(slots=True)
class Cache:
    """The page cache and the disk below it, as the events of a run go by."""

    base: bytearray
    _pending: dict[int, list[_Version]] = field(default_factory=dict)
    _ended: dict[int, int] = field(default_factory=dict)
    _size: int = 0
    _key: int = 0

    def __post_init__(self) -> None:
        self._size = len(self.base)
        self.base.extend(bytes(-len(self.base) % SECTOR))
        self._key = _digest(LENGTH, self._size)
        for sector in range(len(self.base) // SECTOR):
            self._key ^= _digest(sector, self._on_disk(sector))

    def _on_disk(self, place: int) -> bytes | int:
        if place == LENGTH:
            return self._size
        found = bytes(self.base[place * SECTOR : (place + 1) * SECTOR])
        return found or ZERO_SECTOR

    def take(self, event: Event, now: int) -> list[int]:
        """Follow one event; return the places that have a new version."""
        if isinstance(event, Applied):
            for sector, value in event.sectors.items():
                self._pending.setdefault(sector, []).append(_Version(event.call, value))
            return list(event.sectors)
        if isinstance(event, Sized):
            self._pending.setdefault(LENGTH, []).append(
                _Version(event.call, event.size)
            )
            return [LENGTH]
        if isinstance(event, Ended):
            self._ended[event.call] = now
        elif isinstance(event, Synced):
            self._sync(event.begin)
        elif isinstance(event, SyncedRange):
            for sector in range(event.offset // SECTOR, (event.end - 1) // SECTOR + 1):
                self._settle(sector, self._covered(sector, event.begin))
            if self._size < event.end:
                self._settle_length(event)
        return []

    def _sync(self, begin: int) -> None:
        for place in list(self._pending):
            self._settle(place, self._covered(place, begin))

    def _covered(self, place: int, begin: int) -> int:
        """Return how many versions of a place a barrier that began then covers."""
        covered = 0
        for position, version in enumerate(self._pending.get(place, ()), 1):
            if self._ended.get(version.call, begin) < begin:
                covered = position
        return covered

    def _settle(self, place: int, covered: int) -> None:
        """Make the first `covered` versions of a place durable, that is the last of them."""
        if not covered:
            return
        versions = self._pending[place]
        self._put(place, versions[covered - 1].value)
        if covered == len(versions):
            del self._pending[place]
        else:
            del versions[:covered]

    def _settle_length(self, event: SyncedRange) -> None:
        """Make durable that the file has what is in the range, and no more than that."""
        versions = self._pending[LENGTH][: self._covered(LENGTH, event.begin)]
        for position, version in enumerate(versions, 1):
            if int(version.value) >= event.end:
                self._settle(LENGTH, position)
                return

    def _put(self, place: int, value: bytes | int) -> None:
        self._key ^= _digest(place, self._on_disk(place)) ^ _digest(place, value)
        if isinstance(value, int):
            self._size = value
            return
        start = place * SECTOR
        if start + SECTOR > len(self.base):
            self.base.extend(bytes(start + SECTOR - len(self.base)))
        self.base[start : start + SECTOR] = value

    # -- states

    def choices(
        self, fresh: list[int], most: int, chance: random.Random
    ) -> Iterator[dict[int, int]]:
        """Choose what survives: place -> how many of its versions, 0 for none.

        Args:
            fresh: Places of which the last version is new: only choices with at least
                one of these are new. Empty: all choices.
            most: About how many choices, unless there are fewer.
            chance: For the random ones.
        """
        sizes = {place: len(versions) for place, versions in self._pending.items()}
        total = 1
        for count in sizes.values():
            total *= count + 1
            if total > most:
                break
        if total <= most:
            yield from self._all(sizes, fresh)
            return
        yield dict(sizes)
        if not fresh:
            yield {}
        calls = self.calls()
        last = {self._pending[place][-1].call for place in fresh}
        others = [call for call in calls if call not in last]
        if 1 << len(others) <= most // 2:
            for mask in range(1 << len(others)):
                kept = {c for bit, c in enumerate(others) if mask >> bit & 1}
                yield self._of_calls(kept | last)
        else:
            yield from self._structured(calls, last)
        yield from self._random(sizes, fresh, calls, last, most, chance)

    @staticmethod
    def _all(sizes: dict[int, int], fresh: list[int]) -> Iterator[dict[int, int]]:
        places = list(sizes)
        choice = dict.fromkeys(places, 0)
        while True:
            if not fresh or any(choice[place] == sizes[place] for place in fresh):
                yield dict(choice)
            for place in places:
                if choice[place] < sizes[place]:
                    choice[place] += 1
                    break
                choice[place] = 0
            else:
                return

    def _of_calls(self, kept: set[int]) -> dict[int, int]:
        choice = {}
        for place, versions in self._pending.items():
            choice[place] = max(
                (n for n, version in enumerate(versions, 1) if version.call in kept),
                default=0,
            )
        return choice

    def _structured(self, calls: list[int], last: set[int]) -> Iterator[dict[int, int]]:
        """All prefixes, single drops and single keeps."""
        for position, call in enumerate(calls):
            yield self._of_calls(set(calls[:position]) | last)
            yield self._of_calls(set(calls) - {call} | last)
            yield self._of_calls({call} | last)

    def _random(
        self,
        sizes: dict[int, int],
        fresh: list[int],
        calls: list[int],
        last: set[int],
        most: int,
        chance: random.Random,
    ) -> Iterator[dict[int, int]]:
        for _ in range(most // 2):
            share = chance.choice((0.1, 0.3, 0.5, 0.7, 0.9))
            kept = {call for call in calls if chance.random() < share}
            choice = self._of_calls(kept | (last if chance.random() < 0.7 else set()))
            if chance.random() < 0.6:
                # torn: single sectors of it got another version
                for place in choice:
                    if chance.random() < 0.3:
                        choice[place] = chance.randrange(sizes[place] + 1)
            if fresh and not any(choice[place] == sizes[place] for place in fresh):
                place = chance.choice(fresh)
                choice[place] = sizes[place]
            yield choice

    def newest(self) -> dict[int, int]:
        """Return the choice that is the page cache itself."""
        return {place: len(versions) for place, versions in self._pending.items()}

    def calls(self) -> list[int]:
        """Return the calls of which something may be lost."""
        return sorted(
            {
                version.call
                for versions in self._pending.values()
                for version in versions
            }
        )

    def key(self, choice: dict[int, int]) -> int:
        """Return the key of a choice's file, without building it."""
        key, size = self._key, self._size
        if choice.get(LENGTH):
            last = self._pending[LENGTH][choice[LENGTH] - 1].value
            size = last if isinstance(last, int) else size
        for place, count in choice.items():
            # what lies past the end makes no difference
            if count and place * SECTOR < size:
                value = self._pending[place][count - 1].value
                key ^= _digest(place, self._on_disk(place)) ^ _digest(place, value)
        return key

    def build(self, choice: dict[int, int]) -> bytearray:
        """Return the file of a choice."""
        content = bytearray(self.base)
        size = self._size
        for place, count in choice.items():
            if not count:
                continue
            value = self._pending[place][count - 1].value
            if isinstance(value, int):
                size = value
                continue
            start = place * SECTOR
            if start + SECTOR > len(content):
                content.extend(bytes(start + SECTOR - len(content)))
            content[start : start + SECTOR] = value
        del content[size:]
        content.extend(bytes(size - len(content)))
        return content

    def story(self, choice: dict[int, int]) -> str:
        """Describe a choice."""
        parts = [
            f"{'length' if place == LENGTH else place}:{choice.get(place, 0)}/{len(versions)}"
            for place, versions in sorted(self._pending.items())
        ]
        return " ".join(parts)
