"""No file that a run leaves holds an access token."""

import copy
import json
import pickle
from concurrent.futures import Future

import peft
import pytest
import torch
import transformers.trainer
from tiny import SEVEN, make_model, make_tokenizer
from trainers import make_args

from orpo import ORPOTrainer

SECRET = "hf_secretsecretsecret"


def holding_it(folder):
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("adapted", [False, True], ids=["", "adapter"])
def test_a_run_leaves_no_token_in_any_file(adapted, tmp_path, monkeypatch):
    """A stand-in for the hub's client: nothing leaves this machine."""
    seen = []

    class Hub:
        def create_repo(self, name, **options):
            seen.append(options["token"])
            return type("Repo", (), {"repo_id": name})

        def upload_folder(self, **options):
            seen.append(options["token"])
            assert not holding_it(tmp_path)
            done = Future()
            done.set_result(None)
            return done

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    make_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    settings = {
        "hub_token": SECRET,
        "hub_model_id": "me/tuned",
        "push_to_hub": True,
        "hub_strategy": "all_checkpoints",
        "model_init_kwargs": {"token": SECRET, "dtype": "float32"},
        "report_to": "tensorboard",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM") if adapted else None
    args = make_args(tmp_path / "out", **settings)
    trainer = ORPOTrainer(str(tmp_path / "base"), args, train_dataset=SEVEN, peft_config=config)
    trainer.train()
    trainer.save_model()
    trainer.push_to_hub()
    assert len(seen) > 2 and set(seen) == {SECRET}
    assert list((tmp_path / "runs").rglob("events*"))
    assert not holding_it(tmp_path)
    assert args.hub_token == SECRET and args.model_init_kwargs["token"] == SECRET
    saved = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert saved.hub_token is None and saved.model_init_kwargs == {"dtype": "float32"} and saved.beta == args.beta


def test_copies_in_memory_are_whole(tmp_path):
    args = make_args(tmp_path, hub_token=SECRET, model_init_kwargs={"token": SECRET, "use_auth_token": True})
    for twin in (copy.copy(args), copy.deepcopy(args)):
        assert twin.__dict__.keys() == args.__dict__.keys()
        assert twin.hub_token == twin.model_init_kwargs["token"] == SECRET
    assert copy.deepcopy(args).model_init_kwargs is not args.model_init_kwargs
    assert SECRET not in json.dumps(args.to_dict()) and SECRET.encode() not in pickle.dumps(args)
    # No secret: the token that is logged in.
    assert pickle.loads(pickle.dumps(args)).model_init_kwargs == {"use_auth_token": True}
