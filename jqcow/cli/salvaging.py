"""The part of ``jqcow-recover`` about damaged images: diagnose, salvage, repair in place."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from jqcow.cli import common, secrets
from jqcow.cli.diagnosis_text import diagnosis_lines, in_place_lines, salvage_lines
from jqcow.cli.progress import add_progress, progress_of
from jqcow.errors import JqcowError
from jqcow.offline.salvage import diagnose, salvage
from jqcow.offline.salvaging.in_place import repair_in_place
from jqcow.salvage.diagnosis import Diagnosis

Report = TypeVar("Report")
MODES = ("undo", "salvage", "in_place", "diagnose")
_ALLOWED = {
    "deep": ("diagnose",),
    "picture": ("diagnose",),
    "target_format": ("salvage",),
    "certain_only": ("salvage",),
    "snapshot": ("salvage",),
    "report": ("salvage",),
    "map": ("salvage", "diagnose"),
    "force": ("undo",),
    "dry_run": (),
    "no_check": (),
    "journal_size": (),
    "progress": ("salvage",),
    "allow_files": ("salvage", "diagnose", "in_place"),
    "probe": ("salvage", "diagnose", "in_place"),
    "passphrase_file": ("salvage", "diagnose", "in_place"),
    "passphrase_fd": ("salvage", "diagnose", "in_place"),
}
"""With which modes an option goes; those of none go with a plain recovery."""
_DESTINATIONS = {"target_format": "-O", "progress": "--progress"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options about damaged images."""
    damaged = parser.add_argument_group("damaged images")
    damaged.add_argument(
        "--diagnose", action="store_true", help="tell what is damaged and what can be had back; write nothing"
    )
    damaged.add_argument(
        "--deep", action="store_true", help="with --diagnose: place what no table names, and count exactly"
    )
    damaged.add_argument(
        "--picture", metavar="FILE", help="with --diagnose: draw file and disk into a new .svg or .html file"
    )
    damaged.add_argument(
        "--salvage",
        metavar="TARGET",
        help="write what can be had back into a new file; goes on where it was cut off",
    )
    damaged.add_argument(
        "-O", dest="target_format", choices=common.FORMATS, help="format of TARGET (default: qcow2)"
    )
    damaged.add_argument("--certain-only", action="store_true", help="make zeros of what is not certain")
    damaged.add_argument("--snapshot", metavar="SNAPSHOT", help="have back a snapshot, by id or name")
    damaged.add_argument("--report", metavar="FILE", help="a new JSON file that tells of every guest range")
    damaged.add_argument(
        "--map", metavar="FILE", help="a map of GNU ddrescue: what of IMAGE is bad; a salvage adds to it"
    )
    damaged.add_argument(
        "--in-place", action="store_true", help="give IMAGE new tables, after an undo file was written"
    )
    secrets.add_passphrase(parser)
    common.add_allow_files(parser)
    add_progress(parser)


def mode_of(arguments: argparse.Namespace) -> str | None:
    """Return what is asked for, None for a recovery; refuse options that say nothing of it.

    Raises:
        CommandError: two modes, or an option that does not go with the mode.
    """
    chosen = [mode for mode in MODES if getattr(arguments, mode)]
    if not chosen and (arguments.deep or arguments.picture):
        chosen = ["diagnose"]
    if len(chosen) > 1:
        raise common.CommandError(f"{_option(chosen[0])} does not go with {_option(chosen[1])}")
    mode = chosen[0] if chosen else None
    for name, modes in _ALLOWED.items():
        if not getattr(arguments, name) or mode in modes:
            continue
        if mode is None and modes:
            raise common.CommandError(f"{_option(name)} goes with {' or '.join(map(_option, modes))} alone")
        if mode is not None:
            raise common.CommandError(f"{_option(name)} does not go with {_option(mode)}")
    return mode


def _option(name: str) -> str:
    return _DESTINATIONS.get(name, "--" + name.replace("_", "-"))


def _below(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the library is told of the files below, and of encryption, in its words."""
    return {
        "allow_files": arguments.allow_files,
        "probe": arguments.probe,
        "passphrase": secrets.passphrase_of(arguments),
    }


def _print(report: Report, arguments: argparse.Namespace, lines: Callable[[Report], Iterable[str]]) -> None:
    if arguments.output == "json":
        common.print_json(common.as_json(report))
    elif not arguments.quiet:
        print("\n".join(lines(report)))


def damage_of(name: str) -> Diagnosis | None:
    """Return the diagnosis of an image that is damaged; None where recovery is to say what is the matter."""
    with suppress(JqcowError):
        found = diagnose(name)
        return found if found.is_damaged else None
    return None


def print_diagnosis(found: Diagnosis, output: str) -> None:
    """Print a diagnosis."""
    if output == "json":
        common.print_json(common.as_json(found))
    else:
        print("\n".join(diagnosis_lines(found)))


def exit_code(found: Diagnosis) -> int:
    """Return the exit code that a diagnosis stands for."""
    if found.damage_count or found.may_be_lost:
        return common.EXIT_CORRUPT
    return common.EXIT_LEAKS if found.orphan_bytes else common.EXIT_OK


def diagnose_command(arguments: argparse.Namespace) -> int:
    """Diagnose an image."""
    name = arguments.image
    with common.about(name):
        found = diagnose(
            name,
            deep=arguments.deep,
            picture=arguments.picture,
            map_file=arguments.map,
            **_below(arguments),
        )
    print_diagnosis(found, arguments.output)
    return exit_code(found)


def salvage_command(arguments: argparse.Namespace) -> int:
    """Write what can be had back of an image into a new file."""
    name, target = arguments.image, arguments.salvage
    try:
        with common.about(name), progress_of(arguments) as progress:
            report = salvage(
                name,
                target,
                target_format=arguments.target_format or "qcow2",
                snapshot=arguments.snapshot,
                certain_only=arguments.certain_only,
                report=arguments.report,
                map_file=arguments.map,
                progress=progress,
                **_below(arguments),
            )
    except FileExistsError as error:
        error.add_note("a salvage replaces no file: choose another name")
        raise
    except (KeyboardInterrupt, OSError) as error:
        if isinstance(error, KeyboardInterrupt) or error.filename != target:
            print("jqcow-recover: run the same command again to go on where it stopped", file=sys.stderr)
        raise
    _print(report, arguments, salvage_lines)
    return common.EXIT_OK if report.is_whole else common.EXIT_CORRUPT


def in_place_command(arguments: argparse.Namespace) -> int:
    """Give an image new tables."""
    name = arguments.image
    with common.about(name):
        report = repair_in_place(name, **_below(arguments))
    _print(report, arguments, in_place_lines)
    is_whole = not (report.lost or report.likely or report.guess)
    return common.EXIT_OK if is_whole else common.EXIT_CORRUPT
