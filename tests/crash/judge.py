"""The judge: is a crashed image recovered, exact, and what was promised?

Every state is recovered by opening it for writing, and closed. A part of the states, chosen by their
digest, is looked at more closely: opened for reading only beforehand, written to afterwards, shown to QEMU.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

import jqcow
from jqcow.errors import CorruptionError, JqcowError
from jqcow.ondisk.header import MAGIC, Header, HeaderArea
from jqcow.ondisk.naming import backing_file_of
from jqcow.ondisk.root import is_live
from jqcow.testing import CrashState, Fault, FaultPlan, SimulatedDevice
from tests.crash.undone import repaired_of
from tests.support import inside
from tests.support.below import Below, find_below, name_of
from tests.support.expectation import (
    SECTOR_BYTES,
    Expectation,
    Found,
    Windows,
    extensions_of,
    form_of,
    read_all,
)
from tests.support.patients import check
from tests.support.player import Player
from tests.support.qemu import run
from tests.support.users import JOURNAL_BYTES, Interrupt, Session, open_simulated, salts_of

READ_ONLY_EVERY = 4
WRITE_ON_EVERY = 8


class PromiseBroken(AssertionError):
    """A crash state whose recovery breaks a promise; the text says which."""


def require(condition: object, promise: str, detail: object = "") -> None:
    """Raise PromiseBroken unless ``condition`` holds."""
    if not condition:
        raise PromiseBroken(f"{promise}: {detail}")


def recover(device: SimulatedDevice) -> jqcow.Image:
    """Open a crashed image for writing, as a user would: with the root copy where sector 0 is garbage."""
    device.reopen()
    if device.pread(len(MAGIC), 0) == MAGIC:
        return open_simulated(device)
    try:
        open_simulated(device)
    except CorruptionError:
        device.reopen()
    else:
        raise PromiseBroken("an image without a header was opened")
    return inside.open_by_root_copy(device, JOURNAL_BYTES, salts_of(device), find_below)


def recover_and_close(device: SimulatedDevice) -> None:
    """What the laboratory watches, and crashes: a recovery, to its clean end."""
    if (repaired := repaired_of(device)) is not None:
        with repaired.crashed():
            repaired.take_back(device)
        return
    try:
        recover(device).close()
    except JqcowError:
        # An image that nobody was told of need not open; the judge knows which.
        if device.durable_content()[: len(MAGIC)] == MAGIC and is_live(device.content()[:SECTOR_BYTES]):
            raise


def recover_and_judge(device: SimulatedDevice, expectation: Expectation) -> None:
    """The next user finds what was promised, and so does everybody after the close."""
    image = recover(device)
    judge_running(image, expectation)
    image.close()
    judge_closed(device, expectation)


def fail_recovery(device: SimulatedDevice, expectation: Expectation, *faults: Fault) -> bool:
    """Recover while the host fails; return True if that ended the recovery."""
    device.faults = plan = FaultPlan(*faults)
    failed = False
    try:
        recover_and_close(device)
    except (OSError, Interrupt):
        if not plan.fired:
            raise
        failed = True
    device.faults = None
    if plan.lost_changes:
        expectation.forget_order()
    return failed


@dataclass
class Judge:
    """Judges states, for a laboratory. ``qemu_every``: one state in so many is shown to QEMU, 0: none."""

    qemu_every: int = 0
    qemu_judged: int = 0

    def __call__(self, device: SimulatedDevice, expectation: Expectation, state: CrashState) -> None:
        """Raise PromiseBroken, or what the engine raises, if the state breaks a promise."""
        if (repaired := repaired_of(device)) is not None:
            recover_and_close(device)
            require(device.durable_content() == repaired.before, "P5: an undone repair left other bytes")
            return
        token = int.from_bytes(state.digest[:4], "big")
        if not expectation.exists:
            _may_be_anything(device)
            return
        if expectation.closed is not None and state.kind != "killed":
            require(device.content() == expectation.closed, "P1: a closed image is closed durably")
        _check_vouched(device, expectation)
        read_only = None
        if token % READ_ONLY_EVERY == 0 and device.pread(len(MAGIC), 0) == MAGIC:
            read_only = read_without_writing(device, expectation.windows, exact=not expectation.damaged)
        image = recover(device)
        judge_running(image, expectation)
        found = read_all(image, expectation.windows)
        # What a failed barrier lost a reader is shown until a writer makes the host forget it.
        is_shown = state.kind == "killed" and expectation.lost
        is_same = read_only in (None, found) or is_shown
        require(is_same, "P4: read-only opening shows what recovery brings back")
        image.close()
        judge_closed(device, expectation)
        # QEMU reads no LUKS header with as few stripes as those of the laboratory.
        may_ask = self.qemu_every and not expectation.windows.encrypted
        if may_ask and token % self.qemu_every == 0:
            self.qemu_judged += 1
            judge_by_qemu(device, expectation.windows, found)
        if token % WRITE_ON_EVERY == 0:
            write_on(device, expectation)


def _may_be_anything(device: SimulatedDevice) -> None:
    """An image that nobody was told of: it opens or is refused, in jqcow's own words."""
    try:
        open_simulated(device, "r").close()
    except JqcowError:
        return


def _check_vouched(device: SimulatedDevice, expectation: Expectation) -> None:
    """While the file says that its autoclear bits hold, its data is what they vouch for."""
    if expectation.vouched is None:
        return
    sector = device.pread(SECTOR_BYTES, 0)
    if sector[: len(MAGIC)] != MAGIC or not Header.unpack(sector).autoclear_features:
        return
    found = read_without_writing(device, expectation.windows, exact=True)
    require(found.disk == expectation.vouched, "P1: autoclear bits vouch for data that changed")


def read_without_writing(device: SimulatedDevice, windows: Windows, *, exact: bool) -> Found:
    """Return the guest's bytes by read-only openings, which must not change the file.

    Where the refcounts were never ``exact``, replay alone does not make them so.
    """
    before = device.content()
    image = open_simulated(device, "r")
    disk, names = windows.reader(image)(windows.model_bytes, 0), [taken.name for taken in image.snapshots()]
    report = image.check()
    require(report.ok or not exact, "P2: replay in memory", report.findings[:1])
    image.close()
    snapshots = []
    for name in names:
        with open_simulated(device, "r", snapshot=name) as image:
            snapshots.append((name, image.size, windows.reader(image)(windows.model_bytes, 0)))
    device.reopen()
    require(device.content() == before, "P4: reading changed the file")
    return Found(disk, tuple(snapshots))


def judge_running(image: jqcow.Image, expectation: Expectation) -> None:
    """The recovered image is exact and holds what was promised."""
    report = image.check()
    require(report.ok, "P2: after recovery", report.findings[:1])
    violations = expectation.check(image)
    promise = "P1" if expectation.rival is None else "P1 or P3"
    require(not violations, promise, "; ".join(violations[:4]))
    if expectation.windows.data_file == "raw":
        _judge_raw(image, expectation.windows)


def _judge_raw(image: jqcow.Image, windows: Windows) -> None:
    """The bytes of a raw data file are those of the disk."""
    data, disk = inside.data_of(image), windows.reader(image)(windows.model_bytes, 0)
    # What a crash cut off in a change of the size may have left it longer.
    require(len(data) >= image.size, "P1: a raw data file is as long as the disk", len(data))
    for position in range(0, windows.model_bytes, SECTOR_BYTES):
        guest = windows.guest(position)
        if guest < image.size:
            same = data[guest : guest + SECTOR_BYTES] == disk[position : position + SECTOR_BYTES]
            require(same, "P1: a raw data file shows the disk", f"not at {guest:#x}")


def judge_closed(device: SimulatedDevice, expectation: Expectation) -> None:
    """After recovery and close the file is standard qcow2, without a leak, and opening it changes nothing."""
    content = device.content()
    require(not is_live(content[:SECTOR_BYTES]), "P2: the feature bit after a clean close")
    report = check(content)
    require(report.ok, "P2: after a clean close", report.findings[:1])
    area = HeaderArea.parse(content[: report.image_end_offset])
    is_raw = expectation.windows.data_file == "raw"
    require(area.header.is_raw_outside == is_raw, "P2: the autoclear bit of a raw data file")
    allowed = (expectation.extensions, *expectation.renamed)
    require(extensions_of(area) in allowed, "P2: the header extensions changed")
    forms, found = expectation.forms, form_of(area.header)
    require(not forms or found in forms, "P3: an amendment is there in part", f"{found}, not of {forms}")
    open_simulated(device).close()
    require(device.content() == content, "P4: recovering again changed the file")


def write_on(device: SimulatedDevice, expectation: Expectation) -> None:
    """The recovered image can be used: it takes writes, a discard and a flush, and is exact after them.

    Its snapshots stay as they are meanwhile, and can be deleted.
    """
    later = expectation.copy()
    session = Session(device, later, written=1 << 20, image=open_simulated(device))
    later.adopt(session.live)
    player = Player(session, Random(0))
    writes = " ".join(f"write:{index}w+w/2:3s" for index in range(expectation.windows.count))
    for steps in (writes, "flush discard:0:w/2 write:w/4:s"):
        # A device of fixed size may have no room for all of them.
        player.play(f"fail:room={1 << 40}{{ {steps} }}" if device.has_fixed_size else steps)
    player.play("look delete:0 close")
    judge_closed(device, expectation)
    player.play("open look close")


RAW_BYTES_MAX = 8 << 40
"""A raw file of a larger disk is more than ext4 holds: QEMU checks such an image, and compares nothing."""


def judge_by_qemu(device: SimulatedDevice, windows: Windows, found: Found) -> None:
    """QEMU finds no error and no leak in the recovered file, and reads what jqcow read.

    Of the snapshots it reads the first.
    """
    with tempfile.TemporaryDirectory(prefix="jqcow-crash-") as folder:
        image, raw = Path(folder, "image.qcow2"), Path(folder, "read.raw")
        image.write_bytes(device.content())
        size = Header.unpack(device.content()[:SECTOR_BYTES]).size
        below = below_of(device.content())
        if below is not None:
            if max(size, below.size) > RAW_BYTES_MAX:
                return
            _write_raw(Path(folder, name_of(below)), below.windows, below.content, below.size)
        source: list[object] = ["-f", "qcow2", image]
        pair: list[object] = ["-f", "raw", "-F", "qcow2", raw, image]
        if device.companion is not None:
            beside = Path(folder, "beside.raw")
            beside.write_bytes(device.companion.content())
            named = f"driver=qcow2,file.filename={image},data-file.driver=file,data-file.filename={beside}"
            source, pair = ["--image-opts", named], ["--image-opts", f"driver=raw,file.filename={raw}", named]
        commands: list[list[object]] = [["qemu-img", "check", "-q", *source]]
        if size <= RAW_BYTES_MAX:
            _write_raw(raw, windows, found.disk, size)
            commands.append(["qemu-img", "compare", "-q", *pair])
        for name, snapshot_size, content in found.snapshots[:1]:
            if size <= RAW_BYTES_MAX:
                expected, shown = Path(folder, "snapshot.raw"), Path(folder, "shown.raw")
                # QEMU shows a snapshot with the size that the disk has now.
                _write_raw(expected, windows, content, min(snapshot_size, size))
                chosen = ["-l", f"snapshot.name={name}"]
                commands += [
                    ["qemu-img", "convert", "-f", "qcow2", *chosen, "-O", "raw", image, shown],
                    ["truncate", "-s", str(min(snapshot_size, size)), shown],
                    ["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", expected, shown],
                ]
        for command in commands:
            result = run(*command)
            require(result.returncode == 0, f"{command[1]} by QEMU", result.stdout + result.stderr)


def below_of(content: bytes) -> Below | None:
    """Return the disk below a clean image, None where there is none."""
    header = Header.unpack(content[:SECTOR_BYTES])
    named = backing_file_of(HeaderArea.parse(content[: 1 << header.cluster_bits]), "")
    return None if named is None else find_below(named)


def _write_raw(path: Path, windows: Windows, found: bytes, size: int) -> None:
    with path.open("wb") as raw:
        for index in range(windows.count):
            start = windows.guest(index * windows.window_bytes)
            part = found[index * windows.window_bytes :][: min(windows.window_bytes, max(0, size - start))]
            raw.seek(start)
            raw.write(part)
        raw.truncate(size)
