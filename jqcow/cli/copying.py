"""The command that copies whole disks: convert."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from jqcow.cli import common, names, piped, secrets
from jqcow.cli.common import CommandError, human_size
from jqcow.cli.progress import add_progress, progress_of
from jqcow.errors import printable

if TYPE_CHECKING:
    from jqcow.device.disk import Disk
    from jqcow.disks.chain import Chain
    from jqcow.disks.files import Source
    from jqcow.offline.convert import ConvertReport
    from jqcow.ondisk.naming import DiskFormat

_SNAPSHOT_KEYS = ("snapshot.id=", "snapshot.name=")
SPARSE_BYTES = 4096


def add_parsers(commands: Any) -> None:
    """Add the subcommands of this module."""
    parser = commands.add_parser(
        "convert",
        help="copy a disk into another format",
        description="Copy a disk into a new file, raw or qcow2. Zeros take no space in the target. "
        "The target appears under its name when it is whole and durable.",
    )
    common.add_format(parser)
    common.add_target_format(parser)
    common.add_options(parser, f"{common.FORM_OPTIONS_HELP}, {secrets.ENCRYPTION_HELP}")
    names.add_image_opts(parser)
    names.add_objects(parser)
    secrets.add_passphrase(parser)
    parser.add_argument(
        "-c", dest="compressed", action="store_true", help="compress the clusters of a qcow2 image"
    )
    parser.add_argument(
        "--compression-level",
        type=int,
        metavar="LEVEL",
        help="1-9 for zlib (default: 6), 1-22 for zstd (default: 3)",
    )
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="copy a snapshot, by id or name")
    common.add_allow_files(parser)
    common.add_force_share(parser)
    common.add_overwrite(parser)
    parser.add_argument(
        "--verify", action="store_true", help="reread source and target and compare them, before naming it"
    )
    parser.add_argument(
        "--salvage", action="store_true", help="make zeros of what cannot be read, and say what that is"
    )
    parser.add_argument("--bitmaps", action="store_true", help="copy persistent bitmaps too")
    parser.add_argument(
        "--skip-broken-bitmaps",
        action="store_true",
        help="leave out bitmaps that may be wrong, with a warning",
    )
    _add_targets(parser)
    add_progress(parser)
    common.add_output(parser)
    common.add_quiet(parser)
    parser.add_argument("files", metavar="SOURCE... TARGET", nargs="*")
    parser.set_defaults(command=convert_command)


def _add_targets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-n", dest="into", action="store_true", help="write into TARGET, which exists, in place"
    )
    parser.add_argument(
        "--target-is-zero", action="store_true", help="with -n: TARGET reads as zeros, which are not written"
    )
    parser.add_argument(
        "--target-image-opts", action="store_true", help="with -n: TARGET is named by options"
    )
    parser.add_argument(
        "-B",
        dest="backing_file",
        metavar="BASE",
        help="TARGET is an overlay of BASE, which the source is too",
    )
    parser.add_argument("-F", dest="backing_format", choices=common.formats(parser), help="format of BASE")
    parser.add_argument(
        "-S", dest="sparse", metavar="SIZE", help="so many zeros in data take no space (4k); 0: all take it"
    )
    for name, metavar in (("-m", "COUNT"), ("-r", "RATE"), ("-t", "CACHE"), ("-T", "CACHE")):
        parser.add_argument(
            name, metavar=metavar, dest=f"ignored{name}", help="taken as qemu-img takes it, and not needed"
        )
    parser.add_argument("-W", action="store_true", help="taken as qemu-img takes it, and not needed")
    parser.add_argument("-C", dest="offload", action="store_true", help="the same")


def convert_command(arguments: argparse.Namespace) -> int:
    """Convert a disk."""
    *arguments.sources, arguments.target = arguments.files or [None]
    if arguments.into and arguments.target is not None and piped.is_export(arguments.target):
        # An export is always there, and takes its bytes in order.
        arguments.into = arguments.target_is_zero = False
    if arguments.profile.is_qemu:
        from jqcow.cli.qemu import converting

        return converting.convert(arguments)
    if not arguments.sources:
        raise CommandError("a source and a target are needed")
    _check(arguments)
    if is_copied(arguments):
        copy_disks(arguments)
        return common.EXIT_OK
    for line in print_report(arguments, convert_one(arguments)):
        print(line, file=sys.stderr)
    return common.EXIT_OK


def _check(arguments: argparse.Namespace) -> None:
    piped.check(arguments)
    if arguments.skip_broken_bitmaps and not arguments.bitmaps:
        raise CommandError("--skip-broken-bitmaps is for --bitmaps")
    if not arguments.into and (arguments.target_is_zero or arguments.target_image_opts):
        raise CommandError("--target-is-zero and --target-image-opts are for -n")
    if arguments.into and (arguments.options or arguments.backing_file):
        raise CommandError("-o and -B are about a new target: not with -n")
    if arguments.backing_file is not None and arguments.backing_format is None:
        raise CommandError("a backing file needs its format: -F qcow2 or -F raw")
    if is_copied(arguments) and (arguments.verify or arguments.output == "json"):
        raise CommandError("--verify and --output are for one source and a whole new target")
    if len(arguments.sources) > 1 and (arguments.bitmaps or arguments.snapshot or arguments.backing_file):
        raise CommandError("-l, -B and --bitmaps are for one source")


def is_copied(arguments: argparse.Namespace) -> bool:
    """Tell whether the target is written in place, under its name."""
    return bool(
        arguments.into
        or arguments.backing_file is not None
        or len(arguments.sources) > 1
        or sparse_bytes(arguments) == 0
    )


def sparse_bytes(arguments: argparse.Namespace) -> int:
    """Return how many zeros in data take no space; 0: all take it."""
    return SPARSE_BYTES if arguments.sparse is None else common.parse_size(arguments.sparse, unit=1)


def snapshot_of(arguments: argparse.Namespace) -> str | None:
    """Return the id or name of the snapshot that is copied, also where it is given by a key."""
    text: str | None = arguments.snapshot
    for key in _SNAPSHOT_KEYS:
        if text is not None and text.startswith(key):
            return text[len(key) :].partition(",")[0]
    return text


def source_of(arguments: argparse.Namespace, name: str) -> names.Named:
    """Return what the name of a source means; the arguments have its secret from then on."""
    given = names.named(name, arguments.format, image_opts=arguments.image_opts, takes_exports=True)
    arguments.given = name
    names.take_secrets(arguments, given)
    arguments.shares = arguments.force_share or bool(given.force_share)
    return given


def convert_one(arguments: argparse.Namespace) -> ConvertReport:
    """Convert one source into a new target, whole."""
    from jqcow.offline.convert import convert

    source = source_of(arguments, arguments.sources[0])
    target = names.named(arguments.target, None, takes_exports=True).path
    poured = piped.output(arguments, target)
    target_format = common.disk_format(arguments.target_format) or "raw"
    known = (*common.FORM_OPTIONS, *secrets.ENCRYPTION_OPTIONS)
    named = common.named_options(arguments.options, target_format, known)
    options = common.unasked(arguments, target_format) | common.file_options(named)
    # Read once: a descriptor gives it once.
    passphrase = secrets.passphrase_of(arguments)
    encryption = secrets.encryption_of(arguments, named, target, passphrase)
    if not piped.is_pipe(arguments, source.path):
        common.print_warnings(arguments, source.path, source.format)
    with (
        nullcontext() if poured is None else closing(poured),
        common.opening(arguments, source.path),
        progress_of(arguments) as progress,
    ):
        opened = piped.opened(arguments, source.path)
        done = convert(
            opened,
            target if poured is None else poured,
            source_format=common.disk_format(source.format) or _probe(arguments, opened),
            snapshot=snapshot_of(arguments),
            allow_files=arguments.allow_files,
            probe=arguments.probe,
            share_writers=arguments.shares,
            target_format=target_format,
            compressed=arguments.compressed,
            compression_level=arguments.compression_level,
            passphrase=passphrase,
            encryption=encryption,
            **options,
            overwrite=arguments.overwrite,
            verify=arguments.verify,
            salvage=arguments.salvage,
            bitmaps=("sound" if arguments.skip_broken_bitmaps else "all") if arguments.bitmaps else None,
            progress=progress,
        )
        if poured is not None:
            poured.finish()
        return done


def _probe(arguments: argparse.Namespace, source: Source) -> DiskFormat:
    """Tell the format of the source; raw is what everything else looks like, so it is said."""
    from jqcow.disks.files import open_to_read

    device, found = open_to_read(source, share_writers=arguments.shares)
    if device is not source:
        device.close()
    if found == "raw" and not arguments.quiet and not arguments.profile.is_qemu:
        print(
            f"WARNING: the format of '{device.path}' was not given and it looks raw. Use -f raw if it is.",
            file=sys.stderr,
        )
    return found


# In place


def open_sources(arguments: argparse.Namespace, stack: ExitStack) -> list[Chain]:
    """Open all sources."""
    from jqcow.disks.chain import open_disk
    from jqcow.disks.policy import Following

    found = []
    for name in arguments.sources:
        given = source_of(arguments, name)
        following = Following(
            arguments.allow_files,
            arguments.probe,
            share_writers=arguments.shares,
            passphrase=secrets.passphrase_of(arguments),
        )
        with common.opening(arguments, given.path):
            chain = open_disk(
                piped.opened(arguments, given.path),
                common.disk_format(given.format),
                snapshot=snapshot_of(arguments),
                following=following,
            )
        stack.callback(chain.close)
        found.append(chain)
    return found


def copy_disks(arguments: argparse.Namespace) -> None:
    """Copy sources into a target that is there, or made empty before."""
    with ExitStack() as stack:
        chains = open_sources(arguments, stack)
        is_new = not arguments.into
        if is_new:
            _make_target(arguments, sum(chain.size for chain in chains))
        try:
            copy_chains(arguments, chains, is_zero=is_new or arguments.target_is_zero)
        except BaseException:
            if is_new and arguments.overwrite is False:
                with suppress(FileNotFoundError):
                    os.unlink(arguments.target)
            raise


def _make_target(arguments: argparse.Namespace, size: int) -> None:
    """Make the empty target, as `create` does."""
    from jqcow.cli import images

    known = (*common.FORM_OPTIONS, *secrets.ENCRYPTION_OPTIONS)
    target_format = arguments.target_format or "raw"
    found = common.named_options(arguments.options, target_format, known)
    new = argparse.Namespace(**{**vars(arguments), "image": arguments.target, "format": target_format})
    with common.about(arguments.target):
        images.make(new, found, size)


def copy_chains(arguments: argparse.Namespace, chains: list[Chain], *, is_zero: bool) -> None:
    """Copy open disks into the target, which exists; with its bitmaps, if they were asked for."""
    from jqcow.offline.copy_into import Concatenated, OwnPart, copy_into
    from jqcow.offline.losses import refuse_lost_data

    target = names.named(arguments.target, arguments.target_format, image_opts=arguments.target_image_opts)
    target_format = common.disk_format(target.format) or "raw"
    disk: Disk = chains[0] if len(chains) == 1 else Concatenated(chains)
    if arguments.backing_file is not None:
        disk = OwnPart(disk)
    for chain in chains:
        refuse_lost_data(chain.layers)
    with progress_of(arguments) as progress:
        copy_into(
            disk,
            target.path,
            target_format,
            is_zero=is_zero and arguments.backing_file is None,
            keeps_below=arguments.backing_file is not None,
            sparse_bytes=sparse_bytes(arguments),
            compressed=arguments.compressed,
            allow_files=arguments.allow_files or arguments.backing_file is not None,
            probe=arguments.probe,
            journal_size=_journal_size(arguments),
            passphrase=secrets.passphrase_of(arguments),
            progress=progress,
        )


def _journal_size(arguments: argparse.Namespace) -> int | None:
    if not arguments.profile.is_qemu:
        return None
    from jqcow.cli.qemu.changing import far_journal

    return far_journal()


# The report


def print_report(arguments: argparse.Namespace, report: ConvertReport) -> Iterator[str]:
    """Print what was converted; yield warnings."""
    yield from _warnings(report)
    if arguments.output == "json":
        common.print_json(common.as_json(report))
    elif not arguments.quiet:
        # Standard output has the image, and nothing else.
        stream = sys.stderr if piped.is_pipe(arguments, arguments.target) else sys.stdout
        print("\n".join(_report_lines(report)), file=stream)


def _warnings(report: ConvertReport) -> Iterator[str]:
    for lost in report.lost:
        place = "" if lost.host_offset is None else f" (host offset {lost.host_offset:#x})"
        what = f"guest offset {lost.offset:#x}, {lost.length} bytes{place}"
        yield f"warning: {what} cannot be read and became zeros: {printable(lost.reason)}"
    for name in report.skipped_bitmaps:
        yield f"warning: bitmap {printable(name)!r} may be wrong, and was left out"


def _report_lines(report: ConvertReport) -> Iterator[str]:
    source, target = printable(report.source), printable(report.target)
    yield f"{source} ({report.source_format}) is now {target} ({report.target_format})"
    disk, written = human_size(report.virtual_size), human_size(report.written_bytes)
    yield f"  a disk of {disk}, {written} of it not zero, in {report.seconds:.2f} s"
    if report.lost:
        lost = human_size(sum(part.length for part in report.lost))
        yield f"  {lost} could not be read and became zeros, in {common.plural(len(report.lost), 'range')}"
    if report.bitmaps:
        names = ", ".join(printable(name) for name in report.bitmaps)
        yield f"  with {common.plural(len(report.bitmaps), 'bitmap')}: {names}"
    if report.compression_type is not None:
        whole, packed = human_size(report.compressed_bytes), human_size(report.packed_bytes)
        yield f"  {whole} of it compressed to {packed} ({report.compression_type})"
    if report.verify_seconds is not None:
        yield f"  verified: source and target are equal ({report.verify_seconds:.2f} s)"
