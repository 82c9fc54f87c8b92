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

"""Checkpoints: there whole or not at all, which of them stay, and which one a run goes on from."""

import os
import shutil
from bisect import bisect_right
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import TrainerState
from transformers.trainer_utils import sort_checkpoints

from ..schedule import Schedule
from ..spin_config import SPINConfig
from .files import RECORD, explain_write_error, read_json
from .games import find_game_fault


logger = get_logger(__name__)

_STAGING = ".saving"


class Checkpoints:
    """Checkpoints that are there whole or not at all, and those of them that stay."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.staging: str | None = None  # where the Trainer writes one at the moment

    @contextmanager
    def saving(self, args: SPINConfig, state: TrainerState, schedule: Schedule):
        """
        The Trainer writes its checkpoint under a temporary name in here. It gets its own name when it is complete and on
        disk, and older ones are removed.
        """
        name, best = f"checkpoint-{state.global_step}", state.best_model_checkpoint
        staged, final = Path(args.output_dir) / _STAGING / name, Path(args.output_dir) / name
        with explain_write_error(args.output_dir):
            self.staging = str(staged.parent)
            try:
                yield
            finally:
                self.staging = None
            if state.best_model_checkpoint != best:  # for the Trainer, the temporary name is the final one
                state.best_model_checkpoint = str(final)
                if args.should_save:
                    state.save_to_json(str(staged / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if args.should_save:
                for path in staged.rglob("*"):
                    if path.is_file():
                        with open(path, "rb+") as file:
                            os.fsync(file.fileno())
                if final.exists():  # of a run that went on from an earlier checkpoint
                    _remove(final)
                os.replace(staged, final)
                shutil.rmtree(staged.parent)
        self.accelerator.wait_for_everyone()
        if args.should_save and args.save_total_limit:
            older = [path for path in sort_checkpoints(args.output_dir) if _step(path) <= state.global_step]
            # From where the iteration began, it can be played again should its game be damaged
            start = max(first for first in schedule.starts if first <= state.global_step)
            start = str(Path(args.output_dir) / f"checkpoint-{start}")
            for path in set(older) - {*older[-args.save_total_limit :], start, state.best_model_checkpoint}:
                _remove(Path(path))


def _remove(checkpoint: Path):
    # It loses its name first: what a killed process leaves of it is not taken for a checkpoint
    nameless = checkpoint.with_name(".removed")
    shutil.rmtree(nameless, ignore_errors=True)
    os.replace(checkpoint, nameless)
    shutil.rmtree(nameless)


def _step(checkpoint: str) -> int:
    return int(checkpoint.rsplit("-", 1)[1])


def _missing_file(checkpoint: Path, num_processes: int, model_only: bool) -> str | None:
    """What a checkpoint lacks: the Trainer would go on without the optimizer's state, in silence."""
    names = ["trainer_state.json"]
    if not model_only:
        names += ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{i}.pth" for i in range(num_processes)]
        # DeepSpeed and FSDP keep the optimizer in folders of their own
        if not (any(checkpoint.glob("global_step*")) or any(checkpoint.glob("pytorch_model_fsdp*"))):
            names += ["optimizer.pt", "scheduler.pt"]
    return next((name for name in names if not (checkpoint / name).is_file()), None)


def choose_checkpoint(args: SPINConfig, resume_from_checkpoint: str | bool, num_processes: int) -> str | None:
    """
    The newest checkpoint from which the run can go on, or the given one.

    Args:
        args ([`SPINConfig`]):
            Options.
        resume_from_checkpoint (`str` or `bool`):
            Checkpoint to resume from; `True` for the newest one.
        num_processes (`int`):
            Number of processes.

    Returns:
        `str` or `None`: Checkpoint. `None` if there is none and the run goes on from its beginning.

    Raises:
        `ValueError`: If the given checkpoint, or all of them, cannot be used.
    """
    boundaries = [0, *accumulate(args.per_iteration("num_train_epochs"))]
    candidates = [resume_from_checkpoint]
    if resume_from_checkpoint is True:
        candidates = reversed(sort_checkpoints(args.output_dir))
    faults = []
    for checkpoint in map(Path, candidates):
        missing = _missing_file(checkpoint, num_processes, args.save_only_model)
        fault = missing and f"{missing} is missing"
        if fault is None:
            epoch = read_json(checkpoint / "trainer_state.json")["epoch"]
            if epoch > boundaries[-1]:
                raise ValueError(
                    f"{checkpoint} is at epoch {epoch:g}, beyond the {boundaries[-1]} epochs of "
                    f"`num_self_play_iterations={args.num_self_play_iterations}`. Ask for at least as many iterations "
                    "as were played, or resume from an earlier checkpoint by its path."
                )
            if epoch not in boundaries:  # in the middle of an iteration, whose game it needs
                fault = find_game_fault(args.output_dir, bisect_right(boundaries, epoch) - 1)
        if fault is None:
            logger.info(f"Resuming from {checkpoint}.")
            return str(checkpoint)
        faults.append(f"{checkpoint}: {fault}.")
        logger.warning(f"Cannot resume from {faults[-1]}")
    finished = [path.parent.name for path in Path(args.output_dir).glob(f"iteration-*/{RECORD}")]
    if resume_from_checkpoint is not True or finished:
        none = f"{args.output_dir} holds none (`save_strategy={args.save_strategy.value!r}`)."
        start_anew = f", or start a new run from the model of the last finished iteration ({', '.join(finished)})"
        raise ValueError(
            "There is no checkpoint to resume from.\n"
            + "\n".join(faults or [none])
            + f"\nRestore the files or resume from another checkpoint{start_anew if finished else ''}."
        )
    logger.warning(f"There is no checkpoint in {args.output_dir} yet: the run goes on from its beginning.")
    return None
