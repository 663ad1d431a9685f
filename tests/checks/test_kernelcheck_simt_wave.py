"""Operations between the lanes of a wave, one by one, on IR written by hand (kernelcheck/simt/collectives.c)."""

import pytest
import torch

pytestmark = pytest.mark.kernels(modes=("simt",))

LANES = range(32)
PREAMBLE = """
declare i32 @llvm.amdgcn.workitem.id.x()
declare i32 @llvm.amdgcn.update.dpp.i32(i32, i32, i32 immarg, i32 immarg, i32 immarg, i1 immarg)
declare i32 @llvm.amdgcn.permlane16.i32(i32, i32, i32, i32, i1 immarg, i1 immarg)
declare i32 @llvm.amdgcn.permlanex16.i32(i32, i32, i32, i32, i1 immarg, i1 immarg)
declare i32 @llvm.amdgcn.ds.bpermute(i32, i32)
declare i32 @llvm.amdgcn.ds.swizzle(i32, i32 immarg)
declare i32 @llvm.amdgcn.readlane.i32(i32, i32)
declare float @llvm.amdgcn.readfirstlane.f32(float)
declare i32 @llvm.amdgcn.perm(i32, i32, i32)
declare void @llvm.amdgcn.s.barrier()
declare i32 @llvm.amdgcn.unheard.of()
"""


def _run(body: str, threads: int = 32, ir_type: str = "i32") -> list:
    """Each lane computes %r from its number %lane and %value = 100 + %lane; returns what the lanes got."""
    from kernelcheck.simt.executor import HostKernel

    ir = f"""{PREAMBLE if "unheard" in body else PREAMBLE.replace("declare i32 @llvm.amdgcn.unheard.of()", "")}
define amdgpu_kernel void @k(ptr addrspace(1) inreg captures(none) %out) local_unnamed_addr #0 {{
  %lane = call i32 @llvm.amdgcn.workitem.id.x()
  %value = add i32 %lane, 100
{body}
  %address = getelementptr {ir_type}, ptr addrspace(1) %out, i32 %lane
  store {ir_type} %r, ptr addrspace(1) %address, align 4
  ret void
}}
"""
    out = torch.zeros(threads, dtype=torch.int32 if ir_type == "i32" else torch.float32)
    HostKernel(ir, "k", 0).launch((1, 1, 1), threads, [out], ["out"])
    return out.tolist()


def _dpp(control: int, row_mask: int = 15, bank_mask: int = 15, bound_ctrl: bool = True) -> list[int]:
    arguments = f"i32 -1, i32 %value, i32 {control}, i32 {row_mask}, i32 {bank_mask}, i1 {str(bound_ctrl).lower()}"
    return _run(f"  %r = call i32 @llvm.amdgcn.update.dpp.i32({arguments})")


@pytest.mark.parametrize(
    ("control", "source"),
    [
        (0b00_01_10_11, lambda lane: lane ^ 3),
        (0x101, lambda lane: lane + 1 if lane % 16 < 15 else None),
        (0x118, lambda lane: lane - 8 if lane % 16 >= 8 else None),
        (0x121, lambda lane: lane // 16 * 16 + (lane - 1) % 16),
        (0x140, lambda lane: lane // 16 * 16 + 15 - lane % 16),
        (0x141, lambda lane: lane // 8 * 8 + 7 - lane % 8),
        (0x153, lambda lane: lane // 16 * 16 + 3),
        (0x168, lambda lane: lane ^ 8),
    ],
    ids=["quad_perm", "row_shl", "row_shr", "row_ror", "row_mirror", "row_half_mirror", "row_share", "row_xmask"],
)
def test_dpp(control, source):
    sources = [source(lane) for lane in LANES]
    assert _dpp(control) == [0 if s is None else 100 + s for s in sources]
    assert _dpp(control, bound_ctrl=False) == [-1 if s is None else 100 + s for s in sources]


def test_dpp_masks_keep_the_old_value():
    assert _dpp(0x140, row_mask=2) == [-1 if lane < 16 else 100 + 16 + 15 - lane % 16 for lane in LANES]
    assert _dpp(0x140, bank_mask=1) == [
        100 + lane // 16 * 16 + 15 - lane % 16 if lane % 16 < 4 else -1 for lane in LANES
    ]


def test_permlane16_and_permlanex16():
    # Selector nibble i, for lane i of a row, is 15 - i.
    low, high = 0x89ABCDEF, 0x01234567
    arguments = f"i32 0, i32 %value, i32 {low - 2**32}, i32 {high}, i1 false, i1 false"
    assert _run(f"  %r = call i32 @llvm.amdgcn.permlane16.i32({arguments})") == [
        100 + lane // 16 * 16 + 15 - lane % 16 for lane in LANES
    ]
    assert _run(f"  %r = call i32 @llvm.amdgcn.permlanex16.i32({arguments})") == [
        100 + (1 - lane // 16) * 16 + 15 - lane % 16 for lane in LANES
    ]


def test_bpermute_swizzle_and_readlane():
    reverse = "  %from = sub i32 31, %lane\n  %byte = shl i32 %from, 2\n"
    assert _run(reverse + "  %r = call i32 @llvm.amdgcn.ds.bpermute(i32 %byte, i32 %value)") == [131 - i for i in LANES]
    # Bit mode: and 0x1F, or 0, xor 1: neighbours swap. Quad mode: every lane takes its quad's lane 2.
    assert _run("  %r = call i32 @llvm.amdgcn.ds.swizzle(i32 %value, i32 1055)") == [100 + (i ^ 1) for i in LANES]
    assert _run("  %r = call i32 @llvm.amdgcn.ds.swizzle(i32 %value, i32 32938)") == [
        100 + i // 4 * 4 + 2 for i in LANES
    ]
    assert _run("  %r = call i32 @llvm.amdgcn.readlane.i32(i32 %value, i32 9)") == [109] * 32


def test_readfirstlane_is_per_wave_and_keeps_floats():
    body = "  %f = sitofp i32 %value to float\n  %r = call float @llvm.amdgcn.readfirstlane.f32(float %f)"
    assert _run(body, threads=64, ir_type="float") == [100.0] * 32 + [132.0] * 32


def test_perm_picks_bytes():
    # Bytes 0..3 of the second operand, 4..7 of the first; 9: the sign of byte 3; 12: zero; 13: 0xFF.
    picks = int.from_bytes(bytes([4, 0, 12, 13]), "little", signed=True)
    body = f"  %r = call i32 @llvm.amdgcn.perm(i32 {0x11223344}, i32 {0x55667788}, i32 {picks})"
    assert _run(body)[0] == int.from_bytes(bytes([0x44, 0x88, 0, 0xFF]), "little", signed=True)
    picks = int.from_bytes(bytes([9, 8, 7, 3]), "little", signed=True)
    body = f"  %r = call i32 @llvm.amdgcn.perm(i32 {0x11223344}, i32 {0x85667788 - 2**32}, i32 {picks})"
    assert _run(body)[0] == int.from_bytes(bytes([0xFF, 0, 0x11, 0x85]), "little", signed=True)


HALF_WAITS = """
  %c = icmp slt i32 %lane, 16
  br i1 %c, label %yes, label %no
yes:
  call void @llvm.amdgcn.s.barrier()
  br label %no
no:
  %r = add i32 %lane, 0
"""


def test_a_barrier_that_half_the_lanes_reach_is_a_deadlock():
    with pytest.raises(RuntimeError, match="deadlock, some lanes wait where others never come"):
        _run(HALF_WAITS)


def test_an_unknown_intrinsic_is_named():
    from kernelcheck.simt.lowering import UnsupportedKernel

    with pytest.raises(UnsupportedKernel, match=r"llvm\.amdgcn\.unheard\.of"):
        _run("  %r = call i32 @llvm.amdgcn.unheard.of()")


def test_an_unknown_dpp_control_is_an_error():
    with pytest.raises(RuntimeError, match="unknown DPP control"):
        _dpp(0x130)


def test_an_access_the_check_does_not_know_is_refused():
    from kernelcheck.simt.lowering import UnsupportedKernel

    body = "  call void @llvm.memset.p1.i64(ptr addrspace(1) %out, i8 0, i64 8, i1 false)\n  %r = add i32 %lane, 0"
    with pytest.raises(UnsupportedKernel, match="bounds check does not know"):
        _run(body)
