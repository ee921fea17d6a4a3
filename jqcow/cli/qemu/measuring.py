"""How much space an image takes, as in qemu-img: ``measure``, its options checked in QEMU's order."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from jqcow.cli import common, names, secrets
from jqcow.cli.common import CommandError
from jqcow.cli.qemu import options as options_of
from jqcow.cli.qemu.creating import check_form, check_values
from jqcow.cli.qemu.numbers import size_of
from jqcow.cli.qemu.wording import opening, reworded
from jqcow.errors import JqcowError, SnapshotNotFound
from jqcow.offline.measure import Measurement, measure, measure_size

_BY_PARAMETER = "snapshot."
_PARAMETERS = ("snapshot.id", "snapshot.name")
_TOO_LARGE = re.compile(r"a disk of \d+ bytes needs larger clusters")


def measured(arguments: argparse.Namespace) -> Measurement:
    """Return what a disk of a size, or of a file, takes."""
    text = options_of.accumulated(arguments.options)
    snapshot = _snapshot(arguments.snapshot)
    size = None if arguments.size is None else size_of("image size", arguments.size)
    if len(arguments.source) > 1:
        raise CommandError("At most one filename argument is allowed.")
    source = next(iter(arguments.source), None)
    if source is None and (arguments.image_opts or arguments.format or arguments.snapshot):
        raise CommandError("--image-opts, -f, and -l require a filename argument.")
    if source is None and size is None:
        raise CommandError("Either --size N or one filename must be specified.")
    if source is not None and size is not None:
        raise CommandError("--size N cannot be used together with a filename.")
    if arguments.target_format in options_of.OTHER_FORMATS:
        raise CommandError(f"Block driver '{arguments.target_format}' does not support size measurement")
    options_of.require_format(arguments.target_format)
    found = _found(arguments, text)
    if arguments.format not in (None, *common.FORMATS):
        raise CommandError(f"Could not open '{source}': Unknown driver '{arguments.format}'")
    with _reworded(source):
        # A script knows but what qemu-img tells.
        return replace(_measured(arguments, source, snapshot, size, found), journal=0)


def _snapshot(given: str | None) -> str | None:
    """Return the snapshot that ``-l`` names."""
    if given is None or not given.startswith(_BY_PARAMETER):
        return given
    named = options_of.plain_pairs(given)
    wrong = next((name for name in named if name not in _PARAMETERS), None)
    if wrong is not None:
        raise CommandError(
            f"Invalid parameter '{wrong}'\nqemu-img: Failed in parsing snapshot param '{given}'"
        )
    return next(iter(named.values()))


def _found(arguments: argparse.Namespace, text: str) -> dict[str, str]:
    try:
        found = options_of.parsed(text, options_of.of_new(arguments.target_format))
    except CommandError as error:
        told = f"Invalid options for file format '{arguments.target_format}'"
        raise CommandError(f"{error}\nqemu-img: {told}") from error
    check_values(arguments.target_format, found)
    if arguments.target_format == "qcow2":
        check_form(0, found)
    return found


def _measured(
    arguments: argparse.Namespace,
    source: str | None,
    snapshot: str | None,
    size: int | None,
    found: dict[str, str],
) -> Measurement:
    named = {name: value for name, value in found.items() if name in common.FORM_OPTIONS}
    options = common.file_options(named)
    encryption = secrets.encryption_to_measure(found)
    form = common.disk_format(arguments.target_format) or "raw"
    if source is None:
        size = int(found.get("size", 0)) if size is None else size
        return measure_size(size, target_format=form, encryption=encryption, **options)
    given = names.named(source, arguments.format, image_opts=arguments.image_opts)
    measurement = measure(
        given.path,
        source_format=common.disk_format(given.format),
        snapshot=snapshot,
        allow_files=arguments.allow_files,
        probe=arguments.probe,
        force_share=arguments.force_share or bool(given.force_share),
        target_format=form,
        encryption=encryption,
        **options,
    )
    # Nobody knows what a backing file will have of it: nothing, at worst.
    return (
        replace(measurement, required=measurement.fully_allocated) if "backing_file" in found else measurement
    )


@contextmanager
def _reworded(source: str | None) -> Iterator[None]:
    """Have errors speak as QEMU does: those of a file, and of a size that no image can have."""
    with reworded("") if source is None else opening(source):
        try:
            yield
        except SnapshotNotFound as error:
            raise CommandError("Failed to load snapshot: Can't find snapshot") from error
        except (JqcowError, ValueError) as error:
            if not _TOO_LARGE.search(str(error)):
                raise
            raise CommandError("The image size is too large (try using a larger cluster size)") from error
