"""Damaged images by number: a good one in which one to three things were made wrong.

Beside what `tests.fuzz.hostile` does to any image, what a fault of memory or disk, or a program with a bug,
does to the right entries of the right tables. A number replays its case.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jqcow.ondisk import entries
from jqcow.ondisk.header import EXTENSION_STRUCT, Header
from jqcow.ondisk.layout import SECTOR_BYTES
from tests.differential import samples
from tests.fuzz import hostile
from tests.fuzz.hostile import Sample

TRIES_MAX = 20
"""A damage finds nothing to do in many an image: then comes another one."""

ROOT_COPY_OFFSET = 4096
_V2_HEADER_BYTES = 72
_BLOCKS_LOOKED_AT = 8


@dataclass(frozen=True)
class Case:
    """A damaged image, of which sample it is, and what was done to it."""

    number: int
    content: bytes
    recipe: samples.Recipe
    live: bool
    story: tuple[str, ...]

    def __str__(self) -> str:
        kind = "live" if self.live else "clean"
        told = "; ".join(self.story)
        return (
            f"image {self.number}: {kind}, clusters of {self.recipe.name}, {len(self.content)} bytes: {told}"
        )


def make_case(number: int) -> Case:
    """Make the damaged image of this number."""
    chance = random.Random(f"differential {number}")
    made = samples.made()
    # Large ones take long, and clusters of 2 MiB have no tables of another kind.
    weights = [1 if len(sample.content) > 8 << 20 else 3 for _, sample in made]
    ((recipe, sample),) = chance.choices(made, weights)
    content = bytearray(sample.content)
    story = []
    damages = LIVE_DAMAGES if sample.live else DAMAGES
    wanted = chance.choice((1, 1, 1, 2, 3))
    for damage in chance.choices(damages, k=TRIES_MAX):
        told = damage(content, sample, chance)
        if "nothing" not in told:
            story.append(f"{damage.__name__} {told}".strip())
        if len(story) == wanted:
            break
    return Case(number, bytes(content), recipe, sample.live, tuple(story))


# Where things are


@dataclass(frozen=True)
class Places:
    """Host offsets in bytes of what the header of a damaged image still leads to, within the file."""

    header: Header
    l1_entries: tuple[int, ...]
    l2_tables: tuple[int, ...]
    l2_entries: tuple[int, ...]
    refcount_table: int
    refcount_blocks: tuple[int, ...]


def places_in(content: bytearray, sample: Sample) -> Places:
    """Return where the tables of an image are."""
    # The header may be damaged already, and a live one says less than it will: the good sample's serves then.
    whole = sample.content
    header = Header.unpack(whole[:SECTOR_BYTES])
    l1_entries = tuple(_present(whole, header.l1_table_offset, header.l1_size, len(content)))
    tables = {_word(whole, place) & entries.OFFSET_MASK for place in l1_entries}
    l2_tables = tuple(sorted(table for table in tables if table < len(content)))
    per_table = sample.cluster_bytes // 8
    l2_entries = tuple(
        place for table in l2_tables for place in _present(whole, table, per_table, len(content))
    )
    blocks = [
        _word(whole, place)
        for place in _present(whole, header.refcount_table_offset, _BLOCKS_LOOKED_AT, len(content))
    ]
    refcount_blocks = tuple(block for block in blocks if block < len(content))
    return Places(header, l1_entries, l2_tables, l2_entries, header.refcount_table_offset, refcount_blocks)


def _word(content: bytes | bytearray, place: int) -> int:
    return int.from_bytes(content[place : place + 8], "big")


def _present(content: bytes, table: int, count: int, limit: int) -> Iterator[int]:
    for place in range(table, min(table + 8 * count, limit - 7, len(content) - 7), 8):
        if _word(content, place):
            yield place


def _put(content: bytearray, place: int, data: bytes) -> None:
    if place + len(data) <= len(content):
        content[place : place + len(data)] = data


# Damages: each returns what it did


def entry_bit(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Flip one bit of an entry that is in use: flags, reserved bits and offsets alike."""
    places = places_in(content, sample)
    refcount_entries = tuple(
        places.refcount_table + 8 * index for index in range(len(places.refcount_blocks))
    )
    kinds = [found for found in (places.l1_entries, places.l2_entries, refcount_entries) if found]
    place = chance.choice(chance.choice(kinds or [(0,)]))
    bit = chance.choice((0, 9, 56, 61, 62, 63, chance.randrange(64)))
    _put(content, place, (_word(content, place) ^ 1 << bit).to_bytes(8, "big"))
    return f"{bit} at {place:#x}"


def entry_lost(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Make an entry of the L1 or an L2 table 0."""
    places = places_in(content, sample)
    place = chance.choice(chance.choice((places.l1_entries, places.l2_entries)) or (0,))
    _put(content, place, bytes(8))
    return f"at {place:#x}"


def entry_of_another(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Give an entry the value of another: two guest clusters, or two L1 entries, share what they name."""
    places = places_in(content, sample)
    found = chance.choice((places.l1_entries, places.l2_entries, places.l2_entries)) or (0,)
    source, target = chance.choice(found), chance.choice(found) + chance.choice((0, 0, 8))
    _put(content, target, bytes(content[source : source + 8]))
    return f"of {source:#x} to {target:#x}"


def table_lost(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Overwrite a table or a part of it with zeros or noise."""
    places = places_in(content, sample)
    header = places.header
    tables = [header.l1_table_offset, places.refcount_table, *places.l2_tables, *places.refcount_blocks]
    table = chance.choice([*tables, *places.l2_tables, sample.snapshots_offset or tables[0]])
    length = chance.choice((8, SECTOR_BYTES, sample.cluster_bytes, sample.cluster_bytes))
    noise = chance.random() < 0.4
    _put(content, table, chance.randbytes(length) if noise else bytes(length))
    return f"{'noise' if noise else 'zeros'} over {length} bytes at {table:#x}"


def refcount(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Set the refcount of one cluster, within the file or right behind it."""
    places = places_in(content, sample)
    if not places.refcount_blocks:
        return "nothing"
    width = 1 << places.header.refcount_order
    cluster = chance.randrange(len(content) // sample.cluster_bytes + 3)
    index, slot = divmod(cluster, sample.cluster_bytes * 8 // width)
    if index >= len(places.refcount_blocks):
        return "nothing"
    value = chance.choice((0, 0, 1, 2, 3, (1 << width) - 1, chance.getrandbits(width))) & (1 << width) - 1
    place, bits = divmod(slot * width, 8)
    place += places.refcount_blocks[index]
    if width >= 8:
        _put(content, place, value.to_bytes(width // 8, "big"))
    elif place < len(content):
        content[place] = content[place] & ~((1 << width) - 1 << bits) & 0xFF | value << bits
    return f"of cluster {cluster} = {value}"


def cut(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Cut a few sectors or clusters off the end, or let the file go on with zeros or garbage."""
    unit = chance.choice((SECTOR_BYTES, sample.cluster_bytes, 1))
    length = chance.randrange(1, 6) * unit
    if chance.random() < 0.3:
        content += bytes(length) if chance.random() < 0.5 else chance.randbytes(length)
        return f"{length} bytes added"
    del content[max(0, len(content) - length) :]
    return f"{length} bytes off"


def header_bit(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Flip one bit of a field of the header."""
    name = chance.choice(sorted(hostile.HEADER_FIELDS))
    offset, length = hostile.HEADER_FIELDS[name]
    bit = chance.randrange(min(8 * length, chance.choice((6, 64))))
    place = offset + length - 1 - bit // 8
    if place < len(content):
        content[place] ^= 1 << bit % 8
    return f"{bit} of {name}"


def listed_extension(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Change the type, the length or the data of an extension that is there."""
    header = Header.unpack(sample.content[:SECTOR_BYTES])
    position = _V2_HEADER_BYTES if header.version == 2 else header.header_length
    found = []
    while position + 8 <= min(len(content), sample.cluster_bytes):
        kind, length = EXTENSION_STRUCT.unpack_from(content, position)
        found.append((position, length))
        if not kind or length > sample.cluster_bytes:
            break
        position += 8 + -(-length // 8) * 8
    if not found:
        return "nothing"
    place, length = chance.choice(found)
    match chance.randrange(3):
        case 0:
            kinds = (0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441, chance.getrandbits(32))
            _put(content, place, chance.choice(kinds).to_bytes(4, "big"))
        case 1:
            longer = max(0, length + chance.choice((-9, -1, 1, 8, 48, 1000))) & 0xFFFFFFFF
            _put(content, place + 4, longer.to_bytes(4, "big"))
        case _:
            _put(content, place + 8 + chance.randrange(length or 1), chance.randbytes(1))
    return f"at {place}"


def name_below(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Change a letter of the backing file's name, or where it is and how long."""
    header = Header.unpack(sample.content[:SECTOR_BYTES])
    if not header.backing_file_offset:
        return header_bit(content, sample, chance)
    if chance.random() < 0.5:
        place = header.backing_file_offset + chance.randrange(header.backing_file_size)
        _put(content, place, chance.choice((b"\0", b"/", b"x", chance.randbytes(1))))
        return f"a letter at {place}"
    longer = header.backing_file_size + chance.choice((-1, 1, 2000))
    _put(content, 16, longer.to_bytes(4, "big"))
    return f"of {longer} bytes"


def root_copy(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Damage the copy of a live image's root, or sector 0 so that the copy has to serve, or both."""
    told = []
    if chance.random() < 0.6 and sample.cluster_bytes > ROOT_COPY_OFFSET:
        place = ROOT_COPY_OFFSET + chance.randrange(SECTOR_BYTES + 8)
        _put(content, place, chance.randbytes(chance.choice((1, 8))))
        told.append(f"the copy at {place}")
    if chance.random() < 0.6:
        _put(content, 0, chance.choice((bytes(4), bytes(SECTOR_BYTES), chance.randbytes(SECTOR_BYTES))))
        told.append("sector 0")
    return " and ".join(told) or "nothing"


Damage = Callable[[bytearray, Sample, random.Random], str]

_ANY: tuple[Damage, ...] = (
    entry_bit, entry_bit, entry_lost, entry_of_another, table_lost, refcount, refcount, cut, header_bit,
    listed_extension, name_below,
)  # fmt: skip
DAMAGES: tuple[Damage, ...] = (*_ANY, *hostile.CLEAN_ATTACKS)
LIVE_DAMAGES: tuple[Damage, ...] = (*_ANY, *hostile.ATTACKS, root_copy, root_copy)
