"""Files as disks: raw files, qcow2 files, chains of them, and who may have the names inside them followed."""
