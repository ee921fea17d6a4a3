"""The judge: is a crashed image recovered, exact, and what was promised?

Every state is recovered by opening it for writing, and closed. A part of the states, chosen by their
digest, is looked at more closely: opened for reading only beforehand, written to afterwards, shown to QEMU.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jqcow
from jqcow.engine.medium import Medium
from jqcow.engine.recovery import open_store
from jqcow.errors import CorruptionError, JqcowError
from jqcow.offline.check import check_structure
from jqcow.ondisk.header import MAGIC, Header, HeaderArea
from jqcow.ondisk.root import is_live
from jqcow.testing import CrashState, SimulatedDevice
from tests.support.images import (
    JOURNAL_BYTES,
    SECTOR_BYTES,
    Expectation,
    Session,
    Windows,
    open_simulated,
    salts_of,
)

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
    opened = open_store(
        Medium(device),
        writable=True,
        journal_bytes=JOURNAL_BYTES,
        use_root_copy=True,
        new_salt=salts_of(device),
    )
    return jqcow.Image(opened, "r+")


def recover_and_close(device: SimulatedDevice) -> None:
    """What the laboratory watches, and crashes: a recovery, to its clean end."""
    try:
        recover(device).close()
    except JqcowError:
        # An image that nobody was told of need not open; the judge knows which.
        if device.durable_content()[: len(MAGIC)] == MAGIC and is_live(device.content()[:SECTOR_BYTES]):
            raise


@dataclass
class Judge:
    """Judges states, for a laboratory. ``qemu_every``: one state in so many is shown to QEMU, 0: none."""

    qemu_every: int = 0
    qemu_judged: int = 0

    def __call__(self, device: SimulatedDevice, expectation: Expectation, state: CrashState) -> None:
        """Raise PromiseBroken, or what the engine raises, if the state breaks a promise."""
        token = int.from_bytes(state.digest[:4], "big")
        if not expectation.exists:
            _may_be_anything(device)
            return
        if expectation.closed is not None and state.kind != "killed":
            require(device.content() == expectation.closed, "P1: a closed image is closed durably")
        _check_vouched(device, expectation)
        read_only = None
        if token % READ_ONLY_EVERY == 0 and device.pread(len(MAGIC), 0) == MAGIC:
            read_only = read_without_writing(device, expectation.windows)
        image = recover(device)
        judge_running(image, expectation)
        found = expectation.windows.reader(image)(expectation.windows.model_bytes, 0)
        require(read_only in (None, found), "P4: read-only opening shows what recovery brings back")
        image.close()
        judge_closed(device, expectation)
        if self.qemu_every and token % self.qemu_every == 0:
            self.qemu_judged += 1
            judge_by_qemu(device, expectation.windows, found)
        if token % WRITE_ON_EVERY == 0:
            write_on(device, expectation, found)


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
    found = read_without_writing(device, expectation.windows)
    require(found == expectation.vouched, "P1: autoclear bits vouch for data that changed")


def read_without_writing(device: SimulatedDevice, windows: Windows) -> bytes:
    """Return the guest's bytes by a read-only opening, which must not change the file."""
    before = device.content()
    image = open_simulated(device, "r")
    found = windows.reader(image)(windows.model_bytes, 0)
    report = image.check()
    require(report.ok, "P2: replay in memory", report.findings[:1])
    image.close()
    device.reopen()
    require(device.content() == before, "P4: reading changed the file")
    return found


def judge_running(image: jqcow.Image, expectation: Expectation) -> None:
    """The recovered image is exact and holds what was promised."""
    report = image.check()
    require(report.ok, "P2: after recovery", report.findings[:1])
    violations = expectation.check(image)
    promise = "P1" if expectation.rival is None else "P1 or P3"
    require(not violations, promise, "; ".join(violations[:4]))


def judge_closed(device: SimulatedDevice, expectation: Expectation) -> None:
    """After recovery and close the file is standard qcow2, without a leak, and opening it changes nothing."""
    content = device.content()
    require(not is_live(content[:SECTOR_BYTES]), "P2: the feature bit after a clean close")

    def read(length: int, offset: int) -> bytes:
        return content[offset : offset + length].ljust(length, b"\0")

    report = check_structure(read, len(content))
    require(report.ok, "P2: after a clean close", report.findings[:1])
    area = HeaderArea.parse(content[: report.image_end_offset])
    require(
        area.data[area.header.header_length :] == expectation.extensions, "P2: the header extensions changed"
    )
    open_simulated(device).close()
    require(device.content() == content, "P4: recovering again changed the file")


def write_on(device: SimulatedDevice, expectation: Expectation, found: bytes) -> None:
    """The recovered image can be used: it takes writes, a discard and a flush, and is exact after them."""
    later = expectation.copy()
    later.sectors.reset_to(found)
    later.rival = None
    session = Session(device, later, written=1 << 20)
    session.open()
    window_bytes = expectation.windows.window_bytes
    for index in range(expectation.windows.count):
        session.write(index * window_bytes + window_bytes // 2, SECTOR_BYTES * 3)
    session.flush()
    session.discard(0, window_bytes // 2)
    session.write(window_bytes // 4, SECTOR_BYTES)
    session.look()
    session.close()
    judge_closed(device, expectation)
    session.open()
    session.look()
    session.close()


RAW_BYTES_MAX = 8 << 40
"""A raw file of a larger disk is more than ext4 holds: QEMU checks such an image, and compares nothing."""


def judge_by_qemu(device: SimulatedDevice, windows: Windows, found: bytes) -> None:
    """QEMU finds no error and no leak in the recovered file, and reads what jqcow read."""
    with tempfile.TemporaryDirectory(prefix="jqcow-crash-") as folder:
        image, raw = Path(folder, "image.qcow2"), Path(folder, "read.raw")
        image.write_bytes(device.content())
        size = Header.unpack(device.content()[:SECTOR_BYTES]).size
        commands = [["qemu-img", "check", "-q", "-f", "qcow2", str(image)]]
        if size <= RAW_BYTES_MAX:
            _write_raw(raw, windows, found, size)
            commands.append(["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", str(raw), str(image)])
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            require(done.returncode == 0, f"{command[1]} by QEMU", done.stdout + done.stderr)


def _write_raw(path: Path, windows: Windows, found: bytes, size: int) -> None:
    with path.open("wb") as raw:
        for index in range(windows.count):
            start = windows.guest(index * windows.window_bytes)
            part = found[index * windows.window_bytes :][: min(windows.window_bytes, max(0, size - start))]
            raw.seek(start)
            raw.write(part)
        raw.truncate(size)
