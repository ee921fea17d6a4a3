"""Numbers among arguments, refused in QEMU's words."""

from __future__ import annotations

from jqcow.cli.common import CommandError, parse_size

_MAX = (1 << 63) - 1


def size_of(name: str, text: str, lowest: int = 0, highest: int = _MAX) -> int:
    """Return a size in bytes.

    Args:
        name: what the size is of, for the message.
        text: as given.
        lowest: what it is at least.
        highest: what it is at most.

    Raises:
        CommandError: no size, or one out of bounds.
    """
    try:
        found = parse_size(text, unit=1)
    except ValueError as error:
        if "too large" not in str(error):
            raise CommandError(
                f"Invalid {name} specified. You may use k, M, G, T, P or E suffixes for\n"
                "qemu-img: kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
            ) from None
        found = highest + 1
    if not lowest <= found <= highest:
        raise CommandError(f"Invalid {name} specified. Must be between {lowest} and {highest}.")
    return found
