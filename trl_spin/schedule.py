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

"""Which iteration a step belongs to. Iterations are made of whole epochs, and all epochs have as many steps."""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler


@dataclass(frozen=True)
class Schedule:
    """
    Where iterations begin and end.

    Args:
        num_epochs (`list[int]`):
            Passes over the prompts in each iteration.
        steps_per_epoch (`int`):
            Optimizer steps in a pass.
    """

    num_epochs: list[int]
    steps_per_epoch: int

    @cached_property
    def starts(self) -> list[int]:
        """First step of each iteration, and the end of the last."""
        return [epochs * self.steps_per_epoch for epochs in (0, *accumulate(self.num_epochs))]

    def locate(self, step: int) -> tuple[int, int, int]:
        """Iteration, epoch in the iteration, and step in the epoch."""
        iteration = bisect_right(self.starts, step) - 1
        return iteration, *divmod(step - self.starts[iteration], self.steps_per_epoch)

    def begins(self, step: int) -> bool:
        """Whether an iteration begins after this number of steps."""
        return step in self.starts[:-1]

    def ended(self, step: int) -> int | None:
        """The iteration that ends after this number of steps, if one does."""
        return self.starts.index(step) - 1 if step in self.starts[1:] else None


class ChainedLR(LambdaLR):
    """
    Learning rates that are a function of the global step and of nothing else.

    A checkpoint holds the learning rate of the step that comes next, which is another one if the run goes on with more
    iterations than were planned when it was saved: it is recomputed when a checkpoint is loaded.
    """

    def load_state_dict(self, state_dict: dict):
        super().load_state_dict(state_dict)
        factors = [factor(self.last_epoch) for factor in self.lr_lambdas]
        self._last_lr = [rate * factor for rate, factor in zip(self.base_lrs, factors, strict=True)]
        for group, learning_rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = learning_rate


def chain_schedules(
    schedule: Schedule, peaks: list[float], optimizer: torch.optim.Optimizer, args: TrainingArguments
) -> ChainedLR:
    """
    One learning-rate schedule per iteration, one after the other.

    Args:
        schedule ([`Schedule`]):
            Where iterations begin.
        peaks (`list[float]`):
            Peak learning rate of each iteration.
        optimizer (`torch.optim.Optimizer`):
            Optimizer, made with the first peak.
        args ([`~transformers.TrainingArguments`]):
            Kind of the schedule, and its warm-up.

    Raises:
        `ValueError`: If the kind of schedule depends on more than the step.
    """
    factors = []
    for num_epochs, peak in zip(schedule.num_epochs, peaks, strict=True):
        num_steps = num_epochs * schedule.steps_per_epoch
        placeholder, warmup = torch.optim.SGD([torch.zeros(1)], lr=peak), args.get_warmup_steps(num_steps)
        part = get_scheduler(args.lr_scheduler_type, placeholder, warmup, num_steps, args.lr_scheduler_kwargs)
        if not isinstance(part, LambdaLR):
            fault = "depends on more than the step, and cannot restart at each iteration: use 'linear' or 'cosine'"
            raise ValueError(f"`lr_scheduler_type={args.lr_scheduler_type!r}` {fault}.")
        scale = peak / peaks[0] if peak != peaks[0] else 1.0
        factors += [scale * part.lr_lambdas[0](step) for step in range(num_steps)]
    return ChainedLR(optimizer, lambda step: factors[min(step, len(factors) - 1)])
