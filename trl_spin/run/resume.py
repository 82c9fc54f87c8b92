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

"""One job per directory, and a run that continues with the settings that it was started with, or not at all."""

import errno
import hashlib
import json
import os
import socket
from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer_utils import sort_checkpoints

from ..engines import ENGINES
from ..pairs import Game
from ..spin_config import OPTIONS, PER_ITERATION, SPINConfig
from .files import RECORD, SETTINGS, find_fault, game_dir, load_json, model_dir, read_json, write_json
from .logs import logger
from .processes import Processes


@contextmanager
def run_lock(processes: Processes, output_dir: str):
    """Keeps a second job out of a run's directory. The system gives the lock back when the process ends, however."""
    lock, holder = FileLock(_run_file(output_dir).with_name("lock")), _run_file(output_dir).with_name("job.json")

    def acquire():
        try:
            holder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            job = holder.read_text() if holder.is_file() else "unknown"
            where = f"Another job is running in `output_dir` ({output_dir}): {job}."
            raise ValueError(f"{where} Wait for it or stop it, or choose another `output_dir`.") from None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise OSError(f"`output_dir` ({output_dir}) cannot be written to: {error}. Choose another.") from error
            logger.warning(f"The file system of {output_dir} has no locks: do not start two jobs in it.")
        holder.write_text(job := json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        return job

    job = processes.on_main(acquire)
    try:
        if not processes.smallest(holder.is_file() and holder.read_text() == job):
            what = f"`output_dir` ({output_dir}) is not one directory for all processes, which read the games in it"
            raise ValueError(f"{what}. Choose one on a file system that all nodes share.")
        yield
    finally:
        if processes.accelerator.is_main_process:
            lock.release()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    return {name: version(name) for name in ("trl-spin", "trl", "transformers", "peft", "accelerate", "torch")}


def run_settings(args: SPINConfig, game: Game, more: dict[str, Any]) -> dict[str, Any]:
    """All that changes the result of a run, JSON-serializable: options, the data, and in `more` what is neither."""
    engines = {option.name for engine in ENGINES.values() if engine.flag for option in fields(engine.Options)}
    free = engines.union(OPTIONS["free"])
    settings = {name: value for name, value in args.to_dict().items() if name not in free} | more
    settings |= {name: args.per_iteration(name) for name in PER_ITERATION}
    settings |= {name: game.settings[name] for name in ("end_token_ids", "data", "chat_template")}

    def plain(value):
        return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)

    return json.loads(json.dumps(settings, default=plain))


def game_settings(args: SPINConfig, game: Game) -> dict[str, Any]:
    """All that a completion depends on, and what becomes of it, beside opponent and iteration."""
    rules = game.rules
    sampling, pairs = ({option: getattr(args, option) for option in OPTIONS[kind]} for kind in ("sampling", "pairs"))
    return {
        "seed": args.seed,
        "sampling": sampling,
        "pairs": pairs | {"play_identical": rules.play_identical},
        "end_token_ids": rules.end_token_ids,
        "max_length": rules.max_length,
        "data": {name: f"{len(data.rows)} rows, {data.columns.fingerprint()}" for name, data in game.datasets.items()},
        "chat_template": hashlib.sha256(str(rules.tokenizer.chat_template).encode()).hexdigest(),
    }


def _run_file(output_dir: str) -> Path:
    return Path(output_dir) / "self_play" / SETTINGS


def write_run(args: SPINConfig, game: Game, settings: dict[str, Any], token_budget: int):
    """Writes down what the run depends on, to compare with when it is resumed."""
    content = {"run": game.settings["run"], "settings": settings, "generation_token_budget": token_budget}
    write_json(_run_file(args.output_dir), content | {"versions": library_versions()})


def recorded_token_budget(output_dir: str) -> int | None:
    """`generation_token_budget` of the run that is resumed: it continues with the same batches."""
    return (read_json(_run_file(output_dir)) or {}).get("generation_token_budget")


def open_run(args: SPINConfig, settings: dict[str, Any], resume_from_checkpoint: str | bool) -> tuple[str, str | None]:
    """
    The name of the run in `output_dir`, and where it continues: at a checkpoint, or at its beginning (`None`).

    Args:
        args ([`SPINConfig`]):
            Options.
        settings (`dict[str, Any]`):
            See [`run_settings`].
        resume_from_checkpoint (`str` or `bool`):
            Checkpoint to resume from; `True` for the newest one, `False` for a new run.

    Raises:
        `ValueError`: If the directory holds another run, or one with other settings, or nothing to resume from.
    """
    path = _run_file(args.output_dir)
    run, num_iterations = read_json(path), args.num_self_play_iterations
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    finished = (model_dir(args.output_dir, num_iterations - 1) / RECORD).is_file()
    more = "To play more iterations, raise `num_self_play_iterations` and resume" if finished else "Resume it"
    if not resume_from_checkpoint:
        if run is not None:
            what = f"a finished run of {num_iterations} iterations" if finished else "the games of another run"
            what = f"`output_dir` ({args.output_dir}) holds {what} ({path.parent}), and runs are never mixed"
            resume = "`trainer.train(resume_from_checkpoint=True)` (`--resume_from_checkpoint true`)"
            raise ValueError(f"{what}. {more} with {resume}; to start over, choose another `output_dir`.")
        return name, None
    if run is None:
        if resume_from_checkpoint is True and not sort_checkpoints(args.output_dir):
            return name, None  # the first of several equal commands
        missing = f"There is no self-play run to resume in `output_dir` ({args.output_dir}): {path} does not exist"
        raise ValueError(f"{missing}. Checkpoints of other trainers cannot be continued: pass one as `model` instead.")
    _compare_settings(path, run["settings"], settings)
    for library, now in library_versions().items():
        if run["versions"].get(library) != now:
            change = f"The run was started with {library} {run['versions'].get(library)} and continues with {now}"
            logger.warning(f"{change}: its result may differ in the last digits.")
    if finished and resume_from_checkpoint is True:
        over = f"This run is finished, its {num_iterations} iterations are played"
        logger.warning(f"{over}: nothing is left to do. {more}; to start over, choose another `output_dir`.")
    return run["run"], choose_checkpoint(args, resume_from_checkpoint, run["run"])


def _compare_settings(path: Path, old: dict[str, Any], new: dict[str, Any]):
    # More iterations are no other settings
    changes = []
    for name in sorted(old.keys() & new.keys()):
        before, after = old[name], new[name]
        if name in PER_ITERATION:
            played = min(len(before), len(after))
            before, after = before[:played], after[:played]
        if before != after:
            changes.append(f"- `{name}` was {before!r} and is {after!r}")
    if changes:
        what = f"These settings would change the run. They differ from {path}:"
        remedy = "Resume with the old settings, or start a new run in another `output_dir`."
        raise ValueError("\n".join([what, *changes, remedy]))


def choose_checkpoint(args: SPINConfig, resume_from_checkpoint: str | bool, run: str) -> str | None:
    """
    The newest checkpoint from which the run can continue, or the given one.

    Args:
        args ([`SPINConfig`]):
            Options.
        resume_from_checkpoint (`str` or `bool`):
            Checkpoint to resume from; `True` for the newest one.
        run (`str`):
            Name of the run.

    Returns:
        `str` or `None`: Checkpoint. `None` if there is none and the run starts from its beginning.

    Raises:
        `ValueError`: If the given checkpoint, or all of them, cannot be used.
    """
    boundaries, candidates = [0, *accumulate(args.per_iteration("num_train_epochs"))], [resume_from_checkpoint]
    if resume_from_checkpoint is True:
        candidates = reversed(sort_checkpoints(args.output_dir))
    faults = []
    for checkpoint in map(Path, candidates):
        fault = find_fault(checkpoint, run=run)
        if fault is None and not args.save_only_model and not any(checkpoint.glob("rng_state*")):
            # The Trainer would silently continue without the optimizer's state
            fault = f"{checkpoint} holds the model alone (`save_only_model`)"
        if fault is None:
            epoch = load_json(checkpoint / "trainer_state.json")["epoch"]
            if epoch > boundaries[-1]:
                what = f"{checkpoint} is at epoch {epoch:g}, beyond the {boundaries[-1]} epochs of"
                remedy = "Raise it, or resume from an earlier checkpoint by its path."
                raise ValueError(f"{what} `num_self_play_iterations={args.num_self_play_iterations}`. {remedy}")
            if epoch not in boundaries:  # in the middle of an iteration, whose game it needs
                iteration = bisect_right(boundaries, epoch) - 1
                fault = find_fault(game_dir(args.output_dir, iteration), iteration=iteration, run=run)
        if fault is None:
            logger.info(f"Resuming from {checkpoint}.")
            return str(checkpoint)
        faults.append(f"{fault}.")
        logger.warning(f"Cannot resume from {checkpoint}: {fault}.")
    if resume_from_checkpoint is not True or any(Path(args.output_dir).glob(f"iteration-*/{RECORD}")):
        none = f"{args.output_dir} holds none (`save_strategy={args.save_strategy.value!r}`)."
        remedy = "Restore the files, resume from another checkpoint, or start anew from the last finished iteration."
        raise ValueError("\n".join(["There is no checkpoint to resume from.", *(faults or [none]), remedy]))
    start = "the run starts from its beginning, with the completions that are there"
    logger.warning(f"There is no checkpoint in {args.output_dir} yet: {start}.")
    return None
