"""Wrong arguments in qemu-img's words."""

from __future__ import annotations

_ONE = "Expecting one image file name"
_EXPECTING = {
    "compare": "Expecting two image file names",
    "resize": "Not enough arguments",
    "bitmap": "Expecting filename and bitmap name",
}
_MORE = "unrecognized arguments: "


def reworded(command: str, message: str) -> str:
    """Return what qemu-img says where ``argparse`` says ``message`` of the arguments of a command."""
    if command == "create" and message.startswith(_MORE):
        return f"Unexpected argument: {message.removeprefix(_MORE).split()[0]}"
    if message.startswith((_MORE, "the following arguments are required")):
        return _EXPECTING.get(command, _ONE)
    return message
