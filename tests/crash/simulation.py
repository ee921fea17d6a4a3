"""A run of the simulation: an image used, failed, cut off and recovered, again and again, step by step.

A `Program` is plain values: what the run starts from, and a list of steps. It can be written on one line and
read back, and steps can be left out of it: a step that makes no sense where it stands does nothing. So a
failing program can be minimised (`tests.crash.simulation_minimise`). Programs come from seeds
(`tests.crash.simulation_programs`).

The steps are those of `tests.support.operations`, and what befalls them:

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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from random import Random
from typing import Any, ClassVar

import jqcow
from jqcow.errors import JqcowError, PoisonedError
from jqcow.testing import (
    EVERYTHING,
    SECTOR_BYTES,
    CrashSpace,
    CrashState,
    Fault,
    FaultPlan,
    SimulatedDevice,
)
from tests.crash.judge import Judge, fail_recovery, judge_closed, recover, recover_and_close
from tests.crash.layouts import GarbageRule
from tests.support.expectation import Expectation
from tests.support.operations import Step
from tests.support.player import Player
from tests.support.starts import SIMULATED, STARTS, Start
from tests.support.users import Interrupt, Session, open_simulated

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
        if start not in SIMULATED:
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
    _digest: Any = field(default_factory=lambda: blake2b(digest_size=16))

    def note(self, met: bytes) -> None:
        """Take something into the fingerprint."""
        self._digest.update(met)

    @property
    def fingerprint(self) -> str:
        """What tells this run from others."""
        return str(self._digest.hexdigest())


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
    plan: FaultPlan = field(default_factory=FaultPlan)

    def new_image(self) -> jqcow.Image:
        """Recovery may fail at any call, with the faults in force; it is then tried again."""
        for _ in range(OPENINGS):
            self.device.faults = self.plan
            known = len(self.plan.fired)
            try:
                return open_simulated(self.device, journal_bytes=self.journal_bytes)
            except (OSError, Interrupt):
                if not is_to_blame(self.plan, known):
                    raise
                if lost_changes(self.plan, known):
                    self.expectation.forget_order()
            finally:
                self.device.faults = None
        self.plan = FaultPlan()
        return open_simulated(self.device, journal_bytes=self.journal_bytes)


def is_to_blame(plan: FaultPlan, known: int) -> bool:
    """Return True if an error may be the host's doing; ``known`` faults have struck before."""
    return len(plan.fired) > known or plan.capacity_bytes is not None


def lost_changes(plan: FaultPlan, known: int) -> bool:
    """Return True if a barrier failed since ``known`` faults had struck, and lost what was in flight."""
    since = zip(plan.fired[known:], plan.fired_calls[known:], strict=True)
    return any(call == "barrier" and isinstance(fault.exception(), OSError) for fault, call in since)


class Power:
    """The power of devices: it fails before some call, and what is left of a device is drawn then."""

    def __init__(self, rule: GarbageRule | None, tally: Tally) -> None:
        """Take what may come back as garbage, and where cuts are counted."""
        self._rule = rule
        self._tally = tally
        self._calls_left: int | None = None
        self._pick = 0
        self._expectation: Expectation | None = None
        self.later: list[Step] = []
        self.left: tuple[CrashState, Expectation | None] | None = None
        """Since the power failed: what is left, and what may be expected of it."""

    def arm(self, at: int, pick: int) -> None:
        """Let the power fail before a call from now on; ``pick`` draws what is left."""
        self._calls_left, self._pick, self.later = max(1, at), pick, []

    @property
    def is_armed(self) -> bool:
        """True while a cut is to come."""
        return self._calls_left is not None

    def watch(self, device: SimulatedDevice, expectation: Expectation | None = None) -> None:
        """Count the calls of a device from now on."""
        self._expectation = expectation
        if self._rule is not None:
            self._rule.follow(device)
        device.change_listeners.append(self._tick)
        device.barrier_listeners.append(self._tick)

    def _tick(self, call: str, device: SimulatedDevice) -> None:
        """A call that changes the device, or a barrier, is about to happen: the power may fail before it."""
        if self.left is not None:
            raise PowerCut
        if self._calls_left is not None:
            self._calls_left -= 1
            if self._calls_left <= 0:
                self.fail(device)
                raise PowerCut

    def fail(self, device: SimulatedDevice) -> None:
        """The power fails now."""
        space = CrashSpace(device.in_flight(), seed=self._pick, garbage_allowed=self._rule)
        expected = None if self._expectation is None else self._expectation.copy()
        self.left = draw_state(space, Random(f"state {self._pick}")), expected

    def restore(self, name: str) -> tuple[CrashState, Expectation | None] | None:
        """The power is back, and no cut is to come: return what was left, None if it never failed."""
        left, self.left, self._calls_left = self.left, None, None
        if left is not None:
            self._tally.counts[name] += 1
            self._tally.counts[f"{name} with changes in flight"] += left[0].in_flight
            self._tally.note(left[0].digest)
        return left


class Simulation:
    """The run of one program."""

    def __init__(self, program: Program) -> None:
        """Set up the device; nothing is asked of it yet."""
        self.program = program
        self.at = "setting up"
        self._faults: list[Fault] = []
        self._capacity_sectors: int | None = None
        self._plan = FaultPlan()
        self._tally = Tally()
        self._power = Power(GarbageRule() if program.cluster_bytes > 4096 else None, self._tally)
        self.player = Player(self._new_session(1 << 16), Random(0))

    def run(self) -> Tally:
        """Do all steps, close, and judge the file."""
        for number, step in enumerate(self.program.steps):
            self.at = f"{number} {step}"
            self._tally.counts[step.kind] += 1
            self._do(step)
        self.at = "the end"
        self._finish()
        self._tally.note(self._session.device.content())
        return self._tally

    def _new_session(self, written: int) -> _Session:
        start = start_of(self.program.start, self.program.cluster_bytes, self.program.start_seed)
        device = start.device()
        device.drop_barriers.update(self.program.drop_barriers)
        return self._use(device, start.expectation(), written)

    def _use(self, device: SimulatedDevice, expectation: Expectation, written: int) -> _Session:
        self._power.watch(device, expectation)
        return _Session(
            device,
            expectation,
            written=written,
            journal_bytes=self.program.journal_bytes,
            small_writes="journal" if self.program.start_seed % 2 else "in-place",
        )

    @property
    def _session(self) -> _Session:
        assert isinstance(self.player.session, _Session)
        return self.player.session

    # A step and what comes of it

    def _do(self, step: Step) -> None:
        if step.kind in self._PREPARATIONS:
            self._PREPARATIONS[step.kind](self, *step.arguments)
            return
        self._put_faults()
        known = len(self._plan.fired)
        session = self._session
        session.plan = session.device.faults = self._plan
        try:
            self.player.perform(step)
        except (PowerCut, OSError, Interrupt) as error:
            session.device.faults = None
            self._meet(error, known)
        session.device.faults = None
        if self._power.left is not None:
            self._after_cut()
        device = self._session.device
        met = (str(step), device.barriers.total(), len(device.changes), self._session.faults_seen)
        self._tally.note(repr(met).encode())

    def _meet(self, error: BaseException, known: int) -> None:
        if self._power.left is not None:
            return
        try:
            self._survive(error, known)
        except (PowerCut, OSError):
            # The power may also fail while the session deals with an error.
            if self._power.left is None:
                raise

    def _survive(self, error: BaseException, known: int) -> None:
        """The host failed, and the user was told. The image must be as before, and usable, or refuse work."""
        session = self._session
        if not is_to_blame(self._plan, known) and not (
            isinstance(error, PoisonedError) and session.faults_seen
        ):
            raise error
        session.faults_seen += 1
        self._tally.counts["errors met"] += 1
        if not session.expectation.exists:
            self.player.session = self._new_session(session.written)
            return
        if session.image is not None and session.image.closed:
            self.player.leave(error)
            session.kill()
        if lost_changes(self._plan, known) or session.is_poisoned:
            self.player.leave(error)
            session.recover_from_poison()
        if self.player.draft is not None and not self.player.draft.transaction.is_open:
            self.player.leave(error)
        if isinstance(error, Interrupt):
            self._find_out_about_commit()
        self.player.look()

    def _find_out_about_commit(self) -> None:
        """An interrupt can also come after the barrier of a commit: then all of it is there, durably."""
        image, expectation = self._session.image, self._session.expectation
        if image is None or expectation.rival is None or self.player.draft is not None:
            return
        if image.size != expectation.sizes[-1] or expectation.expect_now(image):
            expectation.adopt_rival()

    def _finish(self) -> None:
        for kind in ("commit", "close"):
            self._do(Step(kind))
        if self._power.is_armed:
            # The power fails after all is done: a closed image is closed durably.
            self._power.fail(self._session.device)
            self._after_cut()
        self._heal()
        self.player.play("open look")
        self._session.close()
        judge_closed(self._session.device, self._session.expectation)

    # Faults

    def _put_faults(self) -> None:
        """Start a plan, if steps asked for faults."""
        if not self._faults and self._capacity_sectors is None:
            return
        capacity = None
        if self._capacity_sectors is not None:
            capacity = self._session.device.used_bytes + self._capacity_sectors * SECTOR_BYTES
        self._plan = FaultPlan(*self._faults, capacity_bytes=capacity)
        self._faults, self._capacity_sectors = [], None

    def _heal(self) -> None:
        self._plan = self._session.plan = FaultPlan()
        self._faults, self._capacity_sectors = [], None

    def _set_capacity(self, sectors: int) -> None:
        self._capacity_sectors = sectors

    def _disturb_later(self, step: Step) -> None:
        if self._power.is_armed:
            self._power.later.append(step)

    _PREPARATIONS: ClassVar[dict[str, Callable[..., None]]] = {
        "fail": lambda self, *what: self._faults.append(fault_of(*what)),
        "tear": lambda self, *what: self._faults.append(tear_of(*what)),
        "full": _set_capacity,
        "well": _heal,
        "cut": lambda self, *what: self._power.arm(*what),
        "recut": lambda self, *what: self._disturb_later(Step("recut", what)),
        "refail": lambda self, *what: self._disturb_later(Step("refail", what)),
    }

    # Power cuts

    def _after_cut(self) -> None:
        """Recover what the power cut left, with what befalls the recovery; judge it, and go on with it."""
        with suppress(PowerCut, OSError, JqcowError):
            self.player.leave(PowerCut())
        self._session.image = None
        left = self._power.restore("cuts")
        assert left is not None and left[1] is not None
        state, expectation = left
        self._heal()
        device = self._session.device.crash(state)
        for step in self._power.later:
            device, state = self._disturb_recovery(device, state, expectation, step)
        Judge()(device.killed(), expectation.copy(), state)
        self._go_on(device, expectation)

    def _disturb_recovery(
        self, device: SimulatedDevice, state: CrashState, expectation: Expectation, step: Step
    ) -> tuple[SimulatedDevice, CrashState]:
        """Recover a crashed device, and cut the power or let the host fail on the way."""
        if step.kind == "refail":
            failed = fail_recovery(device, expectation, fault_of(*step.arguments))
            self._tally.counts["recoveries failed"] += failed
            return device, state
        later = self._power.later
        self._power.arm(*map(int, step.arguments))
        self._power.later = later
        self._power.watch(device)
        try:
            recover_and_close(device)
        except (PowerCut, OSError, JqcowError):
            if self._power.left is None:
                raise
        left = self._power.restore("recovery cuts")
        if left is None:
            # It came to its end before.
            device.change_listeners.clear()
            device.barrier_listeners.clear()
            return device, state
        return device.crash(left[0]), left[0]

    def _go_on(self, device: SimulatedDevice, expectation: Expectation) -> None:
        """The next user takes the image as it was found."""
        written = self._session.written
        if not expectation.exists:
            self.player.session = self._new_session(written)
            return
        image = recover(device)
        expectation.adopt(image)
        self.player.session = self._use(device, expectation, written)
        self.player.session.image = image


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
