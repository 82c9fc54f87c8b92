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

"""`compare_sft`: what SFT does instead, from the same model, on the same rows, with the compute that self-play took."""

from dataclasses import fields
from pathlib import Path

from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from .callbacks import SelfPlayCallback
from .compat import replaced
from .engines.base import forked_rng
from .iterations import BestIterationCallback
from .pairs import Columns
from .run.files import SFT, write_json
from .run.games import load_game
from .spin_config import SPINConfig


# What an SFT run does not do: it writes nothing, and checkpoints activations as was settled for self-play
_OFF = dict.fromkeys(("logging_strategy", "save_strategy", "eval_strategy"), "no")
_OFF |= {"report_to": "none", "push_to_hub": False}


class Arm(SFTTrainer):
    """An SFT run that leaves no tags on the model, and ends when a signal has come."""

    _tag_names = []

    def training_step(self, *args, **kwargs):
        self.control.should_training_stop = self.stop.agree()[0] != 0
        return super().training_step(*args, **kwargs)


class CompareSFTCallback(TrainerCallback):
    """
    Trains the model that self-play started from with SFT, when the last iteration has ended, measures it as iterations
    are measured, and returns to the last iteration's model. A run that is stopped in it does it again.

    Args:
        self_play ([`SelfPlayCallback`]):
            What has played the game.
        best_iteration ([`~iterations.BestIterationCallback`]):
            What loads models of the run.
    """

    def __init__(self, self_play: SelfPlayCallback, best_iteration: BestIterationCallback):
        self.self_play, self.best_iteration = self_play, best_iteration
        self.trainer, self.game, self.processes = self_play.trainer, self_play.game, self_play.processes

    def on_train_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        last, stop, arms = self.game.schedule.ended(state.global_step), self.processes.stop, []
        if last is None or stop.signum:
            return
        self.trainer.optimizer.state.clear()  # makes room for that of SFT
        rows, passes = self.count_passes(last)
        steps = max(1, round(passes * self.game.schedule.steps_per_epoch * len(rows) / len(self.game.train)))
        for rate in args.compare_sft:
            self.best_iteration.load(-1, "compare_sft")
            self.train(rows, rate, steps)
            clear_device_cache(garbage_collection=True)
            stop.signum, _ = stop.agree()
            if stop.signum:
                break
            arm = {"iteration": f"SFT instead, {rate:g}", "last": last, "steps": steps}
            arm |= {"learning_rate": rate, "num_train_epochs": round(passes, 2)}
            arms.append(arm | self.self_play.measure(last))
        self.best_iteration.load(last, "compare_sft")
        if not stop.signum:
            path, best_metric = Path(args.output_dir) / "self_play" / SFT, self.best_iteration.best_metric
            arms.sort(key=lambda arm: arm.get(best_metric.name, 0), reverse=best_metric.greater_is_better)
            self.processes.write(args.output_dir, write_json, path, {"arms": arms})
            self.trainer.create_model_card()

    def count_passes(self, last: int) -> tuple[Dataset, float]:
        """
        The rows that were played on up to an iteration, and how many passes of SFT over them take as many FLOPs: for
        each token 2N in generation and scoring, and 4N more in training, or 2N where an adapter is trained. Pairs that
        are left out count as if they were played, in favour of SFT.
        """
        train, output_dir, flops = self.game.train, self.trainer.args.output_dir, 0  # in units of 2N
        of_training = 2 if isinstance(self.trainer.model, PeftModel) else 3
        for iteration, num_epochs in enumerate(self.game.schedule.num_epochs[: last + 1]):
            pairs = Columns(self.processes.on_main(load_game, output_dir, iteration)["train"])
            prompts = pairs.lengths("prompt_ids")
            computed = pairs.pair_lengths() + prompts * (not self.trainer.shares_prefix)
            flops += (prompts + pairs.lengths("generated_ids"))[: len(train)].sum() + computed.sum()
            # In a pass, a prompt is played once, against each of several opponents in turn
            flops += of_training * num_epochs * computed.mean() * len(train)
        rows = train.all_rows.select(range(min(len(train.all_rows), (last + 1) * len(train))))

        def with_labels(prompt: list[int], real: list[int]) -> dict[str, list[int]]:
            return {"input_ids": prompt + real, "labels": [-100] * len(prompt) + real}

        rows = rows.map(with_labels, input_columns=["prompt_ids", "real_ids"], remove_columns=rows.column_names)
        return rows, float(flops / (of_training * Columns(rows).lengths("input_ids").sum()))

    def train(self, rows: Dataset, learning_rate: float, steps: int):
        """Trains the model as it is. But for its weights, it is as before, and so is torch's random state."""
        trainer, model = self.trainer, self.trainer.model
        base_model = model.get_base_model() if isinstance(model, PeftModel) else model
        options = {o.name: getattr(trainer.args, o.name) for o in fields(TrainingArguments) if o.init} | _OFF
        options |= dict.fromkeys({"gradient_checkpointing", "activation_checkpointing"} & options.keys(), False)
        options |= {"learning_rate": learning_rate, "max_steps": steps, "num_train_epochs": 1}
        if trainer.is_world_process_zero():
            tqdm.write(f"SFT with the compute of self-play: {steps:,} steps, learning rate {learning_rate:g}")
        # TRL and accelerate patch `forward` (trl 1.16, accelerate 1.15)
        forwards = replaced(model, "forward", model.forward), replaced(base_model, "forward", base_model.forward)
        with forked_rng(trainer.accelerator.device), forwards[0], forwards[1]:
            # From here until there is another trainer, accelerate has no state. To the game's ids, nothing is added
            config = SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True})
            arm = Arm(model, config, train_dataset=rows, processing_class=trainer.processing_class)
            arm.stop = self.processes.stop
            arm.remove_callback(PrinterCallback)
            arm.train()
