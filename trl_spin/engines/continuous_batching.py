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

"""transformers' continuous batching: a row that has ended makes room for the next one."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import ContinuousBatchingConfig

from .base import Complete, Engine, forked_rng, grpo_option, ready_to_generate


# On a CPU, continuous batching attends from each request to all others, masked: more requests at once cost more than
# they save
_CPU_REQUESTS = 32
_CPU_PAGE_SIZE = 32


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


def _config(args: Any, model: PreTrainedModel, prompts: list[list[int]], seed: int, max_new_tokens: int):
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


class ContinuousBatching(Engine):
    """Samples depend on what else is in the batch, and on its timing."""

    name = "continuous_batching"
    flag = "use_transformers_continuous_batching"

    @dataclass
    class Options:
        use_transformers_continuous_batching: bool = grpo_option("use_transformers_continuous_batching")
        transformers_continuous_batching_config: dict[str, Any] | str | None = grpo_option(
            "transformers_continuous_batching_config"
        )

    @classmethod
    def refused(cls, args: Any) -> dict[str, str]:
        # Of transformers' processors of logits, those that need the tokens so far are dropped, and others go wrong
        # (transformers 5.23)
        return dict.fromkeys(("repetition_penalty", "generation_kwargs"), "to continuous batching")

    @contextmanager
    def open(self, model: torch.nn.Module) -> Iterator[Complete]:
        args, sampling = self.args, {"do_sample": self.args.temperature > 0}
        if args.temperature > 0:
            sampling |= {option: getattr(args, option) for option in ("temperature", "top_k", "top_p", "min_p")}
        config = GenerationConfig(
            **sampling, eos_token_id=self.rules.end_token_ids, pad_token_id=self.rules.tokenizer.pad_token_id
        )
        with (
            ready_to_generate(model, self.accelerator, args) as (_, base_model),
            _weights_in_autocast_dtype(base_model, self.accelerator),
        ):
            attention = base_model.config._attn_implementation

            def complete(prompts: list[list[int]], seeds: list[int], max_new_tokens: int) -> list[list[int]]:
                batching = _config(args, base_model, prompts, seeds[0], max_new_tokens)
                try:
                    # It seeds the global random generator, and draws from it
                    with forked_rng(base_model.device):
                        outputs = base_model.generate_batch(
                            prompts,
                            generation_config=config,
                            continuous_batching_config=batching,
                            progress_bar=False,
                            max_new_tokens=max_new_tokens,
                        )
                finally:
                    if base_model.config._attn_implementation != attention:  # it failed before it began
                        base_model.set_attn_implementation(attention)
                # Failures are logged, and come back as empty completions, or not at all (transformers 5.23)
                errors = [output.error for output in outputs.values() if output.error is not None]
                if errors or len(outputs) < len(prompts):
                    raise ValueError(
                        f"Continuous batching failed on {len(prompts) - len(outputs) + len(errors)} of {len(prompts)} "
                        f"prompts: {errors[0] if errors else 'they are missing'}. If its memory is the matter, set "
                        "`num_blocks`, `max_batch_tokens`, `max_requests_per_batch` or `max_memory_percent` in "
                        f"`transformers_continuous_batching_config` ({args.transformers_continuous_batching_config}). "
                        "Or leave `use_transformers_continuous_batching` unset, here and on resume."
                    )
                return [output.generated_tokens for output in outputs.values()]

            yield complete

    def describe(self) -> str:
        return "with continuous batching"
