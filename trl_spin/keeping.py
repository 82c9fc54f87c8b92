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

"""The end of an iteration: what is logged, evaluated and saved there, and the model that is kept."""

import shutil
from pathlib import Path

from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import DPOTrainer

from .best import Yardstick
from .measures import last_logs
from .pairs import Game
from .run.files import RECORD, explain_write_error, model_dir, write_json
from .run.games import read_manifest
from .run.processes import Processes
from .run.weights import check_finite_weights
from .spin_config import SPINConfig


logger = get_logger(__name__)


class IterationCallback(TrainerCallback):
    """
    Logs, evaluates and saves at the end of an iteration, keeps its model in `output_dir/iteration-<t>`, and ends
    training when a signal has come.
    """

    def __init__(self, trainer: DPOTrainer, game: Game, processes: Processes, yardstick: Yardstick):
        self.trainer, self.game, self.processes, self.yardstick = trainer, game, processes, yardstick

    def on_epoch_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if (iteration := self.game.schedule.ended(state.global_step)) is not None:
            self.keep(iteration)

    def on_step_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        signum, _ = self.processes.stop.agree()
        if signum:
            self.processes.stop.signum = signum
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
        if self.game.schedule.ended(state.global_step) is not None:
            # The end of the epoch, a moment later, logs, evaluates and saves, in this order: so the checkpoint at the
            # boundary holds all that was measured, and is written once
            control.should_log = control.should_evaluate = control.should_save = False

    def on_epoch_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if self.game.schedule.ended(state.global_step) is not None:
            # What was learned against this opponent is logged before the next one comes, and the next one can be made
            # again should its completions be lost
            control.should_log = True
            control.should_evaluate = self.trainer.eval_dataset is not None
            control.should_save = args.save_strategy != "no"

    def on_train_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if (iteration := self.game.schedule.ended(state.global_step)) is not None:
            self.keep(iteration)
        elif not self.processes.stop.signum:
            logger.warning(
                f"Training ended at step {state.global_step}, in the middle of iteration {self.game.iteration}, whose "
                "model is not kept as an iteration."
            )

    def keep(self, iteration: int):
        """Keeps the model that an iteration made, with its record and model card."""
        trainer, args = self.trainer, self.trainer.args
        check_finite_weights(trainer.model, trainer.state.global_step, iteration)
        directory = model_dir(args.output_dir, iteration)
        with explain_write_error(directory):
            trainer.save_model(str(directory))
        if trainer.is_world_process_zero():
            manifest = read_manifest(args.output_dir, iteration)
            logs = last_logs(trainer.state.log_history, self.game.schedule.starts[iteration])
            settings = ("beta", "learning_rate", "num_train_epochs")
            settings = {name: args.per_iteration(name)[iteration] for name in settings}
            record = {"iteration": iteration, **manifest["metrics"], **logs, **settings}
            verdict = self.yardstick.judge(iteration, logs)[1]
            write_json(directory / RECORD, record | {"warnings": manifest["warnings"], "verdict": verdict})
            name = args.hub_model_id or Path(args.output_dir).name
            trainer.create_model_card(model_name=f"{name.split('/')[-1]}-iteration-{iteration}")
            shutil.copy(Path(args.output_dir) / "README.md", directory / "README.md")
        trainer.accelerator.wait_for_everyone()
