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

"""
What answers a batch of prompts, token ids in, token ids out: transformers' `generate`, its continuous batching, or vLLM.

Each `open_...` is a context manager for as long as the weights stay as they are. It gives a function of prompts, their
seeds, and the number of tokens to generate at most, which returns the generated ids, or `None` if a signal cut them
short.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import ContinuousBatchingConfig
from trl.distributed import DistributedBackend
from trl.import_utils import is_vllm_available
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import pad

from .memory import enable_checkpointing
from .resume import StopSignal, explain_out_of_memory
from .spin_config import SPINConfig


if TYPE_CHECKING:
    from trl.generation.vllm_generation import VLLMGeneration

    from .spin_trainer import SPINTrainer

Engine = Callable[[list[list[int]], list[int], int], list[list[int]] | None]

# These act on sampling inside `generate`, which here only takes the argmax (see `SampleByRow`).
_SAMPLING_KWARGS = {
    "do_sample",
    "num_beams",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_h",
    "num_return_sequences",
}
# On a CPU, continuous batching attends from each request to all others, masked: more requests at once cost more than
# they save
_CPU_REQUESTS = 32
_CPU_PAGE_SIZE = 32


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """
    Leaves torch's random state as it was.

    Args:
        device (`torch.device`):
            Device of the model.
    """
    fork = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**fork):
        yield


@contextmanager
def _ready_to_generate(
    model: torch.nn.Module, accelerator: Accelerator, args: SPINConfig
) -> Iterator[tuple[PreTrainedModel | PeftModel, PreTrainedModel]]:
    """The unwrapped model in evaluation mode, and the one inside its adapter, which has no generation config."""
    was_training = model.training
    was_checkpointing = accelerator.unwrap_model(model).is_gradient_checkpointing
    with (
        unwrap_model_for_generation(
            model, accelerator, gather_deepspeed3_params=args.ds3_gather_for_generation
        ) as unwrapped_model,
        DistributedBackend(accelerator).summon_full_params(model, recurse=False),
    ):
        unwrapped_model.eval()
        # `generate` fills gaps in a config from the model's own config: leave it nothing to take
        base_model = unwrapped_model.get_base_model() if isinstance(unwrapped_model, PeftModel) else unwrapped_model
        own_config, base_model.generation_config = base_model.generation_config, GenerationConfig()
        try:
            yield unwrapped_model, base_model
        finally:
            base_model.generation_config = own_config
            model.train(was_training)
    if was_checkpointing:  # TRL turns it on again with other options than the Trainer had (trl 1.16)
        unwrapped_model.gradient_checkpointing_disable()
        enable_checkpointing(unwrapped_model, args)


# ---- generate ----


def _wrapped(number: int) -> int:
    return number - 2**64  # the same 64 bits as a signed integer, which is what torch computes with


_GAMMA, _MIX_1, _MIX_2 = map(_wrapped, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def splitmix64(state: torch.Tensor) -> torch.Tensor:
    """
    Output function of SplitMix64 (Steele, Lea and Flood, [Fast Splittable Pseudorandom Number
    Generators](https://doi.org/10.1145/2714064.2660195)): random bits that are a function of the state alone, the same
    on every device.

    Args:
        state (`torch.Tensor` of dtype `torch.int64`):
            States of the generator; n states after the seed is seed + n · 0x9E3779B97F4A7C15.

    Returns:
        `torch.Tensor`: 64 random bits for each state.
    """

    def shift(bits: torch.Tensor, by: int) -> torch.Tensor:
        return (bits >> by).bitwise_and_(2 ** (64 - by) - 1)  # `>>` alone would copy the sign

    bits = (state ^ shift(state, 30)).mul_(_MIX_1)
    bits.bitwise_xor_(shift(bits, 27)).mul_(_MIX_2)
    return bits.bitwise_xor_(shift(bits, 31))


class SampleByRow(LogitsProcessor):
    r"""
    Makes the argmax of the scores a sample from their softmax, with random numbers of its own for each row.

    `argmax(scores - log(E))` with independent `E ~ Exp(1)` is an exact sample from `softmax(scores)` (the Gumbel-max
    trick: `-log(E)` is Gumbel noise). The noise of a row is a function of its seed, of the step and of the token, so its
    sample depends neither on the rest of the batch, nor on the number of processes, nor on the device, nor on what was
    sampled before.

    Args:
        seeds (`list[int]`):
            One seed of 63 bits per row of the batch.
        device (`torch.device`):
            Device of the scores.
    """

    def __init__(self, seeds: list[int], device: torch.device):
        self.states = torch.tensor(seeds, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.states = self.states + _GAMMA
        tokens = torch.arange(1, scores.size(1) + 1, device=scores.device) * _GAMMA
        bits = splitmix64(splitmix64(self.states)[:, None] + tokens)
        # Uniform in (0, 1), with all its digits near 0, where the rare tokens are decided
        uniform = (bits >> 11).bitwise_and_(2**53 - 1).float().add_(0.5).mul_(2**-53).clamp_(max=1 - 2**-24)
        exponential = uniform.neg_().log1p_().neg_()
        return scores - exponential.log_()


class StopOnSignal(StoppingCriteria):
    """
    Ends `generate` at the next token once this process was told to stop.

    Args:
        stop_signal ([`StopSignal`]):
            Signal that ends the run early.
    """

    def __init__(self, stop_signal: StopSignal):
        self.stop_signal = stop_signal

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        stop = self.stop_signal.signum != 0
        return torch.full((input_ids.size(0),), stop, dtype=torch.bool, device=input_ids.device)


def generation_config(args: SPINConfig, end_token_ids: list[int], pad_token_id: int) -> GenerationConfig:
    """
    Generation config of the opponent. It is complete: nothing is taken over from the model's own config, whose
    sampling settings (a temperature of 0.6, say) would make the answers come from another distribution than p_θ.

    Args:
        args ([`SPINConfig`]):
            Options of generation.
        end_token_ids (`list[int]`):
            Ids that end an answer.
        pad_token_id (`int`):
            Id that fills up finished rows.

    Returns:
        [`~transformers.GenerationConfig`]: Generation config.
    """
    kwargs = args.generation_kwargs or {}
    unsupported = sorted(_SAMPLING_KWARGS & kwargs.keys())
    if unsupported:
        raise ValueError(
            f"`generation_kwargs` holds {unsupported}, which self-play does not support: each prompt gets one answer, "
            "sampled with `temperature`, `top_p`, `top_k` and `min_p`. Remove them."
        )
    return GenerationConfig(
        **{
            "do_sample": False,  # `SampleByRow` turns the argmax into a sample
            "repetition_penalty": args.repetition_penalty,
            "cache_implementation": args.cache_implementation,
            "use_cache": True,
            "eos_token_id": end_token_ids,
            "pad_token_id": pad_token_id,
            **kwargs,
        }
    )


def sampling_processors(args: SPINConfig, seeds: list[int], device: torch.device) -> LogitsProcessorList:
    """
    Logits processors that sample with the given options, in the order in which `generate` applies them.

    Args:
        args ([`SPINConfig`]):
            Options of generation.
        seeds (`list[int]`):
            One seed per row of the batch.
        device (`torch.device`):
            Device of the scores.

    Returns:
        [`~transformers.LogitsProcessorList`]: Logits processors; empty if `temperature` is 0.
    """
    processors = LogitsProcessorList()
    if args.temperature == 0:
        return processors
    if args.temperature != 1:
        processors.append(TemperatureLogitsWarper(args.temperature))
    if args.top_k:
        processors.append(TopKLogitsWarper(args.top_k))
    if args.top_p < 1:
        processors.append(TopPLogitsWarper(args.top_p))
    if args.min_p is not None:
        processors.append(MinPLogitsWarper(args.min_p))
    processors.append(SampleByRow(seeds, device))
    return processors


@contextmanager
def open_generate(
    model: torch.nn.Module,
    accelerator: Accelerator,
    stop_signal: StopSignal,
    args: SPINConfig,
    end_token_ids: list[int],
    pad_token_id: int,
) -> Iterator[Engine]:
    """
    transformers' `generate`: a sample depends on its seed alone.

    Args:
        model (`torch.nn.Module`):
            Model as prepared for training.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
        stop_signal ([`StopSignal`]):
            Signal that ends the run early.
        args ([`SPINConfig`]):
            Options of generation.
        end_token_ids (`list[int]`):
            Ids that end an answer.
        pad_token_id (`int`):
            Id that fills up batches.

    Yields:
        `Callable`: See the top of the module.
    """
    config = generation_config(args, end_token_ids, pad_token_id)
    with _ready_to_generate(model, accelerator, args) as (unwrapped_model, _), accelerator.autocast():

        @torch.no_grad()
        def answer(prompts: list[list[int]], seeds: list[int], max_new_tokens: int) -> list[list[int]] | None:
            device = unwrapped_model.device
            batch_config = copy.deepcopy(config)
            batch_config.max_new_tokens = max_new_tokens
            input_ids = pad([torch.tensor(ids) for ids in prompts], padding_value=pad_token_id, padding_side="left")
            attention_mask = pad([torch.ones(len(ids), dtype=torch.long) for ids in prompts], padding_side="left")
            with explain_out_of_memory("generation", "Lower `generation_token_budget`, here and on resume."):
                sequences = unwrapped_model.generate(
                    input_ids=input_ids.to(device),
                    attention_mask=attention_mask.to(device),
                    generation_config=batch_config,
                    logits_processor=sampling_processors(args, seeds, device),
                    stopping_criteria=StoppingCriteriaList([StopOnSignal(stop_signal)]),
                )
            return None if stop_signal.signum else sequences[:, input_ids.size(1) :].tolist()

        yield answer


# ---- Continuous batching ----


@contextmanager
def _weights_in_autocast_dtype(model: torch.nn.Module, accelerator: Accelerator) -> Iterator[None]:
    # Autocast holds in one thread, and continuous batching computes in another. Where accelerate's wrapper turns it on
    # there, float32 keys and bfloat16 values meet a cache of one dtype, and it fails (transformers 5.23). So the layers
    # get cast copies of their weights, which autocast would make as well, in place of the weights. The weights
    # themselves stay as they are: an assignment to their `data` would lose the hooks that DDP has on their gradients
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    weights, copies = [], {}
    try:
        for module in model.modules() if dtype is not None else ():
            for name, weight in list(module.named_parameters(recurse=False)):
                if weight.dtype == torch.float32:
                    if weight not in copies:  # some are shared
                        copies[weight] = torch.nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                    weights.append((module, name, weight))
                    setattr(module, name, copies[weight])
        yield
    finally:
        for module, name, weight in weights:
            setattr(module, name, weight)


def _continuous_batching_config(
    args: SPINConfig, model: PreTrainedModel, prompts: list[list[int]], seed: int, max_new_tokens: int
) -> ContinuousBatchingConfig:
    options = {
        "seed": seed,
        "max_memory_percent": 0.5,  # as in GRPOTrainer, since logits are not counted in full
        "auto_switch_to_flash": model.dtype != torch.float32,  # which flash attention cannot compute
    }
    if model.device.type == "cpu":
        # Left to itself, it would take most of the main memory
        pages = math.ceil((max(map(len, prompts)) + max_new_tokens) / _CPU_PAGE_SIZE)
        options |= {
            "page_size": _CPU_PAGE_SIZE,
            "num_blocks": pages * min(len(prompts), _CPU_REQUESTS),
            "max_batch_tokens": 512,
            "max_requests_per_batch": _CPU_REQUESTS,
        }
    return ContinuousBatchingConfig(**options | (args.transformers_continuous_batching_config or {}))


@contextmanager
def open_continuous_batching(
    model: torch.nn.Module,
    accelerator: Accelerator,
    args: SPINConfig,
    end_token_ids: list[int],
    pad_token_id: int,
) -> Iterator[Engine]:
    """
    transformers' continuous batching: a row that has ended makes room for the next one. Samples depend on what else is
    in the batch, and on its timing.

    Args:
        model (`torch.nn.Module`):
            Model as prepared for training.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
        args ([`SPINConfig`]):
            Options of generation.
        end_token_ids (`list[int]`):
            Ids that end an answer.
        pad_token_id (`int`):
            Id that fills up batches.

    Yields:
        `Callable`: See the top of the module.
    """
    sampling = {"do_sample": False}
    if args.temperature > 0:
        sampling = {"do_sample": True} | {
            option: getattr(args, option) for option in ("temperature", "top_k", "top_p", "min_p")
        }
    config = GenerationConfig(**sampling, eos_token_id=end_token_ids, pad_token_id=pad_token_id)
    with (
        _ready_to_generate(model, accelerator, args) as (_, base_model),
        _weights_in_autocast_dtype(base_model, accelerator),
    ):
        attention = base_model.config._attn_implementation

        def answer(prompts: list[list[int]], seeds: list[int], max_new_tokens: int) -> list[list[int]]:
            try:
                # It seeds the global random generator, and draws from it
                with forked_rng(base_model.device):
                    outputs = base_model.generate_batch(
                        prompts,
                        generation_config=config,
                        continuous_batching_config=_continuous_batching_config(
                            args, base_model, prompts, seeds[0], max_new_tokens
                        ),
                        progress_bar=False,
                        max_new_tokens=max_new_tokens,
                    )
            finally:
                if base_model.config._attn_implementation != attention:  # it failed before it began
                    base_model.set_attn_implementation(attention)
            # Failures are logged, and come back as empty answers, or not at all (transformers 5.23)
            errors = [output.error for output in outputs.values() if output.error is not None]
            if errors or len(outputs) < len(prompts):
                raise ValueError(
                    f"Continuous batching failed on {len(prompts) - len(outputs) + len(errors)} of {len(prompts)} "
                    f"prompts: {errors[0] if errors else 'they are missing'}. If its memory is the matter, set "
                    "`num_blocks`, `max_batch_tokens`, `max_requests_per_batch` or `max_memory_percent` in "
                    f"`transformers_continuous_batching_config` ({args.transformers_continuous_batching_config}). Or "
                    "leave `use_transformers_continuous_batching` unset, here and on resume."
                )
            return [output.generated_tokens for output in outputs.values()]

        yield answer


# ---- vLLM ----


def check_vllm(args: SPINConfig, model: PreTrainedModel | PeftModel | None = None):
    """
    Refuses what cannot be answered with vLLM, before anything is computed.

    Args:
        args ([`SPINConfig`]):
            Options of generation.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            Model, once it is loaded.

    Raises:
        `ImportError`: If vLLM is not installed.
        `ValueError`: If the model is quantized, or has no files that vLLM could load.
    """
    if not is_vllm_available():
        raise ImportError(
            "`use_vllm=True` needs vLLM: `pip install trl-spin[vllm]`, or leave `use_vllm` unset, which generates with "
            "transformers."
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"`use_vllm=True` cannot answer with a model quantized by {model.quantization_method.value}: vLLM needs the "
            "adapter merged into the weights, and merged into quantized weights it is rounded, so the opponent would not "
            "be the reference. Leave `use_vllm` unset, or set `use_transformers_continuous_batching`."
        )
    if model is not None and args.vllm_mode == "colocate" and not model.name_or_path:
        raise ValueError(
            "`use_vllm=True` builds vLLM's model from files, and this model was loaded from none (its `name_or_path` is "
            "empty). Save it with `save_pretrained`, its tokenizer too, and pass the path instead."
        )


def make_vllm_generation(trainer: "SPINTrainer") -> "VLLMGeneration":
    """
    Builds vLLM's copy of the model, or connects to its server.

    Args:
        trainer ([`SPINTrainer`]):
            Trainer.

    Returns:
        `VLLMGeneration`: TRL's interface to vLLM.
    """
    from trl.generation.vllm_generation import VLLMGeneration  # where vLLM is installed, this imports it

    args = trainer.args
    # It seeds torch's random generators
    with forked_rng(trainer.accelerator.device), _explain_vllm_out_of_memory():
        return VLLMGeneration(
            model=trainer.model,
            accelerator=trainer.accelerator,
            processing_class=trainer.processing_class,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length or trainer.max_length,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            trust_remote_code=args.trust_remote_code,
            repetition_penalty=args.repetition_penalty,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p or 0.0,
            logprobs=None,  # the trainer scores the answers itself: vLLM's numbers are off by more than λ allows
            # An answer ends at our end tokens and nowhere else, whatever the model's own config says
            generation_kwargs={
                **(args.generation_kwargs or {}),
                "ignore_eos": True,
                "stop_token_ids": trainer.end_token_ids,
            },
        )


def _explain_vllm_out_of_memory():
    return explain_out_of_memory(
        "generation",
        "Lower `vllm_gpu_memory_utilization`, set `vllm_enable_sleep_mode`, or use `vllm_mode='server'`, here and on "
        "resume.",
    )


@contextmanager
def unchanged_base_weights(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """
    Puts back the weights below an adapter, bit by bit. To merge the adapter and to take it out again changes them by
    rounding, and opponent and reference would no longer be the same model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    weights = {weight for layer in layers for weight in layer.get_base_layer().parameters()}
    copies = {weight: weight.detach().to("cpu", copy=True) for weight in weights}
    try:
        yield
    finally:
        for weight, original in copies.items():
            weight.data.copy_(original)
        for layer in layers:
            layer.merged_adapters.clear()  # should an error have left the adapter merged


def fill_up(prompts: list[list[int]], sizes: list[int]) -> list[list[int]]:
    """
    Repeats the first prompt until the batch is as large as that of any process: TRL finds each process's share of the
    answers by its own number of prompts (trl 1.16).

    Args:
        prompts (`list[list[int]]`):
            Token ids of the prompts of this process.
        sizes (`list[int]`):
            Number of prompts on each process.

    Returns:
        `list[list[int]]`: As many prompts as the largest batch has.
    """
    return prompts + prompts[:1] * (max(sizes) - len(prompts))


@contextmanager
def open_vllm(vllm: "VLLMGeneration", args: SPINConfig) -> Iterator[Engine]:
    """
    vLLM, with the weights as they are now. Samples depend on what else is in the batch.

    Args:
        vllm (`VLLMGeneration`):
            TRL's interface to vLLM.
        args ([`SPINConfig`]):
            Options of generation.

    Yields:
        `Callable`: See the top of the module.
    """
    accelerator = vllm.accelerator
    synced = False

    def answer(prompts: list[list[int]], seeds: list[int], max_new_tokens: int) -> list[list[int]]:
        nonlocal synced
        share = [(len(prompts), seeds[0])]
        shares = gather_object(share) if accelerator.num_processes > 1 else share
        with forked_rng(accelerator.device), _explain_vllm_out_of_memory():
            if not synced or args.vllm_enable_sleep_mode:  # asleep, it has lost its weights
                with unchanged_base_weights(vllm.model):
                    vllm.sync_weights()
                synced = True
            # In the same process, vLLM draws from the global random generator. The processes that share a model must
            # draw the same
            first = accelerator.process_index - accelerator.process_index % args.vllm_tensor_parallel_size
            torch.manual_seed(shares[first][1])
            vllm.max_completion_length = max_new_tokens
            _, generated, _, _ = vllm.generate(
                prompts=fill_up(prompts, [size for size, _ in shares]), images=None, num_generations=1
            )
        return [list(ids) for ids in generated[: len(prompts)]]

    yield answer
