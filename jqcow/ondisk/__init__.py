"""What bytes mean: the structures of a qcow2 image and of the jqcow journal. No I/O happens here."""
