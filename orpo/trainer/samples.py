"""Lets the model answer a few held-out prompts at each evaluation."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from orpo.data.streams import counters
from orpo.files import as_json
from orpo.generation import answer_tokens, positions
from orpo.model.encoder_decoder import is_encoder_decoder

FILE = "samples.jsonl"
COLUMNS = ("step", "prompt", "answer", "chosen")


class EvalSamples(TrainerCallback):
    """Writes greedy answers to the first held-out prompts to ``output_dir/samples.jsonl`` and to running trackers.

    A line holds ``step``, ``prompt``, ``answer`` and ``chosen``, with special tokens only in the prompt, and
    ``dataset`` where there are several. Process 0 generates while the others wait; no random state is used. Prompts
    without a token, or without a position left for an answer, are skipped.

    Args:
        trainer: the trainer, whose model answers. Its ``args`` say how many prompts (``eval_samples``) and how long
            (``eval_max_new_tokens``; an answer ends at ``max_length`` too).

    Raises:
        ValueError: FSDP or DeepSpeed has split the weights, or nothing is evaluated.
    """

    def __init__(self, trainer: Any) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "generate_during_eval needs whole weights on one process, which FSDP and DeepSpeed cut up: use it on "
                "one GPU or DDP, and orpo-generate on the saved model otherwise"
            )
        if trainer.eval_dataset is None:
            raise ValueError("generate_during_eval is given without eval_dataset, whose prompts it answers")
        self.trainer = trainer
        self._examples: dict[str | None, list[dict[str, Any]]] = {}
        self._answered: set[tuple[str | None, int]] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Removes samples of another run, and this run's from after the step that it resumes from."""
        self._answered.clear()
        path = Path(args.output_dir, FILE)
        if not state.is_world_process_zero or not path.exists():
            return
        # Not splitlines, which also ends lines at U+2028, which answers may hold. "replace", since a killed run may
        # have written half a character: strict reading would fail at every attempt to resume.
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if state.global_step else []
        kept = [line for line in lines if _step_of(line) <= state.global_step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for name, data in self._evaluated(metrics or {}).items():
            # orpo-train evaluates once more at the end; where the best weights were loaded, it is another model.
            if (name, state.global_step) in self._answered and not args.load_best_model_at_end:
                continue
            self._answered.add((name, state.global_step))
            records = self._answer(name, data)
            for record in records:
                record["step"] = state.global_step
            path = Path(args.output_dir, FILE)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(as_json(record) + "\n" for record in records)
            title = "samples" if name is None else f"samples/{name}"
            rows = [[record[column] for column in COLUMNS] for record in records]
            report_table(self.trainer.callback_handler.callbacks, title, rows, state.global_step)

    def _evaluated(self, metrics: dict[str, float]) -> dict[str | None, Any]:
        """The data set of `metrics`: several are evaluated and reported one by one."""
        data = self.trainer.eval_dataset
        parts = data if isinstance(data, dict) else {None: data}
        return {k: v for k, v in parts.items() if ("eval_loss" if k is None else f"eval_{k}_loss") in metrics}

    def _answer(self, name: str | None, data: Any) -> list[dict[str, Any]]:
        args, tokenizer = self.trainer.args, self.trainer.processing_class
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if name not in self._examples:
            self._examples[name] = list(islice(iter(data), args.eval_samples))
            for counter in counters(data):
                # Forget these counts: what was read here is no part of an evaluation.
                counter.take()
        examples = self._examples[name]
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        # A prompt without a token has nothing to continue, and answer_tokens refuses one that fills all positions
        # (rotary models train beyond them): its error would end the training.
        examples = [e for e in examples if 0 < e["chosen_prompt_length"] < positions(model)]
        prompts = [list(e["chosen_input_ids"][: e["chosen_prompt_length"]]) for e in examples]
        longest = max(map(len, prompts), default=0)
        # An encoder-decoder's answer shares no row with its prompt.
        whole = args.max_length is None or is_encoder_decoder(model)
        room = args.eval_max_new_tokens if whole else args.max_length - longest
        with self.trainer.compute_loss_context_manager():
            answers = answer_tokens(
                model, tokenizer, prompts, max_new_tokens=max(min(args.eval_max_new_tokens, room), 1)
            )
        records = []
        for example, prompt, answer in zip(examples, prompts, answers, strict=True):
            chosen = example["chosen_input_ids"][len(prompt) :]
            record = {
                "step": 0,
                "prompt": tokenizer.decode(prompt),
                # A plain str: trackers do not know Answer.
                "answer": str(answer),
                "chosen": tokenizer.decode(chosen, skip_special_tokens=True),
            }
            records.append(record if name is None else {**record, "dataset": name})
        return records


def _step_of(line: str) -> float:
    """The step at which a line was written; infinity for a line that a killed run left unfinished."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


def report_table(callbacks: list[Any], title: str, rows: list[list[Any]], step: int) -> None:
    """Shows `rows` of ``COLUMNS`` in TensorBoard (as Markdown), Weights & Biases and Trackio, where they run."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(title, _markdown(rows), step)
        elif isinstance(callback, WandbCallback) and callback._wandb.run is not None:
            table = callback._wandb.Table(columns=list(COLUMNS), data=rows)
            callback._wandb.log({title: table, "train/global_step": step})
        elif isinstance(callback, TrackioCallback) and callback._initialized:
            table = callback._trackio.Table(columns=list(COLUMNS), data=rows)
            callback._trackio.log({title: table, "train/global_step": step})


def _markdown(rows: list[list[Any]]) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(COLUMNS), ["---"] * len(COLUMNS), *cells])
