/* Operations that need the other lanes of a wave: first what a lane calls, then how the wave computes the results. */
#include "runtime.h"

#include <string.h>

void simt_barrier(void) { wait_as(AT_BARRIER); }

static uint32_t collective(Collective which, uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t e, uint32_t f) {
    Fibre *me = &fibres[current];
    me->collective = which;
    uint32_t operands[6] = {a, b, c, d, e, f};
    memcpy(me->operand, operands, sizeof operands);
    wait_as(AT_COLLECTIVE);
    return me->result;
}

void simt_wave_barrier(void) { collective(WAVE_BARRIER, 0, 0, 0, 0, 0, 0); }
uint32_t simt_readfirstlane(uint32_t value) { return collective(READ_FIRST_LANE, value, 0, 0, 0, 0, 0); }
uint32_t simt_readlane(uint32_t value, uint32_t lane) { return collective(READ_LANE, value, lane, 0, 0, 0, 0); }
uint32_t simt_bpermute(uint32_t address, uint32_t value) { return collective(BPERMUTE, value, address, 0, 0, 0, 0); }
uint32_t simt_swizzle(uint32_t value, uint32_t pattern) { return collective(SWIZZLE, value, pattern, 0, 0, 0, 0); }

uint32_t simt_permlane16(uint32_t old, uint32_t value, uint32_t low, uint32_t high, int fetch_inactive, int bound_ctrl) {
    (void)old, (void)fetch_inactive, (void)bound_ctrl; /* they matter for inactive lanes only */
    return collective(PERMLANE16, value, low, high, 0, 0, 0);
}

uint32_t simt_permlanex16(uint32_t old, uint32_t value, uint32_t low, uint32_t high, int fetch_inactive, int bound_ctrl) {
    (void)old, (void)fetch_inactive, (void)bound_ctrl;
    return collective(PERMLANEX16, value, low, high, 0, 0, 0);
}

uint32_t simt_dpp(uint32_t old, uint32_t value, uint32_t control, uint32_t row_mask, uint32_t bank_mask, int bound_ctrl) {
    return collective(DPP, value, old, control, row_mask, bank_mask, (uint32_t)bound_ctrl);
}

/* D = A * B + C with 16 x 16 x 16 elements spread over the wave; `is_bf16` says how to read A and B. */
void simt_wmma(void *a, void *b, void *c, void *d, uint32_t is_bf16) {
    void *matrix[4] = {a, b, c, d};
    memcpy(fibres[current].matrix, matrix, sizeof matrix);
    collective(WMMA, is_bf16, 0, 0, 0, 0, 0);
}

/* Not a collective: picks four bytes out of eight. Selectors 8-11 replicate a sign, 12 gives 0x00, above that 0xFF. */
uint32_t simt_perm(uint32_t high, uint32_t low, uint32_t selectors) {
    uint64_t bytes = ((uint64_t)high << 32) | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t selector = (selectors >> (8 * i)) & 0xFF, byte = 0xFF;
        if (selector < 8) byte = (bytes >> (8 * selector)) & 0xFF;
        else if (selector < 12) byte = (bytes >> (16 * (selector - 8) + 15)) & 1 ? 0xFF : 0;
        else if (selector == 12) byte = 0;
        result |= byte << (8 * i);
    }
    return result;
}

/* The lane that `lane` reads from under a data-parallel-primitive control word; -1: none, -2: unknown control. */
static int dpp_source(int lane, uint32_t control) {
    int row = lane & ~15, place = lane & 15, amount = (int)(control & 15);
    if (control <= 0xFF) return (lane & ~3) + (int)((control >> (2 * (lane & 3))) & 3);   /* quad_perm */
    switch (control & ~15u) {
    case 0x100: return place + amount < 16 ? lane + amount : -1;                          /* row_shl */
    case 0x110: return place - amount >= 0 ? lane - amount : -1;                          /* row_shr */
    case 0x120: return row + ((place - amount) & 15);                                     /* row_ror */
    case 0x140:
        if (control == 0x140) return row + 15 - place;                                    /* row_mirror */
        if (control == 0x141) return (lane & ~7) + 7 - (lane & 7);                        /* row_half_mirror */
        return -2;
    case 0x150: return row + amount;                                                      /* row_share */
    case 0x160: return row + (place ^ amount);                                            /* row_xmask */
    default: return -2;
    }
}

static float widen(uint16_t bits, int is_bf16) {
    if (is_bf16) {
        uint32_t wide = (uint32_t)bits << 16;
        float value;
        memcpy(&value, &wide, sizeof value);
        return value;
    }
    _Float16 value;
    memcpy(&value, &bits, sizeof value);
    return (float)value;
}

/* Lane l < 16 holds row l of A and column l of B. Element i of lane l in C and D is row 2i + l/16, column l%16. */
static void run_wmma(Fibre *wave) {
    int is_bf16 = (int)wave[0].operand[0];
    float a[16][16], b[16][16];
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) {
            a[i][k] = widen(((uint16_t *)wave[i].matrix[0])[k], is_bf16);
            b[i][k] = widen(((uint16_t *)wave[i].matrix[1])[k], is_bf16);
        }
    for (int lane = 0; lane < WAVE; lane++)
        for (int i = 0; i < 8; i++) {
            const float *row = a[2 * i + lane / 16], *column = b[lane % 16];
            float sum = ((float *)wave[lane].matrix[2])[i];
            for (int k = 0; k < 16; k++) sum += row[k] * column[k];
            ((float *)wave[lane].matrix[3])[i] = sum;
        }
}

/* Complete the collective at which all lanes of a wave have arrived; returns whether there was one. */
int run_collective(Fibre *wave) {
    for (int lane = 0; lane < WAVE; lane++)
        if (wave[lane].state != AT_COLLECTIVE) return 0;
    Collective which = wave[0].collective;
    for (int lane = 1; lane < WAVE; lane++)
        if (wave[lane].collective != which) {
            outcome = DIVERGENT_COLLECTIVE;
            return 0;
        }
    if (which == WMMA) run_wmma(wave);
    for (int lane = 0; lane < WAVE; lane++) {
        const uint32_t *in = wave[lane].operand;
        int source = lane;
        switch (which) {
        case READ_FIRST_LANE: source = 0; break;
        case READ_LANE: source = (int)(in[1] & 31); break;
        case BPERMUTE: source = (int)((in[1] >> 2) & 31); break;
        case PERMLANE16:
        case PERMLANEX16: {
            uint64_t selectors = ((uint64_t)in[2] << 32) | in[1];
            int row = (lane & 16) ^ (which == PERMLANEX16 ? 16 : 0);
            source = row + (int)((selectors >> (4 * (lane & 15))) & 15);
            break;
        }
        case SWIZZLE:
            if (in[1] & 0x8000) source = (lane & ~3) + (int)((in[1] >> (2 * (lane & 3))) & 3);
            else source = (int)((((uint32_t)lane & in[1] & 31) | ((in[1] >> 5) & 31)) ^ ((in[1] >> 10) & 31));
            break;
        case DPP: {
            source = dpp_source(lane, in[2]);
            if (source == -2) {
                outcome = UNKNOWN_DPP;
                return 0;
            }
            int enabled = ((in[3] >> (lane >> 4)) & 1) && ((in[4] >> ((lane & 15) >> 2)) & 1);
            if (!enabled || source < 0) {
                wave[lane].result = enabled && in[5] ? 0 : in[1]; /* bound_ctrl: zero, else the old value */
                continue;
            }
            break;
        }
        default: break;
        }
        wave[lane].result = wave[source].operand[0];
    }
    for (int lane = 0; lane < WAVE; lane++) wave[lane].state = READY;
    return 1;
}
