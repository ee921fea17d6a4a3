"""Reads the header of a damaged file, field by field, and infers what is lost from the rest of the file.

HD1. A field that can be right, and that nothing speaks against, is believed.
HD2. What is inferred is said to be; what is inferred and not the only thing that would do is doubtful.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace

from jqcow import _native
from jqcow.errors import CorruptionError, FormatError, UnsupportedFeatureError, printable
from jqcow.ondisk import layout, luks
from jqcow.ondisk import root as roots
from jqcow.ondisk.frame import IntentOperation
from jqcow.ondisk.header import (
    CREATED_HEADER_BYTES,
    CRYPT_LUKS,
    EXTENSION_ENCRYPTION,
    EXTENSION_EXTERNAL_DATA,
    EXTENSION_STRUCT,
    INCOMPATIBLE_COMPRESSION,
    INCOMPATIBLE_EXTENDED_L2,
    INCOMPATIBLE_EXTERNAL_DATA,
    INCOMPATIBLE_JOURNAL,
    INCOMPATIBLE_KNOWN,
    MAGIC,
    MAX_BACKING_NAME_BYTES,
    V2_BYTES,
    V3_BYTES,
    V3_STRUCT,
    Extension,
    Header,
    HeaderArea,
)
from jqcow.ondisk.layout import SECTOR_BYTES, Geometry, table_bytes
from jqcow.ondisk.root import JournalRange
from jqcow.ondisk.snapshots import MAX_SNAPSHOTS, TableEntry
from jqcow.salvage.inference import Structures
from jqcow.salvage.journal import find_frames, live_frames, replay
from jqcow.salvage.lookalikes import FoundL1
from jqcow.salvage.shape import Damage, Shape
from jqcow.salvage.source import Source

HEADER_BYTES = 64 << 10
"""Extensions and the name of a backing file are looked for so far."""
DEFAULT_CLUSTER_BITS = 16
_FIELDS = tuple(field.name for field in fields(Header))
_VERSION_3 = 3


def read_shape(source: Source, cluster_bits: int | None = None, *, by_chance: bool = False) -> Shape:
    """Return what a file must be read as; what a live journal says is laid over ``source``.

    Args:
        source: the file.
        cluster_bits: what to take where nothing tells the cluster size.
        by_chance: believe also what may look like tables by chance.

    Raises:
        FormatError: nothing in the file looks like a part of a qcow2 image.
        UnsupportedFeatureError: the data of the disk lies in another file.
        OSError: the host failed, other than by what it cannot read.
    """
    return _Reading(source, cluster_bits, by_chance=by_chance).read()


class _Reading:
    """One reading: the numbers so far, and what is to be said of them."""

    def __init__(self, source: Source, default_bits: int | None, *, by_chance: bool) -> None:
        self._source, self._by_chance = source, by_chance
        self._default_bits = default_bits
        self._structures = Structures(source)
        self._inferred: set[str] = set()
        self._lost: set[str] = set()
        self._doubtful: set[str] = set()
        self._damages: list[Damage] = []
        self._numbers: dict[str, int] = {}
        self._is_there = False
        self._journal: JournalRange | None = None
        self._intents: tuple[IntentOperation, ...] = ()
        self._l1: FoundL1 | None = None
        self._encryption: luks.Pointer | None = None

    def read(self) -> Shape:
        data = self._source.pread(HEADER_BYTES, 0)
        data = self._replay(data) or data
        self._take_fields(data)
        self._take_data_file(data)
        self._take_cluster_bits()
        self._take_refcounts()
        self._take_l1()
        self._take_features()
        self._take_encryption()
        self._take_snapshots()
        self._take_size()
        return Shape(
            self._area(data),
            frozenset(self._inferred),
            frozenset(self._lost),
            frozenset(self._doubtful),
            tuple(self._damages),
            self._journal,
            self._intents,
        )

    def _infer(self, name: str, value: int | None, meaning: str, default: int = 0) -> None:
        """Take what was inferred for a number; None: nothing was, and the default serves."""
        self._numbers[name] = default if value is None else value
        if value is None:
            self._lost.add(name)
        self._inferred.add(name)
        known = "nothing tells it" if value is None else f"by the rest of the file it is {value:#x}"
        self._damages.append(Damage("header", 0, f"{meaning}; {known}"))

    # The journal

    def _replay(self, data: bytes) -> bytes:
        """Lay a live journal over the file, and return the header that is in it; b"" for none."""
        root: bytes | None = data[:SECTOR_BYTES]
        if not roots.is_live(data[:SECTOR_BYTES]):
            copy = self._source.pread(roots.ROOT_COPY_BYTES, roots.ROOT_COPY_OFFSET)
            root = None if data[: len(MAGIC)] == MAGIC else roots.unpack_root_copy(copy)
            if root is None:
                return b""
            self._damages.append(Damage("header", 0, "sector 0 is lost; the copy of the root has it"))
        if root is None:
            return b""
        try:
            bits, self._journal = roots.unpack_root(root)
        except (FormatError, CorruptionError, UnsupportedFeatureError) as error:
            self._damages.append(Damage("journal", None, f"it cannot be read: {error}"))
            return root
        replayed = replay(
            self._source, live_frames(self._source, self._journal), _journal_geometry(bits, root)
        )
        faults = replayed.faults or ([] if replayed.area else ["no whole frame is left of it"])
        self._damages += [Damage("journal", self._journal.offset, fault) for fault in faults]
        self._source.lay_over(replayed.blocks)
        self._intents = tuple(replayed.intents)
        return replayed.area or root

    def _header_of_frames(self) -> dict[str, int]:
        """Return the numbers of the header that a journal still has whose root is lost, and replay it.

        A journal is given back when an image is closed: what is left of one is likely live, but no more.
        """
        found = find_frames(self._source, self._structures.seen.frames)
        newest = [
            frame
            for frame in found
            if (frame.header.salt, frame.header.epoch) == (found[-1].header.salt, found[-1].header.epoch)
        ]
        for bits in range(layout.MIN_CLUSTER_BITS, layout.MAX_CLUSTER_BITS + 1) if newest else ():
            replayed = replay(self._source, newest, Geometry(bits))
            with suppress(FormatError, CorruptionError):
                header = HeaderArea.parse(replayed.area).header
                if header.cluster_bits == bits and not replayed.faults:
                    self._source.lay_over(replayed.blocks)
                    self._structures = Structures(self._source)
                    self._doubtful.add("l1_table_offset")
                    self._damages.append(Damage("journal", newest[0].offset, "its root is lost"))
                    return {name: getattr(header, name) for name in _FIELDS}
        return {}

    # Fields

    def _take_fields(self, data: bytes) -> None:
        """Take the numbers of the header as they stand, if it is one at all."""
        values = V3_STRUCT.unpack_from(data.ljust(V3_BYTES, b"\0"))
        numbers = dict(zip(_FIELDS, values[1:], strict=False))
        numbers["compression_type"] = data[V3_BYTES] if len(data) > V3_BYTES else 0
        if numbers["version"] not in (2, _VERSION_3):
            is_new = numbers["refcount_order"] <= layout.MAX_REFCOUNT_ORDER and numbers["header_length"] in (
                V3_BYTES,
                CREATED_HEADER_BYTES,
            )
            version = _VERSION_3 if is_new or not any(data[:V2_BYTES]) else 2
        else:
            version = numbers["version"]
        signs = (
            data[: len(MAGIC)] == MAGIC,
            numbers["version"] == version,
            numbers["cluster_bits"] in range(layout.MIN_CLUSTER_BITS, layout.MAX_CLUSTER_BITS + 1),
            self._can_be_offset(numbers["l1_table_offset"]),
            self._can_be_offset(numbers["refcount_table_offset"]),
            0 < numbers["size"] < 1 << 63 and numbers["size"] % SECTOR_BYTES == 0,
        )
        unreadable = self._source.bad.overlaps(0, V3_BYTES)
        self._is_there = sum(signs) >= len(signs) - 2 and not unreadable
        if not self._is_there:
            self._damages.append(Damage("header", 0, "it is lost"))
            numbers = dict.fromkeys(_FIELDS, 0) | self._header_of_frames()
            if numbers["version"]:
                self._inferred |= set(_FIELDS)
                self._numbers = numbers
                return
            self._inferred |= set(_FIELDS)
            version = _VERSION_3
        elif not signs[0]:
            self._damages.append(Damage("header", 0, "the magic is wrong"))
        if self._is_there and not signs[1]:
            self._damages.append(Damage("header", 4, f"version {numbers['version']} is none"))
            self._inferred.add("version")
        numbers["version"] = version
        if version == 2:
            old = Header(*([0] * 12))
            numbers |= {name: getattr(old, name) for name in _FIELDS[12:]}
        self._numbers = numbers

    def _take_data_file(self, data: bytes) -> None:
        """Refuse an image whose data lies elsewhere; without the name of that file the bit is wrong."""
        features = self._numbers["incompatible_features"]
        if not features & INCOMPATIBLE_EXTERNAL_DATA:
            return
        name = None
        with suppress(FormatError, CorruptionError):
            name = HeaderArea.parse(data).find(EXTENSION_EXTERNAL_DATA)
        if name is not None:
            place = printable(os.fsdecode(name.data[:MAX_BACKING_NAME_BYTES]))
            raise UnsupportedFeatureError("an external data file", f"the data of the disk lies in {place!r}")
        features &= ~INCOMPATIBLE_EXTERNAL_DATA
        self._infer("incompatible_features", features, "it has no name of an external data file")

    def _can_be_offset(self, offset: int) -> bool:
        return 0 < offset < self._source.size() and offset % SECTOR_BYTES == 0

    def _take_cluster_bits(self) -> None:
        numbers, structures = self._numbers, self._structures
        bits = numbers["cluster_bits"]
        can_be = layout.MIN_CLUSTER_BITS <= bits <= layout.MAX_CLUSTER_BITS
        if can_be and self._is_supported(bits):
            return
        new = [found for found in range(9, 22) if structures.refcounts_at(1 << found, found) is not None]
        if can_be and self._is_there and (not new or bits in new):
            return
        by_chance = self._by_chance or self._is_there
        found, is_sure = (new[0], True) if new else structures.find_cluster_bits(by_chance=by_chance)
        self._infer(
            "cluster_bits", found, "the cluster size is lost", self._default_bits or DEFAULT_CLUSTER_BITS
        )
        if not is_sure:
            self._doubtful.add("cluster_bits")
        if found is None and not self._is_there and self._default_bits is None:
            raise FormatError("nothing in the file looks like a part of a qcow2 image")

    def _is_supported(self, bits: int) -> bool:
        numbers = self._numbers
        offset, clusters = numbers["refcount_table_offset"], numbers["refcount_table_clusters"]
        if self._structures.refcounts_at(offset, bits, clusters) is not None:
            return True
        l1 = self._structures.l1_at(numbers["l1_table_offset"], bits, numbers["l1_size"])
        return l1 is not None and l1.right > 0

    def _take_refcounts(self) -> None:
        numbers, structures = self._numbers, self._structures
        bits, order = numbers["cluster_bits"], numbers["refcount_order"]
        offset, clusters = numbers["refcount_table_offset"], numbers["refcount_table_clusters"]
        can_be = 0 < clusters <= layout.MAX_REFCOUNT_TABLE_BYTES // (1 << bits) + 1
        can_be = can_be and self._can_be_offset(offset) and offset % (1 << bits) == 0
        if can_be and order <= layout.MAX_REFCOUNT_ORDER:
            if structures.refcounts_at(offset, bits, clusters, (order,)) is not None:
                return
            if self._is_there and structures.refcounts_at(offset, bits, clusters) is None:
                return
        found = structures.refcounts_at(offset, bits, clusters) if can_be else None
        found = found or structures.find_refcounts(bits)
        if found is None:
            if not can_be:
                self._infer("refcount_table_offset", None, "where the refcount table is is lost")
                numbers["refcount_table_clusters"] = 0
            if order > layout.MAX_REFCOUNT_ORDER or not self._is_there:
                self._infer("refcount_order", None, "the width of refcounts is lost", 4)
            return
        if not can_be or found.offset != offset:
            self._infer("refcount_table_offset", found.offset, "where the refcount table is is lost")
            numbers["refcount_table_clusters"] = found.clusters
            self._inferred.add("refcount_table_clusters")
        if found.order != order or not self._is_there:
            self._infer("refcount_order", found.order, "the width of refcounts is lost")

    # The L1 table

    def _take_l1(self) -> None:
        numbers, structures = self._numbers, self._structures
        bits, size = numbers["cluster_bits"], numbers["size"]
        needed = self._l1_needed(size)
        offset, count = numbers["l1_table_offset"], numbers["l1_size"]
        size_can_be = needed <= count <= layout.MAX_L1_ENTRIES
        can_be = self._can_be_offset(offset) and offset % (1 << bits) == 0
        if can_be and size_can_be:
            self._l1 = structures.l1_at(offset, bits, count)
            if self._l1 is not None or (self._is_there and not self._is_empty_in_full_file(offset, count)):
                return
        if can_be and self._l1 is None:
            self._l1 = structures.l1_at(offset, bits)
        if self._l1 is None or not self._l1.right:
            self._find_l1(can_be and self._is_there)
        if self._l1 is not None and self._l1.offset != offset:
            self._infer("l1_table_offset", self._l1.offset, "where the L1 table is is lost")
        elif self._l1 is None and not (can_be and self._is_there):
            self._infer("l1_table_offset", None, "the L1 table is lost")
        if not size_can_be or self._l1 is None or not self._is_there:
            known = self._l1.entry_count if self._l1 is not None else 0
            if 0 < needed <= layout.MAX_L1_ENTRIES and self._is_there:
                known = max(known, needed)
            if known != count:
                self._infer("l1_size", known or None, "the length of the L1 table is lost", needed or 1)

    def _l1_needed(self, size: int) -> int:
        geometry = self._geometry()
        needed = geometry.l1_entries_for(size) if size < 1 << 63 else 0
        return needed if needed <= layout.MAX_L1_ENTRIES else 0

    def _is_empty_in_full_file(self, offset: int, count: int) -> bool:
        """Return if an L1 table says nothing, or nothing that can be, though the file is not empty."""
        table = self._source.pread(min(table_bytes(count), layout.MAX_L1_BYTES), offset)
        clusters = self._source.size() >> self._numbers["cluster_bits"]
        return not _native.is_zero(table) or clusters > 5 + self._geometry().clusters(len(table))

    def _find_l1(self, has_place: bool) -> None:
        """Take the L1 table that the file still has, if it is not a snapshot's.

        Where the header has a place for it, its content there may be what is lost: then another one is an
        older copy, for those to judge who place tables.
        """
        if has_place:
            return
        structures, bits = self._structures, self._numbers["cluster_bits"]
        found = structures.find_l1(bits)
        of_snapshots = {entry.snapshot.l1_table_offset for entry in self._snapshots_found()}
        of_others = of_snapshots | {self._numbers["refcount_table_offset"]}
        found = [table for table in found if table.offset not in of_others]
        counts = {table.offset: self._refcount(table.offset) for table in found}
        if any(counts.values()):
            found = [table for table in found if counts[table.offset]]
        if found:
            self._l1 = found[0]
        elif self._l1 is None and not has_place and structures.count_l2(bits) <= 1:
            self._l1 = structures.usual_l1(bits)
        if self._l1 is None or not self._l1.is_sure or not self._is_whole_story(self._l1, of_snapshots):
            self._doubtful.add("l1_table_offset")

    def _is_whole_story(self, found: FoundL1, of_snapshots: set[int]) -> bool:
        """Return if every cluster that looks like a table is one by an L1 table, or data by its tables.

        Else there may be another L1 table, a newer one, that is lost.
        """
        bits = self._numbers["cluster_bits"]
        tables = [found]
        for offset in of_snapshots:
            table = self._structures.l1_at(offset, bits)
            tables += [table] if table is not None else []
        strange = self._structures.unexplained(bits, tables)
        if strange is None:
            return False
        strange -= {self._numbers["refcount_table_offset"]} | of_snapshots
        is_of_bitmap = self._structures.is_of_bitmap
        return all(
            self._refcount(offset) == 0 or is_of_bitmap(offset, bits, self._refcount) for offset in strange
        )

    def _snapshots_found(self) -> list[TableEntry]:
        numbers = self._numbers
        header = Header(**self._numbers)
        offset, count = numbers["snapshots_offset"], numbers["nb_snapshots"]
        if self._is_there and 0 < count <= MAX_SNAPSHOTS and self._can_be_offset(offset):
            found = self._structures.snapshots_at(offset, count, header)
            if found:
                return found
        return self._structures.find_snapshots(header)[1]

    def _refcount(self, offset: int) -> int | None:
        """Return the refcount of a cluster; None where there is none."""
        numbers, geometry = self._numbers, self._geometry()
        if not numbers["refcount_table_clusters"]:
            return None
        cluster = offset >> geometry.cluster_bits
        index = cluster // geometry.refcounts_per_cluster
        place = numbers["refcount_table_offset"] + table_bytes(index)
        word = int.from_bytes(self._source.pread(table_bytes(1), place), "big")
        if not word or word % geometry.cluster_bytes or word >= self._source.size():
            return None
        block = self._source.pread(geometry.cluster_bytes, word)
        return _native.refcount_get(block, cluster % geometry.refcounts_per_cluster, geometry.refcount_order)

    # What else is there

    def _take_features(self) -> None:
        numbers, bits = self._numbers, self._numbers["cluster_bits"]
        features = numbers["incompatible_features"]
        unknown = features & ~(INCOMPATIBLE_KNOWN | INCOMPATIBLE_JOURNAL)
        if unknown and self._is_there:
            meaning = f"unknown incompatible features {unknown:#x}"
            self._infer("incompatible_features", features & INCOMPATIBLE_KNOWN, meaning)
        features &= INCOMPATIBLE_KNOWN
        if not self._is_there or unknown or self._disagrees(bool(features & INCOMPATIBLE_EXTENDED_L2)):
            extended = self._structures.has_subclusters(bits, self._l1)
            if extended != bool(features & INCOMPATIBLE_EXTENDED_L2):
                features ^= INCOMPATIBLE_EXTENDED_L2
                self._infer("incompatible_features", features, "whether L2 entries are extended is lost")
        if bits < layout.MIN_SUBCLUSTER_CLUSTER_BITS:
            features &= ~INCOMPATIBLE_EXTENDED_L2
        kind = numbers["compression_type"]
        if not self._is_there or kind > 1 or bool(kind) != bool(features & INCOMPATIBLE_COMPRESSION):
            found = self._structures.compression_type(bits, self._l1)
            if (found is not None and found != kind) or kind > 1:
                self._infer("compression_type", found, "the type of compressed data is lost")
            features &= ~INCOMPATIBLE_COMPRESSION
            features |= INCOMPATIBLE_COMPRESSION if numbers["compression_type"] else 0
        numbers["incompatible_features"] = features
        if numbers["crypt_method"] > 2:
            self._infer("crypt_method", None, f"crypt_method {numbers['crypt_method']} is none")

    def _take_encryption(self) -> None:
        """Look for the header of an encryption that the lost one of the image named."""
        if self._is_there or self._numbers["crypt_method"]:
            return
        self._encryption = self._structures.find_encryption(self._numbers["cluster_bits"], self._l1)
        if self._encryption is not None:
            self._infer("crypt_method", CRYPT_LUKS, "how it is encrypted is lost")

    def _disagrees(self, extended: bool) -> bool:
        """Return True if the first tables that the L1 table names are none with such entries."""
        bits = self._numbers["cluster_bits"]
        if self._l1 is None or bits < layout.MIN_SUBCLUSTER_CLUSTER_BITS:
            return extended and bits < layout.MIN_SUBCLUSTER_CLUSTER_BITS
        return not self._structures.first_table_fits(self._l1, bits, extended=extended)

    def _take_snapshots(self) -> None:
        numbers = self._numbers
        header = Header(**self._numbers)
        offset, count = numbers["snapshots_offset"], numbers["nb_snapshots"]
        if self._is_there and not count:
            return
        can_be = count <= MAX_SNAPSHOTS and self._can_be_offset(offset)
        found = self._structures.snapshots_at(offset, count, header) if can_be and count else []
        if can_be and count and len(found) == count:
            return
        place, entries = self._structures.find_snapshots(header)
        if len(entries) > len(found):
            offset, found = place, entries
        if found or self._is_there:
            self._infer("snapshots_offset", offset if found else None, "the snapshot table is lost")
            self._infer("nb_snapshots", len(found) or None, "how many snapshots there are is lost")
        numbers["nb_snapshots"] = len(found)

    def _take_size(self) -> None:
        numbers, geometry = self._numbers, self._geometry()
        size = numbers["size"]
        needed = self._l1_needed(size)
        is_short = self._l1 is not None and geometry.l1_entries_for(size) < self._l1.entry_count
        if size and not is_short and needed and needed <= max(1, numbers["l1_size"]):
            return
        if self._is_there and not size and self._l1 is None:
            return
        found = self._structures.mapped_bytes(self._l1, geometry) if self._l1 is not None else 0
        found = max([found, *(entry.snapshot.disk_bytes for entry in self._snapshots_found()[-1:])])
        if geometry.l1_entries_for(found) > layout.MAX_L1_ENTRIES:
            found = 0
        # As many tables as there seem to be: too much rather than too little.
        tables = 1 if self._l1 is not None else max(1, self._structures.count_l2(numbers["cluster_bits"]))
        default = min(tables, layout.MAX_L1_ENTRIES) * geometry.cluster_bytes * geometry.l2_entries
        self._infer("size", found or None, "the size of the disk is lost", default)
        numbers["l1_size"] = max(numbers["l1_size"], geometry.l1_entries_for(numbers["size"]))

    # Putting together

    def _geometry(self) -> Geometry:
        return Header(**self._numbers).geometry

    def _area(self, data: bytes) -> HeaderArea:
        """Return the header with the numbers as they are now, and what else of it can be read."""
        numbers = self._numbers
        least = V2_BYTES if numbers["version"] == 2 else V3_BYTES
        length = numbers["header_length"]
        if (
            length < least
            or length % EXTENSION_STRUCT.size
            or length > min(len(data), 1 << numbers["cluster_bits"])
        ):
            numbers["header_length"] = CREATED_HEADER_BYTES if numbers["version"] > 2 else V2_BYTES
        start, name_bytes = numbers["backing_file_offset"], numbers["backing_file_size"]
        if start and not (
            least <= start <= len(data) - name_bytes and 0 < name_bytes <= MAX_BACKING_NAME_BYTES
        ):
            self._infer("backing_file_offset", None, "where the name of the backing file is is lost")
            numbers["backing_file_size"] = 0
        packed = Header(**self._numbers).pack()
        found: tuple[Extension, ...] = ()
        if self._encryption is not None:
            place = luks.POINTER_STRUCT.pack(self._encryption.offset, self._encryption.length)
            found = (Extension(EXTENSION_ENCRYPTION, place),)
            packed += found[0].pack()
        tries: list[Callable[[], HeaderArea]] = [
            lambda: HeaderArea.parse(packed + data[len(packed) :]),
            lambda: HeaderArea.parse(packed),
        ]
        for attempt in tries if self._is_there else tries[1:]:
            with suppress(FormatError, CorruptionError):
                return attempt()
            self._damages.append(Damage("header", len(packed), "its extensions cannot be read"))
        return HeaderArea(Header(**self._numbers), found, packed)


def _journal_geometry(cluster_bits: int, root: bytes) -> Geometry:
    """Return how frames are read: the root need not be whole for that."""
    with suppress(FormatError):
        return replace(Header.unpack(root), cluster_bits=cluster_bits).geometry
    return Geometry(cluster_bits)
