/* Checks of every memory access: inside the launch's tensors, and no two programs or waves in each other's way. */
#include "runtime.h"

#include <string.h>

static SharedShadow shared_shadow[SHARED_BYTES];

Finding *describe(const void *address, uint32_t size, uint32_t kind) {
    *finding = (Finding){.address = (uint64_t)address, .size = size, .kind = kind, .thread = (uint32_t)current};
    memcpy(finding->program, program, sizeof program);
    return finding;
}

void simt_global_access(const void *pointer, uint32_t size, uint32_t kind) {
    uint64_t address = (uint64_t)pointer;
    Region *region = regions, *end = regions + region_count;
    while (region < end && !(address >= region->start && address + size <= region->end)) region++;
    if (region == end) {
        describe(pointer, size, kind);
        stop(OUT_OF_BOUNDS);
    }
    uint32_t me = program_number + 1;
    uint64_t first = (address - region->start) / region->unit;
    uint64_t last = (address - region->start + size - 1) / region->unit;
    for (uint64_t i = first; i <= last; i++) {
        uint32_t writer = region->writer[i], toucher = region->toucher[i];
        int written_elsewhere = writer && writer != me;
        if (written_elsewhere || (kind == STORE && toucher && toucher != me)) {
            describe(pointer, size, kind);
            uint32_t other = written_elsewhere ? writer : toucher;
            finding->other = other == SEVERAL ? SEVERAL : other - 1;
            finding->other_kind = written_elsewhere ? STORE : LOAD;
            stop(GLOBAL_RACE);
        }
        if (kind == STORE) region->writer[i] = me;
        else region->toucher[i] = toucher && toucher != me ? SEVERAL : me;
    }
}

/* A store over bytes that another wave has stored since the last barrier. Values that a layout holds in several waves
 * are stored by each of them; such a store changes nothing, which shows only after it. Until the thread that stores is
 * interrupted nobody else runs, so its next access, or its leaving, is early enough to compare. */
static struct { uint64_t offset; uint32_t size, wave; char before[64]; } repeated;

void settle_repeated_store(void) {
    uint32_t size = repeated.size;
    repeated.size = 0;
    if (size && memcmp(shared_memory + repeated.offset, repeated.before, size)) {
        describe((void *)repeated.offset, size, STORE);
        finding->other = repeated.wave;
        finding->other_kind = STORE;
        stop(SHARED_RACE);
    }
}

void simt_shared_access(const void *pointer, uint32_t size, uint32_t kind) {
    settle_repeated_store();
    uint64_t offset = (uint64_t)pointer - (uint64_t)shared_memory;
    if (offset + size > shared_bytes || offset > shared_bytes) {
        describe((void *)offset, size, kind);
        stop(SHARED_OUT_OF_BOUNDS);
    }
    if (kind == ATOMIC) return;
    uint16_t me = (uint16_t)(current / WAVE);
    for (SharedShadow *byte = shared_shadow + offset; byte < shared_shadow + offset + size; byte++) {
        int written = byte->write_epoch == epoch && byte->writer != me;
        int read = byte->read_epoch == epoch && byte->reader != me;
        if (kind == STORE && written && !read && size <= sizeof repeated.before) {
            if (!repeated.size) {
                repeated.offset = offset;
                repeated.size = size;
                repeated.wave = byte->writer;
                memcpy(repeated.before, pointer, size);
            }
        } else if (written || (kind == STORE && read)) {
            describe((void *)offset, size, kind);
            finding->other = written ? byte->writer : byte->reader;
            finding->other_kind = written ? STORE : LOAD;
            stop(SHARED_RACE);
        }
        if (kind == STORE) {
            byte->write_epoch = epoch;
            byte->writer = me;
        } else {
            byte->reader = read ? SEVERAL_WAVES : me;
            byte->read_epoch = epoch;
        }
    }
}
