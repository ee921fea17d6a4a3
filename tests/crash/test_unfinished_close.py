"""A crash in the last step of closing, or the first of going live: the next recovery finishes it.

Sector 0 is in standard layout, and the root copy speaks of a journal that nobody needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest

from jqcow.engine.scan import read_root_copy
from jqcow.offline.recover import recover_image
from jqcow.ondisk.root import ROOT_COPY_BYTES, ROOT_COPY_OFFSET, is_live
from jqcow.testing import SECTOR_BYTES, SimulatedDevice, enumerate_states
from tests.crash.judge import recover
from tests.support.users import create_simulated, open_simulated

BUDGET = 24
DATA = b"\x33" * 20_000


def states_in(device: SimulatedDevice, step: str, action: Callable[[], object]) -> list[SimulatedDevice]:
    """Do something, and return what power cuts within the barriers of a name may leave."""
    states: list[SimulatedDevice] = []

    def cut(name: str, device: SimulatedDevice) -> None:
        if name.startswith(step):
            states.extend(device.crash(state) for state in enumerate_states(device, budget=BUDGET))

    device.barrier_listeners.append(cut)
    action()
    device.barrier_listeners.remove(cut)
    return states


def cut_off(step: str, cluster_bytes: int) -> tuple[bytes, list[SimulatedDevice]]:
    """Return a closed image, and what crashes in its last session left."""
    device = SimulatedDevice()
    create_simulated(device, 1 << 20, cluster_bytes).close()
    image = open_simulated(device)
    if step == "live.prepare":
        closed = device.content()
        return closed, states_in(device, step, lambda: image.pwrite(DATA, 0))
    image.pwrite(DATA, 0)
    states = states_in(device, step, image.close)
    return device.content(), states


def left_behind(states: list[SimulatedDevice]) -> Iterator[SimulatedDevice]:
    """Yield the states with a root copy in which the journal is not live."""
    for device in states:
        if read_root_copy(device) is not None and not is_live(device.pread(SECTOR_BYTES, 0)):
            yield device


def without_copy(device: SimulatedDevice) -> bytes:
    """Return the content without what a torn clearing left of the root copy: it means nothing."""
    assert read_root_copy(device) is None
    content = bytearray(device.content())
    content[ROOT_COPY_OFFSET : ROOT_COPY_OFFSET + ROOT_COPY_BYTES] = bytes(ROOT_COPY_BYTES)
    return bytes(content)


def open_and_close(device: SimulatedDevice) -> None:
    recover(device).close()
    device.reopen()


@pytest.mark.parametrize("step", ["live.prepare", "close.release"])
@pytest.mark.parametrize("cluster_bytes", [8192, 65536])
@pytest.mark.parametrize("how", [recover_image, open_and_close])
def test_it_is_finished_and_that_may_crash_too(
    step: str, cluster_bytes: int, how: Callable[[SimulatedDevice], object]
) -> None:
    closed, states = cut_off(step, cluster_bytes)
    count = 0
    for device in left_behind(states):
        before = device.content()
        would = recover_image(device, dry_run=True)
        assert would.state == "clean, journal left behind" and would.actions
        assert device.content() == before
        again = states_in(device, "", partial(how, device))
        assert device.content() == closed and not device.changes
        assert recover_image(device.killed()).state == "clean"
        for twice in again:
            how(twice)
            assert without_copy(twice) == closed
            count += 1
    assert count > 20


def test_other_programs_clusters_are_left_alone() -> None:
    """What has come to lie where the journal was stays there, and the copy goes."""
    closed, states = cut_off("close.release", 65536)
    device = next(left_behind(states))
    copy = device.pread(ROOT_COPY_BYTES, ROOT_COPY_OFFSET)
    used = SimulatedDevice(closed)
    with open_simulated(used) as image:
        image.pwrite(b"\x44" * 65536, 10 * 65536)
    used.reopen()
    used.pwrite(copy, ROOT_COPY_OFFSET)
    used.barrier("prepared")
    report = recover_image(used)
    assert (report.state, report.actions) == ("clean, journal left behind", ("clear the root copy",))
    with open_simulated(used) as image:
        assert image.pread(65536, 10 * 65536) == b"\x44" * 65536
        assert image.check().ok
