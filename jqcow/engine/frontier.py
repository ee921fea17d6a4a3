"""Where the end of everything lies in the file or device of an image, and what room there is behind it.

S7. On a device of fixed size nothing is handed out, or reserved for a new journal, that does not lie on it.
"""

from __future__ import annotations

from collections.abc import Callable

from jqcow.device.base import no_space
from jqcow.engine.medium import Medium
from jqcow.ondisk.layout import ClusterIndex, Geometry


class Frontier:
    """The end of one image that is open for writing. The lock is held by the caller.

    Attributes:
        frontier: the cluster behind the end of everything.
        readable_bytes: length of the file, as far as it was asked for. What lies further is lost, unless
            `reaches` says that the file has grown.
        find_used_end: of a live image, finds the cluster behind the highest one with a refcount.
    """

    def __init__(self, medium: Medium, geometry: Geometry) -> None:
        self.medium = medium
        self.geometry = geometry
        self.frontier = ClusterIndex(0)
        self.readable_bytes = 0
        self.find_used_end: Callable[[], ClusterIndex] | None = None

    def reaches(self, end_bytes: int) -> bool:
        """Return True if the file reaches to host offset ``end_bytes``: what lies behind reads as zeros.

        A checkpoint makes the file of a live image longer, and so does whoever takes clusters at the
        frontier.
        """
        frontier = self.geometry.offset_of(self.frontier)
        self.readable_bytes = max(self.readable_bytes, self.medium.size(), frontier)
        if end_bytes > self.readable_bytes and self.find_used_end is not None:
            used_bytes = self.geometry.offset_of(self.find_used_end())
            self.readable_bytes = max(self.readable_bytes, used_bytes)
        return end_bytes <= self.readable_bytes

    @property
    def is_full(self) -> bool:
        """True if there is no cluster behind the frontier."""
        return not self._has_room(1)

    def _has_room(self, count: int) -> bool:
        room = self._room()
        return room is None or room >= count

    def _room(self) -> int | None:
        """Return how many clusters there are behind the frontier; None where the device grows."""
        if not self.medium.has_fixed_size:
            return None
        return max(0, self.medium.size() // self.geometry.cluster_bytes - self.frontier)

    def free_bytes(self) -> int | None:
        """Return how many bytes can be used behind the frontier, None where nobody knows."""
        room = self._room()
        return self.medium.free_bytes() if room is None else room * self.geometry.cluster_bytes

    def require_room(self, end: int) -> None:
        """Raise ``ENOSPC`` unless the clusters up to ``end`` lie within a device of fixed size (S7)."""
        room = self._room()
        if room is not None and end > self.frontier + room:
            needed = end * self.geometry.cluster_bytes
            raise no_space("the image", needed, None, self.medium.size())
