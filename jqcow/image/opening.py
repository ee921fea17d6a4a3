"""Opening images: by path, with their backing files, or on a device of the caller's own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import TypeVar

from jqcow.device.base import Device, check_device, closed_on_error, has_fixed_size
from jqcow.device.disk import Disk
from jqcow.device.file import FileDevice, path_of, remove_file
from jqcow.device.objects import SeekableFile, as_device
from jqcow.device.trial import TrialDevice
from jqcow.disks.chain import Chain, Identity, identity_of, open_below
from jqcow.disks.files import refuse_live_journal
from jqcow.disks.outside import data_file_named, open_data_file
from jqcow.disks.policy import FilePolicy, Following, allowing_what_it_names
from jqcow.disks.undo import (
    bring_home,
    save_undo,
    settle_undo,
    take_back_cut_off,
    undo_path,
)
from jqcow.engine.engine import Engine, make_writable, open_engine, random_salt
from jqcow.engine.log import affordable_length
from jqcow.engine.medium import Medium
from jqcow.engine.repair import RepairReport, What, clear_corrupt_bit
from jqcow.engine.scan import read_header
from jqcow.errors import (
    CorruptionError,
    FileAccessDenied,
    FormatError,
    JqcowError,
    UnsupportedFeatureError,
)
from jqcow.image.arguments import optional_text
from jqcow.image.below import Below, FindBelow, counted, disk_below
from jqcow.image.entering import SMALL_WRITES, Mode, SmallWrites
from jqcow.image.image import Image
from jqcow.image.journals import JournalLength, journal_length
from jqcow.ondisk import header as headers
from jqcow.ondisk import naming
from jqcow.ondisk import root as roots
from jqcow.ondisk.keys import Passphrase, hidden
from jqcow.ondisk.naming import DiskFormat, NamedFile

_Given = TypeVar("_Given", Below, Device)


def open(
    path: str | os.PathLike[str] | Device | SeekableFile,
    mode: Mode = "r",
    *,
    journal_size: int | None = None,
    force_share: bool = False,
    snapshot: str | None = None,
    repair: What | None = None,
    free_lost: bool = False,
    allow_files: FilePolicy = False,
    probe: bool = False,
    copy_on_read: bool = False,
    passphrase: Passphrase | None = None,
    protect: bool = False,
    small_writes: SmallWrites = SMALL_WRITES,
) -> Image:
    """Open an existing image.

    ``"r"`` writes nothing: a live journal is replayed. ``"r+"`` first recovers, or mends a set dirty bit.

    Args:
        path, mode: the image, or an object that holds it (`open_device`), and ``"r"`` or ``"r+"``.
        journal_size: in bytes, of the next journal; None keeps what there is, or 8 MiB.
        force_share: with ``"r"``, read beside a writer, as ``qemu-img -U`` does: not a live journal.
        snapshot: with ``"r"``, the id or name of a snapshot to read instead of the disk.
        repair: with ``"r+"``, first make refcounts and COPIED flags right: ``"leaks"`` what is too high,
            ``"all"`` what is too low as well; with this an image marked corrupt opens too. ``"bitmaps"`` also
            gives up damaged bitmaps. `Image.repaired` and an undo file tell what was wrong (`undo_repair`).
        free_lost: such a repair gives up leaked clusters that look like lost data, too.
        allow_files: whether files may be opened that the image names, and those that they name: none, all
            (True), or what a function says of each `NamedFile`. They are locked against writers.
        probe: tell a backing file's format by its magic if none is stored: a guest may choose a raw one's.
        copy_on_read: with ``"r+"``, write what is read from a backing file into the image, as a change.
        passphrase: of encrypted images: bytes, or a function that gets the path of each and returns its own.
        protect, small_writes: renew the protection at a clean close; keep short writes in the journal.

    Raises:
        PassphraseError, MissingPackageError, FileAccessDenied: what opens it is not given, or not allowed.
        ValueError: another mode, what does not go with it, or no size of a journal.
        JqcowError, OSError: no qcow2 image, damaged, refused by name, in use, no such snapshot; a host error.
    """
    passphrase = hidden(passphrase)
    _check_mode(mode, journal_size, repair, force_share=force_share)
    following = Following(allow_files, probe, share_writers=force_share, passphrase=passphrase)
    with _device_of(path, mode, force_share=force_share) as device:
        image = _open(
            device,
            mode,
            journal=_prepare(device, journal_size, repair, free_lost=free_lost, following=following),
            snapshot=snapshot,
            repair=repair,
            free_lost=free_lost,
            find_backing=lambda engine: _open_chain(engine, device, following),
            find_data=lambda engine: _open_data(engine, device, following),
            unlock=_unlocking(passphrase),
            copy_on_read=copy_on_read,
            protect=protect,
            small_writes=small_writes,
        )
        return _settled(image, device)


@contextmanager
def _device_of(
    path: str | os.PathLike[str] | Device | SeekableFile, mode: Mode, *, force_share: bool
) -> Iterator[Device]:
    """Open a file, which is closed on an error, or take an object of the caller's own, which is not."""
    if isinstance(path, str | bytes | os.PathLike):
        device = FileDevice.open(path, writable=mode == "r+", share_writers=force_share)
        with closed_on_error(device):
            yield device
        return
    if force_share:
        raise ValueError("force_share is about the locks of files: an object has none")
    yield as_device(path)


def open_blank(
    device: FileDevice,
    data_file: FileDevice | None,
    chain: Chain | None,
    *,
    journal_size: int,
    passphrase: Passphrase | None,
) -> Image:
    """Open a new image on its open file, with its open data file and chain, which it closes."""
    return _open(
        device,
        "r+",
        journal=journal_length(journal_size),
        find_backing=lambda engine: chain,
        find_data=lambda engine: data_file,
        unlock=_unlocking(passphrase),
    )


def open_base(
    named: NamedFile, above: Iterable[Identity], following: Following, *, journal_size: int | None = None
) -> Image:
    """Open the backing file of an image that is open, for writing; what is below it as `open` does.

    Args:
        named: the file, which the caller allows.
        above: the images above it, of which none may come again.
        following: how the names inside it are followed.
        journal_size: as in `open`.

    Raises:
        JqcowError, OSError: as `open`.
    """
    opened = FileDevice.open(named.path, writable=True, real_path=named.real_path)
    with closed_on_error(opened) as device:
        image = _open(
            device,
            "r+",
            journal=journal_length(journal_size),
            find_backing=lambda engine: _open_chain(engine, device, following, above),
            find_data=lambda engine: _open_data(engine, device, following, above),
            unlock=_unlocking(following.passphrase),
        )
        return _settled(image, device)


def _check_mode(mode: Mode, journal_size: int | None, repair: What | None, *, force_share: bool) -> None:
    """Refuse what no image is opened with, before the file is."""
    _check_mode_and_repair(mode, repair)
    if journal_size is not None:
        roots.journal_length(journal_size)
    if force_share and mode != "r":
        raise ValueError("force_share is for reading: a writer cannot share an image with other writers")


def _check_mode_and_repair(mode: Mode, repair: What | None) -> None:
    """Refuse a mode, or a repair, that there is not."""
    if mode not in ("r", "r+"):
        raise ValueError(f"mode must be 'r' or 'r+', not {mode!r}")
    if repair is not None and (mode != "r+" or repair not in ("leaks", "all", "bitmaps")):
        raise ValueError(f"repair is 'leaks', 'all' or 'bitmaps', in mode 'r+', not {repair!r} in {mode!r}")


def _check_choices(
    mode: Mode, snapshot: str | None, small_writes: SmallWrites, *, copy_on_read: bool, protect: bool
) -> None:
    """Refuse what does not go with a mode."""
    if small_writes not in ("in-place", "journal"):
        raise ValueError(f"small_writes is 'in-place' or 'journal', not {small_writes!r}")
    if copy_on_read and mode != "r+":
        raise ValueError("copy_on_read writes: it needs mode 'r+'")
    if protect and mode != "r+":
        raise ValueError("protect writes: it needs mode 'r+'")
    if snapshot is not None and mode != "r":
        raise ValueError("a snapshot is opened for reading alone: apply it to write to what it holds")


def open_device(
    device: Device | SeekableFile,
    mode: Mode = "r",
    *,
    journal_size: int | None = None,
    new_salt: Callable[[], bytes] = random_salt,
    snapshot: str | None = None,
    repair: What | None = None,
    free_lost: bool = False,
    backing: Below | FindBelow | None = None,
    data_file: Device | Callable[[NamedFile], Device] | None = None,
    passphrase: Passphrase | None = None,
    small_writes: SmallWrites = SMALL_WRITES,
) -> Image:
    """Open the image on a device of your own; see `open`. `Image.close` closes the device.

    Args:
        device: what holds the image: a device, or an object with ``read`` and ``seek``, to be read alone.
        mode, journal_size: as in `open`; so are ``snapshot``, ``repair``, ``free_lost`` and ``small_writes``.
        new_salt: makes the 16-byte salt of each new journal; a seeded one makes a simulation replayable.
        backing: the disk below the image, or a function that returns it, called with what the image names if
            it names a file; a device serves, too, and what that names is asked for likewise. `Image.close`
            closes the disk.
        data_file: the device that is the external data file of the image, or a function that returns it,
            called with what the image names. `Image.close` closes it.
        passphrase: of an encrypted image, as in `open`.

    Raises:
        FileAccessDenied: the image names a backing file or a data file, and there is none.
        ValueError: there is a disk or a data file, and the image names none.
    """
    device, passphrase = as_device(device), hidden(passphrase)
    backing, further = counted(backing)

    def open_next(found: Device) -> Image:
        return open_device(found, backing=further, passphrase=passphrase)

    def find_backing(engine: Engine) -> Disk | None:
        named = naming.backing_file_of(engine.blocks.area, "the image")
        below = _given(named, backing, "backing file")
        return None if named is None or below is None else disk_below(below, named, open_next)

    def find_data(engine: Engine) -> Device | None:
        return _given(data_file_named(engine.blocks.area, "the image"), data_file, "external data file")

    return _open(
        device,
        mode,
        journal=journal_length(journal_size),
        new_salt=new_salt,
        snapshot=snapshot,
        repair=repair,
        free_lost=free_lost,
        find_backing=find_backing,
        find_data=find_data,
        unlock=_unlocking(passphrase),
        small_writes=small_writes,
    )


def _given(
    named: NamedFile | None, given: _Given | Callable[[NamedFile], _Given] | None, what: str
) -> _Given | None:
    """Return what a caller gives for a file that an image names, None if it names none.

    Raises:
        FileAccessDenied: it names one, and nothing is given.
        ValueError: it names none, and something is given for it.
    """
    if named is None:
        if given is not None and not callable(given):
            raise ValueError(f"the image has no {what}")
        return None
    if given is None:
        _refuse_named(named)
        return None
    return given(named) if callable(given) else given


def _refuse_named(named: NamedFile | None) -> None:
    if named is not None:
        raise FileAccessDenied(named.image, named.purpose, named.name, named.path)


def _unlocking(passphrase: Passphrase | None) -> Callable[[Engine], None]:
    """Return what makes the data of an engine's image readable, if that can be."""
    return lambda engine: engine.unlock(passphrase)


def _locked(_: Engine) -> None:
    """Leave the data of an encrypted image out of reach: its tables alone are to be used."""


def _open(
    device: Device,
    mode: Mode,
    *,
    find_backing: Callable[[Engine], Disk | None],
    unlock: Callable[[Engine], None],
    journal: JournalLength,
    find_data: Callable[[Engine], Device | None] = lambda _: None,
    new_salt: Callable[[], bytes] = random_salt,
    snapshot: str | None = None,
    repair: What | None = None,
    free_lost: bool = False,
    copy_on_read: bool = False,
    protect: bool = False,
    small_writes: SmallWrites = SMALL_WRITES,
) -> Image:
    check_device(device)
    _check_mode_and_repair(mode, repair)
    _check_choices(mode, snapshot, small_writes, copy_on_read=copy_on_read, protect=protect)
    snapshot = optional_text(snapshot)
    opened = open_engine(
        Medium(device),
        writable=mode == "r+",
        journal_bytes=journal.length_bytes,
        new_salt=new_salt,
        repair=repair,
    )
    engine = opened.engine
    engine.log.distance_bytes = journal.distance_bytes
    engine.public.space.tables_first = journal.distance_bytes > 0
    if journal.is_exact:
        engine.log.shortest_bytes = journal.length_bytes
    shown = None if snapshot is None else engine.public.snapshots.l1_to_show(snapshot)
    data_file = find_data(engine)
    backing: Disk | None = None
    try:
        if data_file is not None:
            check_device(data_file)
            engine.attach(data_file)
        unlock(engine)
        engine.journals_small_writes = small_writes == "journal"
        backing = find_backing(engine)
        # Only now: an image whose backing file cannot be opened is not written to.
        repaired = make_writable(opened, repair, free_lost=free_lost) if mode == "r+" else None
        image = Image(
            opened, mode, backing, copy_on_read=copy_on_read, shown=shown, repaired=repaired, protect=protect
        )
        if mode == "r+" and engine.blocks.area.header.incompatible_features & headers.INCOMPATIBLE_CORRUPT:
            _clear_corrupt_mark(image)
        return image
    except BaseException:
        if isinstance(backing, Chain):
            # Opened for this image, unlike a disk of the caller's own.
            backing.close()
        if isinstance(data_file, FileDevice):
            data_file.close()
        raise


def _prepare(
    device: Device,
    journal_size: int | None,
    repair: What | None,
    *,
    free_lost: bool,
    following: Following | None = None,
) -> JournalLength:
    """Return the length of the next journal, after what a repair needs first, if there is one.

    Beside a writer that ``following`` allows nothing can be told of a live journal: it is refused.
    """
    length = journal_length(journal_size)
    if not isinstance(device, FileDevice):
        return length
    if following is not None and following.share_writers:
        refuse_live_journal(device)
    if repair is None:
        return length
    return _prepare_repair(device, length, repair, free_lost=free_lost, following=following)


def _prepare_repair(
    device: FileDevice, journal: JournalLength, repair: What, *, free_lost: bool, following: Following | None
) -> JournalLength:
    """Before a repair: bring a crashed image home, try the repair in memory, and write its undo file.

    A repair that only lowers refcounts of harmless leaks needs none; on a block device a warning says that
    there is none. With
    ``following`` the backing files must be there, and allowed, before anything is written.

    Returns the length of its journal on trial: a new refcount table lies behind that.
    """
    is_back = _take_back_cut_off(device)
    if following is not None:
        _check_chain(device, following)
    if not is_back:
        bring_home(device)
    # The undo file takes space, too.
    wanted_bytes = journal.length_bytes or roots.DEFAULT_JOURNAL_BYTES
    free_bytes = device.free_bytes()
    half_bytes = None if free_bytes is None else free_bytes // 2
    on_trial = JournalLength(affordable_length(wanted_bytes, half_bytes))
    trial = TrialDevice(device)
    needs_undo = True
    with suppress(JqcowError):
        # What it refuses is refused again, when it is no trial.
        with _open(
            trial,
            "r+",
            journal=on_trial,
            repair=repair,
            free_lost=free_lost,
            find_backing=lambda _: None,
            unlock=_locked,
        ) as image:
            done = image.repaired or RepairReport()
        needs_undo = free_lost or bool(
            done.too_low or done.copied_flags or done.refcount_table or done.bitmaps
        )
    first = next(trial.changed(), None)
    if first is None or not (needs_undo or first[0] == 0):
        return on_trial
    if has_fixed_size(device):
        # Beside a block device there is no place for an undo file, and what is given back is lost.
        told = f"{device.path} is a block device: its repair writes no undo file, and nothing takes it back"
        warnings.warn(told, stacklevel=2)
        return on_trial
    save_undo(trial, device)
    return replace(on_trial, is_exact=True)


def _check_chain(device: FileDevice, following: Following) -> None:
    """Open the backing files of an image, and close them, unless its header is lost."""
    try:
        area = read_header(device)
    except (FormatError, CorruptionError):
        return
    named = naming.backing_file_of(area, device.path)
    if named is not None:
        open_below(named, [device.identity()], following).close()
    data_file = open_data_file(area, device.path, [device.identity()], following)
    if data_file is not None:
        data_file.close()


def _take_back_cut_off(device: FileDevice) -> bool:
    """Take back a repair, or end an undo, that was cut off, before another repair; False if none was."""
    path = undo_path(device.path)
    # One of another repair stays, as one does that cannot be read.
    with (
        suppress(CorruptionError, FormatError, UnsupportedFeatureError, FileNotFoundError, IsADirectoryError),
        closing(FileDevice.open(path, writable=True)) as undo,
    ):
        is_back = take_back_cut_off(device, undo)
        if is_back:
            remove_file(undo)
        return is_back
    return False


def _settled(image: Image, device: Device) -> Image:
    """Return an opened image; whoever writes to it does so after a repair, if there was one."""
    if isinstance(device, FileDevice) and not device.read_only:
        try:
            settle_undo(device)
        except BaseException:
            image.close()
            raise
    return image


def open_alone(
    path: str | os.PathLike[str],
    mode: Mode,
    *,
    journal_size: int | None = None,
    repair: What | None = None,
    free_lost: bool = False,
    passphrase: Passphrase | None = None,
    reads_data: bool = False,
    allow_files: FilePolicy = False,
) -> Image:
    """Open an image without what is below it: where it has nothing of its own it reads as zeros.

    For what works on the image's own tables: who reads its disk wants `open`. An encrypted one needs no
    passphrase, and no external data file is opened, unless it ``reads_data``. Arguments and errors as `open`.
    """
    following = Following(allow_files)
    _check_mode(mode, journal_size, repair, force_share=False)
    with closed_on_error(FileDevice.open(path, writable=mode == "r+")) as device:
        length = _prepare(device, journal_size, repair, free_lost=free_lost)
        image = _open(
            device,
            mode,
            journal=length,
            repair=repair,
            free_lost=free_lost,
            find_backing=lambda engine: None,
            find_data=lambda engine: _open_data(engine, device, following) if reads_data else None,
            unlock=_unlocking(passphrase) if reads_data else _locked,
        )
        return _settled(image, device)


def open_backing(
    path: str | os.PathLike[str],
    backing_file: str,
    backing_format: DiskFormat | None,
    *,
    allow_files: FilePolicy,
    probe: bool = False,
    passphrase: Passphrase | None = None,
) -> Chain:
    """Open a backing file that the caller names for the image at ``path``, and what is below that.

    Args:
        path: of the image; it must exist.
        backing_file: as it is to be stored in the image.
        backing_format: of the backing file.
        allow_files: whether the files may be opened that the backing file names, as in `open`.
        probe: tell formats that are not stored by the magic.
        passphrase: of encrypted files, as in `open`.

    Raises:
        JqcowError, OSError: as `open`.
    """
    image = os.fspath(path)
    naming.decode_name(os.fsencode(backing_file))
    named = naming.named_file(image, backing_file, backing_format)
    following = Following(allowing_what_it_names(image, allow_files), probe, passphrase=passphrase)
    return open_below(named, [identity_of(image)], following)


def _open_chain(
    engine: Engine, device: Device, following: Following, above: Iterable[Identity] = ()
) -> Chain | None:
    named = naming.backing_file_of(engine.blocks.area, path_of(device) or "the image")
    if not isinstance(device, FileDevice):
        _refuse_named(named)
        return None
    return None if named is None else open_below(named, [*above, device.identity()], following)


def _open_data(
    engine: Engine, device: Device, following: Following, above: Iterable[Identity] = ()
) -> FileDevice | None:
    if not isinstance(device, FileDevice):
        _refuse_named(data_file_named(engine.blocks.area, "the image"))
        return None
    others = [*above, device.identity()]
    writable = not device.read_only
    return open_data_file(engine.blocks.area, device.path, others, following, writable=writable)


def _clear_corrupt_mark(image: Image) -> None:
    """Clear the corrupt bit of an image that was repaired, if nothing is wrong with it any more."""
    report = image.check()
    if report.errors:
        # The repair is kept, and so is the mark.
        image.close()
        raise CorruptionError("image", 0, f"still corrupt after the repair: {report.findings[0]}")
    clear_corrupt_bit(image._engine.lifecycle)
