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
import multiprocessing.connection
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

from trl_spin import SelfPlayCallback, SPINTrainer, callbacks, engines, game, generation
from trl_spin.game import read_manifest


FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree"}


deadly = signal.SIGKILL  # what a process sends itself at its point


def kill():
    os.kill(os.getpid(), deadly)


def kill_at(count: int, original, when=lambda *args, **kwargs: True, after: bool = False):
    """Wraps a function so that its `count`-th call kills the process."""
    calls = itertools.count(1)

    def wrapper(*args, **kwargs):
        dies = when(*args, **kwargs) and next(calls) == count
        if dies and not after:
            kill()
        result = original(*args, **kwargs)
        if dies and after:
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
        case "within a batch of generation":
            call = engines.SampleByRow.__call__
            engines.SampleByRow.__call__ = kill_at(45, call, after=True)
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
ON_MAIN_PROCESS = ("in generation", "while a shard is written", "while the game is stored")


def sha256(tensors: dict) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def play(output_dir: str, kind: str, rank: int, world_size: int, port: int, point: str, file_event: int, signum: int):
    """One process of a run, always started in the same way. It leaves hashes of all that it ended with."""
    global deadly
    deadly = signum
    os.dup2(os.open(f"{output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world_size)}
    generation._COMMIT_SECONDS = -1  # a shard for every round of batches
    # What only the main process does can kill only that one. Elsewhere it is the last, and the others wait for it.
    dies = 0 if point in ON_MAIN_PROCESS else world_size - 1
    killers = arm(point) if point is not None and rank == dies else []
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


def run(
    output_dir: Path,
    kind: str = "full",
    world_size: int = 1,
    point: str | None = None,
    file_event: int | None = None,
    signum: int = signal.SIGKILL,
) -> set[int]:
    """A run of real processes. As a launcher does, it kills the others when one dies. Returns the exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume"])
    # The fork server of Python 3.11 does not take over `sys.path`: it would preload nothing, and every process import torch
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=play, args=(str(output_dir), kind, rank, world_size, port, point, file_event, signum))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    multiprocessing.connection.wait([process.sentinel for process in processes])
    for process in processes:
        process.join(60 if signum != signal.SIGKILL else 0)
        process.kill()
        process.join()
    return {process.exitcode for process in processes}


def result(output_dir: Path) -> dict:
    return json.loads((output_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Results of runs that are left alone, by kind and number of processes."""
    results = {}

    def get(kind: str, world_size: int = 1) -> dict:
        if (kind, world_size) not in results:
            directory = tmp_path_factory.mktemp(f"{kind}-{world_size}")
            assert run(directory, kind, world_size, file_event=0) == {0}
            results[kind, world_size] = result(directory)
        return results[kind, world_size] | {"events": None}

    get.results = results
    return get


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_killed_run_ends_like_one_that_was_left_alone(tmp_path, straight, kind, point):
    assert run(tmp_path, kind, point=point) == {-signal.SIGKILL}
    assert run(tmp_path, kind) == {0}
    assert result(tmp_path) | {"events": None} == straight(kind)


@pytest.mark.parametrize(
    "kind, point",
    [
        ("full", "while a shard is written"),
        ("full", "in the middle of an epoch"),
        ("lora", "between store and swap"),
        ("lora", "while a checkpoint is written"),
    ],
)
def test_killed_runs_of_two_processes(tmp_path, straight, kind, point):
    assert run(tmp_path, kind, 2, point) == {-signal.SIGKILL}
    assert run(tmp_path, kind, 2) == {0}
    assert result(tmp_path) | {"events": None} == straight(kind, 2)


@pytest.mark.parametrize("kind, world_size", [("full", 1), ("lora", 1), ("lora", 2)])
def test_a_run_that_is_killed_again_and_again(tmp_path, straight, kind, world_size):
    """At random accesses to its files."""
    expected = straight(kind, world_size)
    num_events = straight.results[kind, world_size]["events"]
    moments = random.Random(f"{kind}{world_size}")
    killed = [
        run(tmp_path, kind, world_size, file_event=moments.randrange(num_events // 8, num_events // 2))
        for _ in range(5 if world_size == 1 else 2)
    ]
    assert {-signal.SIGKILL} in killed
    assert run(tmp_path, kind, world_size) == {0}
    assert result(tmp_path) | {"events": None} == expected


@pytest.mark.parametrize(
    "point, world_size",
    [
        ("within a batch of generation", 1),
        ("within a batch of generation", 2),
        ("in the scoring pass", 1),
        ("in the middle of an epoch", 2),
    ],
)
def test_sigterm_stops_all_processes_and_loses_nothing(tmp_path, straight, point, world_size):
    """Also when one process alone gets it, as here."""
    assert run(tmp_path, "full", world_size, point, signum=signal.SIGTERM) == {128 + signal.SIGTERM}
    assert "--resume_from_checkpoint true" in Path(f"{tmp_path}.log").read_text()
    if "epoch" in point:
        assert (tmp_path / "checkpoint-9" / "trainer_state.json").is_file()
    else:
        assert list(tmp_path.glob("self_play/iteration-*/answers-*/train-*.parquet"))
    assert run(tmp_path, "full", world_size) == {0}
    assert result(tmp_path) | {"events": None} == straight("full", world_size)


def test_ctrl_c(tmp_path, straight):
    assert run(tmp_path, point="within a batch of generation", signum=signal.SIGINT) == {1}
    stderr = Path(f"{tmp_path}.log").read_text()
    assert "KeyboardInterrupt" in stderr and "--resume_from_checkpoint true" in stderr
    assert not list(tmp_path.rglob("*.tmp"))
    assert run(tmp_path) == {0}
    assert result(tmp_path) | {"events": None} == straight("full")
