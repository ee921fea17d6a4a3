"""Images for asyncio: the calls of `jqcow`, each in a thread.

    async with jqcow.aio.open("disk.qcow2", "r+") as image:
        await image.pwrite(b"hello", 0)
        await image.flush()

What cancelling means:

AI1. A call that has not begun never does: nothing changed. One that has begun is waited for, and then
    CancelledError is raised. So nothing goes on behind the caller's back, and its buffer is its own again.
AI2. A cancelled write is a write that nobody flushed: it was done, or not. A cancelled flush, or commit of a
    transaction, has failed or not; `AsyncTransaction.receipt` tells. What a failed one means for the image,
    the next call raises.
AI3. A transaction whose block is cancelled is undone before the block is left.

AI4. While a transaction is open no change waits for its end in a thread: reads would wait behind it, also
    those of the task that has it open.

An image belongs to one event loop. Threads of the program may use `AsyncImage.image` meanwhile.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import datetime
from functools import partial
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar

import jqcow
from jqcow.errors import TransactionError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from jqcow.device.base import Device
    from jqcow.device.objects import SeekableFile
    from jqcow.ondisk.form import Preallocation

THREADS = 8
"""How many calls of an image run at once: enough for the queues of a disk."""
EXTENTS_AT_ONCE = 256

_P = ParamSpec("_P")
_R = TypeVar("_R")


async def _run(threads: Executor, function: Callable[[], _R]) -> _R:
    """Run a function in a thread; cancelled, it does not begin, or is waited for (AI1)."""
    running = threads.submit(function)
    waiting = asyncio.wrap_future(running)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        if running.cancel():
            raise
        await _end_of(waiting)
        raise


async def _end_of(waiting: asyncio.Future[Any]) -> None:
    """Wait for what has begun, however often this is cancelled; its error is nobody's any more (AI2)."""
    while not waiting.done():
        try:
            await asyncio.wait([waiting])
        except asyncio.CancelledError:
            continue
    if not waiting.cancelled():
        waiting.exception()


class Opening:
    """An image that is being opened: to be awaited, or entered by ``async with``, which closes it."""

    def __init__(self, open_image: Callable[[], jqcow.Image], thread_count: int) -> None:
        """`open` and `create` make one."""
        self._open_image = open_image
        self._thread_count = thread_count
        self._image: AsyncImage | None = None

    def __await__(self) -> Generator[Any, None, AsyncImage]:
        """Return the open image."""
        return self._open().__await__()

    async def _open(self) -> AsyncImage:
        threads = ThreadPoolExecutor(self._thread_count, thread_name_prefix="jqcow-aio")
        opened: list[jqcow.Image] = []
        try:
            await _run(threads, lambda: opened.append(self._open_image()))
        except BaseException:
            # Cancelled when it was open already: nobody else closes it.
            for left in opened:
                await _finished(threads, left.close)
            threads.shutdown(wait=False)
            raise
        return AsyncImage(opened[0], threads)

    async def __aenter__(self) -> AsyncImage:
        """Open it."""
        self._image = await self._open()
        return self._image

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        if self._image is not None:
            await self._image.close()


async def _finished(threads: Executor, function: Callable[[], object]) -> None:
    """Run a function to its end, though the task is cancelled."""
    waiting = asyncio.wrap_future(threads.submit(function))
    await _end_of(waiting)


def open(
    path: str | os.PathLike[str] | Device | SeekableFile,
    mode: Literal["r", "r+"] = "r",
    *,
    thread_count: int = THREADS,
    **options: Any,
) -> Opening:
    """Open an image as `jqcow.open` does, whose arguments and errors these are.

    ``thread_count`` calls run at once.
    """
    return Opening(lambda: jqcow.open(path, mode, **options), thread_count)


def create(
    path: str | os.PathLike[str], size: int, *, thread_count: int = THREADS, **options: Any
) -> Opening:
    """Create an image as `jqcow.create` does, whose arguments and errors these are."""
    return Opening(lambda: jqcow.create(path, size, **options), thread_count)


class _Gate:
    """Lets changes in, or one transaction when they have ended (AI4)."""

    def __init__(self) -> None:
        self._one_at_a_time = asyncio.Lock()
        self._task: asyncio.Task[Any] | None = None
        """That has the transaction, or waits for changes to end."""
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._changing = 0
        self._is_quiet = asyncio.Event()
        self._is_quiet.set()

    def refuse_owner(self) -> None:
        """Raise TransactionError in the task that has a transaction open: it would wait for itself."""
        if self._task is not None and self._task is asyncio.current_task():
            raise TransactionError("this task has a transaction open: use that, or end it first")

    @asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        """Wait for the end of a transaction; another one waits for the end of the block."""
        self.refuse_owner()
        while self._task is not None:
            await self._is_open.wait()
        self._changing += 1
        self._is_quiet.clear()
        try:
            yield
        finally:
            self._changing -= 1
            if not self._changing:
                self._is_quiet.set()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """Wait for other transactions, let no more changes in, and wait for those that are in."""
        self.refuse_owner()
        async with self._one_at_a_time:
            self._task = asyncio.current_task()
            self._is_open.clear()
            try:
                await self._is_quiet.wait()
                yield
            finally:
                self._task = None
                self._is_open.set()


class AsyncImage:
    """An open image; arguments and errors of its methods are those of `jqcow.Image`.

    Attributes:
        image: the image itself, for what has no method here.
    """

    def __init__(self, image: jqcow.Image, threads: ThreadPoolExecutor) -> None:
        """Use an image, and the threads, which `close` ends."""
        self.image = image
        self._threads = threads
        self._gate = _Gate()

    @property
    def size(self) -> int:
        """Size of the disk in bytes."""
        return self.image.size

    @property
    def mode(self) -> str:
        """``"r"`` or ``"r+"``."""
        return self.image.mode

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self.image.closed

    async def run(
        self, function: Callable[Concatenate[jqcow.Image, _P], _R], *args: _P.args, **options: _P.kwargs
    ) -> _R:
        """Call a function of the image in a thread, as ``await image.run(jqcow.Image.info)``."""
        return await _run(self._threads, partial(function, self.image, *args, **options))

    async def _change(
        self, function: Callable[Concatenate[jqcow.Image, _P], _R], *args: _P.args, **options: _P.kwargs
    ) -> _R:
        async with self._gate.change():
            return await self.run(function, *args, **options)

    async def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes from ``offset``."""
        return await self.run(jqcow.Image.pread, length, offset)

    async def pread_into(self, buffer: WriteableBuffer, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        await self.run(jqcow.Image.pread_into, buffer, offset)

    async def reads_as_zeros(self, length: int, offset: int) -> bool:
        """Return True if a range is known to read as zeros."""
        return await self.run(jqcow.Image.reads_as_zeros, length, offset)

    async def extents(self, length: int | None = None, offset: int = 0) -> AsyncIterator[jqcow.Extent]:
        """Yield an `Extent` for each part of a range."""
        found = await self.run(jqcow.Image.extents, length, offset)
        while batch := await _run(self._threads, lambda: list(islice(found, EXTENTS_AT_ONCE))):
            for extent in batch:
                yield extent

    async def info(self) -> jqcow.ImageInfo:
        """Return what the image is."""
        return await self.run(jqcow.Image.info)

    async def check(self) -> jqcow.CheckReport:
        """Check refcounts and tables."""
        return await self.run(jqcow.Image.check)

    async def snapshots(self) -> tuple[jqcow.Snapshot, ...]:
        """Return the internal snapshots."""
        return await self.run(jqcow.Image.snapshots)

    async def pwrite(self, buffer: ReadableBuffer, offset: int, fua: bool = False) -> int:
        """Write ``buffer`` at ``offset``; return its length."""
        return await self._change(jqcow.Image.pwrite, buffer, offset, fua)

    async def pwrite_compressed(self, buffer: ReadableBuffer, offset: int, level: int | None = None) -> int:
        """Write whole clusters compressed."""
        return await self._change(jqcow.Image.pwrite_compressed, buffer, offset, level)

    async def write_zeroes(self, length: int, offset: int, unmap: bool = True) -> None:
        """Make a range read as zeros."""
        await self._change(jqcow.Image.write_zeroes, length, offset, unmap)

    async def discard(self, length: int, offset: int) -> None:
        """Free the clusters that a range covers whole."""
        await self._change(jqcow.Image.discard, length, offset)

    async def resize(self, size: int, preallocation: Preallocation = "off") -> None:
        """Set the size of the disk."""
        await self._change(jqcow.Image.resize, size, preallocation)

    async def create_snapshot(self, name: str, date: datetime | None = None) -> jqcow.Snapshot:
        """Make an internal snapshot."""
        return await self._change(jqcow.Image.create_snapshot, name, date)

    async def apply_snapshot(self, id_or_name: str) -> None:
        """Make the disk what it was."""
        await self._change(jqcow.Image.apply_snapshot, id_or_name)

    async def delete_snapshot(self, id_or_name: str) -> None:
        """Delete an internal snapshot."""
        await self._change(jqcow.Image.delete_snapshot, id_or_name)

    async def checkpoint(self) -> None:
        """Flush, and bring everything in the journal home."""
        await self._change(jqcow.Image.checkpoint)

    async def flush(self) -> None:
        """Make everything durable whose write was awaited."""
        await self.run(jqcow.Image.flush)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncTransaction]:
        """Give an `AsyncTransaction`, whose changes the end of the block commits; an exception undoes them.

        Changes by other tasks wait for its end. A task has one transaction at a time.
        """
        # A transaction is its thread's.
        with ThreadPoolExecutor(1, thread_name_prefix="jqcow-aio-transaction") as thread:
            async with (
                self._gate.transaction(),
                _entered(thread, self.image.transaction()) as transaction,
            ):
                yield AsyncTransaction(transaction, thread)

    async def close(self) -> None:
        """Close the image and end the threads; cancelled or not, it is closed."""
        try:
            running = self._threads.submit(self.image.close)
        except RuntimeError:
            # Closed before.
            return
        waiting = asyncio.wrap_future(running)
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError:
            await _end_of(waiting)
            raise
        finally:
            self._threads.shutdown(wait=False)


@asynccontextmanager
async def _entered(
    thread: Executor, manager: AbstractContextManager[jqcow.Transaction]
) -> AsyncIterator[jqcow.Transaction]:
    """Enter and leave a context manager in a thread; what was entered is left, come what may (AI3)."""
    entered: list[jqcow.Transaction] = []
    try:
        await _run(thread, lambda: entered.append(manager.__enter__()))
        yield entered[0]
    except BaseException as error:
        if not entered:
            raise
        leave = partial(manager.__exit__, type(error), error, error.__traceback__)
        waiting = asyncio.wrap_future(thread.submit(leave))
        await _end_of(waiting)
        raise
    else:
        waiting = asyncio.wrap_future(thread.submit(manager.__exit__, None, None, None))
        try:
            await asyncio.shield(waiting)
        except asyncio.CancelledError:
            await _end_of(waiting)
            raise


class AsyncSavepoint:
    """A state of a transaction to come back to."""

    def __init__(self, savepoint: jqcow.Savepoint, thread: Executor) -> None:
        """`AsyncTransaction.savepoint` makes one."""
        self._savepoint = savepoint
        self._thread = thread

    async def rollback(self) -> None:
        """Undo every change since."""
        await _run(self._thread, self._savepoint.rollback)


class AsyncTransaction:
    """A transaction; arguments and errors of its methods are those of `jqcow.Transaction`.

    Attributes:
        transaction: the transaction itself.
    """

    def __init__(self, transaction: jqcow.Transaction, thread: Executor) -> None:
        """`AsyncImage.transaction` gives one."""
        self.transaction = transaction
        self._thread = thread

    @property
    def size(self) -> int:
        """Size of the disk, as the transaction sees it."""
        return self.transaction.size

    @property
    def is_open(self) -> bool:
        """False after its end."""
        return self.transaction.is_open

    @property
    def receipt(self) -> jqcow.Receipt | None:
        """What the commit returned, None before it and without one."""
        return self.transaction.receipt

    async def run(
        self, function: Callable[Concatenate[jqcow.Transaction, _P], _R], *args: _P.args, **options: _P.kwargs
    ) -> _R:
        """Call a function of the transaction in its thread."""
        return await _run(self._thread, partial(function, self.transaction, *args, **options))

    async def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes from ``offset``."""
        return await self.run(jqcow.Transaction.pread, length, offset)

    async def pread_into(self, buffer: WriteableBuffer, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        await self.run(jqcow.Transaction.pread_into, buffer, offset)

    async def pwrite(self, buffer: ReadableBuffer, offset: int) -> int:
        """Write ``buffer`` at ``offset``; return its length."""
        return await self.run(jqcow.Transaction.pwrite, buffer, offset)

    async def pwrite_compressed(self, buffer: ReadableBuffer, offset: int, level: int | None = None) -> int:
        """Write whole clusters compressed."""
        return await self.run(jqcow.Transaction.pwrite_compressed, buffer, offset, level)

    async def write_zeroes(self, length: int, offset: int, unmap: bool = True) -> None:
        """Make a range read as zeros."""
        await self.run(jqcow.Transaction.write_zeroes, length, offset, unmap)

    async def discard(self, length: int, offset: int) -> None:
        """Free the clusters that a range covers whole."""
        await self.run(jqcow.Transaction.discard, length, offset)

    async def resize(self, size: int, preallocation: Preallocation = "off") -> None:
        """Set the size of the disk."""
        await self.run(jqcow.Transaction.resize, size, preallocation)

    async def create_snapshot(self, name: str, date: datetime | None = None) -> jqcow.Snapshot:
        """Make an internal snapshot."""
        return await self.run(jqcow.Transaction.create_snapshot, name, date)

    async def apply_snapshot(self, id_or_name: str) -> None:
        """Make the disk what it was."""
        await self.run(jqcow.Transaction.apply_snapshot, id_or_name)

    async def delete_snapshot(self, id_or_name: str) -> None:
        """Delete an internal snapshot."""
        await self.run(jqcow.Transaction.delete_snapshot, id_or_name)

    async def savepoint(self) -> AsyncSavepoint:
        """Return a state to come back to."""
        savepoint = await self.run(jqcow.Transaction.savepoint)
        return AsyncSavepoint(savepoint, self._thread)

    async def rollback(self) -> None:
        """Undo everything, and end the transaction."""
        await self.run(jqcow.Transaction.rollback)
