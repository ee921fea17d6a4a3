"""Damaged images: told what is wrong with them, and had back into a new file.

Nothing of the source is changed. The target is built under another name beside its final one and gets that
when it is whole and durable. A salvage that is cut off goes on where it was: see `salvaging.state`.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from jqcow.device.file import FileDevice, open_partial
from jqcow.disks.policy import FilePolicy, Following
from jqcow.errors import FormatError
from jqcow.offline.compare import Progress
from jqcow.offline.salvaging.copying import SAVE_SECONDS, Copying
from jqcow.offline.salvaging.parts import Parts
from jqcow.offline.salvaging.patient import Patient, open_patient
from jqcow.offline.salvaging.picture import draw, draw_page
from jqcow.offline.salvaging.report import RangeReport
from jqcow.offline.salvaging.state import PARTIAL, SalvageState, read_state, remove_state, write_state
from jqcow.offline.salvaging.steps import with_steps
from jqcow.offline.salvaging.targets import ImageTarget, RawTarget, Target, backing_of
from jqcow.ondisk.keys import Passphrase, hidden
from jqcow.ondisk.naming import DiskFormat, check_format
from jqcow.salvage.amounts import Amounts
from jqcow.salvage.diagnosis import Diagnosis
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.mapfile import MAP_BYTES_MAX, pack_map, parse_map
from jqcow.salvage.reading import Below
from jqcow.salvage.survey import Survey


@dataclass(frozen=True)
class SalvageReport:
    """What a salvage had back; sizes in bytes.

    Attributes:
        source: name of the damaged image.
        target: name of the new file.
        target_format: ``raw`` or ``qcow2``.
        size: of the disk.
        certain: data whose place is certain.
        likely: data that several facts put there.
        guess: data that was left over for the place.
        zero: what reads as zeros.
        below: what the backing disk shows, zeros without one.
        lost: zeros in the target, for want of anything that says what was there.
        written_bytes: what of the data is not zero.
        unreadable_bytes: what of the source the host could not read.
        orphans: so many clusters were to be placed, as no table names them.
        anchored: so many of them told by themselves where they belong.
        structures: what of the guest was recognised.
        resumed_at: the guest offset from which an earlier salvage was gone on with; None if none was.
        notes: what else the user should know.
        seconds: of this run, durability included.
    """

    source: str
    target: str
    target_format: DiskFormat
    size: int
    certain: int
    likely: int
    guess: int
    zero: int
    below: int
    lost: int
    written_bytes: int
    unreadable_bytes: int
    orphans: int
    anchored: int
    structures: tuple[str, ...]
    resumed_at: int | None
    notes: tuple[str, ...]
    seconds: float

    @property
    def is_whole(self) -> bool:
        """True if nothing is lost, and all of it is certain."""
        return not (self.lost or self.likely or self.guess)


def diagnose(
    image: str | os.PathLike[str],
    *,
    deep: bool = False,
    picture: str | os.PathLike[str] | None = None,
    map_file: str | os.PathLike[str] | None = None,
    allow_files: FilePolicy = False,
    probe: bool = False,
    passphrase: Passphrase | None = None,
) -> Diagnosis:
    """Tell what is damaged in an image, what depends on it and what can be had back. Nothing is changed.

    Args:
        image: the file; locked against writers meanwhile.
        deep: place what no table names, as a salvage does, and count exactly. It reads all of that.
        picture: a file to make, by its end ``.svg`` or ``.html``, that shows the file and the disk.
        map_file: a map of GNU ddrescue that tells what of the file could not be read.
        allow_files: with ``deep``, whether backing files may be opened, as in `jqcow.open`.
        probe: tell formats of backing files that are not stored by their magic.
        passphrase: with ``deep``, of an encrypted image.

    Raises:
        ValueError: a picture of another end.
        FileExistsError: the picture exists.
        FormatError: nothing tells how to read the file as an image, or the map is none.
        JqcowError: a feature that salvage does not know, or a writer has the file.
        OSError: the host failed, other than by what it cannot read.
    """
    following = Following(allow_files, probe, passphrase=hidden(passphrase))
    if picture is not None:
        _check_picture(os.fspath(picture))
    with open_patient(image, _bad_in(map_file)) as patient:
        found = patient.survey()
        if deep:
            found.unlock(patient.cipher(following.passphrase))
            with _below(patient, following, is_needed=False) as below:
                found.place(below)
        told = with_steps(patient.diagnose(found), is_encrypted=bool(patient.shape.area.header.crypt_method))
        if picture is not None:
            _draw(os.fspath(picture), found, told)
        return told


def _check_picture(name: str) -> None:
    if not name.endswith((".svg", ".html")):
        raise ValueError(f"a picture is a .svg or .html file, not {name}")
    if os.path.lexists(name):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)


def _draw(name: str, found: Survey, told: Diagnosis) -> None:
    text = draw(found, told) if name.endswith(".svg") else draw_page(found, told)
    with closing(FileDevice.create_temporary(name)) as device:
        device.pwrite(text.encode(), 0)
        device.publish(overwrite=False)


@dataclass(frozen=True)
class _Way:
    """How an image is salvaged: see `salvage`."""

    target: str
    target_format: DiskFormat
    snapshot: str | None
    certain_only: bool
    report: str | None
    save_seconds: float

    def plan(self, patient: Patient) -> dict[str, Any]:
        """Return what a state is for (Z2)."""
        state = os.stat(patient.path)
        return {
            "source": os.path.realpath(patient.path),
            "source-bytes": patient.source.size(),
            "source-identity": list(patient.identity),
            "source-mtime": state.st_mtime_ns,
            "format": self.target_format,
            "snapshot": self.snapshot,
            "certain-only": self.certain_only,
            "report": None if self.report is None else os.path.realpath(self.report),
        }


def salvage(
    image: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    target_format: DiskFormat = "qcow2",
    snapshot: str | None = None,
    certain_only: bool = False,
    report: str | os.PathLike[str] | None = None,
    map_file: str | os.PathLike[str] | None = None,
    allow_files: FilePolicy = False,
    probe: bool = False,
    passphrase: Passphrase | None = None,
    progress: Progress = lambda done, total: None,
    save_seconds: float = SAVE_SECONDS,
) -> SalvageReport:
    """Write what can be had back of a damaged image into a new file, durably; the image is not changed.

    A salvage that was cut off, by whatever, goes on where it was when it is asked for again.

    Args:
        image: the damaged file; locked against writers meanwhile.
        target: the file to make; it appears under this name when it is whole and durable.
        target_format: ``raw`` or ``qcow2``; that keeps the name of the backing file.
        snapshot: id or name of an internal snapshot, to be had back instead of the disk.
        certain_only: make zeros of all that is not certain.
        report: a file to make that tells of every guest range what it is, how surely and by whom.
        map_file: a map of GNU ddrescue: what it calls bad is, and what is found to be bad is added to it.
        allow_files: whether backing files may be opened, as in `jqcow.open`; a raw target needs them.
        probe: tell formats of backing files that are not stored by their magic.
        passphrase: of an encrypted image and of encrypted files below it. The target is not encrypted.
        progress: called with the bytes of the disk that are done, and all of them.
        save_seconds: how much work is lost at most where this is cut off.

    Raises:
        ValueError: source and target are one file.
        FileExistsError: the target or the report exists.
        FormatError: nothing tells how to read the file as an image, the map is none, or what lies beside the
            target is of another salvage.
        FileAccessDenied: a raw target needs the backing file, and that is not allowed.
        JqcowError: a feature that salvage does not know, no passphrase, or a file is in use.
        OSError: the host failed, other than by what it cannot read.
    """
    check_format(target_format)
    name = None if report is None else os.fspath(report)
    way = _Way(os.fspath(target), target_format, snapshot, certain_only, name, save_seconds)
    following = Following(allow_files, probe, passphrase=hidden(passphrase))
    return _salvage(os.fspath(image), way, following, map_file, progress)


def _salvage(
    image: str, way: _Way, following: Following, map_file: str | os.PathLike[str] | None, progress: Progress
) -> SalvageReport:
    started = time.perf_counter()
    _refuse_existing(image, way)
    state = _read_state(way.target)
    bad = [*_bad_in(map_file), *(state.bad if state else ())]
    with open_patient(image, bad) as patient:
        plan = way.plan(patient)
        if state is not None and state.plan != plan:
            raise FormatError(
                f"{way.target}{PARTIAL} is of another salvage, or the source was changed since; "
                "remove it, and the state beside it, to begin anew"
            )
        found = patient.survey(way.snapshot)
        found.unlock(patient.cipher(following.passphrase))
        with _below(patient, following, is_needed=way.target_format == "raw") as below:
            found.place(below)
            copied = _copy(patient, found, way, state or _fresh(plan), below, progress)
        _write_map(map_file, found)
        return replace(copied, seconds=time.perf_counter() - started)


def _fresh(plan: dict[str, Any]) -> SalvageState:
    return SalvageState(plan, 0, [], asdict(Amounts()), 0, None, None)


def _refuse_existing(image: str, way: _Way) -> None:
    """Find out before the work whether the files could get their names after it."""
    if os.path.exists(way.target) and os.path.samefile(image, way.target):
        raise ValueError(f"{way.target} is the source as well as the target")
    # One that was cut off at its very end has its report.
    report = None if os.path.lexists(way.target + PARTIAL) else way.report
    for name in filter(None, (way.target, report)):
        if os.path.lexists(name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)


def _read_state(target: str) -> SalvageState | None:
    """Return what an earlier salvage left; nothing where its file is gone."""
    return read_state(target) if os.path.lexists(target + PARTIAL) else None


@contextmanager
def _below(patient: Patient, following: Following, *, is_needed: bool) -> Iterator[Below | None]:
    """Open the backing files where they are allowed; where they are needed, not allowed is an error."""
    if not is_needed and following.allow is False:
        yield None
        return
    with patient.below(following) as below:
        yield below


def _copy(
    patient: Patient,
    found: Survey,
    way: _Way,
    state: SalvageState,
    below: Below | None,
    progress: Progress,
) -> SalvageReport:
    is_raw, size = way.target_format == "raw", found.guest_map.size
    parts = Parts(
        found,
        found.reader(below if is_raw else None),
        Certainty.CERTAIN if way.certain_only else Certainty.GUESS,
    )
    with closing(open_partial(way.target, way.target + PARTIAL)) as device:
        target: Target
        if is_raw:
            target = RawTarget(device, size, state.position)
        else:
            target = ImageTarget(device, size, patient.shape, state.build)
        with _range_report(way, state, patient, size) as (report, report_device):
            copying = Copying(
                target,
                device,
                report,
                size=size,
                bad=found.source.bad,
                begin=state,
                save=lambda new: write_state(way.target, new),
                save_seconds=way.save_seconds,
            )
            if not state.position:
                copying.save()
            copying.run(parts.from_offset(state.position), progress)
            told = _report(found, way, copying, state)
            if report is not None and report_device is not None:
                report.finish({**asdict(told), "orphans": told.orphans})
                report_device.publish(overwrite=False)
        device.publish(overwrite=False)
    remove_state(way.target)
    return told


@contextmanager
def _range_report(
    way: _Way, state: SalvageState, patient: Patient, size: int
) -> Iterator[tuple[RangeReport | None, FileDevice | None]]:
    if way.report is None or os.path.lexists(way.report):
        yield None, None
        return
    with closing(open_partial(way.report, way.report + PARTIAL)) as device:
        report = RangeReport(device)
        if state.report is None:
            report.begin({"source": patient.path, "size": size, "snapshot": way.snapshot})
        else:
            report.go_on(state.report)
        yield report, device


def _report(found: Survey, way: _Way, copying: Copying, state: SalvageState) -> SalvageReport:
    placed = found.placed
    return SalvageReport(
        source=state.plan["source"],
        target=way.target,
        target_format=way.target_format,
        size=found.guest_map.size,
        **vars(copying.amounts),
        written_bytes=copying.written_bytes,
        unreadable_bytes=found.source.bad.total(),
        orphans=0 if placed is None else placed.orphans,
        anchored=0 if placed is None else placed.anchored,
        structures=() if placed is None else placed.structures,
        resumed_at=state.position or None,
        notes=tuple(_notes(found, way)),
        seconds=0.0,
    )


def _notes(found: Survey, way: _Way) -> Iterator[str]:
    if found.shape.area.header.crypt_method:
        yield "the source is encrypted, the target is not"
    backing = backing_of(found.shape)
    if backing is not None and way.target_format == "qcow2":
        name = os.fsdecode(backing[0])
        yield f"the target keeps the name of the backing file, {name!r}, as seen from the target's directory"


# The map of what cannot be read


def _bad_in(map_file: str | os.PathLike[str] | None) -> list[tuple[int, int]]:
    if map_file is None:
        return []
    try:
        device = FileDevice.open(map_file, writable=False)
    except FileNotFoundError:
        return []
    with closing(device):
        return parse_map(device.pread(min(device.size(), MAP_BYTES_MAX + 1), 0))


def _write_map(map_file: str | os.PathLike[str] | None, found: Survey) -> None:
    if map_file is not None:
        with closing(FileDevice.create_temporary(map_file)) as device:
            device.pwrite(pack_map(found.source.bad, found.source.size()), 0)
            device.publish(overwrite=True)
