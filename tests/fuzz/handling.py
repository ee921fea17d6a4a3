"""What is done with a hostile image, and what must hold whatever it is made of."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

import jqcow
from jqcow.engine.engine import make_writable, open_engine
from jqcow.engine.medium import Medium
from jqcow.errors import JqcowError
from jqcow.ondisk.header import MAGIC
from tests.fuzz.hostile import JOURNAL_BYTES, Case
from tests.fuzz.sparse import SparseDevice

SECONDS_MAX = 60
STANDING = 30
READ_CHUNK_BYTES = 1 << 20
PATTERN = b"guest bytes of the fuzzer ".ljust(64, b".")
REFUSALS = (JqcowError, OSError)


class TooSlow(BaseException):
    """The watchdog bit. Not an Exception: nothing may swallow it."""


@contextmanager
def time_bound(seconds: float) -> Iterator[None]:
    """Raise TooSlow inside the body after ``seconds`` of CPU time, or STANDING times that by the clock.

    A busy machine is no finding; what waits for ever is one.
    """

    def bite(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"still running after {seconds} seconds")

    timers = (
        (signal.SIGPROF, signal.ITIMER_PROF, seconds),
        (signal.SIGALRM, signal.ITIMER_REAL, STANDING * seconds),
    )
    before = [signal.signal(number, bite) for number, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


class Handling:
    """Everything that a user would do with one image; refusals are counted, all else is a failure."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.chance = random.Random(case.number)
        self.device = SparseDevice(case.content)
        self.outcomes: Counter[str] = Counter()

    def run(self) -> None:
        """Handle the image in every way, within the time bound.

        Raises:
            Exception: a promise is broken; whatever is no refusal.
        """
        with time_bound(SECONDS_MAX):
            self.look()
            self.use()
            self.repair()
            self.salvage_root()

    def tolerate(self, what: str, action: Callable[[], object]) -> bool:
        """Do ``action``; a refusal is fine. Return True if it was done."""
        try:
            action()
        except REFUSALS as error:
            self.outcomes[f"{what}: {type(error).__name__}"] += 1
            return False
        self.outcomes[f"{what}: done"] += 1
        return True

    def open(self, mode: jqcow.image.Mode) -> jqcow.Image | None:
        """Open the image, or be refused."""
        self.device.reopen(read_only=mode == "r")
        opened: list[jqcow.Image] = []
        journal_size = JOURNAL_BYTES if mode == "r+" else None
        self.tolerate(
            f"open {mode}",
            lambda: opened.append(jqcow.open_device(self.device, mode, journal_size=journal_size)),
        )
        return opened[0] if opened else None

    def look(self) -> None:
        """Read everything that can be read. The device takes no change meanwhile."""
        image = self.open("r")
        if image is not None:
            self.read(image)
            self.tolerate("info", image.info)
            self.tolerate("check", image.check)
            names: list[str] = []
            self.tolerate("snapshots", lambda: names.extend(taken.id for taken in image.snapshots()))
            self.tolerate("close", image.close)
            for name in names[:2]:
                self.look_at(name)

    def look_at(self, name: str) -> None:
        """Read one snapshot."""
        self.device.reopen(read_only=True)
        opened: list[jqcow.Image] = []
        self.tolerate("open snapshot", lambda: opened.append(jqcow.open_device(self.device, snapshot=name)))
        for image in opened:
            self.read(image)
            self.tolerate("close", image.close)

    def read(self, image: jqcow.Image) -> None:
        """Read the start, the end and places in between, and walk all extents."""
        size = image.size
        starts = [0, max(0, size - READ_CHUNK_BYTES), *(self.chance.randrange(size + 1) for _ in range(3))]
        for start in starts:
            length = min(READ_CHUNK_BYTES, size - start)
            self.tolerate("read", partial(image.pread, length, start))
        self.tolerate("extents", lambda: sum(1 for _ in image.extents()))

    def use(self) -> None:
        """Write, zero, discard, grow, flush, check, close; and once more."""
        had_magic = self.case.content[: len(MAGIC)] == MAGIC
        for _ in range(2):
            image = self.open("r+")
            if image is None:
                break
            self.change(image)
            self.require_metadata_intact(image)
            self.tolerate("close", image.close)
        if had_magic and self.device.size() >= len(MAGIC):
            self.device.reopen(read_only=True)
            assert self.device.pread(len(MAGIC), 0) == MAGIC, "the header was overwritten"

    def change(self, image: jqcow.Image) -> None:
        """Make changes anywhere on the disk."""
        self.read(image)
        for _ in range(6):
            length = min(self.chance.choice((512, 5000, 70_000)), image.size)
            offset = self.chance.choice((0, self.chance.randrange(image.size - length + 1)))
            data = (PATTERN * (length // len(PATTERN) + 1))[:length]
            match self.chance.randrange(8):
                case 5:
                    self.tolerate("snapshot", partial(image.create_snapshot, "made by the fuzzer"))
                case 6:
                    self.change_snapshot(image)
                case 7:
                    self.tolerate("compress", partial(self.compress, image))
                case 0 | 1 | 2:
                    self.tolerate("write", partial(image.pwrite, data, offset))
                case 3:
                    unmap = self.chance.random() < 0.5
                    self.tolerate("zero", partial(image.write_zeroes, length, offset, unmap=unmap))
                case _:
                    self.tolerate("discard", partial(image.discard, length, offset))
            self.tolerate("flush", image.flush)
        size = image.size
        if size % 512 == 0:
            self.tolerate("resize", lambda: image.resize(size + (1 << 20)))
        self.tolerate("check", image.check)
        self.tolerate("checkpoint", image.checkpoint)

    def change_snapshot(self, image: jqcow.Image) -> None:
        """Apply or delete a snapshot, if there is one."""

        def change() -> None:
            for taken in image.snapshots()[:1]:
                use = image.apply_snapshot if self.chance.random() < 0.5 else image.delete_snapshot
                use(taken.id)

        self.tolerate("use snapshot", change)

    def compress(self, image: jqcow.Image) -> None:
        """Write the first cluster compressed."""
        length = min(image.info().cluster_size, image.size)
        image.pwrite_compressed((PATTERN * (length // len(PATTERN) + 1))[:length], 0)

    def repair(self) -> None:
        """Repair, and check what is there then."""
        self.device = SparseDevice(self.case.content)
        opened: list[jqcow.Image] = []
        self.tolerate(
            "repair",
            lambda: opened.append(
                jqcow.open_device(self.device, "r+", journal_size=JOURNAL_BYTES, repair="all")
            ),
        )
        for image in opened:
            self.tolerate("check repaired", image.check)
            self.change(image)
            self.tolerate("close", image.close)

    def require_metadata_intact(self, image: jqcow.Image) -> None:
        """Guest bytes never landed on a cluster that holds metadata."""
        engine = image._engine
        cluster_bytes = engine.geometry.cluster_bytes
        for cluster in [0, *engine.space.metadata]:
            start = cluster * cluster_bytes
            if start < self.device.size() and not self.device.is_hole(start, cluster_bytes):
                content = self.device.pread(cluster_bytes, start)
                assert PATTERN not in content, f"guest bytes in the metadata cluster at {start:#x}"

    def salvage_root(self) -> None:
        """Open with the root copy, as a recovery of a lost sector 0 would."""
        self.device = SparseDevice(self.case.content)

        def recover() -> None:
            opened = open_engine(Medium(self.device), writable=True, use_root_copy=True)
            make_writable(opened)
            opened.engine.closing.clean()

        self.tolerate("root copy", recover)


def handle(case: Case) -> tuple[Counter[str], float]:
    """Handle one case; return the outcomes and the seconds that it took.

    Raises:
        AssertionError: the case broke a promise; the message names and replays it.
    """
    handling = Handling(case)
    start = time.monotonic()
    try:
        handling.run()
    except (Exception, TooSlow) as error:
        replay = f"python -m tests.fuzz.campaign --first {case.number} --count 1"
        raise AssertionError(f"{type(error).__name__}: {error}\n  {case}\n  replay: {replay}") from error
    return handling.outcomes, time.monotonic() - start
