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

"""The opponent's answers: which prompts go into which batch, and what becomes of the tokens that come back."""

import hashlib
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .engines import open_continuous_batching, open_generate, open_vllm
from .resume import StopRequested, StopSignal
from .spin_config import SPINConfig


if TYPE_CHECKING:
    from trl.generation.vllm_generation import VLLMGeneration

# A run that is killed while it generates loses at most this much work
_COMMIT_SECONDS = 300
# Engines that schedule their rows themselves want many at once: while the last of them end, there is little to do. But
# only between batches are answers committed and signals heard
_LARGE_BATCH = 4096


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


def even_batches(num_rows: int, num_processes: int) -> list[list[int]]:
    """
    Groups rows into large batches of about the same size, as many for each process.

    Args:
        num_rows (`int`):
            Number of rows.
        num_processes (`int`):
            Number of processes.

    Returns:
        `list[list[int]]`: Indices of the rows in each batch.
    """
    rounds = math.ceil(num_rows / (num_processes * _LARGE_BATCH))
    num_batches = min(num_rows, rounds * num_processes)
    return [list(range(start, num_rows, num_batches)) for start in range(num_batches)]


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


def finish_answer(
    prompt_ids: list[int], generated_ids: list[int], limit: int, end_token_ids: list[int]
) -> dict[str, Any]:
    """
    Cuts an answer at its limit and at its first end token.

    Args:
        prompt_ids (`list[int]`):
            Token ids of the prompt.
        generated_ids (`list[int]`):
            Token ids as they come from the engine, which goes on until the whole batch has ended.
        limit (`int`):
            Maximum number of tokens of the answer.
        end_token_ids (`list[int]`):
            Ids that end an answer.

    Returns:
        `dict[str, Any]`: The `prompt_ids`, the `generated_ids` as sampled, with an end token where one was sampled and
        nowhere else, and whether the answer was `truncated`.
    """
    generated_ids = generated_ids[:limit]
    end = next((i for i, token in enumerate(generated_ids) if token in end_token_ids), None)
    return {
        "prompt_ids": prompt_ids,
        "generated_ids": generated_ids if end is None else generated_ids[: end + 1],
        "truncated": end is None,
    }


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
    vllm: "VLLMGeneration | None" = None,
) -> list[dict[str, Any]]:
    """
    Lets the model answer all prompts, with the engine that the options choose. Model mode, gradient checkpointing and
    generation config are as before afterwards.

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
        vllm (`VLLMGeneration`, *optional*):
            TRL's interface to vLLM. Needed with `use_vllm`.

    Returns:
        `list[dict[str, Any]]`: See [`finish_answer`]; one dict per prompt, in their order, on every process.
    """
    limits = [
        args.max_completion_length if max_length is None else min(args.max_completion_length, max_length - len(prompt))
        for prompt in prompts
    ]
    if args.generation_engine == "generate":
        batches = length_sorted_batches(
            [len(prompt) for prompt in prompts],
            lambda longest: args.generation_token_budget // (longest + args.max_completion_length),
        )
        engine = open_generate(model, accelerator, stop_signal, args, end_token_ids, pad_token_id)
    else:
        batches = even_batches(len(prompts), accelerator.num_processes)
        if args.generation_engine == "vllm":
            engine = open_vllm(vllm, args)
        else:
            engine = open_continuous_batching(model, accelerator, args, end_token_ids, pad_token_id)

    with engine as answer:

        def answer_batch(batch: list[int]) -> list[dict[str, Any]] | None:
            generated = answer([prompts[i] for i in batch], [seeds[i] for i in batch], max(limits[i] for i in batch))
            if generated is None:
                return None
            return [
                finish_answer(prompts[i], generated_ids, limits[i], end_token_ids)
                for i, generated_ids in zip(batch, generated, strict=True)
            ]

        return map_batches(accelerator, stop_signal, batches, answer_batch, desc, args.disable_tqdm, answered, commit)
