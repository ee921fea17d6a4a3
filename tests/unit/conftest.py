"""The image that the tests of what a guest's call does have in common; a file may have its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import jqcow
from jqcow.testing import SimulatedDevice
from tests.unit.engines import written_image


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice()


@pytest.fixture
def image(device: SimulatedDevice) -> Iterator[jqcow.Image]:
    with written_image(device) as image:
        yield image
