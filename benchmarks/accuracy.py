"""How far each implementation is from float64 on the same input.

    python -m benchmarks.run --group accuracy                                       random hidden states
    python -m benchmarks.run --group accuracy --model FOLDER --data pairs.jsonl     and those of a model on real pairs

Hidden states and weight are rounded to the dtype first; float64 then starts from the very same numbers, so that what
is compared is the arithmetic alone. Nothing is timed.
"""

from __future__ import annotations

from pathlib import Path

import torch

from . import results
from .cases import Batch, head_case, make_batch
from .gate import BETA, exact, relative_error
from .measure import default_device
from .peers import PARTS
from .training_data import LONGEST, load, pairs_of

DTYPES = (torch.bfloat16, torch.float32)
PAIRS = 2
# What random hidden states are drawn in front of: real sequence lengths, and a vocabulary three times the other.
RANDOM = (head_case("SmolLM2-135M", 0.5, pairs=PAIRS), head_case("Qwen2.5-0.5B", 0.5))


def batch_of_model(folder: str, data: str | None, count: int = PAIRS, longest: int = LONGEST) -> Batch:
    """The last hidden states of a model on `count` padded pairs, and its head's weight, in float32."""
    model, tokenizer = load(folder)
    rows = pairs_of(data, tokenizer, count, longest)
    sequences = [
        (len(tokenizer(row["prompt"])["input_ids"]), tokenizer(row["prompt"] + row[side])["input_ids"])
        for side in ("chosen", "rejected")
        for row in rows
    ]
    width = max(len(ids) for _, ids in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    labels, nll_labels = torch.full_like(input_ids, -100), torch.full_like(input_ids, -100)
    for s, (prompt, ids) in enumerate(sequences):
        input_ids[s, : len(ids)] = torch.tensor(ids)
        labels[s, prompt : len(ids)] = input_ids[s, prompt : len(ids)]
        nll_labels[s, : len(ids)] = input_ids[s, : len(ids)]
    with torch.no_grad():
        hidden = model.base_model(input_ids=input_ids, attention_mask=(nll_labels != -100).long()).last_hidden_state
    return Batch(hidden.detach(), model.get_output_embeddings().weight.detach(), input_ids, labels, nll_labels)


def in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch on the device that is measured, its floating-point tensors rounded to `dtype`."""
    tensors = batch.hidden.detach().to(dtype), batch.weight.detach().to(dtype)
    return Batch(*(t.to(default_device()) for t in (*tensors, batch.input_ids, batch.labels, batch.nll_labels)))


def errors(batch: Batch, names: list[str]) -> list[dict[str, object]]:
    """One record for each peer: relative errors of loss, dX and dW, the largest of a mean log-probability in nats."""
    truth, dx, dw = exact(batch)
    records = []
    for name in names:
        try:
            loss, logps = PARTS[name](batch.requiring_grad(), BETA)
            loss.backward()
        except Exception as problem:
            # A peer may not run in this dtype: that is a result, and it is reported.
            records.append({"peer": name, "status": f"failed: {type(problem).__name__}"})
            continue
        figures = {
            "error_loss": relative_error(loss, truth.loss),
            "error_logps": (logps.detach().double() - truth.mean_logp_S).abs().max().item(),
            "error_dx": relative_error(batch.hidden.grad, dx),
            "error_dw": relative_error(batch.weight.grad, dw),
        }
        records.append({"peer": name, "status": "measured", **figures})
    return records


def run(names: list[str], model: str | None = None, data: str | None = None) -> None:
    """Measure, store and print every input in every dtype."""
    inputs = [(case.name, "random", make_batch(case, torch.float32)) for case in RANDOM]
    if model:
        pairs = "/".join(Path(data).parts[-2:]) if data else "random words"
        inputs.append((Path(model).name, f"hidden states of {pairs}", batch_of_model(model, data)))
    for head, source, batch in inputs:
        for dtype in DTYPES:
            torch.compiler.reset()
            shape = {
                "head": head,
                "data": source,
                "pairs": len(batch.labels) // 2,
                "positions": batch.labels.shape[1],
                "V": batch.weight.shape[0],
                "dtype": str(dtype).removeprefix("torch."),
            }
            records = [{**shape, "kind": "accuracy", **r} for r in errors(in_dtype(batch, dtype), names)]
            results.append("accuracy", records)
            print(f"{head}, {source}, {shape['dtype']}")
            for r in records:
                figures = [f"{v:.1e}" for k, v in r.items() if k.startswith("error_")]
                print(f"  {r['peer']:28s} {'  '.join(figures) or r['status']}", flush=True)
