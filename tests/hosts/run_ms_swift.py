"""Three steps of ms-swift's ``rlhf_type: orpo`` in a folder; with a second word, with the plugin."""

import json
import sys
from pathlib import Path

from material import counted, steps_of, write_material


def main(folder: Path, fused: bool) -> None:
    from swift import rlhf_main

    write_material(folder)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    rows = [{"messages": row["chosen"], "rejected_response": row["rejected"][1]["content"]} for row in rows]
    (folder / "swift.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings = {
        "rlhf_type": "orpo",
        "model": folder / "model",
        "model_type": "llama",
        "template": "chatml",
        "dataset": folder / "swift.jsonl",
        "tuner_type": "full",
        "torch_dtype": "float32",
        "max_length": 128,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "logging_steps": 1,
        "save_steps": 3,
        "output_dir": folder / "out",
        "add_version": "false",
        "report_to": "none",
        "split_dataset_ratio": 0,
        "seed": 0,
    }
    if fused:
        (folder / "plugin.py").write_text("import orpo.integrations.ms_swift as fused\n\nfused.patch()\n")
        settings["external_plugins"] = folder / "plugin.py"
    with counted() as calls:
        rlhf_main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    assert calls == ([1, 1, 1] if fused else []), calls
    (folder / "steps.json").write_text(json.dumps(steps_of(folder / "out" / "checkpoint-3")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "fused" in sys.argv[2:])
