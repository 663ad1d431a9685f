"""Models that see images, by name, on rows of text; rows that hold images."""

import peft
import pytest
import torch
from tiny import ROWS, SEVEN, SMALL, make_tokenizer
from trainers import logged, make_args
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from orpo import ORPOTrainer
from orpo.data.prepare import Limits, prepare_dataset
from orpo.generation import generate, load
from orpo.merge import merge_adapter


@pytest.fixture
def folder(tmp_path):
    text = {name: value for name, value in SMALL.items() if name != "head_dim"}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    ids = {"image_token_id": 390, "video_token_id": 391, "vision_start_token_id": 392, "vision_end_token_id": 393}
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=vision, **ids)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapter"])
def test_a_model_that_sees_images_trains_on_text_by_name(adapted, folder, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM") if adapted else None
    trainer = ORPOTrainer(str(folder), make_args(tmp_path / "out"), train_dataset=SEVEN, peft_config=config)
    trainer.train()
    trainer.save_model()
    assert len(logged(trainer, "loss")) == 2
    model, tokenizer = load(str(tmp_path / "out"), device="cpu")
    assert isinstance(model.get_base_model() if adapted else model, Qwen2_5_VLForConditionalGeneration)
    answers = generate(trainer.model, tokenizer, ["hello"], max_new_tokens=4)
    assert generate(model, tokenizer, ["hello"], max_new_tokens=4) == answers
    if adapted:
        merged = merge_adapter(tmp_path / "out", tmp_path / "merged")
        assert generate(merged, tokenizer, ["hello"], max_new_tokens=4) == answers


@pytest.mark.parametrize(("column", "value"), [("images", [{"path": "a.png"}]), ("image", "a.png")])
def test_a_row_with_an_image_is_refused(column, value):
    with pytest.raises(ValueError, match=f"something in its column '{column}': only text is trained"):
        prepare_dataset([{**ROWS[0], column: value}], make_tokenizer(), Limits(), report=print)


@pytest.mark.parametrize(("column", "value"), [("images", []), ("image", None), ("image", "")])
def test_a_row_without_its_image_is_text(column, value):
    rows = [{**row, column: value} for row in ROWS]
    assert len(prepare_dataset(rows, make_tokenizer(), Limits(), report=print)) == len(ROWS)
