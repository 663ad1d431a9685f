"""What a compiled kernel asks of a chip: registers, spills, shared memory, and the instructions that matter."""

import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from chips import Chip, resident_blocks

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Shown in the report: name -> pattern of the instruction.
MATRIX = {
    "HGMMA": r"HGMMA",  # Hopper, a warpgroup, operands in shared memory
    "UTCMMA": r"UTC\w*MMA",  # Blackwell, accumulator in tensor memory
    "HMMA": r"HMMA",  # a warp, operands in registers
    "MFMA": r"v_mfma_\w+",  # AMD
}
COPIES = {
    "TMA": r"UTMALDG|UTMASTG|UTMAREDG",  # tensor descriptors
    "LDGSTS": r"LDGSTS",  # global to shared memory, asynchronously
    "LDG": r"LDG",
    "STG": r"STG",
    "LDS-DMA": r"(?:buffer|global)_load_(?:dword|lds)\w*_lds|(?:buffer|global)_load_lds\w*",
    "load": r"(?:buffer|global)_load_\w+",
    "store": r"(?:buffer|global)_store_\w+",
}


@dataclass(frozen=True)
class Resources:
    """One kernel on one chip. `registers` a thread, `shared` bytes a block, `spills`: accesses to spilled registers."""

    kernel: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    blocks: int
    needs_matrix: bool
    matrix: dict[str, int] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)

    def problems(self, chip: Chip) -> list[str]:
        """Why this must not be shipped, in words; empty if it may."""
        problems = []
        if self.spills:
            problems.append(f"spills: {self.spills} accesses to registers that did not fit")
        if self.shared > chip.max_shared:
            problems.append(f"does not fit: {self.shared} bytes of shared memory, {chip.name} has {chip.max_shared}")
        elif self.blocks == 0:
            problems.append(f"does not fit: {self.warps} warps of {self.registers} registers a thread")
        if self.needs_matrix and not self.matrix:
            problems.append("tl.dot without a matrix instruction")
        return problems


def resources(compiled: Any, chip: Chip) -> Resources:
    """Read the resources of a triton `CompiledKernel` for `chip` off its machine code."""
    read = _amd if chip.is_amd else _nvidia
    registers, spills, instructions = read(compiled)
    metadata = compiled.metadata
    count = {group: _count(instructions, patterns) for group, patterns in (("matrix", MATRIX), ("copies", COPIES))}
    return Resources(
        kernel=metadata.name,
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        registers=registers,
        spills=spills,
        shared=metadata.shared,
        blocks=resident_blocks(chip, metadata.num_warps, registers, metadata.shared),
        needs_matrix=needs_matrix_instruction(compiled.asm["ttir"]),
        **count,
    )


def needs_matrix_instruction(ttir: str) -> bool:
    """Whether the kernel has a `tl.dot` that a matrix unit can compute; float32 without TF32 has none on NVIDIA."""
    for line in ttir.splitlines():
        if match := re.search(r"tt\.dot .*: tensor<[^>]*x(\w+)> \*", line):
            if match[1] != "f32" or "inputPrecision = tf32" in line:
                return True
    return False


def _count(instructions: Counter, patterns: dict[str, str]) -> dict[str, int]:
    found = {}
    for name, pattern in patterns.items():
        if total := sum(n for opcode, n in instructions.items() if re.fullmatch(pattern, opcode)):
            found[name] = total
    return found


def _nvidia(compiled: Any) -> tuple[int, int, Counter]:
    usage = _run_on_binary("cuobjdump", "-res-usage", compiled.asm["cubin"])
    registers = re.search(r"\bREG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump reported no register count for {compiled.metadata.name}:\n{usage}")
    sass = _run_on_binary("cuobjdump", "-sass", compiled.asm["cubin"])
    # "  /*0050*/   @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE))
    if not opcodes:
        raise RuntimeError(f"cuobjdump disassembled nothing for {compiled.metadata.name}")
    return int(registers[1]), opcodes["LDL"] + opcodes["STL"], opcodes


def _run_on_binary(tool: str, option: str, binary: bytes) -> str:
    # cuobjdump starts nvdisasm by name.
    environment = dict(os.environ, PATH=f"{NVIDIA_TOOLS}{os.pathsep}{os.environ.get('PATH', '')}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(NVIDIA_TOOLS / tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def _amd(compiled: Any) -> tuple[int, int, Counter]:
    assembly = compiled.asm["amdgcn"]

    @functools.cache
    def number(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        if match is None:
            raise RuntimeError(f"no .{key} in the assembly of {compiled.metadata.name}")
        return int(match[1])

    opcodes = Counter(re.findall(r"^\s+([a-z]\w+)", assembly, re.MULTILINE))
    # Spilled scalar registers go to lanes of a vector register, which costs no memory access.
    spills = number("vgpr_spill_count") or number("private_segment_fixed_size")
    # Of the unified file both kinds count: `vgpr_count` is their sum.
    return number("vgpr_count"), spills, opcodes
