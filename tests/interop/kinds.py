"""The kinds of images in which two features meet: factors, and what QEMU can make of them."""

from __future__ import annotations

import struct
from functools import cache

from tests.interop.pairwise import CoveringArray, Row

SECTOR_BYTES = 512

FACTORS = {
    "cluster": (512, 4096, 16384, 65536, 2 << 20),
    "entries": ("standard", "extended"),
    "refcounts": (1, 2, 4, 8, 16, 32, 64),
    "backing": ("none", "raw", "qcow2", "qcow2-raw", "compressed-3"),
    "name": ("-", "plain", "file:", "json:"),
    "base": ("-", "shorter", "equal", "longer"),
    "snapshots": ("none", "one", "several", "sizes"),
    "compression": ("none", "zlib", "zstd"),
    "zeroes": ("none", "plain", "kept"),
    "version": (3, 2),
    "disk": ("aligned", "unaligned"),
    "lazy": ("off", "on"),
    "preallocation": ("off", "metadata", "falloc", "full"),
    "encryption": ("none", "xts-256", "cbc-128"),
    "bitmaps": ("none", "one", "several"),
    "ended": ("closed", "killed"),
    "data": ("inside", "file", "raw file", "device"),
    "place": ("file", "device-512", "device-4096"),
    "state": ("none", "kept"),
    "unknown": ("none", "compatible", "autoclear", "extension"),
    "nocow": ("off", "on"),
}
"""``ended``: how QEMU left the image; killed it leaves the dirty bit (lazy refcounts) and bitmaps in use.

``name``: of the backing file; a data file has a plain one. ``place``: where the image is; a device has
sectors of so many bytes. ``state``: whether the snapshots have that of a machine. ``unknown``: what the
header has that no specification knows: a bit of features, or an extension.
"""

DISK_BYTES = {512: 600 * 1024, 4096: 1 << 20, 16384: 2 << 20, 65536: 3 << 20, 2 << 20: 14 << 20}
CIPHERS = {
    "xts-256": "aes-256,xts,plain64,sha256",
    "cbc-128": "aes-128,cbc,essiv,sha1",
}
DATA_FILE = "data.raw"
UNKNOWN_BIT = 50
"""Of the features of each kind."""
UNKNOWN_EXTENSION = struct.pack(">II8s", 0x4A51_5445, 5, b"hello")
"""A header extension with five bytes, padded."""
KEY = "key"
"""The id of the secret in QEMU's options."""


def allowed(row: Row) -> bool:
    """Whether QEMU can make such an image; a row without some factors may become one."""

    def has(factor: str, *levels: object) -> bool:
        return row.get(factor) in levels

    def is_not(factor: str, *levels: object) -> bool:
        return factor in row and row[factor] not in levels

    # Any of three factors tells, so that a part of a row is refused early.
    is_alone = has("backing", "none") or has("base", "-") or has("name", "-")
    is_overlay = is_not("backing", "none") or is_not("base", "-") or is_not("name", "-")
    forbidden = (
        is_overlay and is_alone,
        is_overlay and has("data", "raw file"),
        # What is allocated hides what is below, but for subclusters.
        is_overlay and is_not("preallocation", "off") and has("entries", "standard"),
        # QEMU compresses nothing that has a cluster.
        is_not("compression", "none") and is_not("preallocation", "off"),
        # A disk is whole sectors, and that is what such a cluster is.
        has("cluster", 512) and has("disk", "unaligned"),
        has("entries", "extended") and has("cluster", 512, 4096),
        has("version", 2) and has("entries", "extended"),
        has("version", 2) and is_not("refcounts", 16),
        has("version", 2) and (has("compression", "zstd") or has("snapshots", "sizes") or has("lazy", "on")),
        has("version", 2) and (is_not("zeroes", "none") or is_not("bitmaps", "none")),
        # What refcounts of so few bits cannot count.
        has("refcounts", 1) and is_not("snapshots", "none"),
        has("refcounts", 2) and has("snapshots", "several"),
        has("refcounts", 2, 4) and is_not("snapshots", "none") and is_not("compression", "none"),
        # The data in another file has no refcounts, which snapshots and packed clusters need.
        is_not("data", "inside")
        and (has("version", 2) or is_not("compression", "none") or is_not("snapshots", "none")),
        # Nothing allocates the space of a device but those who own it.
        is_not("place", "file") and has("preallocation", "falloc", "full") and has("data", "inside"),
        has("data", "device") and has("preallocation", "falloc", "full"),
        # A device has no such option.
        has("nocow", "on") and (is_not("place", "file") or has("data", "device")),
        # The state of a machine lies in a snapshot, in its clusters that are counted; QEMU 7.2 encrypts none.
        has("state", "kept")
        and (has("snapshots", "none") or has("refcounts", 1) or is_not("data", "inside")),
        has("state", "kept") and is_not("encryption", "none"),
        has("version", 2) and is_not("unknown", "none"),
        # Such a header has no room left.
        has("cluster", 512) and has("unknown", "extension"),
    )
    return not any(forbidden)


@cache
def array_of(seed: int) -> CoveringArray:
    """Return a covering array; another one for each seed."""
    return CoveringArray(FACTORS, allowed, seed)


def sizes_of(row: Row) -> tuple[int, int]:
    """Return the bytes of the disk, and of each image below it."""
    cluster_bytes = int(row["cluster"])
    size = DISK_BYTES[cluster_bytes] + (3 * SECTOR_BYTES if row["disk"] == "unaligned" else 0)
    below = {"shorter": size * 2 // 3 // SECTOR_BYTES * SECTOR_BYTES + SECTOR_BYTES, "equal": size}
    return size, below.get(str(row["base"]), size + 4 * cluster_bytes)


def name_in(row: Row, path: str, driver: str) -> str:
    """Return how the image of a row names another file."""
    match row["name"]:
        case "file:":
            return f"file:{path}"
        case "json:":
            return f'json:{{"driver": "{driver}", "file": {{"driver": "file", "filename": "{path}"}}}}'
    return path


def option_words(row: Row, data_file: str) -> str:
    """Return the options with which qemu-img makes the image of a row."""
    options = {
        "cluster_size": row["cluster"],
        "compat": "1.1" if row["version"] == 3 else "0.10",
        "refcount_bits": row["refcounts"],
        "lazy_refcounts": row["lazy"],
        "extended_l2": "on" if row["entries"] == "extended" else "off",
        "compression_type": "zstd" if row["compression"] == "zstd" else "zlib",
        "preallocation": row["preallocation"],
    }
    if row["nocow"] == "on":
        options["nocow"] = "on"
    if row["data"] != "inside":
        options |= {"data_file": data_file, "data_file_raw": "on" if row["data"] == "raw file" else "off"}
    if row["encryption"] != "none":
        cipher, mode, ivgen, digest = CIPHERS[str(row["encryption"])].split(",")
        options |= {
            "encrypt.format": "luks",
            "encrypt.key-secret": KEY,
            "encrypt.iter-time": 10,
            "encrypt.cipher-alg": cipher,
            "encrypt.cipher-mode": mode,
            "encrypt.ivgen-alg": ivgen,
            "encrypt.hash-alg": digest,
        }
        if ivgen == "essiv":
            options["encrypt.ivgen-hash-alg"] = "sha256"
    return ",".join(f"{name}={value}" for name, value in options.items())
