"""The AMD intrinsics that Triton's gfx1100 backend emits, and what stands for each of them on this machine.

An intrinsic becomes a call of the C runtime, a generic LLVM intrinsic, or a small function in LLVM IR written out
here. One that is missing makes the lowering refuse the kernel by name; adding it means one line below, and for a new
operation between lanes a case in collectives.c.
"""

# Calls that only change their name.
RENAMED = {
    "llvm.amdgcn.workitem.id.x": "simt_thread_id",
    "llvm.amdgcn.workgroup.id.x": "simt_program_x",
    "llvm.amdgcn.workgroup.id.y": "simt_program_y",
    "llvm.amdgcn.workgroup.id.z": "simt_program_z",
    "llvm.amdgcn.implicitarg.ptr": "simt_implicit_arguments",
    "llvm.amdgcn.s.barrier": "simt_barrier",
    "llvm.amdgcn.wave.barrier": "simt_wave_barrier",
    "llvm.amdgcn.perm": "simt_perm",
    "llvm.amdgcn.ds.bpermute": "simt_bpermute",
    "llvm.amdgcn.ds.swizzle": "simt_swizzle",
    "llvm.amdgcn.exp2.f32": "llvm.exp2.f32",
    "llvm.amdgcn.log.f32": "llvm.log2.f32",
    "llvm.amdgcn.sqrt.f32": "llvm.sqrt.f32",
}

# Shuffles come in several types; the runtime moves 32 bits. Intrinsic: (runtime function, how many values it takes,
# types of the parameters after them).
SHUFFLES = {
    "llvm.amdgcn.readfirstlane": ("simt_readfirstlane", 1, []),
    "llvm.amdgcn.readlane": ("simt_readlane", 1, ["i32"]),
    "llvm.amdgcn.permlane16": ("simt_permlane16", 2, ["i32", "i32", "i1", "i1"]),
    "llvm.amdgcn.permlanex16": ("simt_permlanex16", 2, ["i32", "i32", "i1", "i1"]),
    "llvm.amdgcn.update.dpp": ("simt_dpp", 2, ["i32", "i32", "i32", "i1"]),
}
# Suffix of the intrinsic: (its LLVM type, the integer of the same width).
SHUFFLE_TYPES = {
    "i1": ("i1", "i1"),
    "i8": ("i8", "i8"),
    "i16": ("i16", "i16"),
    "i32": ("i32", "i32"),
    "f16": ("half", "i16"),
    "bf16": ("bfloat", "i16"),
    "f32": ("float", "i32"),
    "i64": ("i64", "i64"),
}

# Replaced by a function of the same signature, written in LLVM IR.
WRITTEN_OUT = {
    "llvm.amdgcn.rcp.f32": """
define float @simt_rcp(float %x) {
  %r = fdiv float 1.0, %x
  ret float %r
}""",
    "llvm.amdgcn.rsq.f32": """
declare float @llvm.sqrt.f32(float)
define float @simt_rsq(float %x) {
  %s = call float @llvm.sqrt.f32(float %x)
  %r = fdiv float 1.0, %s
  ret float %r
}""",
    "llvm.amdgcn.fmed3.f32": """
declare float @llvm.minnum.f32(float, float)
declare float @llvm.maxnum.f32(float, float)
define float @simt_fmed3(float %x, float %y, float %z) {
  %low = call float @llvm.minnum.f32(float %x, float %y)
  %high = call float @llvm.maxnum.f32(float %x, float %y)
  %m = call float @llvm.minnum.f32(float %high, float %z)
  %r = call float @llvm.maxnum.f32(float %low, float %m)
  ret float %r
}""",
}

# a.x * b.x + a.y * b.y + c, rounded to bfloat16 once.
WRITTEN_OUT["llvm.amdgcn.fdot2.bf16.bf16"] = """
define bfloat @simt_fdot2_bf16(<2 x bfloat> %a, <2 x bfloat> %b, bfloat %c) {
  %wide.a = fpext <2 x bfloat> %a to <2 x float>
  %wide.b = fpext <2 x bfloat> %b to <2 x float>
  %wide.c = fpext bfloat %c to float
  %products = fmul <2 x float> %wide.a, %wide.b
  %x = extractelement <2 x float> %products, i32 0
  %y = extractelement <2 x float> %products, i32 1
  %xy = fadd float %x, %y
  %sum = fadd float %xy, %wide.c
  %r = fptrunc float %sum to bfloat
  ret bfloat %r
}"""


def _wmma(name: str, element: str, is_bf16: int) -> str:
    """D = A @ B + C over a wave: the operands go through memory, since each fibre has its own registers."""
    return f"""
declare void @simt_wmma(ptr, ptr, ptr, ptr, i32)
define <8 x float> @{name}(<16 x {element}> %a, <16 x {element}> %b, <8 x float> %c) {{
  %pa = alloca <16 x {element}>
  %pb = alloca <16 x {element}>
  %pc = alloca <8 x float>
  %pd = alloca <8 x float>
  store <16 x {element}> %a, ptr %pa
  store <16 x {element}> %b, ptr %pb
  store <8 x float> %c, ptr %pc
  call void @simt_wmma(ptr %pa, ptr %pb, ptr %pc, ptr %pd, i32 {is_bf16})
  %d = load <8 x float>, ptr %pd
  ret <8 x float> %d
}}"""


WRITTEN_OUT["llvm.amdgcn.wmma.f32.16x16x16.f16.v8f32.v16f16"] = _wmma("simt_wmma_f16", "half", 0)
WRITTEN_OUT["llvm.amdgcn.wmma.f32.16x16x16.bf16.v8f32.v16i16"] = _wmma("simt_wmma_bf16", "i16", 1)


def shuffle_wrapper(name: str, suffix: str) -> str:
    """A function with the signature of the shuffle intrinsic `name.suffix` that moves its value by 32 bits."""
    runtime, values, rest = SHUFFLES[name]
    type_, integer = SHUFFLE_TYPES[suffix]
    parameters = [f"{t} %a{i}" for i, t in enumerate([type_] * values + rest)]
    lines = [
        f"declare i32 @{runtime}({', '.join(['i32'] * values + rest)})",
        f"define {type_} @{runtime}_{suffix}({', '.join(parameters)}) {{",
    ]
    if integer == "i64":
        return "\n".join([*lines, *_by_halves(runtime, values, rest)])
    for i in range(values):
        source = f"%a{i}"
        if type_ != integer:
            lines.append(f"  %bits{i} = bitcast {type_} {source} to {integer}")
            source = f"%bits{i}"
        widening = f"zext {integer} {source} to i32" if integer != "i32" else f"add i32 {source}, 0"
        lines.append(f"  %wide{i} = {widening}")
    arguments = [f"i32 %wide{i}" for i in range(values)] + [f"{t} %a{values + i}" for i, t in enumerate(rest)]
    lines.append(f"  %wide = call i32 @{runtime}({', '.join(arguments)})")
    lines.append(f"  %bits = {f'trunc i32 %wide to {integer}' if integer != 'i32' else 'add i32 %wide, 0'}")
    lines.append(f"  %result = bitcast {integer} %bits to {type_}")
    return "\n".join([*lines, f"  ret {type_} %result", "}"])


def _by_halves(runtime: str, values: int, rest: list[str]) -> list[str]:
    lines = []
    for half in ("low", "high"):
        for i in range(values):
            source = f"%a{i}"
            if half == "high":
                lines.append(f"  %shifted{i} = lshr i64 {source}, 32")
                source = f"%shifted{i}"
            lines.append(f"  %{half}{i} = trunc i64 {source} to i32")
        arguments = [f"i32 %{half}{i}" for i in range(values)] + [f"{t} %a{values + i}" for i, t in enumerate(rest)]
        lines.append(f"  %{half} = call i32 @{runtime}({', '.join(arguments)})")
        lines.append(f"  %{half}64 = zext i32 %{half} to i64")
    return [*lines, "  %up = shl i64 %high64, 32", "  %result = or i64 %up, %low64", "  ret i64 %result", "}"]
