/*
 * The leaf kernels of jqcow. This file is compiled, and it is also what cffi reads:
 * plain declarations only, no preprocessor lines.
 *
 * No kernel allocates, does I/O, keeps state or fails. The caller has checked every index and
 * length against its buffers. Pointers need no alignment. Integers in tables
 * and refcount blocks are big-endian, as qcow2 has them; in arrays they are the host's. The twins, in
 * twins.py and table_twins.py, say the same in Python.
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
int64_t jqcow_refcount_add(void *block, int order, size_t start, size_t stop, uint64_t amount,
                           int is_taken_away);

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

/* The index of the first entry in which two arrays differ, or -1; their entries take 1, 2, 4 or 8 bytes. */
int64_t jqcow_first_difference(const void *first, size_t first_bytes, const void *second,
                               size_t second_bytes, size_t start, size_t stop);
/* Into an array; entries of less than a byte take one. */
void jqcow_refcount_decode(const void *block, int order, size_t entry_count, void *refcounts);
/* Returns the number of units in a row, shifted left by 1, plus 1 if they are zeros. */
uint64_t jqcow_zero_run(const void *data, size_t start, size_t stop, size_t unit_bytes);

/* A file whose references are counted: see CountedFile in table_twins.py. */
struct jqcow_counting {
    void *references;
    const void *refcounts;
    const void *owners;
    size_t reference_bytes;
    size_t refcount_bytes;
    int cluster_bits;
    uint64_t cluster_count;
    uint64_t reserved_bits;
    uint64_t refcount_max;
    uint64_t avoided_first;
    uint64_t avoided_end;
    uint64_t outside;
    uint64_t following;
    uint64_t allocated;
    uint64_t fragmented;
    uint64_t compressed;
    uint64_t zeros;
};

size_t jqcow_count_entries(struct jqcow_counting *file, const void *table, size_t start, size_t stop,
                           size_t entry_bytes, int is_active, uint64_t repeats);
