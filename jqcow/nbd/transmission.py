"""The requests of one client, from the end of its negotiation to the end of its connection.

One thread receives. It does itself what is quick: short reads, and writes, which go to the host's page cache.
Their replies are sent together when no whole request is left in its buffer. All else is done by threads of
the connection, and flushes by the one thread that flushes for all; so replies come in any order. A flush of
a client that waits for nothing else, and sends nothing while it flushes, needs no other thread either.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from functools import partial

from jqcow.nbd import protocol
from jqcow.nbd.answering import Answers, Buffers
from jqcow.nbd.contexts import found_status
from jqcow.nbd.export import error_of
from jqcow.nbd.limits import Budget, Limits
from jqcow.nbd.negotiation import Agreed
from jqcow.nbd.protocol import Chunk, Command, CommandFlag, Form, HangUp, Request
from jqcow.nbd.stream import Stream
from jqcow.nbd.workers import Flusher, Workers

RECEIVED_BYTES = 256 << 10
"""Received at once. A write that fits in whole is done from there."""
READ_BYTES_HERE_MAX = 64 << 10
"""Of a read that the receiving thread does itself."""
HOLE_BYTES_MIN = 32 << 10
"""Of a read that is looked at for being all zeros, which are told and not sent."""
ELSEWHERE_AFTER_MET = 64
"""So many flushes are left to other threads once a request came in while this one was flushing."""
REQUESTS_MAX = 256
"""Of one client that are in flight; further ones are not received meanwhile."""

Job = Callable[[], bool | None]
"""Returns True if the request keeps its place among those in flight: it is not answered yet."""

_FUA = int(CommandFlag.FUA)
"""A plain number: what is done with flags of an enumeration takes longer than a short request."""
_LENGTH_LIMITED = frozenset({Command.READ, Command.WRITE, Command.CACHE})


class Transmission:
    """Serves one client; `run` in the thread that receives, `stop` in any."""

    def __init__(
        self, stream: Stream, agreed: Agreed, budget: Budget, flusher: Flusher, limits: Limits
    ) -> None:
        self._stream = stream
        self._export = agreed.export
        self._image = agreed.export.image
        self._form = agreed.form
        self._contexts = agreed.contexts
        self._budget = budget
        self._flusher = flusher
        self._limits = limits
        self._workers = Workers(limits.workers, "nbd-work")
        self._places = threading.BoundedSemaphore(REQUESTS_MAX)
        self._answers = Answers(stream, limits, lambda: self._stops or budget.is_short_for_others(self))
        self._stops = False
        self._flushes_elsewhere = 0
        self._buffer = bytearray(RECEIVED_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    def run(self) -> None:
        """Serve the client until it has had enough.

        Raises:
            HangUp: it is gone, or breaks the protocol.
        """
        try:
            while self._serve_one():
                pass
            self._answers.send_ready()
        except BaseException as error:
            # Nobody else is to wait for this client.
            self._answers.give_up(error if isinstance(error, HangUp) else HangUp(str(error)))
            raise
        finally:
            self._wait_for_all()
        if self._answers.broken is not None:
            raise self._answers.broken

    def stop(self) -> None:
        """Take no further requests; `run` ends when those in flight are answered."""
        self._stops = True
        self._stream.stop_receiving()

    def cut(self) -> None:
        """Answer nothing more."""
        self._stops = True
        self._stream.cut()

    def _wait_for_all(self) -> None:
        for _ in range(REQUESTS_MAX):
            self._places.acquire()
        self._workers.end()

    # Receiving

    def _serve_one(self) -> bool:
        """Serve one request; False if there is none any more."""
        form = self._form.request
        while self._end - self._start < form.size:
            if not self._receive_more():
                return False
        magic, flags, command, cookie, offset, length = form.unpack_from(self._buffer, self._start)
        if magic != self._form.request_magic:
            raise HangUp("a request does not begin as one")
        self._start += form.size
        request = Request(flags, command, cookie, offset, length)
        if command == Command.DISC:
            return False
        refusal = self._refusal(request)
        if refusal is not None:
            self._skip_payload(request)
            self._answers.add([self._form.failed(request, *refusal)])
        elif command == Command.READ:
            self._read(request)
        elif command == Command.WRITE:
            self._write(request)
        elif command == Command.FLUSH:
            self._flush(request)
        else:
            self._elsewhere(0, partial(self._do_other, request))
        return True

    def _receive_more(self) -> bool:
        """Receive more of a request's head; False if no request is to be received any more."""
        self._answers.send_ready()
        if self._stops:
            return False
        if self._start:
            left = self._end - self._start
            self._view[:left] = self._view[self._start : self._end]
            self._start, self._end = 0, left
        try:
            self._end += self._stream.receive_some(self._view[self._end :])
        except HangUp:
            if self._stops and self._answers.broken is None:
                return False
            raise
        return True

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        """Return the error and the text for a request that cannot be."""
        if request.command not in protocol.FLAGS_OF:
            return errno.EINVAL, f"command {request.command} is not known"
        if request.flags and (wrong := _wrong_flags(request, self._form)):
            return errno.EINVAL, wrong
        if self._stops:
            return errno.ESHUTDOWN, "the server stops"
        if self._export.read_only and request.command in protocol.CHANGES:
            return errno.EPERM, "the export is read-only"
        if request.command in _LENGTH_LIMITED and request.length > protocol.PAYLOAD_BYTES_MAX:
            return errno.EINVAL, f"{request.length} bytes are more than {protocol.PAYLOAD_BYTES_MAX}"
        if request.command == Command.BLOCK_STATUS and not (self._contexts and request.length):
            return errno.EINVAL, "a block status needs a metadata context and a range"
        return None

    def _skip_payload(self, request: Request) -> None:
        has_payload = request.command == Command.WRITE
        if self._form.extended:
            has_payload |= bool(request.flags & CommandFlag.PAYLOAD_LEN)
        if not has_payload:
            return
        if request.length > protocol.PAYLOAD_BYTES_SKIPPED_MAX:
            raise HangUp(f"a request has {request.length} bytes of data")
        here = min(request.length, self._end - self._start)
        self._start += here
        self._stream.skip(request.length - here)

    def _elsewhere(self, length: int, job: Job) -> None:
        """Have a thread of the connection do a job for which ``length`` bytes were taken."""
        self._places.acquire()
        self._workers.submit(partial(self._run_elsewhere, length, job))

    def _run_elsewhere(self, length: int, job: Job) -> None:
        keeps_place = None
        try:
            keeps_place = job()
        except HangUp as error:
            self._answers.give_up(error)
        finally:
            if length:
                self._budget.give_back(length)
            if not keeps_place:
                self._places.release()

    def is_over(self) -> bool:
        """Return True if no further request is to be begun."""
        return self._stops or self._answers.broken is not None

    # Requests

    def _read(self, request: Request) -> None:
        if request.length <= READ_BYTES_HERE_MAX:
            self._answers.add(self._read_buffers(request))
            return
        self._budget.take(request.length, self)
        self._elsewhere(request.length, lambda: self._answers.send(self._read_buffers(request)))

    def _read_buffers(self, request: Request) -> Buffers:
        head = self._form.data_head(request)
        try:
            if self._is_hole(request):
                return [self._form.hole(request)]
            reply = bytearray(len(head) + request.length)
            reply[: len(head)] = head
            with memoryview(reply) as view:
                self._image.pread_into(view[len(head) :], request.offset)
            return [reply]
        except Exception as error:
            return [self._told(request, error)]

    def _is_hole(self, request: Request) -> bool:
        if not self._form.structured or request.length < HOLE_BYTES_MIN:
            return False
        return self._image.reads_as_zeros(request.length, request.offset)

    def _write(self, request: Request) -> None:
        if request.length <= RECEIVED_BYTES - self._form.request.size:
            while self._end - self._start < request.length:
                if self._start and RECEIVED_BYTES - self._start < request.length:
                    left = self._end - self._start
                    self._view[:left] = self._view[self._start : self._end]
                    self._start, self._end = 0, left
                self._end += self._stream.receive_some(self._view[self._end :])
            data = self._view[self._start : self._start + request.length]
            self._start += request.length
            if self._is_written(request, data, self._answers.add):
                if request.flags & _FUA:
                    self._flush(request)
                else:
                    self._answers.add([self._form.done(request)])
            return
        self._budget.take(request.length, self)
        try:
            payload = memoryview(bytearray(request.length))
            here = self._end - self._start
            payload[:here] = self._view[self._start : self._end]
            self._start = self._end = 0
            self._stream.receive_into(payload[here:])
        except BaseException:
            self._budget.give_back(request.length)
            raise
        self._elsewhere(request.length, lambda: self._write_data(request, payload))

    def _write_data(self, request: Request, data: memoryview) -> bool:
        if not self._is_written(request, data, self._answers.send):
            return False
        if request.flags & _FUA:
            self._flush_then_answer(request)
            return True
        self._answers.send([self._form.done(request)])
        return False

    def _is_written(self, request: Request, data: memoryview, answer: Callable[[Buffers], None]) -> bool:
        """Write; if that fails, answer so and return False."""
        try:
            self._image.pwrite(data, request.offset)
        except Exception as error:
            answer([self._told(request, error, writes=True)])
            return False
        return True

    def _do_other(self, request: Request) -> bool:
        """Do what takes the tables a while, or the device."""
        image, offset, length = self._image, request.offset, request.length
        reply = None
        try:
            if request.command == Command.TRIM:
                image.discard(length, offset)
            elif request.command == Command.WRITE_ZEROES:
                self._export.write_zeroes(length, offset, request.flags)
            elif request.command == Command.CACHE:
                self._export.cache(length, offset)
            else:
                reply = self._status(request)
        except Exception as error:
            writes = request.command == Command.WRITE_ZEROES
            self._answers.send([self._told(request, error, writes=writes)])
            return False
        if request.flags & _FUA and request.command in protocol.CHANGES:
            self._flush_then_answer(request)
            return True
        self._answers.send([reply or self._form.done(request)])
        return False

    def _status(self, request: Request) -> bytes:
        """Return the reply to a block status: a chunk for each context."""
        chunks: list[bytes] = []
        one = bool(request.flags & CommandFlag.REQ_ONE)
        extended = self._form.extended
        form = protocol.EXTENDED_STATUS if extended else protocol.STATUS
        kind = Chunk.BLOCK_STATUS_EXT if extended else Chunk.BLOCK_STATUS
        for context in self._contexts:
            found = found_status(context, request.offset, request.length, one=one)
            head = protocol.WORD.pack(context.number)
            if extended:
                head += protocol.WORD.pack(len(found))
            payload = head + b"".join(form.pack(length, flags) for length, flags in found)
            is_last = context is self._contexts[-1]
            chunk_head = self._form.head if is_last else self._form.more_head
            chunks += [chunk_head(request, kind, len(payload)), payload]
        return b"".join(chunks)

    def _flush(self, request: Request) -> None:
        """Flush for a request that the receiving thread has; here, where that keeps no other one waiting."""
        if self._flushes_elsewhere or self._end > self._start:
            self._flushes_elsewhere = max(0, self._flushes_elsewhere - 1)
            self._places.acquire()
            self._flush_then_answer(request)
            return
        self._answers.send_ready()
        self._answers.add([self._flushed_reply(request, self._flusher.flush_here())])
        if self._stream.has_more():
            self._flushes_elsewhere = ELSEWHERE_AFTER_MET

    def _flush_then_answer(self, request: Request) -> None:
        """Have the thread that flushes for all do so, and answer then (export.py, O2).

        The caller has a place for the request, which is given up with the answer: whoever waited for another
        one here would wait for a connection that ends, and that waits for its place.
        """
        self._flusher.submit(lambda error: self._flushed(request, error))

    def _flushed(self, request: Request, error: Exception | None) -> None:
        reply = self._flushed_reply(request, error)
        # The thread waits for no client.
        self._workers.submit(partial(self._run_elsewhere, 0, lambda: self._answers.send([reply])))

    def _flushed_reply(self, request: Request, error: Exception | None) -> bytes:
        return self._form.done(request) if error is None else self._told(request, error)

    def _told(self, request: Request, error: Exception, *, writes: bool = False) -> bytes:
        code = error_of(error, writes=writes)
        return self._form.failed(request, code, str(error))


def _wrong_flags(request: Request, form: Form) -> str:
    """Return what is wrong about the flags of a request, "" for nothing."""
    allowed = protocol.FLAGS_OF[Command(request.command)]
    if request.flags & ~allowed or (request.flags & CommandFlag.PAYLOAD_LEN and not form.extended):
        return f"flags {request.flags:#x} do not go with the command"
    if request.flags & CommandFlag.DF and not form.structured:
        return "DF needs structured replies"
    return ""
