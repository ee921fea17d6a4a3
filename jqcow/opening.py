"""Creating and opening images: by path, with their backing files, or on a device of the caller's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from jqcow.backing import Chain, Part, open_chain
from jqcow.backing import Opened as OpenedLayer
from jqcow.device.base import Backing, Device
from jqcow.device.file import FileDevice
from jqcow.engine import recovery
from jqcow.engine.medium import Medium
from jqcow.engine.repair import What, clear_corrupt_bit
from jqcow.engine.store import Store, random_salt
from jqcow.errors import CorruptionError, FileAccessDenied, ImageInUse
from jqcow.image import Image, Mode
from jqcow.ondisk import header as headers
from jqcow.ondisk import layout, naming
from jqcow.ondisk import root as roots
from jqcow.ondisk.blank import BlankImage, blank_image, cluster_bits_of, refcount_order_of
from jqcow.ondisk.compression import CompressionType, compression_type_of
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.naming import BackingFormat, FilePolicy, NamedFile

DEFAULT_CLUSTER_BYTES = 65536


def create(
    path: str | os.PathLike[str],
    size: int,
    *,
    cluster_size: int = DEFAULT_CLUSTER_BYTES,
    refcount_bits: int = 16,
    compression_type: CompressionType = "zlib",
    backing_file: str | None = None,
    backing_format: BackingFormat | None = None,
    allow_files: FilePolicy = False,
    overwrite: bool = False,
    journal_size: int = roots.DEFAULT_JOURNAL_BYTES,
) -> Image:
    """Create an image and return it open for reading and writing.

    The file appears under its name at once and whole; it and its directory are durable on return.

    Args:
        path: where; an existing file is refused unless ``overwrite``.
        size: of the disk in bytes, a multiple of 512.
        cluster_size: in bytes, a power of two from 512 to 2 MiB.
        refcount_bits: width of a refcount, a power of two from 1 to 64. A refcount of 1 bit allows no
            snapshots.
        compression_type: of the clusters that `Image.pwrite_compressed` writes.
        backing_file: the file whose disk shows where nothing was written. The name is stored as it is, and is
            relative to the directory of the image.
        backing_format: of the backing file; needed with it.
        allow_files: whether the files may be opened that the backing file names, as in `open`.
        overwrite: replace an existing file, if nobody uses it.
        journal_size: in bytes, of the journal that writing will use; a multiple of 8192 from 64 KiB to 1 GiB.

    Raises:
        ValueError: a size that no image can have, or a name that cannot be stored.
        FileAccessDenied: the backing file names another one.
        JqcowError: the backing file cannot be read.
        FileExistsError: the file exists.
        ImageInUse: the file to be replaced is in use.
        OSError: the host failed; nothing is left under the name.
    """
    _check_journal_size(journal_size)
    layout.check_disk_size(size)
    blank = blank_image(
        size,
        cluster_bits_of(cluster_size),
        refcount_order=refcount_order_of(refcount_bits),
        compression_type=compression_type_of(compression_type),
        backing_file=backing_file,
        backing_format=backing_format,
    )
    target = os.fspath(path)
    device = FileDevice.create_temporary(path)
    try:
        _write_blank(device, blank)
        named = naming.backing_file_of(HeaderArea.parse(blank.parts[0][1]), target)
        # Before the name: an image whose backing file cannot be read is of no use.
        policy = _allowing_the_first(target, allow_files)
        chain = None if named is None else open_chain(named, device.identity(), policy, _open_layer)
        try:
            device.publish(overwrite)
            return _open(device, "r+", journal_size=journal_size, find_backing=lambda store: chain)
        except BaseException:
            if chain is not None:
                chain.close()
            raise
    except BaseException:
        device.close()
        raise


def open(
    path: str | os.PathLike[str],
    mode: Mode = "r",
    *,
    journal_size: int | None = None,
    force_share: bool = False,
    snapshot: str | None = None,
    repair: What | None = None,
    allow_files: FilePolicy = False,
    probe: bool = False,
    copy_on_read: bool = False,
) -> Image:
    """Open an existing image.

    ``"r"`` never writes a byte: a live journal is replayed into memory. ``"r+"`` recovers a crashed image
    first, and counts the refcounts anew of one whose dirty bit says that they may be wrong (QEMU's
    ``lazy_refcounts``). Any other clean image is changed only by the first write.

    Args:
        path: the image.
        mode: ``"r"`` or ``"r+"``.
        journal_size: in bytes, of the journal that writing will use; None keeps what there is, or 8 MiB.
        force_share: with ``"r"``, read also while another program writes, as ``qemu-img -U`` does. What is
            read may then be old, mixed or wrong. A live journal is refused: it would be replayed while its
            writer goes on.
        snapshot: with ``"r"``, the id or name of an internal snapshot to read instead of the disk.
        repair: with ``"r+"``, make refcounts and COPIED flags right before anything else, in one transaction:
            ``"leaks"`` what is too high, ``"all"`` what is too low as well. With ``"all"`` an image marked
            corrupt opens too, and loses the mark if a check then finds nothing. `Image.repaired` tells what
            was wrong.
        allow_files: whether backing files may be opened that the image names, and those that they name:
            none, all (True), or what a function says that is given a `NamedFile`. They are opened for
            reading, and locked against writers. A name is relative to the image that holds it.
        probe: tell the format of a backing file by its magic where the image does not store it; otherwise
            such a file is refused. Whoever writes to the guest's disk of a raw file then chooses its format.
        copy_on_read: with ``"r+"``, what is read from a backing file is written into the image, cluster by
            cluster; durable with the next flush, like any write. A read may then fail as a write does.

    Raises:
        FileAccessDenied: the image has a backing file, and opening it is not allowed.
        ValueError: another mode, ``force_share`` or a snapshot for writing, a repair or copy on read without
            writing, or a journal size that no journal can have.
        SnapshotNotFound: there is no such snapshot.
        FormatError: not a qcow2 image; UnsupportedFeatureError where jqcow refuses it by name.
        CorruptionError: the image is damaged.
        ImageInUse: another process uses it, or this one by another `Image`.
        OSError: the host failed.
    """
    _check_mode(mode, journal_size, force_share=force_share)
    device = FileDevice.open(path, writable=mode == "r+", share_writers=force_share)
    try:
        if force_share:
            refuse_live_journal(device)
        return _open(
            device,
            mode,
            journal_size=journal_size,
            snapshot=snapshot,
            repair=repair,
            find_backing=lambda store: _open_chain(
                store, device, allow_files, probe=probe, share_writers=force_share
            ),
            copy_on_read=copy_on_read,
        )
    except BaseException:
        device.close()
        raise


def _check_mode(mode: Mode, journal_size: int | None, *, force_share: bool) -> None:
    if mode not in ("r", "r+"):
        raise ValueError(f"mode must be 'r' or 'r+', not {mode!r}")
    if journal_size is not None:
        _check_journal_size(journal_size)
    if force_share and mode != "r":
        raise ValueError("force_share is for reading: a writer cannot share an image with other writers")


def open_to_read(
    device: FileDevice,
    *,
    snapshot: str | None = None,
    allow_files: FilePolicy = False,
    probe: bool = False,
) -> Image:
    """Open the image on a file that is open already, for reading; arguments and errors as `open`.

    `Image.close` closes the file; where this raises, the caller does.
    """
    return _open(
        device,
        "r",
        snapshot=snapshot,
        find_backing=lambda store: _open_chain(store, device, allow_files, probe=probe),
    )


def open_device(
    device: Device,
    mode: Mode = "r",
    *,
    journal_size: int | None = None,
    new_salt: Callable[[], bytes] = random_salt,
    snapshot: str | None = None,
    repair: What | None = None,
    backing: Backing | Callable[[NamedFile], Backing] | None = None,
) -> Image:
    """Open the image on a device of your own; see `open`. `Image.close` closes the device.

    Args:
        device: what holds the image.
        mode: as in `open`; so are ``journal_size``, ``snapshot`` and ``repair``.
        journal_size: in bytes.
        new_salt: makes the 16-byte salt of each new journal; a seeded one makes a simulation replayable.
        snapshot: to read.
        repair: what to repair.
        backing: the disk below the image, or a function that returns it, called with what the image names if
            it names a file. `Image.close` closes the disk.

    Raises:
        FileAccessDenied: the image names a backing file, and there is no ``backing``.
        ValueError: there is a disk, and the image names none.
    """

    def find_backing(store: Store) -> Backing | None:
        named = naming.backing_file_of(store.metadata.area, "the image")
        if named is not None and backing is None:
            raise FileAccessDenied(named.image, named.purpose, named.name, named.path)
        if callable(backing):
            return None if named is None else backing(named)
        if named is None and backing is not None:
            raise ValueError("the image has no backing file")
        return backing

    return _open(
        device,
        mode,
        journal_size=journal_size,
        new_salt=new_salt,
        snapshot=snapshot,
        repair=repair,
        find_backing=find_backing,
    )


def _open(
    device: Device,
    mode: Mode,
    *,
    find_backing: Callable[[Store], Backing | None],
    journal_size: int | None = None,
    new_salt: Callable[[], bytes] = random_salt,
    snapshot: str | None = None,
    repair: What | None = None,
    copy_on_read: bool = False,
) -> Image:
    if copy_on_read and mode != "r+":
        raise ValueError("copy_on_read writes: it needs mode 'r+'")
    if snapshot is not None and mode != "r":
        raise ValueError("a snapshot is opened for reading alone: apply it to write to what it holds")
    if repair is not None and (mode != "r+" or repair not in ("leaks", "all")):
        raise ValueError(f"repair is 'leaks' or 'all', in mode 'r+', not {repair!r} in {mode!r}")
    opened = recovery.open_store(
        Medium(device),
        writable=mode == "r+",
        journal_bytes=journal_size or 0,
        new_salt=new_salt,
        repair=repair,
    )
    if snapshot is not None:
        opened.store.snapshots.show(snapshot)
    image = Image(opened, mode, find_backing(opened.store), copy_on_read=copy_on_read)
    if mode == "r+" and opened.store.metadata.header.incompatible_features & headers.INCOMPATIBLE_CORRUPT:
        _clear_corrupt_mark(image)
    return image


def open_alone(
    path: str | os.PathLike[str], mode: Mode, *, journal_size: int | None = None, repair: What | None = None
) -> Image:
    """Open an image without what is below it: where it has nothing of its own it reads as zeros.

    For what works on the image's own tables: who reads its disk wants `open`. Arguments and errors as `open`.
    """
    _check_mode(mode, journal_size, force_share=False)
    device = FileDevice.open(path, writable=mode == "r+")
    try:
        return _open(device, mode, journal_size=journal_size, repair=repair, find_backing=lambda store: None)
    except BaseException:
        device.close()
        raise


def open_backing(
    path: str | os.PathLike[str],
    backing_file: str,
    backing_format: BackingFormat | None,
    *,
    allow_files: FilePolicy,
    probe: bool = False,
) -> Chain:
    """Open a backing file that the caller names for the image at ``path``, and what is below that.

    Args:
        path: of the image; it must exist.
        backing_file: as it is to be stored in the image.
        backing_format: of the backing file.
        allow_files: whether the files may be opened that the backing file names, as in `open`.
        probe: tell formats that are not stored by the magic.

    Raises:
        JqcowError, OSError: as `open`.
    """
    image = os.fspath(path)
    named = NamedFile(image, backing_file, naming.resolve(backing_file, image), backing_format)
    state = os.stat(image)
    policy = _allowing_the_first(image, allow_files)
    return open_chain(named, (state.st_dev, state.st_ino), policy, _open_layer, probe=probe)


def _allowing_the_first(image: str, allow_files: FilePolicy) -> FilePolicy:
    """Return a policy that allows what ``image`` names: the caller named it."""

    def allow(named: NamedFile) -> bool:
        return named.image == image or (allow_files(named) if callable(allow_files) else allow_files)

    return allow


def _open_chain(
    store: Store, device: FileDevice, allow: FilePolicy, *, probe: bool, share_writers: bool = False
) -> Chain | None:
    named = naming.backing_file_of(store.metadata.area, device.path)
    if named is None:
        return None
    open_layer = _open_shared_layer if share_writers else _open_layer
    top = device.identity()
    return open_chain(named, top, allow, open_layer, probe=probe, share_writers=share_writers)


def _open_shared_layer(device: FileDevice) -> OpenedLayer:
    refuse_live_journal(device)
    return _open_layer(device)


def _open_layer(device: FileDevice) -> OpenedLayer:
    """Open a qcow2 image as a layer of a chain: it shows only what is its own."""
    opened = recovery.open_store(Medium(device), writable=False)
    names = naming.backing_file_of(opened.store.metadata.area, device.path)
    return OpenedLayer(ImageLayer(Image(opened, "r")), names)


class ImageLayer:
    """A qcow2 image as a layer of a backing chain."""

    def __init__(self, image: Image) -> None:
        """Read from ``image``, which has no backing of its own; `close` closes it."""
        self._image = image
        self.size = image.size

    def parts(self, length: int, offset: int) -> Iterator[Part]:
        """Yield what the image's own tables say."""
        for extent in self._image.extents(length, offset):
            kind = None if extent.kind == "unallocated" else extent.kind
            yield Part(extent.length, kind, extent.host_offset)

    def read_own(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``."""
        self._image.pread_into(buffer, offset)

    def close(self) -> None:
        """Close the image."""
        self._image.close()


def _clear_corrupt_mark(image: Image) -> None:
    """Clear the corrupt bit of an image that was repaired, if nothing is wrong with it any more."""
    report = image.check()
    if report.errors:
        # The repair is kept, and so is the mark.
        image.close()
        raise CorruptionError("image", 0, f"still corrupt after the repair: {report.findings[0]}")
    clear_corrupt_bit(image._store)


def create_on_device(
    device: Device,
    size: int,
    *,
    cluster_size: int = DEFAULT_CLUSTER_BYTES,
    journal_size: int = roots.DEFAULT_JOURNAL_BYTES,
    new_salt: Callable[[], bytes] = random_salt,
) -> Image:
    """Create an image on an empty device of your own, durably, and return it open; see `create`."""
    _check_journal_size(journal_size)
    layout.check_disk_size(size)
    _write_blank(device, blank_image(size, cluster_bits_of(cluster_size)))
    # Durable now: the empty image. Nobody has seen it yet.
    device.barrier("create.blank")
    return open_device(device, "r+", journal_size=journal_size, new_salt=new_salt)


def refuse_live_journal(device: FileDevice) -> None:
    """Raise ImageInUse if the file has a live journal: its writer goes on, so it cannot be replayed."""
    if roots.is_live(device.pread(SECTOR_BYTES, 0)):
        raise ImageInUse(
            f"{device.path} has a live journal, which cannot be read beside its writer. "
            "Close the program that holds the image, or open it without force_share if none does."
        )


def _write_blank(device: Device, blank: BlankImage) -> None:
    device.truncate(blank.length)
    for offset, data in blank.parts:
        device.pwrite(data, offset)


def _check_journal_size(journal_size: int) -> None:
    if not roots.MIN_JOURNAL_BYTES <= journal_size <= roots.MAX_JOURNAL_BYTES or journal_size % 8192:
        raise ValueError("the journal's size must be a multiple of 8192 from 64 KiB to 1 GiB")
