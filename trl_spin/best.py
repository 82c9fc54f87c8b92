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

"""Which iteration is the best, and whether the game should go on: one number, measured of each model."""

from dataclasses import dataclass
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import DPOTrainer

from .measures import last_logs
from .pairs import Game
from .report.signals import judge
from .run.files import model_dir, read_records
from .run.games import read_manifest
from .run.processes import Processes
from .run.weights import keep_base_weights, load_base_weights
from .spin_config import SPINConfig


logger = get_logger(__name__)


@dataclass(frozen=True)
class Yardstick:
    """
    The number that compares the model that self-play started from (-1) and those of the iterations.

    Args:
        name (`str`):
            See `metric_for_best_iteration` in [`SPINConfig`].
        decides (`bool`):
            Whether something depends on it, so that it must be measured.
        output_dir (`str`):
            Output directory of the run.
    """

    name: str
    decides: bool
    output_dir: str

    @property
    def greater_is_better(self) -> bool:
        return "completions/" in self.name

    def value(self, metrics: dict[str, float], at_start: bool = False) -> float | None:
        """The number, of a finished iteration or, `at_start`, of the game of iteration 0."""
        key = self.name.replace("nll/real", "self_play/nll_real") if at_start else self.name
        if key not in metrics and self.decides:
            known = sorted(key.replace("self_play/nll_real", "nll/real") for key in metrics if key.startswith("eval_"))
            known = [key for key in known if key.endswith("nll/real") or "completions/" in key]
            raise ValueError(
                f"`metric_for_best_iteration` is {self.name!r}, which is not measured. There are {known}."
            )
        return metrics.get(key)

    def value_at_start(self) -> float | None:
        """The number of the model that self-play started from."""
        manifest = read_manifest(self.output_dir, 0)
        return None if manifest is None else self.value(manifest["metrics"], at_start=True)

    def values(self, last: int) -> dict[int, float]:
        """The numbers up to an iteration, as far as they were measured and their folders are there."""
        records = {record["iteration"]: self.value(record) for record in read_records(self.output_dir, last + 1)}
        return {t: value for t, value in ({-1: self.value_at_start()} | records).items() if value is not None}

    def judge(self, iteration: int, logs: dict[str, float]) -> tuple[bool, str | None]:
        """Whether an iteration that has ended is no worse than what it began with, and the verdict in words."""
        before, after = self.values(iteration - 1).get(iteration - 1), self.value(logs)
        if before is None or after is None:
            return True, None
        return judge(before, after, self.name, self.greater_is_better)

    def why_stop(self, iteration: int, logs: dict[str, float]) -> str | None:
        """Why the game should end after an iteration, if it should, by what was logged last in it."""
        if self.name not in logs:
            return None  # this was the evaluation of another dataset
        fine, verdict = self.judge(iteration, logs)
        if not fine:
            return f"iteration {iteration} hurt ({verdict})"
        prefix = self.name.removesuffix("nll/real").split("completions/")[0]
        low, high = (logs[f"{prefix}rewards/accuracies_{end}"] for end in ("low", "high"))
        if low <= 0.5:
            return (
                "held-out real and generated completions can no longer be told apart (accuracy between "
                f"{low:.3f} and {high:.3f})"
            )
        return None

    def find_best(self, last: int) -> int:
        """The best iteration up to the last one, which it is as well if nothing was measured."""
        values = self.values(last)
        if last not in values:
            return last
        best = (max if self.greater_is_better else min)(values, key=values.get)
        if best != last:
            model = "the model that self-play started from" if best == -1 else f"iteration {best}'s"
            logger.warning(
                f"The last model is not the best one: `{self.name}` is {values[last]:.4g} for it, and {values[best]:.4g} "
                f"for {model}."
            )
        return best


class BestIterationCallback(TrainerCallback):
    """Ends the game where `early_stopping` asks for it, and returns to the best model at its end."""

    def __init__(self, trainer: DPOTrainer, game: Game, processes: Processes, yardstick: Yardstick):
        self.trainer, self.game, self.processes, self.yardstick = trainer, game, processes, yardstick

    def game_is_over(self, log_history: list[dict[str, Any]], step: int) -> bool:
        """Whether the iteration that ended at this step, if one did, was the last by `early_stopping`."""
        iteration, schedule = self.game.schedule.ended(step), self.game.schedule
        if not self.trainer.args.early_stopping or iteration in (None, len(schedule.num_epochs) - 1):
            return False
        logs = last_logs(log_history, schedule.starts[iteration])
        reason = self.processes.on_main(self.yardstick.why_stop, iteration, logs)
        if reason is not None:
            logger.warning(f"The game ends after iteration {iteration}: {reason}.")
        return reason is not None

    def on_train_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if args.load_best_iteration_at_end and state.global_step == 0:
            if self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled:
                raise ValueError(
                    "`load_best_iteration_at_end` exchanges the model's weights in place, which DeepSpeed and FSDP do not "
                    "allow. Leave it unset, or train with plain data parallelism."
                )
            keep_base_weights(self.processes, self.trainer.model, args.output_dir)

    def on_epoch_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step == 0:  # so that a name that does not exist fails before anything is trained
            self.processes.on_main(self.yardstick.value_at_start)

    def on_evaluate(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if self.game_is_over(state.log_history, state.global_step):
            control.should_training_stop = True

    def on_train_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        last = self.game.schedule.ended(state.global_step)
        if last is None or self.processes.stop.signum:
            return
        best = self.processes.on_main(self.yardstick.find_best, last)
        if args.load_best_iteration_at_end:
            if best == -1:
                load_base_weights(self.processes, self.trainer.model, args.output_dir)
            else:
                self.trainer._load_from_checkpoint(str(model_dir(args.output_dir, best)))
            self.trainer.log({"self_play/best_iteration": best})
