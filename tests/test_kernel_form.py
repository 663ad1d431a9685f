"""Both forms of stages 1 and 3 against the truth, and the choice between them with a clock that the test holds."""

import json
import logging
import weakref

import pytest
import torch
from orpo_kernels import form, matmul, tuning
from orpo_kernels.head import Head, Needs
from problems import make_problem, relative_error

from orpo import orpo_loss, token_logprobs

pytestmark = pytest.mark.kernels

FORMS = ("triton-fused", "triton-strip")
HEADS = {
    "plain": dict(),
    "full": dict(bias=True, softcap=20.0, scale=0.8),
}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """No choice of an earlier test, of the environment or of the user's cache."""
    monkeypatch.delenv(form.VARIABLE, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    tuning.forget()
    yield
    tuning.forget()


class Clock:
    """Runs each form once, notes it, and reports the time that the test has given it."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds, self.timed = milliseconds, []

    def __call__(self, name: str, *inputs) -> float:
        self.timed.append(name)
        return self.milliseconds[name]


@pytest.fixture
def clock(monkeypatch):
    """A function: from now on the machine has a clock, and the forms take these milliseconds."""

    def start(**milliseconds: float) -> Clock:
        found = Clock(**milliseconds)
        monkeypatch.setattr(tuning, "can_time", lambda device: True)
        monkeypatch.setattr(form, "_time", found)
        return found

    return start


def _choose(rows: int = 6, vocabulary: int = 40, **head) -> str:
    x = torch.zeros(rows, 16)
    return form.choose_form(x, torch.zeros(rows, dtype=torch.int64), Head(torch.zeros(vocabulary, 16), **head), 8192)


def _files(tmp_path) -> list:
    return list((tmp_path / "cache").rglob("*.json"))


def _run(problem, backend: str | None, **keywords):
    keywords = dict(logits_budget=0, strip_bytes=4096) | keywords
    return orpo_loss(problem.hidden, problem.weight, problem.labels, backend=backend, **keywords, **problem.keywords)


@pytest.mark.parametrize(
    ("dtype", "head"),
    [(torch.float32, "plain"), (torch.float32, "full"), (torch.float16, "full"), (torch.bfloat16, "full")],
    ids=["fp32-plain", "fp32-full", "fp16-full", "bf16-full"],
)
@pytest.mark.parametrize("backend", FORMS)
def test_loss_and_gradients(backend, dtype, head, kernel_device):
    # The last strip is narrower than the others.
    problem = make_problem(P=2, T=9, dtype=dtype, device=kernel_device, **HEADS[head]).requiring_grad()
    out = _run(problem, backend)
    out.loss.backward()
    truth, *gradients = problem.truth()
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative_error(out.loss, truth.loss) < 2e-6
    for tensor, expected in zip((problem.hidden, problem.weight, problem.bias), gradients, strict=True):
        if tensor is not None:
            assert relative_error(tensor.grad, expected) < tolerance
    # Evaluation takes the same form and the same strips.
    with torch.no_grad():
        assert torch.equal(_run(problem, backend).loss, out.loss.detach())


@pytest.mark.parametrize("backend", FORMS)
def test_a_frozen_head(backend, kernel_device):
    problem = make_problem(P=2, T=9, device=kernel_device).requiring_grad(weight=False)
    out = _run(problem, backend)
    out.loss.backward()
    truth, dh, *_ = problem.truth()
    assert relative_error(out.loss, truth.loss) < 1e-6
    assert relative_error(problem.hidden.grad, dh) < 1e-6


@pytest.mark.parametrize("backend", FORMS)
def test_log_probabilities_and_a_call_without_rows(backend, kernel_device):
    problem = make_problem(P=2, T=9, device=kernel_device)
    x, weight = problem.hidden[0].detach().requires_grad_(), problem.weight.detach().requires_grad_()
    targets = torch.arange(9, device=kernel_device)
    logp = token_logprobs(x, weight, targets, strip_bytes=2048, backend=backend)
    logp.sum().backward()
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = (x64 @ weight64.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    expected.sum().backward()
    assert relative_error(logp.detach(), expected.detach()) < 1e-6
    assert relative_error(x.grad, x64.grad) < 2e-6
    assert relative_error(weight.grad, weight64.grad) < 2e-6
    none = token_logprobs(x[:0], weight, targets[:0], backend=backend)
    none.sum().backward()
    assert none.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_strip_form_never_holds_more_than_the_strip(dtype, monkeypatch, kernel_device):
    from orpo_kernels import schedule, triton_strip_backend

    held, most = [], []
    raw_logits, strip_grad = triton_strip_backend.raw_logits, triton_strip_backend.strip_grad

    def alive() -> int:
        # In float32 the gradient overwrites the logits, and is the same tensor.
        return sum(t.nbytes for t in {id(t): t for t in (ref() for ref in held) if t is not None}.values())

    def watched(function):
        def call(*arguments):
            held.append(weakref.ref(result := function(*arguments)))
            most.append(alive())
            return result

        return call

    monkeypatch.setattr(triton_strip_backend, "raw_logits", watched(raw_logits))
    monkeypatch.setattr(triton_strip_backend, "strip_grad", watched(strip_grad))
    problem = make_problem(P=2, T=9, dtype=dtype, device=kernel_device)
    x = problem.hidden.reshape(-1, problem.hidden.shape[-1])
    targets, head = torch.zeros(len(x), dtype=torch.int64, device=kernel_device), Head(problem.weight)
    strip_bytes = 36 * 6 * 32
    logp, lse = triton_strip_backend.token_stats(x, targets, head, strip_bytes)
    needs = Needs(hidden=True, weight=True, bias=False)
    schedule.backward_by_strips(
        triton_strip_backend, x, targets, logp, lse, torch.ones_like(logp), head, needs, strip_bytes
    )
    assert len(most) > 12
    assert strip_bytes / 2 < max(most) <= strip_bytes


def test_the_environment_and_the_argument_force_a_form(monkeypatch, clock, kernel_device):
    used = []
    monkeypatch.setattr(form, "load_backend", lambda name, load=form.load_backend: used.append(name) or load(name))
    timed = clock(fused=1.0, strip=2.0)
    # The tiles are timed all the same.
    monkeypatch.setattr(tuning, "milliseconds", lambda run, device: run() or 1.0)
    problem = make_problem(P=2, T=9, device=kernel_device).requiring_grad()
    monkeypatch.setenv(form.VARIABLE, "strip")
    _run(problem, "triton").loss.backward()
    assert used == ["triton-strip"] * 2
    _run(problem, "triton-fused")
    assert used[2:] == ["triton-fused"]
    assert timed.timed == []


def test_a_form_that_does_not_exist_is_refused(monkeypatch, kernel_device):
    problem = make_problem(P=2, T=9, device=kernel_device).requiring_grad()
    with pytest.raises(ValueError, match="torch, triton, triton-fused, triton-strip or None, got 'triton-tiled'"):
        _run(problem, "triton-tiled")
    monkeypatch.setenv(form.VARIABLE, "tiled")
    with pytest.raises(ValueError, match="ORPO_KERNEL_FORM has to be one of auto, fused, strip, got 'tiled'"):
        _run(problem, "triton")


@pytest.mark.parametrize(("fused", "strip", "expected"), [(1.0, 2.0, "fused"), (2.0, 1.0, "strip")])
def test_the_faster_form_is_timed_once_and_said(fused, strip, expected, clock, caplog, tmp_path):
    timed = clock(fused=fused, strip=strip)
    with caplog.at_level(logging.INFO, "orpo_kernels.tuning"):
        assert [_choose(), _choose(), _choose(rows=8)] == [expected] * 3
    assert timed.timed == ["fused", "strip"]
    assert len(caplog.messages) == 1 and f": {expected}, timed: fused" in caplog.messages[0]
    assert json.loads(_files(tmp_path)[0].read_text())["milliseconds"] == {"fused": fused, "strip": strip}
    # Other shapes are other classes.
    _choose(rows=9), _choose(vocabulary=70), _choose(softcap=30.0)
    assert len(timed.timed) == 8


def test_the_whole_loss_with_a_choice_by_timing(monkeypatch, kernel_device):
    order = []

    def milliseconds(run, device):
        run()
        order.append(len(order))
        return 2.0 - len(order)  # the second one is faster

    monkeypatch.setattr(tuning, "can_time", lambda device: True)
    monkeypatch.setattr(tuning, "capturing", lambda device: False)
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    problem = make_problem(P=2, T=9, bias=True, device=kernel_device).requiring_grad()
    out = _run(problem, "triton")
    out.loss.backward()
    assert [way for key, way in tuning._chosen.items() if key.startswith("kernel form")] == ["strip"]
    assert torch.equal(out.loss, _run(problem, "triton-strip").loss)
    assert relative_error(problem.weight.grad, problem.truth()[2]) < 1e-6


def test_another_process_reads_what_was_timed(clock, tmp_path):
    clock(fused=2.0, strip=1.0)
    assert _choose() == "strip"
    tuning.forget()
    timed = clock(fused=1.0, strip=2.0)
    assert _choose() == "strip"
    assert timed.timed == [] and len(_files(tmp_path)) == 1


OTHER_CLASS = b'{"class": "other", "chosen": "fused", "milliseconds": {"fused": 1.0, "strip": 2.0}}'


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", OTHER_CLASS])
def test_a_corrupt_file_is_ignored_and_replaced(content, clock, caplog, tmp_path):
    clock(fused=2.0, strip=1.0)
    _choose()
    (file,) = _files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(content)
    tuning.forget()
    timed = clock(fused=2.0, strip=1.0)
    assert _choose() == "strip"
    assert timed.timed == ["fused", "strip"] and "is ignored" in caplog.text
    assert file.read_bytes() == whole
    assert [f.name for f in file.parent.iterdir()] == [file.name]


def test_a_folder_that_cannot_be_written(clock, caplog, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    timed = clock(fused=2.0, strip=1.0)
    assert [_choose(), _choose()] == ["strip", "strip"]
    assert timed.timed == ["fused", "strip"] and "not remembered on disk" in caplog.text


def test_without_a_timing_the_form_is_fused(monkeypatch, clock):
    # No clock on this device.
    monkeypatch.setattr(tuning, "can_time", lambda device: False)
    assert _choose() == "fused"
    timed = clock(fused=2.0, strip=1.0)
    # A graph that is captured before the class was timed must not run anything of its own.
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    assert _choose() == "fused" and timed.timed == []
    monkeypatch.setattr(tuning, "capturing", lambda device: False)
    # Or the same process would compute the same shapes in two ways.
    assert _choose() == "fused" and timed.timed == []
    assert _choose(rows=20) == "strip"
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    assert _choose(rows=20) == "strip"
    torch.use_deterministic_algorithms(True)
    try:
        assert _choose() == "fused"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_form_that_does_not_fit_the_card_is_not_chosen(monkeypatch, caplog):
    from triton.runtime.errors import OutOfResources

    def milliseconds(run, device):
        if not caplog.messages:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 5.0

    monkeypatch.setattr(tuning, "can_time", lambda device: True)
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    assert _choose() == "strip"
    assert "fused does not fit this card" in caplog.text


def test_timing_does_not_touch_what_it_is_given(kernel_device, monkeypatch):
    monkeypatch.setattr(tuning, "milliseconds", lambda run, device: run() or 1.0)
    problem = make_problem(P=2, T=9, device=kernel_device)
    x, head = problem.hidden.reshape(-1, 24), Head(problem.weight)
    targets = torch.arange(len(x), device=kernel_device)
    before = x.clone(), problem.weight.clone(), targets.clone()
    rows = []
    monkeypatch.setattr(tuning, "TIMED_ROWS", 8)
    monkeypatch.setattr(form, "add_matmul", lambda dx, g, w: rows.append(len(g)) or matmul.add_matmul(dx, g, w))
    for name in form.FORMS:
        assert form._time(name, x, targets, head, 4096) == 1.0
    assert set(rows) == {8}
    assert all(torch.equal(a, b) for a, b in zip(before, (x, problem.weight, targets), strict=True))
