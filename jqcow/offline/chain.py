"""Backing chains: an image, the file below it, the file below that one, down to a file that names none.

Every file is opened read-only, and locked against writers as long as it is open. What a chain may do to
its reader is bounded: a file below is opened only where the policy allows it, no file comes twice, and no
chain is longer than `MAX_CHAIN_FILES`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jqcow.device.file import FileDevice
from jqcow.errors import FormatError, JqcowError, UnsupportedFeatureError
from jqcow.offline.info import Format, ImageFacts, probe_format, raw_size, read_info
from jqcow.offline.records import View, open_to_look
from jqcow.ondisk.naming import FilePolicy, NamedFile, backing_file_of, known_format, require_allowed

MAX_CHAIN_FILES = 1024
"""The longest chain that is followed. QEMU has no such limit; this one bounds memory and open files."""


@dataclass(frozen=True)
class Layer:
    """One open file of a chain. Whoever gets it closes its device.

    Attributes:
        path: of the file.
        format: of the file.
        device: the open file.
        view: the metadata as after replay; None for a raw file.
        backing: the file below, None at the end of the chain.
    """

    path: str
    format: Format
    device: FileDevice
    view: View | None
    backing: NamedFile | None

    @property
    def size(self) -> int:
        """Size of the layer's disk in bytes."""
        return raw_size(self.device) if self.view is None else self.view.header.size


def open_layers(
    path: str | os.PathLike[str],
    image_format: Format | None,
    *,
    allow: FilePolicy,
    probe: bool = False,
    force_share: bool = False,
) -> Iterator[Layer]:
    """Yield the files of a chain from the top, each opened when it is asked for.

    Args:
        path: of the image at the top.
        image_format: of that image; None tells it by its magic.
        allow: which files named inside images may be opened.
        probe: tell the format of a file below by its magic where its overlay does not store it. Whoever
            writes to the guest's disk of a raw file then chooses its format.
        force_share: look also while other programs write, unless a journal is live.

    Raises:
        FileAccessDenied: the policy does not allow a file below.
        UnsupportedFeatureError: a name with a protocol, a format that is unknown or, without ``probe``, not
            stored.
        FormatError: a chain that contains itself or is too long, or a file that is no image.
        JqcowError: a file is damaged or in use by a writer.
        OSError: the host failed. A note names the image that needs the file.
    """
    seen: set[tuple[int, int]] = set()
    layer = _open_layer(os.fspath(path), image_format, seen, force_share=force_share)
    yield layer
    while layer.backing is not None:
        named = layer.backing
        require_allowed(named, allow)
        known = known_format(named)
        if known is None and not probe:
            raise UnsupportedFeatureError(
                "a backing file without a stored format",
                f"{named.image} does not say of which format {named.path} is, and it is not guessed unasked",
            )
        with _naming_the_overlay(named):
            layer = _open_layer(named.path, known, seen, force_share=force_share)
        yield layer


@contextmanager
def _naming_the_overlay(named: NamedFile) -> Iterator[None]:
    try:
        yield
    except (JqcowError, OSError) as error:
        error.add_note(f"{named.path} is the backing file of {named.image}")
        raise


def _open_layer(
    path: str, image_format: Format | None, seen: set[tuple[int, int]], *, force_share: bool
) -> Layer:
    """Open one file, and enter it into ``seen``."""
    host_file = os.stat(path)
    identity = host_file.st_dev, host_file.st_ino
    if identity in seen:
        raise FormatError(f"{path} is part of a chain that contains itself")
    if len(seen) == MAX_CHAIN_FILES:
        raise FormatError(f"the chain has more than {MAX_CHAIN_FILES} files")
    seen.add(identity)
    device = open_to_look(path, force_share=force_share)
    try:
        known = image_format or probe_format(device)
        view = View(device) if known == "qcow2" else None
        backing = None if view is None else backing_file_of(view.area, path)
        return Layer(path, known, device, view, backing)
    except BaseException:
        device.close()
        raise


def read_chain(
    path: str | os.PathLike[str],
    image_format: Format | None = None,
    *,
    allow: FilePolicy,
    probe: bool = False,
    force_share: bool = False,
) -> list[ImageFacts]:
    """Return the facts about every file of a chain, from the top; the files are opened one after another.

    Takes and raises what `open_layers` does.
    """
    facts: list[ImageFacts] = []
    for layer in open_layers(path, image_format, allow=allow, probe=probe, force_share=force_share):
        # Still open and locked, so that the facts are those of the file whose name was followed.
        try:
            facts.append(read_info(layer.path, layer.format, force_share=force_share))
        finally:
            layer.device.close()
    return facts
