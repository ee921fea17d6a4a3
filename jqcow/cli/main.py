"""``jqcow``: the subcommands, named and spelled as in qemu-img where it has the verb."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Sequence

from jqcow.cli import common

PROGRAM = "jqcow"
GROUPS = {
    "images": ("create", "resize"),
    "looking": ("info", "check", "map", "journal", "undo"),
    "snapshots": ("snapshot",),
    "amending": ("amend",),
    "bitmaps": ("bitmap",),
    "passphrases": ("passphrase",),
    "chains": ("commit", "rebase"),
    "copying": ("convert",),
    "measuring": ("measure",),
    "protecting": ("protect", "verify", "heal"),
}
"""The modules of this package that have commands: what a command does not need is not imported."""
_NEGATIVE = re.compile(r"-\.?\d", re.ASCII)

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


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line; with the name of a command that of its module's alone."""
    parser = common.Parser(
        prog=PROGRAM,
        description="qcow2 images whose metadata changes are transactions.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common.add_version(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in [module for module, names in GROUPS.items() if command in names] or GROUPS:
        importlib.import_module(f"jqcow.cli.{module}").add_parsers(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; return its exit code."""
    words = common.arguments_of(argv)
    arguments = build_parser(words[0] if words else None).parse_args(_with_signed_size(words))
    return common.run(PROGRAM, lambda: int(arguments.command(arguments)))


def _with_signed_size(arguments: Sequence[str]) -> Sequence[str]:
    """Mark the last argument of ``resize`` as no option where it is a size with a minus sign."""
    if list(arguments[:1]) == ["resize"] and _NEGATIVE.match(arguments[-1]) and arguments[-2] != "--":
        return [*arguments[:-1], "--", arguments[-1]]
    return arguments
