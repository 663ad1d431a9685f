"""orpo_kernels.shard and orpo.loss.own_part: a head cut over ranks has the loss and the gradients of a whole one."""

import itertools

import pytest
import torch
from problems import make_problem, relative_error
from run_forked import returned
from run_mesh import train as train_on_a_mesh
from run_shards import compiled, cut, dtensors, loss, refusals, results, run_cases, run_odd, train_alone, train_by_plan
from tiny import make_model

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# As tests/kernel/test_fused.py has them for one process.
TOLERANCE = {F64: 1e-12, F32: 1e-6, BF16: 6e-3, F16: 6e-4}
TRAINED, STRIP = (True, True, True), {"strip_bytes": 8192}
PLAIN, FULL, CAPPED = {}, {"bias": True, "scale": 0.7, "prompt_in_nll": False}, {"bias": True, "softcap": 4.0}
CASES = {
    "float64": ({**CAPPED, "dtype": F64}, TRAINED, STRIP),
    "plain": (PLAIN, (True, True, False), STRIP),
    "bias and scale": (FULL, TRAINED, STRIP),
    "softcap": (CAPPED, TRAINED, STRIP),
    "a budget": (CAPPED, TRAINED, {"logits_budget": 2**20}),
    "no budget": (CAPPED, TRAINED, {"logits_budget": 0}),
    "one strip": (FULL, TRAINED, {}),
    "frozen head": (CAPPED, (True, False, False), STRIP),
    "frozen head, a budget": (FULL, (True, False, False), {"logits_budget": 2**20}),
    "frozen hidden states": (FULL, (False, True, True), STRIP),
    "bias alone": (FULL, (False, False, True), STRIP),
    "no gradient": (FULL, (False, False, False), STRIP),
    "bfloat16": ({**FULL, "dtype": BF16}, TRAINED, STRIP),
    "bfloat16 widened": ({**FULL, "dtype": BF16}, TRAINED, {**STRIP, "multiplies": False}),
    "bfloat16, softcap": ({**CAPPED, "dtype": BF16}, TRAINED, STRIP),
    "bfloat16, frozen head": ({**CAPPED, "dtype": BF16}, (True, False, False), STRIP),
    "float16": ({**FULL, "dtype": F16}, TRAINED, STRIP),
}
TRITON = {
    "strips": (CAPPED, TRAINED, {**STRIP, "logits_budget": 0}),
    "kept": (CAPPED, TRAINED, {}),
    "some kept": ({**PLAIN, "V": 1203}, (True, True, False), {**STRIP, "logits_budget": 60_000}),
    "frozen head, kept": (FULL, (True, False, False), {}),
    "frozen head": (FULL, (True, False, False), {**STRIP, "logits_budget": 0}),
    "float16": ({**FULL, "dtype": F16}, TRAINED, STRIP),
    "no gradient": (PLAIN, (False, False, False), {}),
}
TRITON = {name: (given, needs, settings | {"backend": "triton"}) for name, (given, needs, settings) in TRITON.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of some ranks got in each case, in one launch a set."""
    launched = {}

    def of(ranks, cases, name):
        key = ranks, id(cases)
        if key not in launched:
            several = returned(run_cases, ranks, tmp_path_factory.mktemp("ranks"), list(cases.values()), limit=400)
            launched[key] = [dict(zip(cases, one, strict=True)) for one in several]
        return [one[name] for one in launched[key]]

    return of


def check(several, given, needs, settings):
    """Every rank has the loss of the whole head to rounding, and all ranks the same bits of what all have."""
    problem = make_problem(**given)
    truth, *exact = problem.truth()
    tolerance = TOLERANCE[problem.hidden.dtype]
    one = results(make_problem(**given), needs, {**settings, "backend": "torch"})
    for mine in several:
        assert mine["loss"] == mine["evaluated"] == several[0]["loss"]
        assert relative_error(mine["loss"], truth.loss) < min(1e-5, tolerance)
        assert relative_error(mine["mean_logps"], truth.mean_logp_S) < min(1e-5, tolerance)
        assert relative_error(mine["log_odds"], truth.log_odds_P) < min(1e-4, 10 * tolerance)
        assert torch.equal(mine["logps"], several[0]["logps"])
        torch.testing.assert_close(mine["logps"], one["logps"], rtol=1e-5, atol=1e-5)
        assert mine["metrics"].keys() == one["metrics"].keys()
        for name, value in one["metrics"].items():
            assert mine["metrics"][name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    if not any(needs):
        return
    for key, exact_grads in (("grads", exact), ("token_grads", one["token_grads"])):
        parts = [mine[key] for mine in several]
        factor = 0.5 if key == "grads" else 1.0
        # Each rank's own rows of weight and bias; the hidden states' whole, and the same.
        joined = [parts[0][0], *(None if p[0] is None else torch.cat(p) for p in list(zip(*parts, strict=True))[1:])]
        for gradient, wanted, whole in zip(joined, needs, exact_grads, strict=True):
            assert (gradient is not None) == wanted
            if wanted:
                assert relative_error(gradient, factor * whole) < 2 * tolerance
        if needs[0]:
            assert all(torch.equal(part[0], parts[0][0]) for part in parts)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(name, found):
    check(found(2, CASES, name), *CASES[name])


@pytest.mark.parametrize("name", ["softcap", "bfloat16"])
def test_three_ranks_equal_one(name, found):
    """A third part that holds neither end."""
    check(found(3, CASES, name), *CASES[name])


@pytest.mark.kernels(modes=("interpret",))
@pytest.mark.parametrize("name", TRITON)
def test_two_ranks_of_triton_equal_one(name, found):
    check(found(2, TRITON, name), *TRITON[name])


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.kernels(modes=("interpret",)))])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False)], ids=["trained head", "frozen head"])
def test_parts_without_a_finite_logit(backend, needs, tmp_path):
    (one,) = returned(run_odd, 1, tmp_path / "one", backend, needs, 1)
    *finite, broken = one
    assert broken["loss"].isnan() and all(alone["loss"].isfinite() for alone in finite)
    several = returned(run_odd, 2, tmp_path / "two", backend, needs, 2)
    for alone, *parts in zip(finite, *several, strict=False):
        for mine in parts:
            torch.testing.assert_close(mine["loss"], alone["loss"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(mine["logps"], alone["logps"], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mine["grads"][0], alone["grads"][0], rtol=1e-4, atol=1e-6)
        if needs[1]:
            joined = torch.cat([mine["grads"][1] for mine in parts])
            torch.testing.assert_close(joined, alone["grads"][1], rtol=1e-4, atol=1e-6)
    # The column is that of one rank, and all of them have to stop.
    assert all(mine[-1]["loss"].isnan() and mine[-1]["logps"].isnan().all() for mine in several)


def test_parts_are_unequal_and_hold_all_rows():
    for rows, ranks in itertools.product((203, 1203), (2, 3)):
        ends = cut(rows, ranks)
        assert ends[0] == 0 and ends[-1] == rows and len({b - a for a, b in itertools.pairwise(ends)}) > 1


def test_all_ranks_refuse_together(tmp_path):
    several = returned(refusals, 2, tmp_path)
    exact = make_problem().truth()[0].loss
    for beyond, fewer, other, empty, token, value in several:
        assert beyond == "labels holds the token 203, but lm_head_weight has 203 rows"
        assert fewer == other and "the ranks of tp_group have different rows" in other and "FSDP" in other
        assert empty == "a rank of tp_group has no rows of the head: the group has more ranks than rows"
        assert token == "targets holds the token 203, but weight has 203 rows"
        assert value == pytest.approx(exact.item(), rel=1e-6)


def test_a_head_as_dtensor_brings_its_group(tmp_path):
    problem = make_problem(bias=True)
    metrics = loss(problem).metrics()
    truth, dh, dw, db = problem.truth()
    for mine in returned(dtensors, 2, tmp_path):
        assert mine["loss"] == pytest.approx(truth.loss.item(), rel=1e-6) and mine["same"]
        assert mine["metrics"]["logits/chosen"] == pytest.approx(metrics["logits/chosen"].item(), rel=1e-4)
        shard, replicate = (True, "(Shard(dim=0),)"), (True, "(Replicate(),)")
        assert mine["placed"] == [shard, shard, replicate]
        for gradient, exact in zip(mine["grads"], (dw, db, dh), strict=True):
            assert relative_error(gradient, exact) < 1e-6
        said = mine["said"]
        for name in ("replicated", "by columns", "two dimensions"):
            assert "lm_head_weight is a DTensor placed as" in said[name] and "forward" in said[name], name
        assert "hidden is a DTensor placed as" in said["hidden cut"] and "redistribute" in said["hidden cut"]
        assert said["hidden alone"].startswith("hidden is a DTensor, but the head is not cut")
        assert "another mesh" in said["other group"]
        assert said["no group"].endswith("got DeviceMesh") and "get_group()" in said["no group"]


def test_a_graph_of_torch_compile_has_the_group_too(tmp_path):
    for eager, graph in returned(compiled, 2, tmp_path):
        for a, b in zip(eager, graph, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_cut_by_transformers_plan_trains_as_one(tied, tmp_path):
    name = str(tmp_path / "model")
    make_model("llama", tie_word_embeddings=tied, vocab_size=391).save_pretrained(name)
    ((seen, weights),) = returned(train_alone, 1, tmp_path / "one", name)
    for mine, whole, parts, said in returned(train_by_plan, 2, tmp_path / "two", name):
        for step, one_step in zip(mine, seen, strict=True):
            assert step == pytest.approx(one_step, rel=1e-5)
        # 391 rows cannot be halved.
        assert parts[0] < 391
        for key, weight in weights.items():
            torch.testing.assert_close(whole[key], weight, rtol=1e-4, atol=1e-6)
        trainer, lora = said
        assert "tp_size is 1, and the model given is cut in 2: give its name" in trainer
        assert "have a LoRA and are cut over ranks" in lora and "orpo_loss(tp_group=)" in lora


def test_a_loop_with_fsdp_and_tensor_parallel_trains_as_one(tmp_path):
    ((seen, weights, rows),) = returned(train_on_a_mesh, 1, tmp_path / "one", False)
    several = returned(train_on_a_mesh, 4, tmp_path / "four", True)
    # Of 61 rows each rank keeps a half of a half.
    assert rows == 61 and sum(part for *_, part in several) == 61
    for mine, whole, _ in several:
        for step, one_step in zip(mine, seen, strict=True):
            assert step == pytest.approx(one_step, rel=1e-5)
        for key, weight in weights.items():
            torch.testing.assert_close(whole[key], weight, rtol=1e-4, atol=1e-5)
