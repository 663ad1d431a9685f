"""orpo_kernels.slices: sequences cut over ranks have the loss and the gradients of whole ones."""

import pytest
import torch
from problems import make_problem, relative_error
from run_forked import returned
from run_slices import CUTS, checked_operator, compiled, make, positions, refusals, run_cases, run_grid, train

from orpo import orpo_loss

F64, BF16, F16 = torch.float64, torch.bfloat16, torch.float16
TOLERANCE = {F64: 1e-12, torch.float32: 1e-6, BF16: 6e-3, F16: 6e-4}
TRAINED, FROZEN, STRIP = (True, True, True), (True, False, False), {"strip_bytes": 8192}
FULL, CAPPED = {"bias": True, "scale": 0.7, "prompt_in_nll": False}, {"bias": True, "softcap": 4.0}
# Arguments of `make`, the cut, which gradients, settings.
CASES = {f"float64, {name}": ({**CAPPED, "dtype": F64}, name, TRAINED, STRIP) for name in CUTS}
CASES |= {
    "float64, a frozen head": ({**CAPPED, "dtype": F64}, "zigzag", FROZEN, STRIP),
    "float64, a sequence without a response": ({**FULL, "dtype": F64, "lacks": (1, 3)}, "zigzag", TRAINED, STRIP),
    "float64, no response at all": ({"dtype": F64, "lacks": range(6)}, "zigzag", (True, True, False), STRIP),
    "float64, of rows": ({**FULL, "dtype": F64}, "in any order", TRAINED, {**STRIP, "from_rows": True}),
    "float64, means over more": (
        {**FULL, "dtype": F64},
        "unequal",
        TRAINED,
        {"num_nll_tokens": 90, "num_pairs": 7, "nll_weight": 0.6},
    ),
    "plain": ({}, "zigzag", (True, True, False), STRIP),
    "bias and scale": (FULL, "unequal", TRAINED, STRIP),
    "a budget": (CAPPED, "zigzag", TRAINED, {"logits_budget": 2**20}),
    "no budget": (CAPPED, "nothing on the first", TRAINED, {"logits_budget": 0}),
    "frozen head, a budget": (FULL, "nothing on the last", FROZEN, {"logits_budget": 2**20}),
    "frozen hidden states": (FULL, "unequal", (False, True, True), STRIP),
    "bias alone": (FULL, "unequal", (False, False, True), STRIP),
    "no gradient": (FULL, "nothing on the last", (False, False, False), STRIP),
    "bfloat16": ({**FULL, "dtype": BF16}, "unequal", TRAINED, STRIP),
    "bfloat16 widened": ({**FULL, "dtype": BF16}, "zigzag", TRAINED, {**STRIP, "multiplies": False}),
    "bfloat16, frozen head": ({**CAPPED, "dtype": BF16}, "nothing on the first", FROZEN, STRIP),
    "float16": ({**FULL, "dtype": F16}, "zigzag", TRAINED, STRIP),
}
TRITON = {
    "strips": (CAPPED, "zigzag", TRAINED, {**STRIP, "logits_budget": 0}),
    "kept": (CAPPED, "unequal", TRAINED, {}),
    "some kept": ({"V": 1203}, "in any order", (True, True, False), {**STRIP, "logits_budget": 60_000}),
    "nothing on the last": (CAPPED, "nothing on the last", TRAINED, {}),
    "nothing on the first": (FULL, "nothing on the first", TRAINED, {}),
    "frozen head": (FULL, "zigzag", FROZEN, {}),
    "frozen head, no budget": (FULL, "nothing on the last", FROZEN, {**STRIP, "logits_budget": 0}),
    "a sequence without a response": ({**FULL, "lacks": (1, 3)}, "unequal", TRAINED, {}),
    "of rows": (FULL, "in any order", TRAINED, {"from_rows": True}),
    "float16": ({**FULL, "dtype": F16}, "unequal", TRAINED, STRIP),
    "no gradient": ({}, "zigzag", (False, False, False), {}),
}
TRITON = {name: (*case, settings | {"backend": "triton"}) for name, (*case, settings) in TRITON.items()}
SAME = ("loss", "nll_loss", "mean_logps", "log_odds", "pair_mask")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of some ranks got in each case, in one launch a set."""
    launched = {}

    def of(function, ranks, cases, name):
        key = function, ranks, id(cases)
        if key not in launched:
            folder = tmp_path_factory.mktemp("ranks")
            launched[key] = returned(function, ranks, folder, list(cases.values()), limit=500)
        place = list(cases).index(name)
        return [one[place] if function is run_cases else (*one[:2], one[2][place]) for one in launched[key]]

    return of


def one_process(given, needs, settings):
    """(output, gradients) of the whole problem in float64, of the same rounded numbers, its labels not shifted."""
    problem = make(given)
    for key in ("hidden", "weight", "bias"):
        t = getattr(problem, key)
        setattr(problem, key, None if t is None else t.double())
    problem.requiring_grad(*needs)
    settings = {k: v for k, v in settings.items() if k not in ("backend", "multiplies", "from_rows")}
    out = orpo_loss(problem.hidden, problem.weight, problem.labels, **problem.keywords, **settings)
    if any(needs):
        (0.5 * out.loss).backward()
    tensors = problem.hidden, problem.weight, problem.bias
    return out, [t.grad if wanted and t is not None else None for t, wanted in zip(tensors, needs, strict=True)]


def check(several, given, name, needs, settings):
    """Every rank has the whole sequences' loss and metrics, the same bits on all, and its part of the gradients."""
    exact_out, exact_grads = one_process(given, needs, settings)
    tolerance = TOLERANCE[given.get("dtype", torch.float32)]
    metrics = exact_out.metrics()
    for mine in several:
        assert mine["loss"] == mine["evaluated"]
        assert all(torch.equal(mine[key], several[0][key]) for key in SAME)
        assert relative_error(mine["loss"], exact_out.loss) < min(1e-5, tolerance)
        assert relative_error(mine["nll_loss"], exact_out.nll_loss) < min(1e-5, tolerance)
        logps = torch.cat([exact_out.chosen_logps, exact_out.rejected_logps])
        assert relative_error(mine["mean_logps"], logps) < min(1e-5, tolerance)
        assert relative_error(mine["log_odds"], exact_out.log_odds) < min(1e-4, 10 * tolerance)
        assert torch.equal(mine["pair_mask"], exact_out.pair_mask)
        assert mine["metrics"].keys() == metrics.keys()
        for key, value in metrics.items():
            assert torch.equal(mine["metrics"][key], several[0]["metrics"][key]), key
            assert mine["metrics"][key].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5), key
            if tolerance == TOLERANCE[F64]:
                assert mine["metrics"][key].item() == pytest.approx(value.item(), rel=1e-12, abs=1e-15), key
    if not any(needs):
        return
    parts, hidden = [mine["grads"] for mine in several], None
    if needs[0]:
        hidden = torch.zeros_like(exact_grads[0])
        for mine, part in zip(positions(name, hidden.shape[1], len(several)), parts, strict=True):
            hidden[:, mine] = part[0].double()
    # The ranks' parts of the head's add up.
    head = [
        None if all_[0] is None else torch.stack(all_).double().sum(0) for all_ in list(zip(*parts, strict=True))[1:]
    ]
    for gradient, wanted in zip((hidden, *head), exact_grads, strict=True):
        assert (gradient is None) == (wanted is None)
        if wanted is not None:
            assert relative_error(gradient, wanted) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(name, found):
    check(found(run_cases, 2, CASES, name), *CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_three_ranks_equal_one(name, found):
    check(found(run_cases, 3, CASES, name), *CASES[name])


@pytest.mark.kernels(modes=("interpret",))
@pytest.mark.parametrize("name", TRITON)
def test_two_ranks_of_triton_equal_one(name, found):
    check(found(run_cases, 2, TRITON, name), *TRITON[name])


GRID = {
    name: CASES[name] for name in ("float64, zigzag", "float64, nothing on the last", "float64, a frozen head", "plain")
}
TRITON_GRID = {name: TRITON[name] for name in ("kept", "nothing on the first", "frozen head")}


def check_grid(grid, given, name, needs, settings):
    """Ranks of one slice have parts of the head, which joined are what a rank with the whole head would have."""
    joined = []
    for cp in range(2):
        first, second = (found for place in range(2) for c, t, found in grid if (c, t) == (cp, place))
        assert all(torch.equal(first[key], second[key]) for key in SAME)
        assert all(torch.equal(first["metrics"][key], second["metrics"][key]) for key in first["metrics"])
        hidden, *head = zip(first["grads"], second["grads"], strict=True)
        assert torch.equal(*hidden)
        joined.append(first | {"grads": [hidden[0], *(None if a is None else torch.cat([a, b]) for a, b in head)]})
    check(joined, given, name, needs, settings)


@pytest.mark.parametrize("name", GRID)
def test_slices_beside_a_head_that_is_cut_too(name, found):
    check_grid(found(run_grid, 4, GRID, name), *GRID[name])


@pytest.mark.kernels(modes=("interpret",))
@pytest.mark.parametrize("name", TRITON_GRID)
def test_slices_beside_a_head_that_is_cut_too_with_triton(name, found):
    check_grid(found(run_grid, 4, TRITON_GRID, name), *TRITON_GRID[name])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CUTS)
def test_each_position_is_on_one_rank(name, ranks):
    of_ranks = positions(name, 17, ranks)
    assert len(of_ranks) == ranks and torch.cat(of_ranks).sort()[0].tolist() == list(range(17))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.kernels(modes=("interpret",)))])
def test_wrong_calls_are_refused_on_all_ranks(backend, tmp_path):
    exact = make_problem().truth()[0].loss.item()
    several = returned(refusals, 2, tmp_path, backend)
    for said, value in several:
        assert said["shifted"].startswith("shift is True, and with cp_group") and "shift=False" in said["shifted"]
        assert said["mesh"].endswith("got DeviceMesh") and "cp_group" in said["mesh"] and "get_group()" in said["mesh"]
        assert said["fewer"].startswith("the ranks of cp_group have different numbers of pairs")
        assert said["both"].startswith("cp_group has the ranks [0, 1] and tp_group [0, 1]")
        assert value == pytest.approx(exact, rel=1e-6)
    (first, _), (second, _) = several
    assert first["beyond"] == "another rank of cp_group refuses its rows, and says why"
    assert second["beyond"] == "labels holds the token 203, but lm_head_weight has 203 rows"


def test_a_graph_of_torch_compile_has_the_group_too(tmp_path):
    for cuts in returned(compiled, 2, tmp_path, ["zigzag", "nothing that counts on the last"]):
        for eager, graph in cuts:
            for a, b in zip(eager, graph, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_operator_passes_opcheck_in_a_group(tmp_path):
    exact = make_problem(bias=True).truth()[0].loss.item()
    assert returned(checked_operator, 2, tmp_path) == [pytest.approx(exact, rel=1e-6)] * 2


def test_a_loop_with_fsdp_over_pairs_and_slices_trains_as_one(tmp_path):
    ((seen, weights),) = returned(train, 1, tmp_path / "one", 1)
    for mine, whole in returned(train, 4, tmp_path / "four", 4):
        assert mine == pytest.approx(seen, rel=1e-5)
        for key, weight in weights.items():
            torch.testing.assert_close(whole[key], weight, rtol=1e-4, atol=1e-5)
