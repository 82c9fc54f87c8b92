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

"""Before anything is generated: a trial run of a few rows, the plan, and whether memory and disk hold the run."""

import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from .engines.base import Engine, forked_rng
from .generation import score, weigh
from .memory import MemoryPlan, plan_memory
from .pairs import PAIR_FEATURES, Columns, Game, as_preference
from .report.tables import render
from .run.files import existing
from .run.logs import logger
from .run.processes import Processes
from .run.resume import recorded_token_budget, write_run
from .shared_prefix_trainer import SharedPrefixDPOTrainer
from .spin_config import SPINConfig


_TRIAL_TOKENS = 16


class DryRun(Exception):
    """The plan was printed, and no more was asked for."""


@dataclass(eq=False)
class PreflightCallback(TrainerCallback):
    """
    Tries out the run and prints its plan, before training begins.

    Args:
        trainer ([`SharedPrefixDPOTrainer`]):
            Trainer.
        game ([`~pairs.Game`]):
            Game.
        processes ([`~run.processes.Processes`]):
            Processes of the run.
        engines (`list[Engine]`):
            What generates: first the engine of the game.
        settings (`Callable[[], dict[str, Any]]`):
            All that changes the result of the run, to be written down.
    """

    trainer: SharedPrefixDPOTrainer
    game: Game
    processes: Processes
    engines: list[Engine]
    settings: Callable[[], dict[str, Any]]

    def on_train_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        for dataset in self.game.datasets.values():
            dataset.clear()
        if state.is_world_process_zero:
            tqdm.write("Trying out a few rows, and measuring what memory training needs ...")
        memory, pair, seconds = self.run_trial(args)
        parameters = list(self.processes.accelerator.unwrap_model(self.trainer.model).parameters())
        trained = [p for p in parameters if p.requires_grad]
        num_bytes = sum(_numel(p) * p.element_size() for p in trained)
        optimizer = memory.estimate["optimizer"] if memory.estimate else 2 * num_bytes
        disk = estimate_disk(args, self.game, num_bytes, optimizer, state.save_steps)
        if state.is_world_process_zero:
            times = estimate_times(args, self.game, seconds, memory)
            sizes = {"total": sum(map(_numel, parameters)), "trained": sum(map(_numel, trained))}
            run = {"args": args, "state": state, "game": self.game, "engine": self.engines[0], "pair": pair}
            tqdm.write(render("plan.txt.jinja", **run, sizes=sizes, times=times, memory=memory, disk=disk))
        self.processes.on_main(check_disk, args.output_dir, disk)
        if not self.trainer.is_deepspeed_enabled:  # which keeps weights in float32 beside them
            warn_of_lost_updates(trained, max(args.per_iteration("learning_rate")))
        if args.dry_run:
            raise DryRun
        self.processes.write(args.output_dir, write_run, args, self.game, self.settings(), memory.token_budget)

    def run_trial(self, args: SPINConfig) -> tuple[MemoryPlan, dict[str, Any], tuple[float, float]]:
        """
        Sends the longest, the shortest and the first row through generation, scoring and the loss of a training step,
        with a few tokens, chooses the layout of the batches, plans the memory, and looks at the clock. Random state
        and metrics are as before.

        Returns:
            `tuple`: Memory, the pair of the first row, and the seconds that a step of `generate` takes for a single
            row, and one token in a forward pass.
        """
        trainer, game, processes = self.trainer, self.game, self.processes
        model, columns = trainer.model_wrapped, game.train.columns
        lengths = columns.lengths("prompt_ids") + columns.lengths("real_ids")
        longest, shortest = int(lengths.argmax()), int(lengths.argmin())
        tried = list(dict.fromkeys([*sorted({longest, shortest}), 0]))
        rows = Columns(game.train.rows.select(tried))
        training = model.training

        def forward(pairs: list[dict[str, Any]]) -> torch.Tensor:
            return trainer.token_logps(trainer.model, self.collate(pairs))

        with forked_rng(processes.accelerator.device), torch.no_grad():
            seed_of, limit = [row["row"] for row in rows].index, min(args.max_completion_length, _TRIAL_TOKENS)
            with self.engines[1].open(model) as generate:
                given = generate, rows, seed_of, limit, args.temperature
                start = time.perf_counter()
                completions = self.engines[1].complete(*given, desc=None).to_pylist()
                of_step = (time.perf_counter() - start) / sum(len(c["generated_ids"]) for c in completions)
            pairs = [game.rules.make_pair(*row, 0, held_out=False) for row in zip(rows, completions, strict=True)]
            processes.on_main(weigh, game, "train", pairs)  # what fails does so before anything is generated
            pairs = Dataset.from_list(pairs, features=PAIR_FEATURES)
            model.eval()
            trainer.choose_layout(self.collate(map(as_preference, pairs)))
            # With a completion of the full length
            prompt, real = columns[longest]["prompt_ids"], columns[longest]["real_ids"]
            length = min(args.max_completion_length, (game.rules.max_length or math.inf) - len(prompt))
            pair = {"row": longest, "weight": 1.0, "prompt_ids": prompt}
            pair |= {"chosen_ids": real, "rejected_ids": (real * length)[:length]}
            # A run that is resumed goes on in the same batches
            budget = args.generation_token_budget or processes.on_main(recorded_token_budget, args.output_dir)
            memory = plan_memory(trainer, forward, pair, processes, budget)
            for engine in self.engines:
                engine.token_budget = memory.token_budget
            pairs = score(trainer, replace(processes, quiet=True), pairs, "train")
            game.iteration, game.at_start = 0, True
            model.train()
            trainer.compute_loss(model, self.collate(map(as_preference, pairs)))
            # The first call took longer than others will, and few rows take as long as many where the model is small
            batch = [as_preference(pairs[i % len(pairs)]) for i in range(args.per_device_train_batch_size)]
            inputs, start = self.collate(batch), time.perf_counter()
            trainer.compute_loss(model, inputs).item()
            seconds = of_step, (time.perf_counter() - start) / trainer._metrics["train"]["tokens"][-1][0]
            model.train(training)
        trainer.count_on()
        return memory, pairs[tried.index(0)], seconds

    def collate(self, pairs: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """A batch as the trainer gets it."""
        return self.trainer._prepare_inputs(self.trainer.data_collator(list(pairs)))


def estimate_disk(args: SPINConfig, game: Game, model: float, optimizer: float, save_steps: int) -> dict[str, float]:
    """
    What a run writes, in bytes, at most. An iteration's model is saved as it is in memory, an adapter alone where
    there is one: what is trained. A checkpoint adds the optimizer.
    """
    num_iterations, columns = args.num_self_play_iterations, game.train.columns
    checkpoint = model + (0 if args.save_only_model else optimizer)
    # Token ids of a pair, four bytes each, of one iteration of many perhaps
    tokens = (columns.lengths("prompt_ids") + columns.lengths("real_ids") + args.max_completion_length).mean()
    newest = 4 * tokens * len(game.train)
    pairs = newest * (1 + args.opponent_history)
    num_epochs, num_steps = sum(game.schedule.num_epochs), game.schedule.starts[-1]
    num_saves = num_iterations + (num_steps // save_steps if args.save_strategy == "steps" else num_epochs)
    # The newest ones, the one at which the iteration began, and the one that is being written
    most = min(num_saves, (args.save_total_limit or math.inf) + 2)
    num_checkpoints = 0 if args.save_strategy == "no" else most
    # Completions and pairs lie beside the game until it is stored
    next_iteration = model + pairs + 2 * newest + min(2, num_checkpoints) * checkpoint
    # The best iteration may be none: the model that self-play starts from is kept as well
    num_models = num_iterations + args.keeps_start
    whole_run = num_models * model + num_iterations * pairs + num_checkpoints * checkpoint
    parts = {"model": model, "checkpoint": checkpoint, "num_checkpoints": num_checkpoints, "game": pairs}
    return parts | {"next_iteration": next_iteration, "whole_run": whole_run}


def estimate_times(args: SPINConfig, game: Game, seconds: tuple[float, float], memory: MemoryPlan) -> dict[str, Any]:
    """
    Seconds that an iteration takes to generate, to score and to train, roughly, with completions as long as the real
    ones, from those of a step of `generate` with a single row, which larger batches share, and of a token in a forward
    pass.
    """
    columns, (of_step, of_forward), num_rows = game.train.columns, seconds, len(game.train.all_rows)
    passes = sum(game.schedule.num_epochs) / args.num_self_play_iterations
    rows = sum(map(len, game.datasets.values())) / num_rows  # held-out ones are played on as well
    prompt, real = columns.lengths("prompt_ids"), columns.lengths("real_ids")
    generated = real.clip(0, args.max_completion_length)
    size = max(1, min(num_rows, memory.token_budget // (prompt.max() + args.max_completion_length)))
    of_token = of_forward + of_step / size / args.world_size
    generation = prompt.sum() * of_forward + generated.sum() * of_token
    scoring = (prompt + real + generated).sum() * of_forward
    # The backward pass takes about twice as long as the forward pass, of which checkpointing adds another
    training = passes * (3 + memory.checkpointing) * scoring * len(game.train) / num_rows
    return {"generation": rows * generation, "scoring": rows * scoring, "training": training}


def _numel(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed ZeRO-3


def check_disk(output_dir: str, disk: dict[str, float]):
    """Raises a `ValueError` if not even the next iteration fits the disk."""
    free = shutil.disk_usage(existing(Path(output_dir))).free
    finding = f"`output_dir` ({output_dir}) has {tqdm.format_sizeof(free)}B of free space, but the"
    if free < disk["next_iteration"]:
        needed = f"{finding} next iteration may need {tqdm.format_sizeof(disk['next_iteration'])}B"
        remedy = "Make room, choose another `output_dir`, or save less (`save_only_model`, `save_strategy='no'`)."
        raise ValueError(f"{needed}. {remedy}")
    if free < disk["whole_run"]:
        logger.warning(f"{finding} whole run may need {tqdm.format_sizeof(disk['whole_run'])}B.")


@torch.no_grad()
def warn_of_lost_updates(trained: list[torch.nn.Parameter], learning_rate: float):
    """
    Warns if the weights are trained in bfloat16 and the learning rate is so small that most updates round away. An
    Adam-like optimizer moves a weight by about the learning rate, and bfloat16 keeps a change of a weight w only if it
    is larger than |w|/512.
    """
    # Of FSDP2, each process counts its own part
    trained = [p.to_local() if isinstance(p, DTensor) else p for p in trained if p.dtype == torch.bfloat16]
    total = sum(p.numel() for p in trained)
    lost = sum((p.abs() > 512 * learning_rate).sum().item() for p in trained)
    if lost > total / 2:
        what = f"In bfloat16, steps of the learning rate {learning_rate:g} round away for {lost / total:.0%} of the"
        remedy = "Load the model in float32 and compute in bfloat16 (`dtype='float32'`, `bf16=True`), train an adapter"
        logger.warning(f"{what} weights. {remedy}, or raise the learning rate.")
