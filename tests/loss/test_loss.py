"""The public loss as its user calls it: against TRL's and Liger's definitions."""

import math
from contextlib import nullcontext

import pytest
import torch
from orpo_kernels.rows import Rows
from problems import make_problem, relative_error
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from orpo import FusedLinearORPOLoss, odds_ratio_loss, orpo_loss, orpo_loss_from_rows, token_logprobs

BUDGETS = pytest.mark.parametrize("budget", [0, 2**20], ids=["strips", "bins"])


def trl_loss(logits, input_ids, attention_mask, labels, beta):
    """TRL 1.16's ORPO loss, written out: NLL over prompt and chosen answer, log1mexp odds."""
    P = logits.shape[0] // 2
    nll_labels = torch.where(attention_mask.bool(), input_ids, -100)[:P, 1:]
    nll = torch.nn.functional.cross_entropy(logits[:P, :-1].flatten(0, 1), nll_labels.flatten())
    logp = torch.log_softmax(logits[:, :-1], -1)
    mask = labels[:, 1:] != -100
    picked = logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    a = (picked * mask).sum(1) / mask.sum(1)
    r = (a[:P] - a[P:]) - (torch.log1p(-a[:P].exp()) - torch.log1p(-a[P:].exp()))
    return nll - beta * torch.nn.functional.logsigmoid(r).mean(), a


def tiny_model():
    """A real Llama with random weights, tied as small models are."""
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[train]'")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def test_replaces_trls_loss_on_a_real_models_hidden_states():
    model = tiny_model()
    g = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 300, (6, 20), generator=g)
    attention_mask = torch.ones_like(input_ids)
    labels = input_ids.clone()
    for s in range(6):
        attention_mask[s, 20 - s :] = 0
        labels[s, : 3 + s] = -100
        labels[s, 20 - s :] = -100
    ours = orpo_loss(
        model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state,
        model.lm_head.weight,
        labels,
        nll_labels=torch.where(attention_mask.bool(), input_ids, -100),
        beta=0.1,
    )
    ours.loss.backward()
    ours_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    theirs, a = trl_loss(
        model(input_ids=input_ids, attention_mask=attention_mask).logits, input_ids, attention_mask, labels, 0.1
    )
    theirs.backward()
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([ours.chosen_logps, ours.rejected_logps]), a, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        assert relative_error(ours_grads[name], parameter.grad) < 1e-5, name


def test_metrics_are_trls():
    problem = make_problem(bias=True, scale=0.8)
    metrics = orpo_loss(problem.hidden, problem.weight, problem.labels, **problem.keywords).metrics()
    truth, *_ = problem.truth()
    a_w, a_l = truth.mean_logp_S[:3], truth.mean_logp_S[3:]
    expected = {
        "rewards/chosen": problem.beta * a_w.mean(),
        "rewards/rejected": problem.beta * a_l.mean(),
        "rewards/accuracies": (a_w > a_l).double().mean(),
        "rewards/margins": problem.beta * (a_w - a_l).mean(),
        "logps/chosen": a_w.mean(),
        "logps/rejected": a_l.mean(),
        "nll_loss": truth.nll_loss,
        "log_odds_ratio": torch.nn.functional.logsigmoid(truth.log_odds_P).mean(),
        "log_odds_chosen": truth.log_odds_P.mean(),
    }
    rows = problem.rows
    x = problem.hidden.double().reshape(-1, 24)[rows.rows_N]
    logits = problem.scale * (x @ problem.weight.double().T + problem.bias.double())
    expected["logits/chosen"] = logits[rows.sequence_N < 3].mean()
    expected["logits/rejected"] = logits[rows.sequence_N >= 3].mean()
    assert set(metrics) == set(expected) and len(metrics) == 11
    for name, value in metrics.items():
        assert value.shape == () and not value.requires_grad
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6, msg=name)


def test_accuracy_without_an_odds_ratio_is_that_of_the_log_probabilities():
    """beta 0 is plain fine-tuning: all rewards are 0, and the model still prefers one answer or the other."""
    problem = make_problem()
    metrics = orpo_loss(problem.hidden, problem.weight, problem.labels, **{**problem.keywords, "beta": 0.0}).metrics()
    truth, *_ = problem.truth()
    expected = (truth.mean_logp_S[:3] > truth.mean_logp_S[3:]).double().mean()
    assert expected > 0 and metrics["rewards/accuracies"].item() == pytest.approx(expected.item())


def test_metrics_are_means_over_the_pairs_with_two_answers():
    problem = make_problem(P=5, bias=True)
    # The second pair has no chosen answer, the fourth no rejected one, the fifth neither.
    for sequence in (1, 4, 8, 9):
        problem.labels[sequence] = -100
    metrics = orpo_loss(problem.hidden, problem.weight, problem.labels, **problem.keywords).metrics(logits=False)
    logits = problem.hidden.double() @ problem.weight.double().T + problem.bias.double()
    logp = logits.log_softmax(-1)[:, :-1].gather(-1, problem.labels[:, 1:, None].clamp(min=0))[..., 0]
    a_w, a_l = (
        torch.stack([logp[s][problem.labels[s, 1:] != -100].mean() for s in sequences])
        for sequences in ((0, 2), (5, 7))
    )
    r = (a_w - a_l) - (torch.log1p(-a_w.exp()) - torch.log1p(-a_l.exp()))
    expected = {
        "rewards/chosen": problem.beta * a_w.mean(),
        "rewards/rejected": problem.beta * a_l.mean(),
        "rewards/accuracies": (a_w > a_l).double().mean(),
        "rewards/margins": problem.beta * (a_w - a_l).mean(),
        "logps/chosen": a_w.mean(),
        "logps/rejected": a_l.mean(),
        "log_odds_ratio": torch.nn.functional.logsigmoid(r).mean(),
        "log_odds_chosen": r.mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)


def test_answers_that_are_as_likely_are_no_success():
    problem = make_problem(P=3)
    out = orpo_loss(problem.hidden, problem.weight, problem.labels, **problem.keywords)
    out.chosen_logps, out.rejected_logps = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -3.0, -0.5])
    assert out.metrics()["rewards/accuracies"].item() == pytest.approx(1 / 3)


@BUDGETS
def test_accumulation_with_counts_equals_the_large_batch(budget):
    problem = make_problem(P=4).requiring_grad()
    out = orpo_loss(problem.hidden, problem.weight, problem.labels, logits_budget=budget, **problem.keywords)
    out.loss.backward()
    whole = problem.hidden.grad.clone(), problem.weight.grad.clone()
    problem.requiring_grad()
    tokens = int((problem.nll_labels[:4, 1:] != -100).sum())
    total = 0.0
    for pairs in ([0], [1, 2, 3]):
        index = torch.tensor(pairs + [4 + p for p in pairs])
        part = orpo_loss(
            problem.hidden[index],
            problem.weight,
            problem.labels[index],
            logits_budget=budget,
            num_nll_tokens=tokens,
            num_pairs=4,
            **(problem.keywords | {"nll_labels": problem.nll_labels[index]}),
        )
        part.loss.backward()
        total += part.loss.item()
    assert total == pytest.approx(out.loss.item(), rel=1e-6)
    assert relative_error(problem.hidden.grad, whole[0]) < 1e-6 and relative_error(problem.weight.grad, whole[1]) < 1e-6


def test_only_the_loss_is_differentiable():
    problem = make_problem().requiring_grad()
    out = orpo_loss(problem.hidden, problem.weight, problem.labels, **problem.keywords)
    for part in (out.nll_loss, out.odds_ratio_loss, out.chosen_logps, out.rejected_logps, out.log_odds):
        with pytest.raises(RuntimeError, match="does not require grad"):
            part.sum().backward()


@pytest.mark.parametrize("dynamic", [None, True], ids=["", "sizes are symbols"])
def test_compiles_as_one_graph(dynamic):
    problem = make_problem().requiring_grad()

    def step(hidden, weight, labels):
        return orpo_loss(2 * hidden, weight, labels, beta=0.3, nll_labels=problem.nll_labels).loss * 1.5

    eager = step(problem.hidden, problem.weight, problem.labels)
    eager.backward()
    grads = problem.hidden.grad.clone(), problem.weight.grad.clone()
    problem.requiring_grad()
    compile_options = dict(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    compiled = torch.compile(step, **compile_options)(problem.hidden, problem.weight, problem.labels)
    compiled.backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close((problem.hidden.grad, problem.weight.grad), grads)


@pytest.mark.parametrize("from_rows", [False, True], ids=["labels", "rows"])
def test_numbers_and_counts_are_no_new_graphs(from_rows):
    """A dozen denominators, weights and numbers of rows: one graph, and one in which they are symbols."""
    problem = make_problem().requiring_grad()
    counter, rows = CompileCounterWithBackend("aot_eager"), problem.rows

    def step(hidden, arrays, settings):
        if from_rows:
            return orpo_loss_from_rows(hidden, problem.weight, Rows(*arrays, pairs=3), **settings).loss
        return orpo_loss(hidden, problem.weight, problem.labels, **settings).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for k in range(12):
        settings = dict(beta=0.1 + k, num_nll_tokens=10 + k, num_pairs=3.0 + k, logit_scale=1 + k / 10)
        arrays = [t[: len(t) - k] for t in rows.arrays]
        loss = compiled(problem.hidden, arrays, settings)
        loss.backward()
        torch.testing.assert_close(loss, step(problem.hidden, arrays, settings))
    assert counter.frame_count <= 2


def test_in_a_graph_padding_may_hold_anything():
    """Where rows cannot be counted, those of padding are computed and must not reach a gradient."""
    problem = make_problem(prompt_in_nll=False).requiring_grad()
    with torch.no_grad():
        problem.hidden[:, -1] = torch.nan  # predicts nothing

    def step(hidden, weight, labels):
        return orpo_loss(hidden, weight, labels, beta=0.3).loss

    grads = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        problem.requiring_grad()
        run(problem.hidden, problem.weight, problem.labels).backward()
        grads.append((problem.hidden.grad, problem.weight.grad))
    assert grads[0][0].isfinite().all()
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sizes_without_numbers(device):
    """Estimates of memory run a step on tensors that have no data."""
    with torch.device(device), FakeTensorMode() if device == "cpu" else nullcontext():
        hidden, weight = (torch.empty(*shape, requires_grad=True) for shape in ((4, 9, 8), (31, 8)))
        out = orpo_loss(hidden, weight, torch.empty(4, 9, dtype=torch.int64))
        out.loss.backward()
    assert out.loss.shape == () and out.chosen_logps.shape == (2,)
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


def test_seed_data_set_trains():
    # Pairs of unequal lengths, one prompt several times, an answer that contains another: the classic example.
    pairs = [("hello", "hi nice to meet you", "leave me alone"), ("how are you", "I am fine", "I am not fine")]
    pairs += [("What is your name?", "My name is Mary", r) for r in ("Whats it to you?", "I dont have a name")]
    best = "Which is the best programming language?"
    pairs += [(best, "Python", "Javascript"), (best, "Python", "C++"), (best, "Java", "C++")]
    texts = [(p, a) for p, a, _ in pairs] + [(p, r) for p, _, r in pairs]
    T = max(len(p) + len(a) for p, a in texts)
    input_ids, labels = torch.zeros(14, T, dtype=torch.int64), torch.full((14, T), -100)
    for s, (prompt, answer) in enumerate(texts):
        ids = torch.tensor(list((prompt + answer).encode()))
        input_ids[s, : len(ids)] = ids
        labels[s, len(prompt) : len(ids)] = ids[len(prompt) :]
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(256, 32)
    model = torch.nn.GRU(32, 32, batch_first=True)
    optimizer = torch.optim.Adam([*embedding.parameters(), *model.parameters()], lr=0.02)
    losses = []
    for _ in range(40):
        out = orpo_loss(model(embedding(input_ids))[0], embedding.weight, labels, beta=0.1)
        losses.append(out.loss.item())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0] and all(map(math.isfinite, losses))
    assert out.metrics()["rewards/margins"] > 0


def test_odds_ratio_loss_is_trls_five():
    a_w, a_l = torch.tensor([-0.5, -2.0]), torch.tensor([-1.0, -0.1])
    losses, chosen, rejected, ratio, odds = odds_ratio_loss(a_w, a_l, beta=0.2)
    r = (a_w - a_l) - (torch.log1p(-a_w.exp()) - torch.log1p(-a_l.exp()))
    torch.testing.assert_close(losses, 0.2 * torch.nn.functional.logsigmoid(r))
    torch.testing.assert_close((chosen, rejected), (0.2 * a_w, 0.2 * a_l))
    torch.testing.assert_close((ratio, odds), (torch.nn.functional.logsigmoid(r).mean(), r.mean()))
    certain = torch.zeros(2, requires_grad=True)
    odds_ratio_loss(certain, certain.detach())[0].sum().backward()
    assert torch.isfinite(certain.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_odds_ratio_loss_of_certain_answers_in_a_narrow_dtype(dtype):
    """float16 has no number as small as what 1 - exp(a) is kept above."""
    means = torch.tensor([[0.0, -0.5, 0.0, -0.01], [-1.0, 0.0, 0.0, -0.02]], dtype=dtype, requires_grad=True)
    exact = means.detach().double().requires_grad_()
    found, expected = odds_ratio_loss(*means), odds_ratio_loss(*exact)
    found[0].sum().backward()
    expected[0].sum().backward()
    # Rounded once, from float32.
    for ours, truth in zip((*found, means.grad), (*expected, exact.grad), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), truth, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=1e-5)


@pytest.mark.parametrize("compute_nll_loss", [True, False])
def test_ligers_call_shape(compute_nll_loss):
    problem = make_problem(P=2, bias=True)
    target = torch.nn.functional.pad(problem.labels[:, 1:], (0, 1), value=-100)
    loss_fn = FusedLinearORPOLoss(beta=0.3, compute_nll_loss=compute_nll_loss, compiled=False, chunk_size=2)
    loss, parts = loss_fn(problem.weight, problem.hidden, target, problem.bias)
    out = orpo_loss(
        problem.hidden,
        problem.weight,
        problem.labels,
        lm_head_bias=problem.bias,
        beta=0.3,
        nll_weight=float(compute_nll_loss),
    )
    assert loss == out.loss and len(parts) == 9
    logits = problem.hidden @ problem.weight.T + problem.bias
    torch.testing.assert_close(parts[2:4], (logits[:2].mean(), logits[2:].mean()), rtol=1e-4, atol=1e-5)
    assert parts[4] == (out.nll_loss if compute_nll_loss else 0)
    assert torch.equal(parts[0], out.chosen_logps) and torch.equal(parts[6], 0.3 * out.rejected_logps)


def test_token_logprobs_is_log_softmax():
    problem = make_problem(bias=True, softcap=5.0).requiring_grad()
    rows = problem.rows
    for hidden_grad, weight_grad in ((True, True), (True, False), (False, True)):
        problem.requiring_grad(hidden_grad, weight_grad, weight_grad)
        x = problem.hidden.reshape(-1, 24)[rows.rows_N]
        logp = token_logprobs(
            x, problem.weight, rows.targets_N.int(), bias=problem.bias, logit_softcap=5.0, strip_bytes=8192
        )
        inputs = [t for t in (problem.hidden, problem.weight, problem.bias) if t.requires_grad]
        upstream = torch.randn(logp.shape, generator=torch.Generator().manual_seed(2))
        grads = torch.autograd.grad(logp, inputs, upstream, retain_graph=True)
        z = 5.0 * torch.tanh((x @ problem.weight.T + problem.bias) / 5.0)
        exact = torch.log_softmax(z, -1).gather(-1, rows.targets_N[:, None])[:, 0]
        torch.testing.assert_close(logp, exact, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(grads, torch.autograd.grad(exact, inputs, upstream), strict=True):
            assert relative_error(ours, theirs) < 1e-5
