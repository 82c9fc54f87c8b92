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

"""The model's weights: what tells them apart, and whether they are finite."""

import hashlib
import re
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from trl.distributed import DistributedBackend


# What torch.compile (of single layers), FSDP1 and activation checkpointing put into the names of parameters
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def whole_weights(
    accelerator: Accelerator, model: torch.nn.Module
) -> Iterator[tuple[str, torch.nn.Parameter, torch.Tensor]]:
    """
    Parameters by the names that they have in the model itself, and their values: those of ZeRO-3 and FSDP2 are gathered
    one by one, each for as long as it is looked at, so that all processes must go through all of them. FSDP1 has a flat
    shard of several parameters on each process, and none is gathered.
    """
    backend = DistributedBackend(accelerator)
    for name, parameter in accelerator.unwrap_model(model, keep_torch_compile=False).named_parameters():
        with backend.gather_params([parameter]):
            values = parameter.detach()
            if isinstance(values, DTensor):  # offloaded ones come to the device, which is where they can be gathered
                values = values.to(accelerator.device).full_tensor()
            yield _WRAPPERS.sub("", name), parameter, values


@torch.no_grad()
def weights_fingerprint(accelerator: Accelerator, model: torch.nn.Module) -> str:
    """
    SHA-256 of the weights, computed where they are: of a sum over positions for each tensor, exact in 64-bit integers
    and so the same on every device, and however the model is spread over any number of processes (but for FSDP1, where
    it is the hash of all shards). It detects accidental differences, not deliberate forgery.
    """
    digest = hashlib.sha256()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, _, values in whole_weights(accelerator, model):
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        if values.device.type == "meta":
            continue
        for chunk in values.contiguous().view(-1).view(integers[values.element_size()]).split(2**24):
            factors = torch.arange(1, 2 * len(chunk) + 1, 2, device=chunk.device)
            digest.update(str((chunk.long() * factors).sum().item()).encode())
    # Before the model is sharded, FSDP may have loaded it on the first process alone
    parts = gather_object([digest.hexdigest()])
    sharded = DistributedBackend(accelerator).fsdp_version == 1
    return hashlib.sha256("".join(parts).encode()).hexdigest() if sharded else parts[0]


def check_finite_weights(accelerator: Accelerator, model: torch.nn.Module, step: int, iteration: int):
    """Raises a `ValueError` if a trained weight is NaN or infinite, on any process."""
    weights = whole_weights(accelerator, model)
    bad = [name for name, p, values in weights if p.requires_grad and not torch.isfinite(values).all()]
    bad = gather_object(bad)
    if bad:
        raise ValueError(
            f"After step {step} (iteration {iteration}) the weights are not finite (the first is {bad[0]}). They are "
            "not saved, so the last checkpoint and iteration are intact. Lower `learning_rate`, set `max_grad_norm`, "
            "or train in bfloat16 or float32 instead of float16."
        )
