"""The simulated device: the current view, what is durable, and faults."""

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jqcow.device.base import Device
from jqcow.testing import (
    EVERYTHING,
    Fault,
    FaultPlan,
    Punch,
    SimulatedDevice,
    Truncate,
    Write,
    enumerate_states,
)

OLD, NEW = b"o" * 512, b"n" * 512


def contents_after_crash(device: SimulatedDevice) -> set[bytes]:
    return {state.content() for state in enumerate_states(device, budget=10_000)}


def test_it_is_a_device() -> None:
    device: Device = SimulatedDevice()
    assert device.size() == 0


class TestCurrentView:
    def test_reads_past_the_end_are_zeros(self) -> None:
        device = SimulatedDevice(b"abc")
        assert device.pread(5, 1) == b"bc\0\0\0"
        assert device.pread(2, 5000) == b"\0\0"
        buffer = bytearray(b"xxxx")
        device.pread_into(memoryview(buffer), 2)
        assert buffer == b"c\0\0\0"

    def test_write_past_the_end_grows(self) -> None:
        device = SimulatedDevice()
        device.pwrite(b"x", 1000)
        assert device.size() == 1001
        assert device.content() == bytes(1000) + b"x"

    def test_shrinking_and_growing_again_reads_zeros(self) -> None:
        device = SimulatedDevice(b"a" * 1500)
        device.truncate(700)
        device.truncate(1500)
        assert device.content() == b"a" * 700 + bytes(800)

    def test_punch_keeps_the_size(self) -> None:
        device = SimulatedDevice(b"a" * 1536)
        assert device.punch(256, 5000)
        assert device.content() == b"a" * 256 + bytes(1280)

    def test_a_host_without_holes_changes_nothing(self) -> None:
        device = SimulatedDevice(OLD, can_punch=False)
        assert not device.punch(0, 512)
        assert device.content() == OLD
        assert device.changes == ()

    def test_negative_ranges_are_value_errors(self) -> None:
        device = SimulatedDevice()
        with pytest.raises(ValueError, match="negative"):
            device.pread(1, -1)
        with pytest.raises(ValueError, match="negative"):
            device.truncate(-1)

    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test_it_behaves_as_a_flat_array(self, data: st.DataObject) -> None:
        device = SimulatedDevice(b"i" * 700)
        twin = bytearray(b"i" * 700)
        durable = bytes(twin)
        offsets, lengths = st.integers(0, 4000), st.integers(0, 1500)
        calls = st.sampled_from(["pwrite", "truncate", "punch", "allocate", "barrier"])
        for call in data.draw(st.lists(calls, max_size=12)):
            offset, length = data.draw(offsets), data.draw(lengths)
            if call == "pwrite":
                device.pwrite(b"w" * length, offset)
                if length:
                    twin.extend(bytes(max(0, offset + length - len(twin))))
                    twin[offset : offset + length] = b"w" * length
            elif call == "truncate":
                device.truncate(offset)
                del twin[offset:]
                twin.extend(bytes(offset - len(twin)))
            elif call == "punch":
                device.punch(offset, length)
                end = min(offset + length, len(twin))
                twin[offset:end] = bytes(max(0, end - offset))
            elif call == "allocate":
                device.allocate(offset, length)
                if length:
                    twin.extend(bytes(max(0, offset + length - len(twin))))
            else:
                device.barrier("b")
                durable = bytes(twin)
            assert device.content() == twin
            assert device.durable_content() == durable


class TestHoles:
    def test_written_data_is_no_hole_even_if_zero(self) -> None:
        device = SimulatedDevice()
        device.truncate(4096)
        assert device.is_hole(0, 4096)
        device.pwrite(bytes(512), 1024)
        assert not device.is_hole(0, 4096)
        assert device.is_hole(0, 1024)
        device.punch(1024, 512)
        assert device.is_hole(0, 8192)

    def test_part_of_a_sector_cannot_be_a_hole(self) -> None:
        device = SimulatedDevice(OLD)
        device.punch(0, 511)
        assert not device.is_hole(0, 100)

    def test_cut_off_data_is_a_hole_after_regrowth(self) -> None:
        device = SimulatedDevice(OLD * 4)
        device.truncate(512)
        device.truncate(2048)
        assert device.is_hole(512, 1536)
        assert not device.is_hole(0, 1)

    def test_a_crash_decides_what_is_a_hole(self) -> None:
        device = SimulatedDevice(OLD)
        device.punch(0, 512)
        holes = {s.content(): device.crash(s).is_hole(0, 512) for s in enumerate_states(device, budget=9)}
        assert holes == {OLD: False, bytes(512): True}


class TestDurability:
    def test_changes_are_recorded_in_order_until_the_barrier(self) -> None:
        device = SimulatedDevice(OLD * 2)
        device.pwrite(b"x", 3)
        device.punch(0, 512)
        device.truncate(512)
        assert device.changes == (Write(1, 3, b"x"), Punch(2, 0, 512), Truncate(3, 512))
        device.barrier("b")
        assert not device.in_flight().changes
        assert device.durable_content() == bytes(512)
        assert device.barriers == {"b": 1}

    def test_a_dropped_barrier_is_counted_and_does_nothing(self) -> None:
        device = SimulatedDevice(OLD)
        device.drop_barriers = {"b"}
        device.pwrite(NEW, 0)
        device.barrier("b")
        assert device.barriers["b"] == 1
        assert contents_after_crash(device) == {OLD, NEW}

    def test_listeners_hear_a_barrier_before_it_completes(self) -> None:
        device = SimulatedDevice(OLD)
        heard: list[object] = []
        device.barrier_listeners.append(lambda name, d: heard.append((name, len(d.changes))))
        device.change_listeners.append(lambda call, d: heard.append((call, d.content())))
        device.pwrite(NEW, 0)
        device.barrier("b")
        assert heard == [("pwrite", OLD), ("b", 1)]

    def test_a_killed_writer_leaves_readable_bytes_that_a_crash_may_lose(self) -> None:
        device = SimulatedDevice(OLD)
        device.pwrite(NEW, 0)
        heir = device.killed()
        device.barrier("b")
        assert heir.pread(512, 0) == NEW
        assert contents_after_crash(heir) == {OLD, NEW}
        heir.barrier("recovery")
        assert contents_after_crash(heir) == {NEW}

    def test_close_makes_nothing_durable(self) -> None:
        device = SimulatedDevice(OLD)
        device.pwrite(NEW, 0)
        device.close()
        with pytest.raises(OSError, match="Bad file"):
            device.size()
        device.reopen(read_only=True)
        assert device.read_only
        assert contents_after_crash(device) == {OLD, NEW}
        with pytest.raises(OSError, match="read-only"):
            device.pwrite(b"x", 0)


class TestFailedBarrier:
    def failed(self) -> SimulatedDevice:
        device = SimulatedDevice(OLD * 2)
        device.pwrite(NEW, 0)
        device.faults = FaultPlan(Fault(errno.EIO, call="barrier"))
        with pytest.raises(OSError, match="Input/output") as caught:
            device.barrier("b")
        assert caught.value.errno == errno.EIO
        return device

    def test_lost_data_reads_back_but_no_later_barrier_covers_it(self) -> None:
        device = self.failed()
        device.barrier("b")
        assert device.pread(512, 0) == NEW
        assert contents_after_crash(device) == {OLD * 2, NEW + OLD}

    def test_rewriting_makes_it_durable(self) -> None:
        device = self.failed()
        device.pwrite(b"z", 0)
        device.barrier("b")
        assert contents_after_crash(device) == {b"z" + NEW[1:] + OLD}
        assert device.changes == ()

    def test_other_changes_are_covered_by_the_next_barrier(self) -> None:
        device = self.failed()
        device.pwrite(NEW, 512)
        device.barrier("b")
        assert contents_after_crash(device) == {OLD + NEW, NEW + NEW}

    def test_what_was_lost_reads_as_before_once_it_is_forgotten(self) -> None:
        device = self.failed()
        device.pwrite(b"n" * 512, 1024)
        before = device.durable_content()
        device.forget_cached()
        assert device.pread(512, 0) == before[:512]
        # What is pending is still in the cache.
        assert device.pread(512, 1024) == b"n" * 512
        device.barrier("test")
        assert device.content() == device.durable_content() and not device.changes

    def test_a_host_that_cannot_forget_goes_on_showing_it(self) -> None:
        device = self.failed()
        device.can_forget = False
        shown = device.content()
        device.forget_cached()
        assert device.content() == shown != device.durable_content()

    def test_lost_truncation_stays_uncertain(self) -> None:
        device = SimulatedDevice(OLD * 2)
        device.truncate(512)
        device.faults = FaultPlan(Fault(errno.EIO, call="barrier"))
        with pytest.raises(OSError, match="Input/output"):
            device.barrier("b")
        device.barrier("b")
        assert contents_after_crash(device) == {OLD, OLD * 2, OLD + bytes(512)}
        device.truncate(512)
        device.barrier("b")
        device.truncate(1024)
        device.barrier("b")
        assert contents_after_crash(device) == {OLD + bytes(512)}

    def test_data_made_durable_after_a_lost_growth_is_not_past_the_end(self) -> None:
        device = SimulatedDevice()
        device.truncate(1024)
        device.faults = FaultPlan(Fault(errno.EIO, call="barrier"))
        with pytest.raises(OSError, match="Input/output"):
            device.barrier("b")
        device.pwrite(NEW, 0)
        device.barrier("b")
        assert contents_after_crash(device) == {NEW, NEW + bytes(512)}

    def test_an_interrupt_in_a_barrier_leaves_all_in_flight(self) -> None:
        device = SimulatedDevice(OLD)
        device.pwrite(NEW, 0)
        device.faults = FaultPlan(Fault(KeyboardInterrupt(), barrier_name="b"))
        device.barrier_listeners.clear()
        with pytest.raises(KeyboardInterrupt):
            device.barrier("b")
        device.barrier("b")
        assert contents_after_crash(device) == {NEW}

    def test_a_barrier_may_complete_and_still_raise(self) -> None:
        device = SimulatedDevice(OLD)
        device.pwrite(NEW, 0)
        device.faults = FaultPlan(Fault(KeyboardInterrupt(), call="barrier", applied_bytes=EVERYTHING))
        with pytest.raises(KeyboardInterrupt):
            device.barrier("b")
        assert contents_after_crash(device) == {NEW}


class TestFaults:
    def test_every_call_can_be_failed_in_turn(self) -> None:
        def work(device: SimulatedDevice) -> None:
            device.pwrite(NEW, 0)
            device.pread(10, 0)
            device.allocate(512, 512)
            device.punch(0, 512)
            device.truncate(0)
            device.barrier("b")

        rehearsal = SimulatedDevice()
        rehearsal.faults = FaultPlan()
        work(rehearsal)
        assert rehearsal.faults.total == 6
        for at in range(1, 7):
            device = SimulatedDevice()
            device.faults = FaultPlan(Fault(errno.EIO, at=at))
            with pytest.raises(OSError, match="Input/output"):
                work(device)
            assert device.faults.total == at
            assert len(device.faults.fired) == 1

    @pytest.mark.parametrize(
        ("offset", "applied_bytes", "done"),
        [
            (0, 100, 0),
            (0, 512, 512),
            (0, 700, 512),
            (0, 1024, 1024),
            (0, EVERYTHING, 1024),
            (100, 100, 0),
            (100, 412, 412),
            (100, 500, 412),
            (100, EVERYTHING, 1024),
        ],
    )
    def test_short_write(self, offset: int, applied_bytes: int, done: int) -> None:
        """What happens of it ends where a sector does: the fault model tears no sector."""
        device = SimulatedDevice(OLD * 4)
        device.faults = FaultPlan(Fault(errno.EIO, call="pwrite", applied_bytes=applied_bytes))
        with pytest.raises(OSError, match="Input/output"):
            device.pwrite(NEW * 2, offset)
        old = OLD * 4
        assert device.content() == old[:offset] + (NEW * 2)[:done] + old[offset + done :]
        device.pwrite(NEW, 0)

    def test_a_repeating_fault_fires_from_then_on(self) -> None:
        device = SimulatedDevice()
        device.faults = FaultPlan(Fault(errno.EIO, at=2, call="pread", repeats=True))
        device.pread(1, 0)
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output"):
                device.pread(1, 0)

    def test_partial_punch_and_allocate_and_truncate(self) -> None:
        device = SimulatedDevice(OLD * 2)
        device.faults = FaultPlan(*(Fault(errno.EIO, at=n, applied_bytes=512) for n in (1, 2, 3)))
        with pytest.raises(OSError, match="Input/output"):
            device.punch(0, 1024)
        assert device.content() == bytes(512) + OLD
        with pytest.raises(OSError, match="Input/output"):
            device.allocate(1024, 1024)
        assert device.size() == 1536
        with pytest.raises(OSError, match="Input/output"):
            device.truncate(10)
        assert device.size() == 10

    def test_wrong_faults_are_refused(self) -> None:
        with pytest.raises(ValueError, match="no such call"):
            Fault(errno.EIO, call="fsync")
        with pytest.raises(ValueError, match="counted from 1"):
            Fault(errno.EIO, at=0)


class TestFullDisk:
    def test_from_a_call_on_only_old_space_can_be_written(self) -> None:
        device = SimulatedDevice(OLD)
        device.truncate(4096)
        device.allocate(1024, 512)
        device.faults = FaultPlan(full_from=2)
        device.pwrite(NEW, 512)
        for offset in (0, 512, 1024):
            device.pwrite(NEW, offset)
        with pytest.raises(OSError, match="No space"):
            device.pwrite(b"x", 2048)
        with pytest.raises(OSError, match="No space"):
            device.allocate(1536, 1)
        assert device.is_hole(1536, 2560)

    def test_capacity_makes_the_last_write_short_and_punching_gives_back(self) -> None:
        device = SimulatedDevice(OLD)
        device.faults = FaultPlan(capacity_bytes=1024)
        with pytest.raises(OSError, match="No space"):
            device.pwrite(NEW * 2, 512)
        assert device.content() == OLD + NEW
        device.punch(0, 512)
        device.pwrite(NEW, 1024)
        assert device.size() == 1536
