"""Stories of damaged images: a salvage that goes on where it was cut off, and new tables in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from random import Random

from jqcow.disks.policy import Following
from jqcow.disks.undo import mark_done, pack_undo, undo_on
from jqcow.offline.salvaging.copying import Copying
from jqcow.offline.salvaging.in_place import put_in_place, rebuilt
from jqcow.offline.salvaging.parts import Parts
from jqcow.offline.salvaging.patient import Patient, patient_on
from jqcow.offline.salvaging.report import RangeReport
from jqcow.offline.salvaging.state import SalvageState
from jqcow.offline.salvaging.targets import ImageTarget, RawTarget, Target
from jqcow.salvage.amounts import Amounts
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.survey import Survey
from jqcow.testing import SimulatedDevice, enumerate_states
from tests.crash.judge import require
from tests.support.patients import Tables
from tests.support.users import create_simulated

CLUSTER_BYTES = 4096
DISK_BYTES = 4 << 20
KEPT_EVERY = 29
"""So many states are saved for one that is gone on with."""
UNDONE_EVERY = 7
"""Of so many crashed images one is taken back with cuts."""
Kept = tuple[SalvageState, bytes, bytes]
"""A state, and what is durable of target and report when it is."""


def damaged_image(lost: bytes = b"", place: int = 0) -> bytes:
    """Return an image whose first L2 table and refcount table are lost; ``lost`` lies at ``place``."""
    device, drawn = SimulatedDevice(), Random(3)
    with create_simulated(device, DISK_BYTES, CLUSTER_BYTES) as image:
        for start in range(0, DISK_BYTES, 5 * CLUSTER_BYTES):
            image.pwrite(drawn.randbytes(CLUSTER_BYTES), start)
    tables = Tables(device.content())
    tables.image[tables.l2 : tables.l2 + CLUSTER_BYTES] = b"\xee" * CLUSTER_BYTES
    tables.set_entry(48, 0)
    tables.image[place : place + len(lost)] = lost
    return bytes(tables.image)


def _run(
    patient: Patient,
    found: Survey,
    kind: str,
    begin: SalvageState,
    left: tuple[bytes, bytes],
    drop: tuple[str, ...],
    save: Callable[[SalvageState, SimulatedDevice, SimulatedDevice], None],
) -> tuple[bytes, bytes]:
    """Salvage from a state on; return target and report."""
    device, told = SimulatedDevice(left[0]), SimulatedDevice(left[1])
    device.drop_barriers = told.drop_barriers = set(drop)
    target: Target
    if kind == "raw":
        target = RawTarget(device, found.guest_map.size, begin.position)
    else:
        target = ImageTarget(device, found.guest_map.size, patient.shape, begin.build)
    report = RangeReport(told)
    if begin.report is None:
        report.begin({})
    else:
        report.go_on(dict(begin.report))
    copying = Copying(
        target,
        device,
        report,
        size=found.guest_map.size,
        bad=found.source.bad,
        begin=begin,
        save=lambda state: save(state, device, told),
        save_seconds=0,
    )
    parts = Parts(found, found.reader(), Certainty.GUESS)
    copying.run(parts.from_offset(begin.position), lambda done, total: None)
    report.finish({})
    return device.content(), told.content()


def salvage_that_goes_on(drop_barriers: tuple[str, ...]) -> None:
    """P1: a salvage that was cut off goes on, and ends as one that was not."""
    patient = patient_on(SimulatedDevice(damaged_image()), str(Path("damaged")), (0, 0))
    found = patient.survey()
    found.place()
    begin = SalvageState({}, 0, [], dict(vars(Amounts())), 0, None, None)
    for kind in ("raw", "qcow2"):
        kept: list[Kept] = []
        numbers = count()

        def keep(
            state: SalvageState,
            device: SimulatedDevice,
            told: SimulatedDevice,
            kept: list[Kept] = kept,
            numbers: Iterator[int] = numbers,
        ) -> None:
            if next(numbers) % KEPT_EVERY == 0:
                durable = SalvageState.unpack(state.pack())
                kept.append((durable, device.durable_content(), told.durable_content()))

        whole = _run(patient, found, kind, begin, (b"", b""), drop_barriers, keep)
        require(len(kept) > 2, "a salvage saves its state", f"only {len(kept)} times")
        for state, *left in kept:
            again = _run(patient, found, kind, state, (left[0], left[1]), (), lambda *_: None)
            require(again == whole, "P1: what was salvaged before the cut", "it is not in the target")


def new_tables_in_place(drop_barriers: tuple[str, ...]) -> None:
    """P5: an image that gets new tables is as before, or has them all; what is done is done."""
    before = damaged_image()
    crashed, done = _new_tables(before, drop_barriers)
    for each in crashed:
        undo_on(each, SimulatedDevice(done), force=True)
        require(each.content() == before, "P5: the image before its repair", "other bytes")
    # The magic is there, and nobody opens such an image: not to take the tables back either.
    _new_tables(damaged_image(b"\0\0\0\x63", 20), drop_barriers)


def _new_tables(before: bytes, drop_barriers: tuple[str, ...]) -> tuple[list[SimulatedDevice], bytes]:
    """Give an image new tables; return it as crashes leave it, and the undo file that calls them done."""
    device, undo = SimulatedDevice(before), SimulatedDevice()
    trial, _ = rebuilt(device, "", (0, 0), Following())
    after = trial.pread(trial.size(), 0)
    pack_undo(trial, undo, in_place=True)
    undo.barrier("saved")
    begun = undo.durable_content()
    crashed: list[SimulatedDevice] = []

    def cut(name: str, now: SimulatedDevice) -> None:
        crashed.extend(now.crash(state) for state in enumerate_states(now, budget=64))

    device.drop_barriers = set(drop_barriers)
    device.barrier_listeners.append(cut)
    put_in_place(trial, device)
    mark_done(undo, device)
    for each in crashed:
        content = each.content()
        if content[:512] == after[:512]:
            require(content == after, "P5: all new tables", "the header is there before what it names")
    require(device.durable_content() == after, "P5: what the undo file calls done", "it may be lost")
    for each in crashed[::UNDONE_EVERY]:
        _undo_cut_off(each.content(), begun, before)
    _undo_cut_off(after, undo.durable_content(), before)
    return crashed, undo.durable_content()


def _undo_cut_off(content: bytes, undo: bytes, before: bytes) -> None:
    """Take new tables back with a cut at each barrier; then once more."""
    device, marked = SimulatedDevice(content), SimulatedDevice(undo)
    left: list[tuple[bytes, bytes]] = []

    def cut(name: str, now: SimulatedDevice) -> None:
        left.append((device.durable_content(), marked.durable_content()))

    device.barrier_listeners.append(cut)
    marked.barrier_listeners.append(cut)
    undo_on(device, marked)
    for image, file in (*left, (device.durable_content(), marked.durable_content())):
        again = SimulatedDevice(image)
        undo_on(again, SimulatedDevice(file))
        require(again.content() == before, "P5: an undo that was cut off", "other bytes")
