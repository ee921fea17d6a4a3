"""A run of the simulation: an image used, failed, cut off and recovered, again and again, step by step.

A `Program` is plain values: what the run starts from, and a list of steps. It can be written on one line and
read back, and steps can be left out of it: a step that makes no sense where it stands does nothing. So a
failing program can be minimised (`tests.support.simulation_minimise`). Programs come from seeds
(`tests.support.simulation_programs`).

The steps, with their arguments (``POS`` and ``LEN`` in bytes of the model, see `Windows`):

    write:POS:LEN  fua:POS:LEN  zeroes:POS:LEN  unmap:POS:LEN  discard:POS:LEN
    packed:POS:LEN              a compressed write of the clusters that the range touches
    resize:WINDOW:INSIDE        to the start of that window, and so many bytes more
    snapshot  apply:NUMBER  delete:NUMBER    of those there are, modulo their count
    flush  checkpoint  look  open  close  kill
    begin  commit  rollback  abort  savepoint  return:NUMBER  outgrow
    fail:CALL:AT:ERROR:APPLIED  the host fails a call, counted from the next step on; several make one plan
    tear:AT:MASK:ERROR          of a write only the sectors in the mask of bits happen
    full:SECTORS                the disk has room for so many sectors more
    well                        the host is well again
    cut:AT:PICK                 the power fails before a call that changes the device, or a barrier; PICK
                                draws what is left, and the image is recovered, judged and used on
    recut:AT:PICK               the recovery is cut as well; any number after a cut
    refail:CALL:AT:ERROR:APPLIED  the recovery fails, and is tried again
"""

from __future__ import annotations

import errno
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from random import Random
from typing import Any, ClassVar, NamedTuple

import jqcow
from jqcow.errors import JqcowError, PoisonedError
from jqcow.testing import EVERYTHING, CrashSpace, CrashState, Fault, FaultPlan, SimulatedDevice
from tests.support import qemu_starts, starts
from tests.support.expectation import SECTOR_BYTES, AllTaken, Expectation
from tests.support.images import Draft, Session, salts_of
from tests.support.judge import Judge, judge_closed, recover, recover_and_close
from tests.support.layouts import GarbageRule
from tests.support.snapshots import SNAPSHOTS_MAX
from tests.support.starts import Start
from tests.support.transactions import outgrow

STARTS: dict[str, Callable[[int, Random], Start]] = {
    "empty": starts.empty_file,
    "used": starts.used_image,
    "full": starts.full_image,
    "dirty": starts.dirty_image,
    "holed": starts.holed_image,
    "unpunchable": starts.unpunchable_image,
    "vouched": starts.vouched_image,
    "long-header": starts.long_header_image,
    "half-moved": starts.half_moved_image,
    "qemu": qemu_starts.qemu_image,
    "snapshots": starts.snapshots_image,
    "snapshots-unpunchable": starts.snapshots_unpunchable_image,
    "qemu-snapshots": qemu_starts.qemu_snapshots_image,
    "qemu-compressed": qemu_starts.qemu_compressed_image,
    "narrow": qemu_starts.narrow_image,
}
LARGE_ONLY = ("long-header", "half-moved")
"""Starts for clusters of 8 KiB and more."""

_NUMBERS = re.compile(r"\b(?:0x[0-9a-f]+|\d+)\b")

ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
INTERRUPT = "INT"
OPENINGS = 4
"""So often a failed opening is tried again before the host is well."""

STATE_KINDS = (
    "changes", "prefix", "torn", "sectors", "garbage", "garbage", "without", "single", "suffix", "size",
    "all", "none",
)  # fmt: skip


class PowerCut(BaseException):
    """The power is gone: nothing that the process does from here on reaches the device."""


class Interrupt(BaseException):
    """What KeyboardInterrupt is to a user."""


class Step(NamedTuple):
    """One step of a program."""

    kind: str
    arguments: tuple[int | str, ...] = ()

    def __str__(self) -> str:
        return ":".join(map(str, (self.kind, *self.arguments)))

    @classmethod
    def parse(cls, text: str) -> Step:
        """Read a step back."""
        kind, *arguments = text.split(":")
        return cls(kind, tuple(int(word) if word.isdecimal() else word for word in arguments))


@dataclass(frozen=True)
class Program:
    """What a run starts from, and its steps. ``drop_barriers`` breaks the engine, for tests."""

    cluster_bytes: int
    start: str
    start_seed: int
    journal_bytes: int
    steps: tuple[Step, ...]
    drop_barriers: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the program on one line, for `parse`."""
        first = "/".join(map(str, (self.cluster_bytes, self.start, self.start_seed, self.journal_bytes)))
        dropped = "".join(f"/{name}" for name in self.drop_barriers)
        return " ".join((first + dropped, *map(str, self.steps)))

    @classmethod
    def parse(cls, line: str) -> Program:
        """Read a program back. Raises ``ValueError`` if the line is none."""
        first, *steps = line.split()
        cluster_bytes, start, start_seed, journal_bytes, *dropped = first.split("/")
        if start not in STARTS:
            raise ValueError(f"no such start: {start}")
        return cls(
            int(cluster_bytes),
            start,
            int(start_seed),
            int(journal_bytes),
            tuple(map(Step.parse, steps)),
            tuple(dropped),
        )


@functools.lru_cache(maxsize=64)
def start_of(name: str, cluster_bytes: int, seed: int) -> Start:
    """Return a start; the same object every time, so that making it costs once."""
    return STARTS[name](cluster_bytes, Random(f"simulation start {name}/{cluster_bytes}/{seed}"))


@dataclass
class Tally:
    """What a run met. ``fingerprint`` is the same for the same program."""

    counts: Counter[str] = field(default_factory=Counter)
    fingerprint: str = ""


class SimulationFailure(AssertionError):
    """A program whose run broke a promise. ``nature`` says how, without details; ``at`` names the step."""

    def __init__(self, program: Program, at: str, cause: BaseException) -> None:
        self.program = program
        self.at = at
        self.nature = f"{type(cause).__name__}: {_NUMBERS.sub('N', str(cause).split(':')[0])}"
        super().__init__(f"{type(cause).__name__}: {cause}\n  in step {at}")


def run(program: Program) -> Tally:
    """Run a program. Raises SimulationFailure if a promise breaks."""
    simulation = Simulation(program)
    try:
        return simulation.run()
    except (Exception, PowerCut, Interrupt) as error:
        raise SimulationFailure(program, simulation.at, error) from error


@dataclass
class _Session(Session):
    """A session that opens its image until the host lets it."""

    journal_bytes: int = 0
    plan: FaultPlan | None = None

    def new_image(self) -> jqcow.Image:
        """Recovery may fail at any call, with the faults in force; it is then tried again."""
        for _ in range(OPENINGS):
            self.device.faults = self.plan
            known = fired(self.plan)
            try:
                return self._try_to_open()
            except (OSError, Interrupt):
                if not is_to_blame(self.plan, known):
                    raise
                if lost_changes(self.plan, known):
                    self.expectation.forget_order()
            finally:
                self.device.faults = None
        self.plan = None
        return self._try_to_open()

    def _try_to_open(self) -> jqcow.Image:
        self.device.reopen()
        return jqcow.open_device(
            self.device, "r+", journal_size=self.journal_bytes, new_salt=salts_of(self.device)
        )


def fired(plan: FaultPlan | None) -> int:
    """Return how many faults have struck."""
    return 0 if plan is None else len(plan.fired)


def is_to_blame(plan: FaultPlan | None, known: int) -> bool:
    """Return True if an error may be the host's doing; ``known`` faults have struck before."""
    return plan is not None and (len(plan.fired) > known or plan.capacity_bytes is not None)


def lost_changes(plan: FaultPlan | None, known: int) -> bool:
    """Return True if a barrier failed since ``known`` faults had struck, and lost what was in flight."""
    if plan is None:
        return False
    since = zip(plan.fired[known:], plan.fired_calls[known:], strict=True)
    return any(call == "barrier" and isinstance(fault.exception(), OSError) for fault, call in since)


@dataclass
class _Cut:
    """A power cut to come, and what then befalls its recoveries."""

    calls_left: int
    pick: int
    later: list[Step] = field(default_factory=list)


class Simulation:
    """The run of one program."""

    def __init__(self, program: Program) -> None:
        """Set up the device; nothing is asked of it yet."""
        self.program = program
        self.at = "setting up"
        self._rule = GarbageRule() if program.cluster_bytes > 4096 else None
        self._faults: list[Fault] = []
        self._capacity_sectors: int | None = None
        self._plan: FaultPlan | None = None
        self._cut: _Cut | None = None
        self._moment: tuple[CrashSpace, Expectation] | None = None
        self._context: Any = None
        self._draft: Draft | None = None
        self._savepoints: list[Any] = []
        self._tally = Tally()
        self._digest = blake2b(digest_size=16)
        self._session = self._new_session(1 << 16)

    def run(self) -> Tally:
        """Do all steps, close, and judge the file."""
        for number, step in enumerate(self.program.steps):
            self.at = f"{number} {step}"
            self._tally.counts[step.kind] += 1
            self._do(step)
        self.at = "the end"
        self._finish()
        self._digest.update(self._device.content())
        self._tally.fingerprint = self._digest.hexdigest()
        return self._tally

    def _new_session(self, written: int) -> _Session:
        start = start_of(self.program.start, self.program.cluster_bytes, self.program.start_seed)
        device = start.device()
        device.drop_barriers.update(self.program.drop_barriers)
        return self._use(device, start.expectation(), written)

    def _use(self, device: SimulatedDevice, expectation: Expectation, written: int) -> _Session:
        self._watch(device)
        return _Session(device, expectation, written=written, journal_bytes=self.program.journal_bytes)

    @property
    def _device(self) -> SimulatedDevice:
        return self._session.device

    @property
    def _expectation(self) -> Expectation:
        return self._session.expectation

    # A step and what comes of it

    def _do(self, step: Step) -> None:
        if step.kind in self._PREPARATIONS:
            self._PREPARATIONS[step.kind](self, *step.arguments)
            return
        self._put_faults()
        known = fired(self._plan)
        try:
            with self._host():
                self._perform(step)
        except (PowerCut, OSError, Interrupt) as error:
            self._meet(error, known)
        if self._moment is not None:
            self._after_cut()
        self._note(step)

    def _meet(self, error: BaseException, known: int) -> None:
        if self._moment is not None:
            return
        try:
            self._survive(error, known)
        except (PowerCut, OSError):
            # The power may also fail while the session deals with an error.
            if self._moment is None:
                raise

    def _perform(self, step: Step) -> None:
        # A transaction is left by these alone.
        inside = self._INSIDE.get(step.kind)
        if self._draft is not None:
            if inside is not None:
                inside(self, self._draft, *step.arguments)
            return
        outside = self._OUTSIDE.get(step.kind)
        if outside is not None:
            if step.kind not in ("close", "kill"):
                self._be_open()
            outside(self, *step.arguments)

    def _be_open(self) -> None:
        if self._session.image is not None:
            return
        if self._expectation.exists:
            self._session.open()
        else:
            self._session.create(self.program.cluster_bytes, self._expectation.sizes[-1])

    def _note(self, step: Step) -> None:
        device = self._device
        met = (str(step), device.barriers.total(), len(device.changes), self._session.faults_seen)
        self._digest.update(repr(met).encode())

    def _survive(self, error: BaseException, known: int) -> None:
        """The host failed, and the user was told. The image must be as before, and usable, or refuse work."""
        session = self._session
        if not is_to_blame(self._plan, known) and not (
            isinstance(error, PoisonedError) and session.faults_seen
        ):
            raise error
        session.faults_seen += 1
        self._tally.counts["errors met"] += 1
        if not self._expectation.exists:
            self._session = self._new_session(session.written)
            return
        if session.image is not None and session.image.closed:
            self._leave(error)
            session.kill()
        if lost_changes(self._plan, known) or session.is_poisoned:
            self._leave(error)
            session.recover_from_poison()
            # What a failed barrier lost may have been a growth: the disk has any size that was possible.
            assert session.live.size in self._expectation.sizes, "the disk has a size that nobody asked for"
            self._expectation.sizes = (*self._expectation.sizes, session.live.size)
        if self._draft is not None and not self._draft.transaction.is_open:
            self._leave(error)
        if isinstance(error, Interrupt):
            self._find_out_about_commit()
        self._look()

    def _find_out_about_commit(self) -> None:
        """An interrupt can also come after the barrier of a commit: then all of it is there, durably."""
        image, expectation = self._session.image, self._expectation
        if image is None or expectation.rival is None or self._draft is not None:
            return
        if image.size != expectation.sizes[-1] or expectation.expect_now(image):
            expectation.adopt_rival()

    def _leave(self, error: BaseException) -> None:
        """Leave the transaction, if one is open, by an exception."""
        context, self._context, self._draft = self._context, None, None
        if context is not None:
            with suppress(type(error)):
                assert not context.__exit__(type(error), error, error.__traceback__)

    def _finish(self) -> None:
        self._do(Step("commit"))
        self._do(Step("close"))
        if self._cut is not None:
            # The power fails after all is done: a closed image is closed durably.
            self._cut_now(self._device)
            self._after_cut()
        self._heal()
        self._be_open()
        self._session.look()
        self._session.close()
        judge_closed(self._device, self._expectation)

    # Steps on the image

    def _write(self, position: int, length: int, *, fua: bool = False) -> None:
        self._session.write(position, length, fua=fua)

    def _resize(self, window: int, inside: int) -> None:
        self._session.resize(self._size_at(window, inside))

    def _size_at(self, window: int, inside: int) -> int:
        windows = self._expectation.windows
        return window * windows.stride_bytes + inside % windows.window_bytes // SECTOR_BYTES * SECTOR_BYTES

    def _snapshot(self, user: Session | Draft, there: AllTaken) -> None:
        if len(there) < SNAPSHOTS_MAX:
            user.create_snapshot()

    def _close(self) -> None:
        if self._session.image is not None:
            self._session.close()

    def _kill(self) -> None:
        if self._session.image is not None:
            self._session.kill()

    def _begin(self) -> None:
        context = self._session.transaction()
        self._draft = context.__enter__()
        self._context, self._savepoints = context, []

    _OUTSIDE: ClassVar[dict[str, Callable[..., None]]] = {
        "open": lambda self: None,
        "write": _write,
        "fua": lambda self, position, length: self._write(position, length, fua=True),
        "zeroes": lambda self, *place: self._session.write_zeroes(*place, unmap=False),
        "unmap": lambda self, *place: self._session.write_zeroes(*place, unmap=True),
        "discard": lambda self, *place: self._session.discard(*place),
        "packed": lambda self, *place: self._session.write_compressed(*place),
        "resize": _resize,
        "snapshot": lambda self: self._snapshot(self._session, self._expectation.snapshots),
        "apply": lambda self, number: self._session.apply_snapshot(number),
        "delete": lambda self, number: self._session.delete_snapshot(number),
        "flush": lambda self: self._session.flush(),
        "checkpoint": lambda self: self._session.checkpoint(),
        "look": lambda self: self._look(),
        "close": _close,
        "kill": _kill,
        "begin": _begin,
    }

    # Steps in a transaction

    def _commit(self, draft: Draft) -> None:
        context, self._context, self._draft = self._context, None, None
        context.__exit__(None, None, None)

    def _rollback(self, draft: Draft) -> None:
        draft.rollback()
        self._commit(draft)

    def _abort(self, draft: Draft) -> None:
        self._leave(Interrupt())

    def _kill_inside(self, draft: Draft) -> None:
        self._session.kill()
        self._commit(draft)

    def _return(self, draft: Draft, number: int) -> None:
        if self._savepoints:
            kept = number % len(self._savepoints) + 1
            del self._savepoints[kept:]
            draft.return_to(self._savepoints[-1])

    _INSIDE: ClassVar[dict[str, Callable[..., None]]] = {
        "write": lambda self, draft, *place: draft.write(*place),
        "fua": lambda self, draft, *place: draft.write(*place),
        "zeroes": lambda self, draft, *place: draft.write_zeroes(*place, unmap=False),
        "unmap": lambda self, draft, *place: draft.write_zeroes(*place, unmap=True),
        "discard": lambda self, draft, *place: draft.discard(*place),
        "packed": lambda self, draft, *place: draft.write_compressed(*place),
        "snapshot": lambda self, draft: self._snapshot(draft, draft.snapshots),
        "apply": lambda self, draft, number: draft.apply_snapshot(number),
        "delete": lambda self, draft, number: draft.delete_snapshot(number),
        "resize": lambda self, draft, *place: draft.resize(self._size_at(*place)),
        "flush": lambda self, draft: self._session.flush(),
        "look": lambda self, draft: self._look(),
        "kill": _kill_inside,
        "commit": _commit,
        "rollback": _rollback,
        "abort": _abort,
        "savepoint": lambda self, draft: self._savepoints.append(draft.savepoint()),
        "return": _return,
        "outgrow": lambda self, draft: outgrow(draft),
    }

    def _look(self) -> None:
        if self._draft is not None:
            self._draft.look()
        else:
            self._session.look()
            sizes = self._expectation.sizes
            assert self._session.live.size == sizes[-1], f"the disk has another size than the last of {sizes}"

    # Faults

    @contextmanager
    def _host(self) -> Iterator[None]:
        """Let the faults in force strike meanwhile."""
        self._session.plan = self._device.faults = self._plan
        try:
            yield
        finally:
            self._device.faults = None

    def _put_faults(self) -> None:
        """Start a plan, if steps asked for faults."""
        if not self._faults and self._capacity_sectors is None:
            return
        capacity = None
        if self._capacity_sectors is not None:
            capacity = self._device.used_bytes + self._capacity_sectors * SECTOR_BYTES
        self._plan = FaultPlan(*self._faults, capacity_bytes=capacity)
        self._faults, self._capacity_sectors = [], None

    def _heal(self) -> None:
        self._plan = self._session.plan = None
        self._faults, self._capacity_sectors = [], None

    def _arm_cut(self, at: int, pick: int) -> None:
        self._cut = _Cut(max(1, at), pick)

    def _add_later(self, step: Step) -> None:
        if self._cut is not None:
            self._cut.later.append(step)

    def _set_capacity(self, sectors: int) -> None:
        self._capacity_sectors = sectors

    _PREPARATIONS: ClassVar[dict[str, Callable[..., None]]] = {
        "fail": lambda self, *what: self._faults.append(fault_of(*what)),
        "tear": lambda self, *what: self._faults.append(tear_of(*what)),
        "full": _set_capacity,
        "well": _heal,
        "cut": _arm_cut,
        "recut": lambda self, *what: self._add_later(Step("recut", what)),
        "refail": lambda self, *what: self._add_later(Step("refail", what)),
    }

    # Power cuts

    def _watch(self, device: SimulatedDevice) -> None:
        if self._rule is not None:
            self._rule.follow(device)
        device.change_listeners.append(self._tick)
        device.barrier_listeners.append(self._tick)

    def _tick(self, call: str, device: SimulatedDevice) -> None:
        """A call that changes the device, or a barrier, is about to happen: the power may fail before it."""
        if self._moment is not None:
            raise PowerCut
        if self._cut is not None:
            self._cut.calls_left -= 1
            if self._cut.calls_left <= 0:
                self._cut_now(device)
                raise PowerCut

    def _cut_now(self, device: SimulatedDevice) -> None:
        assert self._cut is not None
        space = CrashSpace(device.in_flight(), seed=self._cut.pick, garbage_allowed=self._rule)
        self._moment = space, self._expectation.copy()

    def _after_cut(self) -> None:
        """Recover what the power cut left, with what befalls the recovery; judge it, and go on with it."""
        assert self._moment is not None and self._cut is not None
        self._leave_by_cut()
        space, expectation = self._moment
        later, pick = self._cut.later, self._cut.pick
        self._moment, self._cut = None, None
        self._heal()
        state = draw_state(space, Random(f"state {pick}"))
        device = self._device.crash(state)
        self._count_cut("cuts", state)
        for step in later:
            device, state = self._disturb_recovery(device, state, expectation, step)
        Judge()(device.killed(), expectation.copy(), state)
        self._go_on(device, expectation)

    def _leave_by_cut(self) -> None:
        with suppress(PowerCut, OSError, JqcowError):
            self._leave(PowerCut())
        self._session.image = None

    def _count_cut(self, name: str, state: CrashState) -> None:
        self._tally.counts[name] += 1
        self._tally.counts[f"{name} with changes in flight"] += state.in_flight
        self._digest.update(state.digest)

    def _disturb_recovery(
        self, device: SimulatedDevice, state: CrashState, expectation: Expectation, step: Step
    ) -> tuple[SimulatedDevice, CrashState]:
        """Recover a crashed device, and cut the power or let the host fail on the way."""
        if step.kind == "refail":
            self._fail_recovery(device, expectation, fault_of(*step.arguments))
            return device, state
        at, pick = map(int, step.arguments)
        self._cut = _Cut(max(1, at), pick)
        self._watch(device)
        try:
            recover_and_close(device)
        except (PowerCut, OSError, JqcowError):
            if self._moment is None:
                raise
        moment, self._moment, self._cut = self._moment, None, None
        if moment is None:
            # It came to its end before.
            return self._without_listeners(device), state
        state = draw_state(moment[0], Random(f"state {pick}"))
        self._count_cut("recovery cuts", state)
        return device.crash(state), state

    def _without_listeners(self, device: SimulatedDevice) -> SimulatedDevice:
        device.change_listeners.clear()
        device.barrier_listeners.clear()
        return device

    def _fail_recovery(self, device: SimulatedDevice, expectation: Expectation, fault: Fault) -> None:
        device.faults = plan = FaultPlan(fault)
        try:
            recover_and_close(device)
        except (OSError, Interrupt):
            if not plan.fired:
                raise
            self._tally.counts["recoveries failed"] += 1
        device.faults = None
        if plan.lost_changes:
            expectation.forget_order()

    def _go_on(self, device: SimulatedDevice, expectation: Expectation) -> None:
        """The next user takes the image as it was found."""
        written = self._session.written
        if not expectation.exists:
            self._session = self._new_session(written)
            return
        image = recover(device)
        expectation.adopt(image)
        self._session = self._use(device, expectation, written)
        self._session.image = image


def fault_of(call: int | str, at: int | str, error: int | str, applied: int | str) -> Fault:
    """Return the fault that a ``fail`` step asks for."""
    kind = None if call == "any" else str(call)
    applied_bytes = EVERYTHING if applied == "all" else int(applied)
    return Fault(error_of(str(error)), at=max(1, int(at)), call=kind, applied_bytes=applied_bytes)


def tear_of(at: int, mask: int, error: str) -> Fault:
    """Return the fault that a ``tear`` step asks for."""
    sectors = [number for number in range(mask.bit_length()) if mask >> number & 1]
    return Fault.tear(sectors, at=max(1, at), error=error_of(error))


def error_of(name: str) -> int | BaseException:
    """Return an errno, or an exception of its own."""
    return Interrupt() if name == INTERRUPT else ERRORS[name]


def draw_state(space: CrashSpace, random: Random) -> CrashState:
    """Draw one of the states that a crash may leave."""
    for _ in range(8):
        kind, index = random.choice(STATE_KINDS), random.randrange(1 << random.randrange(1, 8))
        with suppress(ValueError):
            return space.state(f"{kind}:{index}:{space.seed}")
    return space.state(f"changes:{random.randrange(1 << 16)}:{space.seed}")


def without_step(program: Program, number: int) -> Program:
    """Return the program without one of its steps."""
    return replace(program, steps=program.steps[:number] + program.steps[number + 1 :])
