"""Crash states: the whole space when small, every kind when large, digests that tell contents apart."""

import itertools
import time
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jqcow.testing import CrashSpace, SimulatedDevice, content_digest, enumerate_states

KINDS = {"none", "all", "prefix", "suffix", "single", "without", "torn", "size", "changes", "sectors"}


class NaiveSpace:
    """The space by its definition: every value that a sector had, every size; nothing clever."""

    def __init__(self, initial: bytes) -> None:
        self.values: dict[int, set[bytes]] = {}
        self.sizes = {len(initial)}
        self.note(SimulatedDevice(initial))

    def note(self, device: SimulatedDevice) -> None:
        self.sizes.add(device.size())
        for sector in range(12):
            self.values.setdefault(sector, set()).add(device.pread(512, sector * 512))

    def contents(self) -> set[bytes]:
        columns = [self.values[sector] for sector in sorted(self.values)]
        wholes = [b"".join(choice) for choice in itertools.product(*columns)]
        return {whole[:size] for whole in wholes for size in self.sizes}


@given(st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_a_small_space_is_visited_exactly(seed: int) -> None:
    random = Random(seed)
    initial = random.randbytes(random.randrange(3000))
    device = SimulatedDevice(initial)
    naive = NaiveSpace(initial)
    for _ in range(random.randrange(1, 4)):
        offset, length = random.randrange(3000), random.randrange(1, 800)
        action = random.choice(["write", "write", "punch", "truncate", "allocate"])
        if action == "write":
            device.pwrite(random.randbytes(length), offset)
        elif action == "punch":
            device.punch(offset, length)
        elif action == "truncate":
            device.truncate(offset)
        else:
            device.allocate(offset, length)
        naive.note(device)
    states = list(enumerate_states(device, budget=100_000, seed=seed))
    contents = [state.content() for state in states]
    assert len(set(contents)) == len(contents)
    assert set(contents) == naive.contents()
    assert all(state.digest == content_digest(state.content()) for state in states)


def busy_device(random: Random) -> SimulatedDevice:
    device = SimulatedDevice(random.randbytes(256 * 1024))
    for _ in range(25):
        device.pwrite(random.randbytes(1024), random.randrange(510) * 512)
    device.pwrite(random.randbytes(2000), 256 * 1024)
    device.truncate(255 * 1024 + 100)
    device.punch(8192, 3000)
    return device


class TestLargeSpace:
    def test_a_small_budget_sees_every_kind(self) -> None:
        device = busy_device(Random(1))
        states = list(enumerate_states(device, budget=40, garbage_allowed=lambda offset, length: True))
        assert len(states) == 40
        assert {state.kind for state in states} == KINDS | {"garbage"}

    def test_states_differ_and_digests_are_those_of_the_content(self) -> None:
        device = busy_device(Random(2))
        states = list(enumerate_states(device, budget=600, seed=4, garbage_allowed=lambda o, n: True))
        contents = {state.content() for state in states}
        assert len(contents) == len({state.digest for state in states}) == 600
        assert all(state.digest == content_digest(state.content()) for state in states)

    def test_what_landed_brings_its_size(self) -> None:
        device = SimulatedDevice()
        sizes = []
        for number in range(20):
            device.pwrite(bytes([number + 1]) * 700, number * 700)
            sizes.append(device.size())
        space = CrashSpace(device.in_flight(), seed=1)
        assert space.state("all:0:1").content() == device.content()
        assert space.state("none:0:1").content() == b""
        assert [space.state(f"prefix:{index}:1").size_bytes for index in range(19)] == sizes[:-1]

    def test_a_spec_gives_the_state_back(self) -> None:
        device = busy_device(Random(3))
        everything = list(enumerate_states(device, budget=200, seed=9, garbage_allowed=lambda o, n: True))
        again = CrashSpace(device.in_flight(), seed=9, garbage_allowed=lambda o, n: True)
        for state in everything:
            assert again.state(state.spec).content() == state.content()

    def test_the_seed_changes_the_states(self) -> None:
        device = busy_device(Random(4))
        first, second = (
            {state.digest for state in enumerate_states(device, budget=300, seed=seed)} for seed in (1, 2)
        )
        assert len(first - second) > 100

    def test_states_outlive_the_barrier(self) -> None:
        device = busy_device(Random(5))
        states = list(enumerate_states(device, budget=50))
        before = [state.content() for state in states]
        device.barrier("b")
        device.pwrite(b"later", 0)
        assert [state.content() for state in states] == before
        assert device.crash(states[3]).content() == before[3]

    def test_it_is_quick(self) -> None:
        device = busy_device(Random(6))
        start = time.process_time()
        count = sum(1 for _ in enumerate_states(device, budget=2000))
        assert count / (time.process_time() - start) > 2000

    def test_a_foreign_spec_is_refused(self) -> None:
        space = CrashSpace(busy_device(Random(7)).in_flight(), seed=1)
        for spec in ("none:0:2", "prefix:1000:1", "nonsense:0:1"):
            with pytest.raises(ValueError, match=r"seed|no such"):
                space.state(spec)


class TestParticularStates:
    def test_torn_write_keeps_whole_sectors(self) -> None:
        device = SimulatedDevice(b"o" * 2048)
        device.pwrite(b"n" * 2048, 0)
        contents = {state.content() for state in enumerate_states(device, budget=100)}
        assert len(contents) == 16
        assert b"n" * 512 + b"o" * 1536 in contents
        assert not any(set(content[:512]) == {ord("n"), ord("o")} for content in contents)

    def test_growth_and_data_are_independent(self) -> None:
        device = SimulatedDevice(b"o" * 512)
        device.pwrite(b"n" * 512, 512)
        contents = {state.content() for state in enumerate_states(device, budget=100)}
        assert contents == {b"o" * 512, b"o" * 512 + bytes(512), b"o" * 512 + b"n" * 512}

    def test_cut_off_bytes_may_come_back_under_a_new_growth(self) -> None:
        device = SimulatedDevice(b"o" * 1024)
        device.truncate(512)
        device.truncate(1024)
        assert b"o" * 1024 in {state.content() for state in enumerate_states(device, budget=100)}

    def test_garbage_covers_the_whole_block_of_an_allowed_write_only(self) -> None:
        device = SimulatedDevice(b"o" * 12288)
        device.pwrite(b"n" * 512, 4096)
        device.pwrite(b"n" * 512, 8192)
        states = enumerate_states(device, budget=100, garbage_allowed=lambda offset, length: offset == 4096)
        garbage = [state.content() for state in states if state.kind == "garbage"]
        assert len(garbage) == 2
        for content in garbage:
            assert content[:4096] == b"o" * 4096
            assert len(set(content[4096:8192])) > 200
            assert set(content[8704:]) == {ord("o")}

    def test_rewriting_the_same_bytes_is_one_state_but_may_still_turn_to_garbage(self) -> None:
        device = SimulatedDevice(b"o" * 4096)
        device.pwrite(b"o" * 512, 0)
        assert len(list(enumerate_states(device, budget=100))) == 1
        states = list(enumerate_states(device, budget=100, garbage_allowed=lambda offset, length: True))
        assert len({state.content() for state in states}) == 3

    def test_a_quiet_device_has_one_state(self) -> None:
        (state,) = enumerate_states(SimulatedDevice(b"x" * 700), budget=10)
        assert not state.in_flight
        assert state.content() == b"x" * 700

    def test_digests_agree_across_devices_but_not_across_sizes_or_places(self) -> None:
        device = SimulatedDevice()
        device.pwrite(b"x" * 512, 0)
        digests = {state.content(): state.digest for state in enumerate_states(device, budget=10)}
        (other,) = enumerate_states(SimulatedDevice(b"x" * 512), budget=10)
        assert digests[b"x" * 512] == other.digest
        different = [b"", bytes(512), b"x" * 512, b"x" * 511, b"x" * 512 + bytes(1), bytes(512) + b"x" * 512]
        assert len({content_digest(content) for content in different}) == len(different)
