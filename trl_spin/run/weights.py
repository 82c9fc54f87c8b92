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

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor


@torch.no_grad()
def weights_fingerprint(accelerator: Accelerator, model: torch.nn.Module) -> str:
    """
    SHA-256 of the weights, computed where they are: of a sum over positions for each tensor, exact in 64-bit integers
    and so the same on every device. It detects accidental differences, not deliberate forgery. The model may be
    sharded over the processes.
    """
    digest = hashlib.sha256()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        data = getattr(parameter, "ds_tensor", parameter)  # DeepSpeed ZeRO-3
        data = (data.to_local() if isinstance(data, DTensor) else data).detach()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}".encode())
        if data.device.type == "meta":
            continue
        for chunk in data.contiguous().view(-1).view(integers[data.element_size()]).split(2**24):
            factors = torch.arange(1, 2 * len(chunk), 2, device=chunk.device)
            digest.update(str((chunk.long() * factors).sum().item()).encode())
    parts = gather_object([digest.hexdigest()]) if accelerator.num_processes > 1 else [digest.hexdigest()]
    # One and the same for all processes, unless each has another part of the model
    return parts[0] if len(set(parts)) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def check_finite_weights(model: torch.nn.Module, step: int, iteration: int):
    """Raises a `ValueError` if a trained weight is NaN or infinite, on any process."""
    bad = next((name for name, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()), None)
    bad = [name for name in gather_object([bad]) if name is not None]
    if bad:
        raise ValueError(
            f"After step {step} (iteration {iteration}) the weights are not finite (the first is {bad[0]}). They are "
            "not saved, so the last checkpoint and iteration are intact. Lower `learning_rate`, set `max_grad_norm`, "
            "or train in bfloat16 or float32 instead of float16."
        )
