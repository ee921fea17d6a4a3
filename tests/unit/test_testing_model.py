"""The sector model: which versions are possible, and which are not."""

import errno
from random import Random

import pytest

from jqcow.testing import SectorModel

A, B, C, ZERO = b"a" * 512, b"b" * 512, b"c" * 512, bytes(512)


def violations(model: SectorModel, content: bytes) -> int:
    return len(model.check(lambda length, offset: content[offset : offset + length]))


def violations_now(model: SectorModel, content: bytes) -> int:
    return len(model.expect_now(lambda length, offset: content[offset : offset + length]))


def allowed(model: SectorModel, *candidates: bytes) -> list[bool]:
    return [violations(model, candidate) == 0 for candidate in candidates]


def fail(model: SectorModel, offset: int, data: bytes) -> None:
    with pytest.raises(OSError, match="I/O"), model.write(offset, data):
        raise OSError(errno.EIO, "I/O")


def test_an_unflushed_write_is_old_or_new() -> None:
    model = SectorModel(512, A)
    with model.write(0, B):
        pass
    assert allowed(model, A, B, C, ZERO) == [True, True, False, False]
    assert violations_now(model, B) == 0
    assert violations_now(model, A) == 1


def test_a_flush_leaves_the_newest() -> None:
    model = SectorModel(512, A)
    with model.write(0, B):
        pass
    with model.write(0, C):
        pass
    with model.flush():
        pass
    assert allowed(model, A, B, C) == [False, False, True]


def test_a_failed_flush_leaves_everything_possible() -> None:
    model = SectorModel(512, A)
    with model.write(0, B):
        pass
    with pytest.raises(OSError, match="I/O"), model.flush():
        raise OSError(errno.EIO, "I/O")
    assert allowed(model, A, B) == [True, True]


def test_writes_beside_a_flush_are_not_covered() -> None:
    model = SectorModel(512, A)
    with model.write(0, B):
        pass
    mark = model.flush_begin()
    with model.write(0, C):
        pass
    model.flush_end(mark)
    assert allowed(model, A, B, C) == [False, True, True]


def test_a_write_in_progress_at_the_flush_is_not_covered() -> None:
    model = SectorModel(512, A)
    operation = model.write(0, B)
    mark = model.flush_begin()
    operation.complete()
    model.flush_end(mark)
    assert allowed(model, A, B) == [True, True]
    with model.flush():
        pass
    assert allowed(model, A, B) == [False, True]


def test_overlapping_flushes_do_not_bring_old_versions_back() -> None:
    model = SectorModel(512, A)
    with model.write(0, B):
        pass
    early = model.flush_begin()
    with model.write(0, C):
        pass
    with model.flush():
        pass
    model.flush_end(early)
    assert allowed(model, A, B, C) == [False, False, True]


def test_a_value_issued_again_is_not_covered_by_an_earlier_flush() -> None:
    model = SectorModel(512, A)
    with model.write(0, B):
        pass
    mark = model.flush_begin()
    with model.write(0, A):
        pass
    model.flush_end(mark)
    assert allowed(model, A, B) == [True, True]


def test_a_failed_write_is_old_or_new_now_and_later() -> None:
    model = SectorModel(512, A)
    fail(model, 0, B)
    assert violations_now(model, A) == violations_now(model, B) == 0
    with model.flush():
        pass
    assert allowed(model, A, B) == [True, True]
    with model.write(0, b"z"):
        pass
    with model.flush():
        pass
    assert allowed(model, b"z" + A[1:], b"z" + B[1:], A, B) == [True, True, False, False]


def test_a_mixture_within_a_sector_is_a_violation() -> None:
    model = SectorModel(1024, A + A)
    with model.write(0, B + B):
        pass
    assert violations(model, A + B) == 0
    torn = A[:100] + B[100:] + A
    (violation,) = model.check(lambda length, offset: torn[offset : offset + length])
    assert (violation.offset, violation.nature) == (0, "mixture")
    assert "holds mixture" in str(violation)


def test_natures() -> None:
    model = SectorModel(1536, A + A + A)
    content = ZERO + C + A[:-1] + b"x"
    found = model.check(lambda length, offset: content[offset : offset + length])
    assert [violation.nature for violation in found] == ["zeros", "foreign", "foreign"]
    assert len(model.check(lambda length, offset: content[offset : offset + length], limit=2)) == 2


def test_unaligned_write_builds_on_the_newest_version() -> None:
    model = SectorModel(1024, A + A)
    with model.write(500, b"z" * 24):
        pass
    expected = A[:500] + b"z" * 24 + A[:500]
    assert violations_now(model, expected) == 0
    assert model.current_content() == expected
    assert violations(model, expected[:512] + A) == 0


def test_zero_and_discard() -> None:
    model = SectorModel(1536, A * 3)
    with model.zero(0, 512):
        pass
    with model.discard(512, 512):
        pass
    with model.discard(1024, 512, optional=True):
        pass
    assert violations_now(model, ZERO * 3) == violations_now(model, ZERO * 2 + A) == 0
    assert violations_now(model, A + ZERO * 2) == 1
    assert model.versions(1024) == (A, ZERO)


def test_a_durable_write_needs_no_flush() -> None:
    model = SectorModel(1024, A + A)
    with model.write(512, B):
        pass
    with model.write(0, B, durable=True):
        pass
    assert allowed(model, A + A, B + A, B + B) == [False, True, True]


def test_reset_resize_and_copy() -> None:
    model = SectorModel(1024, A + A)
    with model.write(0, B):
        pass
    snapshot = model.copy()
    model.reset_to(C + C)
    assert allowed(model, C + C, A + A) == [True, False]
    assert allowed(snapshot, A + A, B + A) == [True, True]
    with model.write(512, B):
        pass
    model.resize(512)
    model.resize(1024)
    assert model.size_bytes == 1024
    assert allowed(model, C + ZERO, C + B, C + C) == [True, False, False]


def test_wrong_ranges_are_value_errors() -> None:
    model = SectorModel(1024)
    for attempt in (lambda: model.write(1000, A), lambda: model.write(-1, A), lambda: model.resize(5)):
        with pytest.raises(ValueError, match="the"):
            attempt()
    with pytest.raises(ValueError, match="instead of"):
        model.check(lambda length, offset: b"")
    with model.write(100, b""):
        pass


def test_against_a_disk_that_loses_whole_operations() -> None:
    """Whatever subset of the operations since the flush survives, sector by sector, is accepted."""
    random = Random(11)
    for _ in range(100):
        model = SectorModel(4096)
        current = bytearray(4096)
        history = [{bytes(current[s : s + 512])} for s in range(0, 4096, 512)]
        for _ in range(12):
            if random.random() < 0.2:
                with model.flush():
                    pass
                history = [{bytes(current[s : s + 512])} for s in range(0, 4096, 512)]
                continue
            offset = random.randrange(4000)
            data = random.randbytes(random.randrange(1, 4097 - offset))
            with model.write(offset, data):
                current[offset : offset + len(data)] = data
            for sector, versions in enumerate(history):
                versions.add(bytes(current[sector * 512 : sector * 512 + 512]))
        crashed = b"".join(random.choice(sorted(versions)) for versions in history)
        assert violations(model, crashed) == 0
        assert violations_now(model, bytes(current)) == 0
        assert all(set(model.versions(s * 512)) == versions for s, versions in enumerate(history))
