"""Three steps of TRL's ORPOTrainer in a folder; with a second word, with the patch."""

import json
import sys
from pathlib import Path

from material import counted, steps_of, write_material


def main(folder: Path, fused: bool) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    import orpo.integrations.trl as integration

    write_material(folder)
    if fused:
        integration.patch()
    settings = {"max_steps": 3, "logging_steps": 1, "save_steps": 3, "learning_rate": 1e-3, "use_cpu": True}
    args = ORPOConfig(
        output_dir=str(folder / "out"), per_device_train_batch_size=2, bf16=False, report_to="none", **settings
    )
    trainer = ORPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        args,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        train_dataset=load_dataset(
            "json", data_files=str(folder / "pairs.jsonl"), split="train", cache_dir=str(folder / "cache")
        ).remove_columns("prompt"),
    )
    with counted() as calls:
        trainer.train()
    assert calls == ([1, 1, 1] if fused else []), calls
    (folder / "steps.json").write_text(json.dumps(steps_of(folder / "out" / "checkpoint-3")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "fused" in sys.argv[2:])
