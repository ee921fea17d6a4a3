"""A disk into a file of another format, or anew in the same: sparse, streamed, whole or not there at all.

The target is written under a temporary name beside its final one, made durable, and named last. Only what
may hold data is read, and only what is not zero is written: whole clusters in a qcow2 image, and steps of
4096 bytes in a raw file, as in qemu-img. In a compressed image a cluster is stored as it is where compression
would save no sector.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, Unpack

from jqcow.device.base import Device
from jqcow.device.disk import Disk
from jqcow.device.file import FileDevice
from jqcow.device.filling import take_space
from jqcow.device.stream import OutputStream
from jqcow.device.targets import new_target
from jqcow.disks.chain import Chain, Identity, identity_of, open_disk
from jqcow.disks.files import Source
from jqcow.disks.image import ImageDisk
from jqcow.disks.making import NO_RAW_METADATA, RAW_UNIT_BYTES, create_data_file, publish
from jqcow.disks.policy import FilePolicy, Following
from jqcow.disks.raw import RawDisk
from jqcow.errors import JqcowError
from jqcow.offline.bitmaps import NO_BITMAPS, ChosenBitmaps, Which, choose
from jqcow.offline.build import ImageBuilder, PreallocatedImage
from jqcow.offline.compare import Progress, first_difference, nonzero_runs, windows
from jqcow.offline.compressing import CompressingWriter, Compression
from jqcow.offline.losses import Losses, LostRange, SalvagedDisk, refuse_lost_data
from jqcow.offline.streaming import stream_image, stream_raw
from jqcow.ondisk.compression import CompressionType
from jqcow.ondisk.encryption import Encryption, new_luks
from jqcow.ondisk.form import FileOptions, Form, HostUse, Preallocation
from jqcow.ondisk.keys import Passphrase, hidden
from jqcow.ondisk.naming import DiskFormat, check_format, meaning_of

BUFFER_BYTES = 2 << 20
STANDARD_OUTPUT = "standard output"

Target = str | os.PathLike[str] | OutputStream
"""A file to make, by its path, or a pipe."""


@dataclass(frozen=True)
class ConvertReport:
    """What was converted; sizes in bytes.

    Attributes:
        source: name of the source.
        source_format: given, or told by its magic.
        target: name of the target.
        target_format: ``raw`` or ``qcow2``.
        virtual_size: of the disk.
        read_bytes: what was read from the source: all that may hold data.
        written_bytes: what of it was not zero.
        compression_type: ``zlib`` or ``zstd`` where clusters were to be compressed, else None.
        compressed_bytes: what of ``written_bytes`` is in compressed clusters.
        packed_bytes: what these take in the target, in whole sectors.
        target_bytes: length of the target file.
        seconds: of the conversion, durability included, verification not.
        verify_seconds: of rereading and comparing both, None if it was not asked for.
        lost: what a salvage could not read; it is zeros in the target.
        bitmaps: names of the persistent bitmaps that were copied.
        skipped_bitmaps: names of those that were not, as they may be wrong.
    """

    source: str
    source_format: DiskFormat
    target: str
    target_format: DiskFormat
    virtual_size: int
    read_bytes: int
    written_bytes: int
    compression_type: CompressionType | None
    compressed_bytes: int
    packed_bytes: int
    target_bytes: int
    seconds: float
    verify_seconds: float | None
    lost: tuple[LostRange, ...]
    bitmaps: tuple[str, ...] = ()
    skipped_bitmaps: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Form:
    """What the target is to be; ``image`` says that of a qcow2 one, ``compression`` what it announces."""

    format: DiskFormat
    image: Form
    host_use: HostUse
    is_compressed: bool
    compression: Compression
    encryption: Encryption | None = None
    bitmaps: ChosenBitmaps = NO_BITMAPS

    def __post_init__(self) -> None:
        check_format(self.format)
        if self.format == "raw" and (self.is_compressed or self.compression != Compression()):
            raise ValueError("a raw file cannot be compressed")
        if self.format == "raw" and self.host_use.preallocation == "metadata":
            raise ValueError(NO_RAW_METADATA)
        if self.is_compressed and self.host_use.preallocation != "off":
            raise ValueError("compressed clusters cannot be preallocated: their size is not known before")
        if self.format == "raw" and self.encryption is not None:
            raise ValueError("a raw file cannot be encrypted")
        if self.is_compressed and self.encryption is not None:
            raise ValueError("compressed clusters are not encrypted: an image is one or the other")
        if self.image.data_file is not None and (self.format == "raw" or self.is_compressed):
            raise ValueError("an external data file is for a qcow2 image, without compression")
        if self.compression.level is not None and not self.is_compressed:
            raise ValueError("a compression level is of use only where clusters are compressed")


@dataclass(frozen=True)
class _Amounts:
    """What a copy came to; the fields are those of `ConvertReport`."""

    read_bytes: int
    written_bytes: int
    compressed_bytes: int
    packed_bytes: int
    target_bytes: int
    seconds: float = 0
    verify_seconds: float | None = None


class _Target(Protocol):
    unit: int
    compressed_bytes: int
    packed_bytes: int

    def write(self, data: memoryview, offset: int) -> None: ...

    def finish(self) -> None: ...


class _RawTarget:
    """Writes a raw file; what is not written stays a hole."""

    compressed_bytes = packed_bytes = 0

    def __init__(self, device: Device, size: int, preallocation: Preallocation) -> None:
        self.unit = RAW_UNIT_BYTES
        self._device = device
        device.truncate(size)
        take_space(device, 0, size, preallocation)

    def write(self, data: memoryview, offset: int) -> None:
        self._device.pwrite(data, offset)

    def finish(self) -> None:
        """Nothing is left to write."""


class _ImageTarget:
    """Builds a qcow2 image."""

    compressed_bytes = packed_bytes = 0

    def __init__(self, builder: ImageBuilder | PreallocatedImage) -> None:
        self.unit = builder.cluster_bytes
        self._builder = builder

    def write(self, data: memoryview, offset: int) -> None:
        self._builder.write(data, offset)

    def finish(self) -> None:
        self._builder.finish()


class _CompressedTarget:
    """Builds a qcow2 image of compressed clusters."""

    compressed_bytes = packed_bytes = 0

    def __init__(self, builder: ImageBuilder, writer: CompressingWriter) -> None:
        self.unit = builder.cluster_bytes
        self._builder = builder
        self._writer = writer

    def write(self, data: memoryview, offset: int) -> None:
        self._writer.write(data, offset)

    def finish(self) -> None:
        self._writer.flush()
        self.compressed_bytes, self.packed_bytes = self._writer.compressed_bytes, self._writer.packed_bytes
        self._builder.finish()


def convert(
    source: Source,
    target: Target,
    *,
    source_format: DiskFormat | None = None,
    snapshot: str | None = None,
    allow_files: FilePolicy = False,
    probe: bool = False,
    share_writers: bool = False,
    target_format: DiskFormat = "qcow2",
    compressed: bool = False,
    compression_level: int | None = None,
    overwrite: bool = False,
    verify: bool = False,
    salvage: bool = False,
    bitmaps: Which | None = None,
    progress: Progress = lambda done, total: None,
    passphrase: Passphrase | None = None,
    encryption: Encryption | None = None,
    **options: Unpack[FileOptions],
) -> ConvertReport:
    """Copy a disk into a new file of ``target_format``, durably.

    Args:
        source, target: the file to read, and the one to make, which appears whole and durable; or pipes.
        source_format: None tells it by the magic.
        snapshot: id or name of an internal snapshot of the source, to be copied instead of its disk.
        allow_files: whether backing files of the source may be opened, as in `jqcow.open`, and copied too.
        probe: tell formats of backing files that are not stored by their magic.
        share_writers: read beside a writer, as ``force_share`` of `jqcow.open`.
        target_format: ``raw`` or ``qcow2``.
        compressed: compress the clusters of a qcow2 target.
        compression_level: 1 to 9 for zlib, 1 to 22 for zstd; None is 6 and 3.
        overwrite: replace an existing file, if nobody uses it.
        verify: reread both and compare them before the target gets its name.
        salvage: make zeros of what cannot be read of the source; `ConvertReport.lost` tells what that was.
        bitmaps: ``all`` copies persistent bitmaps too, ``sound`` those that are not in use or damaged.
        progress: called with the bytes of the disk that are done, and all of them.
        passphrase: of an encrypted source and files below it, as in `jqcow.open`.
        encryption: how to encrypt a qcow2 target; None: not at all.
        options: what the target is to be, as `FileOptions` says; a raw one takes preallocation and nocow.

    Raises:
        ValueError: what the target cannot have, a snapshot of a raw file, or both are one file.
        FileExistsError: the target exists.
        FileAccessDenied: the source names a backing file, and that is not allowed.
        JqcowError: the source or a bitmap is damaged, a file in use, or the verification found a difference.
        OSError: the host failed. After this, as after a `JqcowError`, there is no new target.
    """
    passphrase = hidden(passphrase)
    packing = Compression(options.get("compression_type", "zlib"), compression_level)
    form = _Form(target_format, Form.of(options), HostUse.of(options), compressed, packing, encryption)
    _check_targets(source, target, form, overwrite=overwrite, verify=verify)
    following = Following(allow_files, probe, share_writers=share_writers, passphrase=passphrase)
    with closing(open_disk(source, source_format, snapshot=snapshot, following=following)) as chain:
        losses = Losses()
        form = dataclasses.replace(form, bitmaps=_bitmaps_of(chain, bitmaps, form, snapshot))
        readable = _readable(chain, losses, salvage=salvage)
        amounts = _put(readable, target, form, progress, overwrite=overwrite, verify=verify)
        return _report(chain, source, target, form, amounts, losses)


def _report(
    chain: Chain,
    source: Source,
    target: Target,
    form: _Form,
    amounts: _Amounts,
    losses: Losses,
) -> ConvertReport:
    return ConvertReport(
        source=source.path if isinstance(source, FileDevice) else os.fspath(source),
        source_format=chain.layers[0].format,
        target=STANDARD_OUTPUT if isinstance(target, OutputStream) else os.fspath(target),
        target_format=form.format,
        virtual_size=chain.size,
        **dataclasses.asdict(amounts),
        compression_type=form.compression.type if form.is_compressed else None,
        lost=losses.found(),
        bitmaps=form.bitmaps.names,
        skipped_bitmaps=form.bitmaps.skipped,
    )


def _bitmaps_of(chain: Chain, which: Which | None, form: _Form, snapshot: str | None) -> ChosenBitmaps:
    """Return the bitmaps that are to be copied, before anything is written."""
    if which is None:
        return NO_BITMAPS
    top = chain.layers[0]
    if not isinstance(top, ImageDisk) or snapshot is not None:
        raise ValueError("bitmaps are of the disk of a qcow2 image, not of a snapshot or a raw file")
    if form.format == "raw" or form.image.version < 3:
        raise ValueError("a target with bitmaps is a qcow2 image with compat=1.1")
    return choose(top, which)


def _readable(chain: Chain, losses: Losses, *, salvage: bool) -> Disk:
    """Return the disk to be read: one that stops where data is lost, or one that adds it to ``losses``."""
    if salvage:
        return SalvagedDisk(chain, losses.add)
    refuse_lost_data(chain.layers)
    return chain


def _check_stream(form: _Form, *, verify: bool) -> None:
    """Refuse what a pipe cannot have."""
    if verify:
        raise ValueError("what went into a pipe cannot be read again to be verified")
    if form.image.data_file is not None:
        raise ValueError("an image in a pipe has no external data file beside it")
    if form.host_use.preallocation in ("falloc", "full") or form.host_use.nocow:
        raise ValueError("a pipe takes no space: whoever writes the file preallocates it")


def _check_targets(source: Source, target: Target, form: _Form, *, overwrite: bool, verify: bool) -> None:
    """As `_check_target`, also of a data file; or refuse what a pipe cannot have."""
    if isinstance(target, OutputStream):
        _check_stream(form, verify=verify)
        return
    _check_target(source, target, overwrite=overwrite)
    if form.image.data_file is not None:
        _check_target(source, meaning_of(form.image.data_file, "").path, overwrite=overwrite)


def _check_target(source: Source, target: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Find out before the work whether the target could get its name after it."""
    if not os.path.lexists(target):
        return
    if os.path.exists(target) and _identity(source) == identity_of(os.fspath(target)):
        raise ValueError(f"{os.fspath(target)} is the source as well as the target")
    if not overwrite:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
    if os.path.exists(target):
        FileDevice.open(target, writable=True).close()


def _identity(source: Source) -> Identity:
    return source.identity() if isinstance(source, FileDevice) else identity_of(os.fspath(source))


def _put(
    disk: Disk, target: Target, form: _Form, progress: Progress, *, overwrite: bool, verify: bool
) -> _Amounts:
    if isinstance(target, OutputStream):
        return _pour(disk, target, form, progress)
    return _write(disk, target, form, progress, overwrite=overwrite, verify=verify)


def _pour(disk: Disk, stream: OutputStream, form: _Form, progress: Progress) -> _Amounts:
    """Copy a disk into a pipe."""
    started = time.perf_counter()
    plain = not form.is_compressed and form.encryption is None and not form.bitmaps.names
    if form.format == "raw":
        read = stream_raw(disk, stream, progress)
    elif plain and form.host_use.preallocation == "off":
        read = stream_image(disk, form.image, stream, progress)
    else:
        with closing(stream.new_spool()) as spool:
            amounts = _copy(disk, spool, None, form, progress)
            stream.write_spool(spool)
        return dataclasses.replace(amounts, seconds=time.perf_counter() - started)
    seconds = time.perf_counter() - started
    return _Amounts(read.read_bytes, read.written_bytes, 0, 0, stream.written_bytes, seconds)


def _write(
    disk: Disk,
    target: str | os.PathLike[str],
    form: _Form,
    progress: Progress,
    *,
    overwrite: bool,
    verify: bool,
) -> _Amounts:
    """Copy a disk into a new file, which gets its name when it is whole, verified and durable."""
    started = time.perf_counter()
    new = new_target(target, overwrite=overwrite, nocow=form.host_use.nocow)
    try:
        data = create_data_file(
            form.image, os.fspath(target), new, disk.size, form.host_use, overwrite=overwrite
        )
        with nullcontext() if data is None else closing(data.file):
            data_content = None if data is None else data.content
            amounts = _copy(disk, new.content, data_content, form, progress)
            if verify:
                verify_seconds = _verify(disk, new.content, data_content, form)
                amounts = dataclasses.replace(amounts, verify_seconds=verify_seconds)
            publish(new, data, overwrite=overwrite)
        seconds = time.perf_counter() - started - (amounts.verify_seconds or 0)
        return dataclasses.replace(amounts, seconds=seconds)
    finally:
        new.file.close()


@contextmanager
def _target(device: Device, data_file: Device | None, disk: Disk, form: _Form) -> Iterator[_Target]:
    if form.format == "raw":
        yield _RawTarget(device, disk.size, form.host_use.preallocation)
        return
    new = None if form.encryption is None else new_luks(form.encryption)
    preallocation = form.host_use.preallocation
    if preallocation != "off" or form.image.data_file_raw:
        yield _ImageTarget(PreallocatedImage(device, disk.size, form.image, preallocation, new, data_file))
        return
    builder = ImageBuilder(device, disk.size, form.image, new, data_file)
    if not form.is_compressed:
        yield _ImageTarget(builder)
        return
    writer = CompressingWriter(builder, form.compression)
    try:
        yield _CompressedTarget(builder, writer)
    finally:
        writer.close()


def _copy(disk: Disk, device: Device, data_file: Device | None, form: _Form, progress: Progress) -> _Amounts:
    """Copy what is not zero."""
    read_bytes = written_bytes = 0
    buffer = bytearray(BUFFER_BYTES)
    progress(0, disk.size)
    with _target(device, data_file, disk, form) as target:
        for offset, length in windows(disk, target.unit, BUFFER_BYTES):
            data = memoryview(buffer)[:length]
            disk.read_into(data, offset)
            read_bytes += length
            for start, end in nonzero_runs(data, target.unit):
                target.write(data[start:end], offset + start)
                written_bytes += end - start
            progress(offset + length, disk.size)
        target.finish()
        form.bitmaps.copy_to(device)
        progress(disk.size, disk.size)
        packed = target.compressed_bytes, target.packed_bytes
        return _Amounts(read_bytes, written_bytes, *packed, device.size())


def _verify(disk: Disk, device: Device, data_file: Device | None, form: _Form) -> float:
    started = time.perf_counter()
    passphrase = None if form.encryption is None else form.encryption.passphrase
    # Not closed: the devices are the caller's.
    written: Disk = RawDisk(device)
    if form.format == "qcow2":
        written = ImageDisk(device, passphrase=passphrase, open_data=lambda area: data_file)
    difference = first_difference(disk, written)
    if difference is not None:
        raise JqcowError(f"verification failed: source and target differ at guest offset {difference:#x}")
    return time.perf_counter() - started


def convert_disk(
    disk: Disk,
    target: str | os.PathLike[str],
    target_format: DiskFormat,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    **options: Unpack[FileOptions],
) -> None:
    """Copy an open disk into a new file, durably; the last sector is filled up with zeros.

    Arguments and errors as `convert`; ``disk`` stays open.
    """
    form = _Form(
        target_format, Form.of(options), HostUse.of(options), is_compressed=False, compression=Compression()
    )
    _write(disk, target, form, progress, overwrite=overwrite, verify=False)
