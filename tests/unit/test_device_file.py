"""The file device: whole reads and writes, holes, publishing, and what it refuses."""

from __future__ import annotations

import errno
import multiprocessing
import os
import socket
import stat
import threading
from contextlib import closing
from pathlib import Path

import pytest

from jqcow.device import FileDevice, libc, names
from jqcow.device import file as file_module
from jqcow.device.names import NewFile
from jqcow.errors import ImageInUse, JqcowError, ReadOnlyError, UnsupportedFeatureError

BLOCK = 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(range(256)) * 4)
    return path


@pytest.fixture
def device(path: Path) -> FileDevice:
    return FileDevice.open(path, writable=True)


class TestReading:
    def test_what_lies_past_the_end_reads_as_zeros(self, device: FileDevice) -> None:
        assert device.pread(8, 1020) == bytes([252, 253, 254, 255, 0, 0, 0, 0])
        assert device.pread(8, 1 << 40) == bytes(8)
        buffer = bytearray(b"x" * 8)
        device.pread_into(memoryview(buffer), 1020)
        assert buffer == bytes([252, 253, 254, 255, 0, 0, 0, 0])

    def test_short_reads_are_continued(self, device: FileDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        pread, preadv = os.pread, os.preadv
        monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 3), offset))
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:5]], offset))
        assert device.pread(20, 10) == bytes(range(10, 30))
        assert device.pread(8, 1020) == bytes([252, 253, 254, 255, 0, 0, 0, 0])

    def test_a_failing_read_names_the_file(
        self, device: FileDevice, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "pread", raising(errno.EIO))
        with pytest.raises(OSError) as caught:
            device.pread(1, 0)
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))

    def test_threads_read_and_write_at_the_same_time(self, device: FileDevice) -> None:
        wrong: list[int] = []

        def work(number: int) -> None:
            block = bytes([number]) * BLOCK
            for _ in range(100):
                device.pwrite(block, number * BLOCK)
                if device.pread(BLOCK, number * BLOCK) != block:
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


class TestWriting:
    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_every_buffer_is_written(self, device: FileDevice, kind: type) -> None:
        device.pwrite(kind(b"hello"), 2000)
        assert device.size() == 2005
        assert device.pread(10, 1998) == b"\0\0hello\0\0\0"

    def test_nothing_is_nothing(self, device: FileDevice) -> None:
        device.pwrite(b"", 5000)
        assert device.size() == 1024

    def test_short_writes_are_continued(self, device: FileDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
        device.pwrite(b"abcdefghij", 4)
        assert device.pread(12, 3) == b"\3abcdefghij\16"

    def test_a_write_of_no_progress_is_an_error(
        self, device: FileDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "pwrite", lambda *_: 0)
        with pytest.raises(OSError) as caught:
            device.pwrite(b"x", 0)
        assert caught.value.errno == errno.EIO

    def test_a_full_disk_after_a_short_write_is_raised(
        self, device: FileDevice, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers = iter([3])

        def pwrite(*_: object) -> int:
            for answer in answers:
                return answer
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError) as caught:
            device.pwrite(b"abcdef", 0)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))

    def test_truncate_grows_with_zeros_and_cuts(self, device: FileDevice) -> None:
        device.truncate(10)
        device.truncate(20)
        assert device.pread(20, 0) == bytes(range(10)) + bytes(10)

    def test_a_barrier_syncs_and_its_failure_is_raised(
        self, device: FileDevice, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        device.barrier("test")
        monkeypatch.setattr(os, "fdatasync", raising(errno.EIO))
        with pytest.raises(OSError) as caught:
            device.barrier("test")
        assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))


class TestSpace:
    def test_allocate_grows_and_keeps_bytes(self, device: FileDevice, path: Path) -> None:
        device.allocate(512, 1 << 20)
        assert device.size() == 512 + (1 << 20)
        assert device.pread(1024, 0) == bytes(range(256)) * 4
        assert path.stat().st_blocks * 512 >= 1 << 20

    def test_allocate_inside_the_file_does_not_shrink_it(self, device: FileDevice) -> None:
        device.allocate(0, 16)
        assert device.size() == 1024

    def test_without_fallocate_it_only_grows(
        self, device: FileDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(libc, "call", raising(errno.EOPNOTSUPP))
        device.allocate(0, 16)
        assert device.size() == 1024
        device.allocate(1000, 4000)
        assert device.size() == 5000
        assert device.pread(1024, 0) == bytes(range(256)) * 4
        assert device.punch(0, 512) is False
        assert device.pread(2, 1) == b"\1\2"

    def test_an_interrupted_fallocate_is_repeated(
        self, device: FileDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failures = [errno.EINTR, errno.EINTR]
        call = libc.call

        def sometimes(name: str, *arguments: object) -> None:
            if failures:
                raise OSError(failures.pop(), "interrupted")
            call(name, *arguments)

        monkeypatch.setattr(libc, "call", sometimes)
        device.allocate(0, 1 << 16)
        assert device.size() == 1 << 16
        assert not failures

    def test_other_errors_are_raised(self, device: FileDevice, path: Path) -> None:
        with pytest.raises(OSError) as caught:
            device.punch(-BLOCK, BLOCK)
        assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(path))

    def test_punch_makes_a_hole_of_zeros(self, device: FileDevice) -> None:
        device.pwrite(b"x" * (8 * BLOCK), 0)
        device.barrier("test")
        assert device.punch(2 * BLOCK, 2 * BLOCK) is True
        assert device.size() == 8 * BLOCK
        assert device.pread(2 * BLOCK, 2 * BLOCK) == bytes(2 * BLOCK)
        assert list(device.data_extents(0, 8 * BLOCK)) == [(0, 2 * BLOCK), (4 * BLOCK, 4 * BLOCK)]

    def test_data_extents(self, device: FileDevice) -> None:
        device.truncate(0)
        device.pwrite(b"a" * BLOCK, 4 * BLOCK)
        device.pwrite(b"b" * (2 * BLOCK), 8 * BLOCK)
        device.truncate(64 * BLOCK)
        assert list(device.data_extents(0, 64 * BLOCK)) == [(4 * BLOCK, BLOCK), (8 * BLOCK, 2 * BLOCK)]
        assert list(device.data_extents(9 * BLOCK, 512)) == [(9 * BLOCK, 512)]
        assert list(device.data_extents(16 * BLOCK, 512)) == []
        assert list(device.data_extents(1 << 40, 512)) == []


class TestOpening:
    def test_a_read_only_device_refuses_every_change(self, path: Path) -> None:
        device = FileDevice.open(path, writable=False)
        assert device.read_only
        for change in changes(device):
            with pytest.raises(ReadOnlyError, match="for reading only"):
                change()
        assert path.read_bytes() == bytes(range(256)) * 4

    def test_the_descriptor_is_not_inherited(self, device: FileDevice) -> None:
        assert not os.get_inheritable(device._descriptor)

    def test_a_directory_is_refused_by_name(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedFeatureError, match="a directory"):
            FileDevice.open(tmp_path, writable=False)

    @pytest.mark.parametrize("writable", [False, True])
    def test_a_named_pipe_is_refused_at_once(self, tmp_path: Path, writable: bool) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UnsupportedFeatureError, match="a named pipe"):
            FileDevice.open(tmp_path / "pipe", writable=writable)

    def test_a_character_device_is_refused_by_name(self) -> None:
        with pytest.raises(UnsupportedFeatureError, match="a character device"):
            FileDevice.open("/dev/null", writable=True)

    def test_a_socket_cannot_be_opened(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "socket"))
            with pytest.raises(OSError):
                FileDevice.open(tmp_path / "socket", writable=False)

    def test_a_missing_file_is_the_kernels_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            FileDevice.open(tmp_path / "none", writable=True)

    def test_a_writer_cannot_share(self, path: Path) -> None:
        with pytest.raises(ValueError, match="share"):
            FileDevice.open(path, writable=True, share_writers=True)

    def test_another_platform_is_refused(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.platform", "plan9")
        with pytest.raises(UnsupportedFeatureError, match="plan9"):
            FileDevice.open(path, writable=False)
        with pytest.raises(UnsupportedFeatureError, match="plan9"):
            FileDevice.create_temporary(path)

    def test_a_file_replaced_before_the_lock_is_opened_again(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lock = file_module.locks.lock_for_reading
        replacements = [b"new"]

        def replaced_meanwhile(descriptor: int, name: str, *, share_writers: bool) -> None:
            if replacements:
                fresh = path.with_suffix(".fresh")
                fresh.write_bytes(replacements.pop())
                fresh.replace(path)
            lock(descriptor, name, share_writers=share_writers)

        monkeypatch.setattr(file_module.locks, "lock_for_reading", replaced_meanwhile)
        device = FileDevice.open(path, writable=False)
        assert device.pread(3, 0) == b"new"

    def test_forgetting_what_is_cached_changes_nothing(self, device: FileDevice) -> None:
        device.pwrite(b"new", 0)
        device.barrier("test")
        device.forget_cached()
        assert device.pread(4, 0) == b"new\3"

    def test_closing_twice_is_fine_and_using_it_then_is_an_error(self, device: FileDevice) -> None:
        device.close()
        device.close()
        with pytest.raises(OSError) as caught:
            device.pread(1, 0)
        assert caught.value.errno == errno.EBADF

    def test_a_child_after_fork_may_read_but_not_change(self, device: FileDevice, path: Path) -> None:
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()

        def child() -> None:
            refused = 0
            for change in changes(device):
                try:
                    change()
                except ReadOnlyError as error:
                    refused += "after fork" in str(error)
            queue.put((refused, device.pread(2, 1)))
            device.close()

        process = context.Process(target=child)
        process.start()
        assert queue.get() == (len(changes(device)), b"\1\2")
        process.join()
        # The child's close must not have dropped the parent's locks.
        with pytest.raises(ImageInUse):
            FileDevice.open(path, writable=True)


@pytest.fixture(params=["unnamed", "named"])
def _new_files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new files have no name at first, or a temporary one as where the host has no such files."""
    if request.param == "named":
        monkeypatch.setattr(names, "open_unnamed", lambda directory: None)


@pytest.mark.usefixtures("_new_files")
class TestPublishing:
    def test_the_file_appears_whole_under_its_final_name(self, tmp_path: Path) -> None:
        device = FileDevice.create_temporary(tmp_path / "new")
        assert not (tmp_path / "new").exists()
        device.pwrite(b"content", 0)
        device.publish(overwrite=False)
        assert os.listdir(tmp_path) == ["new"]
        assert device.path == str(tmp_path / "new")
        with pytest.raises(ImageInUse):
            FileDevice.open(tmp_path / "new", writable=False)
        device.close()
        assert (tmp_path / "new").read_bytes() == b"content"

    def test_an_existing_file_is_not_replaced(self, tmp_path: Path) -> None:
        device = FileDevice.create_temporary(tmp_path / "new")
        (tmp_path / "new").write_bytes(b"old")
        with pytest.raises(FileExistsError) as caught:
            device.publish(overwrite=False)
        assert caught.value.filename == str(tmp_path / "new")
        device.close()
        assert os.listdir(tmp_path) == ["new"]
        assert (tmp_path / "new").read_bytes() == b"old"

    def test_overwriting_replaces_it_and_keeps_its_permission_bits(self, path: Path) -> None:
        path.chmod(0o640)
        device = FileDevice.create_temporary(path)
        device.pwrite(b"content", 0)
        device.publish(overwrite=True)
        device.close()
        assert path.read_bytes() == b"content"
        assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def test_overwriting_keeps_extended_attributes(self, path: Path) -> None:
        os.setxattr(path, "user.jqcow", b"kept")
        with closing(FileDevice.create_temporary(path)) as device:
            device.publish(overwrite=True)
        assert os.getxattr(path, "user.jqcow") == b"kept"

    def test_attributes_that_the_host_denies_are_named(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        os.setxattr(path, "user.jqcow", b"lost")
        monkeypatch.setattr(os, "setxattr", raising(errno.EPERM))
        with closing(FileDevice.create_temporary(path)) as device:
            device.pwrite(b"content", 0)
            with pytest.warns(UserWarning, match=r"did not keep its user\.jqcow \(Operation not permitted\)"):
                device.publish(overwrite=True)
        assert path.read_bytes() == b"content"

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
    def test_overwriting_keeps_the_owner(self, path: Path) -> None:
        os.chown(path, 1234, 2345)
        path.chmod(0o2750)
        with closing(FileDevice.create_temporary(path)) as device:
            device.publish(overwrite=True)
        state = path.stat()
        assert (state.st_uid, state.st_gid, stat.S_IMODE(state.st_mode)) == (1234, 2345, 0o2750)

    @pytest.mark.parametrize("moment", ["before the lock", "before the renaming"])
    def test_a_file_that_another_one_replaced_meanwhile_is_left_alone(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        """The file under the name is another one by now, and in use."""
        users = []

        def replace_it() -> None:
            if not users:
                users.append(FileDevice.create_temporary(path.with_name("other")))
                users[0].pwrite(b"precious", 0)
                users[0].publish(overwrite=False)
                path.with_name("other").replace(path)

        hooked = (
            (names, "keep_attributes") if moment == "before the renaming" else (file_module, "_open_regular")
        )
        call = getattr(*hooked)

        def slow(*arguments: object, **named: object) -> object:
            result = call(*arguments, **named)
            replace_it()
            return result

        device = FileDevice.create_temporary(path)
        monkeypatch.setattr(*hooked, slow)
        with pytest.raises(ImageInUse):
            device.publish(overwrite=True)
        device.close()
        assert path.read_bytes() == b"precious"
        assert os.listdir(path.parent) == [path.name]
        users[0].close()

    def test_a_file_that_goes_meanwhile_is_no_obstacle(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = file_module._open_regular

        def remove_it(name: str, *, writable: bool) -> int:
            os.unlink(name)
            return opened(name, writable=writable)

        device = FileDevice.create_temporary(path)
        device.pwrite(b"content", 0)
        monkeypatch.setattr(file_module, "_open_regular", remove_it)
        device.publish(overwrite=True)
        device.close()
        assert path.read_bytes() == b"content"

    @pytest.mark.parametrize("writable", [False, True])
    def test_a_file_in_use_is_not_overwritten(self, path: Path, writable: bool) -> None:
        user = FileDevice.open(path, writable=writable)
        device = FileDevice.create_temporary(path)
        with pytest.raises(ImageInUse):
            device.publish(overwrite=True)
        device.close()
        assert os.listdir(path.parent) == [path.name]
        assert user.pread(2, 1) == b"\1\2"

    def test_a_special_file_is_not_overwritten(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        device = FileDevice.create_temporary(tmp_path / "pipe")
        with pytest.raises(UnsupportedFeatureError, match="named pipe"):
            device.publish(overwrite=True)
        device.close()
        assert os.listdir(tmp_path) == ["pipe"]

    def test_a_link_to_the_final_file_stays_a_link(self, path: Path) -> None:
        link = path.with_name("link")
        link.symlink_to(path)
        device = FileDevice.create_temporary(link)
        device.pwrite(b"content", 0)
        device.publish(overwrite=True)
        assert link.is_symlink()
        assert path.read_bytes() == b"content"

    def test_an_unpublished_file_goes_with_its_device(self, tmp_path: Path) -> None:
        device = FileDevice.create_temporary(tmp_path / "new")
        assert not (tmp_path / "new").exists()
        device.close()
        assert os.listdir(tmp_path) == []

    def test_it_is_published_only_once(self, tmp_path: Path, device: FileDevice) -> None:
        with pytest.raises(ValueError, match="already published"):
            device.publish(overwrite=True)

    def test_without_exclusive_renaming_a_hard_link_serves(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(names, "open_unnamed", lambda directory: None)
        monkeypatch.setattr(libc, "call", raising(errno.EINVAL))
        device = FileDevice.create_temporary(tmp_path / "new")
        device.publish(overwrite=False)
        second = FileDevice.create_temporary(tmp_path / "new")
        with pytest.raises(FileExistsError):
            second.publish(overwrite=False)
        second.close()
        assert os.listdir(tmp_path) == ["new"]

    def test_everything_is_durable_before_the_name_and_the_name_at_the_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[str] = []
        fsync, name_it = os.fsync, NewFile._take_free_name

        def note_fsync(descriptor: int) -> None:
            is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            calls.append("directory" if is_directory else "file")
            fsync(descriptor)

        def note_name(new: NewFile) -> bool:
            calls.append("name")
            return name_it(new)

        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(NewFile, "_take_free_name", note_name)
        for _ in range(2):
            with closing(FileDevice.create_temporary(tmp_path / "new")) as device:
                device.publish(overwrite=True)
        # What it takes over from the file that it replaces is durable, too.
        assert calls == ["file", "name", "directory", "file", "name", "file", "directory"]

    def test_a_failed_sync_leaves_the_old_file(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        device = FileDevice.create_temporary(path)
        monkeypatch.setattr(os, "fsync", raising(errno.EIO))
        with pytest.raises(OSError):
            device.publish(overwrite=True)
        device.close()
        assert os.listdir(path.parent) == [path.name]
        assert path.read_bytes() == bytes(range(256)) * 4

    def test_a_long_name_is_no_obstacle(self, tmp_path: Path) -> None:
        name = "\N{OX}" * 63
        FileDevice.create_temporary(tmp_path / name).publish(overwrite=False)
        assert os.listdir(tmp_path) == [name]


def test_a_new_file_has_no_name_where_the_host_can_do_that(tmp_path: Path) -> None:
    with closing(FileDevice.create_temporary(tmp_path / "new")):
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EISDIR])
def test_elsewhere_it_has_a_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    open_file = os.open

    def open_named(name: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(code, os.strerror(code))
        return open_file(name, flags, mode)

    monkeypatch.setattr(os, "open", open_named)
    with closing(FileDevice.create_temporary(tmp_path / "new")):
        (name,) = os.listdir(tmp_path)
        assert name.startswith(".new.")


def test_refusals_are_errors_of_jqcow() -> None:
    assert issubclass(ImageInUse, JqcowError)
    assert issubclass(ReadOnlyError, OSError)


def raising(code: int):  # type: ignore[no-untyped-def]
    """Return a function that fails with this errno, whatever its arguments."""

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def changes(device: FileDevice):  # type: ignore[no-untyped-def]
    """Return every changing call of a device, ready to be made."""
    return [
        lambda: device.pwrite(b"x", 0),
        lambda: device.truncate(0),
        lambda: device.allocate(0, BLOCK),
        lambda: device.punch(0, 512),
        lambda: device.barrier("test"),
        lambda: device.publish(overwrite=True),
    ]
