"""Spell the answer to a request in the layout that was negotiated.

There are three: simple replies, structured reply chunks, and extended reply chunks
("Transmission" of doc/proto.md). A session takes one `Answers` for its life and need not
ask again which it is. Reads are not in here: their headers go around data that is
in its place already (`server/framing.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from nbdserve.wire.replies import (
    block_status_chunk,
    error_chunk,
    error_payload,
    extended_block_status_chunk,
    extended_chunk,
    simple_reply,
)

#: Lengths in bytes and status flags, in order.
Extents = Sequence[tuple[int, int]]


class Answers(ABC):
    """How the replies of a session look."""

    @abstractmethod
    def done(self, cookie: int, offset: int) -> bytes:
        """Return a whole reply that says success and nothing else.

        Args:
            cookie: Of the request.
            offset: Of the request.
        """

    @abstractmethod
    def error(self, cookie: int, offset: int, error: int, text: str) -> bytes:
        """Return a whole reply to a request that failed."""

    @abstractmethod
    def statuses(
        self, cookie: int, offset: int, statuses: Sequence[tuple[int, Extents]]
    ) -> bytes:
        """Return a whole reply to NBD_CMD_BLOCK_STATUS.

        Args:
            cookie: Of the request.
            offset: Of the request.
            statuses: Context ids and their extents; at least one of each.
        """


class SimpleAnswers(Answers):
    """Section "Simple reply message"."""

    def done(self, cookie: int, offset: int) -> bytes:
        """Return 16 bytes."""
        del offset
        return simple_reply(cookie)

    def error(self, cookie: int, offset: int, error: int, text: str) -> bytes:
        """Return 16 bytes: there is no room for a text."""
        del offset, text
        return simple_reply(cookie, error)

    def statuses(
        self, cookie: int, offset: int, statuses: Sequence[tuple[int, Extents]]
    ) -> bytes:
        """Never wanted: the judge refuses block status without structured replies."""
        raise TypeError("NBD_CMD_BLOCK_STATUS has no simple reply")


class StructuredAnswers(Answers):
    """Section "Structured reply chunk message"."""

    def done(self, cookie: int, offset: int) -> bytes:
        """Return a simple reply, which stays allowed for every command but READ."""
        del offset
        return simple_reply(cookie)

    def error(self, cookie: int, offset: int, error: int, text: str) -> bytes:
        """Return a chunk for every command: a read must, the others gain the text."""
        del offset
        return error_chunk(cookie, error, text)

    def statuses(
        self, cookie: int, offset: int, statuses: Sequence[tuple[int, Extents]]
    ) -> bytes:
        """Return a BLOCK_STATUS chunk for each context."""
        del offset
        last = len(statuses) - 1
        return b"".join(
            block_status_chunk(cookie, context_id, extents, done=number == last)
            for number, (context_id, extents) in enumerate(statuses)
        )


class ExtendedAnswers(Answers):
    """Section "Extended reply chunk message": each chunk tells the request's offset."""

    def done(self, cookie: int, offset: int) -> bytes:
        """Return a NONE chunk."""
        return extended_chunk(cookie, offset, 0, done=True)

    def error(self, cookie: int, offset: int, error: int, text: str) -> bytes:
        """Return an ERROR chunk."""
        kind, payload = error_payload(error, text)
        return extended_chunk(cookie, offset, kind, payload, done=True)

    def statuses(
        self, cookie: int, offset: int, statuses: Sequence[tuple[int, Extents]]
    ) -> bytes:
        """Return a BLOCK_STATUS_EXT chunk for each context."""
        last = len(statuses) - 1
        return b"".join(
            extended_block_status_chunk(
                cookie, offset, context_id, extents, done=number == last
            )
            for number, (context_id, extents) in enumerate(statuses)
        )


def answers(*, structured: bool, extended: bool) -> Answers:
    """Return how the replies of a session look, by what was negotiated."""
    if extended:
        return ExtendedAnswers()
    return StructuredAnswers() if structured else SimpleAnswers()
