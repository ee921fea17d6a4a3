"""``create`` as in qemu-img: its options, its line about what was formatted, its errors."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from jqcow.cli import common, secrets
from jqcow.cli.common import CommandError
from jqcow.cli.qemu import options as options_of
from jqcow.cli.qemu.numbers import size_of
from jqcow.cli.qemu.options import is_on
from jqcow.cli.qemu.wording import reason
from jqcow.errors import JqcowError, printable
from jqcow.ondisk.layout import MAX_L1_ENTRIES, Geometry
from jqcow.ondisk.naming import OTHER_PROTOCOLS, protocol_of, resolve

if TYPE_CHECKING:
    from jqcow.ondisk.form import FileOptions

_NEWER = "compatibility level 1.1 and above (use version=v3 or greater)"
_COMPAT = {"0.10": "v2", "1.1": "v3"}


def create(arguments: argparse.Namespace) -> int:
    """Create an image."""
    text = options_of.accumulated(arguments.options)
    image_format = arguments.format
    if options_of.asks_for_help(text):
        return print_help(arguments.image, image_format)
    if arguments.image is None:
        raise CommandError("Expecting image file name")
    size = None if arguments.size is None else size_of("image size", arguments.size)
    name = arguments.image
    try:
        make(arguments, name, image_format, text, size)
    except (JqcowError, OSError, ValueError, CommandError) as error:
        told = str(error) if isinstance(error, CommandError) else reason(error)
        ends = not isinstance(error, CommandError) or error.ends_line
        raise CommandError(f"{name}: {told}", ends_line=ends) from error
    return common.EXIT_OK


def print_help(name: str | None, image_format: str) -> int:
    """Print which options there are, for a file or for all of a format."""
    options_of.require_format(image_format)
    known = options_of.of_new(image_format) if name else options_of.OF_FORMAT[image_format]
    print("Supported options:" if name else f"Supported {image_format} options:")
    print("\n".join(options_of.help_lines(known)))
    if not name:
        print(
            "\nThe protocol level may support further options.\n"
            "Specify the target filename to include those options."
        )
    return common.EXIT_OK


def make(arguments: argparse.Namespace, name: str, image_format: str, text: str, size: int | None) -> None:
    """Make an image as ``-o`` and the arguments say; print what is made before."""
    told, image_format = image_format, "raw" if image_format == "file" else image_format
    options_of.require_format(image_format)
    known = options_of.of_new(image_format)
    found = options_of.parsed(text, known)
    if "size" not in found:
        if size is not None:
            found["size"] = str(size)
    elif size is not None:
        raise CommandError("The image size must be specified only once")
    take_backing(arguments, image_format, found)
    backing = found.get("backing_file")
    if backing is not None:
        if backing == name:
            raise CommandError("Error: Trying to create an image with the same filename as the backing file")
        if not backing:
            raise CommandError("Expected backing file name, got empty string")
        _look_below(arguments, name, backing, found)
    if "size" not in found:
        raise CommandError("Image creation needs a size parameter")
    if not arguments.quiet:
        print(printable(f"Formatting '{name}', fmt={told} {options_of.printed(found, known)}"))
        sys.stdout.flush()
    write(arguments, name, image_format, found)


def take_backing(arguments: argparse.Namespace, image_format: str, found: dict[str, str]) -> None:
    """Add what ``-b`` or ``-B``, and ``-F``, say to the options of a new image, which must have such."""
    for option, value, what in (
        ("backing_file", arguments.backing_file, "Backing file"),
        ("backing_fmt", arguments.backing_format, "Backing file format"),
    ):
        if value is not None:
            if image_format != "qcow2":
                raise CommandError(f"{what} not supported for file format '{image_format}'")
            found[option] = value


def _look_below(arguments: argparse.Namespace, name: str, backing: str, found: dict[str, str]) -> None:
    """Open the backing file, unless ``-u`` says not to, and take its size where none is given."""
    known = found.get("backing_fmt")
    if arguments.unsafe:
        if known is None:
            raise CommandError("Backing file specified without backing format")
        return
    from jqcow.cli import names, nulls
    from jqcow.disks.policy import Following
    from jqcow.offline.info import read_chain

    if known not in (None, *common.FORMATS):
        raise CommandError(f"Unknown driver '{known}'\nCould not open backing image.")
    if nulls.is_null(backing):
        found.setdefault("size", str(nulls.DEFAULT_BYTES))
        return
    path = resolve(backing, names.named(name, None).path)
    try:
        facts = read_chain(
            path,
            common.disk_format(known),
            following=Following(allow=True, probe=True, share_writers=True, reads_data=False),
        )
    except (JqcowError, OSError) as error:
        raise CommandError(f"{reason(error)}\nCould not open backing image.") from error
    if known is None:
        told = "Backing file specified without backing format"
        # QEMU does not end this line.
        raise CommandError(f"{told}\nDetected format of {facts[0].format}.", ends_line=False)
    if "size" not in found:
        found["size"] = str(-(-facts[0].virtual_size // common.SECTOR_BYTES) * common.SECTOR_BYTES)


def write(arguments: argparse.Namespace, name: str, image_format: str, found: dict[str, str]) -> None:
    """Write the new image."""
    from jqcow.cli import names
    from jqcow.disks.making import create_closed, create_raw

    name = names.named(name, None).path
    size = -(-int(found["size"]) // common.SECTOR_BYTES) * common.SECTOR_BYTES
    check_values(image_format, found)
    named = {key: value for key, value in found.items() if key in common.FORM_OPTIONS}
    wanted = common.unasked(arguments, image_format) | common.file_options(named)
    if image_format == "luks":
        _write_luks(arguments, name, size, found)
        return
    if image_format == "raw":
        create_raw(
            name,
            size,
            overwrite=True,
            preallocation=wanted.get("preallocation", "off"),
            nocow=wanted.get("nocow", False),
            writes_first_block=True,
        )
        return
    check_form(size, found)
    if is_aes(found):
        _write_aes(arguments, name, size, found, wanted)
        return
    encryption = secrets.encryption_of(arguments, found, name)
    create_closed(
        name,
        size,
        **wanted,
        backing_file=found.get("backing_file"),
        backing_format=found.get("backing_fmt"),
        foreign=True,
        is_short=True,
        encryption=encryption,
        overwrite=True,
    )


def is_aes(found: dict[str, str]) -> bool:
    """Tell whether options ask for AES without LUKS, which `create` alone makes."""
    if "encryption" in found and "encrypt.format" in found:
        raise CommandError("'encrypt.format' and its alias 'encryption' can't be used at the same time")
    return is_on(found.get("encryption")) or found.get("encrypt.format") == "aes"


def _write_aes(
    arguments: argparse.Namespace, name: str, size: int, found: dict[str, str], wanted: FileOptions
) -> None:
    from jqcow.offline.aes_image import create_aes

    if "encrypt.key-secret" not in found:
        raise CommandError("Parameter 'encrypt.key-secret' is required for cipher")
    # Its passphrase is for whoever opens the image: here it need but exist.
    secrets.secret_named(arguments, found["encrypt.key-secret"])
    create_aes(
        name,
        size,
        backing_file=found.get("backing_file"),
        backing_format=found.get("backing_fmt"),
        overwrite=True,
        **wanted,
    )


def _write_luks(arguments: argparse.Namespace, name: str, size: int, found: dict[str, str]) -> None:
    from jqcow.offline.luks_volume import create_luks

    if "key-secret" not in found:
        raise CommandError("Parameter 'key-secret' is required for cipher")
    named = {f"encrypt.{key}": value for key, value in found.items()} | {"encrypt.format": "luks"}
    encryption = secrets.encryption_of(arguments, named, name)
    if encryption is not None:
        use = {key: found[key] for key in common.RAW_OPTIONS if key in found}
        create_luks(name, size, encryption, overwrite=True, **common.file_options(use))


def check_values(image_format: str, found: dict[str, str]) -> None:
    """Refuse words that an option does not have."""
    compat = found.get("compat")
    if compat is not None and _COMPAT.get(compat, compat) not in ("v2", "v3"):
        raise CommandError(f"Parameter 'version' does not accept value '{compat}'")
    preallocation = found.get("preallocation", "off")
    allowed = common.PREALLOCATIONS if image_format == "qcow2" else ("off", "falloc", "full")
    if preallocation not in allowed:
        raise CommandError(f"Parameter 'preallocation' does not accept value '{preallocation}'")
    if found.get("compression_type", "zlib") not in ("zlib", "zstd"):
        told = found["compression_type"]
        raise CommandError(f"Parameter 'compression-type' does not accept value '{told}'")


def check_form(size: int, found: dict[str, str]) -> None:
    """Refuse what no qcow2 image can be, in QEMU's order and words."""
    is_old = _COMPAT.get(found.get("compat", ""), found.get("compat")) == "v2"
    cluster = int(found.get("cluster_size", "65536"))
    if cluster & cluster - 1 or not 512 <= cluster <= 2 << 20:
        raise CommandError("Cluster size must be a power of two between 512 and 2048k")
    if is_on(found.get("extended_l2")):
        if is_old:
            raise CommandError(f"Extended L2 entries are only supported with {_NEWER}")
        if cluster < 16384:
            raise CommandError(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
            )
    has_backing = "backing_file" in found
    if has_backing and found.get("preallocation", "off") != "off" and not is_on(found.get("extended_l2")):
        raise CommandError(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
        )
    if "backing_fmt" in found and not has_backing:
        raise CommandError("Backing format cannot be used without backing file")
    if is_on(found.get("lazy_refcounts")) and is_old:
        raise CommandError(f"Lazy refcounts only supported with {_NEWER}")
    bits = int(found.get("refcount_bits", "16"))
    if bits > 64 or bits < 1 or bits & bits - 1:
        raise CommandError("Refcount width must be a power of two and may not exceed 64 bits")
    if is_old and bits != 16:
        raise CommandError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 "
            "or greater)"
        )
    _check_data_file(found, is_old=is_old)
    if is_old and found.get("compression_type", "zlib") != "zlib":
        raise CommandError(f"Non-zlib compression type is only supported with {_NEWER}")
    subclusters = is_on(found.get("extended_l2"))
    geometry = Geometry(cluster.bit_length() - 1, has_subclusters=subclusters)
    if geometry.l1_entries_for(size) > MAX_L1_ENTRIES:
        hint = " (try using a larger cluster size)"
        raise CommandError(f"The image size is too large for file format 'qcow2'{hint}")


def _check_data_file(found: dict[str, str], *, is_old: bool) -> None:
    if is_on(found.get("data_file_raw")) and "data_file" not in found:
        raise CommandError("data-file-raw requires data-file")
    if is_on(found.get("data_file_raw")) and "backing_file" in found:
        raise CommandError("Backing file and data-file-raw cannot be used at the same time")
    if "data_file" in found and is_old:
        raise CommandError(f"External data files are only supported with {_NEWER}")
    for name in ("backing_file", "data_file"):
        protocol = protocol_of(found.get(name, ""))
        known = OTHER_PROTOCOLS if name == "backing_file" else ()
        if protocol not in (None, "json", "file", *known) and not os.path.exists(found[name]):
            raise CommandError(f"Unknown protocol '{protocol}'")
