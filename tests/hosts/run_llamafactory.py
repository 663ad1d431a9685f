"""Three steps of LLaMA-Factory's ``pref_loss: orpo`` in a folder; with a second word, with the patch."""

import json
import sys
from pathlib import Path
from types import ModuleType

from material import counted, steps_of, write_material

# PyPI's builds load libraries of CUDA; no audio is read here.
sys.modules["torchaudio"] = ModuleType("torchaudio")


def main(folder: Path, fused: bool) -> None:
    from llamafactory.train.tuner import run_exp

    write_material(folder)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    rows = [
        {"conversations": row["chosen"][:1], "chosen": row["chosen"][1], "rejected": row["rejected"][1]} for row in rows
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    about = {"file_name": "pairs.json", "formatting": "sharegpt", "ranking": True, "tags": tags}
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": {**about, "columns": columns}}))
    settings = {
        "stage": "dpo",
        "pref_loss": "orpo",
        "pref_beta": 0.1,
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": str(folder / "model"),
        "dataset": "pairs",
        "dataset_dir": str(folder),
        "template": "chatml",
        "cutoff_len": 128,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "logging_steps": 1,
        "save_steps": 3,
        "output_dir": str(folder / "out"),
        "overwrite_cache": True,
        "report_to": "none",
        "use_cpu": True,
        "seed": 0,
    }
    if fused:
        from orpo.integrations import llamafactory

        llamafactory.patch()
    with counted() as calls:
        run_exp(settings)
    assert calls == ([1, 1, 1] if fused else []), calls
    (folder / "steps.json").write_text(json.dumps(steps_of(folder / "out" / "checkpoint-3")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "fused" in sys.argv[2:])
