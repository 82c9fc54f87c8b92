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

"""The end of an iteration: its model is measured, logged, compared and kept. One callback for each."""

import math
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import DPOTrainer

from .callbacks import SelfPlayCallback
from .measures import last_logs
from .pairs import Game
from .report.tables import iteration_rows, render
from .run.checkpoints import keep_model, load_model
from .run.files import MANIFEST, RECORD, RECORDED_OPTIONS, find_fault, game_dir, model_dir, write_json
from .run.games import read_manifest, read_models, read_sft, remove_completions
from .run.logs import logger
from .run.processes import Processes
from .run.weights import check_finite_weights
from .spin_config import OPTIONS, SPINConfig


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
            pairs, _ = self_play.complete(self_play.request(iteration + 1), list(self_play.game.held_out))
            trainer.model.eval()  # `log` would add the metrics of training
            trainer.log(self_play.measures.of_completions(pairs))
            trainer.model.train()


@dataclass(frozen=True)
class BestMetric:
    """
    The number that compares the model that self-play started from (-1) and those of the iterations.

    Args:
        name (`str`):
            See `metric_for_best_iteration` in [`SPINConfig`].
        output_dir (`str`):
            Output directory of the run.
    """

    name: str
    output_dir: str

    @property
    def greater_is_better(self) -> bool:
        return "completions/" in self.name

    def check(self):
        """Raises a `ValueError` if the number is not measured. The first game is stored."""
        metrics = read_manifest(self.output_dir, 0)["metrics"]
        measured = sorted(key.replace("self_play/nll_real", "nll/real") for key in metrics if key.startswith("eval_"))
        measured = [key for key in measured if key.endswith("nll/real") or "completions/" in key]
        if self.name not in measured:
            what = f"`metric_for_best_iteration` is {self.name!r}, which is not measured"
            raise ValueError(f"{what}. There are {measured}.")

    def values(self, last: int) -> dict[int, float]:
        """The numbers up to an iteration, where they were measured and their files still exist."""
        models = {model["iteration"]: model for model in read_models(self.output_dir, last)}
        for t in range(-1, last + 1):
            if len(models.get(t, ())) < 2:  # there is no number in it
                path = model_dir(self.output_dir, t) / RECORD if t >= 0 else game_dir(self.output_dir, 0) / MANIFEST
                logger.warning(f"{path} is missing or damaged: the model that it measures is not compared.")
        return {iteration: model[self.name] for iteration, model in models.items() if self.name in model}

    def judge(self, iteration: int, logs: dict[str, float]) -> tuple[bool, str | None]:
        """Whether an iteration that has ended is no worse than what it began with, and the verdict in words."""
        before, after = self.values(iteration - 1).get(iteration - 1), logs.get(self.name)
        if before is None or after is None:
            return True, None
        # Where nothing has changed, as `step_size_search` may have it, there is still rounding
        fine = math.isclose(before, after, rel_tol=1e-6) or (before < after) == self.greater_is_better
        return fine, f"{self.name} {before:.4g} -> {after:.4g}: {'helped' if fine else 'hurt'}"

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
            interval = f"accuracy between {low:.3f} and {high:.3f}"
            return f"held-out real and generated completions can no longer be told apart ({interval})"
        return None

    def find_best(self, last: int) -> int | None:
        """The best iteration up to the last one, -1 for the start; `None` if the last one was not measured."""
        values = self.values(last)
        return (max if self.greater_is_better else min)(values, key=values.get) if last in values else None

    def table(self, last: int) -> list[list[str]]:
        """A table of the models up to that of an iteration, the best one marked, and of SFT with the same compute."""
        models = read_models(self.output_dir, last)
        last = models[-1]["iteration"]
        return iteration_rows(models + read_sft(self.output_dir), self.find_best(last))


class BestIterationCallback(TrainerCallback):
    """Ends the game where `early_stopping` asks for it, and returns to the best model at its end."""

    def __init__(self, trainer: DPOTrainer, game: Game, processes: Processes, best_metric: BestMetric):
        self.trainer, self.game, self.processes, self.best_metric = trainer, game, processes, best_metric
        for option in ("step_size_search", "compare_sft"):  # which put weights into the model
            if (value := getattr(trainer.args, option)) and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
                raise ValueError(f"`{option}={value}` does not work with DeepSpeed and FSDP: leave it unset.")

    def game_is_over(self, log_history: list[dict[str, Any]], step: int) -> bool:
        """Whether the iteration that ended at this step, if one did, was the last by `early_stopping`."""
        iteration, schedule = self.game.schedule.ended(step), self.game.schedule
        if not self.trainer.args.early_stopping or iteration in (None, len(schedule.num_epochs) - 1):
            return False
        logs = last_logs(log_history, schedule.starts[iteration])
        reason = self.processes.on_main(self.best_metric.why_stop, iteration, logs)
        if reason is not None:
            logger.warning(f"The game ends after iteration {iteration}: {reason}.")
        return reason is not None

    def fault_of(self, iteration: int) -> str | None:
        """What is wrong with the model that an iteration of this run made, see [`~run.files.find_fault`]."""
        path, run = model_dir(self.trainer.args.output_dir, iteration), self.game.settings["run"]
        return self.processes.on_main(lambda: find_fault(path, run=run, iteration=iteration))

    def load(self, iteration: int, option: str | None = None):
        """
        Returns to the model that an iteration made, or to the one that self-play started from (-1), because of an
        option without which a run can be resumed, if it is one of those.
        """
        if fault := self.fault_of(iteration):
            remedy = "Restore it" + (f", or resume without `{option}`" if option else "")
            raise ValueError(f"The model of iteration {iteration} cannot be loaded: {fault}. {remedy}.")
        load_model(self.trainer, model_dir(self.trainer.args.output_dir, iteration))

    def on_epoch_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step == 0 and any(getattr(args, name) for name in OPTIONS["held_out"]):
            self.processes.on_main(self.best_metric.check)  # before anything is trained

    def on_evaluate(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if self.game_is_over(state.log_history, state.global_step):
            control.should_training_stop = True

    def on_train_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        last = self.game.schedule.ended(state.global_step)
        if last is None or self.processes.stop.signum:
            return
        # Those of the last model, against which nothing was played
        self.processes.on_main(remove_completions, args.output_dir, last + 1)
        best = self.processes.on_main(self.best_metric.find_best, last)
        if args.load_best_iteration_at_end and best is not None:
            self.load(best, "load_best_iteration_at_end")
            self.trainer.log({"self_play/best_iteration": best})

    def show_end(self, saved: str | None = None):
        """
        Says where the models of a run that has ended are, which is the best, and how to go on.

        Args:
            saved (`str`, *optional*):
                Where the trainer's model was saved, beside those of the iterations.
        """
        args, last = self.trainer.args, self.game.schedule.ended(self.trainer.state.global_step)
        if last is not None and self.trainer.is_world_process_zero():
            best = self.best_metric.find_best(last)
            run = {"args": args, "game": self.game, "best_metric": self.best_metric, "sft": read_sft(args.output_dir)}
            paths = {"report": Path(args.output_dir, "report/report.html"), "dir": partial(model_dir, args.output_dir)}
            tqdm.write(render("end.txt.jinja", **run, **paths, saved=saved, last=last, best=best))


class IterationCallback(TrainerCallback):
    """
    Logs, evaluates and saves at the end of an iteration, keeps its model in `output_dir/iteration-<t>`, and ends
    training when a signal has come.
    """

    def __init__(self, trainer: DPOTrainer, game: Game, processes: Processes, best_metric: BestMetric):
        self.trainer, self.game, self.processes, self.best_metric = trainer, game, processes, best_metric
        self.began: float | None = None  # the training of the iteration

    def on_epoch_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if (iteration := self.game.schedule.ended(state.global_step)) is not None:
            self.keep(iteration)

    def on_step_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if self.game.at_start or self.began is None:  # since a resume, if there was one
            self.began = time.perf_counter()

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
            self.trainer._metrics["train"]["self_play/training_time"].append(time.perf_counter() - self.began)
            # What was learned against this opponent is logged before the next one comes, and the next one can be made
            # again should its completions be lost
            control.should_log = True
            control.should_evaluate = self.trainer.eval_dataset is not None
            control.should_save = args.save_strategy != "no"

    def on_train_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if (iteration := self.game.schedule.ended(state.global_step)) is not None:
            self.keep(iteration)
        elif not self.processes.stop.signum:
            where = f"step {state.global_step}, in the middle of iteration {self.game.iteration}"
            logger.warning(f"Training ended at {where}, whose model is not kept as an iteration.")

    def keep(self, iteration: int):
        """Keeps the model that an iteration made, with its record and model card."""
        trainer, args = self.trainer, self.trainer.args
        check_finite_weights(trainer.accelerator, trainer.model, trainer.state.global_step, iteration)
        directory = keep_model(trainer, self.game, self.processes, iteration)
        self.processes.write(args.output_dir, self._describe, iteration, directory)

    def _describe(self, iteration: int, directory: Path):
        trainer, args = self.trainer, self.trainer.args
        # Without its game, an iteration keeps the record that it has
        if (manifest := read_manifest(args.output_dir, iteration)) is not None:
            logs = last_logs(trainer.state.log_history, self.game.schedule.starts[iteration])
            settings = {name: args.per_iteration(name)[iteration] for name in RECORDED_OPTIONS}
            record = {"iteration": iteration, **manifest["metrics"], **logs, **settings}
            judged = {"verdict": self.best_metric.judge(iteration, logs)[1], "verdict_metric": self.best_metric.name}
            write_json(directory / RECORD, record | {"warnings": manifest["warnings"], **judged})
        name = args.hub_model_id or Path(args.output_dir).name
        trainer.create_model_card(model_name=f"{name.split('/')[-1]}-iteration-{iteration}")
        shutil.copy(Path(args.output_dir) / "README.md", directory / "README.md")
