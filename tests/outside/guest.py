"""A Linux guest in QEMU on a disk that jqcow serves: it boots from it, installs packages, and is killed.

The guest's kernel is Debian's, which knows ext4 and NVMe without modules; its only other program is busybox.
It prints what it has made durable on its serial console. Guest and server are killed at random moments, as by
one failure of the host. Then the image is recovered; the file system must be sound and hold what was printed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.support.qemu import check_clean, done, run

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / ".guest"
"""Where the guest's kernel stays once it is here; not part of the project."""
KERNEL_PACKAGE = "linux-image-cloud-amd64"
INIT = Path(__file__).with_suffix(".init")
DISK_BYTES = 96 << 20
PACKAGES = 12
PACKAGE_FILES = 5
ACKNOWLEDGED = ("INSTALLED", "KEPT", "REMOVED")
WAIT_SECONDS = 600
"""For one line of the guest, which is slow without hardware's help, on a busy machine."""


def kernel() -> Path:
    """Return the kernel of the guest, which is fetched from Debian once, and not installed.

    Raises:
        AssertionError: Debian's packages cannot be had.
    """
    found = [*KEPT.glob("boot/vmlinuz-*")]
    if not found:
        asked = ("apt-cache", "depends", KERNEL_PACKAGE)
        if run(*asked).returncode:
            # A fresh machine has no lists of packages yet.
            run("apt-get", "update")
        package = re.search(r"Depends: (linux-image-\S+)", run(*asked).stdout)
        assert package, f"apt knows no {KERNEL_PACKAGE}: run apt-get update"
        KEPT.mkdir(exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", package[1]], cwd=KEPT, check=True, capture_output=True)
        (archive,) = KEPT.glob("linux-image-*.deb")
        done("dpkg-deb", "-x", archive, KEPT)
        archive.unlink()
        shutil.rmtree(KEPT / "lib")
        found = [*KEPT.glob("boot/vmlinuz-*")]
    return found[0]


def make_mirror(folder: Path, chance: Random) -> tuple[Path, dict[str, dict[str, str]]]:
    """Make a disk with packages; return it, and of each package the files that it brings, with their MD5."""
    packages: dict[str, dict[str, str]] = {}
    mirror = folder / "mirror"
    mirror.mkdir()
    for number in range(PACKAGES):
        name = f"package-{number:02}"
        tree = folder / name
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN" / "control").write_text(
            f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: Tests <tests@example.org>\n"
            "Description: files of a test\n"
        )
        packages[name] = {}
        for at in range(PACKAGE_FILES):
            path = tree / "usr" / "share" / name / f"file-{at}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(chance.randbytes(chance.randrange(1, 80_000)))
            packages[name][f"/{path.relative_to(tree)}"] = hashlib.md5(path.read_bytes()).hexdigest()
        done("dpkg-deb", "--root-owner-group", "-Zgzip", "--build", tree, mirror / f"{name}.deb")
    disk = folder / "mirror.raw"
    done("mke2fs", "-q", "-t", "ext4", "-d", mirror, disk, "16M")
    return disk, packages


def make_disk(folder: Path) -> Path:
    """Make the image that the guest boots from."""
    tree = folder / "tree"
    for name in ("bin", "dev", "installed", "mirror", "proc", "tmp", "var/lib/dpkg/info", "work"):
        (tree / name).mkdir(parents=True)
    (tree / "var/lib/dpkg/status").touch()
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, tree / "bin" / "busybox")
    shutil.copy(INIT, tree / "init")
    (tree / "init").chmod(0o755)
    raw, image = folder / "disk.raw", folder / "disk.qcow2"
    done("mke2fs", "-q", "-t", "ext4", "-d", tree, raw, str(DISK_BYTES >> 10))
    jqcow("convert", "-q", "-f", "raw", "-O", "qcow2", raw, image)
    raw.unlink()
    return image


def jqcow(*words: object) -> str:
    """Run a command of jqcow that must succeed."""
    return done(sys.executable, "-m", "jqcow", *words)


class Running:
    """A guest, and the server of its disk."""

    def __init__(self, image: Path, mirror: Path, mode: str) -> None:
        self.lines: list[str] = []
        self._rest = b""
        socket = image.with_suffix(".nbd")
        socket.unlink(missing_ok=True)
        self.server = subprocess.Popen(
            [sys.executable, "-m", "jqcow", "serve", "-t", "-k", socket, image],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert self.server.stdout is not None
        # It says where it serves once it does.
        self.server.stdout.readline()
        self.guest = subprocess.Popen(self._command(socket, mirror, mode), stdout=subprocess.PIPE, bufsize=0)

    @staticmethod
    def _command(socket: Path, mirror: Path, mode: str) -> list[str]:
        nbd = f"file.driver=nbd,file.server.type=unix,file.server.path={socket}"
        disk = f"if=none,id=disk,format=raw,discard=unmap,{nbd}"
        return [
            *(
                "qemu-system-x86_64",
                "-accel",
                "tcg",
                "-m",
                "256",
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
            ),
            *("-display", "none", "-serial", "stdio", "-kernel", str(kernel())),
            "-append",
            f"console=ttyS0 quiet panic=-1 root=/dev/nvme0n1 rw rootfstype=ext4 init=/init mode={mode}",
            *("-drive", disk, "-device", "nvme,drive=disk,serial=disk"),
            *("-drive", f"if=none,id=mirror,format=raw,readonly=on,file={mirror}"),
            *("-device", "nvme,drive=mirror,serial=mirror"),
        ]

    def read_until(self, moment: float) -> bool:
        """Read what the guest prints until a moment of the monotonic clock; return False at its end."""
        assert self.guest.stdout is not None
        while (left := moment - time.monotonic()) > 0:
            if select.select([self.guest.stdout], [], [], left)[0]:
                data = os.read(self.guest.stdout.fileno(), 1 << 16)
                *whole, self._rest = (self._rest + data).split(b"\n")
                self.lines += [line.decode(errors="replace").strip() for line in whole]
                if not data:
                    return False
        return True

    def wait_for(self, words: str | tuple[str, ...], count: int = 1) -> None:
        """Wait until the guest has printed so many lines that begin with words, or is at its end."""
        limit = time.monotonic() + WAIT_SECONDS
        while sum(line.startswith(words) for line in self.lines) < count:
            assert time.monotonic() < limit, f"no {words} in time: {self.lines[-5:]}"
            if not self.read_until(time.monotonic() + 0.05):
                return

    def kill(self, *, server_first: bool) -> None:
        """Kill both, at once but for the order, and read what is left of the guest's words."""
        both = [self.server, self.guest] if server_first else [self.guest, self.server]
        for process in both:
            process.send_signal(signal.SIGKILL)
        self.read_until(time.monotonic() + WAIT_SECONDS)
        for process in both:
            process.wait()

    def end(self) -> None:
        """Wait for a guest that ends by itself, and stop the server."""
        while self.read_until(time.monotonic() + WAIT_SECONDS):
            pass
        assert self.guest.wait() == 0
        self.server.terminate()
        assert self.server.wait() == 0


@contextmanager
def running(image: Path, mirror: Path, mode: str) -> Iterator[Running]:
    """Run a guest on the disk of an image; nothing of it is left at the end."""
    both = Running(image, mirror, mode)
    try:
        yield both
    finally:
        for process in (both.guest, both.server):
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@dataclass
class Promised:
    """What the guest has said to be durable: files by name with their MD5, None for one that is removed."""

    packages: dict[str, dict[str, str]]
    files: dict[str, str | None] = field(default_factory=dict)
    installed: set[str] = field(default_factory=set)

    def tell(self, lines: list[str]) -> None:
        """Take what a guest printed. A file that was about to change may be anything."""
        for line in lines:
            match line.split():
                case ["INSTALLED", name]:
                    self.installed.add(name)
                    self.files |= self.packages[name]
                case ["CHANGING", name]:
                    self.files.pop(name, None)
                case ["KEPT", digest, name]:
                    self.files[name] = digest
                case ["REMOVED", name]:
                    self.files[name] = None

    def lost(self, found: dict[str, str]) -> list[str]:
        """Return the files that are not as they were promised."""
        return [name for name, digest in self.files.items() if found.get(name) != digest]


@dataclass
class GuestReport:
    """What the kills met."""

    kills: int = 0
    boots_cut: int = 0
    recovered: int = 0
    acknowledged: int = 0
    packages_installed: int = 0
    files_compared: int = 0


class Victim:
    """A guest's disk, whose guest and server are killed again and again."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.chance = Random(f"guest/{seed}")
        self.mirror, packages = make_mirror(folder, self.chance)
        self.image = make_disk(folder)
        self.promised = Promised(packages)
        self.report = GuestReport()

    def kill(self) -> None:
        """Boot, let it work, kill guest and server, and judge what is left."""
        with running(self.image, self.mirror, "work") as both:
            if self.chance.random() < 0.1:
                both.read_until(time.monotonic() + self.chance.random() * 10)
            else:
                both.wait_for("BOOTED")
                both.wait_for(ACKNOWLEDGED, self.chance.randrange(1, 20))
                both.read_until(time.monotonic() + self.chance.random() * 0.5)
            assert both.guest.poll() is None, f"seed {self.seed}: the guest ended: {both.lines[-5:]}"
            both.kill(server_first=self.chance.random() < 0.5)
        self.report.kills += 1
        self.report.boots_cut += "BOOTED" not in both.lines
        self.report.acknowledged += sum(line.startswith(ACKNOWLEDGED) for line in both.lines)
        self.promised.tell(both.lines)
        self.report.packages_installed = len(self.promised.installed)
        self.judge()

    def judge(self) -> None:
        """Recover the image; the file system must be sound after its own recovery, with what was promised."""
        where = f"seed {self.seed}, kill {self.report.kills}"
        command = "import sys; from jqcow.cli.recover import main; sys.exit(main(sys.argv[1:]))"
        told = json.loads(done(sys.executable, "-c", command, "--output", "json", self.image))
        self.report.recovered += told["state"] != "clean"
        check_clean(self.image)
        raw = self.folder / "judged.raw"
        jqcow("convert", "-q", "-O", "raw", self.image, raw)
        replayed = run("e2fsck", "-p", raw)
        assert replayed.returncode in (0, 1), f"{where}: {replayed.stdout}"
        sound = run("e2fsck", "-fn", raw)
        assert sound.returncode == 0, f"{where}: {sound.stdout}"
        lost = self.promised.lost(files_in(raw, self.folder / "judged"))
        assert not lost, f"{where}: {lost[:5]} of {len(self.promised.files)} files"
        self.report.files_compared += len(self.promised.files)
        raw.unlink()

    def look(self) -> None:
        """Boot once more: the guest finds its files, and leaves a clean file system in a plain image."""
        with running(self.image, self.mirror, "look") as both:
            both.wait_for("ENDED")
            both.end()
        words = [line.split() for line in both.lines if line.startswith("FOUND")]
        found = {name: digest for _, digest, name in words}
        assert not self.promised.lost(found), self.promised.lost(found)
        check_clean(self.image)
        raw = self.folder / "judged.raw"
        jqcow("convert", "-q", "-O", "raw", self.image, raw)
        done("e2fsck", "-fn", raw)


def files_in(raw: Path, folder: Path) -> dict[str, str]:
    """Return the files of a file system below /usr and /work, with their MD5."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("usr", "work"):
        run("debugfs", "-R", f"rdump /{name} {folder}", raw)
    # A folder that a guest has not made is none.
    return {
        f"/{path.relative_to(folder)}": hashlib.md5(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def kill_guests(folder: Path, seed: int, kills: int) -> GuestReport:
    """Kill a guest and its server so many times; raise AssertionError if a promise is broken."""
    victim = Victim(folder, seed)
    for _ in range(kills):
        victim.kill()
    victim.look()
    return victim.report
