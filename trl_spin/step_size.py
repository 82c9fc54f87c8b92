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

"""How far to go the way that an iteration went: `step_size_search`."""

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from .callbacks import SelfPlayCallback
from .iterations import BestIterationCallback
from .spin_config import SPINConfig


class StepSizeCallback(TrainerCallback):
    r"""
    Where an iteration has ended, tries \\( \theta_t + s (\theta_{t+1} - \theta_t) \\) for several s on held-out data,
    and goes on with the best. That comes before everything else that is done with the model that the iteration made.
    """

    def __init__(self, self_play: SelfPlayCallback, best_iteration: BestIterationCallback):
        self.self_play, self.best_iteration = self_play, best_iteration

    @torch.no_grad()
    def on_epoch_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        trainer, metric = self.self_play.trainer, args.metric_for_best_iteration
        iteration = self.self_play.game.schedule.ended(state.global_step)
        if iteration is None:
            return
        weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        after = [weight.to("cpu", copy=True) for weight in weights]
        self.best_iteration.load(iteration - 1)
        before = [weight.to("cpu", copy=True) for weight in weights]

        def go(size: float):
            for weight, start, end in zip(weights, before, after, strict=True):
                weight.copy_(torch.lerp(start, end, size))  # at 0 and at 1 exact

        # Of sizes that are as good as each other, the one that is nearest to what was trained
        numbers = dict.fromkeys(sorted({0.0, 1.0, *args.step_size_search}, key=lambda size: (abs(size - 1), size)))
        for size in numbers:
            go(size)
            numbers[size] = self.self_play.measure(iteration, metric)[metric]
        best = (max if self.best_iteration.best_metric.greater_is_better else min)(numbers, key=numbers.get)
        go(best)
        trainer.model.eval()  # `log` would add the metrics of training
        tried = {f"self_play/step_size_{size:g}": number for size, number in sorted(numbers.items())}
        trainer.log({"self_play/step_size": best} | tried)
        trainer.model.train()
