"""The data file: what is synced when, and what becomes of a writer where that fails."""

from __future__ import annotations

import errno

import pytest

import jqcow
from jqcow.errors import CorruptionError, FileAccessDenied, PoisonedError, UnsupportedFeatureError
from jqcow.ondisk.entries import COPIED
from jqcow.ondisk.form import FormOptions, Preallocation
from jqcow.ondisk.l2 import ZERO
from jqcow.testing import Fault, FaultPlan, SimulatedDevice, enumerate_states
from jqcow.testing.device import noise
from tests.crash.beside import CLUSTER_BYTES, DATA, SIZE, image_with_data, with_entry
from tests.support.patients import Tables
from tests.support.users import beside, open_simulated


def barriers_of(device: SimulatedDevice) -> list[str]:
    """Return a list that the barriers of both devices will be added to."""
    found: list[str] = []
    for one in (device, beside(device)):
        one.barrier_listeners.append(lambda name, _: found.append(name))
    return found


@pytest.mark.parametrize("raw", [False, True])
def test_the_data_file_comes_first(raw: bool) -> None:
    device = image_with_data(raw=raw)
    found = barriers_of(device)
    with open_simulated(device) as image:
        assert found[0] == "open.settle" and found[1] == "open.data"
        image.pwrite(b"new", CLUSTER_BYTES)
        image.flush()
        del found[:]
        image.pwrite(b"x", 0)
        image.pwrite(b"new", 5 * CLUSTER_BYTES)
        image.flush()
        assert found == (["data.first", "flush.data"] if raw else ["data.first", "flush.record"])
        del found[:]
        image.flush()
        assert "data.first" not in found


def test_a_barrier_of_the_data_file_that_fails_is_final() -> None:
    device = image_with_data()
    image = open_simulated(device)
    image.pwrite(b"lost", 0)
    beside(device).faults = FaultPlan(Fault(errno.EIO, call="barrier"))
    with pytest.raises(OSError, match="Input/output"):
        image.flush()
    beside(device).faults = None
    with pytest.raises(PoisonedError):
        image.pwrite(b"x", 0)
    image.close()
    with open_simulated(device) as again:
        assert again.pread(CLUSTER_BYTES, 0) == DATA


def test_a_raw_file_takes_data_only_where_the_tables_have_data() -> None:
    device = with_entry(image_with_data(raw=True), ZERO)
    beside(device).pwrite(bytes(CLUSTER_BYTES), 0)
    found = barriers_of(device)
    with open_simulated(device) as image:
        image.write_zeroes(CLUSTER_BYTES, 0)
        image.discard(CLUSTER_BYTES, 0)
        assert next(image.extents()).kind == "zero"
        image.pwrite(b"new", 0)
        assert found[-2:] == ["data.first", "flush.record"]
        image.write_zeroes(CLUSTER_BYTES, 0)
        assert next(image.extents()).kind == "data"
        assert image.pread(3, 0) == beside(device).pread(3, 0) == bytes(3)


def test_a_transaction_writes_where_nobody_sees_data() -> None:
    device = image_with_data()
    with open_simulated(device) as image:
        with image.transaction() as transaction:
            transaction.pwrite(b"first", CLUSTER_BYTES)
            transaction.pwrite(b"second", CLUSTER_BYTES)
            assert image.pread(5, CLUSTER_BYTES) == bytes(5)
            point = transaction.savepoint()
            with pytest.raises(UnsupportedFeatureError, match="in a transaction"):
                transaction.pwrite(b"third", CLUSTER_BYTES)
            transaction.write_zeroes(CLUSTER_BYTES, CLUSTER_BYTES)
            with pytest.raises(UnsupportedFeatureError, match="in a transaction"):
                transaction.pwrite(b"third", CLUSTER_BYTES)
            point.rollback()
        assert image.pread(6, CLUSTER_BYTES) == b"second"


def test_the_space_of_a_lost_end_is_given_back() -> None:
    device = image_with_data()
    with open_simulated(device) as image:
        image.pwrite(DATA, SIZE - CLUSTER_BYTES)
        image.resize(SIZE - CLUSTER_BYTES - 512)
        assert beside(device).size() == SIZE - CLUSTER_BYTES - 512
        beside(device).pwrite(DATA * 2, SIZE - CLUSTER_BYTES - 512)
        image.resize(SIZE)
        assert not any(image.pread(CLUSTER_BYTES + 512, SIZE - CLUSTER_BYTES - 512))


def test_a_crash_of_both_shows_old_or_new() -> None:
    device = image_with_data()
    image = open_simulated(device)
    image.pwrite(b"n" * 1024, 512)
    seen = set()
    for state in enumerate_states(device, budget=64):
        with open_simulated(device.crash(state)) as crashed:
            seen.add(crashed.pread(2048, 0))
    pieces = {DATA[:512], b"n" * 512}
    assert len(seen) == 4
    assert all(found[512:1024] in pieces and found[1024:1536] in pieces for found in seen)


def test_offset_0_is_a_cluster() -> None:
    device = image_with_data()
    with open_simulated(device, "r") as image:
        assert next(image.extents()).host_offset == 0
    with open_simulated(with_entry(device, 0), "r") as image:
        assert next(image.extents()).kind == "unallocated"


@pytest.mark.parametrize(("entry", "match"), [(COPIED | 512, "is not a cluster's"), (1 << 62, "compressed")])
def test_damaged_entries(entry: int, match: str) -> None:
    device = with_entry(image_with_data(), entry)
    with open_simulated(device, "r") as image:
        assert not image.check().ok
        with pytest.raises(CorruptionError, match=match):
            image.pread(1, 0)


def test_devices_of_the_callers_own() -> None:
    with pytest.raises(ValueError, match="has a name, data_file, and a device"):
        jqcow.create_on_device(SimulatedDevice(), SIZE, data_file="name")
    device = image_with_data()
    with pytest.raises(FileAccessDenied):
        jqcow.open_device(device)
    plain = SimulatedDevice()
    jqcow.create_on_device(plain, SIZE).close()
    plain.reopen()
    with pytest.raises(ValueError, match="no external data file"):
        jqcow.open_device(plain, data_file=SimulatedDevice())


def test_a_leaked_table_looks_like_lost_data() -> None:
    device = image_with_data()
    tables = Tables(device.content())
    tables.set_entry(tables.header.l1_table_offset, 0)
    device.pwrite(bytes(tables.image), 0)
    with open_simulated(device, "r") as image:
        report = image.check()
        assert (report.lost, report.errors) == (1, 1)


@pytest.mark.parametrize("raw", [False, True])
def test_a_transaction_makes_no_disk_smaller_and_larger_over_data(raw: bool) -> None:
    device = image_with_data(raw=raw)
    with open_simulated(device) as image:
        image.pwrite(DATA * 4, 0)
        image.flush()
        with pytest.raises(UnsupportedFeatureError, match="second place"), image.transaction() as transaction:
            transaction.resize(CLUSTER_BYTES + 512)
            transaction.resize(SIZE)
        assert image.size == SIZE and image.pread(4 * CLUSTER_BYTES, 0) == DATA * 4
        with image.transaction() as transaction:
            transaction.resize(2 * SIZE)
            transaction.resize(SIZE)
            transaction.rollback()
        assert image.pread(4 * CLUSTER_BYTES, 0) == DATA * 4
        if not raw:
            # Where it ends with a cluster nothing has to be cleared.
            with image.transaction() as transaction:
                transaction.resize(CLUSTER_BYTES)
                transaction.resize(SIZE)
            assert image.pread(SIZE, 0) == DATA + bytes(SIZE - CLUSTER_BYTES)


def test_a_raw_file_is_the_disk_whatever_a_transaction_does() -> None:
    device = image_with_data(raw=True)
    with open_simulated(device) as image:
        for act in ("make_empty", "hide_below"):
            with pytest.raises(UnsupportedFeatureError, match="second place"), image.transaction() as change:
                getattr(change, act)(*(() if act == "make_empty" else (CLUSTER_BYTES, 0)))
        assert image.pread(SIZE, 0) == beside(device).content()[:SIZE]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_a_device_of_fixed_size_shows_no_old_bytes(raw: bool, preallocation: Preallocation) -> None:
    device, data = SimulatedDevice(), SimulatedDevice(noise(0, 3 * SIZE), has_fixed_size=True)
    with jqcow.create_on_device(
        device,
        SIZE,
        cluster_size=CLUSTER_BYTES,
        data_device=data,
        data_file="beside",
        data_file_raw=raw,
        preallocation=preallocation,
    ) as image:
        assert image.pread(SIZE, 0) == bytes(SIZE)
        image.pwrite(DATA, SIZE - CLUSTER_BYTES)
        image.resize(2 * SIZE, preallocation)
        assert image.pread(SIZE, SIZE) == bytes(SIZE)
        image.resize(SIZE // 2)
        image.resize(2 * SIZE)
        assert image.pread(SIZE, SIZE // 2) == bytes(SIZE)
        assert not raw or data.content()[: 2 * SIZE] == image.pread(2 * SIZE, 0)
        with pytest.raises(OSError, match="No space"):
            image.resize(3 * SIZE + 512)


def test_a_new_data_file_of_an_old_image_is_not_found_by_it() -> None:
    image = SimulatedDevice(noise(0, 2 << 20), has_fixed_size=True)
    data = SimulatedDevice(noise(0, SIZE), has_fixed_size=True)
    options: FormOptions = {"cluster_size": CLUSTER_BYTES, "data_file": "beside"}
    with jqcow.create_on_device(image, SIZE, journal_size=1 << 16, data_device=data, **options) as opened:
        opened.pwrite(DATA, 0)
    image, data = (SimulatedDevice(one.content(), has_fixed_size=True) for one in (image, data))
    left: list[bytes] = []
    data.change_listeners.append(lambda _, __: left.append(image.durable_content()[:4]))
    jqcow.create_on_device(image, SIZE, journal_size=1 << 16, data_device=data, **options).close()
    assert left and left[0] == bytes(4)
