"""A handful of the mutations, one a kind, so that each change sees that planted faults are still noticed.

All of them: `python tests/mutate_kernels.py`, about half an hour of one core (CONTRIBUTING.md).
"""

import mutate_kernels
import pytest
from mutate_kernels import ALL, NOT_RUN, NOTICED, ROOT, SURVIVED, TIMED_OUT, main, try_mutation
from mutations import Mutation

# A mask, a rescale, a 32-bit offset, a lost tile, a wrong strip, a choice, a mean, a batch: the quick ones of each.
HANDFUL = {
    "target left in the sum": "test_no_access_leaves_its_tensor",
    "missing rescale of the running sum": "test_one_program_sweeps_many_tiles",
    "int32 offset of the weight": "test_weight_rows_beyond_int32",
    "last strip dropped": "test_no_access_leaves_its_tensor",
    "strip: targets of the first strip": "test_no_access_leaves_its_tensor",
    "tuning: the slower one": "test_the_fastest_tile",
    "metrics: means over all pairs": "test_metrics_are_means_over_the_pairs_with_two_answers",
    "shared: a token that differs": "test_prompts_that_differ_share_what_comes_before",
}


def test_each_mutation_fits_the_code_and_changes_it():
    faults = [(m.file, m.fault) for m in ALL]
    assert len(set(faults)) == len(faults)
    for mutation in ALL:
        text = (ROOT / mutation.file).read_text()
        assert mutation.apply(text) != text, mutation.fault
        if mutation.test:
            file, name = mutation.test.split("::")
            assert f"def {name}(" in (ROOT / file).read_text(), mutation.test


@pytest.mark.slow
@pytest.mark.kernels(modes=("interpret",))
@pytest.mark.parametrize("fault", HANDFUL)
def test_a_planted_fault_is_noticed(fault):
    mutation = next(m for m in ALL if m.fault == fault)
    status, words = try_mutation(mutation)
    assert status == NOTICED and HANDFUL[fault] in words


@pytest.mark.slow
def test_only_a_test_that_fails_has_noticed_a_fault(tmp_path, monkeypatch, capsys):
    """A check that does not end, or cannot start, has not, and the command says so and fails."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_loop.py").write_text("def test_loop():\n    n = 3\n    while n > 0:\n        n -= 1\n")
    edits = {
        TIMED_OUT: ("n -= 1", "n -= 0"),
        NOTICED: ("n -= 1", "assert n > 1; n -= 1"),
        SURVIVED: ("n = 3", "n = 2"),
        NOT_RUN: ("n = 3", "n = "),
    }
    where = {"file": "tests/test_loop.py", "test": "tests/test_loop.py::test_loop"}
    mutations = [Mutation(f"to be {status}", old=old, new=new, **where) for status, (old, new) in edits.items()]
    monkeypatch.setattr(mutate_kernels, "ROOT", tmp_path)
    monkeypatch.setattr(mutate_kernels, "ALL", mutations)
    for status in edits:
        # A busy machine may need longer than that to start the others.
        monkeypatch.setattr(mutate_kernels, "SECONDS", 3 if status == TIMED_OUT else 300)
        monkeypatch.setattr("sys.argv", ["mutate_kernels.py", "--only", status])
        assert main() == (0 if status == NOTICED else 1)
        printed = capsys.readouterr().out
        assert f"tests/test_loop.py: to be {status}: {status}: " in printed
        assert (f"  {status}: tests/test_loop.py: to be" in printed) == (status != NOTICED)
