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

"""Before anything is generated: a trial run of two rows, the plan of the run, and whether memory and disk can hold it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from .engines import Engine, forked_rng
from .engines.base import enable_checkpointing
from .generation import make_pairs, row_seed, score
from .memory import MemoryEstimate, MemoryPlan, plan_memory, plan_spread_memory
from .pairs import Columns, Game, as_preference
from .run.files import existing
from .run.processes import Processes
from .run.resume import recorded_token_budget, write_run
from .shared_prefix_trainer import SharedPrefixDPOTrainer
from .spin_config import SPINConfig


logger = get_logger(__name__)

_TRIAL_TOKENS = 16


class DryRun(Exception):
    """The plan was printed, and no more was asked for."""


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

    def __init__(
        self,
        trainer: SharedPrefixDPOTrainer,
        game: Game,
        processes: Processes,
        engines: list[Engine],
        settings: Callable[[], dict[str, Any]],
    ):
        self.trainer, self.game, self.processes = trainer, game, processes
        self.engines, self.settings = engines, settings

    def on_train_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        for dataset in self.game.datasets.values():
            dataset.clear()
        memory = self.run_trial(args)
        for engine in self.engines:
            engine.token_budget = memory.token_budget
        parameters = list(self.processes.accelerator.unwrap_model(self.trainer.model).parameters())
        disk = estimate_disk(args, self.game, parameters, memory.estimate, state.save_steps)
        if state.is_world_process_zero:
            tqdm.write(describe_plan(args, self.game, parameters, memory, disk, self.engines[0].describe(), state))
        self.processes.on_main(check_disk, args.output_dir, disk)
        if not self.trainer.is_deepspeed_enabled:  # which keeps weights in float32 beside them
            warn_of_lost_updates(parameters, max(args.per_iteration("learning_rate")))
        if args.dry_run:
            raise DryRun
        self.processes.write(args.output_dir, write_run, args.output_dir, self.settings(), memory.token_budget)

    def run_trial(self, args: SPINConfig) -> MemoryPlan:
        """
        Sends the longest and the shortest row through generation, scoring and the loss of a training step, with a few
        tokens, chooses the layout of the batches, and plans the memory. Random state and metrics are as before.
        """
        trainer, game, processes = self.trainer, self.game, replace(self.processes, quiet=True)
        model, rows = trainer.model_wrapped, game.train.rows
        columns = Columns(rows)
        lengths = columns.lengths("prompt_ids") + columns.lengths("real_ids")
        rows = rows.select(sorted({int(lengths.argmax()), int(lengths.argmin())}))
        num_tokens, training = trainer._total_train_tokens, model.training

        def collate(pairs: list[dict[str, Any]]) -> dict[str, Any]:
            return trainer._prepare_inputs(trainer.data_collator(pairs))

        with forked_rng(processes.accelerator.device), torch.no_grad():
            seeds = [row_seed(args.seed, 0, "train", row) for row in rows["row"][:]]
            limit = min(args.max_completion_length, _TRIAL_TOKENS)
            completions = self.engines[0].complete(model, rows["prompt_ids"][:], seeds, limit, desc=None)
            pairs = make_pairs(rows, completions, game.rules, 0, held_out=False)
            model.eval()
            trainer.choose_layout(collate([as_preference(pair) for pair in pairs]))
            longest = max(pairs, key=lambda pair: len(pair["prompt_ids"]) + len(pair["real_ids"]))
            memory = self.plan_memory(args, as_preference(longest), collate)
            batch_size = args.precompute_ref_batch_size or args.per_device_train_batch_size
            logps_of = lambda rows: trainer.compute_ref_log_probs(model, collate(rows))  # noqa: E731
            pairs = score(logps_of, processes, pairs, "train", batch_size)
            game.iteration, game.at_start = 0, True
            model.train()
            trainer.compute_loss(model, collate([as_preference(pair) for pair in pairs]))
            model.train(training)
        trainer.reset_metrics("train")
        trainer._total_train_tokens = num_tokens
        return memory

    def plan_memory(self, args: SPINConfig, pair: dict[str, Any], collate: Callable) -> MemoryPlan:
        """Plans the memory, with the longest row and a completion of the full length."""
        trainer, processes = self.trainer, self.processes
        budget = args.generation_token_budget
        if budget is None:  # a run that is resumed goes on in the same batches
            budget = processes.on_main(recorded_token_budget, args.output_dir)
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.is_model_parallel:
            plan = plan_spread_memory(args, processes, budget)
            if plan.checkpointing and args.gradient_checkpointing is None:
                enable_checkpointing(processes.accelerator.unwrap_model(trainer.model), args)
            return plan
        length = args.max_completion_length
        if self.game.rules.max_length is not None:
            length = min(length, self.game.rules.max_length - len(pair["prompt_ids"]))
        pair = pair | {"rejected_ids": (pair["chosen_ids"] * length)[:length]}
        forward = lambda pairs: trainer.token_logps(trainer.model, collate(pairs))  # noqa: E731
        shares_prefix = bool(trainer.shares_prefix)
        return plan_memory(forward, trainer.model, trainer.optimizer, pair, args, processes, shares_prefix, budget)


@dataclass(frozen=True)
class DiskEstimate:
    """What a run writes, in bytes, at most."""

    model: float
    checkpoint: float
    num_checkpoints: int
    game: float
    next_iteration: float
    whole_run: float


def estimate_disk(
    args: SPINConfig, game: Game, parameters: list[torch.nn.Parameter], memory: MemoryEstimate | None, save_steps: int
) -> DiskEstimate:
    """
    What a run writes. An iteration's model is saved as it is in memory, an adapter alone where there is one. A
    checkpoint adds the optimizer.
    """
    num_iterations = args.num_self_play_iterations
    model = checkpoint = sum(_numel(p) * p.element_size() for p in parameters if p.requires_grad)
    if not args.save_only_model:
        checkpoint += 2 * model if memory is None else memory.optimizer
    # Token ids of a pair, which Parquet packs to well under four bytes each
    columns = Columns(game.train.rows)
    tokens = int((columns.lengths("prompt_ids") + columns.lengths("real_ids")).sum())
    pairs = 4 * (tokens + len(game.train) * args.max_completion_length) * (1 + args.opponent_history)
    num_checkpoints = 0
    if args.save_strategy != "no":
        num_epochs, num_steps = sum(game.schedule.num_epochs), game.schedule.starts[-1]
        num_saves = num_iterations + (num_steps // save_steps if args.save_strategy == "steps" else num_epochs)
        # The newest ones, the one at which the iteration began, and the one that is being written
        num_checkpoints = num_saves if not args.save_total_limit else min(num_saves, args.save_total_limit + 2)
    whole = num_iterations * (model + pairs) + num_checkpoints * checkpoint
    if args.load_best_iteration_at_end:
        whole += model  # the one that self-play starts from
    return DiskEstimate(
        model, checkpoint, num_checkpoints, pairs, model + pairs + min(2, num_checkpoints) * checkpoint, whole
    )


def describe_plan(
    args: SPINConfig,
    game: Game,
    parameters: list[torch.nn.Parameter],
    memory: MemoryPlan,
    disk: DiskEstimate,
    engine: str,
    state: TrainerState,
) -> str:
    """What a run will do and need, for people."""
    num_iterations, num_prompts = args.num_self_play_iterations, len(game.train)
    num_generated = num_iterations * sum(map(len, game.datasets.values()))
    columns, passes = Columns(game.train.rows), game.schedule.num_epochs
    prompt, real = (columns.lengths(name).sum() / num_prompts for name in ("prompt_ids", "real_ids"))
    trained = sum(_numel(p) for p in parameters if p.requires_grad)
    lines = {
        "model": f"{_short(sum(map(_numel, parameters)))} parameters, {_short(trained)} trained, one copy in memory "
        "(opponent, reference and policy are one model)",
        "data": f"{num_prompts:,} prompts ({sum(game.left_out['train'].values()):,} rows left out), on average "
        f"{prompt:.1f} tokens, and {real:.1f} in the real completion",
        "iterations": f"{num_iterations}, passes in each: "
        f"{passes[0] if len(set(passes)) == 1 else '/'.join(map(str, passes))}, steps in a pass: "
        f"{game.schedule.steps_per_epoch:,}; {state.max_steps:,} steps in all, {state.global_step:,} of them done",
        "generation": f"{num_generated:,} completions of up to {args.max_completion_length:,} tokens, at most "
        f"{_short(num_generated * args.max_completion_length)} tokens, {engine}",
        "memory": _describe_memory(memory),
        "disk": f"at most about {_short(disk.whole_run)}B in {args.output_dir}: {num_iterations} models of "
        f"{_short(disk.model)}B, {disk.num_checkpoints} checkpoints of {_short(disk.checkpoint)}B, {num_iterations} games "
        f"of {_short(disk.game)}B",
    }
    return "Self-play plan\n" + "\n".join(f"  {title:<12}{line}" for title, line in lines.items())


def _describe_memory(plan: MemoryPlan) -> str:
    checkpointing, memory = f"gradient checkpointing {'on' if plan.checkpointing else 'off'}", plan.estimate
    if memory is None:
        return f"not estimated, as the model is spread over several devices; {checkpointing}"
    names = ("weights", "gradients", "optimizer", "activations", "temporary")
    parts = ", ".join(f"{name} {_short(getattr(memory, name))}B" for name in names)
    return (
        f"training needs up to {_short(memory.peak)}B of {_short(memory.available)}B, if its largest batch is of the "
        f"longest rows: {parts}; {checkpointing}"
    )


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def _numel(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed ZeRO-3


def check_disk(output_dir: str, disk: DiskEstimate):
    """Raises a `ValueError` if not even the next iteration fits the disk."""
    free = shutil.disk_usage(existing(Path(output_dir))).free
    if free < disk.next_iteration:
        raise ValueError(
            f"`output_dir` ({output_dir}) has {_short(free)}B of free space, but the next iteration may need "
            f"{_short(disk.next_iteration)}B. Make room, choose another `output_dir`, or save less (`save_only_model`, "
            "`save_strategy='no'`)."
        )
    if free < disk.whole_run:
        logger.warning(
            f"`output_dir` ({output_dir}) has {_short(free)}B of free space, but the whole run may need "
            f"{_short(disk.whole_run)}B."
        )


@torch.no_grad()
def warn_of_lost_updates(parameters: list[torch.nn.Parameter], learning_rate: float):
    """
    Warns if the weights are trained in bfloat16 and the learning rate is so small that most updates round away. An
    Adam-like optimizer moves a weight by about the learning rate, and bfloat16 keeps a change of a weight w only if it is
    larger than |w|/512.
    """
    trained = [p for p in parameters if p.requires_grad and p.dtype == torch.bfloat16]
    total = sum(p.numel() for p in trained)
    if total == 0:
        return
    lost = sum((p.abs() > 512 * learning_rate).sum().item() for p in trained) / total
    if lost > 0.5:
        logger.warning(
            f"The model is trained in bfloat16 with a learning rate of {learning_rate:g}: for {lost:.0%} of its weights a "
            "step of this size rounds away. Load it in float32 and compute in bfloat16 (`dtype='float32'`, `bf16=True`), "
            "train an adapter, or raise the learning rate."
        )
