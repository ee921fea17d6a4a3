"""Structures of the guest that tell where they belong: a module for each, found by `find`."""
