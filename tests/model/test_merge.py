"""The merged model, as saved and loaded again, computes what the adapter computes, or is not there."""

import peft
import pytest
import torch
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM

from orpo import train
from orpo.merge import merge_adapter
from orpo.model import merging

IDS = torch.arange(3, 60)[None]
BOTH = ["q_proj", "embed_tokens", "lm_head"]
TOKENS = [5, 7]
KINDS = {
    "embeddings by LoRA": {"target_modules": ["embed_tokens"]},
    "both by LoRA": {"target_modules": BOTH},
    "both by one LoRA": {"target_modules": BOTH, "ensure_weight_tying": True},
    "embeddings whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both whole": {"target_modules": ["q_proj"], "modules_to_save": BOTH[1:], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS},
    "other tokens of the head": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [8, 9]},
    },
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
}
ONE_WEIGHT = {"both by one LoRA", "both whole", "tokens", "DoRA"}


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def save_adapter(tmp_path, base=None, **options):
    """Base in `base`, a random adapter around it in `adapter`; the logits of the two together."""
    model = make_model("llama") if base is None else base
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    return logits(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_the_merged_model_computes_what_the_adapter_does(kind, tied, tmp_path):
    expected = save_adapter(tmp_path, make_model("llama", tie_word_embeddings=tied), **KINDS[kind])
    returned = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for model in (returned, merged):
        assert torch.allclose(logits(model), expected, atol=2e-5)
    one_weight = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert one_weight == merged.config.tie_word_embeddings == (tied and kind in ONE_WEIGHT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_no_fault(dtype, tmp_path):
    save_adapter(tmp_path, make_model("llama", num_hidden_layers=8), target_modules="all-linear")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    assert merged.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["both by one LoRA", "other tokens of the head"])
def test_a_wrong_merge_is_refused_and_leaves_nothing(kind, dtype, tmp_path, monkeypatch):
    """Merged into the weight that both share, as peft does it alone."""
    save_adapter(tmp_path, make_model("llama", tie_word_embeddings=True), **KINDS[kind])
    monkeypatch.setattr(merging, "_merge", lambda model: model.merge_and_unload())
    with pytest.raises(ValueError, match=r"logits differ .* by [\d.]+ .*explains [\d.e-]+: nothing is saved"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_tokens_that_were_added_before_training_are_there_after_merging(tmp_path):
    model = make_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(402)
    tokens = {"target_modules": ["q_proj"], "trainable_token_indices": [400, 401]}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **tokens))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) * parameter.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[400, 5, 401, 9]])
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert torch.allclose(merged(ids).logits, model.eval()(ids).logits, atol=1e-5)


def test_nothing_but_an_earlier_merge_is_replaced(tmp_path):
    save_adapter(tmp_path, target_modules=["q_proj"])
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    adapter, notes = tmp_path / "adapter", tmp_path / "notes"
    (tmp_path / "file").write_text("mine")
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    for output, message in (
        (tmp_path / "file", "which is a file: name a folder"),
        (tmp_path / "base", "would overwrite its base model"),
        (adapter, "would overwrite its adapter"),
        (notes, r"notes is not empty, and no earlier merge wrote mine\.txt: name a new folder"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_adapter(adapter, output)
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "file").read_text() == (notes / "mine.txt").read_text() == "mine"
    # New, empty, its own.
    (tmp_path / "merged").mkdir()
    for _ in range(2):
        merge_adapter(adapter, tmp_path / "merged")
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"merged is not empty, and no earlier merge wrote mine\.txt"):
        merge_adapter(adapter, tmp_path / "merged")
    (tmp_path / "merged" / "orpo_merge.json").write_text('{"files": 3')
    with pytest.raises(ValueError, match="merged is not empty, and no earlier merge wrote"):
        merge_adapter(adapter, tmp_path / "merged")


def test_a_base_of_pickled_weights_is_refused_as_in_training(tmp_path):
    save_adapter(tmp_path, target_modules=["q_proj"])
    torch.save(make_model("llama").state_dict(), tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"safetensors"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_no_weight_can_hold_is_refused(tmp_path):
    save_adapter(tmp_path, target_modules=["q_proj"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter"):
        merge_adapter(tmp_path / "prompt", tmp_path / "merged")


def test_orpo_train_says_before_training_that_it_could_not_merge(tmp_path):
    save_adapter(tmp_path, target_modules=["q_proj"])
    (tmp_path / "out" / "merged").mkdir(parents=True)
    (tmp_path / "out" / "merged" / "mine.txt").write_text("mine")
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    names = {"model_name_or_path": "base", "dataset_name": "pairs.jsonl", "output_dir": "out"}
    line = " ".join(f"--{option} {tmp_path / name}" for option, name in names.items())
    with pytest.raises(ValueError, match="merged is not empty"):
        train.main([*line.split(), "--use_peft", "--merge_adapter", "--use_cpu"])


def test_a_link_to_an_empty_folder_is_where_it_leads(tmp_path):
    save_adapter(tmp_path, target_modules=["q_proj"])
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    merge_adapter(tmp_path / "adapter", tmp_path / "link")
    assert (tmp_path / "disk" / "model.safetensors").is_file() and (tmp_path / "link").is_symlink()
