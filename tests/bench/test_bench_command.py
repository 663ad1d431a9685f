"""python -m benchmarks.loss: on the shapes of whoever asks."""

import pytest

from benchmarks import loss
from benchmarks.cases import CASES, CPU_BATCH, HEADS, Case


def case_of(monkeypatch, *options):
    """The case that the command would measure."""
    seen = []
    monkeypatch.setattr("sys.argv", ["loss", "--peers", "ours", *options])
    monkeypatch.setattr(loss, "measure_case", lambda case, *rest: seen.append(case) or [])
    loss.main()
    return seen[0]


def test_a_batch_of_ones_own(monkeypatch):
    own = "--vocabulary", "1000", "--hidden-size", "48"
    assert case_of(monkeypatch, *own) == Case("custom", 4, 256, 128, 48, 1000)
    batch = "--pairs", "3", "--positions", "100", "--prompt-share", "0.25"
    assert case_of(monkeypatch, *own, *batch) == Case("custom", 3, 100, 25, 48, 1000)
    v, d = HEADS["Llama-3-8B"]
    assert case_of(monkeypatch, "--case", "Llama-3-8B", *batch) == Case("Llama-3-8B", 3, 100, 25, d, v)


def test_the_default_batch_of_a_head_is_that_of_the_results(monkeypatch):
    for head, (v, d) in HEADS.items():
        pairs, positions = CPU_BATCH[head]
        assert case_of(monkeypatch, "--case", head) == Case(head, pairs, positions, positions // 2, d, v)
    assert case_of(monkeypatch) == CASES["smollm2"]


def test_a_model_gives_the_size_of_its_head(monkeypatch, tmp_path):
    from transformers import Gemma3Config, LlamaConfig, OPTConfig

    text = {"vocab_size": 999, "hidden_size": 40, "num_hidden_layers": 1}
    for name, config in {
        "llama": LlamaConfig(vocab_size=777, hidden_size=32),
        # The head follows a projection.
        "opt": OPTConfig(vocab_size=888, hidden_size=64, word_embed_proj_dim=24),
        # Of a model that also sees, the part that writes.
        "gemma3": Gemma3Config(text_config=text),
    }.items():
        config.save_pretrained(tmp_path / name)
    sizes = {name: case_of(monkeypatch, "--model", str(tmp_path / name)) for name in ("llama", "opt", "gemma3")}
    assert {name: (c.vocabulary, c.hidden_size) for name, c in sizes.items()} == {
        "llama": (777, 32),
        "opt": (888, 24),
        "gemma3": (999, 40),
    }
    assert sizes["llama"].name == str(tmp_path / "llama")


@pytest.mark.parametrize(
    "options,said",
    [
        (["--case", "OPT-350M", "--vocabulary", "9", "--hidden-size", "9"], "one of --case, --model"),
        (["--case", "OPT-350M", "--model", "x"], "one of --case, --model"),
        (["--vocabulary", "9"], "go together"),
        (["--hidden-size", "9", "--pairs", "2"], "go together"),
        # Until these were refused, a share of prompt was ignored here.
        (["--prompt-share", "0.25"], "smollm2 has a batch of its own, and takes no --prompt-share"),
        (["--case", "tiny", "--pairs", "1", "--positions", "8"], "takes no --pairs, no --positions"),
        (["--case", "OPT-350M", "--prompt-share", "0.999"], "--prompt-share 0.999 of 256 positions leaves none"),
        (["--case", "OPT-350M", "--prompt-share", "1"], "--prompt-share is 1.0; it is at least 0 and below 1"),
        (["--case", "OPT-350M", "--prompt-share", "-0.001"], "--prompt-share is -0.001"),
        (["--case", "OPT-350M", "--prompt-share", "inf"], "--prompt-share is inf"),
        (["--case", "OPT-350M", "--pairs", "0"], "--pairs is 0; it is at least 1"),
        (["--case", "OPT-350M", "--positions", "1"], "--positions is 1; it is at least 2"),
        (["--vocabulary", "0", "--hidden-size", "9"], "--vocabulary is 0; it is at least 2"),
        (["--vocabulary", "9", "--hidden-size", "-9"], "--hidden-size is -9; it is at least 1"),
        (["--model", "/no/such/folder"], "--model /no/such/folder: "),
        (["--kinds", "step,steps"], "--kinds names 'steps'; there are forward, "),
        (["--rounds", "0"], "--rounds is 0; it is at least 1"),
    ],
)
def test_what_is_no_batch_is_refused(monkeypatch, capsys, options, said):
    with pytest.raises(SystemExit):
        case_of(monkeypatch, *options)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_seconds_keep_their_digits_whatever_the_machine(scale):
    row = dict(kind="step", error_loss=1e-6, error_dx=2e-6, error_dw=3e-6)
    row |= dict(status="measured", median=1.2344 * scale, q20=1.1 * scale, q80=1.3 * scale, peak_bytes=2**20)
    (line,) = loss.table([{**row, "peer": "ours"}]).splitlines()[1:]
    times = [f"{v * scale:.4g}" for v in (1.2344, 1.1, 1.3)]
    assert line.split()[2:] == [*times[:2], "to", times[2], "1", "1.0e-06", "2.0e-06", "3.0e-06"]


def test_who_is_not_timed_is_shown_with_the_reason():
    rows = [
        dict(kind="step", peer="a", status="wrong", error_loss=2e-2, error_dx=3e-3, error_dw=4e-3),
        dict(kind="evaluation", peer="a", status="wrong", error_loss=2e-2),
        dict(kind="step", peer="b", status="failed: RuntimeError: no"),
    ]
    wrong, evaluation, failed = loss.table(rows).splitlines()[1:]
    assert wrong.endswith("wrong, not timed: loss, dX, dW off by 2.0e-02, 3.0e-03, 4.0e-03")
    assert evaluation.endswith("off by 2.0e-02, -, -") and failed.endswith("failed: RuntimeError: no, not timed")


def test_measures_and_prints(monkeypatch, capsys):
    own = ["--vocabulary", "300", "--hidden-size", "16", "--pairs", "2", "--positions", "12"]
    rest = ["--peers", "ours,torch eager", "--rounds", "1", "--kinds", "step,frozen"]
    monkeypatch.setattr("sys.argv", ["loss", *own, *rest])
    loss.main()
    lines = capsys.readouterr().out.splitlines()
    assert [(line.split()[0], line[12:40].strip()) for line in lines[-4:]] == [
        ("step", "ours"),
        ("step", "torch eager"),
        ("frozen", "ours"),
        ("frozen", "torch eager"),
    ]
    # Seconds, spread, memory, and the errors of loss and gradients.
    assert all(float(number) > 0 for line in lines[-4:] for number in (line[40:].split()[0], line.split()[-1]))


def test_a_cpu_that_emulates_bfloat16_says_so(monkeypatch, capsys):
    for emulates in (True, False):
        monkeypatch.setattr(loss, "emulates_bfloat16", lambda emulates=emulates: emulates)
        for dtype in ("bfloat16", "float32"):
            case_of(monkeypatch, "--case", "tiny", "--dtype", dtype)
            assert ("emulates them" in capsys.readouterr().out) == (emulates and dtype == "bfloat16")
