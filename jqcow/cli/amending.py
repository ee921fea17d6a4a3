"""The command that amends: it gives an existing image other options; spelled as in qemu-img."""

from __future__ import annotations

import argparse
from typing import Any, cast

from jqcow.cli import common, names, secrets
from jqcow.cli.progress import add_progress, progress_of
from jqcow.errors import printable
from jqcow.image.amending import AmendReport
from jqcow.offline.amend import amend
from jqcow.ondisk.amendment import AmendOptions

_OPTIONS = ("compat", "lazy_refcounts", "refcount_bits", "size", "data_file", "data_file_raw")
_REFUSED = {
    "backing_file": "'jqcow rebase' gives an image another backing file",
    "backing_fmt": "'jqcow rebase' gives an image another backing file",
    **dict.fromkeys(
        ("cluster_size", "preallocation", "extended_l2", "compression_type", "encryption"),
        "it is for new images alone: use 'jqcow convert'",
    ),
}
"""Why other options are not amended, by their names."""


def add_parsers(commands: Any) -> None:
    """Add the subcommands of this module."""
    parser = commands.add_parser(
        "amend",
        help="give an image another format",
        description="Give an existing qcow2 image another version, another width of refcounts, lazy "
        "refcounts or another size, whole or not at all. A crashed image is recovered first.",
    )
    common.add_format(parser)
    names.add_image_opts(parser)
    names.add_objects(parser)
    common.add_cache(parser, "-t")
    parser.add_argument(
        "--force",
        action="store_true",
        help="as jqcow-img, of key slots: replace one in use, erase the last one",
    )
    parser.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        required=True,
        help="compat=1.1|0.10, lazy_refcounts=on|off, refcount_bits=BITS, size=SIZE, data_file=NAME, "
        "data_file_raw=off",
    )
    parser.add_argument(
        "--shrink", action="store_true", help="allow a smaller disk: what lies behind its end is lost"
    )
    common.add_allow_files(parser)
    secrets.add_passphrase(parser)
    common.add_journal_size(parser)
    add_progress(parser)
    common.add_output(parser)
    common.add_quiet(parser)
    parser.add_argument("image", metavar="IMAGE", nargs="?" if common.profile_of(parser).is_qemu else None)
    parser.set_defaults(command=amend_command)


def amend_command(arguments: argparse.Namespace) -> int:
    """Amend an image."""
    if arguments.profile.is_qemu:
        from jqcow.cli.qemu import changing

        return changing.amend(arguments)
    if arguments.format == "raw":
        raise common.CommandError("a raw file has no options that could be amended")
    options = _options_of(",".join(arguments.options))
    name = arguments.image
    with common.about(name), progress_of(arguments) as progress:
        report = amend(
            name,
            shrink=arguments.shrink,
            allow_files=arguments.allow_files,
            probe=arguments.probe,
            journal_size=common.journal_size_of(arguments),
            passphrase=secrets.passphrase_of(arguments),
            progress=progress,
            **options,
        )
    if arguments.output == "json":
        common.print_json(common.as_json(report))
    elif not arguments.quiet:
        print(_told(name, report))
    return common.EXIT_OK


def _options_of(text: str) -> AmendOptions:
    """Return what -o asks for.

    Raises:
        CommandError: an option that cannot be amended, or that there is not.
    """
    found: dict[str, str] = {}
    for option in common.split_options(text):
        name, _, value = option.partition("=")
        if name in _OPTIONS and value:
            found[name] = value
        else:
            why = _REFUSED.get(name) or (
                "it needs a value" if name in _OPTIONS else "there is no such option"
            )
            why = "'jqcow passphrase' adds and removes passphrases" if name.startswith("encrypt.") else why
            raise common.CommandError(f"the option '{option}' of -o is not amended: {why}")
    if not text:
        raise common.CommandError("-o names no option to amend")
    options = cast(AmendOptions, common.file_options(found))
    if "size" in found:
        options["size"] = common.parse_size(found["size"])
    return options


def _told(name: str, report: AmendReport) -> str:
    done = [
        word.replace("_", " ")
        for word in ("compat", "lazy_refcounts", "refcount_bits", "size", "data_file", "data_file_raw")
        if getattr(report, word)
    ]
    return f"{printable(name)}: {', '.join(done) + ' amended' if done else 'nothing to change'}."
