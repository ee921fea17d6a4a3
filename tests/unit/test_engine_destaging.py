"""Small writes that wait in the journal: who takes them, what a flush costs, what comes after."""

from __future__ import annotations

import errno
from typing import Any

import pytest

import jqcow
from jqcow.disks.policy import Following
from jqcow.engine.destaging import FRESH_BYTES_MAX
from jqcow.errors import UnsupportedFeatureError
from jqcow.offline.records import read_journal
from jqcow.offline.recover import recover_image
from jqcow.offline.salvaging.in_place import rebuilt
from jqcow.offline.salvaging.parts import Parts
from jqcow.offline.salvaging.patient import patient_on
from jqcow.salvage.evidence import Certainty
from jqcow.testing import Fault, FaultPlan, SimulatedDevice, Write
from tests.support.beside import HeldUp
from tests.unit.engines import CLUSTER, JOURNAL, MIB, SECTOR, barriers

LONG = 16 * JOURNAL


def started(
    journal_size: int = LONG, free_bytes: int | None = None, **options: Any
) -> tuple[SimulatedDevice, jqcow.Image]:
    """Return a live image, whose first clusters have data, on its device; a host that tells of its space."""
    device = SimulatedDevice()
    if free_bytes is not None:
        vars(device)["free_bytes"] = lambda: free_bytes
    jqcow.create_on_device(device, 4 * MIB, cluster_size=CLUSTER, **options).close()
    device.reopen()
    image = jqcow.open_device(device, "r+", journal_size=journal_size, small_writes="journal")
    image.pwrite(b"\x33" * (4 * CLUSTER), 0)
    image.checkpoint()
    return device, image


def recovered(device: SimulatedDevice, mode: Any = "r+") -> jqcow.Image:
    return jqcow.open_device(device.killed(), mode, journal_size=LONG)


def test_a_flush_is_one_append_and_one_barrier() -> None:
    device, image = started()
    names = barriers(device)
    image.pwrite(b"\x44" * CLUSTER, 40 * CLUSTER)
    assert not device.changes
    image.flush()
    assert names == ["flush.record"]
    assert recovered(device).pread(CLUSTER, 40 * CLUSTER) == b"\x44" * CLUSTER


def test_what_may_be_overwritten_is_written_once_unless_something_waits_there() -> None:
    device, image = started()
    image.pwrite(b"\x44" * CLUSTER, CLUSTER)
    assert any(isinstance(change, Write) for change in device.changes)
    names = barriers(device)
    image.flush()
    assert names == ["flush.data"]
    image.pwrite(b"\x44" * SECTOR, 40 * CLUSTER)
    image.flush()
    image.pwrite(b"\x55" * SECTOR, 40 * CLUSTER)
    assert not device.changes
    del names[:]
    image.flush()
    assert names == ["flush.record"]
    assert recovered(device).pread(SECTOR, 40 * CLUSTER) == b"\x55" * SECTOR


def test_a_stream_without_flushes_is_written_once() -> None:
    device, image = started()
    for number in range(80):
        image.pwrite(b"\x44" * CLUSTER, (8 + number) * CLUSTER)
    waiting = image._engine.log.pending
    assert waiting.length_bytes == FRESH_BYTES_MAX
    assert any(isinstance(change, Write) for change in device.changes)
    names = barriers(device)
    image.flush()
    assert names == ["flush.record"]
    crashed = recovered(device)
    assert crashed.pread(80 * CLUSTER, 8 * CLUSTER) == b"\x44" * (80 * CLUSTER)


def test_what_waits_in_one_cluster_comes_to_lie_in_one() -> None:
    device, image = started()
    for number in reversed(range(4)):
        image.pwrite(bytes([number]) * SECTOR, 40 * CLUSTER + 2 * number * SECTOR)
    image.pwrite(b"\x44" * 3 * SECTOR, 41 * CLUSTER - SECTOR)
    image.checkpoint()
    assert [image.pread(1, 40 * CLUSTER + 2 * number * SECTOR)[0] for number in range(4)] == [0, 1, 2, 3]
    assert image.pread(3 * SECTOR, 41 * CLUSTER - SECTOR) == b"\x44" * 3 * SECTOR
    found = image.check()
    assert (found.ok, found.allocated_clusters) == (True, 6)
    assert recovered(device).check().ok


def test_over_a_snapshot_a_flush_is_one_barrier_too() -> None:
    device, image = started()
    image.create_snapshot("kept")
    names = barriers(device)
    image.pwrite(b"\x44" * SECTOR, CLUSTER)
    image.flush()
    assert names == ["flush.record"]
    image.close()
    image = recovered(device)
    assert image.pread(2 * SECTOR, CLUSTER) == b"\x44" * SECTOR + b"\x33" * SECTOR


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"x" * (SECTOR + 1), 0),
        (b"x" * SECTOR, 1),
        (b"x" * (33 << 10), 0),
        (b"jqcowFRM" * 64, 0),
    ],
    ids=["part of a sector", "beside a sector", "long", "like a frame"],
)
def test_other_writes_go_the_ordinary_way(data: bytes, offset: int) -> None:
    device, image = started()
    image.pwrite(data, offset)
    assert any(isinstance(change, Write) for change in device.changes)
    assert image.pread(len(data), offset) == data


def test_a_clean_image_is_overwritten_in_place_and_stays_clean() -> None:
    device, image = started()
    image.close()
    device.reopen()
    image = jqcow.open_device(device, "r+", small_writes="journal")
    image.pwrite(b"\x44" * SECTOR, 0)
    image.flush()
    assert image.info().journal is None


def test_what_waits_is_data_in_every_view() -> None:
    _, image = started()
    image.pwrite(b"\x44" * SECTOR, 64 * CLUSTER)
    assert not image.reads_as_zeros(CLUSTER, 64 * CLUSTER)
    assert image.reads_as_zeros(CLUSTER - SECTOR, 64 * CLUSTER + SECTOR)
    found = [(part.kind, part.offset, part.length) for part in image.extents(CLUSTER, 64 * CLUSTER)]
    rest = ("unallocated", 64 * CLUSTER + SECTOR, CLUSTER - SECTOR)
    assert found == [("data", 64 * CLUSTER, SECTOR), rest]


def test_readers_of_a_crashed_image_see_what_waits() -> None:
    device, image = started()
    image.pwrite(b"\x44" * SECTOR, 20 * CLUSTER)
    image.flush()
    image.pwrite(b"\x55" * SECTOR, 20 * CLUSTER)
    crashed = device.killed()
    before = crashed.content()
    with jqcow.open_device(crashed, "r") as reader:
        assert reader.pread(2 * SECTOR, 20 * CLUSTER) == b"\x44" * SECTOR + bytes(SECTOR)
        assert reader.check().ok
    assert crashed.content() == before


def test_recovery_writes_nothing_of_it_and_close_does() -> None:
    device, image = started()
    image.pwrite(b"\x44" * SECTOR, 20 * CLUSTER)
    image.flush()
    image = recovered(device)
    device = image._medium.device  # type: ignore[assignment]
    assert image.pread(SECTOR, 20 * CLUSTER) == b"\x44" * SECTOR
    assert [part.kind for part in image.extents(SECTOR, 20 * CLUSTER)] == ["data"]
    # A crash of the recovered image has it all the same, behind a record of the new epoch.
    image.pwrite(b"\x66" * CLUSTER, 0)
    image.flush()
    again = device.killed()
    with jqcow.open_device(again, "r") as reader:
        assert reader.pread(SECTOR, 20 * CLUSTER) == b"\x44" * SECTOR
    image.close()
    device.reopen()
    with jqcow.open_device(device, "r") as reader:
        assert reader.pread(SECTOR, 20 * CLUSTER) == b"\x44" * SECTOR
        assert reader.info().journal is None


@pytest.mark.parametrize("act", ["checkpoint", "close", "snapshot", "discard", "long"])
def test_what_comes_after_finds_it_done(act: str) -> None:
    device, image = started()
    image.pwrite(b"\x44" * SECTOR, 20 * CLUSTER)
    image.flush()
    match act:
        case "checkpoint":
            image.checkpoint()
        case "close":
            image.close()
        case "snapshot":
            image.create_snapshot("kept")
            image.pwrite(b"\x55" * SECTOR, 20 * CLUSTER)
            image.apply_snapshot("kept")
        case "discard":
            image.discard(CLUSTER, 20 * CLUSTER)
            image.flush()
        case "long":
            image.pwrite(b"\x55" * (SECTOR + 3), 20 * CLUSTER)
            image.flush()
    expected = {"discard": b"\0", "long": b"\x55"}.get(act, b"\x44")
    assert recovered(device).pread(1, 20 * CLUSTER) == expected


def test_many_are_brought_home_before_they_are_too_many() -> None:
    device, image = started(JOURNAL)
    names = barriers(device)
    for number in range(64):
        image.pwrite(bytes([number + 1]) * SECTOR, (8 + number) * CLUSTER)
        image.flush()
    assert names.count("flush.ordered") >= 4
    assert image.info().journal is not None and image.info().journal.length == JOURNAL
    image = recovered(device)
    for number in range(64):
        assert image.pread(1, (8 + number) * CLUSTER) == bytes([number + 1])


def test_a_stream_that_is_not_flushed_is_written_in_long_runs() -> None:
    device, image = started(JOURNAL)
    for sector in range(64):
        image.pwrite(bytes([sector + 1]) * SECTOR, 8 * CLUSTER + sector * SECTOR)
    lengths = [len(change.data) for change in device.changes if isinstance(change, Write)]
    assert lengths and min(lengths) >= CLUSTER
    image.close()


def test_a_full_disk_is_told_and_what_was_flushed_stays() -> None:
    device, image = started()
    image.pwrite(b"\x44" * SECTOR, 20 * CLUSTER)
    image.flush()
    device.faults = FaultPlan(Fault(errno.ENOSPC, at=1, call="pwrite"))
    with pytest.raises(OSError, match=r"28"):
        image.checkpoint()
    device.faults = None
    assert image.pread(1, 20 * CLUSTER) == b"\x44"
    assert recovered(device).pread(1, 20 * CLUSTER) == b"\x44"
    image.checkpoint()
    assert image.check().ok


def test_where_the_host_is_short_of_space_a_write_goes_the_ordinary_way() -> None:
    device, image = started(free_bytes=64 << 10)
    image.pwrite(b"\x44" * SECTOR, 20 * CLUSTER)
    assert any(isinstance(change, Write) for change in device.changes)


@pytest.mark.parametrize("is_damaged", [False, True], ids=["whole", "with a gap"])
def test_salvage_has_what_waits(is_damaged: bool) -> None:
    device, image = started()
    image.pwrite(b"\x66" * SECTOR, 30 * CLUSTER)
    image.flush()
    image.pwrite(b"\x44" * SECTOR, 20 * CLUSTER + SECTOR)
    image.flush()
    image.pwrite(b"\x55" * SECTOR, 50 * CLUSTER)
    image.flush()
    content = bytearray(device.killed().content())
    if is_damaged:
        record = image._engine.log.require_journal().extent.half_offset(2) + 4096
        content[record : record + SECTOR] = bytes(SECTOR)
    patient = patient_on(SimulatedDevice(bytes(content)), "", (0, 0))
    found = patient.survey()
    disk = bytearray()
    for part in Parts(found, found.reader(), Certainty.GUESS).from_offset(0):
        assert part.offset == len(disk)
        disk += part.content or bytes(part.length)
    assert len(disk) == image.size
    assert disk[50 * CLUSTER : 50 * CLUSTER + SECTOR] == b"\x55" * SECTOR
    assert bool(patient.damages or found.shape.damages) == is_damaged
    if not is_damaged:
        assert disk == image.pread(image.size, 0)


def test_tables_are_not_made_anew_in_place_while_something_waits() -> None:
    device, image = started()
    image.pwrite(b"\x44" * SECTOR, 20 * CLUSTER)
    image.flush()
    with pytest.raises(UnsupportedFeatureError, match="writes of the guest"):
        rebuilt(device.killed(), "", (0, 0), Following(False))


def test_who_finds_too_much_waiting_waits_for_who_is_alone() -> None:
    device, image = started(JOURNAL)
    for number in range(16):
        image.pwrite(b"\x44" * SECTOR, (8 + number) * CLUSTER)

    def change() -> None:
        with image.transaction() as transaction:
            transaction.pwrite(b"\x66" * SECTOR, 0)

    with HeldUp(device, change, call="pwrite") as held:
        held.run(lambda: image.pwrite(b"\x55" * SECTOR, 60 * CLUSTER))
    assert (image.pread(1, 60 * CLUSTER), image.pread(1, 0)) == (b"\x55", b"\x66")


def test_an_unknown_choice_is_refused() -> None:
    device, image = started()
    image.close()
    device.reopen()
    with pytest.raises(ValueError, match="small_writes"):
        jqcow.open_device(device, "r+", small_writes="elsewhere")  # type: ignore[arg-type]


def test_reports_tell_of_it_in_words(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from jqcow.cli.main import main

    device, image = started()
    image.pwrite(b"\x44" * SECTOR, 20 * CLUSTER)
    image.flush()
    image.checkpoint()
    image.pwrite(b"\x55" * SECTOR, 30 * CLUSTER)
    image.flush()
    path = tmp_path / "crashed.qcow2"
    path.write_bytes(device.killed().content())
    listing = read_journal(path)
    assert listing is not None
    told = [operation.meaning for record in listing.records for operation in record.operations]
    assert f"a write to guest range {30 * CLUSTER:#x} to {30 * CLUSTER + SECTOR:#x}, not done" in told
    assert main(["info", str(path)]) == 0
    assert "Small writes of the guest wait in it: 512 B" in capsys.readouterr().out
    report = recover_image(path)
    assert report.journal is not None
    assert (report.journal.pending_writes, report.journal.pending_bytes) == (1, SECTOR)
    assert "do 1 small writes of the guest, of 512 bytes in all" in report.actions
    with jqcow.open(path) as reader:
        assert reader.pread(1, 30 * CLUSTER) == b"\x55"
