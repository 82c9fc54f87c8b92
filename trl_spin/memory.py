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

import copy
import math
import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import psutil
import torch
import trl.trainer.utils
from accelerate.utils.memory import clear_device_cache
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from .compat import enable_checkpointing
from .run.processes import Processes
from .shared_prefix_trainer import SharedPrefixDPOTrainer


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


# Log-probs of pairs, see [`~pairs.as_preference`], with all that a backward pass needs
Forward = Callable[[list[dict[str, Any]]], torch.Tensor]


class MemoryPlan(NamedTuple):
    """
    What was decided: whether activations are checkpointed, and how large a generation batch is. And the bytes that
    training needs on each device if the longest rows get completions of the full length: weights (with the buffers
    through which processes exchange gradients), gradients, optimizer, activations (what the forward pass keeps for the
    backward pass) and temporary (what the backward pass needs beside that: tiles of logits, or a layer computed once
    more), their peak, and what is available.
    """

    estimate: dict[str, float] | None
    checkpointing: bool
    token_budget: int


def plan_memory(
    trainer: SharedPrefixDPOTrainer,
    forward: Forward,
    pair: dict[str, Any],
    processes: Processes,
    token_budget: int | None,
) -> MemoryPlan:
    """
    Estimates the memory of training, and settles what was left open: checkpointing of activations, which is off if
    training fits without it (and is left on in the model if not), and the size of generation batches, which are as
    large as fits beside the model. All processes decide alike. For a model that is spread over several devices,
    nothing is estimated, and TRL's default holds.

    Args:
        trainer ([`~shared_prefix_trainer.SharedPrefixDPOTrainer`]):
            Trainer, with its model in evaluation mode.
        forward (`Callable`):
            Forward pass of training.
        pair (`dict[str, Any]`):
            The longest row, with a completion of the full length on either side.
        processes ([`~run.processes.Processes`]):
            Processes of the run.
        token_budget (`int`, *optional*):
            Size of generation batches, if it is settled.
    """
    args, model, accelerator = trainer.args, trainer.model, processes.accelerator
    checkpointing, size = args.gradient_checkpointing, args.per_device_train_batch_size
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.is_model_parallel:
        if checkpointing is None:
            fsdp = getattr(accelerator.state, "fsdp_plugin", None)
            checkpointing = not getattr(fsdp, "activation_checkpointing", False)
            if checkpointing:
                enable_checkpointing(accelerator.unwrap_model(model), args)
        return MemoryPlan(None, checkpointing, token_budget or DEFAULT_BUDGET)

    clear_device_cache()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    estimate = {
        "weights": sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) + (args.world_size > 1) * trained,
        "gradients": trained,
        "optimizer": optimizer_bytes(trainer.optimizer, model),
        "activations": math.inf,
        "temporary": _head_bytes(model, pair, size, bool(trainer.shares_prefix)),
        "available": available_memory(accelerator.device),
    }
    room = _SAFE_SHARE * estimate["available"]
    # What one layer keeps for each token. In evaluation mode, nothing is checkpointed
    short = {key: value[:_SHORT] if key.endswith("_ids") else value for key, value in pair.items()}
    num_layers = model.config.get_text_config().num_hidden_layers
    one, two = (_saved_bytes(forward, model, [short] * number) for number in (1, 2))
    layer_bytes = (two - one) / sum(_lengths(short)) / num_layers
    if not checkpointing:
        with nullcontext() if checkpointing is False else suppress(torch.OutOfMemoryError):
            estimate["activations"] = _activation_bytes(forward, model, pair, size)
    if checkpointing is None:
        checkpointing = processes.smallest(room - _peak(estimate, args.gradient_accumulation_steps)) < 0
        if checkpointing:
            enable_checkpointing(accelerator.unwrap_model(model), args)
    if checkpointing:
        model.train()
        estimate["activations"] = _activation_bytes(forward, model, pair, size)
        model.eval()
        # Until the end of the forward pass, autocast keeps weights in lower precision; of these, no hook is told
        estimate["temporary"] = max(estimate["temporary"], 2 * one - two, size * sum(_lengths(pair)) * layer_bytes)
    estimate["peak"] = _peak(estimate, args.gradient_accumulation_steps)

    if token_budget is None:
        prompt = torch.tensor([pair["prompt_ids"][:_LONG]], device=accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            outputs = model(input_ids=prompt, use_cache=True)
        layers = getattr(outputs.past_key_values, "layers", ())
        cache = sum(t.nbytes for layer in layers for t in vars(layer).values() if isinstance(t, torch.Tensor))
        # A cache that grows is copied now and then. The prompt goes through the layers at once. And each row has
        # scores
        scores = _SCORES * 4 * outputs.logits.size(-1) / args.max_completion_length
        per_token = 1.5 * cache / prompt.size(1) + layer_bytes + scores
        tokens = processes.smallest((room - estimate["weights"] - estimate["optimizer"]) / per_token)
        largest = DEFAULT_BUDGET if accelerator.device.type == "cpu" else _LARGEST_BUDGET
        token_budget = max(1, min(largest, int(tokens)))
    return MemoryPlan(estimate, checkpointing, token_budget)


def _peak(estimate: dict[str, float], accumulation_steps: int) -> float:
    """The largest sum of what is there at the same time."""
    gradients, batch = estimate["gradients"], estimate["activations"] + estimate["temporary"]
    # Gradients of earlier batches stay. Without accumulation, the gradients come while the activations go
    batch = gradients + batch if accumulation_steps > 1 else max(gradients, batch)
    return estimate["weights"] + estimate["optimizer"] + batch


def _activation_bytes(forward: Forward, model: torch.nn.Module, pair: dict[str, Any], size: int) -> float:
    """What the forward pass keeps for the backward pass, measured with one pair and with two."""
    one = _saved_bytes(forward, model, [pair])
    # Not everything grows with the batch: autocast keeps weights in lower precision
    further = _saved_bytes(forward, model, [pair] * 2) - one if size > 1 else 0
    return one + (size - 1) * further


def _head_bytes(model: torch.nn.Module, pair: dict[str, Any], size: int, shares_prefix: bool) -> float:
    """Logits that TRL's fused head computes anew in the backward pass, and the gradient of its weight."""
    weight = model.get_output_embeddings().weight
    prompt, real, generated = _lengths(pair)
    triton, chunk = trl.trainer.utils._use_triton(weight.device), trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    # Without Triton, DPOTrainer's layout has every position scored
    scored = real + generated if triton or shares_prefix else 2 * (prompt + max(real, generated))
    logits = min(size * scored, TOKEN_CHUNK_SIZE) * (chunk if triton else _HEAD_TILES * min(len(weight), chunk))
    return 4 * logits + 4 * weight.numel() * weight.requires_grad


def available_memory(device: torch.device) -> float:
    """Bytes that this process has taken and can still take."""
    backend = getattr(torch, device.type, None)
    if not hasattr(backend, "mem_get_info"):  # the main memory, on Apple's devices too
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return psutil.virtual_memory().available / processes + psutil.Process().memory_info().rss
    return backend.mem_get_info(device)[0] + backend.memory_reserved(device)


def optimizer_bytes(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> float:
    """
    Size of the optimizer's state: what a twin of it has for one matrix, times their number. Where the twin takes no
    step, as for Adam.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    num_bytes = sum(p.nbytes for p in trained)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # inside accelerate's wrapper
    probe = torch.nn.Parameter(torch.zeros(128, 128, device=trained[0].device, dtype=trained[0].dtype))
    probe.grad = torch.zeros_like(probe)
    # Not made by its class: some of what it was made with, as the number of bits, is not in its `defaults`
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    if hasattr(twin, "mng"):  # where bitsandbytes keeps, by position, which weights of the run have 32 bits
        twin.mng = copy.copy(twin.mng)
        twin.mng.index2config = {}
    try:
        torch.optim.Optimizer.__init__(twin, [optimizer.param_groups[0] | {"params": [probe]}], optimizer.defaults)
        type(twin).step(twin)  # a scheduler has put another `step` into the instance: the optimizer's own
    except Exception:  # whatever the class asks for
        return 2 * num_bytes
    state = [value for value in twin.state[probe].values() if isinstance(value, torch.Tensor)]
    return num_bytes * sum(t.nbytes for t in state) / probe.nbytes


def _lengths(pair: dict[str, Any]) -> list[int]:
    return [len(pair[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")]


def _saved_bytes(forward: Forward, model: torch.nn.Module, pairs: list[dict[str, Any]]) -> float:
    """What the forward pass over a batch keeps for the backward pass, beside the weights."""
    saved = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that is kept as it is would hold its graph, and the graph it

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logps = forward(pairs)  # noqa: F841 - what it keeps goes with it
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    return sum(size for address, size in saved.items() if address not in weights)
