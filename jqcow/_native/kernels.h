/*
 * The leaf kernels of jqcow. This file is compiled, and it is also what cffi reads:
 * plain declarations only, no preprocessor lines.
 *
 * No kernel allocates, does I/O, keeps state or fails. The caller has checked every index and
 * length against its buffers. Pointers need no alignment. Integers in tables
 * and refcount blocks are big-endian, as qcow2 has them. The twins in twins.py say the same in
 * Python.
 */

uint32_t jqcow_crc32c(const void *data, size_t length_bytes, uint32_t value);
uint32_t jqcow_crc32c_portable(const void *data, size_t length_bytes, uint32_t value);

int jqcow_is_zero(const void *data, size_t length_bytes);

uint64_t jqcow_refcount_get(const void *block, size_t index, int order);
void jqcow_refcount_set(void *block, size_t index, int order, uint64_t value);
int64_t jqcow_refcount_find_zero(const void *block, int order, size_t start, size_t stop);
int64_t jqcow_refcount_find_used(const void *block, int order, size_t start, size_t stop);
int64_t jqcow_refcount_last_used(const void *block, int order, size_t entry_count);
uint64_t jqcow_refcount_run(const void *block, int order, size_t start, size_t stop);
/* Changes nothing where an entry would leave its range; returns the index of that one, or -1. */
int64_t jqcow_refcount_add(void *block, int order, size_t start, size_t stop, int64_t delta);

/* Both return the number of entries, or subclusters, in the run, shifted left by 2, plus its kind. */
uint64_t jqcow_l2_run(const void *table, size_t index, size_t limit, int cluster_bits,
                      size_t entry_bytes);
uint64_t jqcow_subcluster_run(const void *table, size_t index, size_t limit, int cluster_bits);

/* Marks take 2 bits a cluster, four to a byte from its lowest bits on. counts has JUDGED entries. */
void jqcow_l2_judge(const void *table, size_t entry_count, size_t entry_bytes, int cluster_bits,
                    uint64_t reserved, uint64_t host_bytes, void *marks, uint64_t *counts);
/* Sets the bits of clusters with a refcount and no mark; returns how many they are. */
uint64_t jqcow_find_unmarked(const void *block, int order, size_t start, size_t stop, const void *marks,
                             uint64_t first_cluster, void *bits);

/* One byte for each sector of 512 bytes: what it may be a part of. */
void jqcow_sector_kinds(const void *data, size_t sector_count, uint64_t host_bytes, void *kinds);

/* Counts the data entries whose cluster is marked MANY, and those whose cluster is a STRUCTURE's. */
void jqcow_l2_shared(const void *table, size_t entry_count, size_t entry_bytes, uint64_t cluster_count,
                     int cluster_bits, const void *marks, uint64_t *counts);

void jqcow_set_copied(void *table, size_t start, size_t stop, int copied, size_t entry_bytes);

/* XORs each 16-byte block with its XTS tweak; tweaks has 16 bytes for each sector: that of its first block. */
void jqcow_xts_whiten(void *data, const void *tweaks, size_t sector_count, size_t sector_bytes);
