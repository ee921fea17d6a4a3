"""Does the oracle of the guided fuzzer see each promise broken?"""

from __future__ import annotations

import pytest

import jqcow
from jqcow.engine import repair as repairs
from jqcow.engine.closing import Closing
from jqcow.engine.repair import RepairReport
from tests.fuzz.bases import Form, base_of
from tests.fuzz.exercise import Exercise, blanked, exercise
from tests.fuzz.parts import patched

CLEAN, LIVE = Form(9), Form(13, live=True)


def leaking() -> bytes:
    """Return an image with a cluster that nothing refers to."""
    base = base_of(CLEAN)
    block = base.places["refcount block"][0]
    content = bytearray(base.content)
    content[block + 500 : block + 502] = b"\0\1"
    return bytes(content)


def test_good_images_break_nothing() -> None:
    for form in (CLEAN, LIVE):
        exercised = Exercise(base_of(form).content)
        seen = exercised.look()
        assert seen is not None and seen.sound and len(seen.pieces) >= 2
        exercised.run()
        if form.live:
            exercised.recover()


def test_another_error_than_ours_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(image: jqcow.Image) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(jqcow.Image, "info", broken)
    with pytest.raises(KeyError):
        exercise(base_of(CLEAN).content)


def test_other_bytes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(self: Exercise, image: jqcow.Image) -> list[range]:
        image.pwrite(b"x", 1234)
        return []

    monkeypatch.setattr(Exercise, "change", change)
    with pytest.raises(AssertionError, match="what was read at 0x0 has changed"):
        exercise(base_of(CLEAN).content)


def test_new_errors_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = leaking()

    def change(self: Exercise, image: jqcow.Image) -> list[range]:
        image.close()
        self.device.reopen(read_only=False)
        self.device.pwrite(broken, 0)
        return []

    monkeypatch.setattr(Exercise, "change", change)
    with pytest.raises(AssertionError, match="has some now"):
        exercise(base_of(CLEAN).content)


def test_a_repair_that_leaves_something_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    exercise(leaking())
    monkeypatch.setattr(repairs, "repair", lambda *arguments, **options: RepairReport())
    with pytest.raises(AssertionError, match="the repair leaves"):
        exercise(leaking())


def test_a_recovery_that_does_not_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Closing, "clean", lambda self: None)
    with pytest.raises(AssertionError, match="recovered twice"):
        Exercise(base_of(LIVE).content).recover()


def test_patches_are_laid_over_tables() -> None:
    base = base_of(CLEAN)
    where = base.all_places.index(base.places["L2 table"][0])
    patch = bytes([where, 0, 5, 7 | 8]) + (0x1234).to_bytes(8, "big")
    content = patched(base, patch)
    place = base.places["L2 table"][0] + 5 * 8
    assert content[place : place + 8] == (0x1234).to_bytes(8, "big")
    assert content[:place] == base.content[:place] and content[place + 8 :] == base.content[place + 8 :]


def test_what_changed_is_not_compared() -> None:
    assert blanked(b"abcdef", 100, [range(98, 102), range(105, 900)]) == b"\0\0cde\0"
