"""What is expected of a disk stays within what its orphans can fill, however much a structure claims."""

from __future__ import annotations

from jqcow.offline.salvaging.patient import patient_on
from jqcow.salvage.expecting import CLUSTERS_MAX, ORPHANS_EACH, Expectations
from jqcow.salvage.guest.opaque import Opaque
from jqcow.salvage.reading import MappedDisk
from jqcow.testing import SimulatedDevice
from tests.support.patients import Tables
from tests.support.users import create_simulated

CLUSTER = 65536
SIZE = 1 << 40
ORPHANS = 5


def test_a_container_that_claims_a_large_disk() -> None:
    device = SimulatedDevice()
    with create_simulated(device, SIZE, CLUSTER) as image:
        for start in range(0, ORPHANS * CLUSTER, CLUSTER):
            image.pwrite(b"\1" * CLUSTER, start)
    tables = Tables(device.content())
    entries = SIZE // (CLUSTER // 8 * CLUSTER)
    tables.image[tables.l1 : tables.l1 + 8 * entries] = b"\xee" * 8 * entries
    found = patient_on(SimulatedDevice(bytes(tables.image)), "damaged", (0, 0)).survey()
    expectations = Expectations(found.guest_map, CLUSTER, ORPHANS)
    claims = Opaque("container", "the disk", [], [(0, SIZE)])
    expectations.take([claims], MappedDisk(found.guest_map, found.reader()))
    assert len(expectations.clusters) == CLUSTERS_MAX + ORPHANS_EACH * ORPHANS
    assert min(expectations.clusters) == 0
