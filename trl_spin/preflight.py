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

"""The plan of a run: what it will do, and whether the disk can hold it."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.logging import get_logger

from .game import Columns
from .memory import MemoryEstimate
from .resume import existing
from .spin_config import SPINConfig


if TYPE_CHECKING:
    from .spin_trainer import SPINTrainer

logger = get_logger(__name__)


def make_plan(trainer: "SPINTrainer", memory: MemoryEstimate | None) -> tuple[str, float, float]:
    """
    What a run will do and need.

    Args:
        trainer ([`SPINTrainer`]):
            Trainer, with its model prepared for training.
        memory ([`~memory.MemoryEstimate`] or `None`):
            Memory that training needs, if it could be estimated.

    Returns:
        `tuple[str, float, float]`: Text for people, and disk space in bytes, at most: for the next iteration, and in all.
    """
    args = trainer.args
    num_iterations = args.num_self_play_iterations
    passes = args.per_iteration("num_train_epochs")
    parameters = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    trainable = [p for p in parameters if p.requires_grad]
    num_parameters, num_trainable = (sum(map(_numel, group)) for group in (parameters, trainable))
    adapter = num_trainable < num_parameters

    rows = trainer.games["train"].rows
    columns = Columns(rows)
    prompts, answers = (int(columns.lengths(name).sum()) for name in ("prompt_ids", "real_ids"))
    num_prompts = sum(map(len, trainer.games.values()))
    num_generated = num_prompts * num_iterations

    # An iteration's model is saved as it is in memory, an adapter alone where there is one. A checkpoint adds the
    # optimizer
    model_size = sum(_numel(p) * p.element_size() for p in (trainable if adapter else parameters))
    checkpoint_size = model_size
    if not args.save_only_model:
        trained_size = sum(_numel(p) * p.element_size() for p in trainable)
        checkpoint_size += 2 * trained_size if memory is None else memory.optimizer
    # Token ids of a pair, which Parquet packs to well under four bytes each
    game_size = 4 * (prompts + answers + len(rows) * args.max_completion_length) * (1 + args.opponent_history)
    num_checkpoints = 0
    if args.save_strategy != "no":
        num_saves = num_iterations + (
            trainer.iteration_steps[-1] // trainer.state.save_steps if args.save_strategy == "steps" else sum(passes)
        )
        # The newest ones, the one at which the iteration began, and the one that is being written
        num_checkpoints = num_saves if not args.save_total_limit else min(num_saves, args.save_total_limit + 2)
    disk = num_iterations * (model_size + game_size) + num_checkpoints * checkpoint_size
    if args.reference_alpha < 1 or args.load_best_iteration_at_end:
        disk += model_size  # the model that self-play starts from
    next_iteration = model_size + game_size + min(2, num_checkpoints) * checkpoint_size

    engine = {
        "generate": f"in batches of up to {args.generation_token_budget:,}",
        "continuous_batching": "with continuous batching",
        "vllm": "with vLLM",
    }[args.generation_engine]
    left_out = sum(trainer.left_out["train"].values())
    schedule = str(passes[0]) if len(set(passes)) == 1 else "/".join(map(str, passes))
    lines = {
        "model": f"{_short(num_parameters)} parameters, {_short(num_trainable)} trained, one copy in memory (opponent, "
        "reference and policy are one model)",
        "data": f"{len(rows):,} prompts ({left_out:,} rows left out), on average {prompts / len(rows):.1f} tokens, and "
        f"{answers / len(rows):.1f} in the real answer",
        "iterations": f"{num_iterations}, passes in each: {schedule}, steps in a pass: {trainer.steps_per_epoch:,}; "
        f"{trainer.state.max_steps:,} steps in all, {trainer.state.global_step:,} of them done",
        "generation": f"{num_generated:,} answers of up to {args.max_completion_length:,} tokens, at most "
        f"{_short(num_generated * args.max_completion_length)} tokens, {engine}",
        "memory": _describe_memory(args, memory),
        "disk": f"at most about {_short(disk)}B in {args.output_dir}: {num_iterations} models of {_short(model_size)}B, "
        f"{num_checkpoints} checkpoints of {_short(checkpoint_size)}B, {num_iterations} games of {_short(game_size)}B",
    }
    text = "Self-play plan\n" + "\n".join(f"  {title:<12}{line}" for title, line in lines.items())
    return text, next_iteration, disk


def _describe_memory(args: SPINConfig, memory: MemoryEstimate | None) -> str:
    checkpointing = f"gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}"
    if memory is None:
        return f"not estimated, as the model is spread over several devices; {checkpointing}"
    parts = {name: _short(getattr(memory, name)) for name in ("weights", "gradients", "optimizer", "activations")}
    return (
        f"training needs up to {_short(memory.peak)}B of {_short(memory.available)}B, if its largest batch is of the longest "
        f"rows: weights {parts['weights']}B, gradients {parts['gradients']}B, optimizer {parts['optimizer']}B, activations "
        f"{parts['activations']}B, temporary {_short(memory.temporary)}B; {checkpointing}"
    )


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def _numel(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed ZeRO-3


def check_disk(output_dir: str, next_iteration: float, whole_run: float):
    """
    Refuses a run that does not fit the disk.

    Args:
        output_dir (`str`):
            Output directory of the run.
        next_iteration (`float`):
            Bytes that the next iteration needs.
        whole_run (`float`):
            Bytes that the whole run needs.

    Raises:
        `ValueError`: If not even the next iteration fits.
    """
    free = shutil.disk_usage(existing(Path(output_dir))).free
    if free < next_iteration:
        raise ValueError(
            f"`output_dir` ({output_dir}) has {_short(free)}B of free space, but the next iteration may need "
            f"{_short(next_iteration)}B. Make room, choose another `output_dir`, or save less (`save_only_model`, "
            "`save_strategy='no'`)."
        )
    if free < whole_run:
        logger.warning(
            f"`output_dir` ({output_dir}) has {_short(free)}B of free space, but the whole run may need "
            f"{_short(whole_run)}B."
        )


@torch.no_grad()
def warn_of_lost_updates(trainer: "SPINTrainer"):
    """
    Warns if the weights are trained in bfloat16 and the learning rate is so small that most updates round away. An Adam-like
    optimizer moves a weight by about the learning rate, and bfloat16 keeps a change of a weight w only if it is larger than
    |w|/512.

    Args:
        trainer ([`SPINTrainer`]):
            Trainer, with its model prepared for training.
    """
    trained = [p for p in trainer.model.parameters() if p.requires_grad and p.dtype == torch.bfloat16]
    total = sum(p.numel() for p in trained)
    if total == 0 or trainer.is_deepspeed_enabled:  # which keeps weights in float32 beside them
        return
    learning_rate = max(trainer.args.per_iteration("learning_rate"))
    lost = sum((p.abs() > 512 * learning_rate).sum().item() for p in trained) / total
    if lost > 0.5:
        logger.warning(
            f"The model is trained in bfloat16 with a learning rate of {learning_rate:g}: for {lost:.0%} of its weights a "
            "step of this size rounds away. Load it in float32 and compute in bfloat16 (`dtype='float32'`, `bf16=True`), "
            "train an adapter, or raise the learning rate."
        )
