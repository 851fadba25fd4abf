"""Bytes that a disk lends instead of copying them, and places that it has for new ones.

A large read whose bytes are all in the page cache need not pass through this process:
sendfile(2) lets the socket refer to the pages themselves. Until the peer has taken them, what
is written to those pages is what the peer gets. So whoever lends promises that nothing but
newer bytes of the same guest range is written to a place before the page cache has
forgotten its pages (`Storage.recall`), which it does not while anybody refers to them.

The other way round, a large write that replaces bytes in place need not pass either:
splice(2) brings it from the socket to a `Piece` of the file. Nobody keeps such a place:
it is used in the moment in which it is told.
"""

from nbdserve.storage.base import Storage

#: Where bytes are: the storage, an offset there, and a length, both in bytes.
Piece = tuple[Storage, int, int]
