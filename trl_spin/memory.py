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
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import torch
import trl.trainer.utils
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from .spin_config import SPINConfig


if TYPE_CHECKING:
    from .spin_trainer import SPINTrainer

# Of the memory, this much is planned with: allocators leave gaps, and libraries need some of their own
_SAFE_SHARE = 0.8
# Tiles of logits that TRL's fused head has in memory at a time where there is no Triton (trl 1.16)
_HEAD_TILES = 8
# Numbers of four bytes that `generate` has in memory at a time for each score of a next token
_SCORES = 8
# Tokens of a prompt that tell what one token needs, and those of a pair that tell what one layer needs
_LONG, _SHORT = 256, 32
# Tokens of a generation batch. On a CPU, larger ones are not faster
_DEFAULT_BUDGET = 2**14
_LARGEST_BUDGET = 2**18


@dataclass
class MemoryEstimate:
    """
    Memory that training needs on each device, in bytes, if the longest rows get answers of the full length.

    Args:
        weights (`float`):
            Weights, and the buffers through which processes exchange gradients.
        gradients (`float`):
            Gradients.
        optimizer (`float`):
            State of the optimizer.
        activations (`float`):
            What the forward pass keeps for the backward pass.
        temporary (`float`):
            What the backward pass needs beside that: tiles of logits, or a layer that is computed once more.
        gradients_stay (`bool`):
            Whether gradients of earlier batches are there in the forward pass.
        available (`float`):
            What the process has taken and can still take.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float
    gradients_stay: bool
    available: float

    @property
    def peak(self) -> float:
        """The largest sum of what is there at the same time, in bytes."""
        batch = self.activations + self.temporary
        # Without accumulation, the gradients come while the activations go
        batch = self.gradients + batch if self.gradients_stay else max(self.gradients, batch)
        return self.weights + self.optimizer + batch


def plan_memory(trainer: "SPINTrainer", pair: dict[str, Any]) -> MemoryEstimate | None:
    """
    Estimates the memory of training, and settles what was left open: `gradient_checkpointing`, which is off if training
    fits without it, and `generation_token_budget`, which is as large as fits beside the model. The sizes of what the
    forward pass keeps are measured, with one pair and with two.

    Args:
        trainer ([`SPINTrainer`]):
            Trainer, with its model prepared for training, in evaluation mode.
        pair (`dict[str, Any]`):
            The longest row, as [`~game.GameDataset.serve`] gives it.

    Returns:
        [`MemoryEstimate`] or `None`: Estimate; `None` if the model is spread over several devices.
    """
    args, model = trainer.args, trainer.model
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.is_model_parallel:
        if args.gradient_checkpointing is None:
            fsdp = getattr(trainer.accelerator.state, "fsdp_plugin", None)
            _set_checkpointing(trainer, fsdp is None or not fsdp.activation_checkpointing)
        args.generation_token_budget = args.generation_token_budget or _DEFAULT_BUDGET
        return None

    clear_device_cache()
    pair = _with_full_answer(trainer, pair)
    short = {key: value[:_SHORT] if key.endswith("_ids") else value for key, value in pair.items()}
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    estimate = MemoryEstimate(
        weights=sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) + (args.world_size > 1) * trained,
        gradients=trained,
        optimizer=optimizer_bytes(trainer),
        activations=math.inf,
        temporary=_head_bytes(trainer, pair),
        gradients_stay=args.gradient_accumulation_steps > 1,
        available=available_memory(trainer.accelerator.device),
    )
    room = _SAFE_SHARE * estimate.available
    # In evaluation mode, nothing is checkpointed
    layer = _saved_bytes(trainer, [short]) / _num_tokens(short) / model.config.get_text_config().num_hidden_layers
    if args.gradient_checkpointing is None:
        with suppress(torch.OutOfMemoryError):
            estimate.activations = _activation_bytes(trainer, pair)
        _set_checkpointing(trainer, _smallest(trainer, room - estimate.peak) < 0)
    elif not args.gradient_checkpointing:
        estimate.activations = _activation_bytes(trainer, pair)
    if args.gradient_checkpointing:
        model.train()
        estimate.activations = _activation_bytes(trainer, pair)
        model.eval()
        recomputed = args.per_device_train_batch_size * _num_tokens(pair) * layer
        estimate.temporary = max(estimate.temporary, recomputed)

    if args.generation_token_budget is None:
        largest = _DEFAULT_BUDGET if trainer.accelerator.device.type == "cpu" else _LARGEST_BUDGET
        tokens = (room - estimate.weights - estimate.optimizer) / _bytes_per_generated_token(trainer, pair, layer)
        args.generation_token_budget = max(1, min(largest, int(_smallest(trainer, tokens))))
    return estimate


def enable_checkpointing(model: PreTrainedModel | PeftModel, args: SPINConfig):
    """
    Turns gradient checkpointing on, with the options that the Trainer knows.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model.
        args ([`SPINConfig`]):
            Options.
    """
    kwargs = dict(args.gradient_checkpointing_kwargs or {})
    # These are for the model, all others for torch
    options = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
    # The name that all versions of transformers before 6 have
    model.gradient_checkpointing_enable(kwargs or None, **options)


def available_memory(device: torch.device) -> float:
    """
    Memory that this process has taken and can still take.

    Args:
        device (`torch.device`):
            Device.

    Returns:
        `float`: Bytes.
    """
    backend = getattr(torch, device.type, None)
    if not hasattr(backend, "mem_get_info"):  # the main memory, on Apple's devices too
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return psutil.virtual_memory().available / processes + psutil.Process().memory_info().rss
    return backend.mem_get_info(device)[0] + backend.memory_reserved(device)


def optimizer_bytes(trainer: "SPINTrainer") -> float:
    """
    Size of the optimizer's state, as an optimizer of the same kind has it for one matrix.

    Args:
        trainer ([`SPINTrainer`]):
            Trainer with its optimizer.

    Returns:
        `float`: Bytes. For optimizers that are not the Trainer's, or only for some layers: as for Adam.
    """
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    num_bytes = sum(p.nbytes for p in trained)
    if trainer.args.optim_target_modules is not None:
        return 2 * num_bytes
    probe = nn.Linear(128, 128, bias=False, device=trained[0].device, dtype=trained[0].dtype)
    twin = copy.copy(trainer)
    twin.optimizer = None
    optimizer = twin.create_optimizer(probe)
    if type(optimizer) is not type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)):
        return 2 * num_bytes
    probe.weight.grad = torch.zeros_like(probe.weight)
    optimizer.step()
    state = [value for value in optimizer.state[probe.weight].values() if isinstance(value, torch.Tensor)]
    return num_bytes * sum(t.nbytes for t in state) / probe.weight.nbytes


def _with_full_answer(trainer: "SPINTrainer", pair: dict[str, Any]) -> dict[str, Any]:
    length = trainer.args.max_completion_length
    if trainer.max_length is not None:
        length = min(length, trainer.max_length - len(pair["prompt_ids"]))
    answer = (pair["chosen_ids"] * length)[:length]
    return pair | {"rejected_ids": answer} | ({"proto_ids": answer} if trainer.plays_triplets else {})


def _num_tokens(pair: dict[str, Any]) -> int:
    return sum(len(pair[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _saved_bytes(trainer: "SPINTrainer", pairs: list[dict[str, Any]]) -> float:
    """What the forward pass over a batch keeps for the backward pass, beside the weights."""
    inputs = trainer._prepare_inputs(trainer.data_collator(pairs))
    saved = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.update(_storages([tensor]))
        return tensor.detach()  # an output that is kept as it is would hold its graph, and the graph it

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logps = [trainer._token_logps(trainer._in_layout(trainer.model), inputs)]
        if trainer.plays_triplets:
            proto = {key.removeprefix("proto_"): inputs[key] for key in inputs if key.startswith("proto_")}
            logps.append(trainer._token_logps(trainer.model, proto))
    weights = _storages([*trainer.model.parameters(), *trainer.model.buffers()])
    return sum(size for address, size in saved.items() if address not in weights)


def _activation_bytes(trainer: "SPINTrainer", pair: dict[str, Any]) -> float:
    one = _saved_bytes(trainer, [pair])
    more = trainer.args.per_device_train_batch_size - 1
    # Not everything grows with the batch: autocast keeps weights in lower precision
    return one + more * (_saved_bytes(trainer, [pair, pair]) - one) if more else one


def _head_bytes(trainer: "SPINTrainer", pair: dict[str, Any]) -> float:
    """Logits that TRL's fused head computes anew in the backward pass, and the gradient of its weight."""
    head = trainer.model.get_output_embeddings()
    vocab, width = head.weight.shape
    prompt, real, generated = (len(pair[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))
    triton = trl.trainer.utils._use_triton(trainer.accelerator.device)
    # Without Triton, DPOTrainer's layout has every position scored
    scored = real + generated if triton or trainer._shares_prefix else 2 * (prompt + max(real, generated))
    positions = min(trainer.args.per_device_train_batch_size * scored, TOKEN_CHUNK_SIZE)
    if triton:
        logits = positions * trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE * 4
    else:
        logits = _HEAD_TILES * positions * min(vocab, trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE) * 4
    return logits + 4 * vocab * width * head.weight.requires_grad


def _bytes_per_generated_token(trainer: "SPINTrainer", pair: dict[str, Any], layer: float) -> float:
    args, prompt = trainer.args, pair["prompt_ids"][:_LONG]
    with torch.no_grad(), trainer.accelerator.autocast():
        ids = torch.tensor([prompt], device=trainer.accelerator.device)
        outputs = trainer.model(input_ids=ids, use_cache=True)
    layers = getattr(outputs.past_key_values, "layers", ())
    cache = sum(t.nbytes for layer in layers for t in vars(layer).values() if isinstance(t, torch.Tensor))
    # A cache that grows is copied now and then. The prompt goes through the layers at once. And each answer has scores
    scores = _SCORES * 4 * outputs.logits.size(-1)
    return 1.5 * cache / len(prompt) + layer + scores / args.max_completion_length


def _set_checkpointing(trainer: "SPINTrainer", on: bool):
    args = trainer.args
    args.gradient_checkpointing = args.activation_checkpointing = on
    if on:
        enable_checkpointing(trainer.accelerator.unwrap_model(trainer.model), args)


def _smallest(trainer: "SPINTrainer", value: float) -> float:
    """Of all processes, so that they decide alike."""
    value = torch.tensor([value], dtype=torch.float32, device=trainer.accelerator.device)
    return trainer.accelerator.gather(value).min().item()
