"""Print the sets of instructions that this CPU has, as `oneDNN's name:torch's name`; nothing where it is no x86."""

import torch

# From the least on: oneDNN's ONEDNN_MAX_CPU_ISA, torch's ATEN_CPU_CAPABILITY, and the capability that both need.
LEVELS = (
    ("SSE41", "default", "sse4_1"),
    ("AVX2", "avx2", "avx2"),
    ("AVX512_CORE", "avx512", "avx512_bw"),
    ("AVX512_CORE_BF16", "avx512", "avx512_bf16"),
    ("AVX512_CORE_AMX", "avx512", "amx_bf16"),
)

has = torch.cpu.get_capabilities()
print(*(f"{onednn}:{aten}" for onednn, aten, capability in LEVELS if has.get(capability)))
