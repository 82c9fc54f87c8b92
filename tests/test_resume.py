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

"""
Runs that are killed, at named points and at random moments, and resumed by the same call: they must end with the bits of
a run that was left alone.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
from pathlib import Path

import pytest
from conftest import make_args, make_dataset, make_model, make_tokenizer
from peft import LoraConfig
from transformers import Trainer, TrainerCallback

from trl_spin import SelfPlayCallback, SPINTrainer, callbacks, game, generation
from trl_spin.game import iteration_dir, read_manifest


FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree"}


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(count: int, original, when=lambda *args, **kwargs: True, after: bool = False):
    """Wraps a function so that its `count`-th call kills the process."""
    calls = itertools.count(1)

    def wrapper(*args, **kwargs):
        dies = when(*args, **kwargs) and next(calls) == count
        if dies and not after:
            kill()
        result = original(*args, **kwargs)
        if dies:
            kill()
        return result

    return wrapper


class KillInEpoch(TrainerCallback):
    """Kills in the middle of an epoch, or at its end before anything is logged or saved."""

    def __init__(self, event: str, step: int):
        setattr(self, event, lambda args, state, control, **kwargs: kill() if state.global_step == step else None)


def in_iteration_1(*args, **kwargs):
    return any("iteration-1" in str(a) for a in args)


def arm(point: str) -> list[TrainerCallback]:
    """Makes this process kill itself at a point of the second of two iterations, which begins at step 6."""
    cls, replace = SelfPlayCallback, os.replace
    match point:
        case "in generation":
            callbacks.write_answers = kill_at(2, callbacks.write_answers, in_iteration_1, after=True)
        case "while a shard is written":
            game.os.replace = kill_at(2, replace, lambda a, b: in_iteration_1(b) and "answers" in str(b))
        case "in the scoring pass":
            SPINTrainer.compute_ref_log_probs = kill_at(
                3, SPINTrainer.compute_ref_log_probs, lambda trainer, *a: trainer.state.global_step == 6
            )
        case "while the game is stored":
            game.os.replace = kill_at(1, replace, lambda a, b: in_iteration_1(b) and b.name == "manifest.json")
        case "between store and swap":
            cls.swap = kill_at(1, cls.swap, lambda self, iteration, pairs: iteration == 1)
        case "in the middle of an epoch":
            return [KillInEpoch("on_step_end", 9)]
        case "at the end of an epoch":
            return [KillInEpoch("on_epoch_end", 12)]
        case "at the end of an iteration":
            return [KillInEpoch("on_epoch_end", 6)]
        case "between iterations":
            cls.keep = kill_at(1, cls.keep, after=True)
        case "while a checkpoint is written":
            Trainer._save_optimizer_and_scheduler = kill_at(
                1, Trainer._save_optimizer_and_scheduler, lambda trainer, _: trainer.state.global_step == 8
            )
        case "in the first iteration, before any checkpoint":
            return [KillInEpoch("on_step_end", 2)]
        case _:
            raise ValueError(point)
    return []


POINTS = [
    "in generation",
    "while a shard is written",
    "in the scoring pass",
    "while the game is stored",
    "between store and swap",
    "in the middle of an epoch",
    "at the end of an epoch",
    "at the end of an iteration",
    "between iterations",
    "while a checkpoint is written",
    "in the first iteration, before any checkpoint",
]


def sha256(tensors: dict) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def play(output_dir: str, kind: str, rank: int, world_size: int, port: int, point: str | None, file_event: int | None):
    """One process of a run, always started in the same way. It leaves hashes of all that it ended with."""
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world_size)}
    generation._COMMIT_SECONDS = -1  # a shard for every round of batches
    killers = arm(point) if point is not None and rank == world_size - 1 - (point in SHARED_POINTS) else []
    events = itertools.count(1)

    def count_files(event, args):
        if event in FILE_EVENTS and str(args[0]).startswith(output_dir) and next(events) == file_event:
            kill()

    if file_event is not None:
        sys.addaudithook(count_files)
    tokenizer = make_tokenizer()
    trainer = SPINTrainer(
        make_model(tokenizer),
        args=make_args(
            output_dir,
            per_device_train_batch_size=4 // world_size,
            num_train_epochs=[2, 3],
            opponent_history=1,
            generation_token_budget=130,
            save_strategy="steps",
            save_steps=4,
            save_total_limit=1,
        ),
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(3),
        processing_class=tokenizer,
        callbacks=killers,
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if kind == "lora" else None,
    )
    trainer.train(resume_from_checkpoint=True)
    optimizer_state = trainer.optimizer.state_dict()["state"]
    result = {
        "weights": sha256(trainer.model.state_dict()),
        "optimizer": sha256({f"{i}.{key}": v for i, state in optimizer_state.items() for key, v in state.items()}),
        "games": [[shard["sha256"] for shard in read_manifest(output_dir, t)["shards"]] for t in range(2)],
        "losses": [logs["loss"] for logs in trainer.state.log_history if "loss" in logs],
        "kept": [
            json.loads((Path(output_dir) / f"iteration-{t}" / "self_play.json").read_text())["eval_nll/real"]
            for t in range(2)
        ],
        "events": next(events),
    }
    if rank == 0:
        Path(output_dir, "result.json").write_text(json.dumps(result))


# Where the main process alone is at work; elsewhere the last process is killed
SHARED_POINTS = ()


def run(output_dir: Path, kind: str, world_size: int = 1, point: str | None = None, file_event: int | None = None):
    """A run of real processes. As a launcher does, it kills the others when one dies. Returns whether it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=play, args=(str(output_dir), kind, rank, world_size, port, point, file_event))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    multiprocessing.connection.wait([process.sentinel for process in processes])
    if any(process.exitcode not in (0, None) for process in processes):
        for process in processes:
            process.kill()
    for process in processes:
        process.join()
    codes = {process.exitcode for process in processes}
    assert codes <= {0, -signal.SIGKILL}, codes
    return codes != {0}


def result(output_dir: Path) -> dict:
    return json.loads((output_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Results of runs that are left alone, by kind and number of processes."""
    results = {}

    def get(kind: str, world_size: int = 1) -> dict:
        if (kind, world_size) not in results:
            directory = tmp_path_factory.mktemp(f"{kind}-{world_size}")
            assert not run(directory, kind, world_size, file_event=0)
            results[kind, world_size] = result(directory)
        return results[kind, world_size] | {"events": None}

    get.results = results
    return get


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_killed_run_ends_like_one_that_was_left_alone(tmp_path, straight, kind, point):
    assert run(tmp_path, kind, point=point)
    assert not (tmp_path / "result.json").exists()
    assert not run(tmp_path, kind)
    assert result(tmp_path) | {"events": None} == straight(kind)
