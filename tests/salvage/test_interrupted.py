"""Salvage, repair in place, undo, protection and healing, killed as real processes (`interrupted`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.salvage import columns, interrupted
from tests.salvage.anatomy import Anatomy
from tests.salvage.interrupted import Patient

KILLS = int(os.environ.get("JQCOW_KILLS", "1"))
"""So many for each story; a campaign of some hours takes thousands."""


@pytest.mark.parametrize("story", interrupted.STORIES.values(), ids=interrupted.STORIES)
def test_story(story: Callable[[Patient, Path, Random, int], int], tmp_path: Path) -> None:
    patient = Patient.make(tmp_path, 1)
    story(patient, tmp_path, Random(KILLS), KILLS)


@pytest.mark.skipif(
    not os.access("/dev/fuse", os.W_OK) or shutil.which("qemu-storage-daemon") is None,
    reason="NO READ ERRORS TESTED: they need FUSE and qemu-storage-daemon",
)
def test_what_the_host_cannot_read_is_read_around(tmp_path: Path) -> None:
    """Nothing but what lies there is lost, and the source stays as it is: it cannot even be written."""
    patient, chance = Patient.make(tmp_path, 2), Random(2)
    path = tmp_path / "whole.qcow2"
    path.write_bytes(patient.whole)
    path.chmod(0o400)
    anatomy = Anatomy.of(path)
    pieces = [one for one in anatomy.pieces(path, anatomy.l1, len(patient.disk)) if one.host_offset > 0]
    bad = chance.sample(pieces, 8)
    with columns.failing(path, [(one.host_offset, 4096) for one in bad], tmp_path) as image:
        target = tmp_path / "saved.raw"
        status = interrupted.finish("jqcow-recover", "--salvage", target, "-O", "raw", image)
        interrupted.finish("jqcow-recover", "--diagnose", image)
    assert status == 2
    expected = bytearray(patient.disk)
    for one in bad:
        expected[one.guest_offset : one.guest_offset + 4096] = bytes(4096)
    assert target.read_bytes() == expected
    assert path.read_bytes() == patient.whole
