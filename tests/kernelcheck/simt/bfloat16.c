/* What LLVM calls where the CPU has no instruction for it. Left out, the JIT would call address 0. */
#include <stdint.h>
#include <string.h>

/* `__truncsfbf2`: float to bfloat16, to nearest, ties to even; NaN stays NaN. The caller reads the low 16 bits of xmm0. */
float simt_round_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) {
        bits = (bits >> 16) | 0x40;
    } else {
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    }
    memcpy(&value, &bits, sizeof value);
    return value;
}
