"""A tiny model and a few pairs in a folder, as a host's own configuration names them."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny import CHATML, ROWS, make_model, make_tokenizer


def write_material(folder: Path) -> None:
    """`model` and `pairs.jsonl` (prompt, chosen, rejected, the latter two as conversations) in `folder`."""
    make_model("llama").save_pretrained(folder / "model")
    tokenizer = make_tokenizer(chat_template=CHATML, eos_token="<|im_end|>", unk_token="<pad>")
    tokenizer.save_pretrained(folder / "model")
    lines = [
        {
            "prompt": row["prompt"],
            **{
                side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
                for side in ("chosen", "rejected")
            },
        }
        for row in ROWS
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def steps_of(checkpoint: Path) -> list[dict[str, float]]:
    """What was logged at each step, as the checkpoint of the last one has it; the machine's own figures left out."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    machine = ("runtime", "per_second", "flos", "epoch", "memory", "tokens", "time")
    return [
        {name: x for name, x in entry.items() if isinstance(x, float) and not any(word in name for word in machine)}
        for entry in history
        if "loss" in entry
    ]


@contextmanager
def counted() -> Iterator[list[int]]:
    """A list that grows with each call of the head for log-probabilities: a patch that does nothing would agree too."""
    from orpo.integrations.logprobs import LogprobCall

    calls, original = [], LogprobCall.of_head

    def of_head(self, *args):
        calls.append(1)
        return original(self, *args)

    LogprobCall.of_head = of_head
    try:
        yield calls
    finally:
        LogprobCall.of_head = original
