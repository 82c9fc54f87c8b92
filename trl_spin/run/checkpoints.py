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

"""Checkpoints that are there whole or not at all, and those of them that stay."""

import os
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

from accelerate import Accelerator
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor.experimental import implicit_replication
from transformers import Trainer, TrainerState
from transformers.trainer_utils import sort_checkpoints
from trl.distributed import DistributedBackend

from ..compat import replaced
from ..pairs import Game
from ..spin_config import SPINConfig
from .files import explain_write_error, model_dir, seal, sync
from .processes import Processes


_STAGING = ".saving"


class Checkpoints:
    """Checkpoints that are there whole or not at all, and those of them that stay."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.staging: str | None = None  # where the Trainer writes one at the moment
        if DistributedBackend(accelerator).is_zero3:  # or else the Trainer would save shards in the place of models
            zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            zero["stage3_gather_16bit_weights_on_model_save"] = True

    @contextmanager
    def saving(self, args: SPINConfig, state: TrainerState, game: Game):
        """
        The Trainer writes its checkpoint under a temporary name in here. It gets its own name when it is complete and
        on disk, and older ones are removed.
        """
        name, best = f"checkpoint-{state.global_step}", state.best_model_checkpoint
        staged, final = Path(args.output_dir) / _STAGING / name, Path(args.output_dir) / name
        with explain_write_error(args.output_dir):
            with replaced(self, "staging", str(staged.parent)):
                yield
            if state.best_model_checkpoint != best:  # for the Trainer, the temporary name is the final one
                state.best_model_checkpoint = str(final)
                if args.should_save:
                    state.save_to_json(str(staged / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if args.should_save:
                seal(staged, run=game.settings["run"])
                if final.exists():  # of a run that went on from an earlier checkpoint
                    _remove(final)
                os.replace(staged, final)
                sync(final.parent)
                shutil.rmtree(staged.parent)
        self.accelerator.wait_for_everyone()
        if args.should_save and args.save_total_limit:
            paths = sort_checkpoints(args.output_dir)
            older = [path for path in paths if int(path.rpartition("-")[2]) <= state.global_step]
            # From where the iteration began, it can be played again should its game be damaged
            start = max(first for first in game.schedule.starts if first <= state.global_step)
            start = str(Path(args.output_dir) / f"checkpoint-{start}")
            for path in set(older) - {*older[-args.save_total_limit :], start, state.best_model_checkpoint}:
                _remove(Path(path))


def keep_model(trainer: Trainer, game: Game, processes: Processes, iteration: int) -> Path:
    """Keeps the model that an iteration made, or the one that self-play starts from (-1). Returns the directory."""
    directory = model_dir(trainer.args.output_dir, iteration)
    with explain_write_error(directory):
        if iteration >= 0:
            save_model(trainer, directory)
        else:  # the Trainer has not prepared it yet, but ZeRO-3 may have loaded it in shards
            with DistributedBackend(trainer.accelerator).gather_params(list(trainer.model.parameters())):
                trainer._save(str(directory))
        processes.on_main(lambda: seal(directory, run=game.settings["run"], iteration=iteration))
    return directory


def save_model(trainer: Trainer, directory: str | Path):
    """Saves the model, also where FSDP's checkpoints are shards: there, the Trainer would save nothing."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    with replaced(plugin, "state_dict_type", StateDictType.FULL_STATE_DICT) if plugin else nullcontext():
        trainer.save_model(str(directory))


def load_model(trainer: Trainer, directory: Path):
    """Puts the weights of a saved model in the place of the trainer's, which may be spread over the processes."""
    whole = nullcontext()
    if DistributedBackend(trainer.accelerator).is_zero3:
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(list(trainer.model.parameters()), modifier_rank=0)
    # Under FSDP, the Trainer would look for a checkpoint
    with whole, implicit_replication(), replaced(trainer, "is_fsdp_enabled", False):
        trainer._load_from_checkpoint(str(directory))


def _remove(checkpoint: Path):
    # It loses its name first: what a killed process leaves of it is not taken for a checkpoint
    nameless = checkpoint.with_name(".removed")
    shutil.rmtree(nameless, ignore_errors=True)
    os.replace(checkpoint, nameless)
    shutil.rmtree(nameless)
