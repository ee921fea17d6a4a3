"""What a header can announce, and what jqcow does about it: read, write, or refuse by name."""

from __future__ import annotations

from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk import header as headers
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.root import FEATURE_NAME_STRUCT

INCOMPATIBLE_TYPE = 0


def refuse_reading(area: HeaderArea) -> None:
    """Raise UnsupportedFeatureError if reading could show the guest wrong bytes."""
    header = area.header
    if header.incompatible_features & headers.INCOMPATIBLE_EXTERNAL_DATA:
        raise UnsupportedFeatureError("an external data file")
    if header.incompatible_features & headers.INCOMPATIBLE_EXTENDED_L2:
        raise UnsupportedFeatureError("extended L2 entries (subclusters)")
    unknown = header.incompatible_features & ~headers.INCOMPATIBLE_KNOWN
    if unknown:
        raise UnsupportedFeatureError(f"incompatible feature {_feature_names(area, unknown)}")
    if header.crypt_method:
        raise UnsupportedFeatureError("encryption", f"crypt_method {header.crypt_method}")
    known_compression = header.incompatible_features & headers.INCOMPATIBLE_COMPRESSION
    if bool(known_compression) != bool(header.compression_type) or header.compression_type > 1:
        raise UnsupportedFeatureError(f"compression type {header.compression_type}")


def refuse_writing(area: HeaderArea, *, repairing: bool = False) -> None:
    """Raise UnsupportedFeatureError if writing could damage the image or make it lie.

    ``repairing`` allows an image that is marked corrupt: it is repaired and checked before anything else.
    """
    refuse_reading(area)
    header = area.header
    if header.version < 3:
        raise UnsupportedFeatureError(
            "writing to a version 2 image", "it has no feature bits; amend it to version 3"
        )
    if header.incompatible_features & headers.INCOMPATIBLE_CORRUPT and not repairing:
        raise UnsupportedFeatureError("writing to an image marked corrupt", "repair it first")
    if area.find(headers.EXTENSION_BITMAPS) is not None:
        raise UnsupportedFeatureError("writing to an image with persistent bitmaps")


def _feature_names(area: HeaderArea, bits: int) -> str:
    """Name unknown bits in the words of the image's own feature name table, where it has them."""
    names: dict[int, str] = {}
    table = area.find(headers.EXTENSION_FEATURE_NAMES)
    for position in range(0, len(table.data) if table else 0, FEATURE_NAME_STRUCT.size):
        entry = table.data[position : position + FEATURE_NAME_STRUCT.size] if table else b""
        if len(entry) == FEATURE_NAME_STRUCT.size:
            kind, bit, name = FEATURE_NAME_STRUCT.unpack(entry)
            if kind == INCOMPATIBLE_TYPE:
                names[bit] = name.rstrip(b"\0").decode("utf-8", "replace")
    found = [bit for bit in range(64) if bits >> bit & 1]
    return ", ".join(f"bit {bit} ({names[bit]})" if bit in names else f"bit {bit}" for bit in found)
