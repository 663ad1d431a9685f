"""For several ranks: settings of accelerate, outputs that FSDP does not round, and results that all ranks agree on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.utils import broadcast_object_list, gather_object, recursively_apply
from torch import nn


def prepare_ranks(accelerator: Accelerator, model: nn.Module) -> None:
    """Sets what a run on several ranks needs of accelerate; refuses what would hang or fail later.

    Raises:
        ValueError: ``even_batches`` is off, ranks would share a sequence or a matmul, or FSDP cannot split the model
            or its adapter.
    """
    refuse_parallel(accelerator.parallelism_config)
    gather_rows_once(accelerator)
    if accelerator.num_processes > 1 and not accelerator.even_batches:
        raise ValueError(
            f"accelerator_config: even_batches is False, and {accelerator.num_processes} ranks may have different "
            "numbers of batches, of which those with more would wait for ever: leave it True; with "
            "dataloader_drop_last no rows are repeated"
        )
    if fsdp_plugin(accelerator) is not None and _copied_from_embeddings(model):
        raise ValueError(
            'modules_to_save=["lm_head"] copies a head that is tied to the embeddings, and FSDP cannot cut a weight '
            "that two of its groups share: train the head by LoRA (target_modules with lm_head), or use ddp or zero2"
        )
    if _waits_for_weights(accelerator) and _adapted_beside_embeddings(model):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading ties the head to the embeddings once more after it has cut them, which a "
            "LoRA on a tied head does not allow: set it false, or leave lm_head out of target_modules"
        )
    if _waits_for_weights(accelerator) and (buffers := _saved_buffers(model)):
        raise ValueError(
            f"fsdp_cpu_ram_efficient_loading hands out parameters alone, and the model keeps {', '.join(buffers[:3])} "
            "beside them: set it false"
        )
    if fsdp_plugin(accelerator) is not None and _shares_embeddings(model):
        keep_in_one_group(accelerator)
    keep_outputs_exact(accelerator)


def launched_with(parallel: ParallelismConfig | None) -> ParallelismConfig | None:
    """`parallel`; for None what ``accelerate launch`` asks for, where that cuts matmuls."""
    if parallel is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        # Other sizes are for accelerate alone, which finds them itself.
        return asked if (asked := ParallelismConfig()).tp_size > 1 else None
    return parallel


def refuse_parallel(parallel: ParallelismConfig | None) -> None:
    """Refuses ranks that share a sequence, and copies of a model of which each is cut in matmuls.

    Raises:
        ValueError: ``cp_size`` or ``sp_size`` is more than 1, or ``tp_size`` and ``dp_replicate_size`` are.
    """
    for name in ("cp_size", "sp_size"):
        if parallel is not None and getattr(parallel, name) > 1:
            loop = " (a loop of your own may cut sequences: orpo_loss(cp_group=))"
            raise ValueError(
                f"parallelism_config: {name} is {getattr(parallel, name)}, and each rank has whole sequences "
                f"here{loop}: leave it 1, and cut the model by FSDP (dp_shard_size, dp_replicate_size) or its matmuls "
                "(tp_size)"
            )
    if parts_of_a_matmul(parallel) > 1 and parallel.dp_replicate_size > 1:
        raise ValueError(
            f"parallelism_config: tp_size is {parallel.tp_size} and dp_replicate_size {parallel.dp_replicate_size}, "
            "and copies of a model that is cut in matmuls are not trained here: leave dp_replicate_size 1, and set "
            "dp_shard_size"
        )


def parts_of_a_matmul(parallel: ParallelismConfig | None) -> int:
    """Over how many ranks each matmul is cut: they read the same rows."""
    return 1 if parallel is None else parallel.tp_size


def data_ranks(parallel: ParallelismConfig | None, ranks: int) -> int:
    """How many of `ranks` read rows of their own: by them gradients are averaged, and the pairs of a step counted."""
    return ranks // parts_of_a_matmul(parallel)


def gather_rows_once(accelerator: Accelerator) -> None:
    """Lets ``accelerator.gather`` take the rows of ranks that share a matmul once; it would count them for each."""
    parts, gather = parts_of_a_matmul(accelerator.parallelism_config), accelerator.gather
    if parts == 1:
        return

    def once(rows: torch.Tensor) -> torch.Tensor:
        # A number of each rank is gathered as a row. Ranks of one group are neighbours.
        own = max(rows.shape[0] // accelerator.num_processes, 1)
        return rows.unflatten(0, (-1, parts, own))[:, 0].flatten(0, 1)

    accelerator.gather = lambda tensor: recursively_apply(once, gather(tensor))


def read_by_each_rank(config: Any, ranks: int) -> None:
    """Sets ``dispatch_batches`` of accelerate's `config` to False; its default is True for streams.

    Raises:
        ValueError: it is set to True, and there are several `ranks`.
    """
    if config.dispatch_batches and ranks > 1:
        raise ValueError(
            "accelerator_config: dispatch_batches is True, which cuts a batch of one rank by its first dimension; the "
            "rows of pairs have others: leave it out, and every rank reads its own"
        )
    config.dispatch_batches = False


def refuse_other_streams(accelerator: Accelerator, first: Callable[[], Any]) -> None:
    """Refuses a stream of which ranks read other rows: each takes its part of every batch of one order.

    Args:
        first: gives the first pair that this rank reads, or None where the data is no stream.

    Raises:
        ValueError: the ranks do not begin with the same pair.
    """
    if accelerator.num_processes == 1 or (pair := first()) is None:
        return
    if any(other != pair for other in gather_object([pair])):
        raise ValueError(
            "the ranks read the stream in different orders, and rows would be lost or trained on twice: give each rank "
            "the whole stream (without split_dataset_by_node), and its shuffle a seed"
        )


def _waits_for_weights(accelerator: Accelerator) -> bool:
    """Whether ranks other than the first get their weights only when FSDP splits the model."""
    plugin = fsdp_plugin(accelerator)
    return plugin is not None and plugin.fsdp_version >= 2 and plugin.cpu_ram_efficient_loading


def _adapted_beside_embeddings(model: nn.Module) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer = getattr(base.get_output_embeddings(), "base_layer", None)
    return layer is not None and layer.weight is base.get_input_embeddings().weight


def describe_ranks(accelerator: Accelerator) -> str | None:
    """How many ranks there are, on what, and what each holds; None for one process."""
    ranks, device = accelerator.num_processes, accelerator.device
    if ranks == 1:
        return None
    plugin, part = fsdp_plugin(accelerator), f"1/{ranks}"
    if plugin is not None:
        parallel = accelerator.parallelism_config
        copies = parallel.dp_replicate_size if parallel is not None else 1
        how = f"FSDP{plugin.fsdp_version}" if copies == 1 else f"HSDP, {copies} copies"
        holds = f"1/{ranks // copies} of weights, gradients and optimizer states"
    elif (deepspeed := accelerator.state.deepspeed_plugin) is not None:
        how = f"ZeRO-{deepspeed.zero_stage}"
        cut = ["optimizer states", "gradients", "weights"][: deepspeed.zero_stage]
        holds = f"{part} of {' and '.join(cut)}" + (", and the rest whole" if len(cut) < 3 else "")
    elif (parts := parts_of_a_matmul(accelerator.parallelism_config)) > 1:
        shards = ranks // parts
        how = "tensor parallel" if shards == 1 else f"FSDP2 over {shards} x tensor parallel over {parts}"
        holds = f"{part} of the matmuls' weights"
    else:
        how, holds = "DDP", "the whole model"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{ranks} ranks ({name}), {how}: each holds {holds}"


def keep_in_one_group(accelerator: Accelerator) -> None:
    """Lets accelerate leave embeddings that an encoder and a decoder share to FSDP2's outermost group.

    It would put those of the encoder into a group with the head, and torch refuses a weight that two groups share.
    """
    prepare = accelerator.prepare

    def prepare_without_embeddings(*parts: Any, **options: Any) -> Any:
        with ExitStack() as hidden:
            for part in parts:
                if isinstance(part, nn.Module):
                    for name in ("get_input_embeddings", "get_output_embeddings"):
                        hidden.callback(part.__dict__.pop, name)
                        part.__dict__[name] = lambda: None
            return prepare(*parts, **options)

    accelerator.prepare = prepare_without_embeddings


def _saved_buffers(model: nn.Module) -> list[str]:
    saved = model.state_dict()
    return [name for name, _ in model.named_buffers() if name in saved]


def _shares_embeddings(model: nn.Module) -> bool:
    """Whether other modules than the head, which accelerate knows, have the input embeddings' weight."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    weight = getattr(embeddings, "weight", None)
    if weight is None:
        return False
    # A head wrapped by an adapter holds the model's own head: both are known.
    known = {id(part) for module in (embeddings, head) if module is not None for part in module.modules()}
    return any(getattr(part, "weight", None) is weight and id(part) not in known for part in base.modules())


def _copied_from_embeddings(model: nn.Module) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    original = getattr(base.get_output_embeddings(), "original_module", None)
    embeddings = base.get_input_embeddings()
    embeddings = getattr(embeddings, "original_module", embeddings)
    return original is not None and original.weight is embeddings.weight


def keep_outputs_exact(accelerator: Accelerator) -> None:
    """Keeps the loss and its metrics in float32 under FSDP2 in mixed precision, and sums gradients in float32.

    accelerate's policy casts what the model returns to bfloat16: a loss of 6.1754 would be logged as 6.1719.
    """
    plugin = fsdp_plugin(accelerator)
    if plugin is None or plugin.fsdp_version < 2 or plugin.mixed_precision_policy is None:
        return
    plugin.mixed_precision_policy = dataclasses.replace(
        plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
    )


def agreed(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """What `function` returns; under FSDP what it returns on rank 0, where alone there may be weights yet."""
    return function() if fsdp_plugin(accelerator) is None else from_rank_0(accelerator, function)


def from_rank_0(accelerator: Accelerator | PartialState, function: Callable[[], Any]) -> Any:
    """Calls `function` on rank 0 only, and returns its result on all ranks.

    An error is raised on all ranks too: the others would wait for ever.
    """
    if accelerator.num_processes == 1:
        return function()
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = error
    result, error = broadcast_object_list(answer)
    if error is not None:
        raise error
    return result


def from_each_rank(function: Callable[[], Any]) -> list[tuple[Any, str | None]]:
    """Calls `function`, which waits for no other rank, on every rank.

    Returns:
        On all ranks, for each rank: (what `function` returned, None), or (None, the error that it raised, in words).
    """
    try:
        mine = (function(), None)
    except Exception as error:
        text = "; ".join([str(error), *getattr(error, "__notes__", ())])
        mine = (None, f"{type(error).__name__}: {text}")
    return gather_object([mine])


def fsdp_plugin(accelerator: Accelerator) -> Any:
    """accelerate's settings of FSDP, or None where it is not in use."""
    return getattr(accelerator.state, "fsdp_plugin", None)
