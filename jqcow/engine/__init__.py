"""The transactional heart: journal, staged metadata, refcounts, mapping and the data path."""
