"""Images for asyncio: the same bytes, many calls at once, and what cancelling a call leaves."""

from __future__ import annotations

import asyncio
import inspect
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import jqcow
import jqcow.aio
from jqcow.aio import AsyncImage, AsyncTransaction
from jqcow.testing import SimulatedDevice

MIB = 1 << 20
SECONDS = 60


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test that must not hang."""
    asyncio.run(asyncio.wait_for(test(), SECONDS), debug=True)


class Held(SimulatedDevice):
    """A device that holds calls of one kind back until it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.holds: str | None = None
        self.arrived = threading.Event()
        self.go_on = threading.Event()

    def _hold(self, kind: str) -> None:
        if self.holds == kind:
            self.arrived.set()
            assert self.go_on.wait(SECONDS)

    def pwrite(self, buffer: Any, offset: int) -> None:
        self._hold("pwrite")
        super().pwrite(buffer, offset)

    def barrier(self, name: str) -> None:
        self._hold("barrier")
        super().barrier(name)

    async def has_arrived(self) -> None:
        await asyncio.to_thread(self.arrived.wait, SECONDS)


@pytest.fixture
def device() -> Held:
    device = Held()
    jqcow.create_on_device(device, MIB, cluster_size=4096, journal_size=65536).close()
    device.reopen()
    return device


@asynccontextmanager
async def opened(device: Held, thread_count: int = 8) -> AsyncIterator[AsyncImage]:
    async with jqcow.aio.open(device, "r+", thread_count=thread_count, journal_size=65536) as image:
        # Live from here on: a write is one call of the device.
        await image.pwrite(b"live", 512 << 10)
        await image.flush()
        yield image
        device.go_on.set()


def test_readme_of_the_module(tmp_path: Path) -> None:
    async def test() -> None:
        async with jqcow.aio.create(tmp_path / "a.qcow2", MIB) as image:
            assert await image.pwrite(b"hello", 0) == 5
            await image.flush()
            async with image.transaction() as transaction:
                await transaction.pwrite(b"HELLO", 0)
                assert await image.pread(5, 0) == b"hello"
                assert await transaction.pread(5, 0) == b"HELLO"
            assert transaction.receipt is not None and not transaction.is_open
        assert image.closed
        image = await jqcow.aio.open(tmp_path / "a.qcow2")
        buffer = bytearray(5)
        await image.pread_into(buffer, 0)
        kinds = [extent.kind async for extent in image.extents()]
        assert (buffer, image.mode, image.size, kinds) == (b"HELLO", "r", MIB, ["data", "unallocated"])
        assert (await image.check()).ok and (await image.info()).journal is None
        assert await image.run(jqcow.Image.snapshots) == await image.snapshots() == ()
        await image.close()
        await image.close()

    run(test)


def test_every_call_is_there() -> None:
    """What a call of the image or transaction does in a thread, asyncio's does too, by the same arguments."""
    here = {"as_file", "bitmaps", "protection", "transaction"}
    for ours, theirs in ((AsyncImage, jqcow.Image), (AsyncTransaction, jqcow.Transaction)):
        for name, method in vars(theirs).items():
            rare = (
                {"set_backing_file", "hide_below", "make_empty", "snapshots"}
                if ours is AsyncTransaction
                else set()
            )
            if name.startswith("_") or not inspect.isfunction(method) or name in here | rare:
                continue
            found = inspect.signature(getattr(ours, name)).parameters
            assert list(found) == list(inspect.signature(method).parameters), name


def test_many_at_once_are_like_bytes(device: Held) -> None:
    async def test() -> None:
        chance = random.Random(3)
        expected = bytearray(MIB)
        async with jqcow.aio.open(device, "r+", journal_size=65536) as image:

            async def write(part: int) -> None:
                for _ in range(12):
                    offset = part * 65536 + chance.randrange(60000)
                    data = chance.randbytes(chance.randrange(1, 4000))
                    expected[offset : offset + len(data)] = data
                    await image.pwrite(data, offset)
                    if chance.random() < 0.2:
                        await image.flush()
                    assert await image.pread(len(data), offset) == data

            await asyncio.gather(*(write(part) for part in range(16)))
            assert await image.pread(MIB, 0) == expected
            assert (await image.check()).ok

    run(test)


def test_call_that_was_not_begun_never_is(device: Held) -> None:
    async def test() -> None:
        async with opened(device, thread_count=1) as image:
            device.holds = "pwrite"
            first = asyncio.create_task(image.pwrite(b"first", 0))
            await device.has_arrived()
            second = asyncio.create_task(image.pwrite(b"second", 65536))
            await asyncio.sleep(0.01)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            device.go_on.set()
            await first
            assert await image.pread(5, 0) == b"first"
            assert await image.pread(6, 65536) == bytes(6)

    run(test)


def test_write_that_was_begun_is_waited_for(device: Held) -> None:
    """However often it is cancelled; then it is done, and the buffer is the caller's again."""

    async def test() -> None:
        async with opened(device) as image:
            device.holds = "pwrite"
            buffer = bytearray(b"x" * 4095)
            task = asyncio.create_task(image.pwrite(buffer, 0))
            await device.has_arrived()
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0.01)
                assert not task.done()
            device.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            buffer[:] = bytes(4095)
            assert await image.pread(4095, 0) == b"x" * 4095

    run(test)


def test_error_of_a_cancelled_flush_is_not_forgotten(device: Held) -> None:
    async def test() -> None:
        image = await jqcow.aio.open(device, "r+", journal_size=65536)
        await image.pwrite(b"live", 0)
        await image.flush()
        await image.pwrite(b"more", 4096)
        device.holds = "barrier"

        def fail(name: str, _: SimulatedDevice) -> None:
            raise OSError(5, "lost")

        device.barrier_listeners.append(fail)
        task = asyncio.create_task(image.flush())
        await device.has_arrived()
        task.cancel()
        await asyncio.sleep(0)
        device.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(jqcow.ReadOnlyError):
            await image.pwrite(b"x", 0)
        await image.close()

    run(test)


def test_cancelled_block_undoes_its_transaction(device: Held) -> None:
    async def test() -> None:
        async with opened(device) as image:
            inside = asyncio.Event()

            async def change() -> None:
                async with image.transaction() as transaction:
                    await transaction.pwrite(b"never", 0)
                    inside.set()
                    await asyncio.sleep(SECONDS)

            task = asyncio.create_task(change())
            await inside.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await image.pread(5, 0) == bytes(5)
            async with image.transaction() as transaction:
                await transaction.pwrite(b"after", 0)
            assert await image.pread(5, 0) == b"after"

    run(test)


def test_cancelled_commit_is_over_when_it_is_told(device: Held) -> None:
    async def test() -> None:
        async with opened(device) as image:
            given: list[AsyncTransaction] = []

            async def change() -> None:
                async with image.transaction() as transaction:
                    given.append(transaction)
                    await transaction.pwrite(b"whole", 0)
                    device.holds = "barrier"

            task = asyncio.create_task(change())
            await device.has_arrived()
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()
            device.go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert given[0].receipt is not None
            assert await image.pread(5, 0) == b"whole"

    run(test)


def test_savepoints_and_rollback(device: Held) -> None:
    async def test() -> None:
        async with opened(device) as image, image.transaction() as transaction:
            await transaction.pwrite(b"kept", 0)
            savepoint = await transaction.savepoint()
            await transaction.resize(2 * MIB)
            await transaction.write_zeroes(4096, 0)
            await savepoint.rollback()
            assert transaction.size == MIB and await transaction.pread(4, 0) == b"kept"
            await transaction.rollback()
            assert not transaction.is_open and transaction.receipt is None

    run(test)


def test_changes_wait_for_a_transaction_and_reads_do_not(device: Held) -> None:
    """Also where more changes wait than there are threads, and the transaction's own task reads the image."""

    async def test() -> None:
        async with opened(device, thread_count=2) as image:
            async with image.transaction() as transaction:
                waiting = [asyncio.create_task(image.pwrite(b"later", 4096 * n)) for n in range(1, 9)]
                await asyncio.sleep(0.02)
                assert not any(task.done() for task in waiting)
                assert await image.pread(5, 4096) == bytes(5)
                waiting.pop().cancel()
                await transaction.pwrite(b"sooner", 4096)
                with pytest.raises(jqcow.TransactionError):
                    await image.pwrite(b"x", 0)
                with pytest.raises(jqcow.TransactionError):
                    async with image.transaction():
                        pass
            await asyncio.gather(*waiting)
            assert await image.pread(6, 4096) == b"laterr"
            assert await image.pread(5, 8 * 4096) == bytes(5)

    run(test)


def test_transaction_waits_for_changes_that_are_in(device: Held) -> None:
    async def test() -> None:
        async with opened(device) as image:
            device.holds = "pwrite"
            write = asyncio.create_task(image.pwrite(b"in", 0))
            await device.has_arrived()
            entered = asyncio.Event()

            async def change() -> None:
                async with image.transaction() as transaction:
                    entered.set()
                    assert await transaction.pread(2, 0) == b"in"

            task = asyncio.create_task(change())
            other = asyncio.create_task(change())
            await asyncio.sleep(0.02)
            assert not entered.is_set()
            other.cancel()
            device.go_on.set()
            await asyncio.gather(write, task)
            with pytest.raises(asyncio.CancelledError):
                await other

    run(test)


def test_error_of_the_block_passes_through(device: Held) -> None:
    async def test() -> None:
        async with opened(device) as image:
            with pytest.raises(ZeroDivisionError):
                async with image.transaction() as transaction:
                    await transaction.pwrite(b"never", 0)
                    raise ZeroDivisionError
            assert await image.pread(5, 0) == bytes(5)
            with pytest.raises(ValueError, match="not within"):
                await image.pread(1, MIB)

    run(test)


def test_cancelled_opening_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    jqcow.create(path, MIB).close()

    async def test() -> None:
        for _ in range(20):
            task = asyncio.ensure_future(jqcow.aio.open(path, "r+")._open())
            await asyncio.sleep(random.random() * 0.003)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await (await task).close()
            # The lock is free again.
            jqcow.open(path, "r+").close()
        with pytest.raises(FileNotFoundError):
            await jqcow.aio.open(tmp_path / "none")

    run(test)
