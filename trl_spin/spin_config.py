# Copyright 2026 The trl-spin authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import copy
import json
import math
import re
import tomllib
import warnings
from dataclasses import dataclass, field, fields
from inspect import formatannotation
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from transformers.trainer_utils import HubStrategy
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import DPOConfig

from .compat import rename_checkpointing_options
from .engines import ENGINES, SamplingOptions, chosen_engine
from .objectives import OBJECTIVES, TRL_LOSSES, check_objectives


# Options with a value for each iteration
PER_ITERATION = ("learning_rate", "num_train_epochs", "beta", "sft_weight")
# What is known of options by their names, see there
OPTIONS = tomllib.loads(Path(__file__).with_name("options.toml").read_text(encoding="utf-8"))
# Keys of nested options that are nobody else's business
_SECRET = re.compile("(token|key|secret|password)$", re.IGNORECASE)
# What the numbers of options must be: all of them the first, and the others those that options.toml names
_BOUNDS = {
    "finite": lambda v: abs(v) < math.inf,
    "whole passes over the prompts": lambda v: v % 1 == 0,
    "> 0": lambda v: v > 0,
    ">= 0": lambda v: v >= 0,
    ">= 1": lambda v: v >= 1,
    "<= 1": lambda v: v <= 1,
}
_NUMBERS = {int: Integral, float: Real}  # which numpy's are as well


def _as_type(value: Any, hint: Any) -> Any:
    """
    The value as an option of this type has it: a number is one of Python's, one value makes a list, and text is a
    number in a list, since YAML reads 1e-3 as text. Raises a `ValueError` if it is of another type.
    """
    for kind in get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]:
        base, inner = get_origin(kind) or kind, get_args(kind)
        if base is list and value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            return [float(v) if inner == (float,) and isinstance(v, str) else _as_type(v, *inner) for v in values]
        if base is dict and isinstance(value, str):
            _as_type(json.loads(value), dict)
            return value.strip()  # which the parent class reads
        if base in _NUMBERS and isinstance(value, _NUMBERS[base]) and not isinstance(value, bool):
            return base(value)
        if value in inner if base is Literal else base not in _NUMBERS and isinstance(value, base):
            return value
    raise ValueError(f"this is `{type(value).__name__}`")


def _supports_bf16() -> bool:
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return native or is_torch_xla_available() or (is_torch_bf16_gpu_available() and not torch.cuda.is_available())


def help_from_docstring(cls: type) -> type:
    """Takes the command line's help for an option from its entry in the docstring, so that it is written once."""
    for name, text in re.findall(r"^ {8}(\w+) \(.*?\):\n((?: {12}.*\n|\n)+)", cls.__doc__, re.M):
        option = cls.__dataclass_fields__[name]
        text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"`\1`", " ".join(text.split()))
        option.metadata = {**option.metadata, "help": text.replace("%", "%%")}  # argparse formats it
    return cls


@help_from_docstring
@dataclass
class SPINConfig(*(engine.Options for engine in ENGINES.values()), SamplingOptions, DPOConfig):
    r"""
    Configuration class for the [`SPINTrainer`].

    This class includes only the parameters that are specific to SPIN training. For a full list of training arguments,
    please refer to the [`~trl.DPOConfig`] and [`~transformers.TrainingArguments`] documentation. Note that default
    values in this class may differ from those in these classes. Parameters of generation that are not listed here have
    the names, defaults and meanings of [`~trl.GRPOConfig`]: `top_p`, `top_k`, `min_p`,
    `repetition_penalty`, `cache_implementation`, `use_vllm` and `vllm_...`.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the game

        num_self_play_iterations (`int`, *optional*, defaults to `3`):
            Number of self-play iterations (T in the paper's Algorithm 1). At the start of each one the current model
            becomes the opponent and the reference, and completes every prompt once.
        num_train_epochs (`list[float]`, *optional*, defaults to `[2]`):
            Passes over the prompts per iteration, a whole number. A list gives one value per iteration; its last value
            is used for all further iterations.
        learning_rate (`list[float]`, *optional*):
            Peak learning rate of an iteration. A list gives one value per iteration; its last value is used for all
            further iterations. The schedule, warm-up included, restarts at each iteration. Defaults to `5e-7`, and to
            `1e-5` where an adapter is trained, which such small steps would leave as it is.
        beta (`list[float]`, *optional*, defaults to `[5.0]`):
            λ of the SPIN paper (Equation 4.7). Higher λ means a smaller step away from the opponent: trained to its
            end, an iteration goes a fifth of the way to the data at `5.0`, lands on it at `1.0`, and overshoots below
            `0.5` (with another `temperature` T, below 1/(2T)). A list gives one value per iteration; its last value is
            used for all further iterations.
        opponent_history (`int`, *optional*, defaults to `0`):
            Number h of earlier opponents whose completions stay in play. With h > 0, each prompt is paired in turn,
            from one pass to the next, with the completions of the newest opponent and of the h before it, all scored
            under the current reference: it takes K passes to play every pair of K opponents once.
        reset_optimizer_state (`bool`, *optional*, defaults to `True`):
            Whether to reset the optimizer's state at each iteration, as separate runs would.
        initial_loss_tolerance (`float`, *optional*):
            How far from ℓ(0) (log 2 for the logistic loss) an iteration may start. The policy is the reference at that
            point, so the log-ratio of a completion must be 0. In the mean of the first batch it may deviate by this
            many nats times the square root of the completion's length, as rounding errors do. Anything more means a
            wrong reference, and the run stops. Defaults to `1e-3` in float32 and to `0.1` in mixed or half precision.
        early_stopping (`bool`, *optional*, defaults to `False`):
            Whether to end the game after an iteration if held-out real and generated completions can no longer be told
            apart (the 95% interval of the accuracy covers one half), or if `metric_for_best_iteration` says that the
            iteration hurt.
        load_best_iteration_at_end (`bool`, *optional*, defaults to `False`):
            Whether to end with the best model by `metric_for_best_iteration`, which may be the one that self-play
            started from.
        metric_for_best_iteration (`str`, *optional*, defaults to `"eval_nll/real"`):
            Metric that compares iterations: `"eval_nll/real"`, the negative log-likelihood of held-out real
            completions (lower is better), or `"eval_completions/<name>"` for a number of `compute_completion_metrics`
            (higher is better). With several evaluation sets, `"eval_<dataset>_nll/real"` and so on.
        step_size_search (`list[float]`, *optional*):
            Step sizes s to try where an iteration ends, beside 0 and 1, such as `[0.25, 0.5, 1.5]`: of the models θ_t
            + s(θ_{t+1} − θ_t), between the one it began with and the one it made, and beyond, the best by
            `metric_for_best_iteration` stays. So a run cannot end worse than it began by that number. It costs one
            measurement for each, and no run with DeepSpeed or FSDP can have it.
        compare_sft (`list[float]`, *optional*):
            Learning rates, such as `[2e-6, 1e-5, 5e-5]`. If set, the run ends by showing what SFT does instead: the
            model that self-play started from is trained by [`~trl.SFTTrainer`] on the same rows for as many FLOPs as
            self-play took, generation and scoring included, once with each rate. Tables and report have these models
            beside those of the iterations. It needs held-out prompts. Not with DeepSpeed or FSDP.
        share_prefix (`bool`, *optional*, defaults to `True`):
            Whether the two completions of a pair go through the model in one row, so that their prompt is computed
            once. Results are the same up to rounding. Models for which they are not are detected at the start and keep
            the two padded rows of [`~trl.DPOTrainer`], as all models do with `False`.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to stop after the preflight: the plan is printed, and two rows have gone through generation,
            scoring and the loss.

        > Parameters that control the objective

        loss_type (`list[str]`, *optional*, defaults to `["sigmoid"]`):
            Objective of the game: SPIN's `'sigmoid'` (the logistic loss), `'hinge'`, `'exponential'` or
            `'correlation'`; `'space'`; or a loss of [`~trl.DPOTrainer`]. Several are combined with `loss_weights`.
        sft_weight (`list[float]`, *optional*, defaults to `[0.0]`):
            Weight of an SFT anchor: the negative log-likelihood of the real completions, per token, is added to the
            loss. A list gives one value per iteration; its last value is used for all further iterations.
        space_mu (`float`, *optional*, defaults to `1.0`):
            Weight μ of the generated completions in `loss_type='space'`.

        > Parameters that control the data preprocessing

        messages_column (`str`, *optional*):
            Column that holds the conversations, if it is not called `"messages"`.
        prompt_column (`str`, *optional*):
            Column that holds the prompts, if it is not called `"prompt"`. Needs `completion_column`.
        completion_column (`str`, *optional*):
            Column that holds the real completions, if it is not called `"completion"`. Needs `prompt_column`.
        first_turn_only (`bool`, *optional*, defaults to `False`):
            Whether to cut conversations after their first assistant turn, as the paper does. Otherwise the last
            assistant turn is the real completion and everything before it is the prompt.
        apply_chat_template (`bool`, *optional*, defaults to `False`):
            Whether to make conversations of rows of text: the prompt becomes a user turn and the completion an
            assistant turn, for models that were fine-tuned with a chat template.
        system_prompt (`str`, *optional*):
            System turn to put before conversations that have none.
        max_prompts (`int`, *optional*):
            If set, play on a random subset of this many training rows, drawn with `seed`.
        prompts_per_iteration (`int`, *optional*):
            If set, each iteration plays on this many other training rows, in a random order drawn with `seed`, so that
            a large dataset is one pass against ever fresher opponents. Where they run out, it starts over.
        held_out_size (`int`, *optional*, defaults to `0`):
            Number of training rows to hold out, drawn with `seed`, if there is no `eval_dataset`. The model soon
            memorizes training pairs, so numbers measured on them say little.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Additional keyword arguments for the chat template, for generation and training alike. A
            `chat_template_kwargs` column in the dataset takes precedence. The template itself is the tokenizer's.

        > Parameters that control generation

        max_completion_length (`int`, *optional*, defaults to `512`):
            Maximum number of tokens of a generated completion.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature T for sampling. `1.0` samples from the opponent's own distribution; `0.0` decodes greedily.
            Against opponents decoded at T, the game comes to rest where the model decoded at T is the data, and it
            does so for λ > 1/(2T): at `0.0`, it never does.
        eval_temperature (`float`, *optional*):
            Temperature for held-out prompts and probes: that of the decoder that will be deployed, so that this is what
            is measured. Defaults to `temperature`.
        generation_kwargs (`dict[str, Any]`, *optional*):
            Additional keyword arguments for [`~transformers.GenerationConfig`], such as `suppress_tokens`. With
            `use_vllm`, for vLLM's `SamplingParams`, such as `frequency_penalty`.
        generation_token_budget (`int`, *optional*):
            Size of a generation batch on each device: number of prompts times the longest prompt plus
            `max_completion_length`. By default, what is estimated to fit the memory, which is kept in
            `self_play/run.json` for when the run is resumed. Lower it if generation runs out of memory. Completions do
            not depend on it, up to the rounding of the log-probs.
        truncated_completions (`str`, *optional*, defaults to `"keep"`):
            What to do with pairs whose generated completion was cut at `max_completion_length` or `max_length`.
            `"keep"` leaves it open, without an end token; `"drop"` leaves the pair out; `"cut_real"` cuts the real
            completion to the same length, so that length alone does not tell the two apart.
        play_empty_completions (`bool`, *optional*, defaults to `False`):
            Whether pairs with an empty generated completion take part. They are counted in either case.
        vllm_mode (`str`, *optional*, defaults to `"offline"`):
            Always `"offline"`: the opponent is saved, and a process of vLLM's own loads it for each round, on the
            device of each training process, and ends when the round is over.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of a device's memory for vLLM, beside what training has there.
        vllm_max_model_length (`int`, *optional*):
            Longest prompt plus completion in vLLM. Defaults to `max_length`.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Number of training processes, and of their devices, that share one vLLM.
        vllm_kwargs (`dict[str, Any]`, *optional*):
            Additional keyword arguments for vLLM's `LLM`, such as `max_num_seqs`, or `dtype`, by default that of
            training.
        vllm_python (`str`, *optional*):
            Python interpreter of an environment that has vLLM, if that is not the one of training.

        > Parameters that control the logging

        num_probes (`int`, *optional*, defaults to `3`):
            Number of prompts, held out if there are any, whose completions are shown at each iteration beside the
            earlier ones, sampled with the same seeds.
        write_report (`bool`, *optional*, defaults to `True`):
            Whether to write `output_dir/report/report.html` at the end of training, if `matplotlib` is installed.
            `trl-spin report OUTPUT_DIR` does it at any time.

        > Parameters whose default values are overridden from DPOConfig

        bf16 (`bool`, *optional*):
            Whether to train in bfloat16 mixed precision. By default, unless `fp16` is set or the device does not
            support it (a GPU from before Ampere, a machine without one that is not told to `use_cpu`).
        precompute_ref_log_probs (`bool`, *optional*, defaults to `True`):
            Always `True`: SPIN scores the reference once per iteration, with the policy itself.
        gradient_checkpointing (`bool`, *optional*):
            Whether to compute activations anew in the backward pass, which saves memory and costs about a third more
            time. By default, only if training is estimated not to fit the memory without it, and where the model is
            spread over several devices.
        hub_strategy (`str`, *optional*, defaults to `"end"`):
            Always `'end'`: the model is pushed when training has ended.
        train_sampling_strategy (`str`, *optional*, defaults to `"group_by_length"`):
            Order of the pairs in training. `'group_by_length'` puts pairs of similar length into the same batch, in an
            order that is random all the same, the longest first. `'random'` and `'sequential'` pad more.
        save_total_limit (`int`, *optional*, defaults to `2`):
            Number of newest checkpoints to keep, beside the one at which the current iteration began. `0` keeps all.

    > [!NOTE]
    > These parameters have default values different from [`~trl.DPOConfig`]: `learning_rate` (5e-7, or 1e-5 for an
    > adapter, instead of 1e-6), `num_train_epochs` (2 per iteration instead of 3), `beta` (5.0 instead of 0.1), and the
    > last six above.
    """

    _VALID_DICT_FIELDS = DPOConfig._VALID_DICT_FIELDS + [
        *("chat_template_kwargs", "generation_kwargs"),
        *(o.name for engine in ENGINES.values() for o in fields(engine.Options) if "dict" in str(o.type)),
    ]

    # Parameters whose default values are overridden from DPOConfig
    learning_rate: list[float] | None = None
    bf16: bool | None = None
    num_train_epochs: list[float] = field(default_factory=lambda: [2])
    beta: list[float] = field(default_factory=lambda: [5.0])
    precompute_ref_log_probs: bool = True
    gradient_checkpointing: bool | None = field(default=None, metadata={"nargs": "?", "const": True})  # as a flag, too
    hub_strategy: HubStrategy | str = "end"
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "group_by_length"
    save_total_limit: int | None = 2
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])

    # Parameters that control the objective
    sft_weight: list[float] = field(default_factory=lambda: [0.0])
    space_mu: float = 1.0

    # Parameters that control the game
    num_self_play_iterations: int = 3
    opponent_history: int = 0
    reset_optimizer_state: bool = True
    initial_loss_tolerance: float | None = None
    early_stopping: bool = False
    load_best_iteration_at_end: bool = False
    metric_for_best_iteration: str = "eval_nll/real"
    step_size_search: list[float] | None = None
    compare_sft: list[float] | None = None
    share_prefix: bool = True
    dry_run: bool = False

    # Parameters that control the data preprocessing
    messages_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    first_turn_only: bool = False
    apply_chat_template: bool = False
    system_prompt: str | None = None
    max_prompts: int | None = None
    prompts_per_iteration: int | None = None
    held_out_size: int = 0
    chat_template_kwargs: dict[str, Any] | str | None = None

    # Parameters that control generation
    max_completion_length: int = 512
    eval_temperature: float | None = None
    generation_token_budget: int | None = None
    truncated_completions: Literal["keep", "drop", "cut_real"] = "keep"
    play_empty_completions: bool = False

    # Parameters that control the logging
    num_probes: int = 3
    write_report: bool = True

    def __post_init__(self):
        self._check_values()
        for name in PER_ITERATION:
            values = getattr(self, name)
            if values is None:  # the learning rate, see `with_learning_rate`
                continue
            if len(values) > self.num_self_play_iterations:
                what = f"`{name}={values}` has {len(values)} values, but `num_self_play_iterations` is"
                warnings.warn(f"{what} {self.num_self_play_iterations}: the rest is unused.", stacklevel=3)
            # A single value stays a plain number, which is what the rest of transformers expects
            setattr(self, name, values[0] if len(values) == 1 else values)
        if self.dry_run:
            self.report_to = "none"

        if self.bf16 is None and not (self.fp16 or self.use_cpu or _supports_bf16()):
            self.bf16 = False
            warnings.warn("`bf16` is off: this machine has no device that supports it.", stacklevel=3)

        # The parent class fills a DeepSpeed config with the learning rate, which must be a number there, or "auto"
        rate = "auto" if self.learning_rate is None else self.per_iteration("learning_rate")[0]
        learning_rate, self.learning_rate = self.learning_rate, rate
        rename_checkpointing_options(self)
        undecided = getattr(self, "activation_checkpointing", self.gradient_checkpointing) is None
        super().__post_init__()
        self.learning_rate = learning_rate
        if undecided:  # which the parent class takes for `False`
            self.gradient_checkpointing = self.activation_checkpointing = None

        for name, reason in OPTIONS["fixed"].items():
            if getattr(self, name) != getattr(SPINConfig, name):
                raise ValueError(f"`{name}={getattr(self, name)!r}` contradicts self-play: {reason}. Leave it unset.")
        changed = {name: value for name, value in vars(self).items() if value != getattr(type(self), name, value)}
        check_objectives(self.loss_type, changed)
        if self.use_weighting and set(self.loss_type) & (OBJECTIVES.keys() - TRL_LOSSES.keys()):
            raise ValueError(f"`use_weighting` is an option of TRL's losses, and does nothing for {self.loss_type}.")
        if max(self.per_iteration("sft_weight")) > 0 and "sft" in self.loss_type:
            both = f"`sft_weight={self.sft_weight}` and `loss_type={self.loss_type}`"
            raise ValueError(f"{both} are the same anchor: unset one.")
        if self.prompts_per_iteration and self.opponent_history:
            what = f"`opponent_history={self.opponent_history}` needs the same prompts in every iteration"
            raise ValueError(f"{what}: `prompts_per_iteration` must be unset, got {self.prompts_per_iteration}.")
        chosen_engine(self)

    def _check_values(self):
        messages, prompt, completion = self.messages_column, self.prompt_column, self.completion_column
        if (prompt is None) != (completion is None) or (messages is not None and prompt is not None):
            both = f"`prompt_column` ({prompt!r}) and `completion_column` ({completion!r}) go together"
            raise ValueError(f"{both}: set the two, or for conversations `messages_column` ({messages!r}) alone.")
        hints = get_type_hints(type(self))
        for option in fields(self):
            name, value = option.name, getattr(self, option.name)
            if option is not DPOConfig.__dataclass_fields__.get(name) or name == "loss_weights":
                try:
                    value = _as_type(value, hints[name])
                except (ValueError, OverflowError) as error:
                    expected = formatannotation(hints[name])
                    raise ValueError(f"`{name}` must be `{expected}`, got {value!r}: {error}.") from error
                setattr(self, name, value)
                if value == []:
                    raise ValueError(f"`{name}` is an empty list. Give one value, or several.")
            numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, (int, float))]
            for words, holds in _BOUNDS.items():
                # An infinite `max_grad_norm` is none
                bounded = name in OPTIONS["bounds"].get(words, [name]) and (name, value) != ("max_grad_norm", math.inf)
                if bounded and not all(map(holds, numbers)):
                    raise ValueError(f"`{name}` must be {words}, got {value}.")
        self.num_train_epochs = [int(v) for v in self.num_train_epochs]

    def with_learning_rate(self, adapter: bool) -> "SPINConfig":
        """These options, with a learning rate if none is set: an adapter needs larger steps than a whole model."""
        if self.learning_rate is not None:
            return self
        args = copy.copy(self)  # they may be used for another trainer
        args.learning_rate = 1e-5 if adapter else 5e-7
        if args.deepspeed:
            args.hf_deepspeed_config.trainer_config_process(args)
        return args

    @property
    def keeps_start(self) -> bool:
        """Whether the model that self-play starts from is kept as well."""
        return bool(self.load_best_iteration_at_end or self.step_size_search or self.compare_sft)

    def temperature_of(self, name: str) -> float:
        """Temperature at which prompts of a dataset are completed."""
        return self.temperature if name == "train" or self.eval_temperature is None else self.eval_temperature

    def to_dict(self) -> dict[str, Any]:
        """Without secrets: this is what trackers, and the files of a run, are given."""
        options = super().to_dict()
        for name, value in options.items():
            if isinstance(value, dict):  # which is compared on resume as if they had not been given
                options[name] = {key: v for key, v in value.items() if not _SECRET.search(key)} or None
        return options

    def per_iteration(self, name: str) -> list[float]:
        """
        Values of `learning_rate`, `num_train_epochs`, `beta` or `sft_weight`, one per self-play iteration.

        Args:
            name (`str`):
                Name of the option.

        Returns:
            `list[float]`: `num_self_play_iterations` values; the last value given is used for all further iterations.
        """
        value = getattr(self, name)
        values = value if isinstance(value, list) else [value]
        return [values[min(i, len(values) - 1)] for i in range(self.num_self_play_iterations)]
