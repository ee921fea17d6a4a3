"""The recorder on logs of its own making: what it understands, and what it refuses to overlook."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jqcow.testing import enumerate_states
from tests.outside.recorder import (
    Allocated,
    BarrierBegun,
    BarrierEnded,
    CallFailed,
    Event,
    Message,
    Punched,
    RecordedDevice,
    RecordingError,
    Resized,
    Written,
    parse,
    parse_log,
    record,
)
from tests.outside.sessions import environment

IMAGE = Path("/images/disk.qcow2")


def printed(text: str) -> str:
    """Return a string as strace prints it, without the quotes."""
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


FD = f"3<{printed(str(IMAGE))}>"
NAME = f'"{printed(str(IMAGE))}"'
TEMPORARY = printed("/images/.disk.qcow2.0123abcd.partial")
UNNAMED = printed("/images/#1234 (deleted)")


def events_of(*lines: str) -> list[Event]:
    """Return the events of a log; each line without its process id is of process 10."""
    numbered = [line if line[:1].isdigit() else f"10    {line}" for line in lines]
    return parse(numbered, IMAGE).events


@pytest.mark.parametrize(
    ("line", "event"),
    [
        (f'pwrite64({FD}, "\\x61\\x62", 2, 512) = 2', Written(512, b"ab")),
        (f'pwrite64({FD}, "\\x61\\x62", 2, 512) = 1', Written(512, b"a")),
        (f'pwritev({FD}, [{{iov_base="\\x61", iov_len=1}}, {{iov_base="\\x62", iov_len=1}}], 2, 0) = 2',
         Written(0, b"ab")),
        (f"ftruncate({FD}, 4096) = 0", Resized(4096)),
        (f"fallocate({FD}, 0, 512, 1024) = 0", Allocated(512, 1024)),
        (f"fallocate({FD}, FALLOC_FL_KEEP_SIZE|FALLOC_FL_PUNCH_HOLE, 512, 1024) = 0", Punched(512, 1024)),
        (f'pwrite64({FD}, "\\x61", 1, 0) = -1 ENOSPC (No space left on device)',
         CallFailed("pwrite64", "ENOSPC")),
        (f"fallocate({FD}, 0, 0, 1) = -1 ENOSPC (No space left on device) (INJECTED)",
         CallFailed("fallocate", "ENOSPC")),
        ('write(1<pipe:[7]>, "\\x7b\\x7d\\x0a", 3) = 3', Message({})),
        (f'pwrite64(4<{TEMPORARY}>, "\\x61", 1, 0) = 1', Written(0, b"a")),
        (f'pwrite64(4<{UNNAMED}>, "\\x61", 1, 0) = 1', Written(0, b"a")),
    ],
)  # fmt: skip
def test_a_call_becomes_an_event(line: str, event: Event) -> None:
    assert events_of(line) == [event]


@pytest.mark.parametrize(
    "line",
    [
        f"fstat({FD}, {{st_size=0}}) = 0",
        f"fcntl({FD}, F_OFD_SETLK, {{l_type=F_RDLCK, l_whence=SEEK_SET, l_start=100, l_len=1}}) = 0",
        f"openat(AT_FDCWD</>, {NAME}, O_RDWR|O_CLOEXEC) = {FD}",
        f'renameat2(AT_FDCWD</>, "{TEMPORARY}", AT_FDCWD</>, {NAME}, RENAME_NOREPLACE) = 0',
        f'linkat(AT_FDCWD</>, "\\x2f", AT_FDCWD</>, {NAME}, AT_SYMLINK_FOLLOW) = 0',
        'pwrite64(4</other>, "\\x61", 1, 0) = 1',
        "mmap(NULL, 4096, PROT_READ, MAP_SHARED, 4</other>, 0) = 0x7f0000000000",
        "+++ exited with 0 +++",
        "--- SIGCHLD {si_signo=SIGCHLD} ---",
        "exit_group(0) = ?",
    ],
)
def test_what_does_not_matter_is_no_event(line: str) -> None:
    assert events_of(line) == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (f"mmap(NULL, 4096, PROT_WRITE, MAP_SHARED, {FD}, 0) = 0x7f0000000000", "mmap"),
        (f"openat(AT_FDCWD</>, {NAME}, O_RDWR|O_DSYNC) = {FD}", "O_DSYNC"),
        (f"openat(AT_FDCWD</>, {NAME}, O_RDWR|O_TRUNC) = {FD}", "O_TRUNC"),
        (f'openat(AT_FDCWD</>, "\\x78", O_RDWR|O_DIRECT) = {FD}', "O_DIRECT"),
        (f"copy_file_range(4</other>, NULL, {FD}, NULL, 512, 0) = 512", "copy_file_range"),
        (f'write({FD}, "\\x61", 1) = 1', "write"),
        (f"dup({FD}) = 5<{printed(str(IMAGE))}>", "dup"),
        (f"fcntl({FD}, F_SETFL, O_RDWR|O_APPEND) = 0", "F_SETFL"),
        (f"sync_file_range({FD}, 0, 0, 0) = 0", "sync_file_range"),
        (f"fallocate({FD}, FALLOC_FL_ZERO_RANGE, 0, 512) = 0", "FALLOC_FL_ZERO_RANGE"),
        (f'pwritev2({FD}, [{{iov_base="\\x61", iov_len=1}}], 1, 0, RWF_DSYNC) = 1', "RWF_DSYNC"),
        (f'pwrite64({FD}, "\\x61"..., 4096, 0) = 4096', "not a whole string"),
        (f"unlink({NAME}) = 0", "unlink"),
        ("io_uring_setup(8, {}) = 4", "io_uring_setup"),
        ('truncate("\\x78", 0) = 0', "truncate"),
        ("clone(child_stack=NULL, flags=CLONE_CHILD_CLEARTID|SIGCHLD) = 11", "another process"),
        ("no system call", "not understood"),
    ],
)
def test_nothing_escapes(line: str, why: str) -> None:
    with pytest.raises(RecordingError, match=why):
        events_of(line)


def test_a_barrier_covers_what_returned_before_it_began() -> None:
    events = events_of(
        f'10 pwrite64({FD}, "\\x61", 1, 0) = 1',
        f"10 fdatasync({FD} <unfinished ...>",
        f'11 pwrite64({FD}, "\\x62", 1, 512 <unfinished ...>',
        "11 <... pwrite64 resumed>) = 1",
        "10 <... fdatasync resumed>) = 0",
    )
    device = RecordedDevice()
    for event in events:
        device.take(event)
    assert device.content() == b"a" + bytes(511) + b"b"
    assert device.durable_content() == b"a"
    contents = {state.content() for state in enumerate_states(device, budget=50)}
    assert contents == {b"a", b"a" + bytes(512), b"a" + bytes(511) + b"b"}
    device.take(BarrierBegun(9))
    device.take(BarrierEnded(9, "fdatasync", failed=True))
    assert device.durable_content() == b"a"
    device.take(BarrierBegun(10))
    device.take(BarrierEnded(10, "fdatasync", failed=False))
    assert device.durable_content() == device.content()


def test_barriers_that_overlap_cover_what_came_before_each() -> None:
    device = RecordedDevice()
    device.take(Written(0, b"a"))
    device.take(BarrierBegun(1))
    device.take(Written(1, b"b"))
    device.take(BarrierBegun(2))
    device.take(Written(2, b"c"))
    device.take(BarrierEnded(2, "fdatasync", failed=False))
    assert device.durable_content() == b"ab"
    device.take(BarrierEnded(1, "fdatasync", failed=False))
    assert device.durable_content() == b"ab"
    assert device.content() == b"abc"


def overlapping(second_offset: int) -> list[Event]:
    """Return the events of two writes of one byte that overlap in time, the first of them at offset 0."""
    return events_of(
        f'10 pwrite64({FD}, "\\x61", 1, 0 <unfinished ...>',
        f'11 pwrite64({FD}, "\\x62", 1, {second_offset}) = 1',
        "10 <... pwrite64 resumed>) = 1",
    )


def test_changes_of_the_same_bytes_that_overlap_in_time_are_refused() -> None:
    with pytest.raises(RecordingError, match="overlaps"):
        overlapping(0)


def test_changes_of_other_bytes_may_overlap_in_time() -> None:
    assert overlapping(1) == [Written(1, b"b"), Written(0, b"a")]


WRITE = 'os.pwrite(fd, b"abc", 5)'


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        (WRITE, None),
        ("import mmap; mmap.mmap(fd, 8)[0:1] = b'x'", "mmap|F_DUPFD"),
        ("os.dup(fd)", "fcntl|dup"),
        ("open(path, 'r+b').write(b'x')", "a call of an unknown kind"),
        ("os.truncate(path, 4)", "truncate"),
        ("os.sendfile(fd, other, 0, 8)", "sendfile|unknown kind"),
        ("import subprocess; subprocess.run(['true'])", "fork|another"),
    ],
)
def test_a_real_process_cannot_hide(tmp_path: Path, statement: str, why: str | None) -> None:
    image, other = tmp_path / "disk.qcow2", tmp_path / "other"
    image.write_bytes(bytes(8))
    other.write_bytes(b"y" * 8)
    program = (
        f"import os; path = {str(image)!r}; fd = os.open(path, os.O_RDWR); "
        f"other = os.open({str(other)!r}, os.O_RDONLY); {statement}"
    )
    log = tmp_path / "log"
    assert record([sys.executable, "-c", program], log, environment=environment()) == 0
    if why is None:
        assert parse_log(log, image).events == [Written(5, b"abc")]
        return
    with pytest.raises(RecordingError, match=why):
        parse_log(log, image)


def test_a_link_in_the_path_does_not_hide_the_file(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    image.write_bytes(bytes(8))
    (tmp_path / "link").symlink_to(image)
    log = tmp_path / "log"
    program = f"import os; os.pwrite(os.open({str(tmp_path / 'link')!r}, os.O_RDWR), b'z', 0)"
    record([sys.executable, "-c", program], log, environment=environment())
    assert parse_log(log, image).events == [Written(0, b"z")]
