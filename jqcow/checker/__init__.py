"""The judge of refcounts and tables. It shares bytes and devices with the engine, and nothing more."""
