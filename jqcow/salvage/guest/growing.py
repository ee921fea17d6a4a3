"""How files grew, by the copies of their inodes that a file system's journal keeps.

Each copy has the size that the file had by then. So what lies between two sizes was written between the two
copies, and what files that grew in turns have is known to the turn.

GR1. So many copies are remembered at most, however long the journal is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from jqcow.salvage.evidence import FilePiece

COPIES_MAX = 1 << 16


@dataclass
class _Growth:
    """Sizes that a file had, rising, and when it had them first, in nanoseconds."""

    sizes: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)


class Growths:
    """Tells when the parts of files were written."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._growths: dict[int, _Growth] = {}
        self._last, self._left = 0, COPIES_MAX

    def add(self, number: int, size: int, changed_ns: int) -> None:
        """Take a copy of an inode, in the order of the journal, which counts more than the time in it."""
        self._last = max(self._last + 1, changed_ns)
        growth = self._growths.setdefault(number, _Growth())
        while growth.sizes and growth.sizes[-1] > size:
            growth.sizes.pop()
            growth.times.pop()
        if (growth.sizes and growth.sizes[-1] == size) or not self._left:
            return
        growth.sizes.append(size)
        growth.times.append(self._last)
        self._left -= 1

    def parts(self, piece: FilePiece, block_bytes: int) -> Iterator[FilePiece]:
        """Yield the parts of a piece by when they were written; itself, if nothing is known of that.

        What the first copy has already is as old as the piece says, but no newer than that copy.
        """
        made, number, offset = piece.written
        growth = self._growths.get(number)
        if growth is None or len(growth.sizes) < 2:
            yield piece
            return
        ends = [-(-size // block_bytes) * block_bytes for size in growth.sizes]
        start, stop = offset, offset + piece.length
        while start < stop:
            at = bisect_right(ends, start)
            end = min(ends[at], stop) if at < len(ends) else stop
            time = growth.times[at] if at < len(ends) else max(growth.times[-1] + 1, piece.changed_ns)
            done = start - offset
            yield replace(
                piece,
                guest_offset=piece.guest_offset + done,
                length=end - start,
                valid_bytes=min(max(piece.valid_bytes - done, 0), end - start),
                written=(time if at else min(made, time), number, start),
                is_timed=True,
            )
            start = end
