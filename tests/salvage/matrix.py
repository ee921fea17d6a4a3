"""The damage matrix: each kind of damage on each base, and what comes back of the bytes that are not zeros.

D1. A salvage has back at least as many right bytes as anything that QEMU does, and as plain reading.
D2. What it calls certain is where it belongs: no certain byte is wrong, but where the file itself has other
    bytes now than it had, in the very place that they belong to.
D3. At least 99 % of the bytes whose tables are as they were come back right and certain.
D4. The damaged file is not changed.
D5. A salvage ends by itself, with no traceback.
D6. Of a protected image whose sums are as they were, all that the file still has comes back; but for units
    of several clusters that it has in part: their sum tells of all of it.

What is measured: *present* is what the damaged file still has, in its place; *tables* what of that has
entries, in L1 and L2 table, whose sectors are as they were, and no other user.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

from jqcow.ondisk.protection import Units
from tests.salvage import bases, columns
from tests.salvage.anatomy import Piece, Range
from tests.salvage.bases import Base
from tests.salvage.columns import Salvaged
from tests.salvage.damages import KINDS, Victim
from tests.salvage.sectors import SECTOR_BYTES, Sectors, alike, count_of
from tests.support import runs
from tests.support.runs import Outcome

PAGE_BYTES = 4096
RIGHT_AND_CERTAIN_MIN = 0.99
OTHERS = {4096: "xfs 4 KiB", 2 << 20: "btrfs 2 MiB", 512: "no guest 512 B"}
"""Bases by cluster size that give the other image of a crossed copy."""
QEMU = ("qemu", "qemu, --salvage", "qemu, repaired", "qemu, repaired, --salvage")


@dataclass
class Cell:
    """A kind of damage on a base: bytes of the disk that are not zeros, by what became of them.

    Attributes:
        base: its name.
        kind: of the damage.
        seed: of both.
        data: all there are.
        present: that the file still has.
        tables: whose tables are as they were.
        tables_right: those of them that came back right and certain.
        right: that came back, by column.
        file_data: as ``data``, of the files of the guest.
        file_right: as ``right``, of those.
        certain: right and certain.
        wrong_certain: certain, and in the wrong place: of all the disk, zeros too.
        seconds: of the salvage, CPU time.
        peak_bytes: the most memory that it took.
        broken: what rules were broken.
    """

    base: str
    kind: str
    seed: int
    data: int = 0
    present: int = 0
    tables: int = 0
    tables_right: int = 0
    right: dict[str, int] = field(default_factory=dict)
    file_data: int = 0
    file_right: dict[str, int] = field(default_factory=dict)
    certain: int = 0
    wrong_certain: int = 0
    seconds: float = 0
    peak_bytes: int = 0
    broken: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        best = max((self.right.get(name, 0) for name in QEMU), default=0)
        parts = {
            "present": self.present,
            "qemu": best,
            "plain": self.right.get("plain", 0),
            "jqcow": self.right.get("jqcow", 0),
            "certain": self.certain,
        }
        shares = " ".join(f"{name} {share(value, self.data)}" for name, value in parts.items())
        files = f" files {share(self.file_right.get('jqcow', 0), self.file_data)}" if self.file_data else ""
        return f"{self.base:22} {self.kind:24} {shares}{files} {self.seconds:.1f} s"


def share(part: int, whole: int) -> str:
    """Return a share in per cent, as text that ends alike only for what is alike: 100.0 is all of it."""
    if not whole:
        return "-"
    value = 100 * part / whole
    return f"{99.9 if 99.9 <= value < 100 else value:.1f}"


class Trial:
    """One cell, tried in a folder of its own."""

    def __init__(self, base: Base, kind: str, seed: int, folder: Path, other: Path) -> None:
        self._base, self._folder = base, folder
        self._cell = Cell(base.name, kind, seed)
        self._image = columns.copied(base.image, folder / "damaged.qcow2")
        columns.copied_beside(base, folder)
        chance = Random(f"{base.name} {kind} {seed}")
        self._victim = Victim(self._image, base.anatomy, chance, other, [])
        self.is_damaged = KINDS[kind](self._victim)
        self._victim.close()
        self._unreadable = Sectors.of(
            self._image.stat().st_size,
            [
                (
                    start // PAGE_BYTES * PAGE_BYTES,
                    -(-(start + length) // PAGE_BYTES) * PAGE_BYTES - start // PAGE_BYTES * PAGE_BYTES,
                )
                for start, length in self._victim.unreadable
            ],
        )
        self._same = self._alike_in_the_file()

    def _alike_in_the_file(self) -> bytes:
        """Return a byte for each sector of the base's file: 1 where the damaged one has the same."""
        size = self._base.image.stat().st_size
        same = alike(self._base.image, self._image, size)
        unreadable = self._unreadable.mask().ljust(count_of(size), b"\0")[: count_of(size)]
        return (same - Sectors(unreadable)).mask()

    def run(self, *, with_qemu: bool = True) -> Cell:
        """Have all programs bring back what they can."""
        cell, base = self._cell, self._base
        before = digest(self._image)
        with columns.failing(self._image, self._victim.unreadable, self._folder) as image:
            salvaged = columns.by_salvage(base, image, self._folder)
            plain = columns.by_plain_reading(base, image, self._folder)
        if digest(self._image) != before:
            cell.broken.append("D4: the source was changed")
        self._judge(salvaged)
        self._count(plain)
        if with_qemu:
            # Of the repairs nothing else is to be seen.
            with columns.failing(self._image, self._victim.unreadable, self._folder) as image:
                self._count(columns.by_qemu(base, image, self._folder))
        self._compare()
        return cell

    def _count(self, found: dict[str, Path]) -> None:
        for name, path in found.items():
            right = self._right(path)
            self._cell.right[name] = len(right & self._base.data) * SECTOR_BYTES
            self._cell.file_right[name] = len(right & self._base.file_data) * SECTOR_BYTES
            path.unlink(missing_ok=True)

    def _right(self, path: Path) -> Sectors:
        base = self._base
        if not path.exists():
            return Sectors(bytes(count_of(base.size)))
        return alike(base.truth, path, base.size)

    def _judge(self, salvaged: Salvaged) -> None:
        cell, base, ended = self._cell, self._base, salvaged.ran
        cell.seconds, cell.peak_bytes = ended.cpu_seconds, ended.peak_bytes
        if ended.status not in (0, 1, 2) or "Traceback" in ended.told:
            cell.broken.append(f"D5: exit status {ended.status}: {ended.told[-300:]}")
        if ended.status == 1 and not salvaged.target.exists():
            cell.broken.append(f"refused: {ended.told[-200:].strip()}") if cell.right.get("plain") else None
        right = self._right(salvaged.target)
        certain = Sectors.of(
            base.size,
            [(one["offset"], one["length"]) for one in salvaged.ranges if one["certainty"] == "certain"],
        )
        present, tables = self._present_and_tables()
        own = self._in_own_place(salvaged.ranges)
        wrong = (certain - right) - (own - present)
        cell.data, cell.file_data = len(base.data) * SECTOR_BYTES, len(base.file_data) * SECTOR_BYTES
        cell.present = len(present & base.data) * SECTOR_BYTES
        cell.certain = len(right & certain & base.data) * SECTOR_BYTES
        cell.wrong_certain = len(wrong) * SECTOR_BYTES
        cell.tables = len(tables & base.data) * SECTOR_BYTES
        cell.tables_right = len(tables & base.data & right & certain) * SECTOR_BYTES
        if wrong:
            first = next(wrong.ranges())
            told = [
                one for one in salvaged.ranges if one["offset"] <= first[0] < one["offset"] + one["length"]
            ]
            cell.broken.append(f"D2: {cell.wrong_certain} certain bytes are wrong, as at {first}: {told}")
        if cell.tables_right < RIGHT_AND_CERTAIN_MIN * cell.tables:
            cell.broken.append(f"D3: {share(cell.tables_right, cell.tables)} % of what has its tables")
        missing = len((present & base.data) - right - self._units_in_part(present)) * SECTOR_BYTES
        if base.is_protected and missing and self._sums_are_whole():
            cell.broken.append(f"D6: {missing} bytes of {cell.present} are not back")
        self._count({"jqcow": salvaged.target})

    def _units_in_part(self, present: Sectors) -> Sectors:
        """Return the units of several clusters, of a protected disk, of which the file lacks something."""
        base, cluster_bits = self._base, self._base.anatomy.header.cluster_bits
        unit_bytes = Units(base.size, cluster_bits).unit_bytes
        if unit_bytes <= 1 << cluster_bits:
            return Sectors.of(base.size, [])
        lost = ((start, start + length) for start, length in (base.data - present).ranges())
        units = {unit for start, end in lost for unit in range(start // unit_bytes, -(-end // unit_bytes))}
        return Sectors.of(base.size, [(unit * unit_bytes, unit_bytes) for unit in units])

    def _sums_are_whole(self) -> bool:
        anatomy = self._base.anatomy
        every = chain(anatomy.bitmap_clusters, (anatomy.bitmap_directory,))
        return all(self._is_same(one) for one in every if one is not None)

    def _is_same(self, place: Range) -> bool:
        first, end = place[0] // SECTOR_BYTES, -(-(place[0] + place[1]) // SECTOR_BYTES)
        return b"\0" not in self._same[first:end]

    def _present_and_tables(self) -> tuple[Sectors, Sectors]:
        """Return what the file still has in its place, and what of that has its tables, on the disk."""
        base = self._base
        step, total = base.anatomy.cluster_bytes, count_of(base.size)
        # What the image does not have, another file has, or nobody.
        present, tables = bytearray(b"\1" * total), bytearray(total)
        journal = base.anatomy.journal
        is_told = journal is None or (self._is_same(journal) and self._is_same((0, SECTOR_BYTES)))
        users = self._users()
        for piece in base.pieces:
            first, end = piece.guest_offset // SECTOR_BYTES, (piece.guest_offset + step) // SECTOR_BYTES
            if piece.l2_place < 0:
                end = first + base.anatomy.header.geometry.l2_entries * step // SECTOR_BYTES
            end = min(end, total)
            if piece.host_offset >= 0:
                present[first:end] = self._content(piece)[: end - first]
            has_entries = self._same[piece.l1_place // SECTOR_BYTES]
            if piece.host_offset >= 0:
                has_entries = has_entries and self._same[piece.l2_place // SECTOR_BYTES]
            elif piece.l2_place >= 0:
                # An entry of 0 in a table of which more is lost says nothing.
                has_entries = has_entries and self._is_same((piece.l2_place // step * step, step))
            if is_told and has_entries and users[piece.host_offset] <= 1:
                tables[first:end] = present[first:end]
        return Sectors(present), Sectors(tables)

    def _users(self) -> Counter[int]:
        """Return how many guest clusters have each host offset, by the entries of the damaged file."""
        users: Counter[int] = Counter()
        base = self._base
        if self._cell.kind == "double allocation":
            for piece in base.anatomy.pieces(self._image, base.anatomy.l1, base.size):
                if piece.host_offset >= 0:
                    users[piece.host_offset] += 1
        return users

    def _content(self, piece: Piece) -> bytes:
        """Return a byte for each sector of a guest cluster: 1 where the file still has it."""
        first = piece.host_offset // SECTOR_BYTES
        end = -(-(piece.host_offset + piece.host_bytes) // SECTOR_BYTES)
        found = self._same[first:end]
        count = self._base.anatomy.cluster_bytes // SECTOR_BYTES
        if piece.is_compressed:
            # What lies behind the stream in its last sector may be another's; then it counts as damaged, too.
            return (b"\0" if b"\0" in found or len(found) < end - first else b"\1") * count
        return found.ljust(count, b"\0")

    def _in_own_place(self, ranges: list[dict[str, Any]]) -> Sectors:
        """Return what of the disk was taken from the host range that it belongs to."""
        step = self._base.anatomy.cluster_bytes
        hosts = {piece.guest_offset: piece for piece in self._base.pieces if piece.host_offset >= 0}
        found = []
        for one in ranges:
            if one["host-offset"] is None:
                continue
            for guest in range(one["offset"] // step * step, one["offset"] + one["length"], step):
                piece = hosts.get(guest)
                if piece is None:
                    continue
                start, end = max(guest, one["offset"]), min(guest + step, one["offset"] + one["length"])
                moved = one["host-offset"] + start - one["offset"]
                wanted = piece.host_offset + start - guest
                if piece.is_compressed or moved == wanted:
                    found.append((start, end - start))
        return Sectors.of(self._base.size, found)

    def _compare(self) -> None:
        cell = self._cell
        ours = cell.right["jqcow"]
        for name in (*QEMU, "plain"):
            theirs = cell.right.get(name, 0)
            if theirs > ours:
                cell.broken.append(f"D1: {ours} bytes right, {name} has {theirs}")


def digest(path: Path) -> str:
    """Return a checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def other_of(base: Base, seed: int, cache: Path) -> Path:
    """Return an image of another disk, with clusters of the same size where there is one."""
    name = OTHERS.get(base.anatomy.cluster_bytes, "xfs")
    if name == base.name:
        name = {"xfs": "ext4", "xfs 4 KiB": "ext4 4 KiB", "btrfs 2 MiB": "ext4 2 MiB"}.get(
            name, "no guest 4 KiB"
        )
    return bases.get(name, seed, cache).image


def complaints(cell: Cell) -> Iterator[str]:
    """Yield what rules a cell breaks, with a line for a replay."""
    for broken in cell.broken:
        yield (
            f"BROKEN {cell.base}, {cell.kind}: {broken}\n"
            f"  replay: tools/salvage --seed {cell.seed} --bases '{cell.base}' --kinds '{cell.kind}'"
        )


@dataclass
class Found(Outcome):
    """What came of cells."""

    cells: list[Cell] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        super().add(other)
        if isinstance(other, Found):
            self.cells += other.cells


@dataclass(frozen=True)
class Part:
    """A cell to be tried, and where the bases are."""

    base: str
    kind: str
    seed: int
    cache: Path


def parts_of(
    names: Sequence[str], kinds: Sequence[str], seed: int, cache: Path, part: float = 1
) -> list[Part]:
    """Return the cells of bases and kinds, or a part of them that is drawn by chance, in any order."""
    every = [Part(name, kind, seed, cache) for name in names for kind in kinds]
    return Random(seed).sample(every, max(1, round(part * len(every))))


def try_cell(part: Part) -> Found:
    """Try a cell."""
    found = Found()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="jqcow-salvage-") as folder:
        base = bases.get(part.base, part.seed, part.cache)
        trial = Trial(base, part.kind, part.seed, Path(folder), other_of(base, part.seed, part.cache))
        if not trial.is_damaged:
            return found
        cell = trial.run()
    found.counts["cells"] += 1
    found.cells.append(cell)
    found.seconds = time.monotonic() - started
    return found


def run(parts: Sequence[Part], jobs: int) -> Iterator[Found]:
    """Try cells; yield the total after each."""
    for name, seed in dict.fromkeys((part.base, part.seed) for part in parts):
        bases.get(name, seed, parts[0].cache)
    return runs.run_parts(try_cell, parts, jobs, new_total=Found)
