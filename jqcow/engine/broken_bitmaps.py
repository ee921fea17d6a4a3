"""Bitmaps that are damaged: told apart from those that are sound, and given up by a repair."""

from __future__ import annotations

from contextlib import suppress

from jqcow.engine.bitmaps import Bitmaps
from jqcow.errors import CorruptionError
from jqcow.ondisk import bitmaps as ondisk
from jqcow.ondisk.bitmaps import BitmapEntry, Directory, Place
from jqcow.ondisk.layout import ClusterIndex, HostOffset


class BrokenBitmaps:
    """The bitmaps of one image that no image can have, through one view."""

    def __init__(self, bitmaps: Bitmaps) -> None:
        self._bitmaps = bitmaps
        self._view = bitmaps.view
        self._space = bitmaps.space
        self._geometry = bitmaps.geometry

    def give_up(self, others: set[ClusterIndex]) -> None:
        """Forget the bitmaps that are damaged, before a repair counts what there is; `stage` follows.

        A bitmap stays if its entry, its table and the places of all its bits are those of a bitmap, and not
        among ``others``, which hold other metadata.
        """
        area, taken = self._view.area, set(others)
        found = ondisk.read_directory(self._bitmaps.read_host, area, without_broken=True)
        own = [
            cluster
            for _, cluster in self._bitmaps.run_of("bitmap directory", found.offset, found.length_bytes)
        ]
        is_apart = taken.isdisjoint(own)
        taken.update(own)
        sound = [entry for entry in found.entries if is_apart and self.is_sound(entry, taken)]
        announced = ondisk.announced_in(area)
        if len(sound) == announced:
            return
        length = len(ondisk.pack_directory(sound))
        self._space.sound_bitmaps = Directory(tuple(sound), found.offset if sound else 0, length)
        self._space.given_up_bitmaps = max(1, announced - len(sound))
        self._space.abandoned = (self._named_by_broken() - taken) | (set(own) - others)

    def _named_by_broken(self) -> set[ClusterIndex]:
        """Return what all bitmaps that can be told apart have, or seem to have."""
        found: set[ClusterIndex] = set()
        with suppress(CorruptionError):
            place = ondisk.place_of(self._view.area)
            for _, entry in ondisk.read_entries(self._bitmaps.read_host, place) if place is not None else ():
                if entry.has_table(self._view.header):
                    with suppress(CorruptionError):
                        found.update(cluster for _, cluster in self._bitmaps.clusters_of(entry))
        return found

    def is_sound(self, entry: BitmapEntry, taken: set[ClusterIndex]) -> bool:
        """Return True if a bitmap can be believed to be one; what it has is taken then."""
        seen: set[ClusterIndex] = set()
        file_end = self._geometry.clusters(self._view.blocks.medium.size())
        try:
            for _, cluster in self._bitmaps.clusters_of(entry):
                if (
                    cluster in seen
                    or cluster in taken
                    or (cluster >= file_end and not self._view.holds(self._geometry.offset_of(cluster)))
                ):
                    return False
                seen.add(cluster)
        except CorruptionError:
            return False
        taken |= seen
        return True

    def stage(self) -> None:
        """Write the directory that `give_up` left where it is: it has not become longer."""
        sound = self._space.sound_bitmaps
        if sound is not None:
            data = ondisk.pack_directory(sound.entries)
            self._bitmaps.edit(HostOffset(sound.offset), data)
            self._bitmaps.name_directory(Place(len(sound.entries), len(data), sound.offset))
