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

"""Algorithm 1 of SPIN: promote, generate, score, store, swap."""

import time
from dataclasses import replace

from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import DPOTrainer

from .engines import Engine
from .generation import check_played, commit_completions, pair_completions, score
from .measures import Measures
from .memory import DEFAULT_BUDGET
from .pairs import Columns, Game
from .report.signals import metric_prefix
from .run.checkpoints import load_model
from .run.files import find_fault, model_dir
from .run.games import Request, find_stored, load_game, remove_completions, store_game
from .run.logs import logger
from .run.processes import Processes
from .run.resume import library_versions, recorded_token_budget
from .run.weights import weights_fingerprint
from .spin_config import SPINConfig


class SelfPlayCallback(TrainerCallback):
    """
    Plays the iterations of SPIN (Algorithm 1 of the [paper](https://huggingface.co/papers/2401.01335)). It acts where
    an epoch opens an iteration: there, everything that came before is on disk, and the next batch is not yet drawn.

    The [`SPINTrainer`] creates and attaches it.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            Trainer that trains the main player.
        game ([`~pairs.Game`]):
            Game, which this callback changes.
        processes ([`~run.processes.Processes`]):
            Processes of the run.
        engine ([`~engines.Engine`]):
            What generates the opponent's completions.
        measures ([`~measures.Measures`]):
            What is measured of them.
    """

    def __init__(self, trainer: DPOTrainer, game: Game, processes: Processes, engine: Engine, measures: Measures):
        self.trainer, self.game, self.processes = trainer, game, processes
        self.engine, self.measures = engine, measures

    def on_epoch_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        iteration, epoch, step = self.game.schedule.locate(state.global_step)
        if self.game.schedule.begins(state.global_step):
            request = self.promote(iteration)
            if metrics := self.processes.on_main(find_stored, args.output_dir, request):
                self.trainer.log(metrics)  # of a run that stopped between store and swap
            else:
                pairs, generating = self.generate(request)  # y' ~ p_θt(·|x)
                pairs, scoring = self.score(request, pairs)  # log p_θt(y|x), log p_θt(y'|x)
                self.store(request, pairs, generating | scoring)
                del pairs  # from here on, they are read from the files of the game
            self.swap(iteration, at_start=True)
        elif not self.game.train.pairs:  # resumed in the middle of an iteration
            self.swap(iteration, at_start=False)
        elif step != 0:
            fault = f"An epoch ended at step {state.global_step}, but iterations are made of whole epochs"
            raise ValueError(f"{fault}: do not set `control.should_epoch_stop` in a callback.")
        self.game.train.epoch = epoch

    def promote(self, iteration: int) -> Request:
        """
        The model as it stands becomes opponent and reference. Nothing moves in memory: the opponent generates and the
        reference scores before the first step changes the weights. All that remains is to reset the optimizer.
        """
        if iteration > 0 and self.trainer.args.reset_optimizer_state:
            self.trainer.optimizer.state.clear()
        return self.request(iteration)

    def generate(self, request: Request) -> tuple[dict[str, Dataset], dict[str, float]]:
        """
        The opponent completes every prompt. Those of earlier opponents are added as `opponent_history` asks. Returns
        the pairs by name of their dataset, and what was measured.
        """
        args, start = self.trainer.args, time.perf_counter()
        pairs, num_tokens = self.complete(request, list(self.game.datasets))
        seconds = time.perf_counter() - start
        check_played(pairs["train"], self.game, request.iteration)
        for opponent in reversed(range(max(0, request.iteration - args.opponent_history), request.iteration)):
            earlier = self.processes.on_main(load_game, args.output_dir, opponent, request.settings["run"])["train"]
            # The first of its opponents is the one of that iteration
            earlier = earlier.select(range(len(self.game.train)))
            pairs["train"] = concatenate_datasets([pairs["train"], earlier])
        speed = num_tokens / seconds
        return pairs, {"self_play/generation_time": seconds, "self_play/generated_tokens_per_second": speed}

    def score(self, request: Request, pairs: dict[str, Dataset]) -> tuple[dict[str, Dataset], dict[str, float]]:
        """The reference scores all pairs, in the layout and precision of training."""
        trainer, start, directory = self.trainer, time.perf_counter(), request.directory(self.trainer.args.output_dir)
        scored = {name: score(trainer, self.processes, part, name, directory) for name, part in pairs.items()}
        return scored, {"self_play/scoring_time": time.perf_counter() - start}

    def store(self, request: Request, pairs: dict[str, Dataset], metrics: dict[str, float]):
        """Writes the pairs to `output_dir/self_play/iteration-<t>`, and logs what they look like."""
        output_dir, iteration, state = self.trainer.args.output_dir, request.iteration, self.trainer.state
        measured, warnings = self.measures.of_game(output_dir, iteration, pairs, state.log_history)
        for warning in warnings:
            logger.warning(f"Iteration {iteration}: {warning}")
        metrics = {"self_play/iteration": iteration, **metrics, **measured}
        origin = f"iteration-{iteration - 1}" if iteration else self.game.base_model
        manifest = request.content | {
            "request": request.hash,
            "opponent": {"model": origin, "fingerprint": request.opponent},
            "engine": self.engine.name,
            "left_out": self.game.left_out,
            "metrics": metrics,
            "warnings": warnings,
            "versions": library_versions(),
        }
        self.processes.write(output_dir, store_game, output_dir, iteration, pairs, manifest)
        self.trainer.log(dict(metrics))

    def swap(self, iteration: int, at_start: bool):
        """Puts the stored pairs in the place of the last iteration's, for training and evaluation."""
        output_dir, on_main = self.trainer.args.output_dir, self.processes.on_main
        pairs = on_main(load_game, output_dir, iteration, self.game.settings["run"])
        on_main(remove_completions, output_dir, iteration)
        self.game.swap(iteration, pairs, at_start)

    def request(self, iteration: int) -> Request:
        """What the model as it stands is asked for as the opponent of an iteration."""
        fingerprint = weights_fingerprint(self.trainer.accelerator, self.trainer.model_wrapped)
        return Request(iteration, fingerprint, self.game.settings)

    def complete(self, request: Request, names: list[str]) -> tuple[dict[str, Dataset], int]:
        """The opponent's pairs on these datasets, and the number of tokens that it generated for them."""
        output_dir, model, pairs, num_tokens = self.trainer.args.output_dir, self.trainer.model_wrapped, {}, 0
        for name, missing in commit_completions(self.engine, model, self.game, request, names).items():
            pairs[name] = self.processes.write(output_dir, pair_completions, self.game, output_dir, request, name)
            num_tokens += int(Columns(pairs[name]).lengths("generated_ids")[missing].sum())
        return pairs, num_tokens

    def measure(self, iteration: int, metric: str | None = None) -> dict[str, float]:
        """
        What is held out, measured for the model as it stands: the NLL of the real completions in an iteration's game,
        and what the user's function says of its own completions.

        Args:
            iteration (`int`):
                Iteration, whose game is stored.
            metric (`str`, *optional*):
                The only number that is needed. Defaults to all.
        """
        output_dir, on_main, metrics = self.trainer.args.output_dir, self.processes.on_main, {}
        pairs = on_main(load_game, output_dir, iteration)
        for name in self.game.held_out:
            key = f"{metric_prefix(name)}nll/real"
            if metric in (None, key):
                scored = Columns(score(self.trainer, replace(self.processes, quiet=True), pairs[name], name))
                num_tokens = int(scored.lengths("real_ids").sum())
                metrics[key] = -sum(scored.values("ref_real_logps").tolist()) / num_tokens
        if self.measures.compute is not None and (metric is None or "completions/" in metric):
            completed, _ = self.complete(self.request(iteration + 1), list(self.game.held_out))
            metrics |= on_main(self.measures.of_completions, completed)
        return metrics

    def complete_share(self, iteration: int, share: tuple[int, int]):
        """
        Completes a share of a round, for a run that finds the completions in its `output_dir`.

        Args:
            iteration (`int`):
                Iteration, whose opponent is the model that the one before has left in `output_dir`.
            share (`tuple[int, int]`):
                With (i, n), rows i, i + n, i + 2n and so on of each dataset.

        Raises:
            `ValueError`: If the opponent is not there, or damaged.
        """
        trainer, args, names = self.trainer, self.trainer.args, list(self.game.datasets)
        if iteration > 0:
            directory = model_dir(args.output_dir, iteration - 1)
            if fault := find_fault(directory, iteration=iteration - 1):
                what = f"There is no opponent for iteration {iteration}: {fault}"
                raise ValueError(f"{what}. Play the iterations before it.")
            load_model(trainer, directory)
        budget = args.generation_token_budget or recorded_token_budget(args.output_dir)
        self.engine.token_budget = budget or DEFAULT_BUDGET
        request, model = self.request(iteration), trainer.model_wrapped
        with self.processes.stop:
            missing = commit_completions(self.engine, model, self.game, request, names, share)
        if trainer.is_world_process_zero():
            counts = ", ".join(f"{rows.sum():,} {name}" for name, rows in missing.items())
            tqdm.write(f"Iteration {iteration}, share {share[0]}/{share[1]}: completed {counts} prompts.")
