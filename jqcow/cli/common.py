"""What all commands share: the parser, exit codes, errors in one line, sizes and JSON as in qemu-img."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, cast

import jqcow
from jqcow.cli.profile import CAREFUL, Profile
from jqcow.errors import ImageInUse, JqcowError, UnsupportedFeatureError, printable

if TYPE_CHECKING:
    from jqcow.ondisk.compression import CompressionType
    from jqcow.ondisk.form import Compat, FileOptions, Preallocation
    from jqcow.ondisk.naming import DiskFormat

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CORRUPT = 2
EXIT_LEAKS = 3
EXIT_IN_USE = 4
EXIT_UNSUPPORTED = 63
BY_SIGNAL = 128
"""A signal's number is added, as shells do."""

FORMATS = ("qcow2", "raw")
OUTPUTS = ("human", "json")
PREALLOCATIONS = ("off", "metadata", "falloc", "full")
SECTOR_BYTES = 512

FORM_OPTIONS = (
    "cluster_size",
    "refcount_bits",
    "compression_type",
    "extended_l2",
    "lazy_refcounts",
    "compat",
    "preallocation",
    "nocow",
    "data_file",
    "data_file_raw",
)
"""Options of ``-o`` that say what a new image is to be (`jqcow.ondisk.form`)."""
FORM_OPTIONS_HELP = (
    "cluster_size=SIZE, refcount_bits=BITS, compression_type=zlib|zstd, extended_l2=on|off, "
    "lazy_refcounts=on|off, compat=1.1|0.10, preallocation=off|metadata|falloc|full, nocow=on|off, "
    "data_file=NAME, data_file_raw=on|off"
)
RAW_OPTIONS = ("preallocation", "nocow")
"""Those of a new raw file."""
_ACCEPTED_OPTIONS = {
    ("encryption", "off"),
}
"""Options of qemu-img that ask for what jqcow does anyway."""
_COMPAT = {"v2": "0.10", "v3": "1.1"}
_SWITCH = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}

_OPTION = re.compile(r"(?:[^,]|,,)+")
_SUFFIXES = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_SIZE = re.compile(r"(\d+(?:\.\d+)?|0x[0-9a-f]+)([bkmgtpe]?)", re.IGNORECASE | re.ASCII)
_SIZE_MAX = 1 << 63
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


class Parser(argparse.ArgumentParser):
    """A parser that refuses abbreviated options, and whose usage errors exit with 1 as in qemu-img.

    Options may stand anywhere among the arguments, as getopt allows; what follows ``--`` is none.
    """

    def __init__(self, *, profile: Profile = CAREFUL, **options: Any) -> None:
        """Take the arguments of `argparse.ArgumentParser`; ``profile`` says what commands do unasked."""
        super().__init__(allow_abbrev=False, **options)
        self.profile = profile
        self.command: str | None = None
        """The command that runs, if this parser is above it."""
        self.set_defaults(profile=profile, verb=self.prog.rpartition(" ")[2])

    def error(self, message: str) -> NoReturn:
        """Print one line on stderr and leave; code 2 would mean a corrupt image."""
        if self.profile.is_qemu:
            from jqcow.cli.qemu import usage

            message = usage.reworded(self.command or self.prog.rpartition(" ")[2], message)
        name = self.profile.program if self.profile.is_qemu else self.prog
        stop = "" if self.profile.is_qemu else "."
        told = f"{name}: {message}\nTry '{name} --help' for more information{stop}\n"
        self.exit(EXIT_FAILED, told)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as `argparse` does, options first."""
        if args is not None and self._subparsers is None:
            args = self._options_first(list(args))
        return super().parse_known_args(args, namespace)

    def _options_first(self, args: list[str]) -> list[str]:
        options, operands = list[str](), list[str]()
        waiting = iter(args)
        for arg in waiting:
            if arg == "--":
                operands += waiting
            elif arg.startswith("--"):
                options += self._long_option(arg, waiting)
            elif arg.startswith("-") and len(arg) > 1:
                options += self._short_options(arg, waiting)
            else:
                operands.append(arg)
        return [*options, *(["--"] if any(one.startswith("-") for one in operands) else []), *operands]

    def _long_option(self, arg: str, waiting: Iterator[str]) -> list[str]:
        name, equals, _ = arg.partition("=")
        action = self._option_string_actions.get(name)
        if action is None:
            self.error(f"unrecognized option '{name}'")
        if equals or action.nargs == 0:
            return [arg]
        return [f"{name}={self._value_of(name, waiting)}"]

    def _short_options(self, arg: str, waiting: Iterator[str]) -> list[str]:
        found: list[str] = []
        for index, letter in enumerate(arg[1:], 2):
            name = f"-{letter}"
            action = self._option_string_actions.get(name)
            if action is None:
                self.error(f"unrecognized option '{arg if len(arg) == 2 else name}'")
            if action.nargs != 0:
                value = arg[index:] or self._value_of(name, waiting)
                return [*found, *([name + value] if value else [name, ""])]
            found.append(name)
        return found

    def _value_of(self, name: str, waiting: Iterator[str]) -> str:
        value = next(waiting, None)
        if value is None:
            self.error(f"missing argument for option '{name}'")
        return value


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add ``--version``: what runs, and which kernels serve it."""
    parser.add_argument("--version", action=_Version, nargs=0, help="print version and kernels")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print it and leave; the kernels are loaded only now."""
        from jqcow import _native

        print(f"jqcow {jqcow.__version__}, {_native.build_info()}")
        parser.exit()


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--output=human|json``."""
    # As qemu-img a command says itself what is unknown.
    choices = None if profile_of(parser).is_qemu else OUTPUTS
    parser.add_argument(
        "--output",
        choices=choices,
        metavar="human|json",
        default="human",
        help="how to print (default: human)",
    )


# Errors


class CommandError(Exception):
    """A command failed: the message for its user, and the exit code."""

    def __init__(self, message: str, code: int = EXIT_FAILED, *, ends_line: bool = True) -> None:
        super().__init__(message)
        self.code = code
        self.ends_line = ends_line


def formats(parser: argparse.ArgumentParser) -> Sequence[str] | None:
    """Return the formats that an option may have; as qemu-img a command says itself which are unknown."""
    return None if profile_of(parser).is_qemu else FORMATS


def disk_format(name: str | None) -> DiskFormat | None:
    """Return a format by its name.

    Raises:
        CommandError: jqcow has no such format.
    """
    if name not in (None, *FORMATS):
        raise CommandError(f"Unknown driver '{name}'")
    return cast("DiskFormat | None", name)


def profile_of(parser: argparse.ArgumentParser) -> Profile:
    """Return what the commands of a parser do unasked."""
    return parser.profile if isinstance(parser, Parser) else CAREFUL


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add ``-f FORMAT``, of an existing file."""
    parser.add_argument(
        "-f",
        "--format",
        dest="format",
        choices=formats(parser),
        help="format of the image (default: told by its magic)",
    )


def add_allow_files(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-files`` and ``--probe``, about the files that images name."""
    parser.add_argument(
        "--allow-files",
        action="store_true",
        default=profile_of(parser).allows_files,
        help="open the files that images name inside (default: refuse them)",
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        default=profile_of(parser).probes,
        help="tell the format of a backing file by its magic where the image does not say it",
    )


def add_target_format(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Add the option -O."""
    parser.add_argument(
        "-O",
        dest="target_format",
        choices=formats(parser),
        default=default,
        help="format (default: raw)",
    )


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add the option --overwrite."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        default=profile_of(parser).overwrites,
        help="replace an existing target",
    )


def add_force_share(parser: argparse.ArgumentParser) -> None:
    """Add ``-U``, of what only reads."""
    parser.add_argument(
        "-U", "--force-share", action="store_true", help="look also while another program writes"
    )


def add_preallocation(parser: argparse.ArgumentParser) -> None:
    """Add ``--preallocation``, of what a disk grows by."""
    parser.add_argument(
        "--preallocation", choices=PREALLOCATIONS, default="off", help="of what is added (default: off)"
    )


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add ``-q``."""
    parser.add_argument("-q", dest="quiet", action="store_true", help="print errors only")


def add_journal_size(parser: argparse.ArgumentParser) -> None:
    """Add ``--journal-size``, of what writes."""
    parser.add_argument(
        "--journal-size", metavar="SIZE", help="of the journal while it works, 64k to 1G (default: 8M)"
    )


def journal_size_of(arguments: argparse.Namespace) -> int | None:
    """Return the journal's size in bytes, if it was given; else, as qemu-img, one that leaves no gap."""
    if arguments.profile.is_qemu and arguments.journal_size is None:
        from jqcow.cli.qemu.changing import far_journal

        return far_journal()
    return None if arguments.journal_size is None else parse_size(arguments.journal_size, unit=1)


def add_options(parser: argparse.ArgumentParser, names: str = "cluster_size=SIZE") -> None:
    """Add ``-o name=value,...``, of a new image."""
    parser.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help=f"{names}, of a new qcow2 image",
    )


def add_cache(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add options of qemu-img that say how it caches: they change no byte, and jqcow goes its own way."""
    for name in names:
        parser.add_argument(name, metavar="CACHE", help="taken as qemu-img takes it, and not needed")


def split_options(text: str) -> list[str]:
    """Return the parts of a list with commas in between; two commas stand for one that belongs to a part."""
    return [part.replace(",,", ",") for part in _OPTION.findall(text)]


def named_options(options: Sequence[str], image_format: str, names: Container[str]) -> dict[str, str]:
    """Return what ``-o`` options say of these names; the last one counts.

    Raises:
        ValueError: another option, save for those that ask for what jqcow does anyway.
    """
    found: dict[str, str] = {}
    for option in split_options(",".join(options)):
        name, _, value = option.partition("=")
        is_known = name in names and (image_format == "qcow2" or name in RAW_OPTIONS)
        if is_known and value:
            found[name] = value
        elif image_format != "qcow2" or (name, value) not in _ACCEPTED_OPTIONS:
            raise ValueError(f"the option '{option}' of -o is not supported for {image_format}")
    return found


def file_options(found: Mapping[str, str]) -> FileOptions:
    """Return what ``-o`` options say that a new image is to be, as `jqcow.create` and `convert` take it.

    Raises:
        CommandError: a value that is no number, or neither on nor off. Other values the callee refuses.
    """
    known: FileOptions = {}
    if "cluster_size" in found:
        known["cluster_size"] = parse_size(found["cluster_size"], unit=1)
    if "refcount_bits" in found:
        if not found["refcount_bits"].isdecimal():
            raise CommandError(f"refcount_bits must be a number, not '{found['refcount_bits']}'")
        known["refcount_bits"] = int(found["refcount_bits"])
    if "compression_type" in found:
        known["compression_type"] = cast("CompressionType", found["compression_type"])
    if "extended_l2" in found:
        known["extended_l2"] = _switch("extended_l2", found["extended_l2"])
    if "lazy_refcounts" in found:
        known["lazy_refcounts"] = _switch("lazy_refcounts", found["lazy_refcounts"])
    if "compat" in found:
        known["compat"] = cast("Compat", _COMPAT.get(found["compat"], found["compat"]))
    if "preallocation" in found:
        known["preallocation"] = cast("Preallocation", found["preallocation"])
    if "data_file" in found:
        known["data_file"] = found["data_file"]
    if "data_file_raw" in found:
        known["data_file_raw"] = _switch("data_file_raw", found["data_file_raw"])
    if "nocow" in found:
        known["nocow"] = _switch("nocow", found["nocow"])
    return known


def unasked(arguments: argparse.Namespace, image_format: str) -> FileOptions:
    """Return what a new image gets that no option asks for: as qemu-img, a table with names of features."""
    return {"feature_names": True} if arguments.profile.is_qemu and image_format == "qcow2" else {}


def _switch(name: str, value: str) -> bool:
    if value not in _SWITCH:
        raise CommandError(f"{name} must be on or off, not '{value}'")
    return _SWITCH[value]


class Stopped(KeyboardInterrupt):
    """The process was asked to end; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def _stop(number: int, _: object) -> None:
    # What is under way is undone; a second request must not cut that off.
    for other in _STOPPING:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)


_STOPPING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _ending_like_an_interrupt() -> Iterator[None]:
    """Have the signals that ask a process to end raise `Stopped`, so that no half-made file stays behind."""
    # One that is ignored, as under nohup, stays so. Other threads cannot set handlers.
    is_main = threading.current_thread() is threading.main_thread()
    taken = [one for one in _STOPPING if is_main and signal.getsignal(one) is signal.SIG_DFL]
    for one in taken:
        signal.signal(one, _stop)
    try:
        yield
    finally:
        for one in taken:
            signal.signal(one, signal.SIG_DFL)


@contextmanager
def _warning_in_one_line(program: str) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(
            f"{program}: warning: {message}", file=sys.stderr
        )
        yield


def run(program: str, command: Callable[[], int]) -> int:
    """Run a command; turn what it raises into one line on stderr and an exit code."""
    try:
        with _ending_like_an_interrupt(), _warning_in_one_line(program):
            code = command()
        # Here, where a closed pipe is still ours to handle, not at the interpreter's exit.
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader went away, as `head` does: nothing more can be said to it.
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        print(f"{program}: {f'ended by {stop}' if str(stop) else 'interrupted'}", file=sys.stderr)
        return BY_SIGNAL + number
    except CommandError as error:
        end = "\n" if error.ends_line else ""
        print(f"{program}: {printable_lines(str(error))}", file=sys.stderr, end=end)
        return error.code
    except (JqcowError, OSError, ValueError) as error:
        print(f"{program}: {printable(describe(error))}", file=sys.stderr)
        return exit_code(error)


def printable_lines(text: str) -> str:
    """Return a text of our own lines that steers no terminal."""
    return "\n".join(printable(line) for line in text.split("\n"))


def print_warnings(
    arguments: argparse.Namespace, name: str, image_format: str | None, *, force_share: bool = False
) -> None:
    """Print on stderr what is wrong with an image and does not stop reading it, a line each."""
    if arguments.profile.is_qemu:
        return
    # What stops reading is the command's own to tell.
    from jqcow.offline.warnings import read_warnings

    with suppress(JqcowError, OSError):
        for warning in read_warnings(name, cast("DiskFormat | None", image_format), force_share=force_share):
            text = f"warning: {name}: {warning}; it can be read, not written"
            print(printable(text), file=sys.stderr)


def opening(
    arguments: argparse.Namespace, name: str, *, to_write: bool = False
) -> AbstractContextManager[None]:
    """Name the image in errors of opening it, in the words of the profile."""
    if arguments.profile.is_qemu:
        from jqcow.cli.qemu import wording

        return wording.opening(getattr(arguments, "given", name), to_write=to_write)
    return about(name)


@contextmanager
def about(name: str) -> Iterator[None]:
    """Name the image in the errors of the library that do not say which one they are about."""
    try:
        yield
    except FileExistsError as error:
        if not hasattr(error, "__notes__"):
            error.add_note("--overwrite replaces it")
        raise
    except JqcowError as error:
        text = describe(error)
        raise CommandError(text if name in text else f"{name}: {text}", exit_code(error)) from error


def exit_code(error: Exception) -> int:
    """Return the exit code that an error of the library stands for."""
    if isinstance(error, ImageInUse):
        return EXIT_IN_USE
    return EXIT_UNSUPPORTED if isinstance(error, UnsupportedFeatureError) else EXIT_FAILED


def describe(error: Exception) -> str:
    """Return an error as one line, with the file that it is about where the kernel's error names it."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, UnsupportedFeatureError) and not text.endswith("is not supported"):
        text = f"{text} (not supported)"
    return "; ".join([text, *getattr(error, "__notes__", [])])


# Sizes and JSON


def parse_size(text: str, unit: int = SECTOR_BYTES) -> int:
    """Return a size in bytes, rounded up to ``unit``: a number with an optional suffix k, M, G, T, P or E.

    Raises:
        ValueError: not a size, or one of 2**63 bytes or more.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not a size: use a number, with k, M, G, T, P or E for 2**10 to 2**60")
    number, suffix = match.groups()
    factor = 1 << _SUFFIXES[suffix.lower()]
    if number.lower().startswith("0x"):
        length = int(number, 16) * factor
    elif "." in number:
        whole, fraction = number.split(".")
        length = int(whole) * factor + int(fraction) * factor // 10 ** len(fraction)
    else:
        length = int(number) * factor
    length = -(-length // unit) * unit
    if length >= _SIZE_MAX:
        raise ValueError(f"'{text}' is too large: a disk has less than 8 EiB")
    return length


def human_size(length: int) -> str:
    """Return a length in bytes with three digits and a unit, as qemu-img prints it."""
    unit, value = 0, float(length)
    while value >= 1000 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.3g} {_UNITS[unit]}"


def as_json(report: Any) -> Any:
    """Return a dataclass as JSON values, with dashes in the names of fields as in qemu-img."""
    if dataclasses.is_dataclass(report) and not isinstance(report, type):
        fields = dataclasses.fields(report)
        return {field.name.replace("_", "-"): as_json(getattr(report, field.name)) for field in fields}
    if isinstance(report, list | tuple):
        return [as_json(item) for item in report]
    return report


def print_undone(report: Any, output: str) -> None:
    """Print what an undo did."""
    if output == "json":
        print_json(as_json(report))
    else:
        length = plural(report.written_bytes, "byte")
        print(
            f"{printable(report.image)}: as before the repair; {length} written back. "
            "The undo file has served, and is gone."
        )


def print_json(value: Any) -> None:
    """Print JSON as qemu-img does."""
    print(json.dumps(value, indent=4))


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: ``1 record``, ``2 records``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def arguments_of(argv: Sequence[str] | None) -> Sequence[str]:
    """Return the arguments given, or those of the process."""
    return sys.argv[1:] if argv is None else argv
