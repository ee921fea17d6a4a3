"""Patches: a method, a function or a number of jqcow, replaced while a trial runs.

A target is named ``jqcow.engine.space:Space.take``: a module, then the path to what is defined there. Patch a
function or a number in the module that looks it up, which need not be the one that defines it.

Each patch is made by one of the functions below. They wrap what they replace, so that a patch does not
repeat the code that it spoils, and outlives a change of it. Two limits hold a patch back: with ``during`` it
acts only in calls that come, directly or not, from another target; with ``only`` where a predicate of the
call's arguments is true. A patch notes whether it was *reached*: whether it took effect at least once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, TypedDict, Unpack

Function = Callable[..., Any]
NUMBER_METHODS = (
    *(f"__{side}{name}__" for side in ("", "r") for name in ("add", "sub", "mul", "floordiv", "mod")),
    *(f"__{name}__" for name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "bool")),
)


class PatchError(Exception):
    """A patch does not fit the code any more: what it names is gone."""


class Limits(TypedDict, total=False):
    """When a patch acts: in calls from the target ``during``, and where ``only(*arguments)`` is true."""

    during: str
    only: Callable[..., object]


@dataclass(frozen=True)
class Place:
    """Where a target stands: ``found`` is what ``owner`` defines as ``name``."""

    owner: Any
    name: str
    found: object

    @classmethod
    def of(cls, target: str) -> Place:
        """Return the place of a target.

        Raises:
            PatchError: there is no such module, class or function, or the class only inherits it.
        """
        module, _, path = target.partition(":")
        try:
            owner: Any = importlib.import_module(module)
            *outer, name = path.split(".")
            for part in outer:
                owner = vars(owner)[part]
            return cls(owner, name, vars(owner)[name])
        except (ImportError, KeyError, TypeError) as error:
            raise PatchError(f"the target {target} is gone: {type(error).__name__}: {error}") from error

    @property
    def function(self) -> Function:
        """The function that is called there.

        Raises:
            PatchError: it is none.
        """
        found = self.found
        if isinstance(found, property) and found.fget is not None:
            return found.fget
        if isinstance(found, classmethod | staticmethod):
            return found.__func__
        if isinstance(found, FunctionType):
            return found
        raise PatchError(f"{self.name} of {self.owner} is not a function")

    @contextmanager
    def holding(self, function: Function) -> Iterator[None]:
        """Have another function called there."""
        kind: Any = type(self.found)
        setattr(self.owner, self.name, function if kind is FunctionType else kind(function))
        try:
            yield
        finally:
            setattr(self.owner, self.name, self.found)


@dataclass
class Call:
    """A call of a patched function, for the patch to do as it likes."""

    patch: Patch
    original: Function
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def proceed(self) -> Any:
        """Call the original; return its result."""
        return self.original(*self.arguments, **self.named)

    def bound(self) -> inspect.BoundArguments:
        """Return the arguments by their names, defaults included."""
        bound = inspect.signature(self.original).bind(*self.arguments, **self.named)
        bound.apply_defaults()
        return bound

    def attribute(self, path: str) -> Attribute:
        """Return the attribute that ``path`` names, from a parameter on: ``self.turn.lock``."""
        parameter, *outer, name = path.split(".")
        owner = functools.reduce(getattr, outer, self.bound().arguments[parameter])
        return Attribute(owner, name, getattr(owner, name))


@dataclass(frozen=True)
class Attribute:
    """An attribute of an object, and its value when it was looked up."""

    owner: Any
    name: str
    value: Any

    def set(self, value: Any) -> bool:
        """Set the attribute; return whether that changes it."""
        is_other: bool = getattr(self.owner, self.name) != value
        setattr(self.owner, self.name, value)
        return is_other


class _Depth(threading.local):
    """How many calls of a function the running thread is in."""

    value = 0


@dataclass
class Patch:
    """One target, and ``around``, which stands in for its calls; ``parameters`` are those that it names."""

    target: str
    around: Callable[[Call], Any]
    limits: Limits
    parameters: tuple[str, ...] = ()
    reached: bool = field(default=False, init=False)

    def reach(self, reached: object = True) -> None:
        """Note that the patch took effect, where that is so."""
        self.reached = self.reached or bool(reached)

    def check(self) -> None:
        """Raise PatchError unless everything is there that the patch names."""
        parameters = inspect.signature(Place.of(self.target).function).parameters
        for name in self.parameters:
            if name not in parameters:
                raise PatchError(f"{self.target} has no parameter {name}")
        during = self.limits.get("during")
        if during is not None and inspect.isgeneratorfunction(Place.of(during).function):
            raise PatchError(f"{during} is a generator: its call is over before it runs")

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the patch in place; raises PatchError where it does not fit."""
        self.check()
        self.reached = False
        depth, during = _Depth(), self.limits.get("during")
        with ExitStack() as stack:
            if during is not None:
                outer = Place.of(during)
                stack.enter_context(outer.holding(_counted(outer.function, depth)))
            place = Place.of(self.target)
            stack.enter_context(place.holding(self._wrapped(place.function, depth)))
            yield

    def _wrapped(self, original: Function, depth: _Depth) -> Function:
        is_limited, only = "during" in self.limits, self.limits.get("only")

        @functools.wraps(original)
        def wrapper(*arguments: Any, **named: Any) -> Any:
            if (is_limited and not depth.value) or (only is not None and not only(*arguments, **named)):
                return original(*arguments, **named)
            return self.around(Call(self, original, arguments, named))

        return wrapper


def _counted(original: Function, depth: _Depth) -> Function:
    @functools.wraps(original)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        depth.value += 1
        try:
            return original(*arguments, **named)
        finally:
            depth.value -= 1

    return wrapper


@dataclass
class Number:
    """A number of a module, which has another value; reached when it is computed with, or compared."""

    target: str
    value: int
    reached: bool = field(default=False, init=False)

    def check(self) -> None:
        """Raise PatchError unless the number is there."""
        found = Place.of(self.target).found
        if not isinstance(found, int) or found == self.value:
            raise PatchError(f"{self.target} is {found!r}, and was to be {self.value}")

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the number replaced; raises PatchError where it is gone."""
        self.check()
        self.reached = False
        place = Place.of(self.target)
        setattr(place.owner, place.name, self._telling())
        try:
            yield
        finally:
            setattr(place.owner, place.name, place.found)

    def _telling(self) -> int:
        """Return the value as a number that tells of its use."""

        def telling(name: str) -> Function:
            def method(number: int, *others: int) -> Any:
                self.reached = True
                return getattr(int, name)(number, *others)

            return method

        methods = {name: telling(name) for name in NUMBER_METHODS} | {"__hash__": int.__hash__}
        number: int = type("TellingNumber", (int,), methods)(self.value)
        return number


def replacing(target: str, replacement: Function, **limits: Unpack[Limits]) -> Patch:
    """Call ``replacement(original, *arguments)`` instead."""

    def around(call: Call) -> Any:
        call.patch.reach()
        return replacement(call.original, *call.arguments, **call.named)

    return Patch(target, around, limits)


def returning(target: str, value: Any, **limits: Unpack[Limits]) -> Patch:
    """Leave out the call; it returns ``value``."""
    return replacing(target, lambda *_, **__: value, **limits)


def skipping(target: str, **limits: Unpack[Limits]) -> Patch:
    """Leave out the call."""
    return returning(target, None, **limits)


def with_result(target: str, change: Callable[[Any], Any], **limits: Unpack[Limits]) -> Patch:
    """Make the call return ``change(result)``; reached once that is another result."""

    def around(call: Call) -> Any:
        result = call.proceed()
        changed = change(result)
        call.patch.reach(changed != result)
        return changed

    return Patch(target, around, limits)


def with_argument(
    target: str, parameter: str, change: Callable[[Any], Any], **limits: Unpack[Limits]
) -> Patch:
    """Call with ``change(argument)`` for a parameter; reached once that is another argument."""

    def around(call: Call) -> Any:
        bound = call.bound()
        before = bound.arguments[parameter]
        bound.arguments[parameter] = change(before)
        call.patch.reach(bound.arguments[parameter] != before)
        return call.original(*bound.args, **bound.kwargs)

    return Patch(target, around, limits, (parameter,))


def before(target: str, action: Function, **limits: Unpack[Limits]) -> Patch:
    """Call ``action(*arguments)`` first."""

    def around(call: Call) -> Any:
        call.patch.reach()
        action(*call.arguments, **call.named)
        return call.proceed()

    return Patch(target, around, limits)


def after(target: str, action: Function, **limits: Unpack[Limits]) -> Patch:
    """Call ``action(result, *arguments)`` once the call has succeeded."""

    def around(call: Call) -> Any:
        result = call.proceed()
        call.patch.reach()
        action(result, *call.arguments, **call.named)
        return result

    return Patch(target, around, limits)


def holding(target: str, path: str, value: Any, **limits: Unpack[Limits]) -> Patch:
    """Let an attribute have ``value`` during the call. ``path`` starts at a parameter: ``self.lock``."""

    def around(call: Call) -> Any:
        attribute = call.attribute(path)
        call.patch.reach(attribute.set(value))
        try:
            return call.proceed()
        finally:
            attribute.set(attribute.value)

    return Patch(target, around, limits, (path.partition(".")[0],))


def restoring(target: str, path: str, **limits: Unpack[Limits]) -> Patch:
    """Give an attribute back, after the call, the value from before it, also where the call fails."""

    def around(call: Call) -> Any:
        attribute = call.attribute(path)
        try:
            return call.proceed()
        finally:
            call.patch.reach(attribute.set(attribute.value))

    return Patch(target, around, limits, (path.partition(".")[0],))


def setting(target: str, path: str, make: Callable[[], Any], **limits: Unpack[Limits]) -> Patch:
    """Give an attribute the value that ``make()`` returns once the call has succeeded."""

    def around(call: Call) -> Any:
        result = call.proceed()
        call.patch.reach(call.attribute(path).set(make()))
        return result

    return Patch(target, around, limits, (path.partition(".")[0],))
