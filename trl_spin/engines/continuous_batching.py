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
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from ..compat import pass_over_cache
from .base import Complete, Engine, forked_rng, grpo_options, ready_to_generate


# Before transformers 5.18, it had another name
PAGE_SIZE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
# On a CPU, continuous batching attends from each request to all others, masked: more requests at once cost more than
# they save. Left to itself, it would take most of the main memory
_ON_CPU = {PAGE_SIZE: 32, "max_batch_tokens": 512, "max_requests_per_batch": 32}


@contextmanager
def _weights_in_autocast_dtype(model: torch.nn.Module, accelerator: Accelerator) -> Iterator[None]:
    # Autocast holds in one thread, and continuous batching computes in another. Where accelerate's wrapper turns it on
    # there, float32 keys and bfloat16 values meet a cache of one dtype, and it fails (transformers 5.23). So the
    # layers get cast copies of their weights, which autocast would make as well, in place of the weights. The weights
    # themselves stay as they are: an assignment to their `data` would lose the hooks that DDP has on their gradients
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    cast = [weight for weight in model.parameters() if dtype is not None and weight.dtype == torch.float32]
    copies = {weight: torch.nn.Parameter(weight.detach().to(dtype), requires_grad=False) for weight in cast}
    weights = [(m, name, w) for m in model.modules() for name, w in m.named_parameters(recurse=False) if w in copies]
    try:
        for module, name, weight in weights:
            setattr(module, name, copies[weight])
        yield
    finally:
        for module, name, weight in weights:
            setattr(module, name, weight)


class ContinuousBatching(Engine):
    """Samples depend on what else is in the batch, and on its timing."""

    name = "continuous_batching"
    flag = "use_transformers_continuous_batching"

    Options = grpo_options("use_transformers_continuous_batching transformers_continuous_batching_config")

    @classmethod
    def refused(cls, args: Any) -> dict[str, str]:
        # Of transformers' processors of logits, those that need the tokens so far are dropped, and others go wrong
        # (transformers 5.23)
        return dict.fromkeys(("repetition_penalty", "generation_kwargs"), "to continuous batching")

    @contextmanager
    def open(self, model: torch.nn.Module) -> Iterator[Complete]:
        args, rules = self.args, self.rules
        pass_over_cache()
        ends = {"eos_token_id": rules.end_token_ids, "pad_token_id": rules.tokenizer.pad_token_id}
        names = ("temperature", "top_k", "top_p", "min_p") if args.temperature > 0 else ()
        sampling = {"do_sample": args.temperature > 0} | {name: getattr(args, name) for name in names}
        with (
            ready_to_generate(model, self.accelerator) as (_, base_model),
            _weights_in_autocast_dtype(base_model, self.accelerator),
        ):
            attention = base_model.config._attn_implementation

            def complete(prompts: list[list[int]], seeds: list[int], max_new_tokens: int) -> list[list[int]]:
                # As in GRPOTrainer, since logits are not counted in full
                options = {"seed": seeds[0], "max_memory_percent": 0.5}
                if hasattr(ContinuousBatchingConfig, "auto_switch_to_flash"):  # from transformers 5.19 on
                    # Which cannot compute in float32
                    options["auto_switch_to_flash"] = base_model.dtype != torch.float32
                if base_model.device.type == "cpu":
                    pages = math.ceil((max(map(len, prompts)) + max_new_tokens) / _ON_CPU[PAGE_SIZE])
                    requests = min(len(prompts), _ON_CPU["max_requests_per_batch"])
                    options |= _ON_CPU | {"num_blocks": pages * requests}
                options |= args.transformers_continuous_batching_config or {}
                try:
                    # It seeds the global random generator, and draws from it
                    with forked_rng(base_model.device):
                        outputs = base_model.generate_batch(
                            prompts,
                            generation_config=GenerationConfig(**sampling, **ends),
                            continuous_batching_config=ContinuousBatchingConfig(**options),
                            progress_bar=False,
                            max_new_tokens=max_new_tokens,
                        )
                finally:
                    if base_model.config._attn_implementation != attention:  # it failed before it began
                        base_model.set_attn_implementation(attention)
                # Failures are logged, and come back as empty completions, or not at all (transformers 5.23)
                errors = [output.error for output in outputs.values() if output.error is not None]
                if errors or len(outputs) < len(prompts):
                    failed = f"{len(prompts) - len(outputs) + len(errors)} of {len(prompts)} prompts"
                    raise ValueError(
                        f"Continuous batching failed on {failed}: {(errors or ['missing'])[0]}. Lower `num_blocks`, "
                        "`max_batch_tokens`, `max_requests_per_batch` or `max_memory_percent` in "
                        "`transformers_continuous_batching_config` if memory is the matter, or leave "
                        "`use_transformers_continuous_batching` unset, here and on resume."
                    )
                return [output.generated_tokens for output in outputs.values()]

            yield complete

    def describe(self) -> str:
        return "with continuous batching"
