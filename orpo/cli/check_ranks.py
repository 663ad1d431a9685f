"""``orpo-train --check_ranks``: does every rank see what the run needs, and do the ranks add up to one process?"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from itertools import islice
from typing import Any

import datasets
from accelerate import PartialState
from transformers import set_seed

from orpo.cli.arguments import DataArguments, ModelArguments
from orpo.cli.rank_facts import data_facts, differences, model_facts
from orpo.cli.run import check_settings
from orpo.model.adapters import adapter_folder, read_config
from orpo.model.small_copy import load_small_copy
from orpo.ranks import from_each_rank
from orpo.runs.disk import check_writable
from orpo.runs.lock import blind_ranks
from orpo.trainer.compared_step import compare_step
from orpo.trainer.config import ORPOConfig
from orpo.trainer.start import check_start, find_tokenizer
from orpo.trainer.tensor_parallel import refuse_part
from orpo.trainer.zero3 import is_zero_3

# Rows of which the pairs of a few steps are made, since some may be left out: at least, and in batches of all ranks.
LEAST_ROWS, BATCHES = 64, 12
# Facts of the model or the data that are printed where all is well.
SHOWN = 4


class _Report:
    """Prints a line for each check on rank 0, and knows whether all went well."""

    def __init__(self, state: PartialState) -> None:
        self.state, self.well = state, True

    def say(self, name: str, problems: list[str], otherwise: str) -> None:
        self.well = self.well and not problems
        if self.state.is_main_process:
            for text in problems or [otherwise]:
                print(f"{'FAILED' if problems else 'ok':<7}{name}: {text}", flush=True)


def check_ranks(model_args: ModelArguments, data_args: DataArguments, args: ORPOConfig) -> bool:
    """Whether the ranks can train, with a line for each check on rank 0. Call it while ``output_dir`` is locked.

    Compared are the model's files, the rows, and whether all see what rank 0 writes in ``output_dir``; then a few
    layers of the model take a step on all ranks, and in one process.

    Raises:
        ValueError: the settings do not go together, or the trainer refuses them, the model or the rows.
    """
    state = PartialState()
    report, ranks = _Report(state), state.num_processes
    args.model_init_kwargs = {**model_args.init_kwargs(), **(args.model_init_kwargs or {})}
    if is_zero_3(args):
        raise ValueError(
            "check_ranks compares a step with that of one process, which has no whole model under ZeRO-3: check the "
            "ranks with --print-config zero2 or fsdp2"
        )
    evaluates = check_settings(model_args, data_args, args)
    refuse_part(args, "and --check_ranks compares with a model that one process holds")
    if state.is_main_process:
        alone = "one process, which has no ranks to agree with" if ranks == 1 else f"{ranks} ranks"
        print(f"check_ranks: {alone}, on {state.device.type}", flush=True)
    name, options = model_args.model_name_or_path, {"trust_remote_code": args.trust_remote_code}
    options |= args.model_init_kwargs

    def facts_of_data() -> dict[str, str]:
        facts = data_facts("training set", data_args.dataset_name, data_args.train_pairs())
        if evaluates:
            held_out = data_args.eval_dataset_name or data_args.dataset_name
            facts |= data_facts("evaluation set", held_out, data_args.held_out_pairs())
        return facts

    _compare(report, "model", lambda: model_facts(name, **options))
    _compare(report, "data", facts_of_data)
    _check_disk(report, args)
    if not report.well:
        report.say("step", ["not tried, since the ranks do not see the same"], "")
        return False
    _check_step(report, model_args, data_args, args, options)
    return report.well


def _compare(report: _Report, name: str, facts: Callable[[], dict[str, str]]) -> None:
    found = from_each_rank(facts)
    problems = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error is not None]
    seen = [given for given, error in found if error is None]
    problems += differences(seen) if not problems else []
    said = [f"{what} {fact}" for what, fact in (seen[0] if seen else {}).items()]
    more = [f"{len(said) - SHOWN} more"] if len(said) > SHOWN else []
    report.say(name, problems, f"every rank sees the same: {'; '.join(said[:SHOWN] + more)}")


def _check_disk(report: _Report, args: ORPOConfig) -> None:
    folder, ranks = args.output_dir, range(report.state.num_processes)
    blind = [] if args.save_on_each_node else blind_ranks(folder)
    problems = [f"rank {rank} does not see in output_dir {folder} the file that rank 0 has written" for rank in blind]
    if not problems:
        # On a disk of its own, the folder that this makes is removed with the lock.
        errors = from_each_rank(lambda: check_writable(folder))
        problems = [f"rank {rank}: {errors[rank][1]}" for rank in ranks if errors[rank][1] is not None]
    own = "every node has its own (save_on_each_node)" if args.save_on_each_node else "all ranks see the same"
    report.say("disk", problems, f"output_dir {folder}: {own}, and write there")


def _check_step(
    report: _Report, model_args: ModelArguments, data_args: DataArguments, args: ORPOConfig, options: dict[str, Any]
) -> None:
    prepared: list[tuple[str, dict[str, Any]]] = []
    # What ranks do by themselves, apart from what they do together: there, one that fails ends all.
    found = from_each_rank(lambda: prepared.append(_prepare(model_args, data_args, args, options)))
    problems = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(found) if error is not None]
    if problems:
        report.say("step", problems, "")
        return
    how_much, parts = prepared.pop()
    try:
        # What a run says at its start is not asked for here.
        with contextlib.redirect_stdout(io.StringIO()):
            step = compare_step(args=args, **parts)
    except Exception as error:
        error.add_note(f"rank {report.state.process_index}, in the step that --check_ranks tries")
        raise
    ranks = report.state.num_processes
    where = f"{ranks} ranks and in one process" if ranks > 1 else "one rank and in a loop without the trainer"
    norms = "gradient norm {:.7g} and {:.7g}".format(*step.norms)
    if not math.isfinite(step.norms[0]):
        norms = "gradients not compared, since the scale that fp16 begins with is too large"
    said = (
        f"{how_much} on {where}: loss {step.losses[0]:.7g} and {step.losses[1]:.7g}, {norms}; rounding explains a "
        f"difference of {100 * step.tolerance:.2g} %"
    )
    report.say("step", [] if step.agrees else [f"not the same: {said}"], said)
    report.say("sent in a step by each rank", [], step.collectives.describe())


def _prepare(
    model_args: ModelArguments, data_args: DataArguments, args: ORPOConfig, options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """(how much of the model is tried, the arguments of :func:`orpo.trainer.compared_step.compare_step`)."""
    given, peft_config = model_args.model_name_or_path, model_args.peft_config()
    name, _ = check_start(given, args)
    base, folder = given, adapter_folder(given, **options)
    if folder is not None:
        # What the ranks do depends on its shape, not on its weights, nor on whether another is trained on top of it.
        adapter = read_config(folder)
        base, options = adapter.base_model_name_or_path, {**options, "revision": adapter.revision}
        adapter.inference_mode = False
        peft_config = peft_config or adapter
    # Adapters draw their first weights.
    set_seed(args.seed)
    model, how_much = load_small_copy(base, **options)
    rows = BATCHES * args.per_device_train_batch_size * args.world_size
    return how_much, {
        "model": model,
        "data": _first_rows(data_args.train_pairs(), max(LEAST_ROWS, rows)),
        "tokenizer": find_tokenizer(model_args.tokenizer(args), name, args),
        "peft_config": peft_config,
    }


def _first_rows(data: Any, count: int) -> datasets.Dataset:
    if isinstance(data, datasets.IterableDataset):
        return datasets.Dataset.from_list(list(islice(data, count)))
    return data.select(range(min(count, len(data))))
