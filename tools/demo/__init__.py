"""The demonstration that `tools/try` runs: a real file system survives a killed writer and a power cut."""
