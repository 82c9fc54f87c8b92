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
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from trl.distributed import DistributedBackend


# What to do where a weight, a log-prob or a loss is not finite
OVERFLOW_REMEDY = "Lower `learning_rate`, set `max_grad_norm`, or train in bfloat16 or float32 instead of float16."
# What torch.compile (of single layers), FSDP1 and activation checkpointing put into the names of parameters
_WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@contextmanager
def _whole(accelerator: Accelerator, parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    """The values of a parameter, gathered from all processes (but for FSDP1, which has flat shards of several)."""
    with DistributedBackend(accelerator).gather_params([parameter]):
        values = parameter.detach()
        # Offloaded ones come to the device, where processes can exchange them
        yield values.to(accelerator.device).full_tensor() if isinstance(values, DTensor) else values


@torch.no_grad()
def weights_fingerprint(accelerator: Accelerator, model: torch.nn.Module) -> str:
    """
    SHA-256 of the weights, computed where they are: of a sum over positions for each tensor, exact in 64-bit integers
    and so the same on every device. However the model is spread, over any number of processes, it is the same as well
    (but for FSDP1, where it is the hash of all shards). It detects accidental differences, not deliberate forgery.
    """
    digest = hashlib.sha256()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in accelerator.unwrap_model(model, keep_torch_compile=False).named_parameters():
        with _whole(accelerator, parameter) as data:
            digest.update(f"{_WRAPPERS.sub('', name)} {tuple(data.shape)} {data.dtype}".encode())
            if data.device.type == "meta":
                continue
            for chunk in data.contiguous().view(-1).view(integers[data.element_size()]).split(2**24):
                factors = torch.arange(1, 2 * len(chunk) + 1, 2, device=chunk.device)
                digest.update(str((chunk.long() * factors).sum().item()).encode())
    parts = gather_object([digest.hexdigest()])
    # Before FSDP2 spreads a model, it may be on the first process alone
    flat = DistributedBackend(accelerator).fsdp_version == 1
    return hashlib.sha256("".join(parts).encode()).hexdigest() if flat else parts[0]


def check_finite_weights(accelerator: Accelerator, model: torch.nn.Module, step: int, iteration: int):
    """Raises a `ValueError` if a trained weight is NaN or infinite, on any process."""
    bad = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with _whole(accelerator, parameter) as data:
                bad += [] if torch.isfinite(data).all() else [name]
    if bad := gather_object(bad):
        what = f"After step {step} (iteration {iteration}) the weights are not finite (the first is {bad[0]})"
        raise ValueError(f"{what}. What was saved before is intact, and they are not saved. {OVERFLOW_REMEDY}")
