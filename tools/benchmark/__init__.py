"""What `tools/bench` runs: counts of barriers, and times, of jqcow and QEMU on the same work."""
