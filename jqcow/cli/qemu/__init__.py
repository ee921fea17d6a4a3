"""What commands do and say where they stand in for qemu-img: its options, its texts, its exit codes."""
