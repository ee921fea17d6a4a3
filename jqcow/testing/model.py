"""What every sector of a disk may hold, while a program changes it, and after a crash.

The model is told of each operation before it starts, and of its end. It keeps, for each 512-byte sector,
the *versions* that a crash may bring back and the *current* ones that a read may return now:

    M1  An operation's version is possible from its start, whether it completes, fails or never ends.
    M2  A flush leaves, of the versions issued before it began, only those that were current then.
    M3  A version is a sector as a whole: a mixture of two versions is a violation.
    M4  After a failed operation a sector is as before or as asked for; what comes later builds on either.

Almost all sectors have one version at most times. They lie in one flat buffer; only the others have a
history of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

ReadFunction = Callable[[int, int], bytes]
"""``read(length, offset)``, the argument order of ``pread``."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Violation:
    """A sector that holds something it must not. ``expected`` are the versions that it may hold."""

    offset: int
    found: bytes
    expected: tuple[bytes, ...]

    @property
    def nature(self) -> str:
        """Say what was found: ``zeros``, ``mixture`` (each byte from some version) or ``foreign``."""
        if self.found.count(0) == len(self.found):
            return "zeros"
        columns = zip(self.found, *self.expected, strict=True)
        if all(byte in versions for byte, *versions in columns):
            return "mixture"
        return "foreign"

    def __str__(self) -> str:
        versions = " or ".join(f"{value[:8].hex()}.." for value in self.expected)
        return f"sector at {self.offset:#x} holds {self.nature} ({self.found[:8].hex()}..), not {versions}"


@dataclass(slots=True)
class _History:
    """One sector. ``versions`` are (issue number, value) pairs; ``current`` is a subset of the values."""

    versions: list[tuple[int, bytes]]
    current: list[bytes]

    def add(self, number: int, values: list[bytes]) -> None:
        known = {value for _, value in self.versions}
        for value in values:
            if value in known:
                # Issued anew: a flush that began earlier does not cover it.
                self.versions = [pair for pair in self.versions if pair[1] != value]
            self.versions.append((number, value))

    def copy(self) -> _History:
        return _History(list(self.versions), list(self.current))


@dataclass(frozen=True, slots=True)
class FlushMark:
    """The moment at which a flush began; made by :meth:`SectorModel.flush_begin`."""

    number: int
    current: dict[int, tuple[bytes, ...]]


class Operation:
    """An operation that has begun. As a context manager it completes, or fails with the exception.

    An operation that is never completed may or may not have happened.
    """

    def __init__(self, model: SectorModel, results: dict[int, list[bytes]], *, durable: bool) -> None:
        self._model = model
        self._results = results
        self._durable = durable

    def complete(self) -> None:
        """The operation succeeded: reads return its result from now on."""
        self._model._complete(self._results, durable=self._durable)

    def __enter__(self) -> Operation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.complete()


class SectorModel:
    """The sectors of a disk of ``size_bytes``, a multiple of the sector size; zeros unless ``initial``.

    Operations may run at the same time only on different sectors. Wrong ranges raise ``ValueError``.
    """

    def __init__(self, size_bytes: int, initial: bytes = b"", *, sector_bytes: int = 512) -> None:
        if size_bytes % sector_bytes or len(initial) > size_bytes:
            raise ValueError("the size is a multiple of the sector size, and holds the initial content")
        self.sector_bytes = sector_bytes
        self._settled = bytearray(initial.ljust(size_bytes, b"\0"))
        self._histories: dict[int, _History] = {}
        self._issued = 0

    @property
    def size_bytes(self) -> int:
        """The size of the disk in bytes."""
        return len(self._settled)

    def copy(self) -> SectorModel:
        """Return an independent copy, such as the laboratory takes at the moment of a crash."""
        twin = SectorModel(0, sector_bytes=self.sector_bytes)
        twin._settled = bytearray(self._settled)
        twin._histories = {sector: history.copy() for sector, history in self._histories.items()}
        twin._issued = self._issued
        return twin

    # Operations

    def write(self, offset: int, data: bytes, *, durable: bool = False) -> Operation:
        """Begin a write. ``durable`` means that its success is also a promise for these sectors (FUA)."""
        return self._begin(offset, bytes(data), durable=durable, optional=False)

    def zero(self, offset: int, length: int, *, durable: bool = False) -> Operation:
        """Begin to make a range read as zeros."""
        return self._begin(offset, bytes(length), durable=durable, optional=False)

    def discard(self, offset: int, length: int, *, optional: bool = False) -> Operation:
        """Begin a discard; the range reads as zeros afterwards. If ``optional``, it may also stay."""
        return self._begin(offset, bytes(length), durable=False, optional=optional)

    def flush_begin(self) -> FlushMark:
        """A flush begins: it covers the operations that have completed by now."""
        current = {sector: tuple(history.current) for sector, history in self._histories.items()}
        return FlushMark(self._issued, current)

    def flush_end(self, mark: FlushMark) -> None:
        """The flush succeeded. A flush that fails has no end: everything stays possible."""
        for sector, current in mark.current.items():
            history = self._histories.get(sector)
            if history is None:
                continue
            history.versions = [
                (number, value)
                for number, value in history.versions
                if number > mark.number or value in current
            ]
            self._settle(sector, history)

    @contextmanager
    def flush(self) -> Iterator[None]:
        """Wrap a flush: its end is recorded if the body succeeds."""
        mark = self.flush_begin()
        yield
        self.flush_end(mark)

    def reset_to(self, content: bytes) -> None:
        """After a crash: what was observed is the only version left. Sets the size too."""
        if len(content) % self.sector_bytes:
            raise ValueError("the size is a multiple of the sector size")
        self._settled = bytearray(content)
        self._histories.clear()

    def resize(self, size_bytes: int) -> None:
        """The size changed, durably. Growth reads as zeros, also where there was something before."""
        if size_bytes % self.sector_bytes:
            raise ValueError("the size is a multiple of the sector size")
        del self._settled[size_bytes:]
        self._settled.extend(bytes(size_bytes - len(self._settled)))
        end = size_bytes // self.sector_bytes
        self._histories = {s: history for s, history in self._histories.items() if s < end}

    # Judgement

    def check(self, read: ReadFunction, *, limit: int = 16) -> list[Violation]:
        """Compare the disk after a crash: each sector must be one of its versions, whole.

        Returns at most ``limit`` violations, lowest offset first.
        """
        allowed = {s: [value for _, value in h.versions] for s, h in self._histories.items()}
        return self._compare(read, allowed, limit)

    def expect_now(self, read: ReadFunction, *, limit: int = 16) -> list[Violation]:
        """Compare the running disk: each sector must be current. Returns violations as ``check`` does."""
        allowed = {s: list(h.current) for s, h in self._histories.items()}
        return self._compare(read, allowed, limit)

    def versions(self, offset: int) -> tuple[bytes, ...]:
        """Return what a crash may leave of the sector at ``offset``, oldest version first."""
        sector = offset // self.sector_bytes
        history = self._histories.get(sector)
        return tuple(value for _, value in history.versions) if history else (self._value(sector),)

    def current_content(self) -> bytes:
        """Return the newest content of the whole disk; after failures, one of those that may be."""
        content = bytearray(self._settled)
        for sector, history in self._histories.items():
            content[self._slice(sector)] = history.current[-1]
        return bytes(content)

    # Versions

    def _begin(self, offset: int, data: bytes, *, durable: bool, optional: bool) -> Operation:
        end = offset + len(data)
        if offset < 0 or end > len(self._settled):
            raise ValueError(f"the range {offset}..{end} is not on a disk of {len(self._settled)} bytes")
        self._issued += 1
        results: dict[int, list[bytes]] = {}
        first, past = offset // self.sector_bytes, -(-end // self.sector_bytes)
        for sector in range(first, past if data else first):
            history = self._histories.get(sector) or self._open(sector)
            before = history.current
            after = _distinct([self._overlay(sector, value, offset, data) for value in before])
            history.add(self._issued, after)
            history.current = _distinct(before + after)
            results[sector] = list(history.current) if optional else after
        return Operation(self, results, durable=durable)

    def _complete(self, results: dict[int, list[bytes]], *, durable: bool) -> None:
        for sector, current in results.items():
            history = self._histories.get(sector)
            if history is None:
                continue
            history.current = list(current)
            if durable:
                history.versions = [pair for pair in history.versions if pair[1] in current]
            self._settle(sector, history)

    def _open(self, sector: int) -> _History:
        value = self._value(sector)
        history = self._histories[sector] = _History([(0, value)], [value])
        return history

    def _settle(self, sector: int, history: _History) -> None:
        """Move a sector with one version left back to the flat buffer."""
        if len(history.versions) == 1:
            self._settled[self._slice(sector)] = history.versions[0][1]
            del self._histories[sector]

    def _overlay(self, sector: int, value: bytes, offset: int, data: bytes) -> bytes:
        start = sector * self.sector_bytes
        if offset <= start and start + self.sector_bytes <= offset + len(data):
            return data[start - offset : start - offset + self.sector_bytes]
        left = max(0, offset - start)
        part = data[max(0, start - offset) : start + self.sector_bytes - offset]
        return value[:left] + part + value[left + len(part) :]

    def _value(self, sector: int) -> bytes:
        return bytes(self._settled[self._slice(sector)])

    def _slice(self, sector: int) -> slice:
        return slice(sector * self.sector_bytes, (sector + 1) * self.sector_bytes)

    # Comparison

    def _compare(self, read: ReadFunction, allowed: dict[int, list[bytes]], limit: int) -> list[Violation]:
        violations: list[Violation] = []
        chunk_bytes = _CHUNK_BYTES - _CHUNK_BYTES % self.sector_bytes
        for offset in range(0, len(self._settled), chunk_bytes):
            length = min(chunk_bytes, len(self._settled) - offset)
            found = read(length, offset)
            if len(found) != length:
                raise ValueError(f"read {len(found)} bytes at {offset:#x} instead of {length}")
            violations += self._violations(offset, found, allowed)
            if len(violations) >= limit:
                break
        return violations[:limit]

    def _violations(self, offset: int, found: bytes, allowed: dict[int, list[bytes]]) -> list[Violation]:
        width = self.sector_bytes
        first, past = offset // width, (offset + len(found)) // width
        expected = self._settled[offset : offset + len(found)]
        violations = []
        for sector in (s for s in allowed if first <= s < past):
            here = slice(sector * width - offset, (sector + 1) * width - offset)
            expected[here] = found[here]
            if found[here] not in allowed[sector]:
                violations.append(Violation(sector * width, found[here], tuple(allowed[sector])))
        # Comparing the rest at one go keeps a judgement of a mostly quiet disk cheap.
        if expected != found:
            for start in range(0, len(found), width):
                here = slice(start, start + width)
                if expected[here] != found[here]:
                    violations.append(Violation(offset + start, found[here], (bytes(expected[here]),)))
        return sorted(violations, key=lambda violation: violation.offset)


def _distinct(values: list[bytes]) -> list[bytes]:
    return list(dict.fromkeys(values))
