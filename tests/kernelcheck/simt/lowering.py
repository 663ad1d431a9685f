"""LLVM IR of Triton's AMD gfx1100 backend -> LLVM IR that this machine's code generator accepts.

The two differ little: a warp-level program is scalar code per lane, and the host compiles it as it stands once

1. what only the AMD target or a newer LLVM understands is gone: target, metadata, attributes, literals of floats;
2. AMD intrinsics are replaced (intrinsics.py);
3. shared memory, a symbol on the device, is the address of a buffer;
4. every access to global and shared memory first tells the runtime its address, size and kind;
5. an entry point `simt_entry(ptr)` loads the kernel's arguments from an array of 8-byte slots.

All on text: no LLVM binding offers to edit IR of two versions. Anything unknown raises `UnsupportedKernel`, by name.
"""

import re
import struct
from dataclasses import dataclass

from .intrinsics import RENAMED, SHUFFLE_TYPES, SHUFFLES, WRITTEN_OUT, shuffle_wrapper

GLOBAL, SHARED = "1", "3"
CHECKS = {GLOBAL: "simt_global_access", SHARED: "simt_shared_access"}
LOAD, ATOMIC, STORE = 0, 1, 2

# An aggregate or a plain word: `float`, `<2 x bfloat>`, `{ float, i32 }`.
_TYPE = r"(?P<type><[^>]*>|\{[^}]*\}|[\w.]+)"
_POINTER = r"ptr addrspace\((?P<space>[13])\) (?P<pointer>%[\w.]+|@[\w.]+|getelementptr .+?\)|inttoptr .+?\))"
_ACCESSES = (
    (LOAD, re.compile(rf"^\s*%[\w.]+ = load (?:atomic )?(?:volatile )?{_TYPE}, {_POINTER}(?: \w+)?, align \d+")),
    (STORE, re.compile(rf"^\s*store (?:atomic )?(?:volatile )?{_TYPE} .+?, {_POINTER}(?: \w+)?, align \d+")),
    (ATOMIC, re.compile(rf"^\s*%[\w.]+ = atomicrmw (?:volatile )?\w+ {_POINTER}, {_TYPE} ")),
    (ATOMIC, re.compile(rf"^\s*%[\w.]+ = cmpxchg (?:weak )?(?:volatile )?{_POINTER}, {_TYPE} ")),
)
_TOUCHES_MEMORY = re.compile(r"= load |^\s*store |= atomicrmw |= cmpxchg |@llvm\.(?:memcpy|memmove|memset|masked)\.")


class UnsupportedKernel(NotImplementedError):
    """The compiled kernel contains something that the executor does not know."""


@dataclass(frozen=True)
class HostModule:
    """IR for this machine, and how many argument slots `simt_entry` reads."""

    ir: str
    argument_count: int


def lower(device_ir: str, name: str, shared_memory: int) -> HostModule:
    """Translate the kernel `name`; `shared_memory` is the address of the buffer that stands for it (an int)."""
    parameters = _parameter_types(device_ir, name)
    ir = _strip(device_ir)
    ir = _rewrite_float_literals(ir)
    ir = re.sub(r"^@global_smem = .*$", "", ir, flags=re.MULTILINE)
    ir = ir.replace("@global_smem", f"inttoptr (i64 {shared_memory} to ptr addrspace(3))")
    ir = "\n".join(_announce_accesses(ir.splitlines()))
    ir = _replace_intrinsics(ir)
    ir += "".join(f"\ndeclare void @{check}(ptr, i32, i32)" for check in CHECKS.values())
    return HostModule(_drop_repeated_declarations(ir + _entry_point(name, parameters)), len(parameters))


def _parameter_types(ir: str, name: str) -> list[str]:
    signature = re.search(rf"^define amdgpu_kernel void @{re.escape(name)}\((.*)\) [^()]*\{{$", ir, flags=re.MULTILINE)
    if signature is None:
        raise UnsupportedKernel(f"no kernel {name} in the compiled module")
    pieces = re.split(r", (?![^()]*\))", signature[1]) if signature[1] else []
    return [re.match(r"ptr addrspace\(\d+\)|\S+", piece)[0] for piece in pieces]


def _strip(ir: str) -> str:
    """Remove target, metadata, attributes: they change how AMD code is generated, not what the kernel computes."""
    ir = re.sub(r"^(target|source_filename|attributes|!|;) ?.*$", "", ir, flags=re.MULTILINE)
    ir = re.sub(r",? ![\w.]+ !\d+", "", ir)
    ir = re.sub(r" #\d+", "", ir)
    ir = re.sub(r'syncscope\("[^"]*"\) ', "", ir)
    ir = ir.replace("amdgpu_kernel ", "").replace(" immarg", "")
    words = r"nofree|readonly|writeonly|readnone|inreg|noundef|captures\([^)]*\)|range\([^)]*\)|nocreateundeforpoison"
    return re.sub(rf"\b(?:{words}) ", "", ir)


def _rewrite_float_literals(ir: str) -> str:
    """Newer LLVM prints f0x3FB8AA3B, 2.0e-01, +inf, nan(0x7FC00000); older ones read a double's bits in hexadecimal."""

    def as_double(value: float) -> str:
        return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"

    def from_bits(match: re.Match) -> str:
        return as_double(struct.unpack("<f", struct.pack("<I", int(match[1], 16)))[0])

    def from_decimal(match: re.Match) -> str:
        return as_double(struct.unpack("<f", struct.pack("<f", float(match[0])))[0])

    # A decimal that float32 does not hold exactly is an error to older versions.
    decimal = re.compile(r"(?<![\w.%@])[+-]?\d+\.\d+(?:e[+-]?\d+)?\b")
    lines = ir.splitlines()
    ir = "\n".join(decimal.sub(from_decimal, line) if re.search(r"\bfloat\b", line) else line for line in lines)
    ir = re.sub(r"\bf0x([0-9A-Fa-f]{8})\b", from_bits, ir)
    # bfloat and half literals have a 16-bit form of their own.
    for type_, letter, infinity, nan in (("bfloat", "R", 0x7F80, 0x7FC0), ("half", "H", 0x7C00, 0x7E00)):
        ir = re.sub(rf"\b{type_} [+-]?[qs]?nan(?:\(0x[0-9A-Fa-f]+\))?", f"{type_} 0x{letter}{nan:04X}", ir)
        ir = re.sub(rf"\b{type_} \+?inf\b", f"{type_} 0x{letter}{infinity:04X}", ir)
        ir = re.sub(rf"\b{type_} -inf\b", f"{type_} 0x{letter}{infinity | 0x8000:04X}", ir)
        ir = re.sub(rf"\b{type_} f0x([0-9A-Fa-f]{{4}})\b", rf"{type_} 0x{letter}\1", ir)
    word = r"(?<![\w.%@])"
    ir = re.sub(rf"{word}-inf\b", "0xFFF0000000000000", ir)
    ir = re.sub(rf"{word}\+?inf\b", "0x7FF0000000000000", ir)
    return re.sub(rf"{word}[+-]?[qs]?nan\b(?:\(0x[0-9A-Fa-f]+\))?", "0x7FF8000000000000", ir)


def _announce_accesses(lines: list[str]) -> list[str]:
    """Put a call of the runtime's check before each load, store and atomic of global or shared memory."""
    result = []
    for line in lines:
        if _TOUCHES_MEMORY.search(line) and re.search(r"ptr addrspace\([13]\)", line):
            for kind, pattern in _ACCESSES:
                if match := pattern.match(line):
                    result += _announcement(match["type"], match["space"], match["pointer"], kind, len(result))
                    break
            else:
                raise UnsupportedKernel(f"an access to memory that the bounds check does not know: {line.strip()}")
        result.append(line)
    return result


def _announcement(type_: str, space: str, pointer: str, kind: int, unique: int) -> list[str]:
    generic = f"%announced.{unique}"
    # The distance from element 0 to element 1 at address 0 is the size of the type.
    size = f"ptrtoint (ptr getelementptr ({type_}, ptr null, i32 1) to i32)"
    return [
        f"  {generic} = addrspacecast ptr addrspace({space}) {pointer} to ptr",
        f"  call void @{CHECKS[space]}(ptr {generic}, i32 {size}, i32 {kind})",
    ]


def _replace_intrinsics(ir: str) -> str:
    definitions = []
    for name in sorted(set(re.findall(r"@(llvm\.amdgcn\.[\w.]+)", ir))):
        base, _, suffix = name.rpartition(".")
        if name in RENAMED:
            replacement = RENAMED[name]
        elif base in SHUFFLES and suffix in SHUFFLE_TYPES:
            replacement = f"{SHUFFLES[base][0]}_{suffix}"
            definitions.append(shuffle_wrapper(base, suffix))
        elif name in WRITTEN_OUT:
            replacement = re.search(r"define [^@]*@(\w+)\(", WRITTEN_OUT[name])[1]
            definitions.append(WRITTEN_OUT[name])
        else:
            raise UnsupportedKernel(f"the compiled kernel uses {name}, which simt/intrinsics.py does not map")
        if name not in RENAMED:
            ir = re.sub(rf"^declare [^@\n]*@{re.escape(name)}\(.*$", "", ir, flags=re.MULTILINE)
        ir = re.sub(rf"@{re.escape(name)}(?![\w.])", f"@{replacement}", ir)
    return "\n".join([ir, *definitions])


def _entry_point(name: str, parameters: list[str]) -> str:
    lines = ["\ndefine void @simt_entry(ptr %slots) {"]
    for i, type_ in enumerate(parameters):
        lines.append(f"  %slot{i} = getelementptr i64, ptr %slots, i32 {i}")
        lines.append(f"  %value{i} = load {type_}, ptr %slot{i}")
    arguments = ", ".join(f"{type_} %value{i}" for i, type_ in enumerate(parameters))
    return "\n".join([*lines, f"  call void @{name}({arguments})", "  ret void", "}", ""])


def _drop_repeated_declarations(ir: str) -> str:
    """Two intrinsics may map to one function; LLVM wants it declared once, and not at all where it is defined."""
    seen = set(re.findall(r"^define [^@\n]*@([\w.]+)\(", ir, flags=re.MULTILINE))

    def first_only(match: re.Match) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return match[0]

    return re.sub(r"^declare [^@\n]*@([\w.]+)\(.*$", first_only, ir, flags=re.MULTILINE)
