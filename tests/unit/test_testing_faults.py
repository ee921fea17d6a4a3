"""Fault plans: tear, shorten, delay, drop a barrier, fill the disk; on a simulated device and on a file."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import jqcow
from jqcow.device.base import Device
from jqcow.device.file import FileDevice
from jqcow.testing import (
    EVERYTHING,
    Fault,
    FaultPlan,
    FaultyDevice,
    SimulatedDevice,
    enumerate_states,
)

OLD, NEW = b"o" * 512, b"n" * 512
TIMEOUT_SECONDS = 60


def contents_after_crash(device: SimulatedDevice) -> set[bytes]:
    return {state.content() for state in enumerate_states(device, budget=10_000)}


def on_a_simulated_device(initial: bytes, path: Path) -> SimulatedDevice | FaultyDevice:
    return SimulatedDevice(initial)


def on_a_file(initial: bytes, path: Path) -> SimulatedDevice | FaultyDevice:
    path.write_bytes(initial)
    return FaultyDevice(FileDevice.open(path, writable=True))


Make = Callable[[bytes, Path], SimulatedDevice | FaultyDevice]
both_devices = pytest.mark.parametrize("make", [on_a_simulated_device, on_a_file])


def content(device: Device) -> bytes:
    return device.pread(device.size(), 0)


class TestParts:
    @pytest.mark.parametrize(
        ("sectors", "offset", "length", "parts"),
        [
            ({0}, 0, 1536, [range(0, 512)]),
            ({1, 2}, 0, 1536, [range(512, 1536)]),
            ({0, 2}, 0, 1536, [range(0, 512), range(1024, 1536)]),
            ({0, 1}, 100, 600, [range(100, 700)]),
            ({1}, 100, 600, [range(512, 700)]),
            ({0, 3, 4}, 512, 2560, [range(512, 1024), range(2048, 3072)]),
            ({7}, 0, 1536, []),
            (set(), 0, 1536, []),
        ],
    )
    def test_a_torn_write_keeps_whole_sectors(
        self, sectors: set[int], offset: int, length: int, parts: list[range]
    ) -> None:
        assert Fault.tear(sectors).applied_parts(offset, length, 512) == parts

    @pytest.mark.parametrize(
        ("applied_bytes", "offset", "length", "end"),
        [
            (0, 0, 1024, 0),
            (511, 0, 1024, 0),
            (600, 0, 1024, 512),
            (1024, 0, 1024, 1024),
            (500, 100, 450, 550),
        ],
    )
    def test_a_short_request_ends_where_a_sector_does(
        self, applied_bytes: int, offset: int, length: int, end: int
    ) -> None:
        expected = [range(offset, end)] if end > offset else []
        assert Fault.shorten(applied_bytes).applied_parts(offset, length, 512) == expected

    def test_wrong_faults_are_refused(self) -> None:
        with pytest.raises(ValueError, match="only a write is torn"):
            Fault(errno.EIO, call="punch", applied_sectors=frozenset({1}))
        with pytest.raises(ValueError, match="no such call"):
            Fault.delay(lambda: None, call="is_hole")


@both_devices
class TestBothDevices:
    def test_tear(self, make: Make, tmp_path: Path) -> None:
        device = make(OLD * 3, tmp_path / "file")
        device.faults = FaultPlan(Fault.tear({0, 2}, at=2))
        device.pwrite(OLD, 0)
        with pytest.raises(OSError, match="Input/output"):
            device.pwrite(NEW * 3, 0)
        assert content(device) == NEW + OLD + NEW
        device.close()

    def test_tear_untold(self, make: Make, tmp_path: Path) -> None:
        device = make(OLD * 3, tmp_path / "file")
        device.faults = FaultPlan(Fault.tear({1}, error=None))
        device.pwrite(NEW * 3, 0)
        assert content(device) == OLD + NEW + OLD
        device.close()

    def test_shorten(self, make: Make, tmp_path: Path) -> None:
        device = make(OLD * 2, tmp_path / "file")
        device.faults = FaultPlan(Fault.shorten(512))
        with pytest.raises(OSError, match="Input/output"):
            device.pwrite(NEW * 2, 0)
        assert content(device) == NEW + OLD
        device.faults = FaultPlan(Fault.shorten(512, call="punch", error=None))
        assert device.punch(0, 1024)
        assert content(device) == bytes(512) + OLD
        device.close()

    def test_full_disk_from_here_on(self, make: Make, tmp_path: Path) -> None:
        device = make(OLD * 2, tmp_path / "file")
        device.faults = FaultPlan(full_from=1)
        device.pwrite(NEW, 0)
        with pytest.raises(OSError, match="No space"):
            device.pwrite(NEW * 2, 512)
        assert content(device) == NEW * 2
        with pytest.raises(OSError, match="No space"):
            device.allocate(1024, 512)
        device.faults = None
        device.allocate(1024, 512)
        assert device.size() == 1536
        device.close()

    def test_capacity(self, make: Make, tmp_path: Path) -> None:
        device = make(OLD, tmp_path / "file")
        device.faults = FaultPlan(capacity_bytes=1024)
        with pytest.raises(OSError, match="No space"):
            device.pwrite(NEW * 2, 512)
        assert content(device) == OLD + NEW
        device.close()

    @pytest.mark.parametrize("call", ["pread", "pwrite", "barrier", "truncate", "allocate", "punch"])
    def test_every_kind_of_call_fails_and_does_nothing(self, make: Make, tmp_path: Path, call: str) -> None:
        device = make(OLD * 2, tmp_path / "file")
        device.faults = plan = FaultPlan(Fault(errno.EIO, call=call))
        calls: dict[str, Callable[[], object]] = {
            "pread": lambda: device.pread_into(memoryview(bytearray(9)), 0),
            "pwrite": lambda: device.pwrite(NEW, 0),
            "barrier": lambda: device.barrier("b"),
            "truncate": lambda: device.truncate(0),
            "allocate": lambda: device.allocate(0, 5000),
            "punch": lambda: device.punch(0, 512),
        }
        with pytest.raises(OSError, match="Input/output"):
            calls[call]()
        assert content(device) == OLD * 2
        assert plan.fired_calls == [call]
        assert plan.lost_changes == (call == "barrier")
        calls[call]()
        device.close()

    def test_a_delayed_call_lets_others_go_on(self, make: Make, tmp_path: Path) -> None:
        """Its effect comes late: a barrier meanwhile does not cover it."""
        device = make(OLD * 2, tmp_path / "file")
        begun, may_go_on = threading.Event(), threading.Event()

        def wait() -> None:
            begun.set()
            assert may_go_on.wait(TIMEOUT_SECONDS)

        device.faults = FaultPlan(Fault.delay(wait, call="pwrite"))
        slow = threading.Thread(target=device.pwrite, args=(NEW, 0))
        slow.start()
        assert begun.wait(TIMEOUT_SECONDS)
        device.pwrite(NEW, 512)
        device.barrier("b")
        assert content(device) == OLD + NEW
        may_go_on.set()
        slow.join()
        assert content(device) == NEW * 2
        if isinstance(device, SimulatedDevice):
            assert contents_after_crash(device) == {OLD + NEW, NEW * 2}
        device.close()


class TestBarriers:
    def test_the_next_barrier_is_dropped_and_nobody_is_told(self) -> None:
        device = SimulatedDevice(OLD)
        device.faults = plan = FaultPlan(Fault.drop_barrier())
        device.pwrite(NEW, 0)
        device.barrier("b")
        assert contents_after_crash(device) == {OLD, NEW}
        assert not plan.lost_changes
        device.barrier("b")
        assert contents_after_crash(device) == {NEW}

    def test_a_named_barrier_is_dropped_as_often_as_asked(self) -> None:
        device = SimulatedDevice(OLD)
        device.faults = FaultPlan(Fault.drop_barrier("b", at=2, repeats=True))
        for name, dropped in (("b", False), ("a", False), ("b", True), ("b", True)):
            device.pwrite(OLD, 0)
            device.barrier("settle")
            device.pwrite(NEW, 0)
            device.barrier(name)
            assert (device.durable_content() == OLD) == dropped

    def test_a_wrapper_drops_barriers_too(self) -> None:
        inner = SimulatedDevice(OLD)
        device = FaultyDevice(inner, FaultPlan(Fault.drop_barrier()))
        device.pwrite(NEW, 0)
        device.barrier("b")
        device.drop_barriers = {"c"}
        device.barrier("c")
        assert not inner.barriers
        device.barrier("b")
        assert inner.durable_content() == NEW

    def delayed_barrier(self, device: SimulatedDevice, meanwhile: Callable[[], None]) -> None:
        """Call a barrier; ``meanwhile`` runs in another thread after the call and before its effect."""

        def wait() -> None:
            other = threading.Thread(target=meanwhile)
            other.start()
            other.join(TIMEOUT_SECONDS)
            assert not other.is_alive(), "the device was locked"

        device.faults = FaultPlan(Fault.delay(wait, barrier_name="slow"))
        device.barrier("slow")

    def test_a_delayed_barrier_covers_what_was_changed_before_the_call(self) -> None:
        device = SimulatedDevice(OLD * 3)
        device.pwrite(NEW, 0)
        device.pwrite(b"x" * 512, 512)

        def meanwhile() -> None:
            device.pwrite(b"y" * 512, 512)
            device.pwrite(b"z" * 512, 1024)
            device.truncate(2048)

        self.delayed_barrier(device, meanwhile)
        durable = NEW + b"x" * 512 + OLD
        assert device.durable_content() == durable
        states = contents_after_crash(device)
        assert {len(state) for state in states} == {1536, 2048}
        assert {state[:512] for state in states} == {NEW}
        assert {state[512:1024] for state in states} == {b"x" * 512, b"y" * 512}
        device.barrier("b")
        assert contents_after_crash(device) == {NEW + b"y" * 512 + b"z" * 512 + bytes(512)}

    def test_another_barrier_completes_while_one_is_delayed(self) -> None:
        device = SimulatedDevice(OLD)
        device.pwrite(NEW, 0)

        def meanwhile() -> None:
            device.barrier("quick")
            assert device.durable_content() == NEW
            device.pwrite(OLD, 0)

        self.delayed_barrier(device, meanwhile)
        assert contents_after_crash(device) == {NEW, OLD}

    def test_a_delayed_size_is_not_covered(self) -> None:
        device = SimulatedDevice(OLD * 2)
        device.truncate(512)
        self.delayed_barrier(device, lambda: device.truncate(0))
        assert contents_after_crash(device) == {OLD, bytes(512), b""}


class TestSpace:
    def test_used_bytes_are_what_capacity_bounds(self) -> None:
        device = SimulatedDevice(OLD)
        device.truncate(4096)
        assert device.used_bytes == 512
        device.allocate(1024, 1024)
        device.pwrite(NEW, 3072)
        assert device.used_bytes == 2048
        device.punch(0, 512)
        assert device.used_bytes == 1536

    def test_looking_at_holes_is_no_call_that_can_fail(self) -> None:
        device = SimulatedDevice(OLD)
        device.faults = plan = FaultPlan(Fault(errno.EIO))
        assert not device.is_hole(0, 512)
        assert plan.total == 0


class TestImageOnFaultyFile:
    """The engine on a real file that goes bad: what users may do with their own programs."""

    def test_a_failed_flush_is_raised_and_the_next_process_recovers(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.qcow2"
        jqcow.create(path, 1 << 20).close()
        device = FaultyDevice(FileDevice.open(path, writable=True))
        image = jqcow.open_device(device, "r+")
        image.pwrite(b"a" * 4096, 0)
        image.flush()
        image.pwrite(b"b" * 4096, 8192)
        device.faults = FaultPlan(Fault(errno.EIO, call="barrier"))
        with pytest.raises(OSError, match="Input/output"):
            image.flush()
        with pytest.raises(jqcow.ReadOnlyError):
            image.pwrite(b"c", 0)
        image.close()
        with jqcow.open(path, "r+") as again:
            assert again.recovered is not None
            assert again.pread(4096, 0) == b"a" * 4096
            assert again.check().ok

    def test_a_full_disk_fails_the_write_and_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.qcow2"
        jqcow.create(path, 1 << 20).close()
        device = FaultyDevice(FileDevice.open(path, writable=True))
        with jqcow.open_device(device, "r+") as image:
            image.pwrite(b"a" * 4096, 0)
            device.faults = FaultPlan(full_from=1)
            with pytest.raises(OSError, match="No space"):
                image.pwrite(b"b" * (1 << 19), 1 << 19)
            device.faults = None
            image.pwrite(b"b" * (1 << 19), 1 << 19)
        with jqcow.open(path) as again:
            assert again.pread(1 << 19, 1 << 19) == b"b" * (1 << 19)


def test_everything_and_an_error() -> None:
    device = SimulatedDevice(OLD)
    device.faults = FaultPlan(Fault(errno.EIO, call="pwrite", applied_bytes=EVERYTHING))
    with pytest.raises(OSError, match="Input/output"):
        device.pwrite(NEW, 0)
    assert device.content() == NEW
