"""The laboratory: run a workload, cut its power everywhere, and have every outcome judged.

A workload changes a :class:`~jqcow.testing.device.SimulatedDevice` through the code under test and tells a
model what it asked for and what was promised. Just before each barrier completes, and once more at the end,
the laboratory takes crash states of the interval since the previous barrier. It gives each to a *judge*, on
a device of its own, with a copy of the model as it was at that moment. With ``recover``, the recovery of a
crashed device is itself watched and crashed, to the depth asked for.

The interval is named after its barriers, ``from -> to``; it starts at ``start`` and finishes at ``end``.
Within a recovery the name is preceded by ``recovery: ``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Generic, Protocol, TypeVar

from jqcow.testing.crash import CrashSpace, CrashState, GarbageRule, PairSpace, crash_space
from jqcow.testing.device import SimulatedDevice
from jqcow.testing.report import LabReport, Ledger


class Copyable(Protocol):
    """A model: anything with ``copy()``. A ``SectorModel`` is one; so are ``dict``, ``set`` and ``list``."""

    def copy(self) -> Copyable:
        """Return a copy that later changes of the original do not reach."""
        ...


Model = TypeVar("Model", bound=Copyable)
Judge = Callable[[SimulatedDevice, Model, CrashState], object]
Recover = Callable[[SimulatedDevice], object]


@dataclass(frozen=True)
class Workload(Generic[Model]):
    """Something to run on a device, with the means to start it anew.

    ``run(device, model)`` must do the same on every run, or failures cannot be replayed: no clock, no random
    numbers without a seed. ``garbage_allowed`` names the writes that garbage mode covers.
    """

    name: str
    run: Callable[[SimulatedDevice, Model], object]
    make_model: Callable[[], Model]
    make_device: Callable[[], SimulatedDevice] = SimulatedDevice
    garbage_allowed: GarbageRule | None = None


@dataclass(frozen=True)
class LabOptions:
    """How much to try.

    ``budget``          states of one interval of the workload
    ``seed``            of everything random; part of each replay line
    ``depth``           how many crashes in a row: 1 is the workload's crash alone, 2 crashes its recovery too
    ``nested_every``    only every nth state of an interval has its recovery watched
    ``nested_budget``   states of one interval of such a recovery
    ``kill``            also judge the device as a killed writer leaves it, and watch that recovery
    ``target_states``   distinct states that the campaign aims at; with ``max_share``, bounds each workload
    ``max_share``       the largest part of ``target_states`` that one workload may give, 0 to 1
    """

    budget: int = 100
    seed: int = 0
    depth: int = 1
    nested_every: int = 8
    nested_budget: int = 8
    kill: bool = False
    target_states: int | None = None
    max_share: float = 1.0

    def __post_init__(self) -> None:
        if min(self.budget, self.depth, self.nested_every, self.nested_budget) < 1:
            raise ValueError("budgets, depth and nested_every are at least 1")


class CrashFailure(AssertionError):
    """A crash state that the judge, or the recovery, did not accept. The cause is chained.

    ``spec`` names the state as ``kind:index:seed``. ``replay_line`` reproduces it: give it to
    :meth:`Laboratory.replay` with the same workload. Failures can be pickled.
    """

    def __init__(self, workload: str, interval: str, spec: str, replay_line: str, cause: str) -> None:
        super().__init__(workload, interval, spec, replay_line, cause)
        self.workload = workload
        self.interval = interval
        self.spec = spec
        self.replay_line = replay_line
        self.cause = cause

    def __str__(self) -> str:
        return (
            f"{self.cause}\n  workload: {self.workload}\n  interval: {self.interval}\n"
            f"  state:    {self.spec} (kind, index, seed)\n  replay:   {self.replay_line}"
        )


@dataclass(frozen=True)
class _Step:
    """One crash on the way to a state: the number of the interval, and the spec of the state in it."""

    interval: int
    spec: str

    def __str__(self) -> str:
        return f"{self.interval}={self.spec}"

    @classmethod
    def parse(cls, text: str) -> _Step:
        interval, spec = text.split("=")
        return cls(int(interval), spec)


_Visit = Callable[[SimulatedDevice, int, str], None]
"""Called with the device, the number of the interval that ends, and its name."""


class _Watch:
    """Follows the barriers of one device and calls ``visit`` at the end of each interval."""

    def __init__(self, device: SimulatedDevice, visit: _Visit, ledger: Ledger, prefix: str = "") -> None:
        self._device = device
        self._visit = visit
        self._ledger = ledger
        self._prefix = prefix
        self._previous = "start"
        self.interval_count = 0
        for watched in self._devices():
            watched.barrier_listeners.append(self._at_barrier)

    def _devices(self) -> list[SimulatedDevice]:
        return [self._device] if self._device.companion is None else [self._device, self._device.companion]

    def _at_barrier(self, name: str, device: SimulatedDevice) -> None:
        self._ledger.barrier(name)
        self._end_interval(name)

    def finish(self) -> None:
        """End the last interval and stop listening."""
        for watched in self._devices():
            watched.barrier_listeners.remove(self._at_barrier)
        self._end_interval("end")

    def _end_interval(self, name: str) -> None:
        interval = f"{self._prefix}{self._previous} -> {name}"
        self._ledger.enter_interval(interval)
        number = self.interval_count
        self.interval_count += 1
        self._previous = name
        self._visit(self._device, number, interval)


class Laboratory(Generic[Model]):
    """Runs workloads and has their crash states judged; counts what it saw.

    ``judge(device, model, state)`` gets a fresh device that nobody else uses, and the model of the moment of
    the crash. It may recover the device, read it, write to it; it raises any ``Exception`` if a promise is
    broken. ``recover(device)`` only recovers, as a user's next start would; raising is a failure too.
    """

    def __init__(
        self,
        judge: Judge[Model],
        *,
        recover: Recover | None = None,
        options: LabOptions | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.ledger = ledger if ledger is not None else Ledger()
        self._judge = judge
        self._recover = recover
        self._options = options if options is not None else LabOptions()

    def run(self, workload: Workload[Model], *, drop_barriers: Iterable[str] = ()) -> None:
        """Run a workload and judge its crash states.

        ``drop_barriers`` do nothing in this run, to show what they are for. Raises :class:`CrashFailure`
        for the first state that is not accepted, once the workload has ended; else what the workload raises.
        """
        quota = self._quota(workload, drop_barriers)
        _Run(self, workload, quota=quota).execute(drop_barriers)

    def replay(self, workload: Workload[Model], line: str, *, drop_barriers: Iterable[str] = ()) -> None:
        """Judge again the one state that the replay line of a :class:`CrashFailure` names. Counts nothing."""
        name, *steps = line.split(" ")
        if name != workload.name.replace(" ", "_"):
            raise ValueError(f"the line is of workload {name}, not {workload.name}")
        route = [_Step.parse(step) for step in steps]
        uncounted = Laboratory(self._judge, recover=self._recover, options=self._options)
        run = _Run(uncounted, workload, quota=None, route=route)
        run.execute(drop_barriers)
        if not run.arrived:
            raise ValueError(f"the workload did not come by the state of {line}")

    def report(self) -> LabReport:
        """Return the counts so far."""
        return self.ledger.report()

    def _quota(self, workload: Workload[Model], drop_barriers: Iterable[str]) -> int | None:
        """Return how many distinct states each interval may give, or None if there is no bound.

        A rehearsal counts the intervals, so that the early ones leave something to the late ones.
        """
        if self._options.target_states is None:
            return None
        allowed = int(self._options.target_states * self._options.max_share)
        allowed -= self.ledger.distinct_of(workload.name)
        device = workload.make_device()
        device.drop_barriers.update(drop_barriers)
        watch = _Watch(device, lambda device, number, interval: None, Ledger())
        workload.run(device, workload.make_model())
        watch.finish()
        return max(0, allowed // watch.interval_count)


class _Run(Generic[Model]):
    """One run of one workload: a search of all states, or the walk to one of them along a route."""

    def __init__(
        self,
        lab: Laboratory[Model],
        workload: Workload[Model],
        *,
        quota: int | None,
        route: list[_Step] | None = None,
    ) -> None:
        self._lab = lab
        self._options = lab._options
        self._workload = workload
        self._route = route
        self._quota = quota
        self._limit: float = math.inf
        self._failure: CrashFailure | None = None
        self.arrived = False

    def execute(self, drop_barriers: Iterable[str]) -> None:
        """Run the workload to its end; raise the first failure, or what the workload raised."""
        model = self._workload.make_model()
        device = self._workload.make_device()
        device.drop_barriers.update(drop_barriers)

        def visit(device: SimulatedDevice, number: int, interval: str) -> None:
            self._limit = self._distinct() + self._quota if self._quota is not None else math.inf
            self._visit(device, model, interval, (), number)

        watch = _Watch(device, visit, self._lab.ledger)
        try:
            self._workload.run(device, model)
            watch.finish()
        finally:
            # A failure is kept back until here: inside a barrier, the code under test might swallow it.
            if self._failure is not None:
                raise self._failure

    def _visit(
        self, device: SimulatedDevice, model: Model, interval: str, path: tuple[_Step, ...], number: int
    ) -> None:
        """Judge the states of an interval that ends now."""
        if self._failure is not None or self._distinct() >= self._limit:
            return
        seed = self._seed_of(path, number)
        space = crash_space(device, seed=seed, garbage_allowed=self._workload.garbage_allowed)
        for ordinal, state in enumerate(self._choose(space, path, number)):
            if self._failure is not None or self._distinct() >= self._limit:
                return
            crashed = device.killed() if state.kind == "killed" else device.crash(state)
            here = (*path, _Step(number, state.spec))
            self._examine(crashed, model, interval, here, state, ordinal)

    def _choose(
        self, space: CrashSpace | PairSpace, path: tuple[_Step, ...], number: int
    ) -> Iterator[CrashState]:
        if self._route is not None:
            wanted = self._route[len(path)] if len(path) < len(self._route) else None
            if wanted is not None and wanted.interval == number:
                yield space.state(wanted.spec)
            return
        if self._options.kill:
            yield space.state(f"killed:0:{space.seed}")
        yield from space.states(self._options.nested_budget if path else self._options.budget)

    def _examine(
        self,
        crashed: SimulatedDevice,
        model: Model,
        interval: str,
        path: tuple[_Step, ...],
        state: CrashState,
        ordinal: int,
    ) -> None:
        if self._route is not None and len(path) < len(self._route):
            self._watch_recovery(crashed, model, path, state, interval)
            return
        self.arrived = True
        if state.kind != "killed":
            self._lab.ledger.record(self._workload.name, interval, state.digest, in_flight=state.in_flight)
        watched = self._is_watched(state, ordinal, len(path))
        twin = crashed.killed() if watched else None
        self._guard(interval, path, state, lambda: self._lab._judge(crashed, _copy(model), state))
        if twin is not None and self._failure is None:
            self._watch_recovery(twin, model, path, state, interval)

    def _is_watched(self, state: CrashState, ordinal: int, crashes: int) -> bool:
        if self._lab._recover is None:
            return False
        is_sampled = state.kind == "killed" or ordinal % self._options.nested_every == 0
        return is_sampled and crashes < self._options.depth

    def _watch_recovery(
        self,
        device: SimulatedDevice,
        model: Model,
        path: tuple[_Step, ...],
        state: CrashState,
        interval: str,
    ) -> None:
        recover = self._lab._recover
        if recover is None:
            return

        def visit(device: SimulatedDevice, number: int, inner: str) -> None:
            self._visit(device, model, inner, path, number)

        watch = _Watch(device, visit, self._lab.ledger, prefix="recovery: ")

        def watched() -> None:
            recover(device)
            watch.finish()

        self._guard(interval, path, state, watched)

    def _guard(
        self, interval: str, path: tuple[_Step, ...], state: CrashState, action: Callable[[], object]
    ) -> None:
        """Do ``action``; keep what it raises as the failure of this run, unless one is kept already."""
        try:
            action()
        except Exception as error:
            if self._failure is None:
                line = " ".join([self._workload.name.replace(" ", "_"), *map(str, path)])
                cause = f"{type(error).__name__}: {error}"
                self._failure = CrashFailure(self._workload.name, interval, state.spec, line, cause)
                self._failure.__cause__ = error

    def _distinct(self) -> int:
        return self._lab.ledger.distinct_of(self._workload.name)

    def _seed_of(self, path: tuple[_Step, ...], number: int) -> int:
        """Derive the seed of an interval, so that equal-looking intervals are not cut in the same places."""
        text = "/".join([str(self._options.seed), self._workload.name, *map(str, path), str(number)])
        return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big")


def _copy(model: Model) -> Model:
    twin = model.copy()
    if not isinstance(twin, type(model)):
        raise TypeError(f"{type(model).__name__}.copy() returned a {type(twin).__name__}")
    return twin
