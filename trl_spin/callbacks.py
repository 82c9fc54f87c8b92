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

import json
import shutil
import time
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.logging import get_logger
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, concatenate_datasets
from transformers import TrainerCallback, TrainerControl, TrainerState

from .game import MANIFEST, PAIR_FEATURES, iteration_dir, load_game, store_game, with_reference_logps
from .generation import generate, length_sorted_batches, map_batches, row_seed
from .model_card import RECORD
from .spin_config import SPINConfig


if TYPE_CHECKING:
    from .spin_trainer import SPINTrainer

logger = get_logger(__name__)

_SAMPLING_OPTIONS = ("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class SelfPlayCallback(TrainerCallback):
    """
    Plays the iterations of SPIN (Algorithm 1 of the [paper](https://huggingface.co/papers/2401.01335)). It acts where
    an epoch opens an iteration: there, everything that came before is on disk, and the next batch is not yet drawn.

    The [`SPINTrainer`] creates and attaches it.

    Args:
        trainer ([`SPINTrainer`]):
            Trainer that trains the main player.
    """

    def __init__(self, trainer: "SPINTrainer"):
        self.trainer = trainer
        # First epoch of each iteration, and the number of epochs
        self.boundaries = [0, *accumulate(trainer.args.per_iteration("num_train_epochs"))]

    def on_train_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        for game in self.trainer.games.values():
            game.pairs = []
        used = Path(args.output_dir) / "self_play"
        if state.global_step == 0 and used.exists():
            raise ValueError(
                f"`output_dir` ({args.output_dir}) holds the games of another run ({used}), and runs are never mixed. "
                "Continue that run with `trainer.train(resume_from_checkpoint=True)` (`--resume_from_checkpoint true`), "
                "or choose a new `output_dir`."
            )

    def on_epoch_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        epoch, step_in_epoch = divmod(state.global_step, self.trainer.steps_per_epoch)
        iteration = max(t for t, first in enumerate(self.boundaries[:-1]) if first <= epoch)
        turn = epoch - self.boundaries[iteration]
        if turn == 0 and step_in_epoch == 0:
            self.promote(iteration)
            pairs = self.generate(iteration)
            pairs = self.score(pairs)
            self.store(iteration, pairs)
            self.swap(iteration, pairs)
        elif not self.trainer.games["train"].pairs:  # resumed in the middle of an iteration
            self.swap(iteration, load_game(args.output_dir, iteration))
        elif step_in_epoch != 0:
            raise ValueError(
                f"An epoch ended at step {state.global_step}, before the end of the dataset. Iterations are made of "
                "whole epochs: do not set `control.should_epoch_stop` in a callback."
            )
        self.trainer.games["train"].turn = turn

    def on_epoch_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step in self._last_steps():
            # What was learned against this opponent is logged before the next one comes
            control.should_log = True
            control.should_evaluate = control.should_evaluate or self.trainer.eval_dataset is not None

    def on_train_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step in self._last_steps():
            self.keep(self._last_steps().index(state.global_step))
        else:
            logger.warning(
                f"Training ended at step {state.global_step}, in the middle of iteration "
                f"{self.trainer.self_play_iteration}, whose model is not kept as an iteration."
            )

    def _last_steps(self) -> list[int]:
        return [epoch * self.trainer.steps_per_epoch for epoch in self.boundaries[1:]]

    # ---- The five calls of a boundary ----

    def promote(self, iteration: int):
        """
        The model as it stands becomes opponent and reference of the iteration.

        Nothing moves in memory: the opponent answers and the reference scores before the first step changes the
        weights. What is left to do is to keep the model that the last iteration made, and to start the optimizer anew.

        Args:
            iteration (`int`):
                Self-play iteration that begins.
        """
        trainer = self.trainer
        if iteration > 0:
            self.keep(iteration - 1)
            if trainer.args.reset_optimizer_state:
                trainer.optimizer.state.clear()

    def generate(self, iteration: int) -> dict[str, Dataset]:
        """
        The opponent answers every prompt, y' ~ p_θt(·|x). Answers of earlier opponents are added as
        `opponent_history` asks.

        Args:
            iteration (`int`):
                Self-play iteration.

        Returns:
            `dict[str, Dataset]`: Pairs by name of the dataset, without reference log-probs.
        """
        trainer, args = self.trainer, self.trainer.args
        start = time.perf_counter()
        pairs = {}
        for name, game in trainer.games.items():
            answers = generate(
                trainer.model_wrapped,
                trainer.accelerator,
                args,
                prompts=game.rows["prompt_ids"],
                seeds=[row_seed(args.seed, iteration, name, row) for row in game.rows["row"]],
                end_token_ids=trainer.end_token_ids,
                pad_token_id=trainer._tokenizer.pad_token_id,
                max_length=trainer.max_length,
                desc=f"Iteration {iteration}: answering {name} prompts",
            )
            pairs[name] = Dataset.from_list(
                [
                    self._make_pair(row, answer, iteration, held_out=name != "train")
                    for row, answer in zip(game.rows, answers, strict=True)
                ],
                features=PAIR_FEATURES,
            )
        clear_device_cache()
        self.generation_time = time.perf_counter() - start

        for opponent in range(iteration - 1, max(-1, iteration - 1 - args.opponent_history), -1):
            earlier = load_game(args.output_dir, opponent)["train"]
            # The first of its opponents is the one that answered at the time
            earlier = earlier.select(range(len(trainer.games["train"])))
            pairs["train"] = concatenate_datasets([pairs["train"], earlier])
        return pairs

    def _make_pair(self, row: dict, answer: dict, iteration: int, held_out: bool) -> dict[str, Any]:
        trainer, args = self.trainer, self.trainer.args
        real_ids, generated_ids, truncated = row["real_ids"], answer["generated_ids"], answer["truncated"]
        empty = not trainer._tokenizer.decode(generated_ids, skip_special_tokens=True).strip()
        if truncated and args.truncated_completions == "cut_real" and not held_out:
            real_ids = real_ids[: len(generated_ids)]
        identical = generated_ids == real_ids
        played = (
            not identical
            and (args.play_empty_completions or not empty)
            and not (truncated and args.truncated_completions == "drop")
        )
        return {
            "row": row["row"],
            "opponent": iteration,
            "prompt_ids": answer["prompt_ids"],
            "real_ids": real_ids,
            "generated_ids": generated_ids,
            "truncated": truncated,
            "empty": empty,
            "identical": identical,
            # Held out, nothing is trained: every pair counts
            "played": played or held_out,
            "ref_real_logps": 0.0,
            "ref_generated_logps": 0.0,
        }

    def score(self, pairs: dict[str, Dataset]) -> dict[str, Dataset]:
        """
        The reference scores all pairs, log p_θt(y|x) and log p_θt(y'|x), in the layout and precision of training.

        Args:
            pairs (`dict[str, Dataset]`):
                Pairs by name of the dataset.

        Returns:
            `dict[str, Dataset]`: The same pairs with their reference log-probs.
        """
        start = time.perf_counter()
        scored = {name: self._score(name, dataset) for name, dataset in pairs.items()}
        self.scoring_time = time.perf_counter() - start
        return scored

    def _score(self, name: str, pairs: Dataset) -> Dataset:
        trainer, args = self.trainer, self.trainer.args
        batch_size = args.precompute_ref_batch_size or args.per_device_train_batch_size
        lengths = [
            len(prompt) + max(len(real), len(generated))
            for prompt, real, generated in zip(
                pairs["prompt_ids"], pairs["real_ids"], pairs["generated_ids"], strict=True
            )
        ]
        batches = length_sorted_batches(lengths, lambda longest: batch_size)

        def score_batch(batch: list[int]) -> list[tuple[float, float]]:
            rows = [trainer.games[name].serve(pairs[i]) for i in batch]
            inputs = trainer._prepare_inputs(trainer.data_collator(rows))
            real_logps, generated_logps = trainer.compute_ref_log_probs(trainer.model_wrapped, inputs)
            return list(zip(real_logps.tolist(), generated_logps.tolist(), strict=True))

        was_training = trainer.model_wrapped.training
        trainer.model_wrapped.eval()
        logps = map_batches(
            trainer.accelerator, batches, score_batch, f"Scoring {name} pairs", disable=args.disable_tqdm
        )
        trainer.model_wrapped.train(was_training)
        clear_device_cache()
        return with_reference_logps(pairs, logps)

    def store(self, iteration: int, pairs: dict[str, Dataset]):
        """
        Writes the game to `output_dir/self_play/iteration-<t>` and logs what it looks like.

        Args:
            iteration (`int`):
                Self-play iteration.
            pairs (`dict[str, Dataset]`):
                Pairs by name of the dataset.
        """
        trainer, args = self.trainer, self.trainer.args
        metrics = {
            "self_play/iteration": iteration,
            "self_play/generation_time": self.generation_time,
            "self_play/scoring_time": self.scoring_time,
        }
        num_generated = 0
        for name, dataset in pairs.items():
            prefix = {"train": "", "eval": "eval_"}.get(name, f"eval_{name}_") + "self_play/"
            newest = dataset.select(range(len(trainer.games[name])))
            num_generated += sum(map(len, newest["generated_ids"]))
            metrics |= {prefix + key: value for key, value in _describe(newest).items()}
            metrics[f"{prefix}left_out"] = sum(trainer.left_out[name].values())
        metrics["self_play/generated_tokens_per_second"] = num_generated / self.generation_time
        for age in range(len(pairs["train"]) // len(trainer.games["train"])):
            metrics[f"self_play/opponent_age_{age}"] = len(trainer.games["train"]) / len(pairs["train"])
        trainer.log(dict(metrics))

        if trainer.is_world_process_zero():
            manifest = {
                "opponent": f"iteration-{iteration - 1}" if iteration else trainer.base_model_id,
                "seed": args.seed,
                "sampling": {option: getattr(args, option) for option in _SAMPLING_OPTIONS},
                "left_out": trainer.left_out,
                "metrics": metrics,
                "versions": {name: version(name) for name in ("trl-spin", "trl", "transformers", "torch")},
            }
            store_game(args.output_dir, iteration, pairs, manifest)
        trainer.accelerator.wait_for_everyone()

    def swap(self, iteration: int, pairs: dict[str, Dataset]):
        """
        Puts the game in the place of the last one, for training and evaluation.

        Args:
            iteration (`int`):
                Self-play iteration.
            pairs (`dict[str, Dataset]`):
                Pairs by name of the dataset.
        """
        trainer = self.trainer
        for name, game in trainer.games.items():
            game.swap(pairs[name])
        trainer.begin_iteration(iteration)

    # ---- The end of an iteration ----

    def keep(self, iteration: int):
        """
        Keeps the model that an iteration made in `output_dir/iteration-<t>`, with its record and model card.

        Args:
            iteration (`int`):
                Self-play iteration that has ended.
        """
        trainer, args = self.trainer, self.trainer.args
        directory = Path(args.output_dir) / f"iteration-{iteration}"
        trainer.save_model(str(directory))
        if trainer.is_world_process_zero():
            game = json.loads((iteration_dir(args.output_dir, iteration) / MANIFEST).read_text())["metrics"]
            settings = {
                name: args.per_iteration(name)[iteration] for name in ("beta", "learning_rate", "num_train_epochs")
            }
            record = {"iteration": iteration, **game, **self._last_logs(iteration), **settings}
            (directory / RECORD).write_text(json.dumps(record, indent=2))
            name = args.hub_model_id or Path(args.output_dir).name
            trainer.create_model_card(model_name=f"{name.split('/')[-1]}-iteration-{iteration}")
            shutil.copy(Path(args.output_dir) / "README.md", directory / "README.md")
        trainer.accelerator.wait_for_everyone()

    def _last_logs(self, iteration: int) -> dict[str, float]:
        """What was logged last in an iteration, of training and of evaluation."""
        first_step = self.boundaries[iteration] * self.trainer.steps_per_epoch
        last_logs = {}
        for logs in self.trainer.state.log_history:
            if logs["step"] > first_step and "self_play/iteration" not in logs and "train_runtime" not in logs:
                last_logs |= {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        return last_logs


def _describe(pairs: Dataset) -> dict[str, float]:
    """Lengths, shares and likelihoods of a game, per answer or per token."""

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values)

    num_real, num_generated = (sum(map(len, pairs[f"{side}_ids"])) for side in ("real", "generated"))
    return {
        "mean_length_real": num_real / len(pairs),
        "mean_length_generated": num_generated / len(pairs),
        "truncated": mean(pairs["truncated"]),
        "empty": mean(pairs["empty"]),
        "identical": mean(pairs["identical"]),
        "played": mean(pairs["played"]),
        "nll_real": -sum(pairs["ref_real_logps"]) / num_real,
    }
