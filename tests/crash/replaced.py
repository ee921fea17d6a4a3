"""A story of an image and its data file that are replaced, by a process that is killed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jqcow
from jqcow.device import names, targets
from jqcow.device.file import FileDevice
from jqcow.disks import making
from jqcow.errors import JqcowError
from tests.crash.judge import PromiseBroken, require

SIZE = 1 << 20
OLD = b"\x33" * SIZE
NEW = bytes(SIZE // 2)
STEPS_MIN = 4
_CUT_OFF = 9


def replaced_with_its_data_file() -> None:
    """P1: killed while it replaces an image and its data file, a process leaves both, old or new, or none."""
    for in_place in (False, True):
        step = next(step for step in itertools.count() if not _is_cut_off(step, in_place=in_place))
        require(step > STEPS_MIN, "P1: the steps of a replacement", step)


def _is_cut_off(step: int, *, in_place: bool) -> bool:
    """Replace an image, and end the process before a step; return False if it had fewer."""
    with TemporaryDirectory() as folder:
        image, data = Path(folder, "image"), Path(folder, "data")
        for is_first in (True, False):
            with jqcow.create(image, SIZE, data_file=str(data), overwrite=not is_first) as opened:
                opened.pwrite(OLD, 0)
        child = os.fork()
        if not child:
            _replace(image, data, step, in_place=in_place)
        is_cut_off = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == _CUT_OFF
        found = _disk(image)
        require(found in ((OLD, NEW, None) if is_cut_off else (NEW,)), "P1: parts of two images", step)
        return is_cut_off


def _disk(image: Path) -> bytes | None:
    try:
        with jqcow.open(image, allow_files=True) as opened:
            return opened.pread(opened.size, 0)
    except FileNotFoundError:
        return None
    except JqcowError as error:
        raise PromiseBroken(f"P1: a replaced image: {error}") from error


def _replace(image: Path, data: Path, step: int, *, in_place: bool) -> None:
    """In a process of its own: never returns."""
    code = 1
    try:
        numbers = itertools.count()

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*arguments: Any, **named: Any) -> Any:
                if next(numbers) == step:
                    os._exit(_CUT_OFF)
                return call(*arguments, **named)

            return counting

        for owner, name in (
            (os, "rename"),
            (os, "replace"),
            (os, "unlink"),
            (names, "link_unnamed"),
            (names, "rename_without_replacing"),
            (targets.NewContent, "pwrite"),
            (targets.NewContent, "publish"),
        ):
            setattr(owner, name, counted(getattr(owner, name)))
        if in_place:
            new_target: Any = vars(making)["new_target"]

            def target(path: Any, **options: Any) -> Any:
                # As on a block device.
                if path == str(data):
                    return targets._OverDevice(FileDevice.open(path, writable=True))
                return new_target(path, **options)

            vars(making)["new_target"] = target
        options: Any = {"preallocation": "full"}
        jqcow.create(image, len(NEW), data_file=str(data), overwrite=True, **options).close()
        code = 0
    finally:
        os._exit(code)
