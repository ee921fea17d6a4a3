"""A commit changes two files: the power goes in both, and each loses what it likes of what was in flight.

Whatever is left of the base and of the overlay, the overlay over the base reads as before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

import jqcow
from jqcow.image.journals import JournalLength
from jqcow.image.opening import _open
from jqcow.offline.commit import copy_into, raw_base
from jqcow.ondisk.naming import NamedFile
from jqcow.testing import CrashSpace, SimulatedDevice
from jqcow.testing.changes import InFlight
from tests.support.users import JOURNAL_BYTES, create_simulated, open_simulated, salts_of

SECTOR_BYTES = 512
STATES_OF_EACH = 4


class RawDisk:
    """A raw file as the disk below; past its end are zeros."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device, self.size = device, device.size()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self.device.pread(len(buffer), offset)

    def reads_as_zeros(self, length: int, offset: int) -> bool:
        return not any(self.device.pread(length, offset))

    def close(self) -> None:
        """Nothing is open."""


class ImageDisk(RawDisk):
    """An image as the disk below."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.image = open_simulated(device)
        assert self.image.check().ok
        self.size = self.image.size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.image.pread_into(buffer, offset)

    def reads_as_zeros(self, length: int, offset: int) -> bool:
        return self.image.reads_as_zeros(length, offset)

    def close(self) -> None:
        self.image.close()


def some_content(image: jqcow.Image, chance: random.Random, cluster_bytes: int) -> None:
    for _ in range(8):
        offset = chance.randrange(image.size)
        length = min(image.size - offset, chance.randrange(4 * cluster_bytes))
        match chance.randrange(5):
            case 0:
                image.write_zeroes(length, offset)
            case 1:
                image.discard(length, offset)
            case _:
                image.pwrite(chance.randbytes(length), offset)


@dataclass
class Pair:
    """An overlay and its base, each on a device of its own."""

    seed: int
    is_raw: bool
    # Not shown: a failing test would spend a minute on the bytes.
    cuts: list[tuple[InFlight, InFlight]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        chance = random.Random(self.seed)
        cluster_bytes = chance.choice((512, 1024, 4096))
        sizes = [
            chance.randrange(5, 60) * cluster_bytes // 2 // SECTOR_BYTES * SECTOR_BYTES for _ in range(2)
        ]
        self.base, self.overlay = SimulatedDevice(), SimulatedDevice()
        if self.is_raw:
            self.base = SimulatedDevice(chance.randbytes(sizes[0]))
        else:
            with create_simulated(self.base, sizes[0], cluster_bytes) as image:
                some_content(image, chance, cluster_bytes)
        with (
            create_simulated(self.overlay, sizes[1], chance.choice((512, 4096))) as image,
            image.transaction() as transaction,
        ):
            transaction.set_backing_file("base", "raw" if self.is_raw else "qcow2")
        with self.shown(self.base, self.overlay) as image:
            some_content(image, chance, cluster_bytes)
        with self.shown(self.base, self.overlay) as image:
            self.expected = image.pread(image.size, 0)

    @contextmanager
    def shown(self, base: SimulatedDevice, overlay: SimulatedDevice) -> Iterator[jqcow.Image]:
        """Open the overlay over the base, both recovered where that is needed."""

        def find(named: NamedFile) -> RawDisk:
            return RawDisk(base) if self.is_raw else ImageDisk(base)

        base.reopen()
        with open_simulated(overlay, backing=find) as image:
            assert image.check().ok
            yield image

    def commit(self, drop_barriers: frozenset[str] = frozenset()) -> None:
        """Commit, and note at each barrier of either device what is in flight on both."""
        self.base = SimulatedDevice(self.base.content())
        self.overlay = SimulatedDevice(self.overlay.content())
        for device in (self.base, self.overlay):
            device.drop_barriers.update(drop_barriers)
            device.barrier_listeners.append(lambda name, device: self.note())
        salts = salts_of(self.overlay)
        # As the command does: without what is below it.
        overlay = _open(
            self.overlay,
            "r+",
            journal=JournalLength(JOURNAL_BYTES),
            new_salt=salts,
            find_backing=lambda store: None,
            unlock=lambda store: None,
        )
        if self.is_raw:
            with raw_base(self.base) as base:
                copy_into(overlay, base)
        else:
            with open_simulated(self.base) as image, image.transaction() as transaction:
                copy_into(overlay, transaction)
        with overlay.transaction() as transaction:
            transaction.make_empty()
        overlay.close()
        self.note()

    def note(self) -> None:
        self.cuts.append((self.base.in_flight(), self.overlay.in_flight()))

    def judge(self) -> int:
        """Recover both from each cut, in several states; return how many of these there were."""
        count = 0
        for base, overlay in self.cuts:
            for base_state in list(CrashSpace(base, seed=self.seed).states(STATES_OF_EACH)):
                for state in list(CrashSpace(overlay, seed=self.seed).states(STATES_OF_EACH)):
                    count += 1
                    with self.shown(self.base.crash(base_state), self.overlay.crash(state)) as image:
                        found = image.pread(image.size, 0)
                    # A text that compares the two would take a minute.
                    is_same = found == self.expected
                    assert is_same, f"{self}: {base_state.spec} and {state.spec}"
        return count


@pytest.mark.parametrize("is_raw", [False, True], ids=["qcow2", "raw"])
@pytest.mark.parametrize("seed", range(12))
def test_the_power_goes_in_both_files(seed: int, is_raw: bool) -> None:
    pair = Pair(seed, is_raw)
    pair.commit()
    assert pair.judge() > 10


@pytest.mark.parametrize("barrier", ["commit.base", "flush.record"])
def test_the_base_must_be_durable_first(barrier: str) -> None:
    """Without the barrier some state of both files reads otherwise."""
    for seed in range(4):
        pair = Pair(seed, is_raw=barrier == "commit.base")
        pair.commit(frozenset({barrier}))
        try:
            pair.judge()
        except (AssertionError, jqcow.JqcowError):
            return
    pytest.fail(f"without {barrier} every state reads as before")
