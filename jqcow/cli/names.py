"""Names of images among arguments: paths, ``file:`` and ``json:`` names, and ``--image-opts``.

All of them name plain files. What else QEMU could open by such a name is refused (`jqcow.ondisk.json_names`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import dataclass, replace

from jqcow.cli import nulls
from jqcow.cli.common import CommandError
from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk.json_names import RefusedName, parse_json_name
from jqcow.ondisk.naming import meaning_of, protocol_of

_SECRET = "encrypt.key-secret"
_SINGLE = re.compile(r"\"(?:[^\"\\\\]|\\\\.)*\"|'((?:[^'\\\\]|\\\\.)*)'")
_BELOW = "backing."
_BLKDEBUG = "blkdebug"
_ALIGNMENTS = ("align", "max-transfer", "opt-write-zero", "max-write-zero", "opt-discard", "max-discard")
"""What QEMU's driver ``blkdebug`` may ask of requests: it changes no byte."""
_READING = ("info", "check", "map")
_OF_THE_OPENING = ("force-share", "file.force-share")


@dataclass(frozen=True)
class Named:
    """An image among arguments.

    Attributes:
        text: as it was given.
        path: the file.
        format: as given, or as the name says; None: neither does.
        secret: id of the secret that has its passphrase, if the name says one.
        force_share: what the name says of reading beside a writer, if anything.
        below: path and secret of each file below that the name tells of, from the top.
        driver: what a disk that is no file tells as its format, None of a file.
    """

    text: str
    path: str
    format: str | None = None
    secret: str | None = None
    force_share: bool | None = None
    driver: str | None = None
    below: tuple[tuple[str, str | None], ...] = ()


def add_image_opts(parser: argparse.ArgumentParser) -> None:
    """Add ``--image-opts``."""
    parser.add_argument(
        "--image-opts",
        action="store_true",
        help="the image is named by options: driver=qcow2,file.filename=PATH",
    )


def add_objects(parser: argparse.ArgumentParser) -> None:
    """Add ``--object secret,id=ID,file=FILE``, as in qemu-img."""
    parser.add_argument(
        "--object",
        dest="objects",
        metavar="SECRET",
        action="append",
        default=[],
        help="secret,id=ID,file=FILE: a passphrase for encrypt.key-secret=ID; other kinds are not needed",
    )


def resolve(arguments: argparse.Namespace) -> None:
    """Put the file in the place of its name, for a command with one image."""
    given = arguments.image
    if arguments.profile.is_qemu and arguments.verb == "map" and "nbd" in given:
        from jqcow.cli.qemu.exports import export_named

        # Of an export its extents are told, and nothing else.
        arguments.export = export_named(given, image_opts=arguments.image_opts)
        if arguments.export is not None:
            arguments.given = given
            return
    reads = arguments.verb in _READING and getattr(arguments, "repair", None) is None
    found = named(
        given, getattr(arguments, "format", None), image_opts=arguments.image_opts, takes_exports=reads
    )
    arguments.given, arguments.image = given, found.path
    take_secrets(arguments, found)
    arguments.format, arguments.driver = found.format, found.driver
    if found.force_share is not None:
        if getattr(arguments, "force_share", False) and not found.force_share:
            raise CommandError("--force-share/-U conflicts with image options")
        arguments.force_share = found.force_share


def take_secrets(arguments: argparse.Namespace, found: Named) -> None:
    """Note which secrets an image needs, and the files below that its name tells of.

    Raises:
        CommandError: it tells of another file below than the image does.
    """
    arguments.secret, arguments.below = found.secret, found.below
    if not found.below:
        return
    from jqcow.offline.info import read_info

    image = found.path
    for path, _ in found.below:
        special = read_info(image, force_share=True).qcow2
        stored = None if special is None else special.backing_file
        if stored is None or os.path.realpath(meaning_of(stored, image).path) != os.path.realpath(path):
            told = f"{image} does not name {path} as its backing file, and jqcow takes no other"
            raise CommandError(f"Could not open '{found.text}': {told}")
        image = path


def told_by_options(arguments: argparse.Namespace, image_format: str) -> str:
    """Return the name that QEMU shows of an image whose name says more than its file: with what it says."""
    options = {_SECRET: arguments.secret, "driver": image_format}
    return "json:" + json.dumps(options | {"file": {"driver": "file", "filename": arguments.image}})


def shown(arguments: argparse.Namespace) -> str:
    """Return the name of a disk that is no file."""
    given: str = arguments.given
    return given if protocol_of(given) in nulls.DRIVERS else f"{arguments.driver}://"


def named(
    text: str, image_format: str | None, *, image_opts: bool = False, takes_exports: bool = False
) -> Named:
    """Return what a name among arguments means.

    ``takes_exports``: it may be that of an export of an NBD server, whose path is its URI then.

    Raises:
        CommandError: it means no plain file, or contradicts ``-f``.
    """
    try:
        if takes_exports and "nbd" in text:
            from jqcow.cli.qemu import exports

            uri = exports.openable(text, image_opts=image_opts)
            if uri is not None:
                return Named(text, uri, "raw" if image_opts else image_format)
        if image_opts:
            if image_format is not None:
                raise CommandError("--image-opts and --format are mutually exclusive")
            return _of_options(text, _pairs(text), None)
        if protocol_of(text) == "json":
            return _of_json(text, image_format)
        if nulls.is_null(text):
            return Named(text, nulls.path_of_zeros(text, {}), "raw", driver="raw")
        return Named(text, _plain(meaning_of(text, "").path), image_format)
    except (RefusedName, UnsupportedFeatureError) as refused:
        raise CommandError(f"Could not open '{text}': {refused}") from refused


def _of_json(text: str, image_format: str | None) -> Named:
    # QEMU takes single quotes, too.
    rest = _SINGLE.sub(_double, text.partition(":")[2])
    try:
        options = json.loads(rest)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        # It says why.
        parse_json_name(rest)
        raise RefusedName("it is no JSON object")
    return _of_options(text, options, image_format)


def _double(found: re.Match[str]) -> str:
    inside: str | None = found[1]
    return found[0] if inside is None else json.dumps(inside.replace("\\'", "'"))


def _of_options(text: str, options: dict[str, object], image_format: str | None) -> Named:
    options, backing = _without_backing(options)
    if backing:
        top, next_below = _of_options(text, options, image_format), _of_options(text, backing, None)
        if next_below.driver is not None:
            raise RefusedName("the backing file is none")
        return replace(top, below=((next_below.path, next_below.secret), *next_below.below))
    shares = {name: options.pop(name) for name in _OF_THE_OPENING if name in options}
    share = None if not shares else any(value in (True, "on", "yes", "true") for value in shares.values())
    if options.get("driver") in nulls.DRIVERS:
        path = nulls.path_of_zeros(text, options)
        return Named(text, path, "raw", force_share=share, driver=str(options["driver"]))
    if options.get("driver") == _BLKDEBUG:
        return _of_options(text, _below_blkdebug(options), image_format)
    path, driver = parse_json_name(json.dumps(options))
    if None not in (driver, image_format) and driver != image_format:
        raise RefusedName(f"its driver is {driver}, not {image_format}")
    secret = _secret(options)
    return Named(text, _plain(path), image_format or driver, secret, share)


def _without_backing(options: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Return the options of an image, and those of the file below it."""
    below = options.get("backing")
    backing = dict(below) if isinstance(below, dict) else {}
    backing |= {name[len(_BELOW) :]: value for name, value in options.items() if name.startswith(_BELOW)}
    rest = {name: value for name, value in options.items() if not name.startswith(_BELOW)}
    if isinstance(below, dict):
        del rest["backing"]
    return rest, backing


def _below_blkdebug(options: dict[str, object]) -> dict[str, object]:
    """Return the options of the image below a driver that says how to align requests, and no more."""
    below = options.get("image")
    found = dict(below) if isinstance(below, dict) else {}
    for name, value in options.items():
        head, _, rest = name.partition(".")
        if head == "image" and rest:
            found[rest] = value
        elif name not in ("driver", "image", *_ALIGNMENTS):
            raise RefusedName(f"the option '{name}' of {_BLKDEBUG} makes errors")
    if not found:
        raise RefusedName(f"{_BLKDEBUG} names no image")
    return found


def _plain(path: str) -> str:
    """Return a path that is taken for no protocol when it is given or stored again, as QEMU does."""
    return path if protocol_of(path) is None else f"./{path}"


def _secret(options: dict[str, object]) -> str | None:
    below = options.get("encrypt")
    found = options.get(_SECRET) or (below.get("key-secret") if isinstance(below, dict) else None)
    return str(found) if found else None


def _pairs(text: str) -> dict[str, object]:
    from jqcow.cli.qemu.options import plain_pairs

    return dict(plain_pairs(text))
