/* The part of a GPU that lies between the instructions of one thread.
 *
 * A kernel that lowering.py has translated runs here, one program (workgroup) after another. Every lane of the program
 * is a fibre with a stack of its own. A fibre runs until it reaches something that needs other lanes:
 *
 *   a collective   (shuffle, matrix instruction): waits for all 32 lanes of its wave, then the wave's results are computed
 *   a barrier      waits for all lanes of the program
 *
 * Every access to global and shared memory announces itself first (simt_global_access, simt_shared_access), so that an
 * access outside the launch's tensors, a byte stored by one program and touched by another, and shared memory that
 * two waves use without a barrier in between end the launch with a finding instead of a wrong number.
 *
 * Names and semantics of the operations follow the "RDNA3 Instruction Set Architecture" reference guide.
 */
#ifndef SIMT_RUNTIME_H
#define SIMT_RUNTIME_H

#include <setjmp.h>
#include <stdint.h>

enum { WAVE = 32, MAX_THREADS = 1024, STACK_BYTES = 512 << 10, SHARED_BYTES = 64 << 10 };

typedef enum { READY, AT_BARRIER, AT_COLLECTIVE, FINISHED } State;

typedef enum {
    READ_FIRST_LANE, READ_LANE, PERMLANE16, PERMLANEX16, BPERMUTE, DPP, SWIZZLE, WMMA, WAVE_BARRIER
} Collective;

typedef struct {
    jmp_buf context;
    State state;
    int started;
    Collective collective;
    uint32_t operand[6];
    uint32_t result;
    void *matrix[4]; /* A, B, C in, D out */
} Fibre;

/* Kinds of access; an atomic conflicts with a plain store, not with another atomic or a load. */
enum { LOAD, ATOMIC, STORE };

/* Why a launch ended; executor.py puts it into words. */
typedef enum {
    COMPLETED, DEADLOCK, DIVERGENT_COLLECTIVE, UNKNOWN_DPP, OUT_OF_BOUNDS, GLOBAL_RACE, SHARED_OUT_OF_BOUNDS, SHARED_RACE
} Outcome;

typedef struct {
    uint64_t address;
    uint32_t size, kind;
    uint32_t program[3];
    uint32_t thread;
    uint32_t other;      /* the other program (GLOBAL_RACE, 0-based) or the other wave (SHARED_RACE) */
    uint32_t other_kind;
} Finding;

/* The bytes [start, end) that one or several overlapping tensors occupy, with who touched what in this launch. */
typedef struct {
    uint64_t start, end;
    uint64_t unit;      /* bytes of the narrowest element: the resolution of the shadow */
    uint32_t *writer;   /* per unit: 1 + the last program that stored to it */
    uint32_t *toucher;  /* per unit: 1 + the last program that loaded or updated it, or SEVERAL */
} Region;

enum { SEVERAL = 0xFFFFFFFFu };

/* Shared memory: who touched each byte since the last barrier. `epoch` counts barriers. */
typedef struct { uint32_t write_epoch, read_epoch; uint16_t writer, reader; } SharedShadow;
enum { SEVERAL_WAVES = 0xFFFF };

/* The launch that is running. */
extern Fibre fibres[MAX_THREADS];
extern int thread_count, current;          /* the fibre that runs now */
extern uint32_t program[3], program_number; /* the program that runs now */
extern Region *regions;
extern int region_count;
extern char *shared_memory;
extern uint32_t shared_bytes, epoch;
extern Finding *finding;
extern Outcome outcome;

void wait_as(State state);             /* leave the current fibre until the scheduler runs it again */
void stop(Outcome why);                /* end the launch from inside a fibre */
void settle_repeated_store(void);      /* before another fibre runs: was the last store one that changed nothing? */
int run_collective(Fibre *wave);       /* complete the collective at which a whole wave waits; whether there was one */
Finding *describe(const void *address, uint32_t size, uint32_t kind);

#endif
