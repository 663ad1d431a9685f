"""Three steps of axolotl's ``rl: orpo`` in a folder; with a second word, with the plugin."""

import json
import os
import sys
from pathlib import Path

from material import counted, steps_of, write_material

os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "ACCELERATE_USE_CPU": "true"}


def main(folder: Path, fused: bool) -> None:
    from axolotl.cli.train import do_cli

    write_material(folder)
    config = {
        "base_model": str(folder / "model"),
        "rl": "orpo",
        "orpo_alpha": 0.1,
        "remove_unused_columns": False,
        "chat_template": "tokenizer_default",
        "datasets": [{"path": str(folder / "pairs.jsonl"), "ds_type": "json", "type": "chat_template.argilla"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "sequence_len": 128,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "num_epochs": 1,
        "learning_rate": 1e-3,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "logging_steps": 1,
        "save_steps": 3,
        "output_dir": str(folder / "out"),
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "sample_packing": False,
        "seed": 0,
        **({"plugins": ["orpo.integrations.axolotl.FusedORPO"]} if fused else {}),
    }
    # YAML's are a superset of JSON's words.
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    with counted() as calls:
        do_cli(str(path))
    assert calls == ([1, 1, 1] if fused else []), calls
    (folder / "steps.json").write_text(json.dumps(steps_of(folder / "out" / "checkpoint-3")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "fused" in sys.argv[2:])
