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

"""transformers' `generate`, with samples that depend on their seed alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from trl.trainer.utils import pad

from ..run.processes import explain_out_of_memory
from .base import Complete, Engine, grpo_options, ready_to_generate


def length_sorted_batches(lengths: np.ndarray, max_size: Callable[[int], int]) -> list[np.ndarray]:
    """
    Groups rows of similar length, the longest first so that running out of memory happens at once. `max_size` is the
    number of rows in a batch whose longest row has the given length.
    """
    order, batches = np.argsort(-lengths, kind="stable"), []
    while len(order):
        size = max(1, max_size(int(lengths[order[0]])))
        batches.append(order[:size])
        order = order[size:]
    return batches


# As signed integers of the same 64 bits, which is what torch computes with
_GAMMA, _MIX_1, _MIX_2 = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def splitmix64(state: torch.Tensor) -> torch.Tensor:
    """
    Output function of SplitMix64 (Steele, Lea and Flood, [Fast Splittable Pseudorandom Number
    Generators](https://doi.org/10.1145/2714064.2660195)): random bits that are a function of the state alone, the same
    on every device.

    Takes states of dtype `torch.int64`, where n states after the seed is seed + n · 0x9E3779B97F4A7C15, and returns 64
    random bits for each.
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
    trick: `-log(E)` is Gumbel noise). The noise of a row is a function of its seed, of the step and of the token, so
    its sample depends neither on the rest of the batch, nor on the number of processes, nor on the device, nor on what
    was sampled before.
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


def sampling_processors(args: Any, temperature: float, seeds: list[int], device: torch.device) -> LogitsProcessorList:
    """
    Logits processors that sample with the given options, in the order in which `generate` applies them, one seed per
    row of the batch; none if `temperature` is 0.
    """
    if temperature == 0:
        return LogitsProcessorList()
    processors = [
        temperature != 1 and TemperatureLogitsWarper(temperature),
        args.top_k and TopKLogitsWarper(args.top_k),
        args.top_p < 1 and TopPLogitsWarper(args.top_p),
        args.min_p is not None and MinPLogitsWarper(args.min_p),
        SampleByRow(seeds, device),
    ]
    return LogitsProcessorList(filter(None, processors))


class Generate(Engine):
    """transformers' `generate`: a sample depends on its seed alone."""

    name = "generate"
    # These act on sampling inside `generate`, which here only takes the argmax (see `SampleByRow`), or are set here
    reserved = """do_sample num_beams typical_p epsilon_cutoff eta_cutoff top_h num_return_sequences temperature top_p top_k
        min_p repetition_penalty cache_implementation max_new_tokens eos_token_id return_dict_in_generate""".split()

    Options = grpo_options("cache_implementation")

    @classmethod
    def check(cls, args: Any, model: Any = None):
        kwargs = args.generation_kwargs or {}
        try:
            if unknown := GenerationConfig().update(cache_implementation=args.cache_implementation, **kwargs):
                raise TypeError(f"`GenerationConfig` has no {sorted(unknown)}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"`generation_kwargs={args.generation_kwargs}` cannot be used: {error}") from error

    def batches(self, lengths: np.ndarray, max_new_tokens: int) -> list[np.ndarray]:
        return length_sorted_batches(lengths, lambda longest: (self.token_budget or 1) // (longest + max_new_tokens))

    @contextmanager
    def open(self, model: torch.nn.Module) -> Iterator[Complete]:
        args, stop, pad_token_id = self.args, self.processes.stop, self.rules.tokenizer.pad_token_id
        # The config is complete: the model's own sampling settings (a temperature of 0.6, say) would make the
        # completions come from another distribution than p_θ. `SampleByRow` turns the argmax into a sample
        options = {"do_sample": False, "repetition_penalty": args.repetition_penalty, "use_cache": True}
        options |= {"eos_token_id": self.rules.end_token_ids, "pad_token_id": pad_token_id}
        options |= {"cache_implementation": args.cache_implementation} | (args.generation_kwargs or {})

        def stopped(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
            return torch.full((len(input_ids),), stop.signum != 0, device=input_ids.device)

        with ready_to_generate(model, self.accelerator) as unwrapped_model, self.accelerator.autocast():

            @torch.no_grad()
            def complete(prompts, seeds, max_new_tokens, temperature):  # see `Complete`
                device = unwrapped_model.device
                ids = pad([torch.tensor(prompt) for prompt in prompts], pad_token_id, padding_side="left")
                mask = pad([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], padding_side="left")
                with explain_out_of_memory("generation", "Lower `generation_token_budget`, here and on resume."):
                    sequences = unwrapped_model.generate(
                        input_ids=ids.to(device),
                        attention_mask=mask.to(device),
                        generation_config=GenerationConfig(**options | {"max_new_tokens": max_new_tokens}),
                        logits_processor=sampling_processors(args, temperature, seeds, device),
                        stopping_criteria=StoppingCriteriaList([stopped]),
                    )
                return None if stop.signum else sequences[:, ids.size(1) :].tolist()

            yield complete
