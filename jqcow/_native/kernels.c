/* The leaf kernels; kernels.h holds the contract that they share. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

#define LITTLE_ENDIAN_HOST (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)

/* memcpy lets the compiler emit one load, whatever the alignment. */

static inline uint64_t load_native64(const uint8_t *bytes)
{
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

static inline uint64_t load_little64(const uint8_t *bytes)
{
    uint64_t word = load_native64(bytes);
    return LITTLE_ENDIAN_HOST ? word : __builtin_bswap64(word);
}

static inline uint64_t load_big64(const uint8_t *bytes)
{
    uint64_t word = load_native64(bytes);
    return LITTLE_ENDIAN_HOST ? __builtin_bswap64(word) : word;
}

/* CRC-32C (Castagnoli) */

#define CASTAGNOLI_REFLECTED 0x82f63b78u

static uint32_t crc_tables[8][256];
static bool crc_in_hardware;

/* Runs when the module is loaded, so that no call has to ask whether the tables are ready. */
__attribute__((constructor)) static void prepare_crc32c(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? CASTAGNOLI_REFLECTED : 0);
        crc_tables[0][byte] = crc;
    }
    for (int distance = 1; distance < 8; distance++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t nearer = crc_tables[distance - 1][byte];
            crc_tables[distance][byte] = (nearer >> 8) ^ crc_tables[0][nearer & 0xff];
        }
#if defined(__x86_64__)
    __builtin_cpu_init();
    crc_in_hardware = __builtin_cpu_supports("sse4.2");
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
    crc_in_hardware = true;
#endif
}

uint32_t jqcow_crc32c_portable(const void *data, size_t length_bytes, uint32_t value)
{
    const uint8_t *bytes = data;
    uint32_t crc = ~value;

    for (; length_bytes >= 8; length_bytes -= 8, bytes += 8) {
        uint64_t word = load_little64(bytes) ^ crc;
        crc = crc_tables[7][word & 0xff] ^ crc_tables[6][(word >> 8) & 0xff] ^
              crc_tables[5][(word >> 16) & 0xff] ^ crc_tables[4][(word >> 24) & 0xff] ^
              crc_tables[3][(word >> 32) & 0xff] ^ crc_tables[2][(word >> 40) & 0xff] ^
              crc_tables[1][(word >> 48) & 0xff] ^ crc_tables[0][word >> 56];
    }
    for (; length_bytes > 0; length_bytes--, bytes++)
        crc = (crc >> 8) ^ crc_tables[0][(crc ^ *bytes) & 0xff];
    return ~crc;
}

#if defined(__x86_64__)

__attribute__((target("sse4.2")))
static uint32_t crc32c_hardware(const uint8_t *bytes, size_t length_bytes, uint32_t value)
{
    uint64_t crc = (uint32_t)~value;

    for (; length_bytes >= 8; length_bytes -= 8, bytes += 8)
        crc = _mm_crc32_u64(crc, load_native64(bytes));
    for (; length_bytes > 0; length_bytes--, bytes++)
        crc = _mm_crc32_u8((uint32_t)crc, *bytes);
    return ~(uint32_t)crc;
}

#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)

static uint32_t crc32c_hardware(const uint8_t *bytes, size_t length_bytes, uint32_t value)
{
    uint32_t crc = ~value;

    for (; length_bytes >= 8; length_bytes -= 8, bytes += 8)
        crc = __crc32cd(crc, load_little64(bytes));
    for (; length_bytes > 0; length_bytes--, bytes++)
        crc = __crc32cb(crc, *bytes);
    return ~crc;
}

#else

static uint32_t crc32c_hardware(const uint8_t *bytes, size_t length_bytes, uint32_t value)
{
    return jqcow_crc32c_portable(bytes, length_bytes, value);
}

#endif

uint32_t jqcow_crc32c(const void *data, size_t length_bytes, uint32_t value)
{
    if (crc_in_hardware)
        return crc32c_hardware(data, length_bytes, value);
    return jqcow_crc32c_portable(data, length_bytes, value);
}

/* Zero detection */

int jqcow_is_zero(const void *data, size_t length_bytes)
{
    const uint8_t *bytes = data;

    for (; length_bytes >= 64; length_bytes -= 64, bytes += 64) {
        uint64_t seen = 0;
        for (size_t at = 0; at < 64; at += 8)
            seen |= load_native64(bytes + at);
        if (seen)
            return 0;
    }
    for (; length_bytes > 0; length_bytes--, bytes++)
        if (*bytes)
            return 0;
    return 1;
}

/* Refcount blocks: an entry takes 2^order bits. Narrow entries fill a byte from its low bits up. */

static inline uint64_t narrow_mask(int order)
{
    return (1u << (1 << order)) - 1;
}

static inline unsigned narrow_shift(size_t index, int order)
{
    return (unsigned)(index << order) & 7;
}

uint64_t jqcow_refcount_get(const void *block, size_t index, int order)
{
    const uint8_t *bytes = block;

    if (order < 3)
        return (bytes[(index << order) >> 3] >> narrow_shift(index, order)) & narrow_mask(order);

    size_t width_bytes = (size_t)1 << (order - 3);
    uint64_t value = 0;
    for (size_t at = index * width_bytes; at < (index + 1) * width_bytes; at++)
        value = (value << 8) | bytes[at];
    return value;
}

void jqcow_refcount_set(void *block, size_t index, int order, uint64_t value)
{
    uint8_t *bytes = block;

    if (order < 3) {
        uint8_t *byte = &bytes[(index << order) >> 3];
        unsigned shift = narrow_shift(index, order);
        *byte = (uint8_t)((*byte & ~(narrow_mask(order) << shift)) | (value << shift));
        return;
    }

    size_t width_bytes = (size_t)1 << (order - 3);
    for (size_t at = (index + 1) * width_bytes; at > index * width_bytes; at--) {
        bytes[at - 1] = (uint8_t)value;
        value >>= 8;
    }
}

/* 1 in the lowest bit of every entry that a 64-bit word holds. */
static inline uint64_t lowest_bits(int order)
{
    return order == 6 ? 1 : ~(uint64_t)0 / (((uint64_t)1 << (1 << order)) - 1);
}

/*
 * Does the word hold a zero entry (or, for want_zero false, one in use)? Subtracting 1 from every
 * entry borrows into the top bit of an entry only where that entry, or one below it, is zero.
 */
static inline bool word_may_match(uint64_t word, uint64_t lowest, int order, bool want_zero)
{
    if (!want_zero)
        return word != 0;
    uint64_t highest = lowest << ((1 << order) - 1);
    return ((word - lowest) & ~word & highest) != 0;
}

static int64_t find_refcount(const void *block, int order, size_t start, size_t stop, bool want_zero)
{
    const uint8_t *bytes = block;
    size_t entries_per_word = (size_t)64 >> order;
    uint64_t lowest = lowest_bits(order);

    for (size_t index = start; index < stop; index++) {
        while (index % entries_per_word == 0 && index + entries_per_word <= stop &&
               !word_may_match(load_native64(bytes + ((index << order) >> 3)), lowest, order, want_zero))
            index += entries_per_word;
        if (index < stop && (jqcow_refcount_get(block, index, order) == 0) == want_zero)
            return (int64_t)index;
    }
    return -1;
}

int64_t jqcow_refcount_find_zero(const void *block, int order, size_t start, size_t stop)
{
    return find_refcount(block, order, start, stop, true);
}

int64_t jqcow_refcount_find_used(const void *block, int order, size_t start, size_t stop)
{
    return find_refcount(block, order, start, stop, false);
}

int64_t jqcow_refcount_last_used(const void *block, int order, size_t entry_count)
{
    const uint8_t *bytes = block;
    size_t entries_per_word = (size_t)64 >> order;

    for (size_t end = entry_count; end > 0; end--) {
        while (end > 0 && end % entries_per_word == 0 &&
               load_native64(bytes + (((end - entries_per_word) << order) >> 3)) == 0)
            end -= entries_per_word;
        if (end == 0)
            break;
        if (jqcow_refcount_get(block, end - 1, order))
            return (int64_t)(end - 1);
    }
    return -1;
}

uint64_t jqcow_refcount_run(const void *block, int order, size_t start, size_t stop)
{
    uint64_t value = jqcow_refcount_get(block, start, order);
    size_t index = start + 1;

    while (index < stop && jqcow_refcount_get(block, index, order) == value)
        index++;
    return index - start;
}

int64_t jqcow_refcount_add(void *block, int order, size_t start, size_t stop, uint64_t amount,
                           int is_taken_away)
{
    uint64_t largest = order == 6 ? ~(uint64_t)0 : ((uint64_t)1 << (1 << order)) - 1;
    uint64_t delta = is_taken_away ? -amount : amount;

    for (size_t index = start; index < stop; index++) {
        uint64_t value = jqcow_refcount_get(block, index, order);
        if (is_taken_away ? value < amount : largest - value < amount)
            return (int64_t)index;
    }
    for (size_t index = start; index < stop; index++)
        jqcow_refcount_set(block, index, order,
                           jqcow_refcount_get(block, index, order) + delta);
    return -1;
}

/* L1 and L2 tables */

#define ENTRY_COMPRESSED ((uint64_t)1 << 62)
#define ENTRY_ZERO ((uint64_t)1)
#define ENTRY_OFFSET ((uint64_t)0x00fffffffffffe00)

enum run_kind { RUN_UNALLOCATED, RUN_ZERO, RUN_DATA, RUN_COMPRESSED };

static inline enum run_kind kind_of(uint64_t entry)
{
    if (entry & ENTRY_COMPRESSED)
        return RUN_COMPRESSED;
    if (entry & ENTRY_ZERO)
        return RUN_ZERO;
    return entry & ENTRY_OFFSET ? RUN_DATA : RUN_UNALLOCATED;
}

uint64_t jqcow_l2_run(const void *table, size_t index, size_t limit, int cluster_bits,
                      size_t entry_bytes)
{
    const uint8_t *bytes = (const uint8_t *)table + index * entry_bytes;
    uint64_t first = load_big64(bytes);
    enum run_kind kind = kind_of(first);
    uint64_t expected = first;
    uint64_t count = 1;

    if (kind == RUN_COMPRESSED)
        limit = 1;
    for (; count < limit; count++) {
        uint64_t entry = load_big64(bytes + count * entry_bytes);
        expected += (uint64_t)1 << cluster_bits;
        if (kind_of(entry) != kind || (kind == RUN_DATA && entry != expected))
            break;
    }
    return (count << 2) | kind;
}

/* The kind of a subcluster of an extended entry that is not compressed. */
static inline enum run_kind subcluster_kind(uint64_t bitmap, size_t subcluster)
{
    if (bitmap >> subcluster & 1)
        return RUN_DATA;
    return bitmap >> (32 + subcluster) & 1 ? RUN_ZERO : RUN_UNALLOCATED;
}

/* Subclusters of one kind in a row: data goes on in the entry whose cluster follows on the host, all else
 * only from an entry without a cluster to another one. The first entry is one that an image can have. */
uint64_t jqcow_subcluster_run(const void *table, size_t index, size_t limit, int cluster_bits)
{
    const uint8_t *bytes = (const uint8_t *)table + index / 32 * 16;
    uint64_t expected = load_big64(bytes);
    uint64_t bitmap = load_big64(bytes + 8);
    size_t subcluster = index % 32;
    enum run_kind kind;
    uint64_t count = 0;

    if (expected & ENTRY_COMPRESSED) {
        count = limit < 32 - subcluster ? limit : 32 - subcluster;
        return (count << 2) | RUN_COMPRESSED;
    }
    kind = subcluster_kind(bitmap, subcluster);
    while (count < limit && subcluster_kind(bitmap, subcluster) == kind) {
        count++;
        if (++subcluster < 32)
            continue;
        if (count >= limit || (kind != RUN_DATA && expected))
            break;
        if (kind == RUN_DATA)
            expected += (uint64_t)1 << cluster_bits;
        bytes += 16;
        subcluster = 0;
        bitmap = load_big64(bytes + 8);
        if (load_big64(bytes) != expected || (bitmap & bitmap >> 32 & 0xffffffff) ||
            (!expected && bitmap & 0xffffffff))
            break;
    }
    return (count << 2) | kind;
}

/* What salvage asks of tables */

#define MARK_MANY 2
#define MARK_STRUCTURE 3

enum judged {
    JUDGED_UNALLOCATED,
    JUDGED_ZERO,
    JUDGED_DATA,
    JUDGED_COMPRESSED,
    JUDGED_INVALID,
    JUDGED_DOUBLED,
    JUDGED_STRUCTURE
};

static inline unsigned mark_get(const uint8_t *marks, uint64_t cluster)
{
    return marks[cluster >> 2] >> ((cluster & 3) * 2) & 3;
}

/* Marks a cluster once more, and returns how it was marked. */
static inline unsigned mark_again(uint8_t *marks, uint64_t cluster)
{
    unsigned mark = mark_get(marks, cluster);
    if (mark < MARK_MANY)
        marks[cluster >> 2] = (uint8_t)(marks[cluster >> 2] + (1u << ((cluster & 3) * 2)));
    return mark;
}

static inline enum judged judge_entry(uint64_t entry, uint64_t bitmap, bool extended, int cluster_bits,
                                      uint64_t reserved, uint64_t host_bytes, uint64_t *first,
                                      uint64_t *last)
{
    uint64_t offset = entry & ENTRY_OFFSET;

    if (entry & ENTRY_COMPRESSED) {
        int offset_bits = 62 - (cluster_bits - 8);
        uint64_t descriptor = entry & (ENTRY_COMPRESSED - 1);
        uint64_t start = descriptor & (((uint64_t)1 << offset_bits) - 1);
        uint64_t end = (start / 512 + (descriptor >> offset_bits) + 1) * 512;
        if (entry >> 63 || bitmap || start == 0 || start >= host_bytes || start >= (uint64_t)1 << 56)
            return JUDGED_INVALID;
        if (end > host_bytes)
            end = host_bytes;
        *first = start >> cluster_bits;
        *last = (end - 1) >> cluster_bits;
        return JUDGED_COMPRESSED;
    }
    if (entry & reserved || offset & (((uint64_t)1 << cluster_bits) - 1) || offset >= host_bytes)
        return JUDGED_INVALID;
    if (!offset && entry >> 63)
        return JUDGED_INVALID;
    if (extended && ((bitmap & bitmap >> 32 & 0xffffffff) || (!offset && bitmap & 0xffffffff)))
        return JUDGED_INVALID;
    if (offset) {
        *first = *last = offset >> cluster_bits;
        return JUDGED_DATA;
    }
    return (extended ? bitmap >> 32 : entry & ENTRY_ZERO) ? JUDGED_ZERO : JUDGED_UNALLOCATED;
}

void jqcow_l2_judge(const void *table, size_t entry_count, size_t entry_bytes, int cluster_bits,
                    uint64_t reserved, uint64_t host_bytes, void *marks, uint64_t *counts)
{
    const uint8_t *bytes = table;
    bool extended = entry_bytes == 16;

    for (size_t index = 0; index < entry_count; index++, bytes += entry_bytes) {
        uint64_t first = 0, last = 0;
        uint64_t entry = load_big64(bytes);
        uint64_t bitmap = extended ? load_big64(bytes + 8) : 0;
        enum judged kind =
            judge_entry(entry, bitmap, extended, cluster_bits, reserved, host_bytes, &first, &last);

        counts[kind]++;
        if (!marks || (kind != JUDGED_DATA && kind != JUDGED_COMPRESSED))
            continue;
        for (uint64_t cluster = first; cluster <= last; cluster++) {
            unsigned mark = mark_again(marks, cluster);
            if (mark == MARK_STRUCTURE)
                counts[JUDGED_STRUCTURE]++;
            else if (mark && kind == JUDGED_DATA)
                counts[JUDGED_DOUBLED]++;
        }
    }
}

uint64_t jqcow_find_unmarked(const void *block, int order, size_t start, size_t stop, const void *marks,
                             uint64_t first_cluster, void *bits)
{
    uint8_t *found = bits;
    uint64_t count = 0;

    for (size_t index = start; index < stop; index++) {
        uint64_t cluster = first_cluster + (index - start);
        if (mark_get(marks, cluster) || !jqcow_refcount_get(block, index, order))
            continue;
        found[cluster >> 3] = (uint8_t)(found[cluster >> 3] | 1u << (cluster & 7));
        count++;
    }
    return count;
}

/* What a sector may be a part of: see sector_kinds in twins.py. */

enum sector_kind {
    SECTOR_OTHER = 0,
    SECTOR_ZERO = 1,
    SECTOR_SNAPSHOT = 2,
    SECTOR_COUNTS = 0x10,
    SECTOR_POINTERS = 0x40,
    SECTOR_PAIRS = 0x80,
    SECTOR_PACKED = 0xc0
};

#define SECTOR_WORDS 64
#define POINTER_RESERVED 0x7f000000000001feull
#define PACKED_OFFSET (((uint64_t)1 << 49) - 1)

static inline bool is_pointer(uint64_t word, uint64_t host_bytes)
{
    uint64_t offset = word & ENTRY_OFFSET;

    return !(word & POINTER_RESERVED) && offset < host_bytes && (offset || !(word >> 63));
}

static inline bool is_packed(uint64_t word, uint64_t host_bytes)
{
    uint64_t start = word & PACKED_OFFSET;

    return word >> 62 == 1 && start >= 512 && start < host_bytes;
}

static inline bool is_bitmap_of(uint64_t word, uint64_t bitmap)
{
    if (!(word & ENTRY_OFFSET) && bitmap & 0xffffffff)
        return false;
    return !(word & ENTRY_ZERO) && !(bitmap & bitmap >> 32);
}

/* The most that the low bits of offsets have in common, as a power of two; 63 where there is none. */
static inline uint8_t alignment_of(uint64_t offsets)
{
    return offsets ? (uint8_t)__builtin_ctzll(offsets) : 63;
}

static bool looks_like_snapshot(const uint8_t *bytes, uint64_t host_bytes)
{
    uint64_t table = load_big64(bytes), lengths = load_big64(bytes + 8), tail = load_big64(bytes + 32);
    uint64_t l1_size = lengths >> 32, id_bytes = lengths >> 16 & 0xffff, name_bytes = lengths & 0xffff;
    uint64_t extra_bytes = tail & 0xffffffff;

    if (!table || table & 511 || table >= host_bytes || !l1_size || l1_size > (uint64_t)1 << 22)
        return false;
    return id_bytes && id_bytes < 256 && name_bytes < 1024 && extra_bytes <= 1024 && extra_bytes % 8 == 0 &&
           (load_big64(bytes + 16) & 0xffffffff) < 1000000000;
}

static uint8_t count_kind(uint64_t all)
{
    if (!(all & 0xffffffffffffff00ull))
        return SECTOR_COUNTS + 6;
    if (!(all & 0xffffff00ffffff00ull))
        return SECTOR_COUNTS + 5;
    if (!(all & 0xff00ff00ff00ff00ull))
        return SECTOR_COUNTS + 4;
    if (!(all & 0xf0f0f0f0f0f0f0f0ull))
        return SECTOR_COUNTS + 3;
    return SECTOR_OTHER;
}

static uint8_t sector_kind(const uint8_t *bytes, uint64_t host_bytes)
{
    bool pointers = true, packed = false, pairs = true;
    uint64_t all = 0, offsets = 0, even_offsets = 0, odd_offsets = 0, odd = 0;

    if (jqcow_is_zero(bytes, SECTOR_WORDS * 8))
        return SECTOR_ZERO;
    for (size_t index = 0; index < SECTOR_WORDS; index += 2, bytes += 16) {
        uint64_t first = load_big64(bytes), second = load_big64(bytes + 8);

        all |= first | second;
        odd |= second;
        if (is_pointer(first, host_bytes)) {
            offsets |= first & ENTRY_OFFSET;
            even_offsets |= first & ENTRY_OFFSET;
            pairs = pairs && is_bitmap_of(first, second);
        } else if (is_packed(first, host_bytes)) {
            packed = true;
            pairs = pairs && !second;
        } else {
            pointers = pairs = false;
        }
        if (is_pointer(second, host_bytes)) {
            offsets |= second & ENTRY_OFFSET;
            odd_offsets |= second & ENTRY_OFFSET;
        } else if (is_packed(second, host_bytes)) {
            packed = true;
        } else {
            pointers = false;
        }
        if (!pointers && !pairs && all & 0xf0f0f0f0f0f0f0f0ull && all & 0xff00ff00ff00ff00ull)
            return SECTOR_OTHER;
    }
    if (pairs && odd && !odd_offsets)
        return (uint8_t)(SECTOR_PAIRS | alignment_of(even_offsets));
    if (pairs && !pointers)
        return (uint8_t)(SECTOR_PAIRS | alignment_of(even_offsets));
    if (pointers)
        return (uint8_t)((packed ? SECTOR_PACKED : SECTOR_POINTERS) | alignment_of(offsets));
    return count_kind(all);
}

void jqcow_sector_kinds(const void *data, size_t sector_count, uint64_t host_bytes, void *kinds)
{
    const uint8_t *bytes = data;
    uint8_t *found = kinds;

    for (size_t sector = 0; sector < sector_count; sector++, bytes += SECTOR_WORDS * 8) {
        found[sector] = sector_kind(bytes, host_bytes);
        if (found[sector] == SECTOR_OTHER && looks_like_snapshot(bytes, host_bytes))
            found[sector] = SECTOR_SNAPSHOT;
    }
}

void jqcow_l2_shared(const void *table, size_t entry_count, size_t entry_bytes, uint64_t cluster_count,
                     int cluster_bits, const void *marks, uint64_t *counts)
{
    const uint8_t *bytes = table;

    for (size_t index = 0; index < entry_count; index++, bytes += entry_bytes) {
        uint64_t entry = load_big64(bytes);
        uint64_t cluster = (entry & ENTRY_OFFSET) >> cluster_bits;

        if (entry & ENTRY_COMPRESSED || !cluster || cluster >= cluster_count)
            continue;
        counts[0] += mark_get(marks, cluster) == MARK_MANY;
        counts[1] += mark_get(marks, cluster) == MARK_STRUCTURE;
    }
}

void jqcow_set_copied(void *table, size_t start, size_t stop, int copied, size_t entry_bytes)
{
    uint8_t *bytes = table;

    for (size_t index = start; index < stop; index++)
        bytes[index * entry_bytes] =
            (uint8_t)((bytes[index * entry_bytes] & 0x7f) | (copied ? 0x80 : 0));
}

/* XTS */

static inline void xor_little64(uint8_t *bytes, uint64_t value)
{
    uint64_t word = load_native64(bytes) ^ (LITTLE_ENDIAN_HOST ? value : __builtin_bswap64(value));
    memcpy(bytes, &word, sizeof word);
}

void jqcow_xts_whiten(void *data, const void *tweaks, size_t sector_count, size_t sector_bytes)
{
    uint8_t *block = data;
    const uint8_t *first = tweaks;

    for (size_t sector = 0; sector < sector_count; sector++, first += 16) {
        uint64_t low = load_little64(first), high = load_little64(first + 8);

        for (size_t position = 0; position < sector_bytes; position += 16, block += 16) {
            uint64_t carry = high >> 63;

            xor_little64(block, low);
            xor_little64(block + 8, high);
            /* The next block's tweak: this one doubled in GF(2^128). */
            high = high << 1 | low >> 63;
            low = low << 1 ^ (carry ? 0x87 : 0);
        }
    }
}
