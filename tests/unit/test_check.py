"""The checker against qemu-img check: on sound images, on every kind of damage, on hostile bytes."""

from __future__ import annotations

import contextlib
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jqcow.checker.check import Kind, check_structure
from jqcow.checker.findings import KEPT_FINDINGS
from jqcow.errors import FormatError, JqcowError, UnsupportedFeatureError
from jqcow.ondisk import entries, l2
from jqcow.ondisk.entries import COPIED, ENTRY
from jqcow.ondisk.header import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_BITMAPS,
    EXTENSION_ENCRYPTION,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_JOURNAL,
    Header,
)
from jqcow.ondisk.l2 import ZERO
from tests.support.patients import Patient, check, make_image, our_numbers, qemu_numbers
from tests.support.qemu import complaint

MIB = 1 << 20


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "image"
    commands = ("write 0 4k", "write -c 64k 4k")
    return bytes(make_image(path, *commands, size="256k", options="cluster_size=512"))


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    """Guest clusters 0 and 1 hold data, 2 zeros, 4 compressed data."""
    path = tmp_path / "patient.qcow2"
    make_image(path, "write 0 8k", "write -z 8k 4k", "write -c 16k 4k")
    return Patient(path)


@pytest.mark.parametrize("cluster_bytes", [512, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
def test_sound_images_of_qemu(tmp_path: Path, cluster_bytes: int, refcount_bits: int) -> None:
    path = tmp_path / "image"
    step = min(cluster_bytes, 65536)
    commands = [f"write {guest * cluster_bytes % (60 * MIB)} {step}" for guest in (0, 1, 7, 3, 200)]
    commands += [f"write -z {20 * 65536} {step * 3}", f"write -c {60 * MIB} {max(cluster_bytes, 8192)}"]
    options = f"cluster_size={cluster_bytes},refcount_bits={refcount_bits}"
    report = check(make_image(path, *commands, size="64M", options=options))
    assert report.ok, report.findings
    assert our_numbers(report) == qemu_numbers(path)
    assert report.zero_clusters == (step * 3 // cluster_bytes if cluster_bytes < 2 * MIB else 0)


@pytest.mark.parametrize(
    "options", ["compat=0.10", "compression_type=zstd", "lazy_refcounts=on", "preallocation=metadata"]
)
def test_sound_images_with_other_options(tmp_path: Path, options: str) -> None:
    path = tmp_path / "image"
    # What is preallocated cannot be compressed.
    extra = [] if "preallocation" in options else ["write -c 4M 128k"]
    report = check(make_image(path, "write 64k 1M", *extra, options=options))
    assert report.ok, report.findings
    assert our_numbers(report) == qemu_numbers(path)


def test_an_empty_disk(tmp_path: Path) -> None:
    path = tmp_path / "image"
    report = check(make_image(path, size="0"))
    assert report.ok
    assert report.total_clusters == 0


def leak(patient: Patient) -> Kind:
    patient.append_cluster()
    return Kind.LEAK


def refcount_too_high(patient: Patient) -> Kind:
    patient.set_refcount(patient.l2, 2)
    return Kind.LEAK


def refcount_too_low(patient: Patient) -> Kind:
    patient.set_refcount(patient.data, 0)
    return Kind.REFCOUNT_TOO_LOW


def refcount_of_header_missing(patient: Patient) -> Kind:
    patient.set_refcount(0, 0)
    return Kind.REFCOUNT_TOO_LOW


def refcount_block_missing(patient: Patient) -> Kind:
    patient.set_entry(patient.header.refcount_table_offset, 0)
    return Kind.REFCOUNT_TOO_LOW


def copied_flag_missing_in_l1(patient: Patient) -> Kind:
    patient.set_entry(patient.l1, patient.l2)
    return Kind.COPIED_FLAG


def copied_flag_missing_in_l2(patient: Patient) -> Kind:
    patient.set_entry(patient.l2, patient.data)
    return Kind.COPIED_FLAG


def copied_flag_on_a_shared_cluster(patient: Patient) -> Kind:
    patient.set_entry(patient.l2 + 24, patient.data | COPIED)
    patient.set_refcount(patient.data, 2)
    return Kind.COPIED_FLAG


def copied_flag_on_a_compressed_cluster(patient: Patient) -> Kind:
    patient.set_entry(patient.l2 + 32, patient.entry(patient.l2 + 32) | COPIED)
    return Kind.COPIED_FLAG


def data_past_the_end(patient: Patient) -> Kind:
    patient.set_entry(patient.l2 + 24, 1 << 40 | COPIED)
    return Kind.PAST_END


def data_past_the_end_in_a_zero_entry(patient: Patient) -> Kind:
    patient.set_entry(patient.l2 + 24, 1 << 40 | COPIED | ZERO)
    return Kind.PAST_END


def data_past_a_truncated_end(patient: Patient) -> Kind:
    host = patient.append_cluster()
    patient.set_entry(patient.l2 + 24, host | COPIED)
    del patient.image[host:]
    return Kind.PAST_END


def compressed_data_past_the_end(patient: Patient) -> Kind:
    patient.set_entry(patient.l2 + 24, l2.COMPRESSED | 1 << 40)
    return Kind.PAST_END


def compressed_data_right_behind_the_end(patient: Patient) -> Kind:
    host = patient.append_cluster() + patient.cluster_bytes
    patient.set_entry(patient.l2 + 24, l2.COMPRESSED | host)
    return Kind.PAST_END


def compressed_data_across_the_end(patient: Patient) -> Kind:
    host = patient.append_cluster()
    patient.set_entry(patient.l2 + 24, l2.compressed_entry(host + 4000, 200, 12))
    patient.set_entry(patient.l2 + 32, l2.compressed_entry(host + 3900, 200, 12))
    patient.set_refcount(host, 2)
    return Kind.REFCOUNT_TOO_LOW


def l2_table_past_the_end(patient: Patient) -> Kind:
    patient.set_entry(patient.l1 + 8, 1 << 40 | COPIED)
    return Kind.PAST_END


def refcount_block_past_the_end(patient: Patient) -> Kind:
    patient.set_entry(patient.header.refcount_table_offset + 8, 1 << 40)
    return Kind.PAST_END


def l1_table_past_the_end(patient: Patient) -> Kind:
    patient.change_header(36, ">I", 1 << 16)
    return Kind.PAST_END


def refcount_table_past_the_end(patient: Patient) -> Kind:
    patient.change_header(56, ">I", 100)
    return Kind.PAST_END


def data_unaligned(patient: Patient) -> Kind:
    patient.set_entry(patient.l2, patient.entry(patient.l2) + 512)
    return Kind.UNALIGNED


def l2_table_unaligned(patient: Patient) -> Kind:
    patient.set_entry(patient.l1, patient.entry(patient.l1) + 512)
    return Kind.UNALIGNED


def refcount_block_unaligned(patient: Patient) -> Kind:
    patient.set_entry(patient.header.refcount_table_offset + 8, patient.refcount_block + 512)
    return Kind.UNALIGNED


def reserved_bit_in_l1(patient: Patient) -> Kind:
    patient.set_entry(patient.l1, patient.entry(patient.l1) | 2)
    return Kind.RESERVED_BITS


def reserved_bit_in_l2(patient: Patient) -> Kind:
    patient.set_entry(patient.l2, patient.entry(patient.l2) | 1 << 60)
    return Kind.RESERVED_BITS


def reserved_bit_in_an_empty_l2_entry(patient: Patient) -> Kind:
    patient.set_entry(patient.l2 + 24, 4)
    return Kind.RESERVED_BITS


def reserved_bit_in_refcount_table(patient: Patient) -> Kind:
    place = patient.header.refcount_table_offset
    patient.set_entry(place, patient.entry(place) | 1)
    return Kind.RESERVED_BITS


def data_in_the_l2_table(patient: Patient) -> Kind:
    patient.set_entry(patient.l2 + 24, patient.l2 | COPIED)
    return Kind.OVERLAP


def data_in_the_header(patient: Patient) -> Kind:
    # QEMU reads an entry of offset 0 as unallocated: the second cluster of the L1 table's area is next.
    patient.set_entry(patient.l2 + 24, patient.l1 | COPIED)
    return Kind.OVERLAP


def l2_table_in_the_refcount_table(patient: Patient) -> Kind:
    patient.set_entry(patient.l1 + 8, patient.header.refcount_table_offset | COPIED)
    return Kind.OVERLAP


DAMAGE_WITH_QEMUS_NUMBERS = [
    leak,
    refcount_too_high,
    refcount_too_low,
    refcount_of_header_missing,
    refcount_block_missing,
    copied_flag_missing_in_l1,
    copied_flag_missing_in_l2,
    copied_flag_on_a_shared_cluster,
    copied_flag_on_a_compressed_cluster,
    data_past_the_end,
    data_past_the_end_in_a_zero_entry,
    data_past_a_truncated_end,
    compressed_data_past_the_end,
    refcount_block_past_the_end,
    refcount_block_unaligned,
    reserved_bit_in_l1,
    reserved_bit_in_l2,
    reserved_bit_in_an_empty_l2_entry,
    data_in_the_l2_table,
    data_in_the_header,
]

DAMAGE_WITH_QEMUS_VERDICT = [
    # QEMU counts clusters there.
    compressed_data_right_behind_the_end,
    compressed_data_across_the_end,
    # QEMU follows these pointers, and counts what it finds there.
    l2_table_past_the_end,
    data_unaligned,
    l2_table_unaligned,
    l2_table_in_the_refcount_table,
    # QEMU does not follow this one.
    reserved_bit_in_refcount_table,
    l1_table_past_the_end,
    refcount_table_past_the_end,
]


@pytest.mark.parametrize("damage", DAMAGE_WITH_QEMUS_NUMBERS, ids=lambda damage: damage.__name__)
def test_damage_counted_as_in_qemu(patient: Patient, damage: Callable[[Patient], Kind]) -> None:
    kind = damage(patient)
    report = patient.check()
    ours = our_numbers(report)
    # A leak past the end of the file is one that QEMU does not see.
    ours = (*ours[:-1], report.leaks - report.counts.get(Kind.LEAK_PAST_END, 0))
    assert report.counts.get(kind), report
    assert any(finding.kind == kind for finding in report.findings)
    assert ours == patient.qemu_numbers(), report.findings


@pytest.mark.parametrize("damage", DAMAGE_WITH_QEMUS_VERDICT, ids=lambda damage: damage.__name__)
def test_damage_found_as_in_qemu(patient: Patient, damage: Callable[[Patient], Kind]) -> None:
    kind = damage(patient)
    report = patient.check()
    corruptions = patient.qemu_numbers()[-2]
    assert report.counts.get(kind), report
    assert (report.corruptions > 0) == (corruptions > 0)


class TestStricterThanQemu:
    def test_metadata_shared_with_right_refcounts(self, patient: Patient) -> None:
        patient.set_entry(patient.l2 + 24, patient.l2)
        patient.set_entry(patient.l1, patient.l2)
        patient.set_refcount(patient.l2, 2)
        report = patient.check()
        assert report.counts == {Kind.OVERLAP: 1}
        assert patient.qemu_numbers()[-2:] == (report.corruptions, report.leaks) == (0, 0)
        assert not report.ok
        assert report.errors == 1

    def test_a_refcount_block_used_twice(self, patient: Patient) -> None:
        patient.set_entry(patient.header.refcount_table_offset + 8, patient.refcount_block)
        report = patient.check()
        assert report.counts[Kind.OVERLAP] == 1
        assert patient.qemu_numbers()[-2] > 0

    @pytest.mark.parametrize("flags", [COPIED, COPIED | ZERO, l2.COMPRESSED])
    def test_an_entry_into_the_reserved_range(self, patient: Patient, flags: int) -> None:
        host = patient.append_cluster()
        flags = flags if flags & COPIED else l2.COMPRESSED
        patient.set_entry(patient.l2 + 24, host | flags)
        assert patient.check().ok
        report = patient.check(reserved=[(host + 1024, 16)])
        assert report.counts == {Kind.RESERVED_RANGE: 1}
        assert report.findings[0].offset == patient.l2 + 24
        assert patient.check(reserved=[(host + patient.cluster_bytes, 4096)]).ok

    def test_metadata_in_the_reserved_range(self, patient: Patient) -> None:
        assert patient.check(reserved=[(patient.l2, 4096)]).counts == {Kind.RESERVED_RANGE: 1}

    def test_a_refcount_past_the_end(self, patient: Patient) -> None:
        patient.set_refcount(len(patient.image) + 2 * patient.cluster_bytes, 1)
        report = patient.check()
        assert report.counts == {Kind.LEAK_PAST_END: 1}
        assert (report.leaks, report.errors) == (1, 0)
        assert patient.qemu_numbers()[-2:] == (0, 0)

    @pytest.mark.parametrize("refcount_bits", [1, 2, 4])
    def test_a_narrow_refcount_past_the_end(self, tmp_path: Path, refcount_bits: int) -> None:
        image = make_image(tmp_path / "image", options=f"cluster_size=4096,refcount_bits={refcount_bits}")
        header = Header.unpack(bytes(image[:512]))
        block = ENTRY.unpack_from(image, header.refcount_table_offset)[0]
        cluster = -(-len(image) // 4096)
        image[block + cluster * refcount_bits // 8] |= 1 << cluster * refcount_bits % 8
        report = check(image)
        assert report.counts == {Kind.LEAK_PAST_END: 1}
        assert report.findings[0].offset == cluster * 4096

    def test_an_l1_table_too_small(self, patient: Patient) -> None:
        patient.change_header(24, ">Q", 1 << 40)
        assert patient.check().counts == {Kind.L1_TOO_SMALL: 1}

    @pytest.mark.parametrize(
        ("place", "change"),
        [
            (104, b"\x01"),
            (104, b"\x20"),
            (64, b"\x80"),
            (71, b"\x08"),
            (95, b"\x02"),
            (112, struct.pack(">II24s", EXTENSION_ENCRYPTION, 16, b"")),
            (112, struct.pack(">II24s", EXTENSION_BACKING_FORMAT, 16, b"raw")),
            (112, struct.pack(">II24s", EXTENSION_BITMAPS, 23, b"")),
        ],
    )
    def test_a_header_that_qemu_does_not_open(self, patient: Patient, place: int, change: bytes) -> None:
        patient.image[place : place + len(change)] = change
        patient.path.write_bytes(patient.image)
        assert "Could not open" in complaint(patient.path) or "invalid" in complaint(patient.path)
        report = patient.check()
        assert report.counts == {Kind.HEADER: 1} and report.errors == 1 and not report.corruptions

    def test_copied_without_a_table(self, patient: Patient) -> None:
        patient.set_entry(patient.l1 + 8, COPIED)
        report = patient.check()
        assert report.corruptions
        assert patient.qemu_numbers()[-2] > 0


class TestRefused:
    @pytest.mark.parametrize("bit", [1 << 20, INCOMPATIBLE_JOURNAL])
    def test_incompatible_features(self, patient: Patient, bit: int) -> None:
        patient.change_header(72, ">Q", bit)
        with pytest.raises(UnsupportedFeatureError):
            patient.check()

    def test_the_corrupt_bit_hinders_nothing(self, patient: Patient) -> None:
        patient.change_header(72, ">Q", INCOMPATIBLE_CORRUPT)
        assert patient.check().ok

    @pytest.mark.parametrize(
        ("place", "layout", "value", "name"),
        [
            (32, ">I", 1, "encryption"),
        ],
    )
    def test_by_name(self, patient: Patient, place: int, layout: str, value: int, name: str) -> None:
        patient.change_header(place, layout, value)
        with pytest.raises(UnsupportedFeatureError, match=name):
            patient.check()

    def test_a_file_of_too_many_clusters(self, patient: Patient) -> None:
        with pytest.raises(UnsupportedFeatureError, match="clusters"):
            check_structure(lambda length, offset: bytes(patient.image[offset : offset + length]), 1 << 62)

    @pytest.mark.parametrize("image", [b"", b"QFI\xfb", bytes(4096)])
    def test_what_is_no_image(self, image: bytes) -> None:
        with pytest.raises(FormatError):
            check(image)


class TestHostile:
    def test_a_version_2_image_has_no_zero_flag(self, tmp_path: Path) -> None:
        image = make_image(tmp_path / "image", "write 0 4k", options="compat=0.10,cluster_size=4096")
        header = Header.unpack(bytes(image[:512]))
        l2 = ENTRY.unpack_from(image, header.l1_table_offset)[0] & entries.OFFSET_MASK
        ENTRY.pack_into(image, l2 + 8, ZERO)
        assert check(image).counts == {Kind.RESERVED_BITS: 1}

    def test_an_l1_table_that_repeats_one_l2_table_takes_linear_time(self, patient: Patient) -> None:
        """A million pointers to a table of 512 entries: walked once, counted a million times."""
        repeats = MIB
        place = patient.append_cluster()
        patient.image[place:] = ENTRY.pack(patient.l2 | COPIED) * repeats
        patient.change_header(36, ">I", repeats)
        patient.change_header(40, ">Q", place)
        started = time.process_time()
        report = patient.check()
        assert time.process_time() - started < 15
        assert report.allocated_clusters == 3 * repeats
        assert report.counts[Kind.REFCOUNT_TOO_LOW] > 0
        assert len(report.findings) == KEPT_FINDINGS

    def test_findings_are_counted_but_only_some_are_kept(self, patient: Patient) -> None:
        for index in range(8, 512):
            patient.set_entry(patient.l2 + 8 * index, 1 << 50 | COPIED)
        report = patient.check()
        assert report.counts[Kind.PAST_END] == 504
        assert len(report.findings) == KEPT_FINDINGS

    def test_a_sparse_giant_needs_little_memory(self, patient: Patient) -> None:
        image = bytes(patient.image)

        def read(length: int, offset: int) -> bytes:
            return image[offset : offset + length].ljust(length, b"\0")

        assert check_structure(read, 1 << 34).ok

    def test_references_saturate(self, tmp_path: Path) -> None:
        """2^20 pointers to a table of 2^13 entries of one cluster: 2^33 references."""
        options = "cluster_size=65536,refcount_bits=32"
        image = make_image(tmp_path / "image", "write 0 64k", options=options)
        header = Header.unpack(bytes(image[:512]))
        l2 = ENTRY.unpack_from(image, header.l1_table_offset)[0] & entries.OFFSET_MASK
        data = ENTRY.unpack_from(image, l2)[0]
        image[l2 : l2 + 65536] = ENTRY.pack(data) * 8192
        struct.pack_into(">I", image, 36, MIB)
        struct.pack_into(">Q", image, 40, len(image))
        image += ENTRY.pack(l2 | COPIED) * MIB
        report = check(image)
        assert report.counts[Kind.TOO_MANY_REFERENCES] == (1 << 33) - ((1 << 32) - 1)
        assert report.counts[Kind.REFCOUNT_TOO_LOW] > 0

    @pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8])
    def test_more_references_than_a_refcount_can_count(self, tmp_path: Path, refcount_bits: int) -> None:
        path = tmp_path / "image"
        options = f"cluster_size=4096,refcount_bits={refcount_bits}"
        image = make_image(path, "write 0 4k", options=options)
        header = Header.unpack(bytes(image[:512]))
        l2 = ENTRY.unpack_from(image, header.l1_table_offset)[0] & entries.OFFSET_MASK
        image[l2 : l2 + 4096] = image[l2 : l2 + 8] * 512
        path.write_bytes(image)
        report = check(image)
        assert report.counts[Kind.TOO_MANY_REFERENCES] == 512 - ((1 << refcount_bits) - 1)
        assert our_numbers(report) == qemu_numbers(path)

    def test_the_largest_refcount(self, tmp_path: Path) -> None:
        image = make_image(tmp_path / "image", options="cluster_size=4096,refcount_bits=64")
        header = Header.unpack(bytes(image[:512]))
        block = ENTRY.unpack_from(image, header.refcount_table_offset)[0]
        struct.pack_into(">Q", image, block, (1 << 64) - 1)
        assert check(image).leaks == 1

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(seed=st.integers(0, 1 << 32), count=st.integers(1, 40))
    def test_mutated_images_give_a_report_or_an_error_of_jqcow(
        self, sound: bytes, seed: int, count: int
    ) -> None:
        image = bytearray(sound)
        source = random.Random(seed)
        for _ in range(count):
            place = source.choice((source.randrange(112), source.randrange(len(image) // 8) * 8))
            image[place] = source.randrange(256)
        del image[source.choice((len(image), source.randrange(len(image)))) :]
        with contextlib.suppress(JqcowError):
            check(image, reserved=[(8192, 4096)])


def test_a_finding_reads_well(patient: Patient) -> None:
    leak(patient)
    (finding,) = patient.check().findings
    assert str(finding) == (
        f"leak: cluster at {finding.offset:#x}: refcount 1, references 0, in use as nothing"
    )
