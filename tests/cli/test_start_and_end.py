"""What orpo-train says and refuses before torch is loaded; what it says at its start, its end and a second call."""

import json
import os
import shlex
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import ROWS, make_model, make_tokenizer
from trainers import make_args, make_trainer
from transformers import TrainerCallback

from orpo import ORPOTrainer, train
from orpo.cli.arguments import parse
from orpo.cli.before_imports import announce, look, option_strings
from orpo.cli.errors import run_command
from orpo.cli.run import _again
from orpo.runs.find_checkpoint import complete_checkpoints
from orpo.runs.finished import FINISHED
from orpo.trainer.start import describe_training, odd_rate

pytestmark = pytest.mark.usefixtures("own_cache")


def options(files, output, **changes):
    chosen = {
        "model_name_or_path": files / "model",
        "dataset_name": files / "pairs.jsonl",
        "output_dir": output,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        **changes,
    }
    return [part for name, value in chosen.items() for part in (f"--{name}", str(value))]


def test_the_names_read_from_source_are_the_options_of_the_parser(monkeypatch):
    seen = []
    monkeypatch.setattr("orpo.cli.arguments.say_unknown", lambda left, known: seen.append(set(known)) or "unknown")
    with pytest.raises(ValueError, match="unknown"):
        parse(["--use_cpu", "--zzz"])
    assert option_strings() == {name for name in seen[0] if name.startswith("--")}


def test_names_that_stand_elsewhere_are_left_to_the_parser(tmp_path, monkeypatch):
    (tmp_path / "training_args.py").write_text("class Base:\n    output_dir: str\nclass TrainingArguments(Base): ...\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert option_strings() == set()
    look(["--lerning_rate", "1"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lerning_rate 1", "--lerning_rate is no option, did you mean --learning_rate?"),
        ("--use_peft --no-bff16=1", "--no-bff16=1 is no option"),
        ("--lr 1", "the name in many scripts for learning_rate"),
        ("--config smollm3", "no such file, and no recipe"),
        ("--dataset_name pears.jsonl", r"there is no file or folder pears\.jsonl"),
        ("--dataset-name=./pears", r"there is no file or folder \./pears"),
        ("--dataset_name hub/name --eval_dataset_name /no/where", "there is no file or folder /no/where"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        look(line.split())


@pytest.mark.parametrize(
    "words",
    [
        ["--chat_template", "-- {{ messages }}"],
        ["--help", "--zzz"],
        ["--dataset_name", "owner/name"],
        ["--", "--zzz"],
        ["--no_bf16", "--output-dir=x"],
    ],
)
def test_what_the_parser_has_to_judge_is_left_to_it(words):
    look(words)


def test_nothing_is_loaded_before_the_first_line():
    code = (
        "import sys\n"
        "from orpo import train\n"
        "from orpo.cli.errors import run_command\n"
        "sys.modules['transformers.hf_argparser'] = None\n"
        "try: run_command('orpo-train', lambda: train.main(sys.argv[1:]))\n"
        "finally: print(sorted({'torch', 'datasets', 'accelerate'} & set(sys.modules)))\n"
    )

    def said(line, **environment):
        done = subprocess.run(
            [sys.executable, "-c", code, *line.split()], capture_output=True, text=True, env=os.environ | environment
        )
        return done.stdout, done.stderr

    out, err = said("--max_stps 3")
    assert err == "orpo-train: --max_stps is no option, did you mean --max_steps?\n" and out == "[]\n"
    out, err = said("--print-config ddp")
    assert not err and out.endswith("[]\n") and "distributed_type" in out
    # What follows the first line fails here, at the first import of transformers.
    assert said("--max_steps 3")[1].startswith("loading torch and transformers ...\n")
    assert "loading" not in said("--max_steps 3", RANK="1")[1]


def test_orpo_generate_speaks_before_it_loads():
    """torch fails to import here, and whatever is said was said before."""
    code = "import sys; sys.modules['torch'] = None; from orpo.commands import generate; generate()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.startswith("loading torch and transformers ...\n") and "import of torch halted" in done.stderr


def test_nothing_is_announced_that_has_passed(capsys):
    announce()
    assert capsys.readouterr() == ("", "")


def test_the_start_says_what_trains(tmp_path, capsys):
    # 2 x 3 pairs a step; the embeddings and the head are 400 x 32 each.
    model = make_model("llama").requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    count = sum(p.numel() for p in model.parameters())
    trainer = make_trainer(
        tmp_path, model, per_device_train_batch_size=2, gradient_accumulation_steps=3, gradient_checkpointing=False
    )
    trainer.train()
    line = f"trains 12,800 of {count:,} parameters ({1280000 / count:.3g} %): 2 steps of 6 pairs, learning rate 0.001"
    assert f"{line} (linear)\n" in capsys.readouterr().out


def test_numbers_of_4_bits_are_counted_by_twos(tmp_path):
    packed = type("Params4bit", (torch.nn.Parameter,), {})(torch.zeros(6, dtype=torch.uint8), requires_grad=False)
    model = SimpleNamespace(parameters=lambda: [packed, torch.nn.Parameter(torch.zeros(4))])
    assert describe_training(model, make_args(tmp_path), 1).startswith("trains 4 of 16 parameters (25 %)")


@pytest.mark.parametrize(
    ("rate", "adapter", "said"),
    [
        (1e-6, False, None),
        (1e-8, False, "hardly anything will change: 1e-6 to 2e-5 is usual for a whole model"),
        (2e-3, False, "may be lost"),
        (1e-6, True, "hardly anything will change: 1e-4 to 2e-4 is usual for an adapter"),
        (1e-5, True, None),
        (2e-3, True, None),
        (2e-2, True, "may be lost"),
    ],
)
def test_a_rate_out_of_all_range_is_warned_of(rate, adapter, said, tmp_path):
    found = odd_rate(make_args(tmp_path, learning_rate=rate), adapter)
    assert (found is None) == (said is None) and (said or "") in (found or "")
    assert odd_rate(make_args(tmp_path, learning_rate=rate, optim="sgd"), adapter) is None


def test_an_odd_rate_is_warned_of_in_a_run_but_not_of_an_own_optimizer(tmp_path):
    with pytest.warns(UserWarning, match="learning_rate is 0.1, with which what the model knows may be lost"):
        make_trainer(tmp_path, learning_rate=0.1, max_steps=1).train()
    (line,) = [c for c in make_trainer(tmp_path).callback_handler.callbacks if type(c).__name__ == "StartLine"]
    assert line.own_optimizer is False
    model = make_model()
    own = ORPOTrainer(
        model,
        make_args(tmp_path),
        train_dataset=ROWS,
        processing_class=make_tokenizer(),
        optimizers=(torch.optim.SGD(model.parameters()), None),
    )
    (line,) = [c for c in own.callback_handler.callbacks if type(c).__name__ == "StartLine"]
    assert line.own_optimizer is True


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_writes_over_a_finished_one_is_none_until_its_end(files, tmp_path, monkeypatch):
    line = options(files, tmp_path)
    train.main(line)
    assert (tmp_path / FINISHED).is_file()
    monkeypatch.setattr("orpo.cli.run.write_page", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main([*line, "--resume_from_checkpoint", "false", "--beta", "0.5"])
    # Its weights are in the folder, of the size of those before.
    assert not (tmp_path / FINISHED).exists()


def test_a_finished_run_called_again_writes_nothing(files, tmp_path, capsys):
    line = options(files, tmp_path / "out", eval_dataset_name=files / "pairs.jsonl")
    train.main(line)
    said = capsys.readouterr().out
    assert f"the model is in {tmp_path}/out; to ask it: orpo-generate {tmp_path}/out --prompt" in said
    before = times(tmp_path)
    train.main(line)
    said = capsys.readouterr().out
    assert f"{tmp_path}/out is complete, nothing to do: the run ended at step 3" in said and "--max_steps" in said
    assert times(tmp_path) == before
    # What the run left is gone, or something else is asked for: it is done.
    (tmp_path / "out/README.md").unlink()
    train.main(line)
    assert (tmp_path / "out/README.md").is_file() and "nothing to do" not in capsys.readouterr().out
    train.main(options(files, tmp_path / "out", max_steps=4))
    said = capsys.readouterr().out
    assert "nothing to do" not in said and "resumes from" in said
    train.main([*options(files, tmp_path / "out", max_steps=4), "--resume_from_checkpoint", "false"])
    assert "starts anew" in capsys.readouterr().out


def test_other_pairs_are_another_run(files, tmp_path, capsys):
    for part, complete in ((ROWS, False), (ROWS[:5], False), (ROWS[:5], True)):
        (tmp_path / "held-out.jsonl").write_text("\n".join(map(json.dumps, part)))
        train.main(options(files, tmp_path / "out", eval_dataset_name=tmp_path / "held-out.jsonl"))
        assert ("nothing to do" in capsys.readouterr().out) == complete
    (tmp_path / "out" / FINISHED).write_text("[]")
    train.main(options(files, tmp_path / "out", eval_dataset_name=tmp_path / "held-out.jsonl"))
    assert "nothing to do" not in capsys.readouterr().out


def test_another_file_that_is_streamed_is_evaluated(files, tmp_path, capsys):
    """Of a stream nothing is read before training."""
    for part, complete in ((ROWS, False), (ROWS[:5], False), (ROWS[:5], True)):
        if not complete:
            (tmp_path / "held-out.jsonl").write_text("\n".join(map(json.dumps, part)))
        streamed = {"dataset_name": files / "pairs.jsonl", "dataset_streaming": "true", "max_length": 64}
        train.main(options(files, tmp_path / "out", eval_dataset_name=tmp_path / "held-out.jsonl", **streamed))
        assert ("nothing to do" in capsys.readouterr().out) == complete


class CtrlC(TrainerCallback):
    """Presses Ctrl-C in the step after `step`, `times` times."""

    def __init__(self, step, times):
        self.step, self.times = step, times

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def foreground():
    """Tests in a background job of a shell ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pressed(monkeypatch, step, times, line):
    plain = ORPOTrainer.__init__
    monkeypatch.setattr(
        ORPOTrainer, "__init__", lambda self, *a, **k: plain(self, *a, **{**k, "callbacks": [CtrlC(step, times)]})
    )
    with pytest.raises(SystemExit) as stop:
        run_command("orpo-train", lambda: train.main(line))
    monkeypatch.setattr(ORPOTrainer, "__init__", plain)
    return stop.value.code


def test_ctrl_c_saves_the_step_in_progress_and_says_how_to_go_on(foreground, files, tmp_path, monkeypatch, capfd):
    plain = signal.getsignal(signal.SIGINT)
    line = options(files, tmp_path, save_steps=50, hub_token="hf_secret")
    assert pressed(monkeypatch, 1, 1, line) == 130
    said = capfd.readouterr().err
    assert "Ctrl-C: the step in progress is ended and saved; once more ends at once\n" in said
    told = said[said.index("orpo-train: interrupted") :]
    assert told.startswith(
        f"orpo-train: interrupted after step 2 of 3, which {tmp_path}/checkpoint-2 holds; to go on: orpo-train "
    )
    assert told.count("\n") == 1 and "hf_secret" not in told and "--hub_token '<HUB_TOKEN>'" in told
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not (tmp_path / "model.safetensors").exists() and signal.getsignal(signal.SIGINT) is plain
    again = shlex.split(told[told.index("to go on: ") :].removeprefix("to go on: orpo-train "))
    train.main(again)
    assert "resumes from" in capfd.readouterr().out and (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize(("times", "changes"), [(2, {}), (1, {"save_strategy": "no"})])
def test_ctrl_c_twice_or_without_saves_ends_at_once(times, changes, foreground, files, tmp_path, monkeypatch, capfd):
    assert pressed(monkeypatch, 1, times, options(files, tmp_path, **changes)) == 130
    assert capfd.readouterr().err.endswith("\norpo-train: interrupted\n") and not complete_checkpoints(tmp_path)


def test_a_background_job_ignores_ctrl_c(files, tmp_path, monkeypatch, capfd):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        plain = ORPOTrainer.__init__
        monkeypatch.setattr(
            ORPOTrainer, "__init__", lambda self, *a, **k: plain(self, *a, **{**k, "callbacks": [CtrlC(1, 2)]})
        )
        train.main(options(files, tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "model.safetensors").is_file() and "Ctrl-C" not in capfd.readouterr().err


def test_ctrl_c_at_once_names_the_checkpoint_before(foreground, files, tmp_path, monkeypatch, capfd):
    assert pressed(monkeypatch, 1, 2, options(files, tmp_path, save_steps=1)) == 130
    assert f"orpo-train: interrupted; {tmp_path}/checkpoint-1 is whole, to go on: orpo-train " in capfd.readouterr().err


def test_ctrl_c_after_training_says_how_to_go_on(foreground, files, tmp_path, monkeypatch, capfd):
    """Training has ended then, and its last checkpoint is whole."""
    monkeypatch.setattr(ORPOTrainer, "save_state", lambda self: os.kill(os.getpid(), signal.SIGINT))
    line = options(files, tmp_path, save_steps=1, resume_from_checkpoint="false")
    with pytest.raises(SystemExit):
        run_command("orpo-train", lambda: train.main(line))
    said = capfd.readouterr().err
    assert f"orpo-train: interrupted; {tmp_path}/checkpoint-3 is whole, to go on: orpo-train " in said
    # The same line would train anew.
    assert said.endswith(" --resume_from_checkpoint true\n") and "false" not in said.rpartition("to go on")[2]


@pytest.mark.parametrize(
    "words", [["--resume_from_checkpoint", "false"], ["--resume-from-checkpoint=no"], ["--config", "anew.yaml"]]
)
def test_the_line_to_go_on_with_does_not_train_anew(words):
    kept = words if "--config" in words else []
    assert _again(["--beta", "1", *words], "false") == shlex.join(
        ["orpo-train", "--beta", "1", *kept, "--resume_from_checkpoint", "true"]
    )


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name", "eval_dataset_name", "output_dir"])
def test_an_empty_name_is_refused(name, files, tmp_path):
    """What a variable of the shell that is not set leaves."""
    with pytest.raises(ValueError, match=f"--{name} is ''; it has to name something, or be left out"):
        train.main(options(files, tmp_path, **{name: ""}))


def test_tokens_are_not_said_again():
    assert _again(["--hub_token=a", "--hub-token", "b c", "--beta", "1"]) == (
        "orpo-train '--hub_token=<HUB_TOKEN>' --hub-token '<HUB_TOKEN>' --beta 1"
    )


def test_a_traceback_is_offered_where_it_helps(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("ORPO_TRACEBACK", raising=False)
    for main, offered in (
        (lambda: train.main(["--config", "smollm3"]), False),
        (lambda: open(tmp_path / "no-such-file"), True),
        (lambda: train.main(["--use_cpu", "--learning_rate", "-1"]), False),
        (lambda: train.main(["--use_cpu", "--optim", "adam_of_mine"]), False),
    ):
        with pytest.raises(SystemExit):
            run_command("orpo-train", main)
        assert ("with ORPO_TRACEBACK=1" in capsys.readouterr().err) == offered
