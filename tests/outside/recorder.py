"""What a real process did to one file, seen from outside: its system calls, as strace saw them.

`record` runs a command under strace. `parse` turns the log into events on one file: changes, barriers, and
the *messages* that the process wrote to its standard output, all in one order. A `RecordedDevice` takes the
changes in again, so that a laboratory can crash the real process between its real barriers.

Nothing may escape. A call that names the file, or a descriptor of it, and is of no known kind is an error;
so are a mapping of the file into memory, synchronous or direct opening, asynchronous I/O, and a second
process.

    C1. A change counts from its return; a barrier covers the changes that returned before it began.
    C2. Two changes that overlap in time change other bytes: their order, which is not known, does not matter.
    C3. The log holds every string whole.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jqcow.testing import SimulatedDevice

LONGEST_STRING_BYTES = 1 << 22
"""A call with more bytes than this would be cut short in the log; `parse` refuses such a log."""

# What the file's content does not depend on: it is seen from outside by its changes alone.
_UNTRACED = "read,pread64,preadv,preadv2"

_OPENING = {"open", "openat", "openat2", "creat"}
_WRITING = {"pwrite64", "pwritev", "pwritev2"}
_CHANGING = {*_WRITING, "ftruncate", "fallocate"}
_BARRIERS = {"fsync", "fdatasync"}
_NAMING = {"linkat", "rename", "renameat", "renameat2"}
_HARMLESS = {
    "access", "close", "faccessat2", "fadvise64", "fchmod", "fstat", "lseek", "lstat", "newfstatat",
    "readlink", "readlinkat", "stat", "statfs", "fstatfs", "statx",
}  # fmt: skip
_HARMLESS_FCNTL = {"F_GETFD", "F_GETFL", "F_OFD_GETLK", "F_OFD_SETLK", "F_SETFD"}
_FORBIDDEN_FLAGS = {"O_SYNC", "O_DSYNC", "O_DIRECT", "O_TRUNC", "O_APPEND"}
# These reach a file without naming it in the call.
_FORBIDDEN_ANYWHERE = {
    "fork", "io_setup", "io_submit", "io_uring_enter", "io_uring_setup", "truncate", "vfork",
}  # fmt: skip

_LINE = re.compile(r"(?P<pid>\d+) +(?P<rest>.*)", re.DOTALL)
_RESUMED = re.compile(r"<\.\.\. (?P<name>\w+) resumed>(?P<rest>.*)", re.DOTALL)
_CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>-?\w+|\?)(?P<rest>.*)", re.DOTALL)
_ERROR = re.compile(r" (?P<errno>E[A-Z0-9]+) ")
_TOKEN = re.compile(r'"[^"]*"(?:\.\.\.)?|<[^<>]*>|[\[({]|[\])}]|,|[^"<\[\](){},]+|[<>]')
_HEX_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_UNFINISHED = " <unfinished ...>"


class RecordingError(AssertionError):
    """The recording shows what the recorder does not know, or what must never be done to the file."""


# Events


@dataclass(frozen=True, slots=True)
class Written:
    """``data`` was written at ``offset``."""

    offset: int
    data: bytes

    def apply(self, device: SimulatedDevice) -> None:
        """Do the same to ``device``."""
        device.pwrite(self.data, self.offset)


@dataclass(frozen=True, slots=True)
class Punched:
    """A range was given back to the host."""

    offset: int
    length: int

    def apply(self, device: SimulatedDevice) -> None:
        """Do the same to ``device``."""
        device.punch(self.offset, self.length)


@dataclass(frozen=True, slots=True)
class Allocated:
    """Host space was reserved for a range."""

    offset: int
    length: int

    def apply(self, device: SimulatedDevice) -> None:
        """Do the same to ``device``."""
        device.allocate(self.offset, self.length)


@dataclass(frozen=True, slots=True)
class Resized:
    """The length was set."""

    size_bytes: int

    def apply(self, device: SimulatedDevice) -> None:
        """Do the same to ``device``."""
        device.truncate(self.size_bytes)


@dataclass(frozen=True, slots=True)
class BarrierBegun:
    """A barrier began; what returned before it is covered. ``number`` is its name until it ends."""

    number: int


@dataclass(frozen=True, slots=True)
class BarrierEnded:
    """A barrier returned. If ``failed`` it made nothing durable."""

    number: int
    call: str
    failed: bool


@dataclass(frozen=True, slots=True)
class CallFailed:
    """A change that the kernel refused; it did nothing. A ``fallocate`` that punches is called ``punch``."""

    call: str
    errno: str


@dataclass(frozen=True, slots=True)
class Message:
    """A line of JSON that the process wrote to its standard output."""

    content: dict[str, Any]


Change = Written | Punched | Allocated | Resized
Event = Change | BarrierBegun | BarrierEnded | CallFailed | Message


@dataclass
class Recording:
    """The events of one process on one file, in order, and how many calls of each kind touched the file."""

    events: list[Event] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)


# Recording


def record(
    command: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    inject: str | None = None,
    timeout_seconds: float = 120,
) -> int:
    """Run a command under strace and return its exit status; the log goes to ``log``.

    ``inject`` is strace's: ``fdatasync:error=EIO:when=3`` makes the third ``fdatasync`` of each thread fail
    without being done.
    """
    options = ["-f", "-y", "-v", "-xx", "-s", str(LONGEST_STRING_BYTES), "-e", f"trace=!{_UNTRACED}"]
    if inject is not None:
        options += ["-e", f"inject={inject}"]
    done = subprocess.run(
        ["strace", *options, "-o", str(log), "--", *command],
        env=None if environment is None else dict(environment),
        stdout=subprocess.DEVNULL,
        timeout=timeout_seconds,
        check=False,
    )
    return done.returncode


# Parsing


def _hex(text: str) -> str:
    """Return a string as strace prints it."""
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def _bytes_of(token: str) -> bytes:
    """Return the bytes of a printed string.

    Raises:
        RecordingError: strace printed a part of it, or no string at all.
    """
    found = _HEX_STRING.fullmatch(token)
    if found is None or found[2]:
        raise RecordingError(f"not a whole string: {token[:60]}")
    return bytes.fromhex(found[1].replace("\\x", ""))


def _split(arguments: str) -> list[str]:
    """Split the arguments of a call at its commas, not at those inside brackets."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(arguments):
        if token == "," and not depth:
            parts.append("")
            continue
        depth += (token in "[({") - (token in "])}")
        parts[-1] += token
    return [part.strip() for part in parts]


@dataclass(frozen=True)
class _Call:
    """One system call. ``text`` is all of it, its result included."""

    name: str
    arguments: str
    result: int
    errno: str | None
    text: str


@dataclass(frozen=True)
class _Begun:
    """A call was seen to begin; ``text`` is what was printed of it so far."""

    pid: int
    text: str

    @property
    def name(self) -> str:
        """The name of the call."""
        return self.text.partition("(")[0]


def _complete(text: str) -> _Call | None:
    """Parse a complete call; None for one that never returned."""
    found = _CALL.fullmatch(text)
    if found is None:
        raise RecordingError(f"a line of the log is not understood: {text[:200]}")
    if found["result"] == "?":
        return None
    error = _ERROR.match(found["rest"]) if found["result"] == "-1" else None
    return _Call(
        found["name"], found["arguments"], int(found["result"], 0), error["errno"] if error else None, text
    )


def _calls(lines: Iterable[str]) -> Iterator[_Begun | tuple[_Begun, _Call | None]]:
    """Yield the beginning of each call, and later the call with its result (None: it never returned)."""
    open_calls: dict[int, _Begun] = {}
    for line in lines:
        found = _LINE.fullmatch(line.rstrip("\n"))
        if found is None:
            raise RecordingError(f"a line of the log is not understood: {line[:200]}")
        pid, rest = int(found["pid"]), found["rest"]
        if rest.startswith(("+++ ", "--- ")):
            continue
        resumed = _RESUMED.fullmatch(rest)
        if resumed is None:
            begun = _Begun(pid, rest.removesuffix(_UNFINISHED))
            yield begun
            if rest.endswith(_UNFINISHED):
                open_calls[pid] = begun
                continue
            yield begun, _complete(rest)
        else:
            begun = open_calls.pop(pid)
            yield begun, _complete(begun.text + resumed["rest"])


class _Reader:
    """Reads a log call by call and writes down the events on one file."""

    def __init__(self, path: Path) -> None:
        published = re.escape(_hex(str(path)))
        # A new image has no name until it is published, as the kernel shows it, or a temporary one.
        unnamed = rf"{re.escape(_hex(f'{path.parent}/#'))}(?:\\x3[0-9])+"
        partial = (
            rf"{re.escape(_hex(f'{path.parent}/.{path.name}.'))}(?:\\x..){{8}}{re.escape(_hex('.partial'))}"
        )
        removed = re.escape(_hex(" (deleted)"))
        self._name = re.compile(rf'(?<=["<])(?:{published}|{partial}|{unnamed})(?:{removed})?(?=[">])')
        self._recording = Recording()
        self._barriers: dict[int, int] = {}
        self._running_changes: dict[int, list[Change]] = {}
        """By thread, the changes that ended while the thread's own change was running."""
        self._executed = False

    def read(self, lines: Iterable[str]) -> Recording:
        """Return the events of a whole log."""
        for item in _calls(lines):
            if isinstance(item, _Begun):
                self._begin(item)
            else:
                begun, call = item
                self._end(begun, call)
        if self._running_changes:
            raise RecordingError("the process ended inside a change")
        return self._recording

    def _touches(self, text: str) -> bool:
        return self._name.search(text) is not None

    def _begin(self, begun: _Begun) -> None:
        if begun.name in _FORBIDDEN_ANYWHERE:
            raise RecordingError(f"{begun.name} could reach the file unseen")
        if not self._touches(begun.text):
            return
        if begun.name in _BARRIERS:
            number = len(self._recording.events)
            self._barriers[begun.pid] = number
            self._recording.events.append(BarrierBegun(number))
        elif begun.name in _CHANGING:
            self._running_changes[begun.pid] = []

    def _end(self, begun: _Begun, call: _Call | None) -> None:
        if call is None:
            # Only the end of the process keeps a call from returning.
            if self._touches(begun.text) and begun.name not in _BARRIERS:
                raise RecordingError(f"{begun.name} never returned")
            return
        self._check_process(call)
        if call.name == "write" and call.arguments.startswith("1<"):
            self._take_message(call)
        elif self._touches(call.text) and call.name != "execve":
            self._recording.calls[call.name] += 1
            self._take(begun.pid, call)

    def _check_process(self, call: _Call) -> None:
        if call.name in ("clone", "clone3") and "CLONE_THREAD" not in call.arguments:
            raise RecordingError("the process made another process")
        if call.name == "execve" and call.result == 0:
            if self._executed:
                raise RecordingError("the process became another program")
            self._executed = True

    def _take_message(self, call: _Call) -> None:
        data = _bytes_of(_split(call.arguments)[1])
        if call.result != len(data):
            raise RecordingError("a message was cut short")
        for line in data.decode().splitlines():
            self._recording.events.append(Message(json.loads(line)))

    def _take(self, pid: int, call: _Call) -> None:
        """Write down a call that touches the file."""
        if call.name in _CHANGING:
            beside = self._running_changes.pop(pid)
            if call.errno is None:
                change = _change(call)
                if any(_meet(change, other) for other in beside):
                    raise RecordingError(f"{call.name} overlaps another change of the same bytes (C2)")
                for others in self._running_changes.values():
                    others.append(change)
                self._recording.events.append(change)
            else:
                kind = "punch" if "FALLOC_FL_PUNCH_HOLE" in call.arguments else call.name
                self._recording.events.append(CallFailed(kind, call.errno))
        elif call.name in _BARRIERS:
            ended = BarrierEnded(self._barriers.pop(pid), call.name, failed=call.errno is not None)
            self._recording.events.append(ended)
        else:
            _check_harmless(call)


def _meet(one: Change, other: Change) -> bool:
    """Return True if the order of two changes matters: same bytes, or one cuts the other off."""
    (start, end), (other_start, other_end) = _range(one), _range(other)
    return start < other_end and other_start < end


def _range(change: Change) -> tuple[int, float]:
    if isinstance(change, Resized):
        return change.size_bytes, math.inf
    length = len(change.data) if isinstance(change, Written) else change.length
    return change.offset, change.offset + length


def _change(call: _Call) -> Change:
    """Return what a successful call changed."""
    arguments = _split(call.arguments)
    if call.name == "ftruncate":
        return Resized(int(arguments[1]))
    if call.name == "fallocate":
        offset, length = int(arguments[2]), int(arguments[3])
        modes = set(arguments[1].split("|"))
        if modes == {"0"}:
            return Allocated(offset, length)
        if modes == {"FALLOC_FL_KEEP_SIZE", "FALLOC_FL_PUNCH_HOLE"}:
            return Punched(offset, length)
        raise RecordingError(f"fallocate with an unknown mode: {arguments[1]}")
    if call.name == "pwrite64":
        data = _bytes_of(arguments[1])
    else:
        if call.name == "pwritev2" and arguments[-1] != "0":
            raise RecordingError(f"pwritev2 with the flags {arguments[-1]}")
        data = b"".join(_bytes_of(string[0]) for string in _HEX_STRING.finditer(arguments[1]))
    # A short write wrote its first part.
    return Written(int(arguments[3]), data[: call.result])


def _check_harmless(call: _Call) -> None:
    """Raise RecordingError unless the call leaves the file's content and its order alone."""
    arguments = _split(call.arguments)
    if call.name in _OPENING:
        flags = _FORBIDDEN_FLAGS & set(re.findall(r"O_[A-Z]+", call.arguments))
        if flags:
            raise RecordingError(f"the file is opened with {', '.join(sorted(flags))}")
    elif call.name == "fcntl":
        if arguments[1] not in _HARMLESS_FCNTL:
            raise RecordingError(f"fcntl of an unknown kind: {arguments[1]}")
    elif call.name not in _HARMLESS and call.name not in _NAMING:
        raise RecordingError(f"a call of an unknown kind touches the file: {call.text[:200]}")


def parse(lines: Iterable[str], path: Path) -> Recording:
    """Return what a log of strace, taken as `record` takes it, says about the file ``path`` (absolute).

    Raises:
        RecordingError: something is unknown, or forbidden, or not whole.
    """
    return _Reader(path).read(lines)


def parse_log(log: Path, path: Path) -> Recording:
    """Return what the log file ``log`` says about the file ``path``; errors as `parse`."""
    with log.open(encoding="ascii") as lines:
        return parse(lines, path)


# Replaying


class RecordedDevice(SimulatedDevice):
    """A simulated device whose barriers take time: what changes after one began is not covered (C1)."""

    def __init__(self, initial: bytes = b"") -> None:
        super().__init__(initial, name="recorded")
        self._begun: dict[int, tuple[int, int]] = {}
        self._covered: tuple[int, int] | None = None

    def take(self, event: Event, *, label: str = "") -> None:
        """Do what a recorded process did. ``label`` goes before the name of a barrier."""
        match event:
            case BarrierBegun(number):
                self._begun[number] = self._generation, self._last_change
            case BarrierEnded(number, call, failed):
                self._end_barrier(number, f"{label} {call}".strip(), failed)
            case Message() | CallFailed():
                pass
            case _:
                event.apply(self)

    def _end_barrier(self, number: int, name: str, failed: bool) -> None:
        self._covered = self._begun.pop(number)
        dropped = set(self.drop_barriers)
        if failed:
            # What was in flight still is: a crash may have any of it, as after a kernel that dropped it.
            self.drop_barriers = dropped | {name}
        try:
            self.barrier(name)
        finally:
            self.drop_barriers = dropped
            self._covered = None

    def _make_durable(self, covered: tuple[int, int]) -> None:
        """Make durable what was there when the barrier began; what came later stays in flight."""
        super()._make_durable(self._covered or covered)
