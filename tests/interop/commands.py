"""What jqcow's commands say, held to what qemu-img says of the same files."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from jqcow.cli import main
from tests.support.qemu import done, run

UNKNOWN_FEATURES = r" +unknown features:\n( +\[\d+\]: .*\n)+"
"""What jqcow alone tells: the bits of features that it does not know."""


class Printed(NamedTuple):
    """What was printed since the last look."""

    out: str
    err: str


class Capture(Protocol):
    """What tells what was printed, such as pytest's `capsys`."""

    def readouterr(self) -> Any: ...


class Captured:
    """What is printed within, where no pytest is."""

    def __init__(self, *streams: io.StringIO) -> None:
        self._streams = streams

    def readouterr(self) -> Printed:
        """Return what was printed, and forget it."""
        printed = Printed(*(stream.getvalue() for stream in self._streams))
        for stream in self._streams:
            stream.seek(0)
            stream.truncate()
        return printed


@contextlib.contextmanager
def capturing() -> Iterator[Captured]:
    """Take what is printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield Captured(out, err)


def ours(capsys: Capture, *arguments: object) -> str:
    """Run a command of ours that must succeed; return what it printed."""
    capsys.readouterr()
    code = main.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    assert code == 0, told.err
    return told.out


def plain(extents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a map without the field that older versions of qemu-img lack, nor the cuts that it makes."""
    found: list[dict[str, Any]] = []
    for extent in extents:
        line = {name: value for name, value in extent.items() if name != "compressed"}
        last = found[-1] if found else {}
        joins = last and "offset" not in last and last["start"] + last["length"] == line["start"]
        if joins and {**line, "start": 0, "length": 0} == {**last, "start": 0, "length": 0}:
            last["length"] += line["length"]
        else:
            found.append(line)
    return found


def require_same_map(
    capsys: Capture, path: object, *limits: str, for_qemu: Sequence[object] = ()
) -> list[dict[str, Any]]:
    """Both print the same map of a chain, as JSON and as text; return it. QEMU may need more words."""
    image = for_qemu or (path,)
    told = json.loads(ours(capsys, "map", "--allow-files", "--output=json", *limits, path))
    assert plain(told) == plain(json.loads(done("qemu-img", "map", "--output=json", *limits, *image)))
    theirs = run("qemu-img", "map", *limits, *image)
    if theirs.returncode == 0:
        assert ours(capsys, "map", "--allow-files", *limits, path) == theirs.stdout
    else:
        assert main.main(["map", "--allow-files", *limits, str(path)]) == 1
        assert any(extent["data"] and "offset" not in extent for extent in told)
    return plain(told)


def require_same_info(capsys: Capture, path: object) -> None:
    """Both tell the same of each image of a chain, as JSON and as text; jqcow tells of unknown bits too."""
    command = ("info", "--backing-chain")
    told = json.loads(ours(capsys, *command, "--allow-files", "--output=json", path))
    for facts in told:
        facts.get("format-specific", {}).get("data", {}).pop("unknown-features", None)
    theirs = json.loads(done("qemu-img", *command, "--output=json", path))
    for facts in theirs:
        facts.pop("children", None)
    assert told == theirs
    text = re.sub(UNKNOWN_FEATURES, "", ours(capsys, *command, "--allow-files", path))
    assert text == done("qemu-img", *command, path)
    assert re.sub(UNKNOWN_FEATURES, "", ours(capsys, "info", path)) == done("qemu-img", "info", path)


def require_same_check(
    capsys: Capture, path: object, *, for_qemu: Sequence[object] = (), is_clean: bool = True
) -> dict[str, Any]:
    """Both find the same, as JSON and, where nothing is wrong, as text; return it."""
    capsys.readouterr()
    code = main.main(["check", "--output=json", str(path)])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    theirs = run("qemu-img", "check", "--output=json", *(for_qemu or (path,)))
    assert (code, told) == (theirs.returncode, {**json.loads(theirs.stdout), "filename": str(path)})
    assert not is_clean or code == 0, told
    if for_qemu or not is_clean:
        return told
    assert ours(capsys, "check", path) == done("qemu-img", "check", path)
    return told
