/* What is slow from Python between ranks of one host: raising and awaiting counters in shared
 * memory, and whole sums over them.
 *
 * A counter is a cache line: word 0 counts modulo 2^32, word 1 is how many sleep on it. Whoever
 * raises stores the count and then reads the sleepers; whoever sleeps adds itself and then, in the
 * kernel, reads the count. All four are sequentially consistent, so one sees the other: no wake-up
 * is lost, and none needs a timer. A sleeper that was killed costs later raises a system call.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <limits.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define CHUNK_BYTES (1u << 20) /* of a sum at a time: CHUNK_BYTES of shm.py */
#define BLOCK 512              /* elements summed at a time: they stay in the first cache */
#define YIELDS 4
#define PAUSES 16 /* between two looks at the clock: a microsecond, or less */
#define VECTOR __attribute__((target("avx2,f16c")))

enum { REACHED, LATE, INTERRUPTED };

struct group {
    int32_t size, me;
    int64_t spin_ns, timeout_ns;
    uint32_t *const *counters;
    char *const *buffers; /* of rank r and parity p: 2 * r + p */
};

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static int is_before(uint32_t *line, uint32_t count, uint32_t *seen) {
    *seen = __atomic_load_n(line, __ATOMIC_SEQ_CST);
    return (int32_t)(*seen - count) < 0;
}

int bireme_is_usable(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
}

void bireme_raise(uint32_t *line, uint32_t count) {
    __atomic_store_n(line, count, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(line + 1, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, line, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Spins, and then sleeps, until the deadline. */
int bireme_await(uint32_t *line, uint32_t count, int64_t spin_ns, int64_t timeout_ns) {
    uint32_t seen;
    if (!is_before(line, count, &seen))
        return REACHED;
    int64_t begun = now_ns(), deadline = begun + timeout_ns;
    int64_t spin_end = begun + (spin_ns < timeout_ns ? spin_ns : timeout_ns);
    do {
        for (int turn = 0; turn < PAUSES; turn++) {
            if (!is_before(line, count, &seen))
                return REACHED;
            __builtin_ia32_pause();
        }
    } while (now_ns() < spin_end);
    for (int turn = 0; spin_end < deadline && turn < YIELDS; turn++) {
        if (!is_before(line, count, &seen))
            return REACHED;
        sched_yield();
    }
    int status = REACHED;
    __atomic_fetch_add(line + 1, 1, __ATOMIC_SEQ_CST);
    while (status == REACHED && is_before(line, count, &seen)) {
        int64_t left = deadline - now_ns();
        struct timespec pause = {left / 1000000000, left % 1000000000};
        if (left <= 0)
            status = LATE;
        else if (syscall(SYS_futex, line, FUTEX_WAIT, seen, &pause, NULL, 0) && errno == EINTR)
            status = INTERRUPTED;
    }
    __atomic_fetch_sub(line + 1, 1, __ATOMIC_SEQ_CST);
    return status;
}

/* Awaits every rank's counter; -1, or the place in the group of one that did not come in time. */
static int await_all(const struct group *group, uint32_t count) {
    for (int rank = 0; rank < group->size; rank++) {
        int64_t deadline = 0, left = group->timeout_ns;
        int status = INTERRUPTED;
        if (rank == group->me)
            continue;
        while (status == INTERRUPTED) {
            status = bireme_await(group->counters[rank], count, group->spin_ns, left);
            if (status != INTERRUPTED)
                break;
            deadline = deadline ? deadline : now_ns() + left;
            left = deadline - now_ns();
        }
        if (status == LATE)
            return rank;
    }
    return -1;
}

/* Shares num_bytes of every rank; `parts` are theirs, valid until the next exchange but one. */
static int exchange(const struct group *group, const char *mine, uint64_t num_bytes,
                    uint32_t count, const char **parts) {
    for (int rank = 0; rank < group->size; rank++)
        parts[rank] = group->buffers[2 * rank + (count & 1)];
    memcpy((char *)parts[group->me], mine, num_bytes);
    bireme_raise(group->counters[group->me], count);
    return await_all(group, count);
}

static inline float of_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* To nearest, ties to even. */
static inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded;
}

#define SAME(x) (x)
#define SUM(name, type, wide, widen, narrow)                                                       \
    VECTOR static void name(void *out, const char *const *parts, int size, uint64_t num) {         \
        wide total[BLOCK];                                                                         \
        for (uint64_t at = 0; at < num; at += BLOCK) {                                             \
            uint64_t left = num - at < BLOCK ? num - at : BLOCK;                                   \
            const type *part = (const type *)parts[0] + at;                                        \
            for (uint64_t i = 0; i < left; i++)                                                    \
                total[i] = widen(part[i]);                                                         \
            for (int rank = 1; rank < size; rank++) {                                              \
                part = (const type *)parts[rank] + at;                                             \
                for (uint64_t i = 0; i < left; i++)                                                \
                    total[i] += widen(part[i]);                                                    \
            }                                                                                      \
            for (uint64_t i = 0; i < left; i++)                                                    \
                ((type *)out)[at + i] = narrow(total[i]);                                          \
        }                                                                                          \
    }

SUM(sum_float32, float, float, SAME, SAME)
SUM(sum_float64, double, double, SAME, SAME)
SUM(sum_int64, uint64_t, uint64_t, SAME, SAME) /* unsigned: it wraps */
SUM(sum_bfloat16, uint16_t, float, of_bfloat16, to_bfloat16)
SUM(sum_float16, _Float16, float, (float), (_Float16))

static const struct {
    void (*sum)(void *, const char *const *, int, uint64_t);
    uint64_t item_bytes;
} KINDS[] = {
    {sum_float32, 4}, {sum_float64, 8}, {sum_int64, 8}, {sum_bfloat16, 2}, {sum_float16, 2},
};

/* Sums in place, in rank order; `count` is that of the first chunk's exchange. */
int bireme_all_reduce(const struct group *group, char *data, uint64_t num_bytes, int kind,
                      uint32_t count) {
    const char *parts[group->size];
    for (uint64_t at = 0; at < num_bytes; at += CHUNK_BYTES, count++) {
        uint64_t size = num_bytes - at < CHUNK_BYTES ? num_bytes - at : CHUNK_BYTES;
        int late = exchange(group, data + at, size, count, parts);
        if (late >= 0)
            return late;
        KINDS[kind].sum(data + at, parts, group->size, size / KINDS[kind].item_bytes);
    }
    return -1;
}

/* Rank r's bytes to out + r * num_bytes. */
int bireme_all_gather(const struct group *group, const char *data, char *out, uint64_t num_bytes,
                      uint32_t count) {
    const char *parts[group->size];
    for (uint64_t at = 0; at < num_bytes; at += CHUNK_BYTES, count++) {
        uint64_t size = num_bytes - at < CHUNK_BYTES ? num_bytes - at : CHUNK_BYTES;
        int late = exchange(group, data + at, size, count, parts);
        if (late >= 0)
            return late;
        for (int rank = 0; rank < group->size; rank++)
            memcpy(out + rank * num_bytes + at, parts[rank], size);
    }
    return -1;
}
