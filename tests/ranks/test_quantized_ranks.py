"""A LoRA on a model of 4 bits on two ranks has the losses, metrics and adapter of one process."""

import importlib.util

import pytest
import run_ranks
import torch
from run_forked import returned
from safetensors.torch import load_file
from tiny import make_model, make_tokenizer
from torch.distributed.tensor import DTensor

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs pip install bitsandbytes"
)


def train(folder, model, fsdp, resume=None):
    """Three steps and evaluations of a LoRA on the layers of the folder `model`, in 4 bits."""
    from transformers import BitsAndBytesConfig

    # FSDP cuts weights of one dtype: the packed ones are stored in that of the others.
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.float32)
    trainer, _ = run_ranks.make_trainer(
        folder,
        model=str(model),
        lora={"target_modules": ["q_proj", "down_proj"], "init_lora_weights": True},
        model_init_kwargs={"quantization_config": four},
        learning_rate=0.5,
        # Without momentum there is no state of an optimizer for torch to read back under FSDP.
        optim_args="momentum=0.9",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=2,
        fsdp=fsdp,
    )
    kinds = {type(module).__name__ for module in trainer.model.modules()}
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "export"))
    log = [
        {name: entry[name] for name in entry if name in ("loss", "eval_loss")} for entry in trainer.state.log_history
    ]
    packed = [module.weight for module in trainer.model.modules() if type(module).__name__ == "Linear4bit"]
    cut = len(packed) > 0 and all(isinstance(weight, DTensor) for weight in packed)
    return {"log": [entry for entry in log if entry], "quantized": "Linear4bit" in kinds, "cut": cut}


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_ranks_train_what_one_process_does(fsdp, tmp_path):
    make_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    one = returned(train, 1, tmp_path / "one", tmp_path / "model", False)[0]
    two = returned(train, 2, tmp_path / "two", tmp_path / "model", fsdp)
    assert one["quantized"] and all(rank["quantized"] for rank in two)
    assert not one["cut"] and all(rank["cut"] == fsdp for rank in two)
    assert len(one["log"]) == 6 and one["log"][0] != one["log"][2]
    for mine, wanted in zip(two[0]["log"], one["log"], strict=True):
        assert mine == pytest.approx(wanted, rel=1e-4)
    adapter, wanted = (load_file(tmp_path / name / "export/adapter_model.safetensors") for name in ("two", "one"))
    assert adapter.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(adapter[name], weight, rtol=1e-3, atol=1e-5)
    again = returned(train, 2, tmp_path / "two", tmp_path / "model", fsdp, str(tmp_path / "two/out/checkpoint-2"))
    assert again[0]["log"][-1] == pytest.approx(two[0]["log"][-1], rel=1e-6)
