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

"""The opponent's answers: sampling with transformers' `generate`, token ids in, token ids out."""

import copy
import hashlib
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from tqdm.auto import tqdm
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
from trl.distributed import DistributedBackend
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import pad

from .resume import StopRequested, StopSignal, explain_out_of_memory
from .spin_config import SPINConfig


# A run that is killed while it generates loses at most this much work
_COMMIT_SECONDS = 300

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


def row_seed(*position: Any) -> int:
    """
    Seed of a row's sample, a function of its position and of nothing that happened before.

    Args:
        *position:
            Where the row stands: seed of the run, iteration, name of the dataset, index of the row.

    Returns:
        `int`: 63-bit seed.
    """
    digest = hashlib.sha256("/".join(map(str, position)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class SampleByRow(LogitsProcessor):
    r"""
    Makes the argmax of the scores a sample from their softmax, with a random generator of its own for each row.

    `argmax(scores - log(E))` with independent `E ~ Exp(1)` is an exact sample from `softmax(scores)` (the Gumbel-max
    trick: `-log(E)` is Gumbel noise). As each row draws its noise from its own seed, its sample depends neither on the
    rest of the batch, nor on the number of processes, nor on what was sampled before.

    Args:
        seeds (`list[int]`):
            One seed per row of the batch.
        device (`torch.device`):
            Device of the scores.
    """

    def __init__(self, seeds: list[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_()


def length_sorted_batches(lengths: list[int], max_size: Callable[[int], int]) -> list[list[int]]:
    """
    Groups rows of similar length, the longest first so that running out of memory happens at once.

    Args:
        lengths (`list[int]`):
            Length of each row.
        max_size (`Callable[[int], int]`):
            Number of rows in a batch whose longest row has the given length.

    Returns:
        `list[list[int]]`: Indices of the rows in each batch. They depend on the lengths alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches = []
    while order:
        size = max(1, max_size(lengths[order[0]]))
        batches.append(order[:size])
        order = order[size:]
    return batches


def map_batches(
    accelerator: Accelerator,
    stop_signal: StopSignal,
    batches: list[list[int]],
    function: Callable[[list[int]], list | None],
    desc: str,
    disable: bool,
    done: dict[int, Any] | None = None,
    commit: Callable[[list[tuple[int, Any]]], None] | None = None,
) -> list:
    """
    Applies a function to batches of rows, spread over the processes.

    Every process works on the same number of batches (sharded models need all of them in every forward pass) and
    returns all results. After each round of batches the processes agree whether one of them was told to stop.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
        stop_signal ([`StopSignal`]):
            Signal that ends the run early.
        batches (`list[list[int]]`):
            Indices of the rows in each batch. Together they hold each of 0..N-1 once.
        function (`Callable[[list[int]], list | None]`):
            Maps the indices of a batch to one result per row, or to `None` if a signal cut it short.
        desc (`str`):
            Title of the progress bar.
        disable (`bool`):
            Whether to hide the progress bar.
        done (`dict[int, Any]`, *optional*):
            Results that are known already.
        commit (`Callable[[list[tuple[int, Any]]], None]`, *optional*):
            Is given the new results, with their indices, on every process: every few minutes, at the end, and when the
            run is told to stop.

    Returns:
        `list`: One result per row, in the order of the rows.

    Raises:
        `StopRequested`: If one of the processes was told to stop.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    num_rows = sum(map(len, batches))
    results = dict(done or {})
    batches = [left for batch in batches if (left := [i for i in batch if i not in results])]
    new, last_commit = [], time.monotonic()
    with tqdm(
        total=num_rows,
        initial=len(results),
        desc=desc,
        unit=" rows",
        disable=disable or not accelerator.is_main_process,
    ) as progress:
        for start in range(0, len(batches), world_size):
            batch = batches[min(start + rank, len(batches) - 1)]
            batch_results = function(batch)
            if batch_results is not None:
                new.extend(zip(batch, batch_results, strict=True))
            progress.update(sum(map(len, batches[start : start + world_size])))
            # The first process has the clock
            signum, due = stop_signal.agree(time.monotonic() - last_commit > _COMMIT_SECONDS)
            if signum or due or start + world_size >= len(batches):
                gathered = gather_object(new) if world_size > 1 else new
                results.update(gathered)
                if commit is not None:
                    commit(list(dict(gathered).items()))
                new, last_commit = [], time.monotonic()
            if signum:
                raise StopRequested(signum)
    return [results[i] for i in range(num_rows)]


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


@torch.no_grad()
def generate_batch(
    model: PreTrainedModel,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    stop_signal: StopSignal,
    prompts: list[list[int]],
    max_new_tokens: list[int],
) -> list[dict[str, Any]] | None:
    """
    Lets the model answer a batch of prompts.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model, in evaluation mode.
        config ([`~transformers.GenerationConfig`]):
            Generation config.
        processors ([`~transformers.LogitsProcessorList`]):
            Logits processors that sample.
        stop_signal ([`StopSignal`]):
            Signal that ends the run early.
        prompts (`list[list[int]]`):
            Token ids of the prompts.
        max_new_tokens (`list[int]`):
            Maximum number of tokens of each answer.

    Returns:
        `list[dict[str, Any]]` or `None`: For each prompt the `prompt_ids` that the model saw, the `generated_ids` as
        sampled, with an end token where one was sampled and nowhere else, and whether the answer was `truncated`.
        `None` if a signal cut the answers short.
    """
    device = model.device
    config = copy.deepcopy(config)
    config.max_new_tokens = max(max_new_tokens)
    input_ids = pad([torch.tensor(ids) for ids in prompts], padding_value=config.pad_token_id, padding_side="left")
    attention_mask = pad([torch.ones(len(ids), dtype=torch.long) for ids in prompts], padding_side="left")
    sequences = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=config,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([StopOnSignal(stop_signal)]),
    ).tolist()
    if stop_signal.signum:
        return None
    width = input_ids.size(1)
    answers = []
    for sequence, prompt, limit in zip(sequences, prompts, max_new_tokens, strict=True):
        generated = sequence[width : width + limit]
        end = next((i for i, token in enumerate(generated) if token in config.eos_token_id), None)
        answers.append(
            {
                "prompt_ids": sequence[width - len(prompt) : width],
                "generated_ids": generated if end is None else generated[: end + 1],
                "truncated": end is None,
            }
        )
    return answers


def generate(
    model: torch.nn.Module,
    accelerator: Accelerator,
    stop_signal: StopSignal,
    args: SPINConfig,
    prompts: list[list[int]],
    seeds: list[int],
    end_token_ids: list[int],
    pad_token_id: int,
    max_length: int | None,
    desc: str,
    answered: dict[int, dict[str, Any]] | None = None,
    commit: Callable[[list[tuple[int, dict[str, Any]]]], None] | None = None,
) -> list[dict[str, Any]]:
    """
    Lets the model answer all prompts. Model mode, gradient checkpointing and generation config are as before
    afterwards.

    Args:
        model (`torch.nn.Module`):
            Model as prepared for training.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
        stop_signal ([`StopSignal`]):
            Signal that ends the run early.
        args ([`SPINConfig`]):
            Options of generation.
        prompts (`list[list[int]]`):
            Token ids of the prompts.
        seeds (`list[int]`):
            One seed per prompt.
        end_token_ids (`list[int]`):
            Ids that end an answer.
        pad_token_id (`int`):
            Id that fills up batches.
        max_length (`int` or `None`):
            Longest prompt plus answer, in tokens.
        desc (`str`):
            Title of the progress bar.
        answered (`dict[int, dict[str, Any]]`, *optional*):
            Answers that are there already, by index of the prompt.
        commit (`Callable`, *optional*):
            See [`map_batches`].

    Returns:
        `list[dict[str, Any]]`: See [`generate_batch`]; one dict per prompt, in their order, on every process.
    """
    config = generation_config(args, end_token_ids, pad_token_id)
    limits = [
        args.max_completion_length if max_length is None else min(args.max_completion_length, max_length - len(prompt))
        for prompt in prompts
    ]
    batches = length_sorted_batches(
        [len(prompt) for prompt in prompts],
        lambda longest: args.generation_token_budget // (longest + args.max_completion_length),
    )
    was_training = model.training
    with (
        unwrap_model_for_generation(
            model,
            accelerator,
            gather_deepspeed3_params=args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        ) as unwrapped_model,
        DistributedBackend(accelerator).summon_full_params(model, recurse=False),
        accelerator.autocast(),
    ):
        unwrapped_model.eval()
        # `generate` fills gaps in `config` from the model's own config: leave it nothing to take
        base_model = unwrapped_model.get_base_model() if isinstance(unwrapped_model, PeftModel) else unwrapped_model
        own_config, base_model.generation_config = base_model.generation_config, GenerationConfig()

        def answer(batch: list[int]) -> list[dict[str, Any]] | None:
            processors = sampling_processors(args, [seeds[i] for i in batch], unwrapped_model.device)
            with explain_out_of_memory("generation", "Lower `generation_token_budget`, here and on resume."):
                return generate_batch(
                    unwrapped_model,
                    config,
                    processors,
                    stop_signal,
                    [prompts[i] for i in batch],
                    [limits[i] for i in batch],
                )

        try:
            return map_batches(accelerator, stop_signal, batches, answer, desc, args.disable_tqdm, answered, commit)
        finally:
            base_model.generation_config = own_config
            model.train(was_training)
