"""What the model card says is what was run, and what is pushed to the hub is what was asked for."""

import json
import warnings
from types import SimpleNamespace

import peft
import pytest
import transformers.trainer
from huggingface_hub import ModelCard
from tiny import ROWS, SEVEN, make_model, make_tokenizer
from trainers import make_trainer

from orpo.recipes import smollm2
from orpo.train import main


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def trained(tmp_path, **settings):
    trainer = make_trainer(tmp_path, eval_dataset=SEVEN, **settings)
    trainer.train()
    trainer.evaluate()
    return trainer


def test_the_card_says_what_was_run(tmp_path):
    data = [*ROWS, {"prompt": "hello", "chosen": "", "rejected": ""}]
    trainer = trained(tmp_path, train_dataset=data, preset="paper", max_length=64, gradient_accumulation_steps=2)
    (tmp_path / "curves.png").touch()
    trainer.create_model_card(
        dataset="someone/pairs", eval_dataset="/home/me/held-out.jsonl", tags="chat", license="mit", model_name="tuned"
    )
    card = card_of(tmp_path)
    assert card.data.tags == ["orpo", "generated_from_trainer", "chat"]
    assert (card.data.datasets, card.data.license, card.data.library_name) == (["someone/pairs"], "mit", "transformers")
    loss = trainer.state.log_history[-1]["eval_loss"]
    for expected in (
        *(
            "# tuned",
            "* `someone/pairs`",
            "* `held-out.jsonl`, held out",
            "* train: kept 7 of 8: 1 empty",
            "* eval: kept 7 of 7",
        ),
        *("* beta 1.0, nll_weight 1.0 (preset `paper`)", "prompt and chosen answer, without end-of-sequence tokens"),
        *(
            "8 pairs an optimizer step on 1 process, learning rate 0.001; 2 steps were taken",
            "| `learning_rate` | 0.001 |",
        ),
        *("| `max_length` | 64 |", f"| `loss` | {loss:.4g} | 2 |", "(curves.png)", "eprint = {2403.07691}"),
        *("@software{fused_orpo", f"* transformers {transformers.__version__}"),
    ):
        assert expected in card.text, expected
    for absent in ("weight_decay", "bf16", "runtime", str(tmp_path), "adapter"):
        assert absent not in card.text


def test_a_saved_model_has_its_card_without_what_is_not_known(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.create_model_card(dataset="someone/pairs")
    trainer.save_model(str(tmp_path / "elsewhere"))
    card = card_of(tmp_path / "elsewhere")
    assert card.data.datasets == ["someone/pairs"]
    assert card.data.license is None and card.data.base_model is None
    assert "Held-out" not in card.text and "curves.png" not in card.text
    assert "made on the spot" in card.text


@pytest.mark.parametrize("has_license", [False, True])
def test_a_local_base_gives_its_license_and_not_its_folder(tmp_path, has_license):
    base = tmp_path / "base-model"
    make_model("llama").save_pretrained(base)
    if has_license:
        (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    trainer = make_trainer(tmp_path / "out", model=str(base))
    trainer.create_model_card(dataset=str(base))
    card = card_of(tmp_path / "out")
    assert card.data.license == ("apache-2.0" if has_license else None)
    assert card.data.base_model is None and card.data.datasets is None
    assert "`base-model`, trained on" in card.text and str(tmp_path) not in str(card)


ODD_CARDS = {
    "yaml": b"---\nlicense: [apache\n---\nA model.\n",
    "tab": b"---\nlicense:\tmit\n\tx: 1\n---\n",
    "latin-1": "---\nlicense: mit\n---\nEin Modell f\xfcr alle.\n".encode("latin-1"),
    "list": b"---\n- mit\n---\n",
    "keys": b"---\n1: mit\n---\n",
    "index": b"---\nlicense: mit\nmodel-index: 7\n---\n",
    "nul": b"---\nlicense: m\0it\n---\n",
    "utf-16": "---\nlicense: mit\n---\n".encode("utf-16"),
}


@pytest.mark.parametrize("content", ODD_CARDS.values(), ids=ODD_CARDS.keys())
def test_an_odd_card_of_the_base_ends_no_run(content, tmp_path):
    base = tmp_path / "base-model"
    make_model("llama").save_pretrained(base)
    (base / "README.md").write_bytes(content)
    trainer = make_trainer(tmp_path / "out", model=str(base))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.save_model()
    assert "`base-model`, trained on" in (tmp_path / "out/README.md").read_text()
    # Of an index alone huggingface_hub says so itself, and reads the rest.
    said = any("base-model/README.md could not be read" in str(warning.message) for warning in caught)
    assert said == (content is not ODD_CARDS["index"])


def test_bf16_is_named_where_it_is_not_the_default(tmp_path, monkeypatch):
    make_trainer(tmp_path, bf16=True).create_model_card()
    assert "| `bf16` | True |" in card_of(tmp_path).text
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(type(trainer.args), "bf16_by_default", True)
    trainer.create_model_card()
    assert "| `bf16` | False |" in card_of(tmp_path).text


def test_a_local_base_names_what_it_was_made_from(tmp_path):
    base = tmp_path / "base-model"
    make_model("llama").save_pretrained(base)
    (base / "README.md").write_text(smollm2.CARD)
    make_trainer(tmp_path / "out", model=str(base)).create_model_card()
    card = card_of(tmp_path / "out")
    assert (card.data.base_model, card.data.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert "`base-model` (made from `HuggingFaceTB/SmolLM2-135M-Instruct`), trained on" in card.text


def test_an_adapter_has_a_card_of_ours_and_the_hub_knows_its_base(tmp_path):
    model = make_model("llama")
    model.config._name_or_path = model.name_or_path = "someone/base"
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, model=model, peft_config=config)
    trainer.save_model()
    card = card_of(tmp_path)
    assert (card.data.library_name, card.data.base_model) == ("peft", "someone/base")
    assert card.data.tags[-1] == "lora"
    assert "A LoRA on `someone/base`" in card.text and "| `adapter: r` | 4 |" in card.text


def test_push_to_hub_passes_its_arguments_on(tmp_path, monkeypatch):
    """A stand-in for the hub's client: nothing leaves this machine."""
    calls = {}

    def create_repo(name, **options):
        calls["create"] = name, options
        return SimpleNamespace(repo_id="me/tuned")

    def upload_folder(**options):
        calls["upload"] = options
        calls["card"] = card_of(tmp_path)

    hub = SimpleNamespace(create_repo=create_repo, upload_folder=upload_folder)
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    trainer = make_trainer(tmp_path, hub_model_id="me/tuned", hub_token="secret")
    options = {"commit_message": "First", "revision": "trial", "private": True}
    trainer.push_to_hub(**options, tags=["chat"], dataset="someone/pairs", license="mit", language="en")
    name, created = calls["create"]
    assert (name, created["private"], created["token"]) == ("me/tuned", True, "secret")
    upload = calls["upload"]
    assert (upload["repo_id"], upload["commit_message"], upload["revision"]) == ("me/tuned", "First", "trial")
    assert upload["folder_path"] == str(tmp_path)
    card = calls["card"]
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", ["someone/pairs"])
    assert "chat" in card.data.tags and "orpo" in card.data.tags and "secret" not in str(card)
    assert card.text.lstrip().startswith("# tuned")


def test_orpo_train_leaves_a_card_with_curves_and_metrics(tmp_path, own_cache):
    base, data = tmp_path / "base", tmp_path / "pairs.jsonl"
    make_model("llama").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    line = f"--model_name_or_path {base} --dataset_name {data} --eval_dataset_name {data} --dataset_test_split train"
    main(
        [
            *line.split(),
            *f"--output_dir {tmp_path / 'out'} --max_steps 1 --logging_steps 1 --use_cpu --report_to none".split(),
        ]
    )
    card = card_of(tmp_path / "out")
    for expected in ("* `pairs.jsonl`", "| `rewards/accuracies` |", "(curves.png)", "| `max_steps` | 1 |"):
        assert expected in card.text, expected


def test_the_card_shows_the_best_weights_figures_as_of_their_step(tmp_path):
    every_step = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    settings = dict(learning_rate=5, max_steps=3, load_best_model_at_end=True, **every_step)
    trainer = make_trainer(tmp_path, eval_dataset=SEVEN, **settings)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    best = trainer.state.best_global_step
    assert best < 3
    assert f"| `loss` | {trainer.state.best_metric:.4g} | {best} |" in (tmp_path / "README.md").read_text()


def test_the_card_names_no_best_weights_that_were_not_saved(tmp_path):
    """The best step may lie between two that were saved: there is nothing to load."""
    between = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=2)
    settings = dict(learning_rate=5, max_steps=2, load_best_model_at_end=True, **between)
    trainer = make_trainer(tmp_path, eval_dataset=SEVEN, **settings)
    trainer.train()
    assert trainer.state.best_global_step == 1 and trainer.state.best_model_checkpoint is None
    loss = trainer.evaluate()["eval_loss"]
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert f"| `loss` | {loss:.4g} | 2 |" in text and "The weights are those of" not in text


@pytest.mark.parametrize("disabled", [True, False])
def test_the_card_shows_the_dropout_of_a_lora_that_was_applied(disabled, tmp_path):
    config = peft.LoraConfig(r=4, lora_dropout=0.25, target_modules=["q_proj"], task_type="CAUSAL_LM")
    make_trainer(tmp_path, peft_config=config, disable_dropout=disabled).create_model_card()
    dropout = 0.0 if disabled else 0.25
    assert f"| `adapter: lora_dropout` | {dropout} |" in (tmp_path / "README.md").read_text()
