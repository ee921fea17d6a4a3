"""What a damaged image still holds, and where it belongs. Nothing here writes to a file.

    survey      what each cluster of the file is; which ones no surviving table names: the orphans
    evidence    what says where an orphan belongs, each kind a module of its own
    placing     one place for each orphan, as sure as the evidence is

No module of the engine is used: what broke an image may be in what the engine believes.
"""
