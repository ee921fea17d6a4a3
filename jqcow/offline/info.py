"""What an image file is: its header's facts, its snapshots and what it takes on the host."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jqcow.checker.header import header_faults
from jqcow.device.file import FileDevice
from jqcow.disks.files import open_to_read
from jqcow.disks.policy import Following
from jqcow.disks.raw import RawDisk
from jqcow.disks.view import FileView, open_view
from jqcow.errors import CorruptionError, FormatError
from jqcow.ondisk import header as headers
from jqcow.ondisk import luks, naming, snapshots
from jqcow.ondisk.bitmaps import Bitmap, read_bitmaps
from jqcow.ondisk.features import ignored_features, unknown_features
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.naming import DiskFormat, NamedFile
from jqcow.ondisk.snapshots import Snapshot

if TYPE_CHECKING:
    from jqcow.checker.check import CheckReport

STAT_BLOCK_BYTES = 512
"""The unit of st_blocks, whatever the file system's block size."""


_ENCRYPTION: dict[int, Literal["aes", "luks"]] = {1: "aes", 2: "luks"}


@dataclass(frozen=True)
class LiveJournal:
    """The journal of an image that was not closed. Offset and lengths in bytes.

    ``pending_bytes``: what the guest wrote, and no table shows yet.
    """

    offset: int
    length: int
    epoch: int
    record_count: int
    torn_tail: bool
    pending_bytes: int = 0


@dataclass(frozen=True)
class ExternalData:
    """The file that has the data instead of the image: its name, None if none is stored, and if it is raw."""

    name: str | None
    is_raw: bool


@dataclass(frozen=True)
class SlotFacts:
    """A key slot; ``iters`` and ``stripes`` are None where it has no passphrase. ``key_offset`` in bytes."""

    key_offset: int
    iters: int | None = None
    stripes: int | None = None


@dataclass(frozen=True)
class LuksFacts:
    """What a LUKS header says, in qemu-img's words; ``payload_offset`` in bytes."""

    cipher_alg: str
    cipher_mode: str
    ivgen_alg: str
    ivgen_hash_alg: str | None
    hash_alg: str
    uuid: str
    payload_offset: int
    master_key_iters: int
    slots: tuple[SlotFacts, ...]


@dataclass(frozen=True)
class Qcow2Facts:
    """What only a qcow2 image has: all that its header announces, whether or not jqcow can open it.

    ``header_faults``: what is wrong in the header, in words; QEMU does not open an image with such.
    """

    cluster_size: int
    version: int
    compression_type: Literal["zlib", "zstd"]
    lazy_refcounts: bool
    refcount_bits: int
    dirty: bool
    corrupt: bool
    extended_l2: bool
    backing_file: str | None
    backing_format: str | None
    snapshots: tuple[Snapshot, ...]
    journal: LiveJournal | None
    bitmaps: tuple[Bitmap, ...]
    encryption: Literal["aes", "luks", "unknown"] | None
    luks: LuksFacts | None
    external_data: ExternalData | None
    unknown_features: tuple[str, ...]
    unknown_incompatible: int
    l1_table_offset: int
    header_faults: tuple[str, ...]


@dataclass(frozen=True)
class ImageFacts:
    """What a file is; in bytes ``virtual_size`` of the disk, ``actual_size`` on the host, None: unknown."""

    filename: str
    format: DiskFormat
    virtual_size: int
    actual_size: int | None
    qcow2: Qcow2Facts | None


def read_info(
    path: str | os.PathLike[str], image_format: DiskFormat | None = None, *, force_share: bool = False
) -> ImageFacts:
    """Return the facts about an image file; a live journal is read, not replayed into the file.

    Args:
        path: the file.
        image_format: None tells it by the magic.
        force_share: look also while another program writes, unless its journal is live.

    Raises:
        JqcowError: not an image of this format, damaged, or in use by a writer.
        OSError: the host failed.
    """
    device, known = open_to_read(path, image_format, share_writers=force_share)
    try:
        return _facts(device, known)[0]
    finally:
        device.close()


def read_chain(
    path: str | os.PathLike[str], image_format: DiskFormat | None = None, *, following: Following
) -> list[ImageFacts]:
    """Return the facts about every file of a chain, from the top; the files are opened one after another.

    Args:
        path: of the image at the top.
        image_format: of that image; None tells it by its magic.
        following: how the names inside images are followed.

    Raises:
        JqcowError, OSError: as `jqcow.disks.chain.walk_below`.
    """
    from jqcow.disks.chain import walk

    def visit(device: FileDevice, known: DiskFormat) -> tuple[ImageFacts, NamedFile | None]:
        facts, area = _facts(device, known)
        named = None if area is None else naming.backing_file_of(area, device.path)
        device.close()
        return facts, named

    return list(walk(path, image_format, following, visit))


def _facts(device: FileDevice, known: DiskFormat) -> tuple[ImageFacts, HeaderArea | None]:
    """Return the facts about an open file, and its header if it has one."""
    actual_bytes = None
    if device.is_on_host:
        actual_bytes = os.stat(device.path).st_blocks * STAT_BLOCK_BYTES
    if known == "raw":
        return ImageFacts(device.path, known, RawDisk(device).size, actual_bytes, None), None
    view = FileView.of_file(device)
    facts = ImageFacts(device.path, known, view.header.size, actual_bytes, _qcow2_facts(view))
    return facts, view.area


def _qcow2_facts(view: FileView) -> Qcow2Facts:
    header = view.header
    incompatible = header.incompatible_features
    backing_format = view.area.find(headers.EXTENSION_BACKING_FORMAT)
    name = view.area.data[header.backing_file_offset :][: header.backing_file_size]
    return Qcow2Facts(
        cluster_size=1 << header.cluster_bits,
        version=header.version,
        compression_type="zstd" if header.compression_type else "zlib",
        lazy_refcounts=bool(header.compatible_features & headers.COMPATIBLE_LAZY_REFCOUNTS),
        refcount_bits=1 << header.refcount_order,
        dirty=bool(incompatible & headers.INCOMPATIBLE_DIRTY),
        corrupt=bool(incompatible & headers.INCOMPATIBLE_CORRUPT),
        extended_l2=bool(incompatible & headers.INCOMPATIBLE_EXTENDED_L2),
        backing_file=name.decode("utf-8", "replace") if header.backing_file_offset else None,
        backing_format=backing_format.data.decode("utf-8", "replace") if backing_format else None,
        snapshots=_readable_snapshots(view),
        journal=_live_journal(view),
        bitmaps=_readable_bitmaps(view),
        encryption=_ENCRYPTION.get(header.crypt_method, "unknown") if header.crypt_method else None,
        luks=_luks(view),
        external_data=_external_data(view.area),
        unknown_features=(*unknown_features(view.area), *ignored_features(view.area)),
        unknown_incompatible=incompatible & ~(headers.INCOMPATIBLE_KNOWN | headers.INCOMPATIBLE_JOURNAL),
        l1_table_offset=header.l1_table_offset,
        header_faults=tuple(detail for _, _, detail in header_faults(view.area)),
    )


def _external_data(area: HeaderArea) -> ExternalData | None:
    if not area.header.incompatible_features & headers.INCOMPATIBLE_EXTERNAL_DATA:
        return None
    name = area.find(headers.EXTENSION_EXTERNAL_DATA)
    is_raw = bool(area.header.autoclear_features & headers.AUTOCLEAR_DATA_FILE_RAW)
    return ExternalData(None if name is None else name.data.decode("utf-8", "replace"), is_raw)


def _luks(view: FileView) -> LuksFacts | None:
    """Return what the LUKS header says; None without one, and where it is damaged."""
    try:
        pointer = luks.pointer_of(view.area)
        if pointer is None:
            return None
        header = luks.LuksHeader.unpack(view.read(luks.HEADER_BYTES, pointer.offset))
    except (CorruptionError, FormatError):
        return None
    mode, _, generator = header.mode.partition("-")
    generator, _, generator_hash = generator.partition(":")
    return LuksFacts(
        cipher_alg=f"{header.cipher}-{header.cipher_bits}",
        cipher_mode=mode,
        ivgen_alg=generator,
        # Other generators use none, whatever is written there.
        ivgen_hash_alg=generator_hash if generator == "essiv" else None,
        hash_alg=header.hash,
        uuid=header.uuid,
        payload_offset=header.payload_sector * SECTOR_BYTES,
        master_key_iters=header.digest_iterations,
        slots=tuple(
            SlotFacts(slot.material_offset, slot.iterations, slot.stripes)
            if slot.is_active
            else SlotFacts(slot.material_offset)
            for slot in header.slots
        ),
    )


def _snapshots(view: FileView) -> tuple[Snapshot, ...]:
    header = view.header
    table = snapshots.parse_table(view.read, header.snapshots_offset, header.nb_snapshots, header=header)
    return table.snapshots


def _readable_snapshots(view: FileView) -> tuple[Snapshot, ...]:
    """Return the snapshots, none where their table is damaged: the disk is there all the same."""
    try:
        return _snapshots(view)
    except (CorruptionError, FormatError):
        return ()


def _readable_bitmaps(view: FileView) -> tuple[Bitmap, ...]:
    """Return the bitmaps, none where their directory is damaged."""
    try:
        return read_bitmaps(view.read, view.area)
    except (CorruptionError, FormatError):
        return ()


def read_snapshots(path: str | os.PathLike[str], *, force_share: bool = False) -> tuple[Snapshot, ...]:
    """Return the internal snapshots of an image file in the order of its table; a live image's as replayed.

    ``force_share`` looks also while another program writes, unless its journal is live.

    Raises:
        JqcowError: not a qcow2 image, a damaged snapshot table, or an image in use by a writer.
        OSError: the host failed.
    """
    with open_view(path, share_writers=force_share) as view:
        return _snapshots(view)


def _live_journal(view: FileView) -> LiveJournal | None:
    scan = view.scan
    if scan is None:
        return None
    extent = scan.extent
    torn = scan.torn_tail is not None
    waiting = sum(len(intent.data) for intent in view.intents)
    return LiveJournal(extent.offset, extent.length, scan.epoch, len(scan.frames), torn, waiting)


def check_file(path: str | os.PathLike[str], *, force_share: bool = False) -> CheckReport:
    """Check the refcounts and tables of an image file; a live image is checked as replayed. Writes nothing.

    ``force_share`` looks also while another program writes, unless its journal is live.

    Raises:
        JqcowError: the metadata cannot be walked, or the image is in use by a writer.
        OSError: the host failed.
    """
    from jqcow.checker.check import check_structure

    with open_view(path, share_writers=force_share) as view:
        return check_structure(view.read, view.size(), reserved=view.reserved)
