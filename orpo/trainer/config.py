"""The settings of a training run: TRL's names and defaults where they concern ORPO, transformers' for the rest."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from orpo_kernels.plan import BACKENDS
from orpo_kernels.settings import LossSettings
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from orpo.data.forms.columns import read_columns
from orpo.data.forms.turns import SCORE_TURNS
from orpo.layouts.batch import NLL_SPANS, NLLSpan
from orpo.layouts.layout import LAYOUTS
from orpo.packages import require
from orpo.ranks import read_by_each_rank
from orpo.tokens.limits import Limits
from orpo.trainer.diagnose import refuse_cut_gradients
from orpo.trainer.ranges import check_ranges, name_nothing
from orpo.trainer.redact import RedactedArguments
from orpo.trainer.tensor_parallel import check_parallel

# Trackers that the tests try. transformers knows more, and checks those itself.
TRACKERS = frozenset({"tensorboard", "trackio", "wandb"})


@dataclass(frozen=True)
class Preset:
    """What `preset` stands for: the weight of the odds-ratio term, and what the NLL scores."""

    beta: float
    nll_span: str
    nll_scores_eos: bool


PRESETS = {
    "trl": Preset(beta=0.1, nll_span="prompt_and_chosen", nll_scores_eos=True),
    "paper": Preset(beta=1.0, nll_span="prompt_and_chosen", nll_scores_eos=False),
    "response_only": Preset(beta=0.1, nll_span="chosen", nll_scores_eos=True),
}


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def older_name(new: str) -> Any:
    """A field with an older name, mapped to `new` with a warning."""
    return field(default=None, metadata={"help": f"Older name, mapped with a warning to {new}."})


@dataclass
class ORPOConfig(RedactedArguments, TrainingArguments):
    """Arguments of :class:`orpo.ORPOTrainer`, on top of ``transformers.TrainingArguments``.

    Four defaults are TRL's rather than transformers': ``learning_rate`` 1e-6, ``logging_steps`` 10,
    ``gradient_checkpointing`` on, ``bf16`` on wherever the accelerator has it (never by itself on a CPU).

    ========================  ===================  ===================  ===================
    ``preset``                trl                  paper                response_only
    ========================  ===================  ===================  ===================
    ``beta``                  0.1                  1.0 (its alpha)      0.1
    ``nll_span``              prompt_and_chosen    prompt_and_chosen    chosen
    ``nll_scores_eos``        yes                  no                   yes
    ========================  ===================  ===================  ===================

    ``beta``, ``nll_span`` and ``nll_scores_eos`` override the preset when they are given.

    Raises:
        ValueError: a setting is out of its range, or two contradict each other.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "columns"]

    learning_rate: float = _setting(1e-6, "The initial learning rate for AdamW.")
    logging_steps: float = _setting(10, "Log every so many optimizer steps; below 1, a fraction of the run.")
    gradient_checkpointing: bool | None = _setting(None, "Recompute activations in backward. Default: yes.")
    bf16: bool | None = _setting(None, "Mixed precision in bfloat16. Default: where an accelerator supports it.")
    logging_nan_inf_filter: bool = _setting(False, "Has to stay off: a loss that is not finite stops the run.")
    remove_unused_columns: bool = _setting(False, "Has to stay off: the collator needs the tokenized columns.")

    preset: str = _setting("trl", "Definitions of the loss: trl, paper or response_only.")
    beta: float | None = _setting(None, "Weight of the odds-ratio term (the paper's lambda). Default: by preset, 0.1.")
    nll_weight: float = _setting(1.0, "Weight of the NLL term.")
    nll_span: str | None = _setting(None, "What the NLL scores: prompt_and_chosen or chosen. Default: by preset.")
    nll_scores_eos: bool | None = _setting(None, "Whether the NLL scores end-of-sequence tokens. Default: by preset.")
    normalization: str = _setting(
        "global",
        "global: the NLL is the mean over all tokens of the optimizer step, on all ranks and in all micro-batches, and "
        "the odds-ratio term over all its pairs. micro_batch: the mean of micro-batch means, as TRL has it.",
    )
    max_length: int | None = _setting(1024, "Most tokens of prompt and answer together.")
    max_prompt_length: int | None = _setting(None, "Prompts of pairs that are too long are cut to this many tokens.")
    max_completion_length: int | None = _setting(None, "Most tokens of an answer.")
    truncation_mode: str = _setting("keep_end", "The part of a cut prompt that stays: keep_end or keep_start.")
    truncation: str = _setting(
        "cut",
        "What becomes of a pair that is too long: cut, or drop, which leaves it out, so that answers keep an end.",
    )
    max_bad_rows: float = _setting(
        0.01, "Largest share of rows that may be malformed: such rows are named and left out, more of them end the run."
    )
    escape_special_tokens: bool = _setting(
        False,
        "Special tokens written out in the rows' text (</s>) stay text. Default: they become those tokens, as in TRL.",
    )
    score_turns: str = _setting(
        "all",
        "Which of the assistant's turns in an answer are scored: all or last. What users and tools say between them is "
        "scored by an NLL that scores the prompt alone.",
    )
    columns: dict | str | None = _setting(  # noqa: RUF009
        None, "Columns that have other names in the data: chosen=good,rejected=bad,prompt=question,system=sys."
    )
    pair_by_prompt: bool = _setting(
        False, "Make pairs of rows of one answer each (prompt, completion, label), as KTO's are: by prompt, in order."
    )
    disable_dropout: bool = _setting(True, "Switch off dropout in the model.")
    padding_value: int | None = _setting(None, "Token id that fills up a batch. Default: the tokenizer's.")
    layout: str = _setting(
        "auto",
        "How a batch is laid out. shared: [prompt | chosen | rejected] in one row; packed: sequences without padding; "
        "padded: one row each; auto: shared (with FlashAttention else packed) if a few pairs score the same as padded "
        "with the model at hand, else padded.",
    )
    logits_budget: int | None = _setting(
        None,
        "Most bytes kept between the logits and their gradient. Default: 1 GiB with Triton; 512 MiB on a CPU, "
        "where a frozen head keeps none.",
    )
    strip_bytes: int | None = _setting(
        None, "Size of one vocabulary strip of recomputed logits, in bytes. Default: 128 MiB, on a CPU 32 MiB."
    )
    async_save: bool = _setting(False, "Training goes on while a checkpoint is written (FSDP2, SHARDED_STATE_DICT).")
    diagnose: bool = _setting(
        False, "Log, for a run that is stable but flat, the gradient norm of each term, delta(d) and separated pairs."
    )
    loss_backend: str | None = _setting(None, "torch or triton. Default: by device.")
    model_init_kwargs: dict | str | None = _setting(None, "Arguments of from_pretrained.")  # noqa: RUF009
    trust_remote_code: bool = _setting(False, "Run Python code that comes with a model.")
    dataset_num_proc: int | None = _setting(None, "Processes that tokenize.")
    generate_during_eval: bool = _setting(
        False, "At each evaluation, write answers to held-out prompts to output_dir/samples.jsonl and to trackers."
    )
    eval_samples: int = _setting(4, "With generate_during_eval: how many prompts, the first of each data set.")
    eval_max_new_tokens: int = _setting(128, "With generate_during_eval: most tokens of an answer.")
    early_stopping_patience: int | None = _setting(
        None, "Stop when metric_for_best_model has not improved for this many evaluations."
    )
    early_stopping_threshold: float = _setting(0.0, "By how much it has to improve to count.")
    is_encoder_decoder: bool | None = _setting(
        None, "Whether what model_init makes is an encoder-decoder; of any other model its config says so."
    )

    evaluation_strategy: str | None = older_name("eval_strategy")
    warmup_ratio: float | None = older_name("warmup_steps, a fraction of the run where it is below 1")
    no_cuda: bool | None = older_name("use_cpu")
    group_by_length: bool | None = older_name("train_sampling_strategy")
    gradient_checkpointing_use_reentrant: bool | None = older_name("activation_checkpointing_kwargs")
    label_pad_token_id: int | None = older_name("nothing: labels are not padded")
    overwrite_output_dir: bool | None = older_name("nothing: resume_from_checkpoint decides")
    save_safetensors: bool | None = older_name("nothing: checkpoints are safetensors")
    logging_dir: str | None = older_name("nothing: set the TENSORBOARD_LOGGING_DIR environment variable")

    def __post_init__(self) -> None:
        self._map_older_names()
        self.columns = read_columns(self.columns)
        name_nothing(self)
        self._resolve_preset()
        self._check()
        check_parallel(self)
        if self.activation_checkpointing is None:
            # Set both names: with the older one alone, transformers warns of a setting that the user did not make.
            self.activation_checkpointing = self.gradient_checkpointing is not False
            self.gradient_checkpointing = self.activation_checkpointing
        if self.bf16 is None:
            self.bf16 = self.bf16_by_default
        elif self.bf16 and not self.use_cpu and not (is_torch_bf16_gpu_available() or is_torch_xla_available()):
            raise ValueError(
                "bf16 is set, and there is no accelerator that has it: on a CPU, add --use_cpu (use_cpu=True)"
            )
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise ValueError(
                "fp16 is set, and there is no accelerator that has it: on a CPU, leave it out, or set bf16"
            )
        for tracker in TRACKERS.intersection(self.report_to):
            require(tracker, f"report_to {tracker}")
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
        read_by_each_rank(self.accelerator_config, self.world_size)

    @property
    def bf16_by_default(self) -> bool:
        """What ``bf16`` is where it is not set."""
        return not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()

    @property
    def limits(self) -> Limits:
        """How long a sequence may be."""
        return Limits(
            self.max_length, self.max_prompt_length, self.max_completion_length, self.truncation_mode, self.truncation
        )

    def nll(self, eos_token_id: int | None) -> NLLSpan:
        """Which tokens of the chosen sequence the NLL scores."""
        return NLLSpan(self.nll_span == "prompt_and_chosen", None if self.nll_scores_eos else eos_token_id)

    def loss_settings(self) -> LossSettings:
        """Settings of the loss that are the same in every step of the run."""
        return LossSettings(
            beta=self.beta,
            nll_weight=self.nll_weight,
            logits_budget=self.logits_budget,
            strip_bytes=self.strip_bytes,
            backend=self.loss_backend,
        )

    def _map_older_names(self) -> None:
        mapped = {
            "evaluation_strategy": ("eval_strategy", self.evaluation_strategy),
            "warmup_ratio": ("warmup_steps", self.warmup_ratio),
            "no_cuda": ("use_cpu", self.no_cuda),
            "group_by_length": ("train_sampling_strategy", "group_by_length" if self.group_by_length else "random"),
            "gradient_checkpointing_use_reentrant": (
                "activation_checkpointing_kwargs",
                {"use_reentrant": self.gradient_checkpointing_use_reentrant},
            ),
        }
        for old, (new, value) in mapped.items():
            if getattr(self, old) is not None:
                self._warn(f"{old} is an older name: use {new}={value!r}")
                setattr(self, new, value)
                setattr(self, old, None)
        for old in ("label_pad_token_id", "overwrite_output_dir", "save_safetensors", "logging_dir"):
            if getattr(self, old) is not None:
                self._warn(f"{old} no longer does anything: leave it out")
                setattr(self, old, None)

    @staticmethod
    def _warn(message: str) -> None:
        warnings.warn(message, FutureWarning, stacklevel=5)

    def _resolve_preset(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}; it has to be one of {', '.join(PRESETS)}")
        preset = PRESETS[self.preset]
        for name in ("beta", "nll_span", "nll_scores_eos"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(preset, name))

    def _check(self) -> None:
        for name, allowed in (
            ("normalization", ("global", "micro_batch")),
            ("nll_span", NLL_SPANS),
            ("score_turns", SCORE_TURNS),
            ("layout", ("auto", *LAYOUTS)),
            ("loss_backend", (None, *BACKENDS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it has to be one of {', '.join(map(str, allowed))}"
                )
        check_ranges(self)
        if not 0 <= self.max_bad_rows <= 1:
            raise ValueError(f"max_bad_rows is {self.max_bad_rows}; it is a share of rows, from 0 to 1")
        if self.beta > 100 * self.nll_weight > 0:
            warnings.warn(
                f"beta is {self.beta} and nll_weight {self.nll_weight}: next to the odds-ratio term the NLL hardly "
                "counts, and the model may forget its language; 0.1 to 1 is usual",
                stacklevel=4,
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}; ORPO has no label smoothing, set 0"
            )
        for name in ("logging_nan_inf_filter", "remove_unused_columns"):
            if getattr(self, name):
                self._warn(f"{name} is switched off: {self.__dataclass_fields__[name].metadata['help']}")
                setattr(self, name, False)
        if self.diagnose:
            refuse_cut_gradients(bool(self.fsdp or self.deepspeed))
        if self.use_liger_kernel:
            # Liger's cross-entropy would replace the forward that the loss is attached to.
            given, own = self.liger_kernel_config or {}, ("fused_linear_cross_entropy", "cross_entropy")
            for name in own:
                if given.get(name):
                    warnings.warn(f"liger_kernel_config: {name} is switched off, its loss is not ORPO's", stacklevel=4)
            self.liger_kernel_config = {**given, **dict.fromkeys(own, False)}
        self._check_evaluation()
        _ = self.limits

    def _check_evaluation(self) -> None:
        least = {
            "eval_samples": 1,
            "eval_max_new_tokens": 1,
            "early_stopping_patience": 1,
            "early_stopping_threshold": 0,
        }
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise ValueError(f"{name} is {given}; it has to be at least {value}")
        if self.early_stopping_patience is None:
            return
        if self.eval_strategy == "no":
            raise ValueError(
                f"early_stopping_patience is {self.early_stopping_patience} and eval_strategy 'no': nothing would be "
                "evaluated to stop by; set eval_strategy to steps or epoch"
            )
        if not self.load_best_model_at_end and self.metric_for_best_model is None:
            raise ValueError(
                f"early_stopping_patience is {self.early_stopping_patience}, but nothing says by which metric: set "
                "load_best_model_at_end (by the loss, unless metric_for_best_model names another) or "
                "metric_for_best_model"
            )
