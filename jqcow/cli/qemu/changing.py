"""What changes an image, as in qemu-img: ``resize``, ``snapshot``, ``amend``, ``commit``, ``rebase``."""

from __future__ import annotations

import argparse
import os
from contextlib import closing
from typing import TYPE_CHECKING, Any, cast

from jqcow.cli import common, secrets
from jqcow.cli.common import CommandError
from jqcow.cli.progress import progress_of
from jqcow.cli.qemu import options as options_of
from jqcow.cli.qemu.options import is_on
from jqcow.cli.qemu.wording import opening, own_reason, reason, reworded
from jqcow.errors import SnapshotNotFound

if TYPE_CHECKING:
    from jqcow.image import Image
    from jqcow.image.journals import FarJournal
    from jqcow.ondisk.amendment import AmendOptions

_SIGNS = {"+": 1, "-": -1}
_SHRINKING = (
    "qemu-img: warning: Shrinking an image will delete all data beyond the shrunken image's end. Before "
    "performing such an operation, make sure there is no important data there."
)
_VERSIONS = {"0.10": "0.10", "v2": "0.10", "1.1": "1.1", "v3": "1.1"}


def _following(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "allow_files": True,
        "probe": True,
        "passphrase": secrets.passphrase_of(arguments),
        "journal_size": far_journal(),
    }


def far_journal() -> FarJournal:
    """Return the size of a journal that leaves the file as compact as qemu-img does."""
    from jqcow.image.journals import FarJournal
    from jqcow.ondisk.root import DEFAULT_JOURNAL_BYTES

    return FarJournal(DEFAULT_JOURNAL_BYTES)


def open_image(arguments: argparse.Namespace, *, is_far: bool = True) -> Image:
    """Open the image for writing, with what is below it; ``is_far``: its journal leaves no gap."""
    import jqcow

    with opening(arguments.given):
        options = _following(arguments) | ({} if is_far else {"journal_size": None})
        return jqcow.open(arguments.image, "r+", **options)


def format_of(arguments: argparse.Namespace) -> str:
    """Return the format of the image, told by its magic where it is not given."""
    from jqcow.disks.files import open_to_read

    known = arguments.format
    if known not in (None, *common.FORMATS):
        raise CommandError(f"Could not open '{arguments.given}': Unknown driver '{known}'")
    if known is None:
        with opening(arguments.given):
            # Whoever uses it keeps out what the command does then, which says so.
            device, known = open_to_read(arguments.image, share_writers=True)
            device.close()
    return str(known)


# resize


def resize(arguments: argparse.Namespace) -> int:
    """Resize a disk."""
    text: str = arguments.size
    sign = _SIGNS.get(text[:1], 0)
    change = int(options_of.checked("size", text[1:] if sign else text, "size"))
    if format_of(arguments) == "raw":
        _resize_raw(arguments, change, sign)
    else:
        # What is preallocated goes behind the journal: that may not be far.
        with open_image(arguments, is_far=arguments.preallocation == "off") as image:
            size = _new_size(arguments, image.size, change, sign)
            with reworded(""):
                image.resize(-(-size // common.SECTOR_BYTES) * common.SECTOR_BYTES, arguments.preallocation)
    if not arguments.quiet:
        print("Image resized.")
    return common.EXIT_OK


def _resize_raw(arguments: argparse.Namespace, change: int, sign: int) -> None:
    from jqcow.offline.resize_raw import raw_size, resize_raw

    with opening(arguments.given):
        size = raw_size(arguments.image)
    wanted = _new_size(arguments, size, change, sign)
    with reworded(""):
        resize_raw(arguments.image, wanted, arguments.preallocation)


def _new_size(arguments: argparse.Namespace, size: int, change: int, sign: int) -> int:
    wanted = size + sign * change if sign else change
    if wanted <= 0:
        raise CommandError("New image size must be positive")
    if wanted <= size and arguments.preallocation != "off":
        raise CommandError("Preallocation can only be used for growing images")
    if wanted < size and not arguments.shrink:
        raise CommandError(f"Use the --shrink option to perform a shrink operation.\n{_SHRINKING}")
    return wanted


# snapshot


def snapshot(arguments: argparse.Namespace) -> int:
    """Make, apply or delete a snapshot."""
    from jqcow.image.opening import open_alone

    with opening(arguments.given):
        image = open_alone(arguments.image, "r+", journal_size=far_journal())
    with image:
        if arguments.create is not None:
            with reworded(f"Could not create snapshot '{arguments.create}': "):
                image.create_snapshot(arguments.create)
        elif arguments.apply is not None:
            with reworded(f"Could not apply snapshot '{arguments.apply}': "):
                image.apply_snapshot(arguments.apply)
        else:
            _delete_snapshot(image, arguments.delete)
    return common.EXIT_OK


def _delete_snapshot(image: Image, name: str) -> None:
    # Names alone, as there; an id of the same text may be another snapshot's.
    found = next((one for one in image.snapshots() if one.name == name), None)
    if found is None:
        raise CommandError(f"Could not delete snapshot '{name}': snapshot not found")
    with reworded(f"Could not delete snapshot '{name}': "):
        try:
            image.delete_snapshot(found.id)
        except SnapshotNotFound:
            raise CommandError(f"Could not delete snapshot '{name}': snapshot not found") from None


# amend


def amend(arguments: argparse.Namespace) -> int:
    """Amend the options of an image."""
    from jqcow.offline.amend import amend as amend_file

    text = options_of.accumulated(arguments.options)
    if arguments.format is not None and options_of.asks_for_help(text):
        return _amend_help(arguments.format)
    if arguments.image is None:
        raise CommandError("Expecting one image file name")
    image_format = format_of(arguments)
    if options_of.asks_for_help(text):
        return _amend_help(image_format)
    if image_format != "qcow2":
        raise CommandError(f"Format driver '{image_format}' does not support option amendment")
    found = _amend_options(text)
    wanted = _amended(arguments, found)
    if any(name.startswith("encrypt.") for name in found):
        from jqcow.cli.qemu.keyslots import amend_slots

        amend_slots(arguments, found)
    with reworded("", arguments), progress_of(arguments) as progress:
        amend_file(arguments.image, shrink=True, progress=progress, **_following(arguments), **wanted)
    return common.EXIT_OK


def _amend_help(image_format: str) -> int:
    if image_format != "qcow2":
        raise CommandError(f"Format driver '{image_format}' does not support option amendment")
    print(f"Amend options for '{image_format}':")
    print("\n".join(options_of.help_lines(options_of.AMEND)))
    return common.EXIT_OK


def _amend_options(text: str) -> dict[str, str]:
    try:
        return options_of.parsed(text, options_of.AMEND)
    except CommandError as error:
        try:
            options_of.parsed(text, [*options_of.AMEND, *options_of.QCOW2])
        except CommandError:
            raise error from None
        hint = "This option is only supported for image creation"
        raise CommandError(f"{error}\n{hint}") from None


def _amended(arguments: argparse.Namespace, found: dict[str, str]) -> AmendOptions:
    """Return what is to change, after the checks of qcow2_amend_options in their order."""
    from jqcow.image.opening import open_alone

    with opening(arguments.given, to_write=True), open_alone(arguments.image, "r") as image:
        info, named, data_file = image.info(), image.backing_file, image.data_file
        is_raw = info.data_file_raw if hasattr(info, "data_file_raw") else False
    compat = found.get("compat")
    if compat is not None and compat not in _VERSIONS:
        raise CommandError(f"Unknown compatibility level {compat}")
    bits = int(found.get("refcount_bits", info.refcount_bits))
    if not 0 < bits <= 64 or bits & bits - 1:
        raise CommandError("Refcount width must be a power of two and may not exceed 64 bits")
    if "data_file" in found and data_file is None:
        raise CommandError("data-file can only be set for images that use an external data file")
    if is_on(found.get("data_file_raw")) and not is_raw:
        raise CommandError("data-file-raw cannot be set on existing images")
    is_old = _VERSIONS[compat] == "0.10" if compat is not None else info.version == 2
    if bits != info.refcount_bits and is_old and bits != 16:
        raise CommandError(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or "
            "greater)"
        )
    if "backing_file" in found or "backing_fmt" in found:
        has = (None, None) if named is None else (named.name, named.format)
        if (found.get("backing_file"), found.get("backing_fmt")) != has:
            raise CommandError("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.")
    if is_on(found.get("lazy_refcounts")) and is_old:
        raise CommandError(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
        )
    wanted = cast(
        "dict[str, Any]",
        common.file_options(
            {name: found[name] for name in ("refcount_bits", "lazy_refcounts") if name in found}
        ),
    )
    if compat is not None:
        wanted["compat"] = _VERSIONS[compat]
    if found.get("size", "0") != "0":
        wanted["size"] = int(found["size"])
    if "data_file" in found:
        wanted["data_file"] = found["data_file"]
    if "data_file_raw" in found and data_file is not None:
        wanted["data_file_raw"] = is_on(found["data_file_raw"])
    return cast("AmendOptions", wanted)


# chains


def commit(arguments: argparse.Namespace) -> int:
    """Commit an overlay."""
    from jqcow.offline.commit import commit as commit_file

    _look_for_base(arguments)
    with reworded("", arguments), progress_of(arguments) as progress:
        commit_file(
            arguments.image,
            base=arguments.base,
            keep=arguments.keep,
            progress=progress,
            **_following(arguments),
        )
    if not arguments.quiet:
        print("Image committed.")
    return common.EXIT_OK


def _look_for_base(arguments: argparse.Namespace) -> None:
    """Look whether there is something to commit to."""
    from jqcow.disks.chain import open_disk
    from jqcow.disks.policy import Following
    from jqcow.offline.commit import named_down_to

    following = Following(allow=True, probe=True, reads_data=False)
    with (
        opening(arguments.given, to_write=True),
        closing(open_disk(arguments.image, following=following)) as chain,
    ):
        named = named_down_to(chain, arguments.base)
    if arguments.base is not None and not named:
        raise CommandError(f"Did not find '{arguments.base}' in the backing chain of '{arguments.given}'")
    if not named:
        raise CommandError("Image does not have a backing file")


def rebase(arguments: argparse.Namespace) -> int:
    """Rebase an overlay."""
    from jqcow.offline.rebase import rebase as rebase_file

    name, unsafe = arguments.backing_file, arguments.unsafe
    if name is None and not unsafe:
        raise CommandError("Must specify backing file (-b) or use unsafe mode (-u)")
    if unsafe:
        with opening(arguments.given, to_write=True):
            closing_alone(arguments.image)
    else:
        open_image(arguments).close()
    known = arguments.backing_format
    others = (*options_of.OTHER_FORMATS, *options_of.PROTOCOLS) if unsafe else ()
    if known not in (None, *common.FORMATS, *others):
        raise CommandError(f"Invalid format name: '{known}'")
    if name and known is None:
        raise CommandError(f"Could not change the backing file to '{name}': backing format must be specified")
    try:
        with progress_of(arguments) as progress:
            rebase_file(
                arguments.image,
                name or None,
                known if name else None,
                unsafe=unsafe,
                elsewhere=True,
                progress=progress,
                **_following(arguments),
            )
    except (OSError, ValueError) as error:
        if name and not unsafe and not os.path.exists(name):
            raise CommandError(f"Could not open new backing file '{name}': {own_reason(error)}") from error
        raise CommandError(f"Could not change the backing file to '{name}': {reason(error)}") from error
    return common.EXIT_OK


def closing_alone(path: str) -> None:
    """Look whether an image opens without what is below it."""
    from jqcow.image.opening import open_alone

    with closing(open_alone(path, "r")):
        pass
