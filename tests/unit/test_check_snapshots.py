"""The checker on images with internal snapshots: what qemu-img makes, damage to it, hostile bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jqcow.checker import check as checks
from jqcow.checker.check import Kind
from jqcow.cli import main
from jqcow.errors import CorruptionError, FormatError, JqcowError, UnsupportedFeatureError
from jqcow.offline.info import check_file, read_snapshots
from jqcow.offline.records import read_journal
from jqcow.ondisk import entries, l2, snapshots
from jqcow.ondisk.entries import COPIED
from jqcow.ondisk.snapshots import Snapshot
from tests.support.patients import Patient, as_live, check, make_image, our_numbers, qemu_numbers
from tests.support.qemu import done

MIB = 1 << 20


class SnapshotPatient(Patient):
    """An image to be damaged, with two snapshots: ``first`` of an earlier state, ``second`` of a later one.

    Guest cluster 0 was overwritten after the first snapshot, 1 after the second; all share 2, which is
    ``data``, and 4 with compressed data; cluster 600 lies in an L2 table that no snapshot has.
    """

    first: Snapshot
    second: Snapshot
    table: int

    def read_image(self) -> None:
        """Find the structures of the image file."""
        super().read_image()
        self.data = self.entry(self.l2 + 16) & entries.OFFSET_MASK
        self.table = self.header.snapshots_offset
        self.first, self.second = self.snapshots()

    @classmethod
    def make(cls, path: Path, options: str = "cluster_size=4096") -> SnapshotPatient:
        """Make the image with QEMU's tools."""
        make_image(path, "write 0 12k", "write -c 16k 4k", options=options)
        done("qemu-img", "snapshot", "-c", "first", path)
        done("qemu-io", "-f", "qcow2", "-c", "write 0 4k", path)
        done("qemu-img", "snapshot", "-c", "second", path)
        done("qemu-io", "-f", "qcow2", "-c", "write 4k 4k", "-c", "write 2400k 4k", path)
        return cls(path)

    def table_of(self, l1_entry: int) -> int:
        return self.entry(l1_entry) & entries.OFFSET_MASK

    def read(self, length: int, offset: int) -> bytes:
        return bytes(self.image[offset : offset + length]).ljust(length, b"\0")

    def snapshots(self) -> tuple[Snapshot, ...]:
        count = self.header.nb_snapshots
        return snapshots.parse_table(self.read, self.table, count, header=self.header).snapshots

    def set_snapshots(self, *changed: Snapshot) -> None:
        """Write other snapshots over the table, which has room for them in its cluster."""
        packed = snapshots.pack_table(changed)
        self.image[self.table : self.table + len(packed)] = packed
        self.change_header(60, ">I", len(changed))

    def change_first(self, **changes: int) -> None:
        self.set_snapshots(dataclasses.replace(self.first, **changes), self.second)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return bytes(SnapshotPatient.make(tmp_path_factory.mktemp("made") / "image").image)


@pytest.fixture
def patient(tmp_path: Path, made: bytes) -> SnapshotPatient:
    path = tmp_path / "patient.qcow2"
    path.write_bytes(made)
    return SnapshotPatient(path)


class History:
    """An image that QEMU changes, snapshots, reverts and resizes at random."""

    def __init__(self, path: Path, cluster_bytes: int, refcount_bits: int = 16, options: str = "") -> None:
        self.path = path
        self.cluster_bytes = cluster_bytes
        self.chance = random.Random(f"{cluster_bytes} {refcount_bits} {options}")
        self.names: list[str] = []
        self.created = 0
        self.disk_bytes = max(32 * cluster_bytes, MIB)
        self.clusters = list(range(self.disk_bytes // cluster_bytes))
        # QEMU compresses only what is not allocated, and packs more together than narrow refcounts count.
        self.compressible = self.chance.sample(self.clusters, len(self.clusters) // 2)
        self.packs = refcount_bits >= 8
        # Two bits count the disk and two snapshots, and QEMU counts once more while it applies one.
        self.most, self.applies = (2, False) if refcount_bits == 2 else (4, True)
        options = options or f"cluster_size={cluster_bytes},refcount_bits={refcount_bits}"
        done("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(self.disk_bytes))

    def write(self) -> None:
        """Write, zero, discard and compress a few clusters."""
        taken = set(self.compressible)
        commands = []
        for verb in ("write", "write", "write -z", "write -z -u", "discard", "write -c"):
            if verb != "write -c":
                cluster = self.chance.choice([cluster for cluster in self.clusters if cluster not in taken])
            elif self.packs:
                cluster = self.compressible.pop()
            else:
                continue
            commands += ["-c", f"{verb} {cluster * self.cluster_bytes} {self.cluster_bytes}"]
        done("qemu-io", "-f", "qcow2", *commands, self.path)

    def create(self) -> None:
        """Take a snapshot."""
        self.created += 1
        self.names.append(f"number {self.created}")
        done("qemu-img", "snapshot", "-c", self.names[-1], self.path)

    def change_snapshots(self) -> None:
        """Take a snapshot, and perhaps apply one; keep some of the older ones."""
        while len(self.names) >= self.most:
            name = self.names.pop(self.chance.randrange(len(self.names)))
            done("qemu-img", "snapshot", "-d", name, self.path)
        self.create()
        if self.applies and self.chance.random() < 0.3:
            done("qemu-img", "snapshot", "-a", self.chance.choice(self.names), self.path)


@pytest.mark.parametrize("cluster_bytes", [512, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("refcount_bits", [2, 4, 8, 16, 32, 64])
def test_sound_images_of_qemu(tmp_path: Path, cluster_bytes: int, refcount_bits: int) -> None:
    path = tmp_path / "image"
    history = History(path, cluster_bytes, refcount_bits)
    history.write()
    for _ in range(5):
        history.change_snapshots()
        history.write()
        report = check(path.read_bytes())
        assert report.ok, report.findings
        assert our_numbers(report) == qemu_numbers(path)


@pytest.mark.parametrize("options", ["compat=0.10", "compression_type=zstd", "lazy_refcounts=on"])
def test_sound_images_with_other_options(tmp_path: Path, options: str) -> None:
    path = tmp_path / "image"
    history = History(path, 65536, options=options)
    for _ in range(3):
        history.write()
        history.create()
    report = check(path.read_bytes())
    assert report.ok, report.findings
    assert our_numbers(report) == qemu_numbers(path)


@pytest.mark.parametrize("size", ["0", "40M"])
def test_snapshots_of_disks_of_another_size(tmp_path: Path, size: str) -> None:
    path = tmp_path / "image"
    make_image(path, size=size)
    done("qemu-img", "snapshot", "-c", "as it was", path)
    done("qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", path, "24M")
    done("qemu-io", "-f", "qcow2", "-c", "write 20M 64k", path)
    done("qemu-img", "snapshot", "-c", "as it is", path)
    report = check(path.read_bytes())
    assert report.ok, report.findings
    assert our_numbers(report) == qemu_numbers(path)


def shared_data_refcount_too_low(patient: SnapshotPatient) -> Kind:
    patient.set_refcount(patient.data, 2)
    return Kind.REFCOUNT_TOO_LOW


def shared_data_refcount_too_high(patient: SnapshotPatient) -> Kind:
    patient.set_refcount(patient.data, 4)
    return Kind.LEAK


def shared_data_counted_as_unshared(patient: SnapshotPatient) -> Kind:
    patient.set_refcount(patient.data, 1)
    return Kind.COPIED_FLAG


def snapshot_data_unreferenced(patient: SnapshotPatient) -> Kind:
    old = patient.table_of(patient.table_of(patient.first.l1_table_offset))
    patient.set_refcount(old, 0)
    return Kind.REFCOUNT_TOO_LOW


def l2_table_of_a_snapshot_unreferenced(patient: SnapshotPatient) -> Kind:
    patient.set_refcount(patient.table_of(patient.first.l1_table_offset), 0)
    return Kind.REFCOUNT_TOO_LOW


def l1_table_of_a_snapshot_unreferenced(patient: SnapshotPatient) -> Kind:
    patient.set_refcount(patient.first.l1_table_offset, 0)
    return Kind.REFCOUNT_TOO_LOW


def snapshot_table_unreferenced(patient: SnapshotPatient) -> Kind:
    patient.set_refcount(patient.table, 0)
    return Kind.REFCOUNT_TOO_LOW


def snapshot_table_referenced_twice(patient: SnapshotPatient) -> Kind:
    patient.set_refcount(patient.table, 2)
    return Kind.LEAK


def compressed_data_refcount_too_low(patient: SnapshotPatient) -> Kind:
    host, _ = l2.compressed_extent(patient.entry(patient.l2 + 32), patient.header.cluster_bits)
    patient.set_refcount(host, 1)
    return Kind.REFCOUNT_TOO_LOW


def copied_flag_on_shared_data(patient: SnapshotPatient) -> Kind:
    patient.set_entry(patient.l2 + 16, patient.data | COPIED)
    return Kind.COPIED_FLAG


def copied_flag_missing_on_own_data(patient: SnapshotPatient) -> Kind:
    patient.set_entry(patient.l2 + 8, patient.entry(patient.l2 + 8) & ~COPIED)
    return Kind.COPIED_FLAG


def copied_flag_missing_on_own_table(patient: SnapshotPatient) -> Kind:
    patient.set_entry(patient.l1, patient.l2)
    return Kind.COPIED_FLAG


def copied_flag_on_compressed_data_of_a_snapshot(patient: SnapshotPatient) -> Kind:
    place = patient.table_of(patient.first.l1_table_offset) + 32
    patient.set_entry(place, patient.entry(place) | COPIED)
    return Kind.COPIED_FLAG


def l1_table_of_a_snapshot_unaligned(patient: SnapshotPatient) -> Kind:
    patient.change_first(l1_table_offset=patient.first.l1_table_offset + 512)
    return Kind.UNALIGNED


def l1_table_of_a_snapshot_past_the_end(patient: SnapshotPatient) -> Kind:
    patient.change_first(l1_table_offset=1 << 40)
    return Kind.PAST_END


def l1_table_of_a_snapshot_too_large(patient: SnapshotPatient) -> Kind:
    patient.change_first(l1_size=(4 << 20) + 1)
    return Kind.L1_TOO_LARGE


def l1_table_of_a_snapshot_partly_past_the_end(patient: SnapshotPatient) -> Kind:
    patient.change_first(l1_size=1 << 20)
    return Kind.PAST_END


def two_snapshots_of_one_l1_table(patient: SnapshotPatient) -> Kind:
    patient.change_first(l1_table_offset=patient.second.l1_table_offset)
    return Kind.OVERLAP


def snapshot_of_the_active_l1_table(patient: SnapshotPatient) -> Kind:
    patient.change_first(l1_table_offset=patient.l1)
    return Kind.OVERLAP


def snapshot_lost_from_the_table(patient: SnapshotPatient) -> Kind:
    patient.set_snapshots(patient.first)
    return Kind.LEAK


def all_snapshots_lost(patient: SnapshotPatient) -> Kind:
    patient.set_snapshots()
    patient.change_header(64, ">Q", 0)
    return Kind.LEAK


def extra_data_missing(patient: SnapshotPatient) -> Kind:
    struct.pack_into(">I", patient.image, patient.table + 36, 8)
    first = patient.image[patient.table : patient.table + 48] + b"1first".ljust(8, b"\0")
    second = patient.second.pack()
    patient.image[patient.table : patient.table + 56 + len(second)] = first + second
    return Kind.INCOMPLETE_SNAPSHOT


def reserved_bit_in_an_l1_table_of_a_snapshot(patient: SnapshotPatient) -> Kind:
    place = patient.first.l1_table_offset
    patient.set_entry(place, patient.entry(place) | 1)
    return Kind.RESERVED_BITS


def reserved_bit_in_an_l2_table_of_a_snapshot(patient: SnapshotPatient) -> Kind:
    patient.set_entry(patient.table_of(patient.first.l1_table_offset) + 24, 4)
    return Kind.RESERVED_BITS


def data_of_a_snapshot_past_the_end(patient: SnapshotPatient) -> Kind:
    patient.set_entry(patient.table_of(patient.first.l1_table_offset) + 24, 1 << 40)
    return Kind.PAST_END


def data_of_a_snapshot_in_its_l1_table(patient: SnapshotPatient) -> Kind:
    place = patient.table_of(patient.first.l1_table_offset) + 24
    patient.set_entry(place, patient.first.l1_table_offset)
    return Kind.OVERLAP


def data_in_the_snapshot_table(patient: SnapshotPatient) -> Kind:
    patient.set_entry(patient.l2 + 24, patient.table | COPIED)
    return Kind.OVERLAP


def l2_table_of_a_snapshot_past_the_end(patient: SnapshotPatient) -> Kind:
    patient.set_entry(patient.first.l1_table_offset + 8, 1 << 40)
    return Kind.PAST_END


def l2_table_of_a_snapshot_unaligned(patient: SnapshotPatient) -> Kind:
    place = patient.first.l1_table_offset
    patient.set_entry(place, patient.entry(place) + 512)
    return Kind.UNALIGNED


def l2_table_of_a_snapshot_in_the_snapshot_table(patient: SnapshotPatient) -> Kind:
    patient.set_entry(patient.first.l1_table_offset + 8, patient.table)
    return Kind.OVERLAP


DAMAGE_WITH_QEMUS_NUMBERS = [
    shared_data_refcount_too_low,
    shared_data_refcount_too_high,
    shared_data_counted_as_unshared,
    snapshot_data_unreferenced,
    l2_table_of_a_snapshot_unreferenced,
    l1_table_of_a_snapshot_unreferenced,
    snapshot_table_unreferenced,
    snapshot_table_referenced_twice,
    compressed_data_refcount_too_low,
    copied_flag_on_shared_data,
    copied_flag_missing_on_own_data,
    copied_flag_missing_on_own_table,
    copied_flag_on_compressed_data_of_a_snapshot,
    l1_table_of_a_snapshot_unaligned,
    l1_table_of_a_snapshot_past_the_end,
    l1_table_of_a_snapshot_too_large,
    two_snapshots_of_one_l1_table,
    snapshot_of_the_active_l1_table,
    snapshot_lost_from_the_table,
    all_snapshots_lost,
    extra_data_missing,
    reserved_bit_in_an_l1_table_of_a_snapshot,
    reserved_bit_in_an_l2_table_of_a_snapshot,
    data_of_a_snapshot_past_the_end,
    data_of_a_snapshot_in_its_l1_table,
    data_in_the_snapshot_table,
]

DAMAGE_WITH_QEMUS_VERDICT = [
    # QEMU follows these pointers, and counts what it finds there.
    l1_table_of_a_snapshot_partly_past_the_end,
    l2_table_of_a_snapshot_past_the_end,
    l2_table_of_a_snapshot_unaligned,
    l2_table_of_a_snapshot_in_the_snapshot_table,
]


@pytest.mark.parametrize("damage", DAMAGE_WITH_QEMUS_NUMBERS, ids=lambda damage: damage.__name__)
def test_damage_counted_as_in_qemu(
    patient: SnapshotPatient, damage: Callable[[SnapshotPatient], Kind]
) -> None:
    kind = damage(patient)
    report = patient.check()
    assert report.counts.get(kind), report
    assert any(finding.kind == kind for finding in report.findings)
    assert our_numbers(report) == patient.qemu_numbers(), report.findings


@pytest.mark.parametrize("damage", DAMAGE_WITH_QEMUS_VERDICT, ids=lambda damage: damage.__name__)
def test_damage_found_as_in_qemu(patient: SnapshotPatient, damage: Callable[[SnapshotPatient], Kind]) -> None:
    kind = damage(patient)
    report = patient.check()
    assert report.counts.get(kind), report
    assert report.corruptions > 0
    assert patient.qemu_numbers()[-2] > 0


class TestStricterThanQemu:
    def test_an_l1_table_that_shares_its_cluster_with_right_refcounts(self, patient: SnapshotPatient) -> None:
        """Two snapshots of one state point to one L1 table, and everything is counted twice."""
        # Both point to the tables of the second state already: only the L1 tables and a name differ.
        done("qemu-img", "snapshot", "-d", "first", patient.path)
        done("qemu-img", "snapshot", "-a", "second", patient.path)
        done("qemu-img", "snapshot", "-c", "third", patient.path)
        patient.read_image()
        second, third = patient.first, patient.second
        patient.set_snapshots(second, dataclasses.replace(third, l1_table_offset=second.l1_table_offset))
        patient.set_refcount(second.l1_table_offset, 2)
        patient.set_refcount(third.l1_table_offset, 0)
        report = patient.check()
        assert report.counts == {Kind.OVERLAP: 1}
        assert patient.qemu_numbers()[-2:] == (report.corruptions, report.leaks) == (0, 0)

    def test_an_l1_table_too_small_for_the_disk_of_its_snapshot(self, patient: SnapshotPatient) -> None:
        patient.change_first(l1_size=patient.first.l1_size - 1)
        report = patient.check()
        assert report.counts == {Kind.L1_TOO_SMALL: 1}
        assert patient.qemu_numbers()[-2:] == (0, 0)

    def test_metadata_of_snapshots_in_the_reserved_range(self, patient: SnapshotPatient) -> None:
        l2 = patient.table_of(patient.first.l1_table_offset)
        for place in (patient.table, patient.first.l1_table_offset, l2):
            assert patient.check(reserved=[(place, 4096)]).counts == {Kind.RESERVED_RANGE: 1}


def test_copied_flags_in_snapshots_mean_nothing(patient: SnapshotPatient) -> None:
    l1 = patient.first.l1_table_offset
    l2 = patient.table_of(l1)
    for place in (l1, l2, l2 + 8):
        patient.set_entry(place, patient.entry(place) ^ COPIED)
    assert patient.check().ok
    assert patient.qemu_numbers()[-2:] == (0, 0)


def test_a_version_2_snapshot_needs_no_extra_data(tmp_path: Path) -> None:
    patient = SnapshotPatient.make(tmp_path / "image", "compat=0.10,cluster_size=4096")
    extra_data_missing(patient)
    assert patient.check().ok
    assert patient.qemu_numbers()[-2:] == (0, 0)


class TestLive:
    """The snapshots of an image whose header and metadata are in the journal alone."""

    @pytest.fixture
    def live(self, patient: SnapshotPatient) -> Path:
        l1 = patient.first.l1_table_offset
        hidden = [patient.table, l1, patient.table_of(l1), patient.l1, patient.l2, patient.refcount_block]
        path = patient.path.with_name("live.qcow2")
        path.write_bytes(as_live(patient.image, hidden))
        return path

    def test_the_check_sees_what_replay_will_make(self, patient: SnapshotPatient, live: Path) -> None:
        report = check_file(live)
        assert report.ok, report.findings
        assert our_numbers(report)[1:] == patient.qemu_numbers()[1:]

    def test_the_list_is_that_after_replay(self, patient: SnapshotPatient, live: Path) -> None:
        assert read_snapshots(live) == (patient.first, patient.second) == read_snapshots(patient.path)

    def test_commands_change_nothing(self, live: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = live.read_bytes()
        for command in (["info"], ["check"], ["snapshot", "-l"]):
            assert main.main([*command, str(live)]) == 0
        assert capsys.readouterr().out.count("second") == 2
        assert live.read_bytes() == before

    def test_records_are_told_in_words(self, patient: SnapshotPatient, live: Path) -> None:
        listing = read_journal(live)
        assert listing is not None
        (record,) = listing.records
        meanings = {operation.offset: operation.meaning for operation in record.operations}
        l1 = patient.first.l1_table_offset
        assert meanings[0].endswith(f", 2 snapshots at {patient.table:#x}")
        assert meanings[patient.table] == "snapshot table of 2"
        assert meanings[l1] == "L1 table of snapshot '1', entries 0 to 3"
        assert meanings[patient.table_of(l1)] == "L2 table of a snapshot"
        assert meanings[patient.l2].startswith("L2 table, guest range 0x0")


class TestRefused:
    @pytest.mark.parametrize(
        ("place", "layout", "value", "error", "words"),
        [
            (60, ">I", 65537, FormatError, "65537 snapshots"),
            (64, ">Q", 0, CorruptionError, "snapshot table"),
            (64, ">Q", 512, CorruptionError, "snapshot table"),
            (64, ">Q", 1 << 56, CorruptionError, "snapshot table"),
        ],
    )
    def test_a_table_that_cannot_be_walked(
        self,
        patient: SnapshotPatient,
        place: int,
        layout: str,
        value: int,
        error: type[JqcowError],
        words: str,
    ) -> None:
        patient.change_header(place, layout, value)
        with pytest.raises(error, match=words):
            patient.check()

    def test_l1_tables_of_hours(self, patient: SnapshotPatient, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checks, "MAX_SNAPSHOT_L1_BYTES", 2 * 8 * patient.first.l1_size)
        assert patient.check().ok
        monkeypatch.setattr(checks, "MAX_SNAPSHOT_L1_BYTES", 2 * 8 * patient.first.l1_size - 1)
        with pytest.raises(UnsupportedFeatureError, match="L1 tables"):
            patient.check()


class TestHostile:
    def with_many(self, patient: SnapshotPatient, step: int, l1_size: int) -> None:
        """Replace the table by 65,536 snapshots, whose L1 tables lie ``step`` bytes apart."""
        bare = dataclasses.replace(patient.first, id="", name="", disk_bytes=0, l1_size=l1_size)
        offsets = (bare.l1_table_offset + step * index for index in range(65536))
        packed = snapshots.pack_table(dataclasses.replace(bare, l1_table_offset=offset) for offset in offsets)
        patient.change_header(60, ">I", 65536)
        patient.change_header(64, ">Q", patient.append_cluster(refcount=0))
        patient.image[-patient.cluster_bytes :] = packed

    @pytest.mark.parametrize("step", [0, 4096])
    def test_65536_snapshots_with_overlapping_l1_tables(self, patient: SnapshotPatient, step: int) -> None:
        """Each has an L1 table of 32 MiB: 2 TiB to read, were they read one by one."""
        l1_size = 4 << 20
        self.with_many(patient, step, l1_size)
        length = 32 * MIB + 65536 * step + patient.first.l1_table_offset
        image = bytes(patient.image)
        read_bytes = 0

        def read(length: int, offset: int) -> bytes:
            nonlocal read_bytes
            read_bytes += length
            return image[offset : offset + length].ljust(length, b"\0")

        report = checks.check_structure(read, length)
        assert read_bytes < 2 * length
        assert report.counts[Kind.OVERLAP] > 8192
        assert report.allocated_clusters == 5

    def test_65536_snapshots_with_l1_tables_past_the_end(self, patient: SnapshotPatient) -> None:
        """2 TiB of L1 tables that are not there are errors, and nothing to read."""
        self.with_many(patient, 32 * MIB, 4 << 20)
        report = patient.check()
        assert report.counts[Kind.PAST_END] >= 65536

    def test_65536_snapshots_that_share_a_table_are_counted_each(self, patient: SnapshotPatient) -> None:
        self.with_many(patient, 0, 1)
        patient.set_refcount(patient.data, 65535)
        report = patient.check()
        # The L1 table, its L2 table, and what that points to: one reference too many each, and the disk's.
        assert report.counts[Kind.TOO_MANY_REFERENCES] >= 3

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(seed=st.integers(0, 1 << 32), count=st.integers(1, 30))
    def test_mutated_images_give_a_report_or_an_error_of_jqcow(
        self, patient: SnapshotPatient, seed: int, count: int
    ) -> None:
        image = bytearray(patient.image)
        source = random.Random(seed)
        starts = [0, patient.table, patient.first.l1_table_offset]
        for _ in range(count):
            place = source.choice((*starts, source.randrange(len(image) // 4096) * 4096))
            image[place + source.randrange(112)] = source.randrange(256)
        del image[source.choice((len(image), source.randrange(len(image)))) :]
        with contextlib.suppress(JqcowError):
            check(image, reserved=[(8192, 4096)])
