"""What a header can announce, and what jqcow does about it: one table, which all openings and checks use.

What is refused is refused by name, never misread. `docs/format` tells the same of reading and writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from jqcow.errors import UnsupportedFeatureError, printable
from jqcow.ondisk import header as headers
from jqcow.ondisk import layout
from jqcow.ondisk.header import (
    FEATURE_NAME_STRUCT,
    TYPE_AUTOCLEAR,
    TYPE_COMPATIBLE,
    TYPE_INCOMPATIBLE,
    HeaderArea,
)

Use = Literal["read", "write", "check", "repair"]
"""What is to be done with an image. ``repair`` writes; what is wrong is put right before anything else."""

_COMPRESSION_TYPE_MAX = 1

Words = tuple[str, str]
"""What an error says: the feature, and details or nothing."""

Find = Callable[[HeaderArea], Words | None]


@dataclass(frozen=True)
class Feature:
    """Something that a header can announce, after replay where a journal is live.

    Attributes:
        name: what `docs/format` calls it.
        find: returns the words for an error if a header announces it, None if not.
        read: True where an image with it can be read; and so on.
        write: see ``read``.
        check: see ``read``.
        repair: see ``read``.
    """

    name: str
    find: Find
    read: bool
    write: bool
    check: bool
    repair: bool

    def allows(self, use: Use) -> bool:
        """Return True if an image with this feature can be used so."""
        allowed: bool = getattr(self, use)
        return allowed


def refuse(area: HeaderArea, use: Use) -> None:
    """Raise UnsupportedFeatureError, by name, if an image with this header cannot be used so.

    Reading is refused where it could show the guest wrong bytes, writing where it could damage the image or
    make it lie, and a check where it would miss references.
    """
    for feature in FEATURES:
        words = None if feature.allows(use) else feature.find(area)
        if words is not None:
            raise UnsupportedFeatureError(*words)


def _if_set(bit: int, name: str, detail: str = "") -> Find:
    return lambda area: (name, detail) if area.header.incompatible_features & bit else None


def _find_unknown_bits(area: HeaderArea) -> Words | None:
    listed = ", ".join(printable(name) for name in unknown_features(area))
    return (f"incompatible feature {listed}", "") if listed else None


def unknown_features(area: HeaderArea) -> tuple[str, ...]:
    """Return the unknown incompatible bits, in the words of the image's own feature name table."""
    known = headers.INCOMPATIBLE_KNOWN | headers.INCOMPATIBLE_JOURNAL
    return _unknown(area, TYPE_INCOMPATIBLE, area.header.incompatible_features & ~known)


def ignored_features(area: HeaderArea) -> tuple[str, ...]:
    """Return the unknown bits that keep nobody from reading: compatible and autoclear ones."""
    compatible = area.header.compatible_features & ~headers.COMPATIBLE_LAZY_REFCOUNTS
    autoclear = area.header.autoclear_features & ~headers.AUTOCLEAR_KNOWN
    return (
        *(f"compatible {found}" for found in _unknown(area, TYPE_COMPATIBLE, compatible)),
        *(f"autoclear {found}" for found in _unknown(area, TYPE_AUTOCLEAR, autoclear)),
    )


def _unknown(area: HeaderArea, mask: int, bits: int) -> tuple[str, ...]:
    names = dict(_own_names(area, mask))
    found = [bit for bit in range(64) if bits >> bit & 1]
    return tuple(f"bit {bit} ({names[bit]})" if bit in names else f"bit {bit}" for bit in found)


def _own_names(area: HeaderArea, mask: int) -> Iterator[tuple[int, str]]:
    """Yield (bit, name) of the features of one mask that the image names."""
    table = area.find(headers.EXTENSION_FEATURE_NAMES)
    data = table.data if table else b""
    # QEMU reads a last entry that is cut short, too.
    whole = data.ljust(layout.round_up(len(data), FEATURE_NAME_STRUCT.size), b"\0")
    for kind, bit, name in FEATURE_NAME_STRUCT.iter_unpack(whole):
        if kind == mask:
            yield bit, name.partition(b"\0")[0].decode("utf-8", "replace")


def _find_snapshots_outside(area: HeaderArea) -> Words | None:
    if not area.header.has_data_file or not area.header.nb_snapshots:
        return None
    return "snapshots of an image with an external data file", "they would change with the disk"


def _find_encryption(area: HeaderArea) -> Words | None:
    method = area.header.crypt_method
    if method in (headers.CRYPT_NONE, headers.CRYPT_LUKS):
        return None
    what = "AES without LUKS, which is broken: " if method == headers.CRYPT_AES else ""
    return "encryption", f"{what}crypt_method {method}"


def find_compression_type(area: HeaderArea) -> Words | None:
    """Find a compression type that is unknown, or that the feature bit contradicts."""
    kind = area.header.compression_type
    is_announced = bool(area.header.incompatible_features & headers.INCOMPATIBLE_COMPRESSION)
    is_known = kind <= _COMPRESSION_TYPE_MAX and is_announced == bool(kind)
    return None if is_known else (f"compression type {kind}", "")


_JOURNAL = _if_set(headers.INCOMPATIBLE_JOURNAL, "a live journal (it must be replayed first)")
_CORRUPT = _if_set(headers.INCOMPATIBLE_CORRUPT, "writing to an image marked corrupt", "repair it first")
_NO, _YES = False, True

FEATURES = (
    #       name                         find                    read  write check repair
    Feature("live journal",              _JOURNAL,               _NO,  _NO,  _NO,  _NO),
    Feature("snapshots and data file",   _find_snapshots_outside, _YES, _NO,  _YES, _YES),
    Feature("unknown incompatible bits", _find_unknown_bits,     _NO,  _NO,  _NO,  _NO),
    Feature("AES encryption",            _find_encryption,       _NO,  _NO,  _NO,  _NO),
    Feature("unknown compression type",  find_compression_type, _NO,  _NO,  _YES, _NO),
    Feature("corrupt bit",               _CORRUPT,               _YES, _NO,  _YES, _YES),
)  # fmt: skip
"""Whatever is not listed is no hindrance: the dirty bit, known compression types, compatible bits."""
