/* Fibres and their scheduler: runs the programs of a launch, one after another. */
#define _GNU_SOURCE
#include "runtime.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

Fibre fibres[MAX_THREADS];
int thread_count, current;
uint32_t program[3], program_number;
Region *regions;
int region_count;
char *shared_memory;
uint32_t shared_bytes, epoch;
Finding *finding;
Outcome outcome;

static char *stacks;
static jmp_buf scheduler;
static void (*kernel)(void *);
static void *kernel_arguments;
static uint32_t grid[3], implicit_arguments[64];

/* ---- what a lane asks about itself ---- */

uint32_t simt_thread_id(void) { return current; }
uint32_t simt_program_x(void) { return program[0]; }
uint32_t simt_program_y(void) { return program[1]; }
uint32_t simt_program_z(void) { return program[2]; }
void *simt_implicit_arguments(void) { return implicit_arguments; }

/* ---- switching ---- */

/* Leave the current fibre; returns when the scheduler runs it again. */
void wait_as(State state) {
    settle_repeated_store();
    fibres[current].state = state;
    if (!_setjmp(fibres[current].context)) _longjmp(scheduler, 1);
}

/* End the launch from inside a fibre. */
void stop(Outcome why) {
    outcome = why;
    _longjmp(scheduler, 1);
}

static void first_run(void) {
    kernel(kernel_arguments);
    settle_repeated_store();
    fibres[current].state = FINISHED;
    _longjmp(scheduler, 1);
}

static void resume(int thread) {
    Fibre *fibre = &fibres[thread];
    current = thread;
    if (_setjmp(scheduler)) return;
    if (fibre->started) _longjmp(fibre->context, 1);
    fibre->started = 1;
    static ucontext_t fresh;
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = stacks + (size_t)thread * STACK_BYTES;
    fresh.uc_stack.ss_size = STACK_BYTES;
    fresh.uc_link = NULL;
    makecontext(&fresh, first_run, 0);
    setcontext(&fresh);
}

/* ---- the scheduler ---- */

static void run_program(void) {
    memset(fibres, 0, sizeof(Fibre) * (size_t)thread_count);
    memset(shared_memory, 0xFF, shared_bytes); /* NaN: reading before writing shows in the result */
    epoch++;
    for (;;) {
        int progress = 0, finished = 0, waiting = 0;
        for (int thread = 0; thread < thread_count; thread++)
            if (fibres[thread].state == READY) {
                resume(thread);
                progress = 1;
                if (outcome != COMPLETED) return;
            }
        for (int first = 0; first < thread_count; first += WAVE) progress |= run_collective(fibres + first);
        if (outcome != COMPLETED) return;
        for (int thread = 0; thread < thread_count; thread++) {
            finished += fibres[thread].state == FINISHED;
            waiting += fibres[thread].state == AT_BARRIER;
        }
        if (finished == thread_count) return;
        if (waiting == thread_count) {
            for (int thread = 0; thread < thread_count; thread++) fibres[thread].state = READY;
            epoch++;
        } else if (!progress) {
            describe(NULL, 0, 0);
            outcome = DEADLOCK;
            return;
        }
    }
}

/* Run every program of a launch; `threads` is a multiple of 32. Returns an Outcome, with `*found` saying where. */
int simt_launch(void (*entry)(void *), void *arguments, const uint32_t sizes[3], int threads, uint32_t shared_size,
                Region *tensors, int tensor_count, Finding *found) {
    if (threads > MAX_THREADS || threads % WAVE || shared_size > SHARED_BYTES) return -1;
    if (!stacks) {
        stacks = mmap(NULL, (size_t)STACK_BYTES * MAX_THREADS, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) return -1;
    }
    kernel = entry;
    kernel_arguments = arguments;
    thread_count = threads;
    shared_bytes = shared_size;
    regions = tensors;
    region_count = tensor_count;
    finding = found;
    outcome = COMPLETED;
    program_number = 0;
    memcpy(grid, sizes, sizeof grid);
    memcpy(implicit_arguments, sizes, sizeof grid); /* num_programs: the block counts lead the implicit arguments */
    for (program[2] = 0; program[2] < grid[2]; program[2]++)
        for (program[1] = 0; program[1] < grid[1]; program[1]++)
            for (program[0] = 0; program[0] < grid[0]; program[0]++, program_number++) {
                run_program();
                if (outcome != COMPLETED) return outcome;
            }
    return COMPLETED;
}

/* Shared memory below 4 GiB: its pointers have 32 bits on the device, and compiled code may convert them. */
void *simt_shared_memory(void) {
    if (!shared_memory) {
        void *memory = mmap(NULL, SHARED_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
        if (memory != MAP_FAILED) shared_memory = memory;
    }
    return shared_memory;
}

/* Zeroed shadow memory that costs only the pages it touches. */
void *simt_shadow(uint64_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

void simt_free_shadow(void *memory, uint64_t bytes) { munmap(memory, bytes); }
