"""Examples for the help and the man page of each command: what it is for, and a line to type."""

from __future__ import annotations

TITLE = "examples:"

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "create": (
        ("an empty disk of 20 GiB", "jqcow create disk.qcow2 20G"),
        ("an overlay", "jqcow create -b disk.qcow2 -F qcow2 overlay.qcow2"),
    ),
    "resize": (("10 GiB more", "jqcow resize disk.qcow2 +10G"),),
    "info": (
        ("a chain, for a program", "jqcow info --backing-chain --allow-files --output=json overlay.qcow2"),
    ),
    "check": (
        ("is anything wrong", "jqcow check disk.qcow2"),
        ("repair it", "jqcow check -r all disk.qcow2"),
    ),
    "map": (("where the data lies", "jqcow map --output=json disk.qcow2"),),
    "journal": (("what a crash left", "jqcow journal disk.qcow2"),),
    "undo": (("take the last repair back", "jqcow undo disk.qcow2"),),
    "snapshot": (
        ("make one", "jqcow snapshot -c before-upgrade disk.qcow2"),
        ("go back", "jqcow snapshot -a before-upgrade disk.qcow2"),
    ),
    "amend": (("for old programs", "jqcow amend -o compat=0.10 disk.qcow2"),),
    "bitmap": (("note what changes", "jqcow bitmap --add disk.qcow2 backup"),),
    "passphrase": (("list key slots", "jqcow passphrase -l disk.qcow2"),),
    "commit": (("into the base", "jqcow commit --allow-files overlay.qcow2"),),
    "rebase": (("stand alone", "jqcow rebase -b '' --allow-files overlay.qcow2"),),
    "convert": (
        ("compressed", "jqcow convert -c -O qcow2 disk.qcow2 small.qcow2"),
        ("to another machine", "jqcow convert -O qcow2 disk.qcow2 - | ssh host 'cat > disk.qcow2'"),
    ),
    "bench": (("time 10,000 reads", "jqcow bench -c 10000 disk.qcow2"),),
    "compact": (("give space back", "jqcow compact disk.qcow2"),),
    "compare": (("are they equal", "jqcow compare disk.qcow2 disk.raw"),),
    "dd": (("the first MiB", "jqcow dd if=disk.qcow2 of=head.raw bs=1M count=1"),),
    "diff": (("since a snapshot", "jqcow diff --from before-upgrade disk.qcow2"),),
    "export": (("share what is equal", "jqcow export disk.qcow2 store monday"),),
    "import": (("have it back", "jqcow import -O qcow2 store/monday.json disk.qcow2"),),
    "measure": (("before it is converted", "jqcow measure -O qcow2 disk.raw"),),
    "mount": (("look into a partition", "jqcow mount disk.qcow2 directory"),),
    "serve": (("to a virtual machine", "jqcow serve --socket disk.sock disk.qcow2"),),
    "protect": (("keep checksums", "jqcow protect disk.qcow2"),),
    "verify": (("did anything rot", "jqcow verify disk.qcow2"),),
    "heal": (("by a backup", "jqcow heal --from backup.qcow2 disk.qcow2"),),
}


def told(command: str) -> str:
    """Return the examples of a command as the end of its help; empty without one."""
    lines = [f"  {line}\n      {what}" for what, line in EXAMPLES.get(command, ())]
    return "\n".join([TITLE, *lines]) if lines else ""
