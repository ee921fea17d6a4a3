"""What is wrong with a header that can be read all the same. QEMU does not open such an image."""

from __future__ import annotations

from collections.abc import Iterator

from jqcow.errors import CorruptionError, FormatError
from jqcow.ondisk import features, layout, luks
from jqcow.ondisk.header import (
    AUTOCLEAR_DATA_FILE_RAW,
    BITMAPS_STRUCT,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_BITMAPS,
    EXTENSION_ENCRYPTION,
    EXTENSION_STRUCT,
    INCOMPATIBLE_EXTERNAL_DATA,
    V2_BYTES,
    V3_BYTES,
    Extension,
    Header,
    HeaderArea,
)

BACKING_FORMAT_BYTES_MAX = 15
"""The longest name of a format that QEMU opens."""

HOST_OFFSET_MAX = (1 << 63) - 1
"""What QEMU takes for an offset where a table has no entries."""

OVERRULED = "another one of its type follows, which counts"
"""What QEMU does not mind."""

CRYPT_METHOD_PLACE = 32
SNAPSHOTS_OFFSET_PLACE = 64
AUTOCLEAR_PLACE = 88


def header_faults(area: HeaderArea) -> Iterator[tuple[str, int, str]]:
    """Yield (structure, host offset, detail) of what is wrong in the header or one of its extensions."""
    header = area.header
    words = features.find_compression_type(area)
    if words is not None:
        yield "header", V3_BYTES, f"{words[0]}, which nothing reads"
    has_data_file = header.incompatible_features & INCOMPATIBLE_EXTERNAL_DATA
    if header.version > 2 and header.autoclear_features & AUTOCLEAR_DATA_FILE_RAW and not has_data_file:
        yield "header", AUTOCLEAR_PLACE, "a raw data file in an image that has no data file"
    is_nowhere = header.snapshots_offset > HOST_OFFSET_MAX or header.snapshots_offset % (
        1 << header.cluster_bits
    )
    if not header.nb_snapshots and is_nowhere:
        yield "header", SNAPSHOTS_OFFSET_PLACE, f"a snapshot table at {header.snapshots_offset:#x}"
    try:
        luks.pointer_of(area)
    except (CorruptionError, FormatError) as error:
        yield "header", CRYPT_METHOD_PLACE, str(error)
    position = V2_BYTES if header.version == 2 else header.header_length
    for extension in area.extensions:
        detail = _fault(extension, header)
        if area.find(extension.type) is not extension:
            detail = OVERRULED
        if detail is not None:
            yield f"header extension {extension.type:#010x}", position, detail
        position += EXTENSION_STRUCT.size + layout.round_up(len(extension.data), 8)


def _fault(extension: Extension, header: Header) -> str | None:
    length = len(extension.data)
    if extension.type == EXTENSION_BACKING_FORMAT and length > BACKING_FORMAT_BYTES_MAX:
        return f"a format of {length} bytes"
    if extension.type == EXTENSION_ENCRYPTION and not header.crypt_method:
        return "encryption in an image that is not encrypted"
    if extension.type == EXTENSION_BITMAPS and length != BITMAPS_STRUCT.size:
        return f"{length} bytes instead of {BITMAPS_STRUCT.size}"
    return None
