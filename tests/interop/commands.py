"""What jqcow's commands say, held to what qemu-img says of the same files."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jqcow.cli import main
from tests.support.qemu import done, run


def ours(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command of ours that must succeed; return what it printed."""
    capsys.readouterr()
    code = main.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    assert code == 0, told.err
    return told.out


def plain(extents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a map without the field that older versions of qemu-img do not have."""
    return [{name: value for name, value in extent.items() if name != "compressed"} for extent in extents]


def require_same_map(capsys: pytest.CaptureFixture[str], path: object, *limits: str) -> list[dict[str, Any]]:
    """Both print the same map of a chain, as JSON and as text; return it."""
    told = json.loads(ours(capsys, "map", "--allow-files", "--output=json", *limits, path))
    assert plain(told) == plain(json.loads(done("qemu-img", "map", "--output=json", *limits, path)))
    theirs = run("qemu-img", "map", *limits, path)
    if theirs.returncode == 0:
        assert ours(capsys, "map", "--allow-files", *limits, path) == theirs.stdout
    else:
        assert main.main(["map", "--allow-files", *limits, str(path)]) == 1
        assert any(extent.get("compressed") for extent in told)
    return plain(told)


def require_same_info(capsys: pytest.CaptureFixture[str], path: object) -> None:
    """Both tell the same of each image of a chain, as JSON and as text."""
    command = ("info", "--backing-chain")
    told = json.loads(ours(capsys, *command, "--allow-files", "--output=json", path))
    theirs = json.loads(done("qemu-img", *command, "--output=json", path))
    for facts in theirs:
        facts.pop("children", None)
    assert told == theirs
    assert ours(capsys, *command, "--allow-files", path) == done("qemu-img", *command, path)
    assert ours(capsys, "info", path) == done("qemu-img", "info", path)


def require_same_check(capsys: pytest.CaptureFixture[str], path: object) -> dict[str, Any]:
    """Both find the same, and nothing wrong, as JSON and as text; return it."""
    told: dict[str, Any] = json.loads(ours(capsys, "check", "--output=json", path))
    assert told == json.loads(done("qemu-img", "check", "--output=json", path))
    assert ours(capsys, "check", path) == done("qemu-img", "check", path)
    return told
