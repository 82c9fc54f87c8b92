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

"""vLLM, in the training processes or on a server, through TRL's `VLLMGeneration`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from trl.import_utils import is_vllm_available

from ..run.processes import explain_out_of_memory
from .base import Complete, Engine, check_generation_kwargs, forked_rng, grpo_options


_OUT_OF_MEMORY = (
    "Lower `vllm_gpu_memory_utilization`, set `vllm_enable_sleep_mode`, or use `vllm_mode='server'`, here and on "
    "resume."
)


@contextmanager
def unchanged_base_weights(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """
    Puts back the weights below an adapter, bit by bit. To merge the adapter and to take it out again changes them by
    rounding, and opponent and reference would no longer be the same model.
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


class VLLM(Engine):
    """vLLM, with the weights as they are now. Samples depend on what else is in the batch."""

    name = "vllm"
    flag = "use_vllm"
    # Arguments of vLLM's `SamplingParams` that would change what a completion is, or how it is sampled
    reserved = """
        n temperature top_p top_k min_p repetition_penalty max_tokens seed stop stop_token_ids ignore_eos logprobs
        prompt_logprobs
    """.split()

    Options = grpo_options("""
        use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_server_base_url vllm_server_host
        vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length
        vllm_tensor_parallel_size
    """)

    _generation = None  # made at its first use: the trial run before the first iteration

    @classmethod
    def refused(cls, args: Any) -> dict[str, str]:
        own = [option.name for option in fields(cls.Options) if option.name not in ("use_vllm", "vllm_mode")]
        # Some are for a server, and all others for a model in the training processes
        is_server = args.vllm_mode == "server"
        others = [name for name in own if name.startswith(("vllm_server_", "vllm_group_port")) != is_server]
        return dict.fromkeys(others, f"to vLLM with `vllm_mode={args.vllm_mode!r}`")

    @classmethod
    def check(cls, args: Any, model: str | PreTrainedModel | PeftModel | None = None):
        if args.vllm_mode not in ("colocate", "server"):
            raise ValueError(f"`vllm_mode` must be 'colocate' or 'server', got {args.vllm_mode!r}.")
        if model is not None and not is_vllm_available():
            raise ImportError("`use_vllm=True` needs vLLM: `pip install trl-spin[vllm]`, or leave `use_vllm` unset.")
        if model is not None:
            from trl.generation import vllm_generation  # where vLLM is installed, this imports it

            check_generation_kwargs(args, vllm_generation.SamplingParams)
        if getattr(model, "is_quantized", False):
            raise ValueError(
                f"vLLM cannot generate with a model quantized by {model.quantization_method.value}: the adapter, "
                "merged into quantized weights, is rounded, and the opponent would not be the reference. Leave "
                "`use_vllm` unset, or set `use_transformers_continuous_batching`."
            )
        if args.vllm_mode == "colocate" and not getattr(model, "name_or_path", "loaded by name"):
            raise ValueError(
                "vLLM builds its model from files, and this model was loaded from none (its `name_or_path` is empty). "
                "Save it with `save_pretrained`, its tokenizer too, and pass the path instead."
            )

    def _connect(self, model: PreTrainedModel | PeftModel):
        """Builds vLLM's copy of the model, or connects to its server."""
        from trl.generation.vllm_generation import VLLMGeneration

        args = self.args
        own = [option.name for option in fields(self.Options) if option.name != self.flag]
        shared = ["trust_remote_code", "repetition_penalty", "temperature", "top_p", "top_k"]
        options = {name.removeprefix("vllm_"): getattr(args, name) for name in own + shared}
        options["max_model_length"] = args.vllm_max_model_length or self.rules.max_length
        # A completion ends at our end tokens and nowhere else, whatever the model's own config says
        sampling = (args.generation_kwargs or {}) | {"ignore_eos": True, "stop_token_ids": self.rules.end_token_ids}
        # The trainer scores the completions itself: vLLM's log-probs are off by more than λ allows
        options |= {"generation_kwargs": sampling, "min_p": args.min_p or 0.0, "logprobs": None}
        return VLLMGeneration(model, accelerator=self.accelerator, processing_class=self.rules.tokenizer, **options)

    @contextmanager
    def open(self, model: torch.nn.Module) -> Iterator[Complete]:
        args, accelerator, synced = self.args, self.accelerator, False
        if self._generation is None:
            # FSDP's wrapper is what the Trainer takes for the model
            wrapped = accelerator.distributed_type == DistributedType.FSDP
            # It seeds torch's random generators
            with forked_rng(accelerator.device), explain_out_of_memory("generation", _OUT_OF_MEMORY):
                self._generation = self._connect(model if wrapped else accelerator.unwrap_model(model))
        vllm = self._generation

        def complete(prompts: list[list[int]], seeds: list[int], max_new_tokens: int) -> list[list[int]]:
            nonlocal synced
            shares = gather_object([(len(prompts), seeds[0])])
            with forked_rng(accelerator.device), explain_out_of_memory("generation", _OUT_OF_MEMORY):
                if not synced or args.vllm_enable_sleep_mode:  # asleep, it has lost its weights
                    with unchanged_base_weights(vllm.model):
                        vllm.sync_weights()
                    synced = True
                # In the same process, vLLM draws from the global random generator. The processes that share a model
                # must draw the same
                first = accelerator.process_index - accelerator.process_index % args.vllm_tensor_parallel_size
                torch.manual_seed(shares[first][1])
                vllm.max_completion_length = max_new_tokens
                # TRL finds each process's share of the completions by its own number of prompts (trl 1.16)
                missing = max(size for size, _ in shares) - len(prompts)
                _, generated, _, _ = vllm.generate(prompts + prompts[:1] * missing, images=None, num_generations=1)
            return [list(ids) for ids in generated[: len(prompts)]]

        yield complete

    def describe(self) -> str:
        return "with vLLM"
