"""Targets of the guided fuzzer whose inputs stand for chance: what seeds draw elsewhere, inputs choose."""

from __future__ import annotations

from array import array
from types import ModuleType

from jqcow._native import twins
from tests.crash.simulation import run
from tests.crash.simulation_programs import program_drawn
from tests.fuzz.drawn import Drawn
from tests.fuzz.exercise import Exercise
from tests.fuzz.hostile import drawn_content

ENTRIES_MAX = 64


def images(data: bytes) -> None:
    """Attacks of `tests.fuzz.hostile` on whole images, clean and live."""
    content = drawn_content(Drawn(data))
    exercised = Exercise(content)
    exercised.run()
    exercised.recover()


def images_seeds() -> list[bytes]:
    """Some of everything."""
    return [bytes((start + 37 * at) % 256 for at in range(40)) for start in range(0, 256, 8)]


def recovery(data: bytes) -> None:
    """A program of the simulation: work, faults, power cuts, recoveries that fail and are cut; all judged."""
    run(program_drawn(Drawn(data)))


def recovery_seeds() -> list[bytes]:
    """Some of everything."""
    return [bytes((start + 91 * at) % 256 for at in range(160)) for start in range(0, 256, 8)]


def kernels(data: bytes) -> None:
    """A call of every C kernel, held to its Python twin."""
    from jqcow._native import bindings

    drawn = Drawn(data)
    order, cluster_bits = drawn.number(1) % 7, 9 + drawn.number(1) % 13
    start, stop, value = drawn.number(2), drawn.number(2), drawn.number(8)
    buffer = drawn.take(4096)
    count = (len(buffer) << 3) >> order
    start, stop = sorted((start % (count + 1), stop % (count + 1)))
    fitting = value >> (64 - (1 << order))
    calls: dict[str, tuple[object, ...]] = {
        "crc32c": (value & 0xFFFFFFFF,),
        "is_zero": (),
        "refcount_find_zero": (order, start, stop),
        "refcount_find_used": (order, start, stop),
        "refcount_last_used": (order,),
        "refcount_run": (order, start, stop),
        "refcount_get": (start, order),
        "refcount_set": (start, order, value & ((1 << (1 << order)) - 1)),
        "refcount_add": (order, start, stop, fitting if drawn.number(1) % 2 else -fitting),
        "l2_run": (start % (len(buffer) // 8 + 1), 1 + stop, cluster_bits),
        "subcluster_run": (start % (len(buffer) // 16 * 32 + 1), 1 + stop, cluster_bits),
        "set_copied": (start % (len(buffer) // 8 + 1), len(buffer) // 8, bool(value & 1)),
    }
    for name, arguments in calls.items():
        told = {module.__name__: outcome(module, name, buffer, arguments) for module in (bindings, twins)}
        assert told[bindings.__name__] == told[twins.__name__], f"{name}{arguments}: {told}"


def outcome(module: ModuleType, name: str, buffer: bytes, arguments: tuple[object, ...]) -> object:
    """Return what a kernel gives, what it leaves in its buffer, and what it raises."""
    given = exact(buffer)
    try:
        return getattr(module, name)(given, *arguments), bytes(given)
    except (IndexError, ValueError, OverflowError) as error:
        return type(error)


def exact(buffer: bytes) -> memoryview:
    """Return a copy that can be written to, with not a byte behind it: a bytearray ends in a hidden zero."""
    # Made of another array, an array has no room to grow.
    return memoryview(array("B", array("B", buffer)))


def kernels_seeds() -> list[bytes]:
    """Buffers of zeros, of ones, and of runs, for each width of a refcount."""
    contents = (bytes(100), b"\xff" * 67, b"\0" * 70 + b"\1" + b"\0" * 9, b"\x80\0\0\0\0\1\0\0" * 9)
    head = bytes([0, 3, 2, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1])
    return [bytes([order]) + head + content for order in range(7) for content in contents]
