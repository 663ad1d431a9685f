"""The compile report sees matrix instructions, spills, kernels that do not fit or compile (tools/compile_report.py).

Each check runs in a process of its own: kernels compile only where TRITON_INTERPRET is not set.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PREAMBLE = """
import sys
sys.path[:0] = [{tests!r}, {tools!r}]
import torch, triton
from chips import CHIPS, resident_blocks
from compile_report import report
from kernelcheck.samples import add_kernel, matmul_kernel

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def matmul(chip, dtype=torch.bfloat16, blocks=(128, 128, 64), **options):
    a, b, c = empty(1024, 512, dtype=dtype), empty(512, 2048, dtype=dtype), empty(1024, 2048, dtype=torch.float32)
    names = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks))
    launch = lambda: matmul_kernel[(8, 16)](a, b, c, 1024, 2048, 512, 512, 2048, 2048, **names, **options)
    (row,) = report("case", launch, CHIPS[chip])
    return row
"""


def _run(script: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    preamble = PREAMBLE.format(tests=str(TESTS), tools=str(TESTS / "tools"))
    result = subprocess.run([sys.executable, "-c", preamble + script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_matrix_instructions_of_each_family():
    _run("""
expected = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCMMA", "sm_120": "HMMA", "gfx942": "MFMA", "gfx950": "MFMA"}
for chip, instruction in expected.items():
    row = matmul(chip, num_warps=8, num_stages=2, blocks=(128, 128, 32))
    assert row.resources.needs_matrix and set(row.resources.matrix) == {instruction}, (chip, row)
    assert row.problems == () and 0 < row.resources.registers <= 256 and row.resources.blocks >= 1, (chip, row)
    assert row.resources.copies and row.resources.shared > 0, (chip, row)
""")


def test_exact_float32_needs_no_matrix_instruction():
    _run("""
row = matmul("sm_90", dtype=torch.float32, blocks=(64, 64, 32), num_warps=4, num_stages=2)
assert not row.resources.needs_matrix and not row.resources.matrix and row.problems == (), row
""")


def test_what_must_not_be_shipped_is_said():
    _run("""
from dataclasses import replace
spilling = matmul("sm_80", blocks=(256, 256, 32), num_warps=4, num_stages=2)
assert "spills" in " ".join(spilling.problems), spilling
too_large = matmul("sm_90", blocks=(128, 256, 128), num_warps=8, num_stages=4)
assert "shared memory, sm_90 has 232448" in " ".join(too_large.problems), too_large
fits = matmul("sm_90", num_warps=8, num_stages=3)
no_matrix = replace(fits.resources, matrix={}).problems(CHIPS["sm_90"])
assert no_matrix == ["tl.dot without a matrix instruction"], no_matrix
broken = report("case", lambda: add_kernel[(1,)](empty(8), empty(8), empty(8), 8, BLOCK=7), CHIPS["sm_90"])
assert broken[0].resources is None and "power of 2" in broken[0].problems[0], broken
""")


def test_resident_blocks():
    _run("""
h100, mi300 = CHIPS["sm_90"], CHIPS["gfx942"]
assert resident_blocks(h100, warps=4, registers=32, shared=0) == 16          # 64 warps
assert resident_blocks(h100, warps=8, registers=255, shared=0) == 1          # 65536 registers
assert resident_blocks(h100, warps=4, registers=32, shared=100 * 1024) == 2  # 228 KiB
assert resident_blocks(h100, warps=16, registers=255, shared=0) == 0
assert resident_blocks(mi300, warps=4, registers=128, shared=16384) == 4     # 4 waves a SIMD; 64 KiB
assert resident_blocks(mi300, warps=8, registers=256, shared=0) == 1
""")


@pytest.mark.parametrize("fault", [False, True], ids=["sound", "faulty"])
def test_the_exit_status(fault):
    _run(f"""
import compile_report as module
from concurrent.futures import ThreadPoolExecutor
n = 7 if {fault} else 8
launches = [("one", lambda: add_kernel[(1,)](empty(64), empty(64), empty(64), 64, BLOCK=n))]
module.shipped_launches = lambda chip: iter(launches)
module.ProcessPoolExecutor = ThreadPoolExecutor
assert module.main(["--chips", "sm_90"]) == {int(fault)}
""")
