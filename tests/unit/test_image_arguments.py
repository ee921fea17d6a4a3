"""The types of arguments: what is none of them raises TypeError, and nothing has happened."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jqcow
from jqcow.disks.making import create_raw
from jqcow.disks.policy import NOT_FOLLOWING
from jqcow.image import arguments
from jqcow.offline.commit import commit
from jqcow.offline.convert import convert
from jqcow.offline.info import check_file, read_chain, read_info, read_snapshots
from jqcow.offline.map import map_file
from jqcow.offline.overlay import base_size, create_overlay
from jqcow.offline.rebase import rebase
from jqcow.offline.records import read_journal
from jqcow.offline.recover import recover_image
from jqcow.ondisk.form import FileOptions
from jqcow.testing import SimulatedDevice

MIB = 1 << 20

FUNCTIONS: list[Callable[..., Any]] = [
    jqcow.create, jqcow.create_on_device, jqcow.open, jqcow.open_device, check_file, commit, convert,
    create_overlay, create_raw, base_size, map_file, read_chain, read_info, read_journal, read_snapshots,
    rebase, recover_image,
]  # fmt: skip
CLASSES = (jqcow.Image, jqcow.Transaction, jqcow.Savepoint, jqcow.ImageFile)

GOOD: dict[str, Any] = {
    "length": 512, "offset": 0, "size": 2 * MIB, "buffer": bytearray(512), "mode": "r+", "id_or_name": "1",
    "name": "n", "backing_file": "base.raw", "backing_format": "raw", "image_format": None,
    "cluster_size": 4096, "refcount_bits": 16, "compression_type": "zlib", "following": NOT_FOLLOWING,
}  # fmt: skip
"""Arguments that would do, by name."""

WRONG: dict[str, list[Any]] = {
    "int": [512.0, "512", None, b"512"],
    "str": [5, b"5"],
    "datetime": ["2020-01-01", 5],
    "ReadableBuffer": [5, "text", None],
    "WriteableBuffer": [5, "text", None],
    "FilePolicy": [5, "/", None],
}


def kinds_of(annotation: str) -> set[str]:
    return {part.strip() for part in annotation.split("|")}


def wrong_values(annotation: str) -> Iterator[Any]:
    """Yield values that are not of an annotated type, as far as that is one that is checked."""
    kinds = kinds_of(annotation)
    if kinds & {"os.PathLike[str]", "Source", "Target"}:
        yield 5.5
    elif "Device" in kinds:
        return
    elif kinds & WRONG.keys():
        for value in WRONG[min(kinds & WRONG.keys())]:
            if not (value is None and "None" in kinds):
                yield value


def cases() -> Iterator[tuple[str, str, Any]]:
    """Yield (function, parameter, wrong value) of all that is public."""
    for function in FUNCTIONS:
        yield from _cases_of(function.__name__, function)
    for public in CLASSES:
        for name, method in vars(public).items():
            if not name.startswith("_") and inspect.isfunction(method):
                yield from _cases_of(f"{public.__name__}.{name}", method)


def _cases_of(name: str, function: Callable[..., Any]) -> Iterator[tuple[str, str, Any]]:
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            for option, annotation in FileOptions.__annotations__.items():
                kind = annotation.__forward_arg__
                for value in [1, "on", None] if kind == "bool" else wrong_values(kind):
                    yield name, option, value
        elif parameter.name != "self":
            for value in wrong_values(str(parameter.annotation)):
                yield name, parameter.name, value


ALL_CASES = list(cases())


def test_the_cases_are_all_there() -> None:
    """What is public and takes a number, a text or a buffer is among them."""
    asked = {(function, parameter) for function, parameter, _ in ALL_CASES}
    assert {("Image.pread", "length"), ("Image.resize", "size"), ("Transaction.discard", "offset")} <= asked
    assert {("open", "path"), ("open", "journal_size"), ("ImageFile.seek", "whence")} <= asked
    assert len(asked) > 60


def small(device: SimulatedDevice) -> jqcow.Image:
    return jqcow.create_on_device(device, MIB, cluster_size=4096, journal_size=64 << 10)


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Whom methods are called on, by the name of the class; and a directory for what takes paths."""
    tmp_path = tmp_path_factory.mktemp("images")
    jqcow.create(tmp_path / "target", MIB).close()
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    device = SimulatedDevice()
    with (
        small(device) as image,
        small(SimulatedDevice()) as other,
    ):
        image.create_snapshot("n")
        with other.transaction() as transaction:
            transaction.create_snapshot("n")
            yield {"Image": image, "Transaction": transaction, "ImageFile": image.as_file(), "": tmp_path}


@pytest.mark.parametrize("function", sorted({function for function, _, _ in ALL_CASES}))
def test_what_is_of_another_type_is_refused(function: str, owners: dict[str, Any]) -> None:
    owner, _, method = function.rpartition(".")
    public = {each.__name__: each for each in FUNCTIONS}
    call = getattr(owners[owner], method) if owner else public[method]
    needed = [
        name
        for name, each in inspect.signature(call).parameters.items()
        if each.default is inspect.Parameter.empty and each.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    before = sorted(owners[""].iterdir())
    for _, parameter, value in (case for case in ALL_CASES if case[0] == function):
        given = {name: _good(name, owners[""], function) for name in needed} | {parameter: value}
        with pytest.raises(TypeError):
            call(**given)
            pytest.fail(f"{function} takes {value!r} as {parameter}")
    assert sorted(owners[""].iterdir()) == before


def _good(name: str, tmp_path: Path, function: str) -> Any:
    if name in ("path", "image", "source", "target"):
        is_new = name == "target" or function.startswith("create")
        return tmp_path / ("new" if is_new else "target")
    if name == "device":
        return SimulatedDevice()
    return GOOD[name]


@pytest.mark.parametrize(
    "call",
    [
        lambda: convert("disk.qcow2", "out", target_format="vmdk"),  # type: ignore[arg-type]
        lambda: convert("disk.qcow2", "out", source_format="vmdk"),  # type: ignore[arg-type]
        lambda: jqcow.open_device(SimulatedDevice(), "w"),  # type: ignore[arg-type]
    ],
)
def test_what_there_is_not_is_refused(
    call: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jqcow.create("disk.qcow2", MIB).close()
    with pytest.raises(ValueError, match=r"vmdk|'w'"):
        call()
    assert not Path("out").exists()


@pytest.mark.parametrize("value", [1.0, object(), [], "a path"])
def test_what_is_no_device_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="methods of a device"):
        jqcow.create_on_device(value, MIB)
    with pytest.raises(TypeError, match="methods of a device"):
        jqcow.open_device(value)
    if not isinstance(value, str):
        with pytest.raises(TypeError, match="methods of a device"):
            recover_image(value)


def test_what_cannot_be_written_is_not_read_into() -> None:
    device = SimulatedDevice()
    with jqcow.create_on_device(device, MIB) as image, image.transaction() as transaction:
        for reader in (transaction.pread_into, lambda buffer, _: image.as_file().readinto(buffer)):
            with pytest.raises(TypeError, match="bytes cannot be written"):
                reader(b"never", 0)  # type: ignore[arg-type]


def test_an_index_is_a_number() -> None:
    """As numpy's numbers are."""

    class Index:
        def __index__(self) -> int:
            return 512

    with jqcow.create_on_device(SimulatedDevice(), MIB) as image:
        image.pwrite(b"x" * 512, Index())  # type: ignore[arg-type]
        assert image.pread(Index(), Index()) == b"x" * 512  # type: ignore[arg-type]
        image.resize(Index())  # type: ignore[arg-type]
        assert image.size == 512 and type(image.size) is int


def test_nothing_is_left_out() -> None:
    assert arguments.optional_number(None) is None and arguments.optional_text(None) is None
    assert arguments.text("a") == "a"
