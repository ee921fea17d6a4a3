"""The persistent bitmaps of an image, copied into a new one that nobody sees yet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from jqcow import _native
from jqcow.device.base import Device
from jqcow.disks.image import ImageDisk
from jqcow.engine.bitmaps import Bitmaps
from jqcow.engine.bits import STEP_BYTES
from jqcow.engine.broken_bitmaps import BrokenBitmaps
from jqcow.engine.engine import Engine, make_writable, open_engine
from jqcow.engine.medium import Medium
from jqcow.errors import CorruptionError
from jqcow.ondisk import bitmaps as ondisk
from jqcow.ondisk.bitmaps import BitmapEntry
from jqcow.ondisk.layout import ClusterIndex

Which = Literal["all", "sound"]
"""``all``, none of which may be broken, or those that are ``sound``."""
_JOURNAL_BYTES = 1 << 20


@dataclass(frozen=True)
class ChosenBitmaps:
    """The bitmaps of an image that are to be copied, and the names of those that are not."""

    source: Bitmaps | None = None
    entries: tuple[BitmapEntry, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of those that are to be copied."""
        return tuple(entry.text for entry in self.entries)

    def copy_to(self, device: Device) -> None:
        """Add them to the image on a device, whose disk has the same size. The device stays open.

        Raises:
            UnsupportedFeatureError: the image's header has no room for them.
            CorruptionError: a table of the source is damaged.
            OSError: the host failed.
        """
        if self.source is None or not self.entries:
            return
        opened = open_engine(Medium(device), writable=True, journal_bytes=_JOURNAL_BYTES)
        make_writable(opened)
        engine = opened.engine
        engine.lifecycle.go_live(engine.medium.require_healthy)
        for entry in self.entries:
            _add(engine, entry)
            _copy_bits(self.source, entry, engine)
        engine.closing.clean()


NO_BITMAPS = ChosenBitmaps()


def choose(disk: ImageDisk, which: Which) -> ChosenBitmaps:
    """Find the bitmaps of an image that are to be copied.

    Raises:
        ValueError: neither ``all`` nor ``sound``.
        BitmapError: one was left in use, or is of an unknown kind.
        CorruptionError: the directory or a table is damaged.
    """
    if which not in ("all", "sound"):
        raise ValueError(f"bitmaps are 'all' or 'sound', not {which!r}")
    bitmaps, skip_broken = disk.bitmaps, which == "sound"
    read, area = bitmaps.read_host, disk.area
    directory = ondisk.read_directory(read, area, without_broken=skip_broken)
    chosen, taken = list[BitmapEntry](), set[ClusterIndex]()
    for entry in directory.entries:
        is_sound = BrokenBitmaps(bitmaps).is_sound(entry, taken)
        if is_sound and entry.is_usable:
            chosen.append(entry)
        elif not skip_broken:
            _refuse(bitmaps, entry, is_sound=is_sound)
    told = list[str]()
    if len(chosen) < ondisk.announced_in(area):
        told = ["what the directory has besides"]
        with suppress(CorruptionError):
            names = {entry.name for entry in chosen}
            place = ondisk.place_of(area)
            found = () if place is None else tuple(ondisk.read_entries(read, place))
            told = [entry.text for _, entry in found if entry.name not in names]
    return ChosenBitmaps(bitmaps, tuple(chosen), tuple(told))


def _refuse(bitmaps: Bitmaps, entry: BitmapEntry, *, is_sound: bool) -> None:
    if is_sound:
        bitmaps.usable(entry.text)
    detail = f"bitmap {entry.text!r}: what it names is not its own, or not there"
    raise CorruptionError("bitmap table", entry.table_offset, detail)


def _change(engine: Engine, change: Callable[[Bitmaps], None]) -> None:
    with engine.medium.lock, engine.public.operation():
        change(engine.public.bitmaps)
    engine.commits.flush_if_large(engine.medium.require_healthy)


def _add(engine: Engine, entry: BitmapEntry) -> None:
    is_enabled = entry.is_enabled
    _change(engine, lambda bitmaps: bitmaps.add(entry.text, entry.granularity_bits, enabled=is_enabled))


def _copy_bits(source: Bitmaps, entry: BitmapEntry, engine: Engine) -> None:
    bits = entry.bits_for(source.view.header.size)
    total = bits + 7 >> 3
    for start in range(0, total, STEP_BYTES):
        data = source.read(entry, start, min(STEP_BYTES, total - start))
        if start + len(data) == total and bits & 7:
            # Nothing behind the end of the disk.
            data = data[:-1] + bytes([data[-1] & (1 << (bits & 7)) - 1])
        if not _native.is_zero(data):
            _change(engine, partial(_write, name=entry.text, start=start, data=data))


def _write(bitmaps: Bitmaps, name: str, start: int, data: bytes) -> None:
    bitmaps.write(bitmaps.find(name), start, data)
