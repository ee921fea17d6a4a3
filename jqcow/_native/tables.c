/* Kernels over whole tables; kernels.h holds the contract. Compiled in one unit with kernels.c. */

/* Arrays of unsigned integers of the host, of 1, 2, 4 or 8 bytes: Python's "B", "H", "I" and "Q". */

static inline uint64_t array_get(const void *array, size_t width_bytes, size_t index)
{
    switch (width_bytes) {
    case 1:
        return ((const uint8_t *)array)[index];
    case 2: {
        uint16_t value;
        memcpy(&value, (const uint8_t *)array + index * 2, sizeof value);
        return value;
    }
    case 4: {
        uint32_t value;
        memcpy(&value, (const uint8_t *)array + index * 4, sizeof value);
        return value;
    }
    default:
        return load_native64((const uint8_t *)array + index * 8);
    }
}

static inline void array_set(void *array, size_t width_bytes, size_t index, uint64_t value)
{
    switch (width_bytes) {
    case 1:
        ((uint8_t *)array)[index] = (uint8_t)value;
        break;
    case 2: {
        uint16_t narrow = (uint16_t)value;
        memcpy((uint8_t *)array + index * 2, &narrow, sizeof narrow);
        break;
    }
    case 4: {
        uint32_t narrow = (uint32_t)value;
        memcpy((uint8_t *)array + index * 4, &narrow, sizeof narrow);
        break;
    }
    default:
        memcpy((uint8_t *)array + index * 8, &value, sizeof value);
    }
}

static inline __attribute__((always_inline)) int64_t
find_difference(const void *first, size_t first_bytes, const void *second, size_t second_bytes,
                size_t start, size_t stop)
{
    for (size_t index = start; index < stop; index++)
        if (array_get(first, first_bytes, index) != array_get(second, second_bytes, index))
            return (int64_t)index;
    return -1;
}

int64_t jqcow_first_difference(const void *first, size_t first_bytes, const void *second,
                               size_t second_bytes, size_t start, size_t stop)
{
    /* The widths that nearly every image has are known while it compiles. */
    if (first_bytes == 2 && second_bytes == 4)
        return find_difference(first, 2, second, 4, start, stop);
    return find_difference(first, first_bytes, second, second_bytes, start, stop);
}

void jqcow_refcount_decode(const void *block, int order, size_t entry_count, void *refcounts)
{
    size_t width_bytes = order < 3 ? 1 : (size_t)1 << (order - 3);

    for (size_t index = 0; order == 4 && index < entry_count; index++) {
        const uint8_t *bytes = (const uint8_t *)block + index * 2;
        array_set(refcounts, 2, index, (uint64_t)bytes[0] << 8 | bytes[1]);
    }
    for (size_t index = 0; order != 4 && index < entry_count; index++)
        array_set(refcounts, width_bytes, index, jqcow_refcount_get(block, index, order));
}

uint64_t jqcow_zero_run(const void *data, size_t start, size_t stop, size_t unit_bytes)
{
    const uint8_t *bytes = data;
    int is_zero = jqcow_is_zero(bytes + start * unit_bytes, unit_bytes);
    size_t index = start + 1;

    while (index < stop && jqcow_is_zero(bytes + index * unit_bytes, unit_bytes) == is_zero)
        index++;
    return (uint64_t)(index - start) << 1 | (uint64_t)is_zero;
}

/* Counting references */

static inline bool can_refer(const struct jqcow_counting *file, uint64_t cluster, uint64_t repeats)
{
    uint64_t before;

    if (((const uint8_t *)file->owners)[cluster])
        return false;
    if (cluster - file->avoided_first < file->avoided_end - file->avoided_first)
        return false;
    before = array_get(file->references, file->reference_bytes, cluster);
    return before <= file->refcount_max && repeats <= file->refcount_max - before;
}

static inline void refer(struct jqcow_counting *file, uint64_t cluster, uint64_t repeats)
{
    uint64_t before = array_get(file->references, file->reference_bytes, cluster);

    array_set(file->references, file->reference_bytes, cluster, before + repeats);
}

static bool count_compressed(struct jqcow_counting *file, uint64_t entry, uint64_t repeats)
{
    int offset_bits = 62 - (file->cluster_bits - 8);
    uint64_t descriptor = entry & (ENTRY_COMPRESSED - 1);
    uint64_t start = descriptor & (((uint64_t)1 << offset_bits) - 1);
    uint64_t end = (start / 512 + (descriptor >> offset_bits) + 1) * 512;
    uint64_t last = (end - 1) >> file->cluster_bits;

    if (file->outside || entry >> 63 || last >= file->cluster_count)
        return false;
    for (uint64_t cluster = start >> file->cluster_bits; cluster <= last; cluster++)
        if (!can_refer(file, cluster, repeats))
            return false;
    for (uint64_t cluster = start >> file->cluster_bits; cluster <= last; cluster++)
        refer(file, cluster, repeats);
    file->allocated++;
    file->compressed++;
    file->fragmented++;
    return true;
}

static inline void count_place(struct jqcow_counting *file, uint64_t host)
{
    file->allocated++;
    if (file->following && host != file->following)
        file->fragmented++;
    file->following = host + ((uint64_t)1 << file->cluster_bits);
}

/* Returns false, having counted nothing, for an entry that something is to be said of. */
static inline __attribute__((always_inline)) bool
count_entry(struct jqcow_counting *file, uint64_t entry, uint64_t bitmap, bool extended, int is_active,
            uint64_t repeats)
{
    uint64_t offset = entry & ENTRY_OFFSET, cluster = offset >> file->cluster_bits;
    bool copied = entry >> 63;
    bool is_zero = extended ? !(bitmap & 0xffffffff) && bitmap >> 32 : entry & ENTRY_ZERO;
    bool has_host = offset || (file->outside && copied && (extended || !is_zero));

    if (entry & ENTRY_COMPRESSED)
        return !bitmap && count_compressed(file, entry, repeats);
    if (entry & file->reserved_bits || offset & (((uint64_t)1 << file->cluster_bits) - 1))
        return false;
    if (extended && ((bitmap & bitmap >> 32 & 0xffffffff) || (!has_host && bitmap & 0xffffffff)))
        return false;
    if (has_host && file->outside) {
        if (is_active && !copied)
            return false;
        count_place(file, file->outside + offset);
    } else if (has_host) {
        if (cluster >= file->cluster_count || !can_refer(file, cluster, repeats))
            return false;
        if (is_active && copied != (array_get(file->refcounts, file->refcount_bytes, cluster) == 1))
            return false;
        refer(file, cluster, repeats);
        count_place(file, offset);
    }
    if (is_zero)
        file->zeros++;
    return true;
}

static inline __attribute__((always_inline)) size_t
count_table(struct jqcow_counting *file, const uint8_t *bytes, size_t start, size_t stop, bool extended,
            int is_active, uint64_t repeats)
{
    for (size_t index = start; index < stop; index++) {
        const uint8_t *place = bytes + index * (extended ? 16 : 8);
        uint64_t entry = load_big64(place), bitmap = extended ? load_big64(place + 8) : 0;

        if ((entry | bitmap) && !count_entry(file, entry, bitmap, extended, is_active, repeats))
            return index;
    }
    return stop;
}

size_t jqcow_count_entries(struct jqcow_counting *file, const void *table, size_t start, size_t stop,
                           size_t entry_bytes, int is_active, uint64_t repeats)
{
    struct jqcow_counting own = *file;
    size_t stopped;

    /* A copy of its own lets the compiler keep it in registers; the widths that nearly every image has
     * are known while it compiles. */
    if (entry_bytes == 16) {
        stopped = count_table(&own, table, start, stop, true, is_active, repeats);
    } else if (own.reference_bytes == 4 && own.refcount_bytes == 2 && !own.outside) {
        own.reference_bytes = 4;
        own.refcount_bytes = 2;
        own.outside = 0;
        stopped = count_table(&own, table, start, stop, false, is_active, repeats);
    } else {
        stopped = count_table(&own, table, start, stop, false, is_active, repeats);
    }
    *file = own;
    return stopped;
}
