"""The disk of a damaged image as a row of parts: each with its bytes, or with the reason why it has none."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from jqcow import _native
from jqcow.engine.pending import Piece as Written
from jqcow.engine.pending import Pieces
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.salvage.amounts import certainty_of
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.guestmap import Piece
from jqcow.salvage.reading import PieceReader
from jqcow.salvage.survey import Survey

Kind = Literal["data", "zero", "below", "lost"]
JOURNAL = "journal"
"""The witness of what no table shows yet."""
PART_BYTES = 2 << 20
"""So much is read at once."""


@dataclass(frozen=True)
class Part:
    """A guest range that has one story.

    Attributes:
        offset: of the range on the disk.
        length: of it.
        kind: ``data``; ``zero``; ``below``: what the backing disk has, zeros without one; ``lost``.
        certainty: how surely; of what is lost None.
        witness: who says so.
        host_offset: of the data in the file; None where there is none.
        is_compressed: the data is compressed there.
        reason: why it is lost.
        content: the bytes of data.
    """

    offset: int
    length: int
    kind: Kind
    certainty: Certainty | None
    witness: str | None
    host_offset: int | None = None
    is_compressed: bool = False
    reason: str | None = None
    content: bytes | None = None

    @property
    def end(self) -> int:
        """The guest offset behind it."""
        return self.offset + self.length

    def cut(self, start: int, end: int) -> Part:
        """Return what of it lies in [start, end)."""
        first, stop = max(start, self.offset) - self.offset, min(end, self.end) - self.offset
        if (first, stop) == (0, self.length):
            return self
        host, content = self.host_offset, self.content
        if host is not None and not self.is_compressed:
            host += first
        if content is not None:
            content = content[first:stop]
        return replace(
            self, offset=self.offset + first, length=stop - first, host_offset=host, content=content
        )


class Parts:
    """Reads the parts of a disk."""

    def __init__(self, survey: Survey, reader: PieceReader, least: Certainty) -> None:
        """Read the disk of ``survey``; what is less sure than ``least`` counts as lost."""
        self._survey, self._reader, self._least = survey, reader, least
        self._cluster_bytes = survey.shape.geometry.cluster_bytes
        laid = (Written(each.offset, memoryview(each.data)) for each in survey.intents)
        self._written = list(Pieces.of(laid))

    def from_offset(self, offset: int) -> Iterator[Part]:
        """Yield what there is from a guest offset on to the end of the disk, in order, without gaps."""
        if not self._written:
            yield from self._from_tables(offset)
            return
        for part in self._from_tables(offset):
            yield from self._laid_over(part)

    def _laid_over(self, part: Part) -> Iterator[Part]:
        """Yield a part, with what a journal has of it in place of what the tables show."""
        position = part.offset
        first = bisect_right(self._written, position, key=lambda written: written.end)
        for written in islice(self._written, first, None):
            if written.offset >= part.end:
                break
            if position < written.offset:
                yield part.cut(position, written.offset)
            new = written.part(position, part.end)
            content = bytes(new.data)
            yield Part(new.offset, len(content), "data", self._survey.ceiling, JOURNAL, content=content)
            position = new.end
        if position < part.end:
            yield part.cut(position, part.end)

    def _from_tables(self, offset: int) -> Iterator[Part]:
        disk = self._survey.guest_map
        for piece in disk.pieces(offset, disk.size - offset):
            certainty = certainty_of(piece, self._survey.ceiling)
            if piece.kind == "lost" and self._reader.has_below and self._least == Certainty.GUESS:
                # An overlay shows the disk below where it has nothing: that is more than zeros.
                unknown = piece._replace(kind="below", witness=self._why(piece.guest_offset))
                yield from self._below(unknown, certainty)
            elif piece.kind == "lost":
                yield _lost(piece, self._why(piece.guest_offset))
            elif certainty < self._least:
                yield _lost(piece, f"not sure enough: {certainty.name.lower()}, by {piece.witness}")
            elif piece.kind == "zero":
                yield Part(piece.guest_offset, piece.length, "zero", certainty, piece.witness)
            elif piece.kind == "below":
                yield from self._below(piece, certainty)
            elif certainty == Certainty.GUESS and self._reader.reads_below:
                yield from self._rather_below(piece)
            else:
                yield from self._read(piece, certainty)

    def _rather_below(self, piece: Piece) -> Iterator[Part]:
        """Yield what the backing disk has where a guess would hide it, and the guess where that is zeros."""
        for start in range(piece.guest_offset, piece.end, self._cluster_bytes):
            end = min(start + self._cluster_bytes, piece.end)
            host = piece.host_offset + (0 if piece.kind == "compressed" else start - piece.guest_offset)
            step = piece._replace(guest_offset=start, length=end - start, host_offset=host)
            shown = step._replace(kind="below", host_offset=0, stored_bytes=0, witness="backing disk")
            content = self._reader.read(shown)
            if content is None or _native.is_zero(content):
                yield from self._read(step, Certainty.GUESS)
            else:
                yield Part(start, end - start, "below", Certainty.GUESS, shown.witness, content=content)

    def _why(self, offset: int) -> str:
        for damage in self._survey.tables.damages:
            start = damage.guest_offset
            if start is not None and start <= offset < start + damage.guest_length:
                return f"{damage.structure}: {damage.meaning}"
        return "its table is lost"

    def _below(self, piece: Piece, certainty: Certainty) -> Iterator[Part]:
        """Yield what the backing disk has, with its bytes where that was opened."""
        whole = Part(piece.guest_offset, piece.length, "below", certainty, piece.witness)
        if not self._reader.reads_below:
            yield whole
            return
        for start in range(whole.offset, whole.end, PART_BYTES):
            length = min(PART_BYTES, whole.end - start)
            content = self._reader.read(piece._replace(guest_offset=start, length=length))
            yield replace(whole, offset=start, length=length, content=content)

    def _read(self, piece: Piece, certainty: Certainty) -> Iterator[Part]:
        is_compressed = piece.kind == "compressed"
        for start in range(0, piece.length, PART_BYTES):
            length = min(PART_BYTES, piece.length - start)
            host_offset = piece.host_offset if is_compressed else piece.host_offset + start
            step = piece._replace(
                guest_offset=piece.guest_offset + start, length=length, host_offset=host_offset
            )
            part = Part(
                step.guest_offset, length, "data", certainty, piece.witness, host_offset, is_compressed
            )
            content = self._reader.read(step)
            if content is not None:
                yield replace(part, content=content)
            elif is_compressed:
                yield _lost(step, "its compressed data is damaged, or cannot be read")
            else:
                yield from self._around(step, part)

    def _around(self, piece: Piece, part: Part) -> Iterator[Part]:
        """Yield what the host can read of a range, and what it cannot."""
        content = self._reader.source.pread(piece.length, piece.host_offset)
        bad, reached = self._reader.source.bad, 0
        for start, length in bad.within(piece.host_offset, piece.length):
            # A sector that is encrypted is lost whole.
            first = (start - piece.host_offset) // SECTOR_BYTES * SECTOR_BYTES
            stop = min(piece.length, -(-(start + length - piece.host_offset) // SECTOR_BYTES) * SECTOR_BYTES)
            if reached < first:
                yield _cut(part, reached, first, content)
            if max(reached, first) < stop:
                first = max(reached, first)
                lost = _cut(part, first, stop, content)
                reason = "the host cannot read it"
                yield replace(lost, kind="lost", certainty=None, witness=None, reason=reason, content=None)
            reached = max(reached, stop)
        if reached < piece.length:
            yield _cut(part, reached, piece.length, content)


def _cut(part: Part, first: int, stop: int, content: bytes) -> Part:
    return replace(part, content=content).cut(part.offset + first, part.offset + stop)


def _lost(piece: Piece, reason: str) -> Part:
    return Part(piece.guest_offset, piece.length, "lost", None, None, reason=reason)
