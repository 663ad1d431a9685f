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
        (["--prompt-share", "0.25"], "smollm2 has a batch of its own, and takes no prompt_share"),
        (["--case", "tiny", "--pairs", "1", "--positions", "8"], "takes no pairs, no positions"),
        (["--case", "OPT-350M", "--prompt-share", "1"], "leaves one of them to the answer"),
        (["--case", "OPT-350M", "--prompt-share", "-0.5"], "leaves one of them to the answer"),
        (["--case", "OPT-350M", "--pairs", "0"], "a batch has a pair"),
        (["--vocabulary", "0", "--hidden-size", "9"], "a batch has a pair"),
    ],
)
def test_what_is_no_batch_is_refused(monkeypatch, capsys, options, said):
    with pytest.raises(SystemExit):
        case_of(monkeypatch, *options)
    assert said in capsys.readouterr().err


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
