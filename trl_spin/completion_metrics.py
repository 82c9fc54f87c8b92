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

"""The user's own numbers of what each model completes."""

from transformers import TrainerCallback, TrainerControl, TrainerState

from .callbacks import SelfPlayCallback
from .run.games import remove_completions
from .spin_config import SPINConfig


class CompletionMetricsCallback(TrainerCallback):
    """
    Measures the model that an iteration made by its completions of held-out prompts. They are committed, and the next
    iteration's game uses them.
    """

    def __init__(self, self_play: SelfPlayCallback):
        self.self_play = self_play

    def on_epoch_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self_play, trainer = self.self_play, self.self_play.trainer
        iteration = self_play.game.schedule.ended(state.global_step)
        if iteration is not None:
            training = trainer.model.training
            pairs, _ = self_play.complete(self_play.request(iteration + 1), list(self_play.game.held_out))
            trainer.model.eval()  # `log` would add the metrics of training
            trainer.log(self_play.measures.of_completions(pairs))
            trainer.model.train(training)

    def on_train_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        iteration, processes = self.self_play.game.schedule.ended(state.global_step), self.self_play.processes
        if iteration is not None and not processes.stop.signum:
            # Those of the last model, against which nothing was played
            processes.on_main(remove_completions, args.output_dir, iteration + 1)
