"""The laboratory finds what it is there to find, replays it, and counts honestly.

Each of the five faults is one small storage program with a switch: right, the laboratory accepts it; wrong,
it does not.
"""

import pickle
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from jqcow.testing import (
    CrashFailure,
    CrashState,
    LabOptions,
    Laboratory,
    Ledger,
    SectorModel,
    SimulatedDevice,
    Workload,
)

Promises = dict[str, Any]


def nothing(device: SimulatedDevice, model: Promises, state: CrashState) -> None:
    """Accept every state."""


def in_place(device: SimulatedDevice, model: SectorModel) -> None:
    """A disk with no structure at all: writes in place, flush is a barrier."""
    for number in range(6):
        offset, data = number * 700, bytes([number + 1]) * 1500
        with model.write(offset, data):
            device.pwrite(data, offset)
        if number % 2:
            with model.flush():
                device.barrier("flush")


def judge_sectors(device: SimulatedDevice, model: SectorModel, state: CrashState) -> None:
    violations = model.check(device.pread)
    assert not violations, violations[0]


class TestFinds:
    def test_a_missing_barrier(self) -> None:
        laboratory = Laboratory(judge_sectors)
        workload = Workload("disk", in_place, lambda: SectorModel(8192), lambda: SimulatedDevice(bytes(8192)))
        laboratory.run(workload)
        with pytest.raises(CrashFailure) as caught:
            laboratory.run(workload, drop_barriers={"flush"})
        assert caught.value.interval == "flush -> flush"
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

    @pytest.mark.parametrize("checksum", [True, False])
    def test_a_torn_write(self, checksum: bool) -> None:
        """A record of three sectors is old or new as a whole only if a checksum guards it."""

        def work(device: SimulatedDevice, model: Promises) -> None:
            body = b"n" * 1400
            model["possible"] = (b"", body)
            device.pwrite(struct.pack(">I", zlib.crc32(body)) + body, 0)
            device.barrier("record")

        def judge(device: SimulatedDevice, model: Promises, state: CrashState) -> None:
            content = device.pread(1404, 0)
            body = content[4:].rstrip(b"\0")
            if checksum and zlib.crc32(body) != struct.unpack(">I", content[:4])[0]:
                body = b""
            assert body in model.get("possible", (b"",))

        expect(Laboratory(judge), Workload("record", work, dict), passes=checksum)

    @pytest.mark.parametrize("barrier", [True, False])
    def test_a_lost_growth(self, barrier: bool) -> None:
        """A pointer into the grown part must not be durable before the growth."""

        def work(device: SimulatedDevice, model: Promises) -> None:
            device.truncate(8192)
            if barrier:
                device.barrier("growth")
            device.pwrite(struct.pack(">Q", 4096), 0)
            device.barrier("pointer")

        def judge(device: SimulatedDevice, model: Promises, state: CrashState) -> None:
            (pointer,) = struct.unpack(">Q", device.pread(8, 0))
            assert pointer < device.size(), "the pointer leads past the end"

        workload = Workload("growth", work, dict, lambda: SimulatedDevice(bytes(512)))
        expect(Laboratory(judge), workload, passes=barrier)

    @pytest.mark.parametrize("barrier", [True, False])
    def test_stale_bytes_after_reuse(self, barrier: bool) -> None:
        """Two owners, one block: it is handed over only after the first owner's release is durable."""

        def work(device: SimulatedDevice, model: Promises) -> None:
            device.pwrite(bytes([1]), 0)
            device.pwrite(b"first owner".ljust(512), 1024)
            device.barrier("setup")
            model["ready"] = True
            device.pwrite(bytes([0]), 0)
            if barrier:
                device.barrier("release")
            device.pwrite(b"second owner".ljust(512), 1024)
            device.barrier("data")
            device.pwrite(bytes([1]), 512)
            device.barrier("owner")

        def judge(device: SimulatedDevice, model: Promises, state: CrashState) -> None:
            if model and device.pread(1, 0) == bytes([1]):
                assert device.pread(11, 1024) == b"first owner", "the first owner sees the second one's data"

        expect(Laboratory(judge), Workload("reuse", work, dict), passes=barrier)

    @pytest.mark.parametrize("garbage", [True, False])
    def test_a_garbage_block(self, garbage: bool) -> None:
        """What shares a block with a write in flight is safe from tearing, but not from garbage."""

        def work(device: SimulatedDevice, model: Promises) -> None:
            device.pwrite(b"n" * 512, 0)
            device.barrier("root")

        def judge(device: SimulatedDevice, model: Promises, state: CrashState) -> None:
            assert device.pread(512, 1024) == b"o" * 512, "the neighbour is damaged"

        workload = Workload(
            "root",
            work,
            dict,
            lambda: SimulatedDevice(b"o" * 8192),
            garbage_allowed=(lambda offset, length: offset == 0) if garbage else None,
        )
        expect(Laboratory(judge), workload, passes=not garbage)


def expect(laboratory: Laboratory[Any], workload: Workload[Any], *, passes: bool) -> None:
    if passes:
        laboratory.run(workload)
        assert laboratory.report().distinct_states > 1
        return
    with pytest.raises(CrashFailure) as caught:
        laboratory.run(workload)
    with pytest.raises(CrashFailure):
        laboratory.replay(workload, caught.value.replay_line)


class Intent:
    """A two-step store with recovery: an intent, then both copies. Recovery repeats the intent."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device

    def store(self, value: int) -> None:
        self.device.pwrite(bytes([value]), 0)
        self.device.barrier("intent")
        self.finish(value)

    def recover(self, *, first_barrier: bool = True) -> None:
        if first_barrier:
            self.device.barrier("seen")
        self.finish(self.device.pread(1, 0)[0])

    def finish(self, value: int) -> None:
        self.device.pwrite(bytes([value]), 512)
        self.device.pwrite(bytes([value]), 1024)
        self.device.barrier("copies")


def store_twice(device: SimulatedDevice, model: Promises) -> None:
    store = Intent(device)
    store.store(1)
    store.store(2)


def judge_intent(device: SimulatedDevice, model: Promises, state: CrashState) -> None:
    copies = device.pread(1, 512)[0], device.pread(1, 1024)[0]
    intent = device.pread(1, 0)[0]
    assert max(copies) <= intent, "a copy is ahead of the intent"
    Intent(device).recover()
    assert device.pread(1, 512) == device.pread(1, 1024) == device.pread(1, 0)


class TestNestedCrashes:
    options = LabOptions(depth=2, nested_every=1, kill=True)

    def test_crashes_inside_recovery_are_states_too(self) -> None:
        laboratory = Laboratory(
            judge_intent, recover=lambda device: Intent(device).recover(), options=self.options
        )
        laboratory.run(Workload("store", store_twice, dict))
        names = {row.name: row.judged for row in laboratory.report().intervals}
        assert names["recovery: seen -> copies"] > 0
        assert names["recovery: start -> seen"] > 0

    def test_recovery_that_acts_on_what_is_not_durable_is_found_and_replayed(self) -> None:
        laboratory = Laboratory(
            judge_intent,
            recover=lambda device: Intent(device).recover(first_barrier=False),
            options=self.options,
        )
        workload = Workload("store", store_twice, dict)
        with pytest.raises(CrashFailure, match="ahead of the intent") as caught:
            laboratory.run(workload)
        assert caught.value.interval.startswith("recovery: start -> copies")
        assert "killed:" in caught.value.replay_line
        with pytest.raises(CrashFailure, match="ahead of the intent") as again:
            laboratory.replay(workload, caught.value.replay_line)
        assert again.value.replay_line == caught.value.replay_line

    def test_dropped_barriers_are_dropped_in_recovery_as_well(self) -> None:
        laboratory = Laboratory(
            judge_intent, recover=lambda device: Intent(device).recover(), options=self.options
        )
        with pytest.raises(CrashFailure):
            laboratory.run(Workload("store", store_twice, dict), drop_barriers={"seen"})

    def test_recovery_that_raises_is_a_failure_and_replays(self) -> None:
        def recover(device: SimulatedDevice) -> None:
            if device.pread(1, 0) == bytes([2]):
                raise OSError("recovery gave up")

        laboratory = Laboratory(nothing, recover=recover, options=self.options)
        workload = Workload("store", store_twice, dict)
        with pytest.raises(CrashFailure, match="gave up") as caught:
            laboratory.run(workload)
        with pytest.raises(CrashFailure, match="gave up"):
            laboratory.replay(workload, caught.value.replay_line)


class TestRun:
    def test_the_judge_sees_the_model_of_the_moment(self) -> None:
        seen: list[tuple[str, int]] = []

        def work(device: SimulatedDevice, model: Promises) -> None:
            for number in range(3):
                model[str(number)] = number
                device.pwrite(bytes([number + 1]), 0)
                device.barrier(f"b{number}")

        def judge(device: SimulatedDevice, model: Promises, state: CrashState) -> None:
            seen.append((state.kind, len(model)))
            model["mine"] = "alone"

        Laboratory(judge).run(Workload("moments", work, dict))
        assert sorted({count for _, count in seen}) == [1, 2, 3]

    def test_code_that_swallows_errors_in_a_barrier_does_not_hide_a_failure(self) -> None:
        def work(device: SimulatedDevice, model: Promises) -> None:
            device.pwrite(b"x", 0)
            try:
                device.barrier("b")
            except Exception:
                pytest.fail("the judge's verdict came up inside the code under test")

        def judge(device: SimulatedDevice, model: Promises, state: CrashState) -> None:
            raise ValueError("no")

        with pytest.raises(CrashFailure, match="ValueError: no"):
            Laboratory(judge).run(Workload("swallow", work, dict))

    def test_what_the_workload_raises_comes_through(self) -> None:
        def work(device: SimulatedDevice, model: Promises) -> None:
            raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            Laboratory(nothing).run(Workload("raises", work, dict))

    def test_replay_refuses_foreign_lines(self) -> None:
        laboratory = Laboratory(nothing)
        workload = Workload("a b", store_twice, dict)
        with pytest.raises(ValueError, match="is of workload"):
            laboratory.replay(workload, "other 0=none:0:0")
        with pytest.raises(ValueError, match="did not come by"):
            laboratory.replay(workload, "a_b 99=none:0:0")

    def test_wrong_options_are_refused(self) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            LabOptions(budget=0)


def scribble(seed: int) -> Callable[[SimulatedDevice, Promises], None]:
    def work(device: SimulatedDevice, model: Promises) -> None:
        for number in range(5):
            for sector in range(8):
                device.pwrite(bytes([seed, number, sector]) * 100, sector * 512)
            device.barrier("b")
        device.close()

    return work


class TestCounting:
    def test_equal_states_count_once_and_quiet_ones_not_at_all(self) -> None:
        laboratory = Laboratory(nothing, options=LabOptions(budget=50))
        laboratory.run(Workload("one", scribble(1), dict))
        first = laboratory.report()
        assert first.quiet_states == 1
        laboratory.run(Workload("two", scribble(1), dict, lambda: SimulatedDevice(b"")))
        second = laboratory.report()
        assert second.judged_states == 2 * first.judged_states
        assert second.distinct_states < second.judged_states
        assert dict(second.barriers) == {"b": 10}

    def test_the_cap_holds_and_leaves_something_to_every_interval(self) -> None:
        options = LabOptions(budget=200, target_states=1000, max_share=0.1)
        laboratory = Laboratory(nothing, options=options)
        laboratory.run(Workload("capped", scribble(1), dict))
        report = laboratory.report()
        assert 50 < report.distinct_states <= 100
        assert {row.name for row in report.intervals if row.distinct} == {"start -> b", "b -> b"}

    def test_ledgers_of_two_processes_merge(self) -> None:
        ledgers = []
        for name, seed in (("one", 1), ("two", 2), ("three", 2)):
            laboratory = Laboratory(nothing, options=LabOptions(budget=20))
            laboratory.run(Workload(name, scribble(seed), dict))
            ledgers.append(pickle.loads(pickle.dumps(laboratory.ledger)))
        total = Ledger()
        for ledger in ledgers:
            total.merge(ledger)
        report = total.report()
        assert report.judged_states == sum(ledger.report().judged_states for ledger in ledgers)
        assert report.distinct_states < report.judged_states
        assert [row.name for row in report.workloads] == ["one", "three", "two"]
        assert report.largest_share < 0.6

    def test_the_table_names_intervals_workloads_and_totals(self) -> None:
        laboratory = Laboratory(nothing)
        laboratory.run(Workload("scribble", scribble(3), dict))
        table = laboratory.report().format_table()
        assert "start -> b" in table
        assert "scribble" in table
        assert "100.00%" in table
        assert f"{laboratory.report().distinct_states:,} distinct crash states" in table
