"""The backups of docs/how-to: whatever is cut off, the next one goes on; a restore gives the same bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import jqcow
from jqcow.cli.main import main
from tests.support.qemu import done

PAGE = (Path(__file__).parents[2] / "docs" / "how-to.md").read_text(encoding="utf-8")
MIB = 1 << 20


class Cut(Exception):
    """The program ended here."""


@pytest.fixture
def back_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], int]:
    """Return the recipe's function; what the recipe itself does is left behind in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    block = re.findall(r"## Back up what changed\n.*?```python\n(.*?)```", PAGE, re.DOTALL)[0]
    names: dict[str, Any] = {"jqcow": jqcow}
    exec(compile(block, "how-to", "exec"), names)
    found: Callable[[str, str], int] = names["back_up"]
    return found


@contextmanager
def cut_at(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int, *, late: bool
) -> Iterator[None]:
    """End the program at a call of a function, before it or after it."""
    calls, original = 0, getattr(module, name)

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not late:
            raise Cut
        result = original(*arguments, **named)
        if calls == number:
            raise Cut
        return result

    with monkeypatch.context() as patched:
        patched.setattr(module, name, counted)
        with pytest.raises(Cut):
            yield


def data_of(image: jqcow.Image) -> list[tuple[int, int]]:
    return [(part.offset, part.length) for part in image.extents() if part.holds_data]


@pytest.mark.parametrize(
    ("module", "name", "number", "late"),
    [
        (jqcow, "open", 2, False), (jqcow, "create", 1, False), (os, "replace", 1, False),
        (os, "replace", 1, True), (os, "fsync", 1, True), (jqcow, "open", 3, False),
    ],
)  # fmt: skip
def test_a_backup_that_was_cut_off(
    back_up: Callable[[str, str], int],
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    number: int,
    late: bool,
) -> None:
    with jqcow.open("vm.qcow2", "r+") as image:
        image.pwrite(b"third" * 50000, 20 * MIB)
    with cut_at(monkeypatch, module, name, number, late=late):
        back_up("vm.qcow2", "backups")
    with jqcow.open("vm.qcow2", "r+") as image:
        image.pwrite(b"fourth", 50 * MIB)
        image.discard(MIB, 20 * MIB)
    made = back_up("vm.qcow2", "backups")
    # What was cut off is done now; what was written since is in the next one.
    assert made == 2 and back_up("vm.qcow2", "backups") == 3
    source, target = "backups/3.qcow2", "restored.qcow2"
    assert main(["convert", "-q", "-O", "qcow2", "--allow-files", source, target]) == 0
    done("qemu-img", "compare", "-q", "vm.qcow2", target)
    with jqcow.open("vm.qcow2") as image, jqcow.open(target) as restored:
        data, again = (data_of(one) for one in (image, restored))
        assert data == again
        assert [bitmap.name for bitmap in image.bitmaps] == ["4"] and not image.snapshots()
        assert image.check().ok
