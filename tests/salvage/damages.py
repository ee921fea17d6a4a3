"""What can happen to an image file: each kind is a function that damages a copy of a base.

What a kind does is drawn from the seed of its cell. A kind that finds nothing to damage returns False.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.salvage.anatomy import Anatomy, Range
from tests.salvage.sectors import SECTOR_BYTES

MIB = 1 << 20
FIELDS = {
    "version": (4, 4), "backing file": (8, 8), "cluster bits": (20, 4), "disk size": (24, 8),
    "encryption": (32, 4), "L1 entries": (36, 4), "L1 offset": (40, 8), "refcount table": (48, 8),
    "refcount clusters": (56, 4), "snapshots": (60, 4), "snapshot offset": (64, 8), "features": (72, 8),
    "refcount order": (96, 4), "header length": (100, 4),
}  # fmt: skip
"""Fields of the header: offset and length in bytes."""


@dataclass
class Victim:
    """A copy of a base, to be damaged.

    Attributes:
        path: the copy.
        anatomy: of the base.
        chance: what draws.
        other: an image of another disk, for a crossed copy.
        unreadable: host offset and length in bytes of what the host cannot read.
    """

    path: Path
    anatomy: Anatomy
    chance: Random
    other: Path
    unreadable: list[Range]

    def __post_init__(self) -> None:
        self._descriptor = os.open(self.path, os.O_RDWR)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return os.fstat(self._descriptor).st_size

    def read(self, length: int, offset: int) -> bytes:
        """Return bytes of the file."""
        return os.pread(self._descriptor, length, offset).ljust(length, b"\0")

    def write(self, data: bytes, offset: int) -> None:
        """Overwrite a part of the file, no further than it goes."""
        data = data[: max(0, self.size - offset)]
        if data:
            os.pwrite(self._descriptor, data, offset)

    def zero(self, ranges: Iterable[Range | None]) -> bool:
        """Make zeros of ranges; False if there are none."""
        return self._over(ranges, bytes)

    def garble(self, ranges: Iterable[Range | None]) -> bool:
        """Make noise of ranges; False if there are none."""
        return self._over(ranges, self.chance.randbytes)

    def _over(self, ranges: Iterable[Range | None], content: Callable[[int], bytes]) -> bool:
        found = [one for one in ranges if one is not None and one[1]]
        for offset, length in found:
            self.write(content(length), offset)
        return bool(found)

    def cut(self, size: int) -> None:
        """Cut the file off."""
        os.ftruncate(self._descriptor, size)

    def some(self, ranges: Iterable[Range]) -> list[Range]:
        """Return about half of some ranges, one at least."""
        every = list(ranges)
        return self.chance.sample(every, (len(every) + 1) // 2)


Damage = Callable[[Victim], bool]


def header_zeroed(victim: Victim) -> bool:
    return victim.zero([(0, victim.anatomy.cluster_bytes)])


def header_noise(victim: Victim) -> bool:
    return victim.garble([(0, SECTOR_BYTES)])


def header_fields(victim: Victim) -> bool:
    """Three fields are wrong: often by a bit, sometimes anything."""
    for offset, length in victim.chance.sample(sorted(FIELDS.values()), 3):
        value = int.from_bytes(victim.read(length, offset), "big")
        drawn = victim.chance.getrandbits(8 * length)
        value = drawn if victim.chance.random() < 0.4 else value ^ 1 << victim.chance.randrange(8 * length)
        victim.write(value.to_bytes(length, "big"), offset)
    return True


def l1_zeroed(victim: Victim) -> bool:
    return victim.zero([victim.anatomy.l1])


def l1_noise(victim: Victim) -> bool:
    return victim.garble([victim.anatomy.l1])


def l1_sector(victim: Victim) -> bool:
    """The first sector of the table, which has entries, is noise."""
    offset, length = victim.anatomy.l1
    return victim.garble([(offset, min(length, SECTOR_BYTES))])


def l2_one_zeroed(victim: Victim) -> bool:
    return victim.zero(victim.chance.sample(victim.anatomy.l2, 1))


def l2_some_zeroed(victim: Victim) -> bool:
    return victim.zero(victim.some(victim.anatomy.l2))


def l2_some_noise(victim: Victim) -> bool:
    return victim.garble(victim.some(victim.anatomy.l2))


def l2_all_zeroed(victim: Victim) -> bool:
    return victim.zero([*victim.anatomy.l2, *victim.anatomy.snapshot_l2])


def l2_all_noise(victim: Victim) -> bool:
    return victim.garble([*victim.anatomy.l2, *victim.anatomy.snapshot_l2])


def l2_of_the_disk(victim: Victim) -> bool:
    """Those of the snapshots stay."""
    return bool(victim.anatomy.snapshot_l2) and victim.zero(victim.anatomy.l2)


def l2_all_torn(victim: Victim) -> bool:
    """Every table is good up to a place, and old behind it: zeros."""
    torn = []
    for offset, length in [*victim.anatomy.l2, *victim.anatomy.snapshot_l2]:
        used = len(victim.read(length, offset).rstrip(b"\0"))
        keep = victim.chance.randrange(max(1, used // SECTOR_BYTES + 1)) * SECTOR_BYTES
        torn.append((offset + keep, length - keep))
    return victim.zero(torn)


def l2_sectors(victim: Victim) -> bool:
    """One sector in four of every table is noise, or zeros."""
    for offset, length in victim.anatomy.l2:
        for place in range(offset, offset + length, SECTOR_BYTES):
            if victim.read(SECTOR_BYTES, place).strip(b"\0") and victim.chance.random() < 0.25:
                victim._over([(place, SECTOR_BYTES)], victim.chance.choice((bytes, victim.chance.randbytes)))
    return True


def refcount_table(victim: Victim) -> bool:
    return victim.zero([victim.anatomy.refcount_table])


def refcount_blocks(victim: Victim) -> bool:
    return victim.garble(victim.anatomy.refcount_blocks)


def refcounts(victim: Victim) -> bool:
    return victim.zero([victim.anatomy.refcount_table, *victim.anatomy.refcount_blocks])


def snapshot_table(victim: Victim) -> bool:
    return victim.garble([victim.anatomy.snapshot_table])


def snapshot_l1(victim: Victim) -> bool:
    return victim.zero(victim.anatomy.snapshot_l1)


def bitmap_directory(victim: Victim) -> bool:
    return victim.garble([victim.anatomy.bitmap_directory])


def bitmaps(victim: Victim) -> bool:
    return victim.zero(victim.anatomy.bitmap_clusters)


def journal_zeroed(victim: Victim) -> bool:
    return victim.zero([victim.anatomy.journal])


def journal_noise(victim: Victim) -> bool:
    return victim.garble([victim.anatomy.journal])


def truncated(victim: Victim) -> bool:
    """A tenth to a half of the file is gone."""
    victim.cut(int(victim.size * victim.chance.uniform(0.5, 0.9)) // SECTOR_BYTES * SECTOR_BYTES)
    return True


def truncated_a_bit(victim: Victim) -> bool:
    victim.cut(victim.size - victim.chance.randrange(1, 3 * victim.anatomy.cluster_bytes))
    return True


def noise_in_places(victim: Victim) -> bool:
    """Four ranges of up to 256 KiB, anywhere."""
    return victim.garble(_anywhere(victim))


def zeros_in_places(victim: Victim) -> bool:
    return victim.zero(_anywhere(victim))


def _anywhere(victim: Victim) -> list[Range]:
    starts = [victim.chance.randrange(victim.size // SECTOR_BYTES) * SECTOR_BYTES for _ in range(4)]
    return [(start, victim.chance.randrange(1, 512) * SECTOR_BYTES) for start in starts]


def first_mebibyte(victim: Victim) -> bool:
    """Another program took the file for its own."""
    return victim.garble([(0, min(MIB, victim.size // 4))])


def double_allocation(victim: Victim) -> bool:
    """Entries of L2 tables name clusters that others have."""
    width = victim.anatomy.cluster_bytes // victim.anatomy.header.geometry.l2_entries
    done = False
    for offset, length in victim.anatomy.l2:
        table = victim.read(length, offset)
        used = [at for at in range(0, length, width) if table[at : at + 8].strip(b"\0")]
        # None is both: an entry that is moved on whole is a lie that nothing in the file tells.
        chosen = victim.chance.sample(used, min(len(used) // 2, 3) * 2)
        for source, target in zip(chosen[::2], chosen[1::2], strict=True):
            victim.write(table[source : source + width], offset + target)
            done = True
    return done


def crossed_copy(victim: Victim) -> bool:
    """Ranges are those of another image, as a copy leaves it that went on with the wrong source."""
    with victim.other.open("rb") as file:
        size = min(victim.size, os.fstat(file.fileno()).st_size)
        for _ in range(3):
            length = victim.chance.randrange(1, max(2, size // 8 // SECTOR_BYTES)) * SECTOR_BYTES
            start = victim.chance.randrange(SECTOR_BYTES, size - length) // SECTOR_BYTES * SECTOR_BYTES
            victim.write(os.pread(file.fileno(), length, start), start)
    return True


def crossed_end(victim: Victim) -> bool:
    """The second half is that of another image."""
    with victim.other.open("rb") as file:
        half = victim.size // 2 // SECTOR_BYTES * SECTOR_BYTES
        victim.write(os.pread(file.fileno(), victim.size - half, half), half)
    return True


def unreadable_places(victim: Victim) -> bool:
    """The host cannot read ranges, anywhere."""
    for _ in range(6):
        start = victim.chance.randrange(victim.size // SECTOR_BYTES) * SECTOR_BYTES
        victim.unreadable.append((start, victim.chance.randrange(1, 64) * SECTOR_BYTES))
    return True


def unreadable_tables(victim: Victim) -> bool:
    """The host cannot read half of the L2 tables, and the refcounts."""
    victim.unreadable += [*victim.some(victim.anatomy.l2), *victim.anatomy.refcount_blocks]
    return True


def together(*damages: Damage) -> Damage:
    """Return several damages as one, which has to hit with each."""
    return lambda victim: all([damage(victim) for damage in damages])


KINDS: dict[str, Damage] = {
    "header zeroed": header_zeroed,
    "header noise": header_noise,
    "header fields": header_fields,
    "L1 zeroed": l1_zeroed,
    "L1 noise": l1_noise,
    "L1 sector": l1_sector,
    "one L2 zeroed": l2_one_zeroed,
    "some L2 zeroed": l2_some_zeroed,
    "some L2 noise": l2_some_noise,
    "all L2 zeroed": l2_all_zeroed,
    "all L2 noise": l2_all_noise,
    "L2 of the disk": l2_of_the_disk,
    "all L2 torn": l2_all_torn,
    "L2 sectors": l2_sectors,
    "refcount table": refcount_table,
    "refcount blocks": refcount_blocks,
    "refcounts": refcounts,
    "snapshot table": snapshot_table,
    "snapshot L1": snapshot_l1,
    "bitmap directory": bitmap_directory,
    "bitmaps": bitmaps,
    "journal zeroed": journal_zeroed,
    "journal noise": journal_noise,
    "truncated": truncated,
    "truncated a bit": truncated_a_bit,
    "noise in places": noise_in_places,
    "zeros in places": zeros_in_places,
    "first MiB": first_mebibyte,
    "double allocation": double_allocation,
    "crossed copy": crossed_copy,
    "crossed end": crossed_end,
    "unreadable places": unreadable_places,
    "unreadable tables": unreadable_tables,
    "header + L1": together(header_zeroed, l1_zeroed),
    "L1 + all L2": together(l1_noise, l2_all_noise),
    "all L2 + refcounts": together(l2_all_zeroed, refcounts),
    "header + L1 + refcounts": together(header_noise, l1_zeroed, refcounts),
    "all metadata": together(header_zeroed, l1_zeroed, l2_all_zeroed, refcounts),
    "some L2 + truncated": together(l2_some_noise, truncated),
    "L2 sectors + noise": together(l2_sectors, noise_in_places),
    "header + journal": together(header_zeroed, journal_zeroed),
    "some L2 + snapshot table": together(l2_some_zeroed, snapshot_table),
    "all L2 + bitmap directory": together(l2_all_zeroed, bitmap_directory),
}
