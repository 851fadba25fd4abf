"""What a guest did, and which values that allows in each sector after a crash.

A request is strong once it has succeeded: it supersedes, in its sectors, every request that
ended before it began. A power cut may undo it until a flush that began later has been
acknowledged (or its own acknowledgement, with FUA); a killed server may undo nothing that
was acknowledged. What failed may have happened or not, until something later supersedes it.
"""

from dataclasses import dataclass, field

from tests.crash.disk import SECTOR, ZERO_SECTOR

Values = dict[int, bytes]


@dataclass(slots=True)
class Request:
    """One request of the guest.

    Attributes:
        kind: write, zero, trim or flush.
        values: Sector number -> what it reads as afterwards.
        fua: Whether its acknowledgement makes it durable.
        firm: Whether `values` are certain once it has succeeded (a trim's are not).
        partial: Sectors that it covers in part.
        text: For messages.
    """

    kind: str
    values: Values
    fua: bool = False
    firm: bool = True
    partial: list[int] = field(default_factory=list)
    text: str = ""


@dataclass(slots=True)
class _Value:
    request: int
    value: bytes
    begin: int
    end: int | None = None
    strong: bool = False


@dataclass(slots=True)
class Allowed:
    """The values each sector may have, as the events of a run go by.

    Attributes:
        content: Sector contents as they were before, for sectors never touched.
        requests: All requests, by number.
        kept_by_flush: Whether only flushes and FUA make requests safe (a power cut), or
            every acknowledgement does (a killed server, or a look at the live image).
        epoch: Changes whenever fewer values than before may be allowed.
    """

    content: bytes
    requests: list[Request]
    kept_by_flush: bool
    epoch: int = 0
    _values: dict[int, list[_Value]] = field(default_factory=dict)
    _begun: dict[int, int] = field(default_factory=dict)

    def began(self, number: int, now: int) -> None:
        """A request began."""
        self._begun[number] = now
        for sector, value in self.requests[number].values.items():
            known = self._values.get(sector)
            if known is None:
                first = self.content[sector * SECTOR : (sector + 1) * SECTOR]
                known = [_Value(-1, first.ljust(SECTOR, b"\0"), -1, -1, strong=True)]
                self._values[sector] = known
            known.append(_Value(number, value, now))

    def ended(self, number: int, now: int, *, succeeded: bool) -> None:
        """A request was answered."""
        request = self.requests[number]
        for sector in request.values:
            for value in self._values[sector]:
                if value.request == number:
                    value.end = now
                    value.strong = succeeded and request.firm
        if not succeeded:
            return
        if request.kind == "flush":
            if self.kept_by_flush:
                self._flushed(self._begun[number])
        elif request.fua or not self.kept_by_flush:
            for sector in request.values:
                self._supersede(sector, self._begun[number])
            self.epoch += 1

    def _flushed(self, begin: int) -> None:
        for sector, known in self._values.items():
            safe = [
                value.begin
                for value in known
                if value.strong and value.end is not None and value.end < begin
            ]
            if safe:
                self._supersede(sector, max(safe))
        self.epoch += 1

    def _supersede(self, sector: int, begin: int) -> None:
        """Drop what had ended when a safe request began, unless that is the safe one."""
        known = self._values[sector]
        if any(value.begin == begin and not value.strong for value in known):
            return
        self._values[sector] = [
            value for value in known if value.end is None or value.end >= begin
        ]

    def sectors(self) -> dict[int, set[bytes]]:
        """Return the allowed values of each sector that was ever touched."""
        return {
            sector: {value.value for value in known}
            for sector, known in self._values.items()
        }

    def explain(self, sector: int, found: bytes) -> str:
        """Say what a sector should be and what it is."""
        allowed = [
            f"#{value.request} [{value.begin}, {value.end}] {shown(value.value)}"
            for value in self._values.get(sector, [])
        ]
        return f"sector {sector} is {shown(found)}, allowed: {allowed or 'unchanged'}"


def shown(value: bytes) -> str:
    """Return the beginning of a sector, readable."""
    if value == ZERO_SECTOR:
        return "zeros"
    return repr(value[:24])


def stamp(number: int, sector: int) -> bytes:
    """Return a sector that says who wrote it, and where."""
    return (b"%d@%d;" % (number, sector) * 128)[:SECTOR]


class MismatchError(Exception):
    """A sector has a value that nothing allows."""


def compare(
    found: bytes | bytearray, content: bytes, allowed: dict[int, set[bytes]]
) -> int | None:
    """Return the first sector with a value that is not allowed, None if all are."""
    position = 0
    for sector in sorted(allowed):
        start = sector * SECTOR
        if found[position:start] != content[position:start]:
            return _first_difference(found, content, position, start)
        if (
            bytes(found[start : start + SECTOR]).ljust(SECTOR, b"\0")
            not in allowed[sector]
        ):
            return sector
        position = start + SECTOR
    if found[position:] != content[position:]:
        return _first_difference(found, content, position, len(content))
    return None


def _first_difference(
    found: bytes | bytearray, content: bytes, start: int, end: int
) -> int:
    for offset in range(start, end, SECTOR):
        if found[offset : offset + SECTOR] != content[offset : offset + SECTOR]:
            return offset // SECTOR
    return start // SECTOR
