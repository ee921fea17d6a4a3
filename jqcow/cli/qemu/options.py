"""Options of ``-o`` as QEMU takes, checks and prints them.

Names, order, defaults and texts are those of QEMU 7.2 (``block/qcow2.c``, ``block/file-posix.c`` and
``util/qemu-option.c`` there).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from jqcow.cli.common import CommandError, parse_size

Kind = Literal["str", "bool", "size", "num"]


@dataclass(frozen=True)
class Option:
    """An option: its name, the kind of its value, what the help says of it, and its default."""

    name: str
    kind: Kind
    help: str
    default: str | None = None


def _crypto(prefix: str) -> list[Option]:
    return [
        Option(f"{prefix}cipher-alg", "str", "Name of encryption cipher algorithm"),
        Option(f"{prefix}cipher-mode", "str", "Name of encryption cipher mode"),
        Option(f"{prefix}ivgen-alg", "str", "Name of IV generator algorithm"),
        Option(f"{prefix}ivgen-hash-alg", "str", "Name of IV generator hash algorithm"),
        Option(f"{prefix}hash-alg", "str", "Name of encryption hash algorithm"),
        Option(f"{prefix}iter-time", "num", "Time to spend in PBKDF in milliseconds"),
    ]


_COMMON = [
    Option("size", "size", "Virtual disk size"),
    Option("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    Option("backing_file", "str", "File name of a base image"),
    Option("backing_fmt", "str", "Image format of the base image"),
    Option("data_file", "str", "File name of an external data file"),
    Option("data_file_raw", "bool", "The external data file must stay valid as a raw image"),
    Option("lazy_refcounts", "bool", "Postpone refcount updates", "off"),
    Option("refcount_bits", "num", "Width of a reference count entry in bits", "16"),
]
QCOW2 = [
    Option(
        "encryption",
        "bool",
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    Option("encrypt.format", "str", "Encrypt the image, format choices: 'aes', 'luks'"),
    Option("encrypt.key-secret", "str", "ID of secret providing qcow AES key or LUKS passphrase"),
    *_crypto("encrypt."),
    Option("cluster_size", "size", "qcow2 cluster size", "65536"),
    Option("extended_l2", "bool", "Extended L2 tables", "off"),
    Option("preallocation", "str", "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    Option("compression_type", "str", "Compression method used for image cluster compression", "zlib"),
    *_COMMON,
]
"""Options of a new qcow2 image."""
FILE = [
    Option("size", "size", "Virtual disk size"),
    Option("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    Option("preallocation", "str", "Preallocation mode (allowed values: off, falloc, full)"),
    Option("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
]
"""Options of a new file on the host."""
RAW = [Option("size", "size", "Virtual disk size")]
LUKS = [
    *RAW,
    Option("key-secret", "str", "ID of the secret that provides the keyslot passphrase"),
    *_crypto(""),
]
"""Options of a new LUKS volume, which `create` alone makes."""
AMEND = [
    Option("encrypt.state", "str", "Select new state of affected keyslots (active/inactive)"),
    Option("encrypt.keyslot", "num", "Select a single keyslot to modify explicitly"),
    Option("encrypt.old-secret", "str", "Select all keyslots that match this password"),
    Option("encrypt.new-secret", "str", "New secret to set in the matching keyslots. Empty string to erase"),
    Option("encrypt.iter-time", "num", "Time to spend in PBKDF in milliseconds"),
    *_COMMON,
]
"""Options that an existing qcow2 image can get anew."""
OF_FORMAT = {"qcow2": QCOW2, "raw": RAW, "luks": LUKS}
OTHER_FORMATS = ("bochs", "cloop", "dmg", "luks", "parallels", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc")
PROTOCOLS = ("file", "host_cdrom", "host_device", "http", "https", "iscsi", "nbd", "nfs", "rbd", "ssh")
"""What else QEMU takes as the format of a backing file; jqcow stores it where it does not open the file."""
READ_ONLY_FORMATS = ("bochs", "cloop", "dmg")
"""Formats that QEMU knows and makes no images of."""


def of_new(image_format: str) -> list[Option]:
    """Return the options of a new image in a new file, in the order in which they are printed."""
    known = OF_FORMAT[image_format]
    names = {option.name for option in known}
    return [*known, *(option for option in FILE if option.name not in names)]


def accumulated(given: Iterable[str]) -> str:
    """Return several ``-o`` as one.

    Raises:
        CommandError: one that could not be told from the next.
    """
    parts = list(given)
    for part in parts:
        if not _is_list(part):
            raise CommandError(f"Invalid option list: {part}")
    return ",".join(parts)


def _is_list(part: str) -> bool:
    if not part or part.startswith(","):
        return False
    ends = len(part) - len(part.rstrip(","))
    return ends % 2 == 0


def require_format(image_format: str) -> None:
    """Raise CommandError for a format that no image can be made in."""
    if image_format in READ_ONLY_FORMATS:
        raise CommandError(f"Format driver '{image_format}' does not support image creation")
    if image_format not in OF_FORMAT:
        raise CommandError(f"Unknown file format '{image_format}'")


def asks_for_help(text: str) -> bool:
    """Tell whether the options are but a question which there are."""
    return any(value is None and name in ("help", "?") for name, value in _pairs(text))


def _pairs(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield names and values; two commas stand for one that belongs to a value."""
    position = 0
    while position < len(text):
        stop = position
        while stop < len(text) and text[stop] not in "=,":
            stop += 1
        name = text[position:stop]
        if stop == len(text) or text[stop] == ",":
            yield name, None
            position = stop + 1
            continue
        value, position = _value(text, stop + 1)
        yield name, value


def _value(text: str, position: int) -> tuple[str, int]:
    found = ""
    while position < len(text):
        if text[position] == ",":
            if text[position + 1 : position + 2] != ",":
                break
            position += 1
        found += text[position]
        position += 1
    return found, position + 1


def plain_pairs(text: str) -> dict[str, str]:
    """Return names and values of a list such as that of ``--image-opts``; a name alone is ``on``."""
    return {name: "on" if value is None else value for name, value in _pairs(text)}


def parsed(text: str, known: Iterable[Option]) -> dict[str, str]:
    """Return what options say, checked by the kinds of their values; sizes and numbers in decimal.

    Raises:
        CommandError: an option that there is not, or a value that it cannot have.
    """
    kinds = {option.name: option.kind for option in known}
    found: dict[str, str] = {}
    for given, value in _pairs(text):
        is_denied = value is None and given.startswith("no") and given not in kinds
        name, otherwise = (given[2:], "off") if is_denied else (given, "on")
        if name not in kinds:
            raise CommandError(f"Invalid parameter '{given}'")
        found[name] = checked(name, otherwise if value is None else value, kinds[name])
    return found


def checked(name: str, value: str, kind: Kind) -> str:
    """Return a value, as `parsed` does."""
    if kind == "bool" and value not in ("on", "off", "yes", "no", "true", "false", "y", "n"):
        raise CommandError(f"Parameter '{name}' expects 'on' or 'off'")
    if kind == "num":
        try:
            return str(int(value, 0))
        except ValueError:
            raise CommandError(f"Parameter '{name}' expects a number") from None
    if kind == "size":
        try:
            return str(parse_size(value, unit=1))
        except ValueError:
            raise CommandError(
                f"Parameter '{name}' expects a non-negative number below 2^64\n"
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
                "and exabytes, respectively."
            ) from None
    return value


def is_on(value: str | None) -> bool:
    """Tell whether a switch is on."""
    return value in ("on", "yes", "true", "y")


def printed(found: Mapping[str, str], known: Iterable[Option]) -> str:
    """Return options with the defaults of what is not given, as QEMU prints them."""
    values = ((option, found.get(option.name, option.default)) for option in known)
    return " ".join(
        f"{option.name}={value.replace(',', ',,') if option.kind == 'str' else value}"
        for option, value in values
        if value is not None
    )


def help_lines(known: Iterable[Option]) -> Iterator[str]:
    """Yield what QEMU says of options when it is asked which there are."""
    words = {"str": "str", "bool": "bool (on/off)", "size": "size", "num": "num"}
    for option in sorted(known, key=lambda one: one.name):
        start = f"  {option.name}=<{words[option.kind]}>"
        yield f"{start:<24} - {option.help}"
