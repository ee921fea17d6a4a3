"""Good images that the targets of the guided fuzzer lay their inputs over, and where their parts lie."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from random import Random

import jqcow
from jqcow.disks.making import write_blank
from jqcow.disks.view import FileView
from jqcow.ondisk import entries
from jqcow.ondisk import form as forms
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.header import Header
from jqcow.ondisk.layout import SECTOR_BYTES
from tests.fuzz.exercise import JOURNAL_BYTES, SALT, WHEN
from tests.fuzz.sparse import SparseDevice

PACKED_CLUSTERS = 4


@dataclass(frozen=True)
class Form:
    """What a base looks like. ``disk_clusters``: the length of its disk."""

    cluster_bits: int
    refcount_order: int = 4
    compression_type: int = 0
    disk_clusters: int = 200
    snapshots: int = 0
    live: bool = False


@dataclass(frozen=True)
class Base:
    """A good image, what it holds after a clean close, and the host offsets of its tables by name."""

    form: Form
    content: bytes
    view: FileView
    places: dict[str, list[int]]

    @property
    def header(self) -> Header:
        """The header as after a clean close."""
        return self.view.header

    @property
    def cluster_bytes(self) -> int:
        """The size of a cluster."""
        return 1 << self.form.cluster_bits

    @functools.cached_property
    def all_places(self) -> list[int]:
        """The header and every table, in order."""
        return [0, *(place for found in self.places.values() for place in found)]


@functools.cache
def base_of(form: Form) -> Base:
    """Return the base of a form: always the same."""
    chance = Random(repr(form))
    cluster = 1 << form.cluster_bits
    device = SparseDevice()
    blank = blank_image(
        form.disk_clusters * cluster,
        forms.Form(form.cluster_bits, form.refcount_order, form.compression_type),
    )
    write_blank(device, blank)
    image = jqcow.open_device(device, "r+", journal_size=JOURNAL_BYTES, new_salt=lambda: SALT)
    image.pwrite(chance.randbytes(3 * cluster), 0)
    image.write_zeroes(cluster, cluster, unmap=False)
    for number in range(form.snapshots):
        image.create_snapshot(f"{number} " + "long name " * 20, WHEN)
        image.pwrite(chance.randbytes(cluster), number * cluster)
    for number in range(PACKED_CLUSTERS):
        # A stream nearly as long as its cluster, so that a target has room for another one.
        packed = chance.randbytes(cluster * 4 // 5).ljust(cluster, b"c")
        image.pwrite_compressed(packed, (10 + number) * cluster)
    image.pwrite(chance.randbytes(cluster), image.size - cluster)
    image.flush()
    if form.live:
        image.pwrite(chance.randbytes(cluster), 20 * cluster)
        image.discard(cluster, 0)
        image.flush()
    if not form.live:
        image.close()
    device.reopen(read_only=True)
    view = FileView.of_file(device)
    return Base(form, device.pread(device.size(), 0), view, _places(view))


def _places(view: FileView) -> dict[str, list[int]]:
    header, cluster = view.header, view.geometry.cluster_bytes
    found: dict[str, list[int]] = {
        "L1 table": [header.l1_table_offset],
        "refcount table": [header.refcount_table_offset],
        "L2 table": [],
        "refcount block": [],
        "snapshot table": [header.snapshots_offset] if header.nb_snapshots else [],
    }
    for name, table in (
        ("L2 table", header.l1_table_offset),
        ("refcount block", header.refcount_table_offset),
    ):
        data = view.read(cluster, table)
        for index in range(4):
            place = entries.entry_at(data, index) & entries.OFFSET_MASK
            if place:
                found[name].append(place)
    if header.nb_snapshots:
        first = view.read(SECTOR_BYTES, header.snapshots_offset)
        found["L1 table"].append(int.from_bytes(first[:8], "big"))
    return found
