"""``jqcow-recover``: bring a crashed image home; of a damaged one tell what can be had back, and have it."""

from __future__ import annotations

import argparse
import errno
import shlex
from collections.abc import Iterator, Sequence

from jqcow.cli import common, salvaging
from jqcow.cli.common import human_size, plural
from jqcow.errors import CorruptionError, printable
from jqcow.offline.recover import JournalFound, RecoveryReport, Verification, recover_image
from jqcow.offline.undo import undo_repair
from jqcow.salvage.diagnosis import Diagnosis

PROGRAM = "jqcow-recover"
FINDINGS_SHOWN = 5

_DAMAGED = "nothing was guessed; copy the image before anything else is tried on it"

_EPILOG = """\
exit codes:
  0   the image is clean, was recovered, or all of it is saved and certain; nothing was found
  1   not recovered: damaged and crashed, not a qcow2 image, no permission, an I/O error, wrong arguments
  2   damage was found, and nothing was changed; or the image is clean or recovered, and the check found
      corruption or what looks like lost data; or the disk is saved, and not all of it is certain
  3   the image is clean or recovered, and leaked clusters were found, no corruption
  4   another process uses the image
  63  the image has a feature that jqcow does not support; or the check cannot judge it
  129, 130, 143  ended by SIGHUP, Ctrl-C, SIGTERM; a salvage goes on when it is asked for again

With --dry-run the same codes tell what recovery would lead to.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.Parser(
        prog=PROGRAM,
        description="Bring a crashed jqcow image home, so that it is standard qcow2 again. "
        "Everything that a flush acknowledged is kept. A clean image is left as it is. Of a damaged "
        "image nothing is changed: what can be had back is told, and --salvage writes it into a new file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", metavar="IMAGE", help="the image file")
    parser.add_argument(
        "--dry-run", action="store_true", help="write nothing: open read-only, replay in memory, report"
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not check refcounts and tables after the replay"
    )
    common.add_journal_size(parser)
    parser.add_argument(
        "--undo", action="store_true", help="take the last repair back, from the undo file beside the image"
    )
    parser.add_argument("--force", action="store_true", help="with --undo: also if it was written since")
    salvaging.add_arguments(parser)
    common.add_output(parser)
    common.add_quiet(parser)
    common.add_version(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = build_parser().parse_args(common.arguments_of(argv))
    return common.run(PROGRAM, lambda: recover(arguments))


def recover(arguments: argparse.Namespace) -> int:
    """Recover, print the report, and return the exit code."""
    name: str = arguments.image
    match salvaging.mode_of(arguments):
        case "undo":
            with common.about(name):
                common.print_undone(undo_repair(name, force=arguments.force), arguments.output)
            return common.EXIT_OK
        case "diagnose":
            return salvaging.diagnose_command(arguments)
        case "salvage":
            return salvaging.salvage_command(arguments)
        case "in_place":
            return salvaging.in_place_command(arguments)
    if not arguments.no_check:
        damaged = salvaging.damage_of(name)
        if damaged is not None:
            return _refuse_damaged(damaged, arguments.output)
    try:
        with common.about(name):
            report = recover_image(
                name,
                dry_run=arguments.dry_run,
                verify=not arguments.no_check,
                journal_size=common.journal_size_of(arguments),
            )
    except common.CommandError as error:
        if isinstance(error.__cause__, CorruptionError):
            raise common.CommandError(f"{error}; {_DAMAGED}", error.code) from error
        raise
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS) and not arguments.dry_run:
            error.add_note("--dry-run works on a file that cannot be written")
        raise
    if arguments.output == "json":
        common.print_json(common.as_json(report))
    else:
        print("\n".join(_lines(report)))
    return exit_code(report)


def _refuse_damaged(found: Diagnosis, output: str) -> int:
    """Tell of an image that is damaged; what is live stays so, with all that its journal holds."""
    salvaging.print_diagnosis(found, output)
    if not found.has_live_journal:
        return common.EXIT_CORRUPT
    first = found.damages[0]
    raise common.CommandError(
        f"{found.image}: not recovered: the {first.structure} is damaged: {first.meaning}; {_DAMAGED}"
    )


def exit_code(report: RecoveryReport) -> int:
    """Return the exit code that a report stands for."""
    verified = report.verification
    if verified is None:
        return common.EXIT_OK
    if verified.refused:
        return common.EXIT_UNSUPPORTED
    if verified.errors or verified.lost:
        return common.EXIT_CORRUPT
    return common.EXIT_LEAKS if verified.leaks else common.EXIT_OK


def _lines(report: RecoveryReport) -> Iterator[str]:
    """Yield the report for people, line by line."""
    yield f"{printable(report.image or '')}: {_headline(report)}"
    yield ""
    if report.journal is not None:
        yield from _journal_lines(report.journal, dry_run=report.dry_run)
    for note in report.notes:
        yield f"  note      {note}"
    yield from _check_lines(report.verification)
    yield f"  time      {_times(report)}"
    yield ""
    yield from _what_next(report)


def _headline(report: RecoveryReport) -> str:
    if report.state == "clean, journal left behind":
        return (
            f"clean; a crash left its journal behind, which {'can be' if report.dry_run else 'is'} given back"
        )
    if report.journal is None:
        return "clean, nothing to do" if exit_code(report) == common.EXIT_OK else "no journal to recover"
    crashed = "it crashed while it was open for writing"
    if report.state == "live by root copy":
        crashed += ", and sector 0 was lost in the crash (its copy is whole)"
    return f"{crashed}; {'it can be recovered' if report.dry_run else 'it is recovered'}"


def _journal_lines(found: JournalFound, *, dry_run: bool) -> Iterator[str]:
    span = f"{found.first_sequence} to {found.last_sequence}"
    if found.record_count == 1:
        span = str(found.first_sequence)
    yield f"  kept      {plural(found.record_count, 'record')}, sequence {span}, epoch {found.epoch}:"
    yield "            everything that a flush acknowledged is among them"
    home = "would go home" if dry_run else "brought home"
    blocks, length = plural(found.blocks_applied, "metadata block"), human_size(found.bytes_applied)
    yield f"            {blocks}, {length}, {home}"
    if found.pending_writes:
        done = "would be done" if dry_run else "done"
        writes, length = plural(found.pending_writes, "small write"), human_size(found.pending_bytes)
        yield f"            {writes} of the guest, {length}, {done}"
    torn = found.torn_tail
    if torn is None:
        yield "  dropped   no record: the journal ends with a whole one"
    else:
        yield f"  dropped   record {torn.sequence} at host offset {torn.offset:#x}, torn by the crash:"
        yield f"            {torn.reason}."
        yield "            No flush returned for it, so nobody was told that it was safe"
    if found.stale_frames:
        yield f"  ignored   {plural(found.stale_frames, 'older record')}: home since an earlier checkpoint"
    yield f"  journal   {human_size(found.length)} at host offset {found.offset:#x}"


def _check_lines(verified: Verification | None) -> Iterator[str]:
    if verified is None:
        yield "  check     not done (--no-check)"
    elif verified.refused:
        yield f"  check     not possible: {verified.refused}"
    elif not verified.errors + verified.leaks + verified.lost:
        yield "  check     no errors, no leaks"
    else:
        lost = f", {plural(verified.lost, 'cluster')} of lost data?" if verified.lost else ""
        errors, leaks = plural(verified.errors, "error"), plural(verified.leaks, "leaked cluster")
        yield f"  check     {errors}, {leaks}{lost}:"
        yield from (f"            {finding}" for finding in verified.findings[:FINDINGS_SHOWN])
        more = verified.errors + verified.leaks + verified.lost - FINDINGS_SHOWN
        if more > 0:
            yield f"            and {more:,} more: see jqcow check"


def _times(report: RecoveryReport) -> str:
    times = [] if report.journal is None else [f"replay {report.replay_seconds:.3f} s"]
    if report.verification is not None:
        times.append(f"check {report.verification.seconds:.3f} s")
    return ", ".join(times) or "none to speak of"


def _what_next(report: RecoveryReport) -> Iterator[str]:
    verified = report.verification
    if verified is not None and verified.errors:
        yield "The image is damaged in a way that no crash of jqcow leaves: something else wrote to it."
        yield "Make a copy, and convert what can be read (jqcow convert) before anything tries to repair it."
    elif verified is not None and verified.lost:
        yield "A table has a hole that leaked clusters may fill: they may be the only copy of what it mapped."
        yield "Copy the image before anything is tried: jqcow check -r keeps them, qemu-img frees them."
    elif verified is not None and verified.leaks:
        yield "Leaked clusters waste space and do no harm to data; jqcow check -r leaks frees them."
    if report.dry_run and report.actions:
        yield f"Nothing was written. To recover: {PROGRAM} {shlex.quote(printable(report.image or ''))}"
    elif report.journal is not None:
        yield "The image is standard qcow2 again. Writes after the last flush may be there or not, sector"
        yield "by sector, as after any power cut; a guest's file system may want its own journal replayed."
    elif verified is None or not verified.errors + verified.lost:
        yield "The image has no live journal: any program that knows qcow2 can open it."
