"""What a power cut may leave of a recorded run.

Between two barriers each sector may end as any version that it had since the last
barrier covered it, and so may the file's length; all of them independently. That is more
than any file system does, which keeps the order of its metadata at least.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.crash.disk import (
    EXTERNAL,
    SECTOR,
    ZERO_SECTOR,
    Applied,
    Ended,
    Event,
    Files,
    Sized,
    Synced,
    SyncedRange,
)

#: Stands for the file's length where others are sector numbers.
LENGTH = -1
#: The same for the external data file.
EXTERNAL_LENGTH = -2


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


def _is_external(place: int) -> bool:
    """Return whether a place is in the external data file."""
    return place >= EXTERNAL or place == EXTERNAL_LENGTH


def _offset(place: int) -> int:
    """Return where a sector begins in its file."""
    return (place - EXTERNAL if place >= EXTERNAL else place) * SECTOR


def _digest(place: int, value: bytes | int) -> int:
    return 0 if value == ZERO_SECTOR else hash((place, value))


@dataclass(slots=True)
class _Version:
    call: int
    value: bytes | int


@dataclass(slots=True)
class Cache:
    """The page cache and the disk below it, as the events of a run go by."""

    base: Files
    _pending: dict[int, list[_Version]] = field(default_factory=dict)
    _ended: dict[int, int] = field(default_factory=dict)
    _sizes: dict[int, int] = field(default_factory=dict)
    _key: int = 0

    def __post_init__(self) -> None:
        for place, content in self._contents():
            self._sizes[place] = len(content)
            content.extend(bytes(-len(content) % SECTOR))
            self._key ^= _digest(place, self._sizes[place])
            first = EXTERNAL if place == EXTERNAL_LENGTH else 0
            for sector in range(first, first + len(content) // SECTOR):
                self._key ^= _digest(sector, self._on_disk(sector))

    def _contents(self) -> list[tuple[int, bytearray]]:
        """Return each file and the place that stands for its length."""
        found: list[tuple[int, bytearray]] = [(LENGTH, self.base)]
        if self.base.external is not None:
            found.append((EXTERNAL_LENGTH, self.base.external))
        return found

    def _content(self, place: int) -> bytearray:
        """Return the file that a place is in."""
        external = self.base.external
        return external if _is_external(place) and external is not None else self.base

    def _on_disk(self, place: int) -> bytes | int:
        if place < 0:
            return self._sizes[place]
        start = _offset(place)
        found = bytes(self._content(place)[start : start + SECTOR])
        return found or ZERO_SECTOR

    def take(self, event: Event, now: int) -> list[int]:
        """Follow one event; return the places that have a new version."""
        if isinstance(event, Applied):
            for sector, value in event.sectors.items():
                self._pending.setdefault(sector, []).append(_Version(event.call, value))
            return list(event.sectors)
        if isinstance(event, Sized):
            place = EXTERNAL_LENGTH if event.external else LENGTH
            self._pending.setdefault(place, []).append(_Version(event.call, event.size))
            return [place]
        if isinstance(event, Ended):
            self._ended[event.call] = now
        elif isinstance(event, Synced):
            self._sync(event)
        elif isinstance(event, SyncedRange):
            for sector in range(event.offset // SECTOR, (event.end - 1) // SECTOR + 1):
                self._settle(sector, self._covered(sector, event.begin))
            if self._sizes[LENGTH] < event.end:
                self._settle_length(event)
        return []

    def _sync(self, event: Synced) -> None:
        for place in list(self._pending):
            if _is_external(place) == event.external:
                self._settle(place, self._covered(place, event.begin))

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
            self._sizes[place] = value
            return
        content, start = self._content(place), _offset(place)
        if start + SECTOR > len(content):
            content.extend(bytes(start + SECTOR - len(content)))
        content[start : start + SECTOR] = value

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
        key, sizes = self._key, self._sizes_of(choice)
        for place, count in choice.items():
            end = sizes[EXTERNAL_LENGTH if _is_external(place) else LENGTH]
            # what lies past the end makes no difference
            if count and (place < 0 or _offset(place) < end):
                value = self._pending[place][count - 1].value
                key ^= _digest(place, self._on_disk(place)) ^ _digest(place, value)
        return key

    def _sizes_of(self, choice: dict[int, int]) -> dict[int, int]:
        """Return the lengths of the files of a choice."""
        return {
            place: int(self._pending[place][choice[place] - 1].value)
            if choice.get(place)
            else size
            for place, size in self._sizes.items()
        }

    def build(self, choice: dict[int, int]) -> Files:
        """Return the files of a choice."""
        files = Files.of(self.base)
        for place, count in choice.items():
            if not count or place < 0:
                continue
            external = files.external if _is_external(place) else None
            content = files if external is None else external
            value, start = self._pending[place][count - 1].value, _offset(place)
            if start + SECTOR > len(content):
                content.extend(bytes(start + SECTOR - len(content)))
            if isinstance(value, bytes):
                content[start : start + SECTOR] = value
        sizes = self._sizes_of(choice)
        _set_length(files, sizes[LENGTH])
        if files.external is not None:
            _set_length(files.external, sizes[EXTERNAL_LENGTH])
        return files

    def story(self, choice: dict[int, int]) -> str:
        """Describe a choice."""
        parts = [
            f"{_shown(place)}:{choice.get(place, 0)}/{len(versions)}"
            for place, versions in sorted(self._pending.items())
        ]
        return " ".join(parts)


def _set_length(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


def _shown(place: int) -> str:
    kind = "data " if _is_external(place) else ""
    return kind + ("length" if place < 0 else str(_offset(place) // SECTOR))
