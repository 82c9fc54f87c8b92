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

"""What a run needs of the device's memory, estimated before the first step from a row as long as one can get."""

import math
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import trl.trainer.utils
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import nn
from transformers import PreTrainedModel
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from .engines.base import enable_checkpointing
from .run.processes import Processes
from .spin_config import SPINConfig


# Of the memory, this much is planned with: allocators leave gaps, and libraries need some of their own
_SAFE_SHARE = 0.8
# Tiles of logits that TRL's fused head has in memory at a time where there is no Triton (trl 1.16)
_HEAD_TILES = 8
# Numbers of four bytes that `generate` has in memory at a time for each score of a next token
_SCORES = 8
# Tokens of a prompt that tell what one token needs, and those of a pair that tell what one layer needs
_LONG, _SHORT = 256, 32
# Tokens of a generation batch. On a CPU, larger ones are not faster
DEFAULT_BUDGET = 2**14
_LARGEST_BUDGET = 2**18


@dataclass(frozen=True)
class Batch:
    """
    The largest batch that training may meet.

    Args:
        forward (`Callable`):
            Forward pass of training: log-probs of pairs, see [`~pairs.as_preference`].
        model ([`~transformers.PreTrainedModel`]):
            Model, prepared for training, in evaluation mode.
        pair (`dict[str, Any]`):
            The longest row, with a completion of the full length on either side.
        size (`int`):
            Number of such pairs.
        shares_prefix (`bool`):
            Whether a pair is one row.
    """

    forward: Callable[[list[dict[str, Any]]], torch.Tensor]
    model: PreTrainedModel
    pair: dict[str, Any]
    size: int
    shares_prefix: bool

    def activation_bytes(self) -> float:
        """What the forward pass keeps for the backward pass, measured with one pair and with two."""
        one = _saved_bytes(self.forward, self.model, [self.pair])
        # Not everything grows with the batch: autocast keeps weights in lower precision
        further = _saved_bytes(self.forward, self.model, [self.pair] * 2) - one if self.size > 1 else 0
        return one + (self.size - 1) * further

    def layer_bytes(self) -> float:
        """What one layer keeps for each token."""
        short = {key: value[:_SHORT] if key.endswith("_ids") else value for key, value in self.pair.items()}
        num_layers = self.model.config.get_text_config().num_hidden_layers
        return _saved_bytes(self.forward, self.model, [short]) / sum(_lengths(short)) / num_layers

    def head_bytes(self) -> float:
        """Logits that TRL's fused head computes anew in the backward pass, and the gradient of its weight."""
        head = self.model.get_output_embeddings()
        vocab, width = head.weight.shape
        prompt, real, generated = _lengths(self.pair)
        triton, chunk = (
            trl.trainer.utils._use_triton(head.weight.device),
            trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE,
        )
        # Without Triton, DPOTrainer's layout has every position scored
        scored = real + generated if triton or self.shares_prefix else 2 * (prompt + max(real, generated))
        logits = min(self.size * scored, TOKEN_CHUNK_SIZE) * (chunk if triton else _HEAD_TILES * min(vocab, chunk))
        return 4 * logits + 4 * vocab * width * head.weight.requires_grad

    def generated_token_bytes(self, layer: float, max_new_tokens: int, accelerator: Accelerator) -> float:
        """What generation needs for each token of a batch."""
        prompt = self.pair["prompt_ids"][:_LONG]
        with torch.no_grad(), accelerator.autocast():
            outputs = self.model(input_ids=torch.tensor([prompt], device=accelerator.device), use_cache=True)
        layers = getattr(outputs.past_key_values, "layers", ())
        cache = sum(t.nbytes for layer in layers for t in vars(layer).values() if isinstance(t, torch.Tensor))
        # A cache that grows is copied now and then. The prompt goes through the layers at once. And each row has scores
        scores = _SCORES * 4 * outputs.logits.size(-1)
        return 1.5 * cache / len(prompt) + layer + scores / max_new_tokens


@dataclass
class MemoryEstimate:
    """Memory that training needs on each device, in bytes, if the longest rows get completions of the full length."""

    weights: float  # and the buffers through which processes exchange gradients
    gradients: float
    optimizer: float
    activations: float  # what the forward pass keeps for the backward pass
    temporary: float  # what the backward pass needs beside that: tiles of logits, or a layer computed once more
    gradients_stay: bool  # whether gradients of earlier batches are there in the forward pass
    available: float  # what the process has taken and can still take

    @property
    def peak(self) -> float:
        """The largest sum of what is there at the same time."""
        batch = self.activations + self.temporary
        # Without accumulation, the gradients come while the activations go
        batch = self.gradients + batch if self.gradients_stay else max(self.gradients, batch)
        return self.weights + self.optimizer + batch


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided: whether activations are checkpointed, and how large a generation batch is."""

    estimate: MemoryEstimate | None
    checkpointing: bool
    token_budget: int


def plan_spread_memory(
    model: nn.Module, args: SPINConfig, processes: Processes, token_budget: int | None
) -> MemoryPlan:
    """The plan for a model that is spread over several devices: nothing is estimated, and TRL's default holds."""
    checkpointing = args.gradient_checkpointing
    if checkpointing is None:
        fsdp = getattr(processes.accelerator.state, "fsdp_plugin", None)
        checkpointing = fsdp is None or not fsdp.activation_checkpointing
        if checkpointing:
            enable_checkpointing(processes.accelerator.unwrap_model(model), args)
    return MemoryPlan(None, checkpointing, token_budget or DEFAULT_BUDGET)


def plan_memory(
    batch: Batch, optimizer: torch.optim.Optimizer, args: SPINConfig, processes: Processes, token_budget: int | None
) -> MemoryPlan:
    """
    Estimates the memory of training, and settles what was left open: checkpointing of activations, which is off if
    training fits without it (and is left on in the model if not), and the size of generation batches, which are as large
    as fits beside the model. All processes decide alike.
    """
    clear_device_cache()
    model, accelerator, checkpointing = batch.model, processes.accelerator, args.gradient_checkpointing
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    estimate = MemoryEstimate(
        weights=sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) + (args.world_size > 1) * trained,
        gradients=trained,
        optimizer=optimizer_bytes(optimizer, model),
        activations=math.inf,
        temporary=batch.head_bytes(),
        gradients_stay=args.gradient_accumulation_steps > 1,
        available=available_memory(accelerator.device),
    )
    room = _SAFE_SHARE * estimate.available
    # In evaluation mode, nothing is checkpointed
    layer = batch.layer_bytes()
    if not checkpointing:
        with nullcontext() if checkpointing is False else suppress(torch.OutOfMemoryError):
            estimate.activations = batch.activation_bytes()
    if checkpointing is None:
        checkpointing = processes.smallest(room - estimate.peak) < 0
        if checkpointing:
            enable_checkpointing(accelerator.unwrap_model(model), args)
    if checkpointing:
        model.train()
        estimate.activations = batch.activation_bytes()
        model.eval()
        estimate.temporary = max(estimate.temporary, batch.size * sum(_lengths(batch.pair)) * layer)

    if token_budget is None:
        largest = DEFAULT_BUDGET if accelerator.device.type == "cpu" else _LARGEST_BUDGET
        per_token = batch.generated_token_bytes(layer, args.max_completion_length, accelerator)
        tokens = (room - estimate.weights - estimate.optimizer) / per_token
        token_budget = max(1, min(largest, int(processes.smallest(tokens))))
    return MemoryPlan(estimate, checkpointing, token_budget)


def available_memory(device: torch.device) -> float:
    """Bytes that this process has taken and can still take."""
    backend = getattr(torch, device.type, None)
    if not hasattr(backend, "mem_get_info"):  # the main memory, on Apple's devices too
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return psutil.virtual_memory().available / processes + psutil.Process().memory_info().rss
    return backend.mem_get_info(device)[0] + backend.memory_reserved(device)


def optimizer_bytes(optimizer: torch.optim.Optimizer, model: nn.Module) -> float:
    """
    Size of the optimizer's state: what a twin of it has for one matrix, times their number. Where the twin takes no step,
    as for Adam.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    num_bytes = sum(p.nbytes for p in trained)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
    probe = nn.Parameter(torch.zeros(128, 128, device=trained[0].device, dtype=trained[0].dtype))
    probe.grad = torch.zeros_like(probe)
    # Not made by its class: some of what it was made with, as the number of bits, is not in its `defaults`
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    try:
        torch.optim.Optimizer.__init__(twin, [optimizer.param_groups[0] | {"params": [probe]}], optimizer.defaults)
        type(twin).step(twin)  # a scheduler has put another `step` into the instance: the optimizer's own
    except Exception:  # whatever the class asks for
        return 2 * num_bytes
    state = [value for value in twin.state[probe].values() if isinstance(value, torch.Tensor)]
    return num_bytes * sum(t.nbytes for t in state) / probe.nbytes


def _lengths(pair: dict[str, Any]) -> list[int]:
    return [len(pair[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")]


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _saved_bytes(forward: Callable, model: nn.Module, pairs: list[dict[str, Any]]) -> float:
    """What the forward pass over a batch keeps for the backward pass, beside the weights."""
    saved = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.update(_storages([tensor]))
        return tensor.detach()  # an output that is kept as it is would hold its graph, and the graph it

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logps = forward(pairs)  # noqa: F841 - what it keeps goes with it
    weights = _storages([*model.parameters(), *model.buffers()])
    return sum(size for address, size in saved.items() if address not in weights)
