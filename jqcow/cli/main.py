"""``jqcow``: the subcommands, named and spelled as in qemu-img where it has the verb.

``jqcow-img`` is the same program with qemu-img's defaults, and so is ``jqcow --like-qemu-img``.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import re
from collections.abc import Sequence
from typing import Any

from jqcow.cli import common, examples
from jqcow.cli.profile import CAREFUL, QEMU_IMG, Profile

PROGRAM = CAREFUL.program
LIKE_QEMU_IMG = "--like-qemu-img"
_NEGATIVE = re.compile(r"-\.?\d", re.ASCII)

GROUPS = {
    "images": ("create", "resize"),
    "looking": ("info", "check", "map", "journal", "undo"),
    "snapshots": ("snapshot",),
    "amending": ("amend",),
    "bitmaps": ("bitmap",),
    "passphrases": ("passphrase",),
    "chains": ("commit", "rebase"),
    "copying": ("convert",),
    "compacting": ("compact",),
    "comparing": ("compare",),
    "benching": ("bench",),
    "dd": ("dd",),
    "exporting": ("export", "import"),
    "differing": ("diff",),
    "measuring": ("measure",),
    "mounting": ("mount",),
    "protecting": ("protect", "verify", "heal"),
    "serving": ("serve",),
}
"""The modules by the commands that they have: only that of the command that runs is imported."""
_GROUP_OF = {command: group for group, commands in GROUPS.items() for command in commands}

_EPILOG = """\
exit codes:
  0   done; check: nothing was found
  1   failed: wrong arguments, not an image, damaged, no permission, an I/O error
  2   check: corruption was found; verify, heal: content is wrong
  3   check: leaked clusters were found, no corruption; verify, heal: there are no sums to go by
  4   another process uses the image
  63  the image has a feature that jqcow does not support, or a format that cannot be checked

A crashed image is brought home by jqcow-recover. Sizes take k, M, G, T, P and E for 2**10 to 2**60.
"""


class _Help(argparse.HelpFormatter):
    """Breaks lines, but not those of examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(examples.TITLE):
            return text
        return super()._fill_text(text, width, indent)


def build_parser(profile: Profile = CAREFUL, command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line: of all commands, or of the one that runs."""
    parser = common.Parser(
        profile=profile,
        prog=profile.program,
        description="qcow2 images whose metadata changes are transactions.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.command = command
    common.add_version(parser)
    parser.add_argument(
        LIKE_QEMU_IMG,
        action="store_true",
        help="as the first argument: take the defaults of qemu-img, as jqcow-img does",
    )
    # What makes a parser serves as its class.
    make: Any = functools.partial(common.Parser, profile=profile)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=make)
    group = _GROUP_OF.get(command or "")
    for name in [group] if group else GROUPS:
        importlib.import_module(f"jqcow.cli.{name}").add_parsers(commands)
    if not profile.is_qemu:
        for name, subparser in commands.choices.items():
            subparser.epilog, subparser.formatter_class = examples.told(name), _Help
    return parser


def main(argv: Sequence[str] | None = None, profile: Profile = CAREFUL) -> int:
    """Run a subcommand; return its exit code."""
    given = list(common.arguments_of(argv))
    if given[:1] == [LIKE_QEMU_IMG]:
        given, profile = given[1:], QEMU_IMG
    parser = build_parser(profile, given[0] if given else None)
    arguments = parser.parse_args(_with_signed_size(given))
    return common.run(profile.program, lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    if getattr(arguments, "output", "human") not in common.OUTPUTS:
        raise common.CommandError("--output must be used with human or json as argument.")
    if getattr(arguments, "image_opts", None) is not None and getattr(arguments, "image", None) is not None:
        from jqcow.cli import names

        names.resolve(arguments)
    return int(arguments.command(arguments))


def main_like_qemu_img(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand with the defaults of qemu-img, whatever it was called as."""
    return main(argv, QEMU_IMG)


def _with_signed_size(arguments: list[str]) -> list[str]:
    """Mark the last argument of ``resize`` as no option where it is a size with a minus sign."""
    if arguments[:1] == ["resize"] and _NEGATIVE.match(arguments[-1]) and "--" not in arguments:
        return [*arguments[:-1], "--", arguments[-1]]
    return arguments
