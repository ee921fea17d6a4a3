"""The command about the passphrases of an encrypted image: list its key slots, add one, remove one."""

from __future__ import annotations

import argparse
from typing import Any

from jqcow.cli import common, secrets
from jqcow.offline.info import LuksFacts, read_info
from jqcow.offline.passphrases import ITER_TIME_MILLISECONDS, add_passphrase, remove_passphrase

NEW = "new-"


def add_parsers(commands: Any) -> None:
    """Add the subcommand of this module."""
    parser = commands.add_parser(
        "passphrase",
        help="list, add or remove passphrases of an encrypted image",
        description="List the key slots of an encrypted image, add a passphrase, or remove one. Each "
        "change is whole or not at all, and durable.",
    )
    parser.set_defaults(command=passphrase_command)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("-l", dest="list", action="store_true", help="list all key slots; nothing is written")
    action.add_argument("-a", dest="add", action="store_true", help="add a passphrase")
    action.add_argument("-d", dest="delete", action="store_true", help="remove the passphrase that is given")
    parser.add_argument(
        "--slot",
        type=int,
        metavar="N",
        help="of key slot N: -d removes it, the one given stays; -a adds it there",
    )
    secrets.add_passphrase(parser, what="the image")
    secrets.add_passphrase(parser, NEW, "its own that -a adds")
    parser.add_argument(
        "--iter-time",
        metavar="MS",
        default=str(ITER_TIME_MILLISECONDS),
        help=f"what a try of the new one is to cost here (default: {ITER_TIME_MILLISECONDS})",
    )
    common.add_journal_size(parser)
    common.add_output(parser)
    common.add_quiet(parser)
    parser.add_argument("image", metavar="IMAGE")


def passphrase_command(arguments: argparse.Namespace) -> int:
    """List or change the passphrases of an image."""
    name = arguments.image
    if arguments.slot is not None and arguments.list:
        raise common.CommandError("--slot says which passphrase comes or goes: use it with -a or -d")
    with common.about(name):
        if arguments.list:
            _list(_luks_of(name), arguments.output)
            return common.EXIT_OK
        journal_size = common.journal_size_of(arguments)
        old = secrets.passphrase_of(arguments)
        if arguments.add:
            _luks_of(name)
            new = secrets.new_passphrase_of(arguments, NEW, name)
            iter_time = secrets.milliseconds(arguments.iter_time)
            slot = add_passphrase(
                name, old, new, iter_time=iter_time, slot=arguments.slot, journal_size=journal_size
            )
        else:
            slot = remove_passphrase(name, old, slot=arguments.slot, journal_size=journal_size)
    if arguments.output == "json":
        common.print_json({"slot": slot})
    elif not arguments.quiet:
        print(f"Passphrase {'added to' if arguments.add else 'removed from'} key slot {slot}.")
    return common.EXIT_OK


def _luks_of(name: str) -> LuksFacts:
    facts = read_info(name, "qcow2").qcow2
    if facts is None or facts.luks is None:
        raise common.CommandError(f"{name}: the image is not encrypted with LUKS")
    return facts.luks


def _list(luks: LuksFacts, output: str) -> None:
    if output == "json":
        common.print_json(luks_json(luks)["slots"])
        return
    for number, slot in enumerate(luks.slots):
        print(f"{number}: " + ("empty" if slot.iters is None else f"in use, {slot.iters} iterations"))


def luks_json(luks: LuksFacts) -> dict[str, Any]:
    """Return the facts about the encryption with qemu-img's names, in its order."""
    told: dict[str, Any] = {
        "ivgen-alg": luks.ivgen_alg,
        "hash-alg": luks.hash_alg,
        "cipher-alg": luks.cipher_alg,
        "uuid": luks.uuid,
    }
    if luks.ivgen_hash_alg is not None:
        told["ivgen-hash-alg"] = luks.ivgen_hash_alg
    told |= {"format": "luks", "cipher-mode": luks.cipher_mode}
    told["slots"] = [
        {"active": False, "key-offset": slot.key_offset}
        if slot.iters is None
        else {"active": True, "iters": slot.iters, "key-offset": slot.key_offset, "stripes": slot.stripes}
        for slot in luks.slots
    ]
    return told | {"payload-offset": luks.payload_offset, "master-key-iters": luks.master_key_iters}
