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

import warnings
from dataclasses import dataclass, field
from typing import Any

from transformers.trainer_utils import HubStrategy
from trl import DPOConfig

from .objectives import MARGIN_LOSSES, OBJECTIVES


# Losses that DPOTrainer computes (trl 1.16)
TRL_LOSSES = frozenset(
    {
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    }
)
# Options of `DPOConfig` and `TrainingArguments` that contradict self-play: name -> (the value that is accepted, reason).
_FIXED_OPTIONS = {
    "precompute_ref_log_probs": (
        True,
        "SPIN's reference is the policy itself at the start of each iteration: it is scored once, and no second model "
        "is ever loaded",
    ),
    "ld_alpha": (None, "the reference log-probs of SPIN are sums over whole answers"),
    "sync_ref_model": (False, "the reference changes at the iteration boundary and nowhere else"),
    "padding_free": (False, "DPOTrainer ignores it since TRL 1.0"),
    "truncation_mode": ("keep_start", "rows that do not fit `max_length` are left out, never truncated"),
    "auto_find_batch_size": (False, "it restarts the training loop in the middle of an iteration"),
    "dataloader_persistent_workers": (False, "such workers would keep the opponent's answers of an earlier iteration"),
    "ignore_data_skip": (False, "a resumed run goes on with the rows that it has not yet seen in the epoch"),
    "enable_jit_checkpoint": (
        False,
        "self-play does it itself, in generation too: at SIGTERM it saves its work and stops, all processes together",
    ),
    "eval_on_start": (False, "the game on the held-out prompts starts with the first iteration, not before it"),
    "hub_strategy": (
        HubStrategy.END,
        "a push at each checkpoint uploads the whole output directory, and with it the games, which hold your data",
    ),
    "load_best_model_at_end": (
        False,
        "each iteration plays against another opponent, so its evaluation losses cannot be compared; each iteration's "
        "model is kept in `output_dir/iteration-<t>`, and `load_best_iteration_at_end` compares them by a number that can",
    ),
}


# Options that do something in one mode of vLLM only
_VLLM_OPTIONS = {
    "colocate": (
        *("vllm_model_impl", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_max_model_length"),
        "vllm_tensor_parallel_size",
    ),
    "server": (
        *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
    ),
}
# Arguments of vLLM's `SamplingParams` that would change what an answer is, or how it is sampled
_RESERVED_BY_VLLM = {
    *("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"),
    *("stop", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs"),
}


@dataclass
class SPINConfig(DPOConfig):
    r"""
    Configuration class for the [`SPINTrainer`].

    This class includes only the parameters that are specific to SPIN training. For a full list of training arguments,
    please refer to the [`~trl.DPOConfig`] and [`~transformers.TrainingArguments`] documentation. Note that default
    values in this class may differ from those in these classes.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the game

        num_self_play_iterations (`int`, *optional*, defaults to `3`):
            Number of self-play iterations (T in the paper's Algorithm 1). At the start of each one the current model
            becomes the opponent and the reference, and answers every prompt once.
        num_train_epochs (`list[float]`, *optional*, defaults to `[2]`):
            Passes over the prompts per iteration, a whole number; a list gives one value per iteration and its last
            value holds on.
        learning_rate (`list[float]`, *optional*, defaults to `[5e-7]`):
            Peak learning rate of an iteration; a list gives one value per iteration and its last value holds on. The
            schedule, warm-up included, restarts at each iteration.
        beta (`list[float]`, *optional*, defaults to `[1.0]`):
            λ of the SPIN paper (Equation 4.7). Higher λ means a smaller step away from the opponent: trained to its end,
            an iteration lands on the data at `1.0`, and overshoots below `0.5`. A list gives one value per iteration and
            its last value holds on.
        opponent_history (`int`, *optional*, defaults to `0`):
            Number h of earlier opponents whose answers are kept. With h > 0, the prompts take turns, from one pass to
            the next, with the answers of the newest opponent and of the h before it, all scored under the current
            reference: K opponents need K passes to play every pair once.
        reset_optimizer_state (`bool`, *optional*, defaults to `True`):
            Whether to reset the optimizer's state at each iteration, as separate runs would.
        initial_loss_tolerance (`float`, *optional*):
            How far from ℓ(0) (log 2 for the logistic loss) an iteration may start. The policy is the reference at that
            point, so the log-ratio of an answer must be 0: it may deviate, in the mean of the first batch, by this many
            nats times the square root of the answer's length, as rounding errors do. Anything more means a wrong
            reference, and the run stops. Defaults to `1e-3` in float32 and to `0.1` in mixed or half precision.
        early_stopping (`bool`, *optional*, defaults to `False`):
            Whether to end the game at the end of an iteration if held-out real and fresh generated answers can no longer
            be told apart (the 95% interval of the accuracy covers one half), or if `metric_for_best_iteration` says that
            the iteration hurt.
        load_best_iteration_at_end (`bool`, *optional*, defaults to `False`):
            Whether to end with the best model by `metric_for_best_iteration`, which may be the one that self-play
            started from.
        metric_for_best_iteration (`str`, *optional*, defaults to `"eval_nll/real"`):
            Number that compares iterations: `"eval_nll/real"`, the negative log-likelihood of held-out real answers, or
            `"eval_answers/<name>"` for a number of `compute_answer_metrics`. With several evaluation sets,
            `"eval_<dataset>_nll/real"` and so on. Likelihoods are better when lower, answers when higher.
        share_prefix (`bool`, *optional*, defaults to `True`):
            Whether the two answers of a pair go through the model in one row, so that their prompt is computed once.
            Results are the same up to rounding. Models for which they are not are found out at the start, and keep
            [`~trl.DPOTrainer`]'s layout of two padded rows, as all do with `False`.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to stop after the preflight: the plan is printed, and two rows have gone through generation, scoring
            and the loss.

        > Parameters that control the objective

        loss_type (`list[str]`, *optional*, defaults to `["sigmoid"]`):
            Objective of the game: SPIN's `'sigmoid'` (the logistic loss), `'hinge'`, `'exponential'` or
            `'correlation'`; `'space'`; `'t_spin'`; `'gsil_bernoulli'`, `'gsil_brier'`, `'gsil_hinge'`, `'gsil_kliep'` or
            `'gsil_lsif'`; `'chi_squared'`; or a loss of [`~trl.DPOTrainer`]. Several are combined with `loss_weights`.
        sft_weight (`list[float]`, *optional*, defaults to `[0.0]`):
            Weight of an SFT anchor: the negative log-likelihood of the real answers, per token, is added to the loss. A
            list gives one value per iteration and its last value holds on.
        reference_alpha (`float`, *optional*, defaults to `1.0`):
            α of α-SPIN: the reference is the geometric mixture of the opponent, with weight α, and the model that
            self-play started from. `1.0` is SPIN, `0.0` a fixed reference. For losses of the margin.
        space_mu (`float`, *optional*, defaults to `1.0`):
            Weight μ of the generated answers in `loss_type='space'`.
        gsil_shift (`float`, *optional*, defaults to `0.0`):
            Shift of the scaled log-ratios in `loss_type='gsil_...'`; the authors' β.
        t_spin_history_weight (`float`, *optional*, defaults to `0.1`):
            Weight β, in `loss_type='t_spin'`, of the generated answers' advantage over the answers of iteration 0.

        > Parameters that control the data preprocessing

        messages_column (`str`, *optional*):
            Column that holds the conversations, if it is not called `"messages"`.
        prompt_column (`str`, *optional*):
            Column that holds the prompts, if it is not called `"prompt"`. Needs `completion_column`.
        completion_column (`str`, *optional*):
            Column that holds the real answers, if it is not called `"completion"`. Needs `prompt_column`.
        first_turn_only (`bool`, *optional*, defaults to `False`):
            Whether to cut conversations after their first answer, as the paper does. Otherwise the last assistant turn
            is the real answer and everything before it is the prompt.
        max_prompts (`int`, *optional*):
            If set, play on a random subset of this many training rows, drawn with `seed`.
        held_out_size (`int`, *optional*, defaults to `0`):
            Number of training rows to hold out, drawn with `seed`, if there is no `eval_dataset`. Numbers on training
            pairs soon tell what was learned by heart.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Additional keyword arguments for the chat template, for generation and training alike. A
            `chat_template_kwargs` column in the dataset goes before.

        > Parameters that control generation

        max_completion_length (`int`, *optional*, defaults to `512`):
            Maximum number of tokens of a generated answer.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature for sampling. The theory needs `1.0`, the opponent's own distribution. `0.0` decodes greedily.
        top_p (`float`, *optional*, defaults to `1.0`):
            Cumulative probability of the most probable tokens to consider. `1.0` considers all tokens.
        top_k (`int`, *optional*, defaults to `0`):
            Number of highest probability vocabulary tokens to consider. `0` considers all tokens.
        min_p (`float`, *optional*):
            Minimum token probability, scaled by the probability of the most likely token.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Penalty for tokens that appeared in the prompt and the answer so far. `1.0` means no penalty.
        generation_kwargs (`dict[str, Any]`, *optional*):
            Additional keyword arguments for [`~transformers.GenerationConfig`], such as `suppress_tokens`. With
            `use_vllm`, for vLLM's `SamplingParams`, such as `frequency_penalty`.
        cache_implementation (`str`, *optional*):
            Implementation of the cache used by `generate`.
        generation_token_budget (`int`, *optional*):
            Size of a generation batch on each device: number of answers times the longest prompt plus
            `max_completion_length`. By default, what is estimated to fit the memory, which is kept in
            `self_play/run.json` for when the run is resumed. Lower it if generation runs out of memory. The answers do
            not depend on it, up to the rounding of the log-probs.
        ds3_gather_for_generation (`bool`, *optional*, defaults to `True`):
            Whether to gather the weights for generation under DeepSpeed ZeRO-3: faster, but they must fit one device.
        truncated_completions (`str`, *optional*, defaults to `"keep"`):
            What to do with pairs whose generated answer was cut at `max_completion_length` or `max_length`. `"keep"`
            leaves the generated answer open, without an end token; `"drop"` leaves the pair out; `"cut_real"` cuts the
            real answer to the same length, so that length alone does not tell the two apart.
        play_empty_completions (`bool`, *optional*, defaults to `False`):
            Whether pairs with an empty generated answer take part. They are counted in either case.

        > Parameters that control the generation engine

        use_transformers_continuous_batching (`bool`, *optional*, defaults to `False`):
            Whether to answer with transformers' continuous batching instead of `generate`: a row that has ended makes
            room for the next one. Samples then depend on what else is in the batch, and on its timing.
        transformers_continuous_batching_config (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.ContinuousBatchingConfig`], such as `max_memory_percent`.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to answer with vLLM instead of `generate`. Needs `pip install trl-spin[vllm]`. Samples then depend
            on what else is in the batch.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `'colocate'` runs vLLM in the training processes and on their GPUs, `'server'` asks a server that was
            started with `vllm serve`.
        vllm_model_impl (`str`, *optional*, defaults to `"vllm"`):
            Implementation of the model in vLLM, `'vllm'` or `'transformers'`. With `vllm_mode='colocate'`.
        vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            Whether vLLM gives its memory back while the model is trained. Waking up takes time. With
            `vllm_mode='colocate'`.
        vllm_server_base_url (`str`, *optional*):
            URL of the vLLM server, such as `http://localhost:8000`, in place of `vllm_server_host` and
            `vllm_server_port`.
        vllm_server_host (`str`, *optional*, defaults to `"0.0.0.0"`):
            Host of the vLLM server.
        vllm_server_port (`int`, *optional*, defaults to `8000`):
            Port of the vLLM server.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Seconds to wait for the vLLM server to be up.
        vllm_group_port (`int`, *optional*, defaults to `51216`):
            Port over which the weights go to the vLLM server.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Share of the GPU's memory that vLLM takes. With `vllm_mode='colocate'`; a server has its own
            `--gpu-memory-utilization`.
        vllm_max_model_length (`int`, *optional*):
            Longest prompt plus answer in vLLM. Defaults to `max_length`. With `vllm_mode='colocate'`; a server's
            `--max-model-len` must hold the longest prompt plus `max_completion_length`.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Number of GPUs that share one copy of the model in vLLM. With `vllm_mode='colocate'`; a server has its own
            `--tensor-parallel-size`.

        > Parameters that control the logging

        num_probes (`int`, *optional*, defaults to `3`):
            Number of prompts, held out if there are any, whose answers are shown at each iteration beside the earlier
            ones, sampled with the same seeds.
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to write prompts, real and generated answers of each iteration as text, to Parquet files in
            `output_dir/completions`, and to `wandb` and `trackio` if they are in `report_to`.
        write_report (`bool`, *optional*, defaults to `True`):
            Whether to write `output_dir/report/report.html` at the end of training, if `matplotlib` is installed.
            `trl-spin report OUTPUT_DIR` does it at any time.

    > [!NOTE]
    > These parameters have default values different from [`~trl.DPOConfig`]:
    > - `learning_rate`: Defaults to `5e-7` instead of `1e-6`.
    > - `num_train_epochs`: Defaults to `2` instead of `3`, and counts passes per iteration.
    > - `beta`: Defaults to `1.0` instead of `0.1`.
    > - `precompute_ref_log_probs`: `True`, the only value that SPIN accepts.
    > - `gradient_checkpointing`: Defaults to `None` instead of `True`: off if training is estimated to fit the memory
    >   without it, and on otherwise, and where the model is spread over several devices.
    > - `hub_strategy`: `"end"`, the only value that SPIN accepts.
    > - `train_sampling_strategy`: `"group_by_length"` instead of `"random"`: pairs of similar length share a batch, in
    >   an order that is random all the same, and the longest come first. `"random"` and `"sequential"` pad more.
    > - `save_total_limit`: Defaults to `2` instead of `None`. The checkpoint at which the current iteration began is
    >   kept beside them, and `0` keeps all.
    """

    _VALID_DICT_FIELDS = DPOConfig._VALID_DICT_FIELDS + [
        "chat_template_kwargs",
        "generation_kwargs",
        "transformers_continuous_batching_config",
    ]

    # Parameters whose default values are overridden from DPOConfig
    learning_rate: list[float] = field(
        default_factory=lambda: [5e-7],
        metadata={
            "help": "Peak learning rate of an iteration; a list gives one value per iteration and its last value holds "
            "on. The schedule, warm-up included, restarts at each iteration."
        },
    )
    num_train_epochs: list[float] = field(
        default_factory=lambda: [2],
        metadata={
            "help": "Passes over the prompts per iteration, a whole number; a list gives one value per iteration and "
            "its last value holds on."
        },
    )
    beta: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={
            "help": "λ of the SPIN paper (Equation 4.7). Higher λ means a smaller step away from the opponent: trained "
            "to its end, an iteration lands on the data at `1.0`, and overshoots below `0.5`. A list gives one value "
            "per iteration and its last value holds on."
        },
    )
    precompute_ref_log_probs: bool = field(
        default=True,
        metadata={"help": "Always `True`: SPIN scores the reference once per iteration, with the policy itself."},
    )

    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to compute activations anew in the backward pass, which saves memory and costs about a third "
            "more time. By default, only if training is estimated not to fit the memory without it.",
            "nargs": "?",  # as a flag, too
            "const": True,
        },
    )

    hub_strategy: HubStrategy | str = field(
        default="end",
        metadata={"help": "Always `'end'`: the model is pushed when training has ended."},
    )

    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Order of the pairs in training. `'group_by_length'` puts pairs of similar length into the same batch, "
            "in an order that is random all the same, the longest first. `'random'` and `'sequential'` pad more.",
            "choices": ["random", "sequential", "group_by_length"],
        },
    )

    save_total_limit: int | None = field(
        default=2,
        metadata={
            "help": "Number of newest checkpoints to keep, beside the one at which the current iteration began. `0` "
            "keeps all."
        },
    )

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "Objective of the game: SPIN's `'sigmoid'` (the logistic loss), `'hinge'`, `'exponential'` or "
            "`'correlation'`; `'space'`; `'t_spin'`; `'gsil_bernoulli'`, `'gsil_brier'`, `'gsil_hinge'`, `'gsil_kliep'` "
            "or `'gsil_lsif'`; `'chi_squared'`; or a loss of `DPOTrainer`. Several are combined with `loss_weights`."
        },
    )

    # Parameters that control the objective
    sft_weight: list[float] = field(
        default_factory=lambda: [0.0],
        metadata={
            "help": "Weight of an SFT anchor: the negative log-likelihood of the real answers, per token, is added to "
            "the loss. A list gives one value per iteration and its last value holds on."
        },
    )
    reference_alpha: float = field(
        default=1.0,
        metadata={
            "help": "α of α-SPIN: the reference is the geometric mixture of the opponent, with weight α, and the model "
            "that self-play started from. `1.0` is SPIN, `0.0` a fixed reference. For losses of the margin."
        },
    )
    space_mu: float = field(
        default=1.0,
        metadata={"help": "Weight μ of the generated answers in `loss_type='space'`."},
    )
    gsil_shift: float = field(
        default=0.0,
        metadata={"help": "Shift of the scaled log-ratios in `loss_type='gsil_...'`; the authors' β."},
    )
    t_spin_history_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight β, in `loss_type='t_spin'`, of the generated answers' advantage over the answers of "
            "iteration 0."
        },
    )

    # Parameters that control the game
    num_self_play_iterations: int = field(
        default=3,
        metadata={
            "help": "Number of self-play iterations (T in the paper's Algorithm 1). At the start of each one the "
            "current model becomes the opponent and the reference, and answers every prompt once."
        },
    )
    opponent_history: int = field(
        default=0,
        metadata={
            "help": "Number h of earlier opponents whose answers are kept. With h > 0, the prompts take turns, from "
            "one pass to the next, with the answers of the newest opponent and of the h before it, all scored under "
            "the current reference: K opponents need K passes to play every pair once."
        },
    )
    reset_optimizer_state: bool = field(
        default=True,
        metadata={"help": "Whether to reset the optimizer's state at each iteration, as separate runs would."},
    )
    initial_loss_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "How far from ℓ(0) (log 2 for the logistic loss) an iteration may start. The policy is the "
            "reference at that point, so the log-ratio of an answer must be 0: it may deviate, in the mean of the first "
            "batch, by this many nats times the square root of the answer's length, as rounding errors do. Anything "
            "more means a wrong reference, and the run stops. Defaults to `1e-3` in float32 and to `0.1` in mixed or "
            "half precision."
        },
    )

    early_stopping: bool = field(
        default=False,
        metadata={
            "help": "Whether to end the game at the end of an iteration if held-out real and fresh generated answers can no "
            "longer be told apart (the 95%% interval of the accuracy covers one half), or if "
            "`metric_for_best_iteration` says that the iteration hurt."
        },
    )
    load_best_iteration_at_end: bool = field(
        default=False,
        metadata={
            "help": "Whether to end with the best model by `metric_for_best_iteration`, which may be the one that "
            "self-play started from."
        },
    )
    metric_for_best_iteration: str = field(
        default="eval_nll/real",
        metadata={
            "help": 'Number that compares iterations: `"eval_nll/real"`, the negative log-likelihood of held-out real '
            'answers, or `"eval_answers/<name>"` for a number of `compute_answer_metrics`. With several evaluation sets, '
            '`"eval_<dataset>_nll/real"` and so on. Likelihoods are better when lower, answers when higher.'
        },
    )
    share_prefix: bool = field(
        default=True,
        metadata={
            "help": "Whether the two answers of a pair go through the model in one row, so that their prompt is computed "
            "once. Results are the same up to rounding. Models for which they are not are found out at the start, and "
            "keep `DPOTrainer`'s layout of two padded rows, as all do with `False`."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Whether to stop after the preflight: the plan is printed, and two rows have gone through "
            "generation, scoring and the loss."
        },
    )

    # Parameters that control the data preprocessing
    messages_column: str | None = field(
        default=None, metadata={"help": 'Column that holds the conversations, if it is not called `"messages"`.'}
    )
    prompt_column: str | None = field(
        default=None,
        metadata={"help": 'Column that holds the prompts, if it is not called `"prompt"`. Needs `completion_column`.'},
    )
    completion_column: str | None = field(
        default=None,
        metadata={
            "help": 'Column that holds the real answers, if it is not called `"completion"`. Needs `prompt_column`.'
        },
    )
    first_turn_only: bool = field(
        default=False,
        metadata={
            "help": "Whether to cut conversations after their first answer, as the paper does. Otherwise the last "
            "assistant turn is the real answer and everything before it is the prompt."
        },
    )
    max_prompts: int | None = field(
        default=None,
        metadata={"help": "If set, play on a random subset of this many training rows, drawn with `seed`."},
    )
    held_out_size: int = field(
        default=0,
        metadata={
            "help": "Number of training rows to hold out, drawn with `seed`, if there is no `eval_dataset`. Numbers on "
            "training pairs soon tell what was learned by heart."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Additional keyword arguments for the chat template, for generation and training alike. A "
            "`chat_template_kwargs` column in the dataset goes before."
        },
    )

    # Parameters that control generation
    max_completion_length: int = field(
        default=512, metadata={"help": "Maximum number of tokens of a generated answer."}
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature for sampling. The theory needs `1.0`, the opponent's own distribution. `0.0` decodes "
            "greedily."
        },
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Cumulative probability of the most probable tokens to consider. `1.0` considers all tokens."
        },
    )
    top_k: int = field(
        default=0,
        metadata={"help": "Number of highest probability vocabulary tokens to consider. `0` considers all tokens."},
    )
    min_p: float | None = field(
        default=None,
        metadata={"help": "Minimum token probability, scaled by the probability of the most likely token."},
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata={
            "help": "Penalty for tokens that appeared in the prompt and the answer so far. `1.0` means no penalty."
        },
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Additional keyword arguments for `GenerationConfig`, such as `suppress_tokens`. With "
            "`use_vllm`, for vLLM's `SamplingParams`, such as `frequency_penalty`."
        },
    )
    cache_implementation: str | None = field(
        default=None, metadata={"help": "Implementation of the cache used by `generate`."}
    )
    generation_token_budget: int | None = field(
        default=None,
        metadata={
            "help": "Size of a generation batch on each device: number of answers times the longest prompt plus "
            "`max_completion_length`. By default, what is estimated to fit the memory, which is kept in "
            "`self_play/run.json` for when the run is resumed. Lower it if generation runs out of memory. The answers do "
            "not depend on it, up to the rounding of the log-probs."
        },
    )
    ds3_gather_for_generation: bool = field(
        default=True,
        metadata={
            "help": "Whether to gather the weights for generation under DeepSpeed ZeRO-3: faster, but they must fit "
            "one device."
        },
    )
    truncated_completions: str = field(
        default="keep",
        metadata={
            "help": "What to do with pairs whose generated answer was cut at `max_completion_length` or `max_length`. "
            '`"keep"` leaves the generated answer open, without an end token; `"drop"` leaves the pair out; '
            '`"cut_real"` cuts the real answer to the same length, so that length alone does not tell the two apart.',
            "choices": ["keep", "drop", "cut_real"],
        },
    )
    play_empty_completions: bool = field(
        default=False,
        metadata={"help": "Whether pairs with an empty generated answer take part. They are counted in either case."},
    )

    # Parameters that control the generation engine
    use_transformers_continuous_batching: bool = field(
        default=False,
        metadata={
            "help": "Whether to answer with transformers' continuous batching instead of `generate`: a row that has "
            "ended makes room for the next one. Samples then depend on what else is in the batch, and on its "
            "timing."
        },
    )
    transformers_continuous_batching_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for `ContinuousBatchingConfig`, such as `max_memory_percent`."},
    )
    use_vllm: bool = field(
        default=False,
        metadata={
            "help": "Whether to answer with vLLM instead of `generate`. Needs `pip install trl-spin[vllm]`. Samples "
            "then depend on what else is in the batch."
        },
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "`'colocate'` runs vLLM in the training processes and on their GPUs, `'server'` asks a server that "
            "was started with `vllm serve`."
        },
    )
    vllm_model_impl: str = field(
        default="vllm",
        metadata={
            "help": "Implementation of the model in vLLM, `'vllm'` or `'transformers'`. With `vllm_mode='colocate'`."
        },
    )
    vllm_enable_sleep_mode: bool = field(
        default=False,
        metadata={
            "help": "Whether vLLM gives its memory back while the model is trained. Waking up takes time. With "
            "`vllm_mode='colocate'`."
        },
    )
    vllm_server_base_url: str | None = field(
        default=None,
        metadata={
            "help": "URL of the vLLM server, such as `http://localhost:8000`, in place of `vllm_server_host` and "
            "`vllm_server_port`."
        },
    )
    vllm_server_host: str = field(
        default="0.0.0.0",
        metadata={"help": "Host of the vLLM server."},
    )
    vllm_server_port: int = field(
        default=8000,
        metadata={"help": "Port of the vLLM server."},
    )
    vllm_server_timeout: float = field(
        default=240.0,
        metadata={"help": "Seconds to wait for the vLLM server to be up."},
    )
    vllm_group_port: int = field(
        default=51216,
        metadata={"help": "Port over which the weights go to the vLLM server."},
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3,
        metadata={
            "help": "Share of the GPU's memory that vLLM takes. With `vllm_mode='colocate'`; a server has its own "
            "`--gpu-memory-utilization`."
        },
    )
    vllm_max_model_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt plus answer in vLLM. Defaults to `max_length`. With `vllm_mode='colocate'`; a "
            "server's `--max-model-len` must hold the longest prompt plus `max_completion_length`."
        },
    )
    vllm_tensor_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Number of GPUs that share one copy of the model in vLLM. With `vllm_mode='colocate'`; a server has "
            "its own `--tensor-parallel-size`."
        },
    )

    # Parameters that control the logging
    num_probes: int = field(
        default=3,
        metadata={
            "help": "Number of prompts, held out if there are any, whose answers are shown at each iteration beside the "
            "earlier ones, sampled with the same seeds."
        },
    )
    log_completions: bool = field(
        default=False,
        metadata={
            "help": "Whether to write prompts, real and generated answers of each iteration as text, to Parquet files in "
            "`output_dir/completions`, and to `wandb` and `trackio` if they are in `report_to`."
        },
    )
    write_report: bool = field(
        default=True,
        metadata={
            "help": "Whether to write `output_dir/report/report.html` at the end of training, if `matplotlib` is "
            "installed. `trl-spin report OUTPUT_DIR` does it at any time."
        },
    )

    def __post_init__(self):
        if self.num_self_play_iterations < 1:
            raise ValueError(
                f"`num_self_play_iterations` must be at least 1, got {self.num_self_play_iterations}. For plain "
                "supervised fine-tuning, use `trl.SFTTrainer`."
            )
        for name in ("learning_rate", "num_train_epochs", "beta", "sft_weight"):
            setattr(self, name, self._as_schedule(name))
        if self.dry_run:
            self.report_to = "none"

        # The parent class fills a DeepSpeed config with the learning rate, which must be a number there.
        learning_rate, self.learning_rate = self.learning_rate, self.per_iteration("learning_rate")[0]
        undecided = self.gradient_checkpointing is None and self.activation_checkpointing is None
        super().__post_init__()
        self.learning_rate = learning_rate
        if undecided:  # which the parent class takes for `False`
            self.gradient_checkpointing = self.activation_checkpointing = None

        for name, (accepted, reason) in _FIXED_OPTIONS.items():
            if getattr(self, name) != accepted:
                raise ValueError(f"`{name}={getattr(self, name)!r}` contradicts self-play: {reason}. Leave it unset.")
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ValueError(
                f"`prompt_column` ({self.prompt_column!r}) and `completion_column` ({self.completion_column!r}) go "
                "together: set both, or use `messages_column` for conversations."
            )
        if self.messages_column is not None and self.prompt_column is not None:
            raise ValueError(
                f"`messages_column` ({self.messages_column!r}) and `prompt_column` ({self.prompt_column!r}) name two "
                "sources for the same rows: set one of them."
            )
        if self.temperature < 0:
            raise ValueError(f"`temperature` must be 0 (greedy) or positive, got {self.temperature}.")
        for name in ("max_completion_length", "generation_token_budget"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("held_out_size", "num_probes"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 (none) or more, got {getattr(self, name)}.")
        if self.train_sampling_strategy not in ("random", "sequential", "group_by_length"):
            raise ValueError(
                "`train_sampling_strategy` must be 'random', 'sequential' or 'group_by_length', got "
                f"{self.train_sampling_strategy!r}: self-play counts pairs per batch."
            )
        if self.opponent_history < 0:
            raise ValueError(f"`opponent_history` must be 0 (plain SPIN) or more, got {self.opponent_history}.")
        self._check_objective()
        if self.truncated_completions not in ("keep", "drop", "cut_real"):
            raise ValueError(
                f"`truncated_completions` must be 'keep', 'drop' or 'cut_real', got {self.truncated_completions!r}."
            )

        self._check_engine()

    @property
    def generation_engine(self) -> str:
        """What answers the prompts: `"generate"`, `"continuous_batching"` or `"vllm"`."""
        if self.use_vllm:
            return "vllm"
        return "continuous_batching" if self.use_transformers_continuous_batching else "generate"

    def _check_engine(self):
        if self.use_vllm and self.use_transformers_continuous_batching:
            raise ValueError(
                "`use_vllm` and `use_transformers_continuous_batching` are both set, but one engine answers: set one."
            )
        if self.vllm_mode not in _VLLM_OPTIONS:
            raise ValueError(f"`vllm_mode` must be 'colocate' or 'server', got {self.vllm_mode!r}.")
        # An option that has no effect would be taken for one that has
        applies = {
            "cache_implementation": self.generation_engine == "generate",
            # Of transformers' processors of logits, continuous batching drops those that need the tokens so far, and
            # others go wrong (transformers 5.23)
            "repetition_penalty": not self.use_transformers_continuous_batching,
            "generation_kwargs": not self.use_transformers_continuous_batching,
            "transformers_continuous_batching_config": self.use_transformers_continuous_batching,
            "vllm_mode": self.use_vllm,
        }
        for mode, names in _VLLM_OPTIONS.items():
            applies |= dict.fromkeys(names, self.use_vllm and self.vllm_mode == mode)
        for name, does in applies.items():
            if not does and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                vllm = f", `vllm_mode={self.vllm_mode!r}`" if self.use_vllm else ""
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` means nothing to the engine that answers "
                    f"({self.generation_engine!r}{vllm}). Leave it unset."
                )
        kwargs = set(self.generation_kwargs or {})
        if self.use_vllm and kwargs & _RESERVED_BY_VLLM:
            raise ValueError(
                f"`generation_kwargs` holds {sorted(kwargs & _RESERVED_BY_VLLM)}, which self-play sets itself for vLLM, "
                "from options of their own and the end tokens of the chat template. Remove them."
            )

    def _check_objective(self):
        own = {*OBJECTIVES, "t_spin"} - TRL_LOSSES
        unknown = sorted(set(self.loss_type) - own - TRL_LOSSES)
        if unknown:
            raise ValueError(
                f"`loss_type` {unknown[0]!r} is unknown. Self-play has {sorted(own | MARGIN_LOSSES)}, and of `DPOTrainer` "
                f"{sorted(TRL_LOSSES - MARGIN_LOSSES)}."
            )
        # An option that does nothing for the chosen losses would be taken for one that does
        applies = {
            "space_mu": {"space"},
            "gsil_shift": {name for name in own if name.startswith("gsil_")},
            "t_spin_history_weight": {"t_spin"},
            "label_smoothing": {"robust", "exo_pair", "aot", "aot_unpaired"},
            "discopop_tau": {"discopop"},
        }
        for name, losses in applies.items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default and not losses & {*self.loss_type}:
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` does nothing for `loss_type={self.loss_type}`: it belongs to "
                    f"{sorted(losses)}. Leave it unset."
                )
        if self.space_mu <= 0:
            raise ValueError(f"`space_mu` must be positive, got {self.space_mu}.")
        if self.use_weighting and own & {*self.loss_type}:
            raise ValueError(
                f"`use_weighting` is an option of `DPOTrainer`'s losses, and does nothing for {self.loss_type}."
            )
        if max(self.per_iteration("sft_weight")) > 0 and "sft" in self.loss_type:
            raise ValueError(
                f"`sft_weight={self.sft_weight}` and 'sft' in `loss_type` ({self.loss_type}) are the same anchor: give "
                "one of the two."
            )
        if not 0 <= self.reference_alpha <= 1:
            raise ValueError(f"`reference_alpha` must be from 0 (fixed reference) to 1, got {self.reference_alpha}.")
        if self.reference_alpha < 1 and not {*self.loss_type} <= MARGIN_LOSSES | {"sft"}:
            raise ValueError(
                f"`reference_alpha={self.reference_alpha}` mixes two models up to a factor per prompt, which cancels only in "
                f"losses of the margin: {sorted(MARGIN_LOSSES)}. Leave it unset for `loss_type={self.loss_type}`."
            )
        if "t_spin" in self.loss_type and self.truncated_completions == "cut_real":
            raise ValueError(
                "`truncated_completions='cut_real'` would cut real answers, but not those of iteration 0."
            )

    def _as_schedule(self, name: str) -> float | list[float]:
        value = getattr(self, name)
        values = [float(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
        if not values:
            raise ValueError(f"`{name}` is an empty list. Give one value, or one per iteration.")
        if len(values) > self.num_self_play_iterations:
            warnings.warn(
                f"`{name}` has {len(values)} values, {values}, but there are only {self.num_self_play_iterations} "
                "iterations (`num_self_play_iterations`): the last values are not used.",
                stacklevel=4,
            )
        if name == "learning_rate" and len(values) > 1 and not all(v > 0 for v in values):
            raise ValueError(f"`learning_rate` must be positive in every iteration, got {values}.")
        if name == "num_train_epochs":
            if any(v < 1 or v != int(v) for v in values):
                raise ValueError(
                    f"`num_train_epochs` counts whole passes over the prompts per iteration, got {values}."
                )
            values = [int(v) for v in values]
        # A single value stays a plain number, which is what the rest of transformers expects.
        return values[0] if len(values) == 1 else values

    def per_iteration(self, name: str) -> list[float]:
        """
        Values of `learning_rate`, `num_train_epochs`, `beta` or `sft_weight`, one per self-play iteration.

        Args:
            name (`str`):
                Name of the option.

        Returns:
            `list[float]`: `num_self_play_iterations` values; the last value given holds on.
        """
        value = getattr(self, name)
        values = value if isinstance(value, list) else [value]
        values = values + values[-1:] * (self.num_self_play_iterations - len(values))
        return values[: self.num_self_play_iterations]
