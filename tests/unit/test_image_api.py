"""The public image: arguments, states, buffers, errors."""

from __future__ import annotations

import array
import errno
import gc
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import jqcow
from jqcow.testing import Fault, FaultPlan, SimulatedDevice

SIZE = 1 << 20
CLUSTER = 4096
JOURNAL = 64 << 10


@pytest.fixture
def image(device: SimulatedDevice) -> Iterator[jqcow.Image]:
    with jqcow.create_on_device(device, SIZE, cluster_size=CLUSTER, journal_size=JOURNAL) as image:
        yield image


Request = Callable[[jqcow.Image], object]
READS: dict[str, Request] = {
    "pread": lambda image: image.pread(1, 0),
    "pread_into": lambda image: image.pread_into(bytearray(1), 0),
    "info": lambda image: image.info(),
    "check": lambda image: image.check(),
    "extents": lambda image: list(image.extents(1, 0)),
    "as_file": lambda image: image.as_file(),
}
CHANGES: dict[str, Request] = {
    "pwrite": lambda image: image.pwrite(b"x", 0),
    "empty pwrite": lambda image: image.pwrite(b"", 0),
    "write_zeroes": lambda image: image.write_zeroes(1, 0),
    "discard": lambda image: image.discard(1, 0),
    "resize": lambda image: image.resize(SIZE),
    "checkpoint": lambda image: image.checkpoint(),
}


class TestCreate:
    @pytest.mark.parametrize("size", [0, 512, 1536, SIZE, 8 << 40])
    @pytest.mark.parametrize("cluster_size", [512, 65536, 2 << 20])
    def test_any_size_that_tables_can_map(self, tmp_path: Path, size: int, cluster_size: int) -> None:
        path = tmp_path / "image.qcow2"
        if size > 1 << 40 and cluster_size == 512:
            with pytest.raises(ValueError, match="needs larger clusters"):
                jqcow.create(path, size, cluster_size=cluster_size)
            assert not list(tmp_path.iterdir())
            return
        with jqcow.create(path, size, cluster_size=cluster_size) as image:
            assert (image.size, image.mode, image.closed) == (size, "r+", False)
            assert image.info().cluster_size == cluster_size
            assert image.recovered is None
            assert image.check().ok
        assert image.closed

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"size": -512}, "multiple of 512"),
            ({"size": 513}, "multiple of 512"),
            ({"cluster_size": 0}, "power of two"),
            ({"cluster_size": -4096}, "power of two"),
            ({"cluster_size": 5000}, "power of two"),
            ({"cluster_size": 256}, "from 512 to 2 MiB"),
            ({"cluster_size": 4 << 20}, "from 512 to 2 MiB"),
            ({"journal_size": 0}, "multiple of 8192"),
            ({"journal_size": 65536 + 4096}, "multiple of 8192"),
            ({"journal_size": 2 << 30}, "multiple of 8192"),
        ],
    )
    def test_wrong_arguments_leave_nothing(
        self, tmp_path: Path, arguments: dict[str, int], words: str
    ) -> None:
        with pytest.raises(ValueError, match=words):
            jqcow.create(tmp_path / "image.qcow2", **{"size": SIZE, **arguments})  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())

    def test_existing_file_is_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "image.qcow2"
        path.write_bytes(b"precious")
        with pytest.raises(FileExistsError):
            jqcow.create(path, SIZE)
        assert path.read_bytes() == b"precious"
        jqcow.create(path, SIZE, overwrite=True).close()
        assert jqcow.open(path).size == SIZE

    def test_image_in_use_is_not_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "image.qcow2"
        with jqcow.create(path, SIZE) as image, pytest.raises(jqcow.ImageInUse):
            image.pwrite(b"precious", 0)
            jqcow.create(path, SIZE, overwrite=True)
        assert jqcow.open(path).pread(8, 0) == b"precious"


class TestOpen:
    @pytest.mark.parametrize("mode", ["w", "rb", "r+b", "", "rw"])
    def test_other_modes_are_refused(self, tmp_path: Path, mode: str) -> None:
        with pytest.raises(ValueError, match="mode must be"):
            jqcow.open(tmp_path / "image.qcow2", mode)  # type: ignore[arg-type]

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            jqcow.open(tmp_path / "image.qcow2")

    @pytest.mark.parametrize(
        "content", [b"", b"QFI", b"QFI\xfb", bytes(1 << 16), b"QFI\xfb\0\0\0\x09" + bytes(600)]
    )
    def test_other_files_are_no_images(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(jqcow.FormatError) as caught:
            jqcow.open(path)
        assert isinstance(caught.value, ValueError)
        assert path.read_bytes() == content

    def test_journal_size_of_a_clean_image(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        image.close()
        device.reopen()
        with jqcow.open_device(device, "r+", journal_size=256 << 10) as image:
            image.pwrite(b"x", 0)
            journal = image.info().journal
            assert journal is not None and journal.length == 256 << 10
            assert (journal.epoch, journal.sequence) == (1, 1)
        with pytest.raises(ValueError, match="multiple of 8192"):
            jqcow.open("nowhere", journal_size=1)

    def test_recovery_is_reported(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        for index in range(3):
            image.pwrite(b"x", index * CLUSTER)
            image.flush()
        crashed = device.killed()
        with jqcow.open_device(crashed, "r+", journal_size=JOURNAL) as recovered:
            assert recovered.recovered == jqcow.Recovered(1, 1, 4, torn_tail=False)
        image.close()


class TestRanges:
    @pytest.mark.parametrize(
        ("length", "offset"), [(1, SIZE), (SIZE + 1, 0), (-1, 0), (1, -1), (0, SIZE + 1), (1 << 70, 0)]
    )
    def test_past_the_end_is_a_value_error(self, image: jqcow.Image, length: int, offset: int) -> None:
        requests: list[Callable[[], object]] = [
            lambda: image.pread(length, offset),
            lambda: image.write_zeroes(length, offset),
            lambda: image.discard(length, offset),
            lambda: image.extents(length, offset),
        ]
        if 0 <= length <= SIZE + 1:
            requests.append(lambda: image.pwrite(bytes(length), offset))
            requests.append(lambda: image.pread_into(bytearray(length), offset))
        for request in requests:
            with pytest.raises(ValueError, match="not within the disk"):
                request()
        assert image.info().journal is None

    def test_zero_length_does_nothing(self, image: jqcow.Image) -> None:
        for offset in (0, 1, SIZE):
            assert image.pread(0, offset) == b""
            assert image.pwrite(b"", offset) == 0
            image.pread_into(bytearray(), offset)
            image.write_zeroes(0, offset)
            image.discard(0, offset)
            assert list(image.extents(0, offset)) == []
        assert image.info().journal is None

    def test_whole_disk(self, image: jqcow.Image) -> None:
        data = os.urandom(SIZE)
        assert image.pwrite(data, 0) == SIZE
        assert image.pread(SIZE, 0) == data
        assert [extent.kind for extent in image.extents()] == ["data"]


class TestBuffers:
    def test_any_contiguous_buffer(self, image: jqcow.Image) -> None:
        words = array.array("H", range(300))
        assert image.pwrite(words, 7) == 600
        back = array.array("H", bytes(600))
        image.pread_into(back, 7)
        assert back == words
        image.pwrite(memoryview(b"abcdef")[2:4], 1)
        assert image.pread(2, 1) == b"cd"
        target = bytearray(10)
        image.pread_into(memoryview(target)[4:6], 1)
        assert target == b"\0\0\0\0cd\0\0\0\0"
        shaped = memoryview(bytearray(6)).cast("B", (2, 3))
        image.pwrite(shaped, 0)
        image.pread_into(shaped, 0)

    def test_strided_buffer_is_refused_clearly(self, image: jqcow.Image) -> None:
        strided = memoryview(bytearray(10))[::2]
        for request in (lambda: image.pwrite(strided, 0), lambda: image.pread_into(strided, 0)):
            with pytest.raises((TypeError, BufferError), match="contiguous"):
                request()

    def test_no_buffer_at_all(self, image: jqcow.Image) -> None:
        for wrong in ("text", 7, None):
            with pytest.raises(TypeError):
                image.pwrite(wrong, 0)  # type: ignore[arg-type]

    def test_buffer_that_cannot_be_filled(self, image: jqcow.Image) -> None:
        with pytest.raises(TypeError):
            image.pread_into(b"read-only", 0)

    def test_buffer_is_the_callers_again(self, image: jqcow.Image) -> None:
        """No view of it is kept: a bytearray that is viewed cannot be resized."""
        buffer = bytearray(b"x" * 5000)
        image.pwrite(buffer, 0)
        image.pread_into(buffer, 0)
        buffer.extend(b"more")
        buffer[:4] = b"yyyy"
        assert image.pread(4, 0) == b"xxxx"


class TestReadOnly:
    @pytest.fixture
    def reader(self, device: SimulatedDevice, image: jqcow.Image) -> Iterator[jqcow.Image]:
        image.pwrite(b"hello", 0)
        image.close()
        device.reopen(read_only=True)
        with jqcow.open_device(device, "r") as reader:
            yield reader

    @pytest.mark.parametrize("name", CHANGES)
    def test_no_change(self, reader: jqcow.Image, name: str) -> None:
        with pytest.raises(jqcow.ReadOnlyError) as caught:
            CHANGES[name](reader)
        assert caught.value.errno == errno.EROFS

    @pytest.mark.parametrize("name", READS)
    def test_every_read(self, reader: jqcow.Image, name: str) -> None:
        READS[name](reader)
        assert reader.pread(5, 0) == b"hello"
        reader.flush()
        assert not reader.as_file().writable()


class TestClosed:
    @pytest.mark.parametrize("name", [*READS, *CHANGES, "flush"])
    def test_every_method_says_so(self, image: jqcow.Image, name: str) -> None:
        image.close()
        request = {**READS, **CHANGES, "flush": jqcow.Image.flush}[name]
        with pytest.raises(jqcow.ImageClosedError, match="closed"):
            request(image)

    def test_closing_twice(self, image: jqcow.Image) -> None:
        image.close()
        image.close()
        assert image.closed and "closed" in repr(image)

    def test_after_an_exception_what_was_written_stays(self, device: SimulatedDevice) -> None:
        with (
            pytest.raises(KeyError),
            jqcow.create_on_device(device, SIZE, cluster_size=CLUSTER, journal_size=JOURNAL) as image,
        ):
            image.pwrite(b"stays", 0)
            raise KeyError
        device.reopen()
        with jqcow.open_device(device) as image:
            assert image.recovered is None
            assert image.pread(5, 0) == b"stays"


class TestPoisoned:
    @pytest.fixture
    def poisoned(self, device: SimulatedDevice, image: jqcow.Image) -> jqcow.Image:
        image.pwrite(b"safe", 0)
        image.flush()
        image.pwrite(b"lost?", CLUSTER)
        device.faults = FaultPlan(Fault(errno.EIO, call="barrier"))
        with pytest.raises(OSError) as caught:
            image.flush()
        assert caught.value.errno == errno.EIO
        device.faults = None
        return image

    @pytest.mark.parametrize("name", [*CHANGES, "flush"])
    def test_no_change(self, poisoned: jqcow.Image, name: str) -> None:
        request = {**CHANGES, "flush": jqcow.Image.flush}[name]
        with pytest.raises(jqcow.PoisonedError, match="reopen"):
            request(poisoned)

    def test_reading_goes_on_and_closing_writes_nothing(
        self, device: SimulatedDevice, poisoned: jqcow.Image
    ) -> None:
        assert poisoned.pread(4, 0) == b"safe"
        assert poisoned.check().ok
        before = device.content()
        poisoned.close()
        assert device.content() == before
        device.reopen()
        with jqcow.open_device(device, "r+", journal_size=JOURNAL) as recovered:
            assert recovered.recovered is not None
            assert recovered.pread(4, 0) == b"safe"


FORBIDDEN_TO_CHILDREN: dict[str, Request] = {
    **READS,
    **CHANGES,
    "flush": jqcow.Image.flush,
    "size": lambda image: image.size,
    "transaction": lambda image: image.transaction().__enter__(),
}


class TestFork:
    def test_child_cannot_use_its_parents_image(self, tmp_path: Path) -> None:
        """Not even read: the locks that it has a copy of may be held by threads that it does not have."""
        with jqcow.create(tmp_path / "image.qcow2", SIZE) as image:
            image.pwrite(b"parent", 0)
            image.flush()
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    status = 0 if refuses_everything(image) else 2
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert image.pread(6, 0) == b"parent"
            image.pwrite(b"still!", 0)
        assert jqcow.open(tmp_path / "image.qcow2").pread(6, 0) == b"still!"


def refuses_everything(image: jqcow.Image) -> bool:
    """Return True if each request raises ImageInUse, and names the process that owns the image."""
    for request in FORBIDDEN_TO_CHILDREN.values():
        try:
            request(image)
        except jqcow.ImageInUse as error:
            if str(os.getppid()) not in str(error):
                return False
        else:
            return False
    return True


class TestThreads:
    def test_threads_with_regions_of_their_own(self, tmp_path: Path) -> None:
        """Writes, reads, zeroes and flushes from many threads: each sees its own region as it left it."""
        path, threads, region = tmp_path / "image.qcow2", 6, 96 * CLUSTER
        failures: list[BaseException] = []
        with jqcow.create(path, threads * region, cluster_size=CLUSTER, journal_size=JOURNAL) as image:

            def work(number: int) -> None:
                base = number * region
                try:
                    for step in range(60):
                        offset = base + (step * 7919 * 512) % (region - 3 * CLUSTER)
                        data = bytes([number + 1, step + 1]) * (CLUSTER + 300)
                        image.pwrite(data, offset, fua=step % 9 == 0)
                        assert image.pread(len(data), offset) == data
                        if step % 5 == 0:
                            image.write_zeroes(CLUSTER, offset, unmap=bool(step % 2))
                            assert not any(image.pread(CLUSTER, offset))
                        if step % 11 == 0:
                            image.flush()
                        if step % 29 == 0:
                            image.checkpoint()
                            list(image.extents())
                except BaseException as error:
                    failures.append(error)

            workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            assert not failures, failures[0]
            assert image.check().ok
            content = image.pread(image.size, 0)
        with jqcow.open(path) as image:
            assert image.pread(image.size, 0) == content

    def test_closing_while_others_write(self, tmp_path: Path) -> None:
        """Each other call is done, or raises ImageClosedError; the file is clean."""
        path = tmp_path / "image.qcow2"
        image = jqcow.create(path, SIZE, cluster_size=CLUSTER, journal_size=JOURNAL)
        endings: list[str] = []

        def work() -> None:
            try:
                while True:
                    image.pwrite(b"x" * 1000, 5000)
                    image.flush()
            except Exception as error:
                endings.append(type(error).__name__)

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        image.close()
        for worker in workers:
            worker.join()
        assert endings == ["ImageClosedError"] * 4
        with jqcow.open(path) as image:
            assert image.recovered is None and image.check().ok


class TestResize:
    def test_growth_reads_as_zeros(self, image: jqcow.Image) -> None:
        image.pwrite(b"x" * 100, SIZE - 100)
        image.resize(SIZE + 512)
        image.resize(SIZE + 512)
        image.resize(3 * SIZE + 1536)
        assert image.size == 3 * SIZE + 1536
        assert image.pread(100, SIZE - 100) == b"x" * 100
        assert not any(image.pread(2 * SIZE + 1536, SIZE))

    @pytest.mark.parametrize("size", [SIZE + 1, SIZE - 1, 1, -512])
    def test_wrong_sizes(self, image: jqcow.Image, size: int) -> None:
        with pytest.raises(ValueError, match="multiple of 512"):
            image.resize(size)
        with image.transaction() as transaction, pytest.raises(ValueError, match="multiple of 512"):
            transaction.resize(size)
        assert image.size == SIZE

    @pytest.mark.parametrize("size", [0, 512, 7 * CLUSTER, 7 * CLUSTER + 1536, SIZE - 512])
    def test_what_is_cut_off_is_gone(self, image: jqcow.Image, size: int) -> None:
        """Also the part of a cluster that stays: it does not come back when the disk grows again."""
        data = os.urandom(SIZE)
        image.pwrite(data, 0)
        image.resize(size)
        assert image.size == size
        assert image.pread(size, 0) == data[:size]
        with pytest.raises(ValueError, match="not within the disk"):
            image.pread(1, size)
        kept = sum(extent.length for extent in image.extents() if extent.kind == "data")
        assert kept == size
        image.resize(SIZE)
        assert image.pread(SIZE, 0) == data[:size] + bytes(SIZE - size)
        assert image.check().ok

    def test_cut_off_clusters_are_used_again(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        image.pwrite(b"x" * (SIZE // 2), 0)
        image.flush()
        grown = device.size()
        for _ in range(4):
            image.resize(0)
            image.resize(SIZE)
            image.flush()
            image.pwrite(b"y" * (SIZE // 4), 0)
            image.flush()
        assert device.size() == grown
        assert image.check().ok

    def test_shrinking_is_durable_on_return(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        image.pwrite(b"x" * SIZE, 0)
        image.resize(CLUSTER)
        powerless = SimulatedDevice(device.durable_content())
        with jqcow.open_device(powerless, "r+", journal_size=JOURNAL) as recovered:
            assert recovered.size == CLUSTER
            assert recovered.pread(CLUSTER, 0) == b"x" * CLUSTER
            assert recovered.check().ok

    def test_failed_shrinking_changes_nothing(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        data = os.urandom(SIZE)
        image.pwrite(data, 0)
        image.flush()
        device.faults = FaultPlan(Fault(errno.EIO, call="pwrite"))
        with pytest.raises(OSError):
            image.resize(CLUSTER)
        assert image.size == SIZE and image.pread(SIZE, 0) == data
        image.resize(CLUSTER)
        assert image.size == CLUSTER and image.check().ok

    def test_more_than_the_l1_table_can_map(self, image: jqcow.Image) -> None:
        with pytest.raises(jqcow.UnsupportedFeatureError, match="L1 table of more than 32 MiB"):
            image.resize(1 << 50)
        assert image.size == SIZE
        image.pwrite(b"x", 0)
        assert image.check().ok


class TestExtents:
    def test_neighbours_are_joined_and_kinds_told(self, image: jqcow.Image) -> None:
        image.pwrite(b"x" * 3 * CLUSTER, CLUSTER)
        image.write_zeroes(CLUSTER, 2 * CLUSTER, unmap=False)
        found = [(extent.offset, extent.length, extent.kind) for extent in image.extents()]
        assert found == [
            (0, CLUSTER, "unallocated"),
            (CLUSTER, CLUSTER, "data"),
            (2 * CLUSTER, CLUSTER, "zero"),
            (3 * CLUSTER, CLUSTER, "data"),
            (4 * CLUSTER, SIZE - 4 * CLUSTER, "unallocated"),
        ]
        first = next(image.extents(10, CLUSTER + 100))
        assert (first.offset, first.length, first.kind) == (CLUSTER + 100, 10, "data")

    def test_range_is_checked_before_the_first_step(self, image: jqcow.Image) -> None:
        with pytest.raises(ValueError, match="not within"):
            image.extents(1, SIZE)
        with pytest.raises(ValueError, match="not within"):
            image.extents(None, SIZE + 1)


def test_error_tree() -> None:
    """Each error is what it also claims to be, so that callers may catch it either way."""
    assert issubclass(jqcow.UnsupportedFeatureError, jqcow.FormatError)
    assert issubclass(jqcow.FormatError, ValueError)
    assert issubclass(jqcow.ImageInUse, OSError)
    assert issubclass(jqcow.PoisonedError, jqcow.ReadOnlyError)
    assert issubclass(jqcow.ReadOnlyError, OSError)
    assert issubclass(jqcow.ImageClosedError, ValueError)
    assert jqcow.ImageInUse("busy").errno == errno.EAGAIN
    assert jqcow.CorruptionError("L2 table", 4096, "torn").offset == 4096


class TestFinalisers:
    """The garbage collector runs them in the midst of a call, in the thread that has the locks."""

    def test_closing_a_file_needs_no_lock(self, image: jqcow.Image) -> None:
        file = image.as_file()
        with image._lock:
            file.close()
        assert file.closed and not image.closed

    def test_a_buffered_file_may_be_collected_at_any_time(self, image: jqcow.Image) -> None:
        """Its finaliser flushes, and would wait for the lock that its own thread has."""
        file = io.BufferedReader(image.as_file())  # type: ignore[type-var]
        assert file.read(4) == bytes(4)
        with image._lock:
            del file
            gc.collect()
        assert image.pread(4, 0) == bytes(4)

    @pytest.mark.parametrize("name", [*READS, *CHANGES, "flush"])
    def test_a_request_under_the_lock_is_refused(self, image: jqcow.Image, name: str) -> None:
        request = {**READS, **CHANGES, "flush": jqcow.Image.flush}[name]
        with image._lock, pytest.raises(RuntimeError, match="in use by this thread"):
            request(image)
        request(image)

    def test_a_change_during_a_commit_is_refused(self, image: jqcow.Image) -> None:
        with image._engine.commits.turn.lock, pytest.raises(RuntimeError, match="in use by this thread"):
            image.pwrite(b"x", 0)


class TestStagedLimits:
    """What is not flushed must fit the next record, and must not fill the host's disk."""

    def test_new_tables_are_committed_before_no_record_holds_them(self, tmp_path: Path) -> None:
        cluster = 2 << 20
        reach = cluster * cluster // 8
        with jqcow.create(tmp_path / "disk.qcow2", 40 * reach, cluster_size=cluster) as image:
            for number in range(40):
                # Too short for the journal.
                image.pwrite(b"x" * 511, number * reach)
            journal = image.info().journal
            assert journal is not None
            assert journal.sequence > 2 and journal.length == 8 << 20

    def test_freed_clusters_are_committed(self, image: jqcow.Image, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("jqcow.engine.commit.STAGED_FREE_BYTES_MAX", 10 * CLUSTER)
        for _ in range(60):
            image.pwrite(b"x" * CLUSTER, 0)
            image.discard(CLUSTER, 0)
        assert image._engine.public.changes.freed_clusters <= 11
        assert image.info().file_size < 60 * CLUSTER + JOURNAL


class TestOldBytes:
    """What lies behind the end of a disk does not come back, whoever makes it larger."""

    def test_behind_the_end_in_the_last_cluster(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        image.pwrite(b"x" * 2 * CLUSTER, 0)
        image.resize(CLUSTER + 512)
        (*_, last) = image.extents()
        assert last.host_offset is not None
        place = last.host_offset + last.length - 512
        image.close()
        tail = device.content()[place : place + CLUSTER]
        assert tail == b"x" * 512 + bytes(CLUSTER - 512)

    def test_mapped_past_the_end_by_another_program(
        self, device: SimulatedDevice, image: jqcow.Image
    ) -> None:
        image.pwrite(b"x" * CLUSTER, 20 * CLUSTER)
        image.close()
        content = bytearray(device.content())
        content[24:32] = (8 * CLUSTER).to_bytes(8, "big")
        with jqcow.open_device(SimulatedDevice(bytes(content)), "r+", journal_size=JOURNAL) as other:
            other.resize(SIZE)
            assert other.pread(SIZE - 8 * CLUSTER, 8 * CLUSTER) == bytes(SIZE - 8 * CLUSTER)
            assert other.check().ok


def test_every_name_of_the_package_is_there_when_it_is_asked_for() -> None:
    code = "import jqcow; print(all(name in dir(jqcow) and getattr(jqcow, name) for name in jqcow.__all__))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "True\n"
    assert sorted([*jqcow._HOMES, "__version__"]) == sorted(jqcow.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jqcow.nothing  # noqa: B018
