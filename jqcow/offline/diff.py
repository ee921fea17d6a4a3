"""Where two disks may differ, told from tables alone: nothing of what they hold is read.

Two ranges are known to be equal where both read as zeros, and where both show the same bytes of one file: a
cluster that an image and its snapshot share, or a part of what is below both disks. All else counts as
changed, though it may hold equal bytes; so does what is compressed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jqcow.device.disk import Extent
from jqcow.disks.chain import Chain
from jqcow.disks.image import ImageDisk

_Place = tuple[tuple[int, int], int]
"""Identity of a file, and where a byte lies in it less where the guest sees it."""


@dataclass(frozen=True)
class ChangedExtent:
    """A range of the newer disk that may differ from the older one's, in bytes.

    ``zero``: it reads as zeros now; ``data``: it is read from a file.
    """

    start: int
    length: int
    zero: bool
    data: bool


def changed_extents(older: Chain, newer: Chain) -> Iterator[ChangedExtent]:
    """Yield where two open disks may differ, in order and joined; past the end of a disk there are zeros.

    Raises:
        CorruptionError: a table on the way is damaged.
        OSError: the host failed.
    """
    waiting: ChangedExtent | None = None
    for offset, length, is_equal, is_zero in _pieces(older, newer):
        if is_equal:
            continue
        if waiting is not None and waiting.zero == is_zero and waiting.start + waiting.length == offset:
            waiting = replace(waiting, length=waiting.length + length)
            continue
        if waiting is not None:
            yield waiting
        waiting = ChangedExtent(offset, length, is_zero, not is_zero)
    if waiting is not None:
        yield waiting


def _pieces(older: Chain, newer: Chain) -> Iterator[tuple[int, int, bool, bool]]:
    """Yield (offset, length, are they equal, is the newer one zero) of ranges within one extent of each."""
    walks = older.extents(older.size, 0), newer.extents(newer.size, 0)
    heads = [next(walk, None) for walk in walks]
    offset, end_of_all = 0, newer.size
    while offset < end_of_all:
        end = min([end_of_all, *(head.end for head in heads if head is not None)])
        before, after = (_place(chain, head) for chain, head in zip((older, newer), heads, strict=True))
        is_equal = before == after and before is not _NOWHERE
        yield offset, end - offset, is_equal, after is None
        offset = end
        heads = [
            next(walk, None) if head is not None and head.end == end else head
            for walk, head in zip(walks, heads, strict=True)
        ]


_NOWHERE: _Place = ((-1, -1), -1)
"""Of what cannot be compared."""


def _place(chain: Chain, extent: Extent | None) -> _Place | None:
    """Return where an extent's bytes are, None where it reads as zeros."""
    if extent is None or not extent.holds_data:
        return None
    if extent.host_offset is None:
        return _NOWHERE
    layer = chain.layers[extent.depth]
    device = layer.data_device if isinstance(layer, ImageDisk) else layer.device
    identity = getattr(device, "identity", None)
    return _NOWHERE if identity is None else (identity(), extent.host_offset - extent.offset)
