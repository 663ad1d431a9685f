"""A handful of the mutations, one a kind, so that each change sees that planted faults are still noticed.

All of them: `python tests/mutate_kernels.py`, about a quarter of an hour of one core (CONTRIBUTING.md).
"""

import pytest
from mutate_kernels import ROOT, try_mutation
from mutations import MUTATIONS

pytestmark = pytest.mark.kernels(modes=("interpret",))

# A mask, a rescale, a 32-bit offset, a lost tile, a wrong strip, a choice: the quick ones of each.
HANDFUL = {
    "target left in the sum": "test_no_access_leaves_its_tensor",
    "missing rescale of the running sum": "test_one_program_sweeps_many_tiles",
    "int32 offset of the weight": "test_weight_rows_beyond_int32",
    "last strip dropped": "test_no_access_leaves_its_tensor",
    "strip: targets of the first strip": "test_loss_and_gradients",
    "form: the slower one": "test_the_faster_form",
}


def test_each_mutation_fits_the_code_and_changes_it():
    faults = [(m.file, m.fault) for m in MUTATIONS]
    assert len(set(faults)) == len(faults)
    for mutation in MUTATIONS:
        text = (ROOT / mutation.file).read_text()
        assert mutation.apply(text) != text, mutation.fault


@pytest.mark.slow
@pytest.mark.parametrize("fault", HANDFUL)
def test_a_planted_fault_is_noticed(fault):
    mutation = next(m for m in MUTATIONS if m.fault == fault)
    assert HANDFUL[fault] in (try_mutation(mutation) or "SURVIVED")
