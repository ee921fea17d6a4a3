"""Calls at the wrong time, by the wrong thread or from the wrong process: a clear error, and no harm."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import jqcow
from jqcow import Image, ImageClosedError, ImageInUse, PoisonedError, ReadOnlyError
from jqcow.errors import TransactionError
from jqcow.testing import SimulatedDevice
from tests.support.beside import HeldUp, Others

CLUSTER = 4096
DISK = 64 * CLUSTER

CHANGES: dict[str, Callable[[Image], object]] = {
    "pwrite": lambda image: image.pwrite(b"\1" * 512, 0),
    "pwrite fua": lambda image: image.pwrite(b"\1" * 512, 0, fua=True),
    "write_zeroes": lambda image: image.write_zeroes(512, 0),
    "discard": lambda image: image.discard(CLUSTER, 0),
    "grow": lambda image: image.resize(DISK * 2),
    "shrink": lambda image: image.resize(512),
    "transaction": lambda image: image.transaction().__enter__(),
    "checkpoint": lambda image: image.checkpoint(),
}
OTHER_CALLS: dict[str, Callable[[Image], object]] = {
    "flush": lambda image: image.flush(),
    "pread": lambda image: image.pread(512, 0),
    "pread_into": lambda image: image.pread_into(bytearray(512), 0),
    "extents": lambda image: list(image.extents()),
    "info": lambda image: image.info(),
    "check": lambda image: image.check(),
    "as_file": lambda image: image.as_file(),
}
CALLS = CHANGES | OTHER_CALLS

every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
every_change = pytest.mark.parametrize("call", CHANGES.values(), ids=CHANGES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.qcow2"


@pytest.fixture
def image(path: Path) -> Iterator[Image]:
    with jqcow.create(path, DISK, cluster_size=CLUSTER, journal_size=65536) as image:
        image.pwrite(b"\7" * CLUSTER, CLUSTER)
        yield image


# After close


@every_call
def test_a_closed_image_says_so(image: Image, call: Callable[[Image], object]) -> None:
    image.close()
    with pytest.raises(ImageClosedError, match="the image is closed"):
        call(image)


def test_closing_again_does_nothing(image: Image, path: Path) -> None:
    image.close()
    content = path.read_bytes()
    image.close()
    assert image.closed
    assert path.read_bytes() == content


def test_what_outlives_its_image_says_so(image: Image) -> None:
    file, extents = image.as_file(), image.extents()
    next(extents)
    image.close()
    with pytest.raises(ImageClosedError):
        next(extents)
    with pytest.raises(ImageClosedError):
        file.read(1)
    file.close()


@every_change
def test_a_reader_changes_nothing(image: Image, path: Path, call: Callable[[Image], object]) -> None:
    image.close()
    with jqcow.open(path) as reader, pytest.raises(ReadOnlyError):
        call(reader)


# Closing while others are at work


def test_closing_waits_for_a_flush_that_waits_for_the_device() -> None:
    device = SimulatedDevice()
    image = jqcow.create_on_device(device, DISK, cluster_size=CLUSTER)
    image.pwrite(b"\1" * CLUSTER, 0)
    held = HeldUp(device, image.flush, barrier_name="flush.record")
    with held as flush, Others(image.close) as close, Others(image.flush) as waiting:
        assert close.is_waiting() and waiting.is_waiting() and flush.is_waiting()
        flush.let_go()
    assert image.closed
    device.reopen()
    with jqcow.open_device(device) as found:
        assert found.pread(CLUSTER, 0) == b"\1" * CLUSTER


def test_who_waits_for_a_flush_that_fails_gets_an_error_too() -> None:
    device = SimulatedDevice()
    image = jqcow.create_on_device(device, DISK, cluster_size=CLUSTER)
    image.pwrite(b"\1" * CLUSTER, 0)
    errors: list[BaseException] = []

    def failing_flush() -> None:
        try:
            image.flush()
        except OSError as error:
            errors.append(error)

    held = HeldUp(device, failing_flush, errno.EIO, barrier_name="flush.record")
    with held as first, Others(failing_flush) as second:
        assert first.is_waiting() and second.is_waiting()
        first.let_go()
    assert sorted(type(error).__name__ for error in errors) == ["OSError", "PoisonedError"]
    with pytest.raises(PoisonedError):
        image.pwrite(b"\1", 0)
    image.close()


def test_closing_waits_for_a_transaction(image: Image, path: Path) -> None:
    with Others() as others, image.transaction() as transaction:
        others.start(image.close)
        assert others.is_waiting()
        others.start(lambda: write_late(image))
        transaction.pwrite(b"\3" * CLUSTER, 0)
    assert image.closed
    with jqcow.open(path) as found:
        assert found.pread(CLUSTER, 0) == b"\3" * CLUSTER


def write_late(image: Image) -> None:
    """Write; the close may come first."""
    try:
        image.pwrite(b"\4" * 512, 2 * CLUSTER)
    except ImageClosedError:
        assert image.closed


def test_who_waits_for_a_transaction_finds_the_image_closed(image: Image) -> None:
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            with image.transaction():
                pass
        except ImageClosedError as error:
            errors.append(error)

    with Others() as waiting, image._engine.guard.turnstile:
        waiting.start(wait)
        assert waiting.is_waiting()
        # As `Image.__exit__` does when the end of a transaction was cut off.
        image._end()
    assert len(errors) == 1


# Transactions


@every_change
def test_the_thread_of_a_transaction_uses_its_methods(image: Image, call: Callable[[Image], object]) -> None:
    with image.transaction() as transaction:
        transaction.pwrite(b"\2" * CLUSTER, CLUSTER)
        with pytest.raises(TransactionError, match="this thread has a transaction open"):
            call(image)
    assert image.pread(CLUSTER, CLUSTER) == b"\2" * CLUSTER


def test_the_thread_of_a_transaction_may_look_at_the_image(image: Image) -> None:
    with image.transaction() as transaction:
        transaction.pwrite(b"\2" * CLUSTER, CLUSTER)
        assert image.pread(CLUSTER, CLUSTER) == b"\7" * CLUSTER
        for call in OTHER_CALLS.values():
            call(image)
        assert transaction.pread(CLUSTER, CLUSTER) == b"\2" * CLUSTER


def test_an_image_is_not_closed_within_a_transaction(image: Image) -> None:
    with image.transaction(), pytest.raises(TransactionError):
        image.close()
    assert not image.closed


TRANSACTION_CALLS: dict[str, Callable[[jqcow.image.Transaction], object]] = {
    "pread": lambda transaction: transaction.pread(512, 0),
    "pread_into": lambda transaction: transaction.pread_into(bytearray(512), 0),
    "pwrite": lambda transaction: transaction.pwrite(b"\1" * 512, 0),
    "write_zeroes": lambda transaction: transaction.write_zeroes(512, 0),
    "discard": lambda transaction: transaction.discard(CLUSTER, 0),
    "resize": lambda transaction: transaction.resize(512),
    "savepoint": lambda transaction: transaction.savepoint(),
    "rollback": lambda transaction: transaction.rollback(),
    "size": lambda transaction: transaction.size,
}


@pytest.mark.parametrize("call", TRANSACTION_CALLS.values(), ids=TRANSACTION_CALLS)
@pytest.mark.parametrize("ending", ["commit", "rollback", "exception"])
def test_a_transaction_that_has_ended_says_so(
    image: Image, call: Callable[[jqcow.image.Transaction], object], ending: str
) -> None:
    try:
        with image.transaction() as transaction:
            point = transaction.savepoint()
            if ending == "rollback":
                transaction.rollback()
                with pytest.raises(TransactionError, match="has ended"):
                    call(transaction)
            elif ending == "exception":
                raise KeyError
    except KeyError:
        pass
    assert not transaction.is_open
    with pytest.raises(TransactionError, match="has ended"):
        call(transaction)
    with pytest.raises(TransactionError, match="has ended"):
        point.rollback()
    assert image.pread(CLUSTER, CLUSTER) == b"\7" * CLUSTER


def test_a_savepoint_behind_another_is_gone(image: Image) -> None:
    with image.transaction() as transaction:
        first = transaction.savepoint()
        second = transaction.savepoint()
        first.rollback()
        with pytest.raises(TransactionError, match="went back behind this savepoint"):
            second.rollback()
        first.rollback()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError])
def test_any_exception_in_the_block_undoes_all(image: Image, error: type[BaseException]) -> None:
    with pytest.raises(error), image.transaction() as transaction:
        transaction.pwrite(b"\2" * CLUSTER, CLUSTER)
        transaction.resize(DISK * 4)
        raise error
    assert image.pread(CLUSTER, CLUSTER) == b"\7" * CLUSTER
    assert image.size == DISK
    image.pwrite(b"\3" * 512, 0)
    image.flush()
    assert not image.check().counts


def test_a_transaction_that_nobody_ends_is_undone_when_it_is_dropped(image: Image) -> None:
    """Such as one whose ``with`` block was left by an exception that came before its own ``__exit__`` ran."""
    scope = image.transaction()
    transaction = scope.__enter__()
    transaction.pwrite(b"\2" * CLUSTER, CLUSTER)
    with Others(lambda: image.pwrite(b"\4" * 512, 0)) as waiting:
        assert waiting.is_waiting()
        del scope
    assert not transaction.is_open
    assert image.pread(CLUSTER, CLUSTER) == b"\7" * CLUSTER
    assert not image.check().counts


def test_leaving_the_image_undoes_a_transaction_whose_end_was_cut_off(path: Path) -> None:
    with jqcow.create(path, DISK, cluster_size=CLUSTER) as image:
        image.pwrite(b"\7" * CLUSTER, CLUSTER)
        scope = image.transaction()
        scope.__enter__().pwrite(b"\2" * CLUSTER, CLUSTER)
    assert image.closed
    del scope
    with jqcow.open(path) as found:
        assert found.pread(CLUSTER, CLUSTER) == b"\7" * CLUSTER
    with jqcow.open(path, "r+") as recovered:
        assert recovered.recovered is not None
    subprocess.run(["qemu-img", "check", "-q", path], check=True)


# Fork


def in_child(body: Callable[[], None]) -> None:
    """Run ``body`` in a forked child; raise here what it raised there."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        message = b""
        try:
            body()
        except BaseException as error:
            message = repr(error).encode() or b"?"
        os.write(writing, message)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        message = pipe.read()
    os.waitpid(child, 0)
    assert not message, message.decode()


def test_a_forked_child_is_refused_and_the_parent_goes_on(image: Image, path: Path) -> None:
    def child() -> None:
        for call in CALLS.values():
            with pytest.raises(ImageInUse, match="which this one was forked from"):
                call(image)
        repr(image)

    in_child(child)
    image.pwrite(b"\2" * CLUSTER, 0)
    image.flush()
    assert not image.check().counts
    # The child is gone, and the parent's locks are not.
    with pytest.raises(ImageInUse):
        jqcow.open(path)


def test_a_child_that_leaves_by_the_with_block_changes_nothing(image: Image, path: Path) -> None:
    image.flush()
    content = path.read_bytes()

    def child() -> None:
        image.__exit__(None, None, None)
        image.close()

    in_child(child)
    assert path.read_bytes() == content
    image.pwrite(b"\2" * CLUSTER, 0)
    image.flush()


def test_a_child_is_refused_while_the_parent_holds_every_lock(image: Image) -> None:
    def child() -> None:
        with pytest.raises(ImageInUse):
            image.pread(512, 0)
        with pytest.raises(ImageInUse):
            image.pwrite(b"\1" * 512, 0)
        with pytest.raises(ImageInUse):
            image.flush()
        image.close()

    with image._engine.guard.turnstile, image._engine.commits.turn.lock, image._lock:
        in_child(child)


def test_a_transaction_is_of_no_use_to_a_child(image: Image) -> None:
    with image.transaction() as transaction:
        transaction.pwrite(b"\2" * CLUSTER, 0)

        def child() -> None:
            for call in TRANSACTION_CALLS.values():
                with pytest.raises(ImageInUse):
                    call(transaction)

        in_child(child)
    assert image.pread(CLUSTER, 0) == b"\2" * CLUSTER


# Two images of one file


@pytest.mark.parametrize("first", ["r", "r+"])
@pytest.mark.parametrize("second", ["r", "r+"])
def test_two_images_of_one_file_in_one_process(
    image: Image, path: Path, first: jqcow.image.Mode, second: jqcow.image.Mode
) -> None:
    image.close()
    with jqcow.open(path, first) as one:
        if first == second == "r":
            with jqcow.open(path, second) as two:
                assert one.pread(DISK, 0) == two.pread(DISK, 0)
        else:
            with pytest.raises(ImageInUse, match="is in use"):
                jqcow.open(path, second)
    jqcow.open(path, second).close()


def test_an_image_that_was_dropped_keeps_nobody_out(path: Path) -> None:
    image = jqcow.create(path, DISK, cluster_size=CLUSTER)
    image.pwrite(b"\1" * CLUSTER, 0)
    image.flush()
    del image
    gc.collect()
    with jqcow.open(path, "r+") as found:
        assert found.recovered is not None
        assert found.pread(CLUSTER, 0) == b"\1" * CLUSTER
