"""``orpo-train --check_ranks`` in the processes that run_forked starts, each in a folder of its own or a common one."""

import contextlib
import io
import json
import os
import warnings

import datasets
import torch
from run_ranks import let_accelerate_shard_on_cpu
from tiny import ROWS, make_model, make_tokenizer

from orpo import ORPOTrainer
from orpo.layouts.batch import Counts, pair_batch
from orpo.train import main

# What accelerate's launcher sets where it is given fsdp2.yaml.
FSDP2 = {
    **{"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"},
    **{"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    **{"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_OFFLOAD_PARAMS": "false"},
}


def place(folder, *, model_seed=0, rows=ROWS, layers=4):
    """Makes in `folder` what a rank sees: a model, and the file of pairs unless `rows` is None."""
    folder.mkdir()
    make_model("llama", seed=model_seed, num_hidden_layers=layers, tie_word_embeddings=False).save_pretrained(
        folder / "model"
    )
    make_tokenizer().save_pretrained(folder / "model")
    if rows is not None:
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def counts_of_this_rank(self, batch_samples, device):
    """A mistake: the ranks do not add up what they count."""
    return Counts(*torch.tensor([pair_batch(sample).counts for sample in batch_samples]).sum(0).tolist())


def check(folder, places, words, fsdp=False, mistake=False):
    """(exit status, what is printed, what lies in the rank's folder afterwards) of the command on a rank.

    Args:
        places: the folder in which each rank runs.
        words: options, beside those that every check here has.
    """
    rank = int(os.environ.get("RANK", 0))
    os.chdir(places[rank])
    datasets.config.HF_DATASETS_CACHE = folder / f"cache-{rank}"
    if fsdp:
        let_accelerate_shard_on_cpu()
        os.environ |= FSDP2
    if mistake:
        ORPOTrainer._get_num_items_in_batch = counts_of_this_rank
    options = ["--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--output_dir", "out/run"]
    settings = ["--use_cpu", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    printed, status = io.StringIO(), 0
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            main([*options, *settings, "--check_ranks", *words])
        except SystemExit as end:
            status = end.code
    return status, printed.getvalue(), sorted(os.listdir("."))
