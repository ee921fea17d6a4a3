"""Reads the options of `tools/try` and tells the story."""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from demo.cuts import WriterError
from demo.filesystem import MIB, ToolError
from demo.story import tell

SIZE_MIB_MIN, SIZE_MIB_MAX = 16, 256


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(prog="tools/try", description=__doc__)
    parser.add_argument("--seed", type=int, help="repeat the run with that seed")
    parser.add_argument("--size", type=int, default=16, metavar="MIB", help="size of the disk (default 16)")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="keep the images there")
    parser.add_argument("--no-barrier", action="store_true", help="let barriers do nothing")
    options = parser.parse_args(arguments)
    if not SIZE_MIB_MIN <= options.size <= SIZE_MIB_MAX:
        parser.error(f"--size must be from {SIZE_MIB_MIN} to {SIZE_MIB_MAX}")
    if options.keep is not None and options.keep.exists():
        parser.error(f"{options.keep} exists already")
    return options


def main(arguments: list[str]) -> int:
    """Return 0 if every promise held, 1 if one was broken, 2 if the machine lacks something."""
    options = parse(arguments)
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    with ExitStack() as stack:
        if options.keep is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jqcow-try-")))
        else:
            directory = options.keep.resolve()
            directory.mkdir(parents=True)
        print(f"jqcow survives: seed {seed}; `tools/try --seed {seed}` repeats it.")
        try:
            telling = tell(directory, options.size * MIB, seed, barriers_work=not options.no_barrier)
        except ToolError as error:
            print(f"tools/try: {error}", file=sys.stderr)
            return 2
        except WriterError as error:
            print(f"   BROKEN: {error}", flush=True)
            return 1
    if options.keep is not None:
        print(f"   The images are in {directory}.")
    return 1 if telling.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
