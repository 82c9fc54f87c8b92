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
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import make_args, make_dataset, make_model, make_tokenizer
from peft import LoraConfig
from transformers import TrainerCallback

from trl_spin import SPINTrainer
from trl_spin.run import processes
from trl_spin.run.games import read_manifest


# Points of a run whose second iteration begins at step 6, each just before an access to a file: kind of access, path
# below `output_dir` (the new one of a rename), and which access of this kind
FILE_POINTS = {
    "while the model of an iteration is kept": ("os.rename", "iteration-0/self_play.json", 1),
    "between iterations": ("os.mkdir", "self_play/iteration-1/completions-*", 1),
    "in generation": ("open", "self_play/iteration-1/completions-*/*.tmp", 2),
    "while a shard is written": ("os.rename", "self_play/iteration-1/completions-*/*.arrow", 2),
    "while the game is stored": ("os.rename", "self_play/iteration-1/manifest.json", 1),
    "between store and swap": ("shutil.rmtree", "self_play/iteration-1/completions-*", 1),
    "when a checkpoint is begun": ("os.mkdir", ".saving/checkpoint-8", 1),
    "while a checkpoint is written": ("open", ".saving/checkpoint-8/trainer_state.json", 1),
    "before a checkpoint gets its name": ("os.rename", "checkpoint-8", 1),
    "while an older checkpoint is removed": ("os.rmdir", ".removed", 1),
}
# Points without a file: the third batch of the scoring pass, the 30th token, events of a callback
CALLBACK_POINTS = {
    "in the first iteration, before any checkpoint": ("on_step_end", 2),
    "at the end of an iteration": ("on_epoch_end", 6),
    "in the middle of an epoch": ("on_step_end", 9),
    "at the end of an epoch": ("on_epoch_end", 12),
}
SCORING, BATCH = "in the scoring pass", "within a batch of generation"
FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


class Points:
    """
    Kills this process at a point, or at its n-th access to a file below `output_dir`, and leaves the others alone. A
    process that is never killed copies what it would have left behind at each point.
    """

    def __init__(self, output_dir: str, death: str | int | None, signum: int, copies: bool):
        self.output_dir, self.death, self.signum, self.copies = output_dir, death, signum, copies
        self.events, self.busy, self.counts, self.playing = 0, False, Counter(), False
        self.checkpoints = set()  # files of all that is called a checkpoint, at whatever moment

    def reached(self, point: str | int):
        if point == self.death:
            os.kill(os.getpid(), self.signum)
        elif self.copies and isinstance(point, str):
            shutil.copytree(self.output_dir, f"{self.output_dir}-killed/{point}")

    def count(self, point: str, number: int):
        self.counts[point] += 1
        if self.counts[point] == number:
            self.reached(point)

    def audit(self, event: str, args: tuple):
        if event not in FILE_EVENTS or self.busy:
            return
        path = str(args[event == "os.rename"])
        if not path.startswith(f"{self.output_dir}/"):
            return
        self.busy = True  # what is done here is no event
        self.events += 1
        self.checkpoints |= files_of_checkpoints(self.output_dir)
        self.reached(self.events)
        for point, (kind, pattern, number) in FILE_POINTS.items():
            if event == kind and fnmatch(os.path.relpath(path, self.output_dir), pattern):
                self.count(point, number)
        self.busy = False


class CallbackPoints(TrainerCallback):
    def __init__(self, points: Points):
        self.points = points

    def at(self, event: str, step: int):
        for point, place in CALLBACK_POINTS.items():
            if place == (event, step):
                self.points.count(point, 1)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.points.playing = True  # the rows that were tried before do not count

    def on_step_end(self, args, state, control, **kwargs):
        self.at("on_step_end", state.global_step)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.at("on_epoch_end", state.global_step)


def files_of_checkpoints(output_dir: str | Path) -> set[tuple[str, ...]]:
    return {tuple(sorted(os.listdir(path))) for path in Path(output_dir).glob("checkpoint-*")}


def sha256(tensors: dict) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(key.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def untimed(logs: dict) -> dict:
    """Logs, or a record, without what differs between any two runs."""
    return {key: value for key, value in logs.items() if not any(t in key for t in ("time", "second", "sha256"))}


def play(output_dir: str, kind: str, rank: int, world_size: int, port: int, death, signum: int, copies: bool, resume):
    """One process of a run, always started in the same way. It leaves hashes of all that it ended with."""
    os.dup2(os.open(f"{output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world_size)}
    processes.COMMIT_SECONDS = -1  # a shard for every round of batches
    # The main process writes the files. Elsewhere it is the last one that dies, and the others wait for it
    dies = isinstance(death, int) or rank == (0 if death in FILE_POINTS else world_size - 1)
    points = Points(output_dir, death if dies else None, signum, copies)
    sys.addaudithook(points.audit)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)

    def before_forward(model, args, kwargs):
        if points.playing and kwargs["input_ids"].size(1) == 1:
            points.count(BATCH, 30)

    model.register_forward_pre_hook(before_forward, with_kwargs=True)

    class Scoring(SPINTrainer):
        def compute_ref_log_probs(self, model, inputs):
            if self.state.global_step == 6:
                points.count(SCORING, 3)
            return super().compute_ref_log_probs(model, inputs)

    trainer = Scoring(
        model,
        args=make_args(
            output_dir,
            per_device_train_batch_size=4 // world_size,
            num_train_epochs=[2, 3],
            opponent_history=1,
            generation_token_budget=130,
            save_strategy="steps",
            save_steps=4,
            logging_steps=3,  # so that there are checkpoints between two logs
            save_total_limit=1,
        ),
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(3),
        processing_class=tokenizer,
        callbacks=[CallbackPoints(points)],
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if kind == "lora" else None,
    )
    output = trainer.train(resume_from_checkpoint=resume)
    optimizer_state = trainer.optimizer.state_dict()["state"]
    result = {
        "weights": sha256(trainer.model.state_dict()),
        "optimizer": sha256({f"{i}.{key}": v for i, state in optimizer_state.items() for key, v in state.items()}),
        "games": [[shard["sha256"] for shard in read_manifest(output_dir, t)["shards"]] for t in range(2)],
        "train_loss": output.training_loss,
        "logs": list(map(untimed, trainer.state.log_history)),
        "kept": [
            untimed(json.loads((Path(output_dir) / f"iteration-{t}" / "self_play.json").read_text())) for t in range(2)
        ],
        "files": sorted(
            str(path.relative_to(output_dir)) for path in Path(output_dir).rglob("*") if path.name != "result.json"
        ),
        "checkpoints": sorted(points.checkpoints),
    }
    if rank == 0:
        Path(output_dir, "result.json").write_text(json.dumps({"result": result, "events": points.events}))


def run(
    output_dir: Path,
    kind: str = "full",
    world_size: int = 1,
    death: str | int | None = None,
    signum: int = signal.SIGKILL,
    copies: bool = False,
    resume: bool | str = True,
) -> set[int]:
    """
    A run of real processes, which dies at a point or at an access to its files. As a launcher does, it kills the others
    when one dies. Returns the exit codes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume"])
    # The fork server of Python 3.11 does not take over `sys.path`: it would preload nothing, and every process import torch
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        context.Process(
            target=play, args=(str(output_dir), kind, rank, world_size, port, death, signum, copies, resume)
        )
        for rank in range(world_size)
    ]
    for process in started:
        process.start()
    multiprocessing.connection.wait([process.sentinel for process in started])
    for process in started:
        process.join(0 if death is not None and signum == signal.SIGKILL else 60)
        process.kill()
        process.join()
    return {process.exitcode for process in started}


def read_result(output_dir: Path) -> tuple[dict, int]:
    content = json.loads((output_dir / "result.json").read_text())
    return content["result"], content["events"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Directories of runs that are left alone, by kind and number of processes."""
    directories = {}

    def get(kind: str = "full", world_size: int = 1) -> Path:
        if (kind, world_size) not in directories:
            directory = directories[kind, world_size] = tmp_path_factory.mktemp(f"{kind}-{world_size}") / "run"
            directory.mkdir()
            assert run(directory, kind, world_size, copies=world_size == 1) == {0}
        return directories[kind, world_size]

    return get


def assert_killed(straight, output_dir: Path, kind: str, world_size: int, death, signum: int = signal.SIGKILL):
    codes = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 1}
    whole = files_of_checkpoints(straight(kind, world_size))  # before, so that it is not killed with the other run
    exits = run(output_dir, kind, world_size, death, signum)
    if signum == signal.SIGKILL:
        # The other process may find its partner gone, and end by itself before it is killed
        exits -= {1, -signal.SIGABRT}
    assert exits == {codes[signum]}
    assert files_of_checkpoints(output_dir) <= whole


def assert_ends_like(straight, output_dir: Path, kind: str = "full", world_size: int = 1, resume: bool | str = True):
    assert run(output_dir, kind, world_size, resume=resume) == {0}
    assert read_result(output_dir)[0] == read_result(straight(kind, world_size))[0]


def left_behind(straight, kind: str, point: str, tmp_path: Path) -> Path:
    """What a run that is killed at a point leaves behind."""
    return shutil.copytree(straight(kind).with_name("run-killed") / point, tmp_path / "run")


# Both kinds of model where they have something of their own to lose
@pytest.mark.parametrize(
    "kind, point",
    [
        ("full", "in the first iteration, before any checkpoint"),
        ("full", "while the model of an iteration is kept"),
        ("full", "between iterations"),
        ("full", "in generation"),
        ("full", "while a shard is written"),
        ("full", "in the scoring pass"),
        ("full", "while the game is stored"),
        ("full", "in the middle of an epoch"),
        ("full", "at the end of an epoch"),
        ("full", "while a checkpoint is written"),
        ("full", "while an older checkpoint is removed"),
        ("lora", "at the end of an iteration"),
        ("lora", "while a shard is written"),
        ("lora", "between store and swap"),
        ("lora", "in the middle of an epoch"),
        ("lora", "when a checkpoint is begun"),
        ("lora", "before a checkpoint gets its name"),
    ],
)
def test_a_killed_run_ends_like_one_that_was_left_alone(straight, tmp_path, kind, point):
    assert_ends_like(straight, left_behind(straight, kind, point, tmp_path), kind)


@pytest.mark.parametrize("kind, world_size", [("full", 1), ("lora", 1), ("lora", 2)])
def test_no_half_checkpoint_is_ever_called_a_checkpoint(straight, kind, world_size):
    (files,) = read_result(straight(kind, world_size))[0]["checkpoints"]
    states = ["rng_state.pth"] if world_size == 1 else ["rng_state_0.pth", "rng_state_1.pth"]
    weights = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert {weights, "optimizer.pt", "scheduler.pt", "trainer_state.json", *states} <= set(files)


def test_no_half_checkpoint_takes_the_place_of_one_that_is_there(straight, tmp_path):
    directory = left_behind(straight, "full", "at the end of an epoch", tmp_path)
    assert (directory / "checkpoint-12").is_dir()
    assert_ends_like(straight, directory, resume=str(directory / "checkpoint-6"))


@pytest.mark.parametrize(
    "kind, points",
    [
        ("full", ["while a shard is written", "in the middle of an epoch"]),
        ("lora", ["between store and swap", "while a checkpoint is written"]),
    ],
)
def test_killed_runs_of_two_processes(tmp_path, straight, kind, points):
    for point in points:
        assert_killed(straight, tmp_path, kind, 2, point)
    assert_ends_like(straight, tmp_path, kind, 2)


@pytest.mark.parametrize("kind, world_size, times", [("full", 1, 4), ("lora", 1, 3), ("lora", 2, 2)])
def test_a_run_that_is_killed_again_and_again(tmp_path, straight, kind, world_size, times):
    """At random accesses to its files."""
    _, num_events = read_result(straight(kind, world_size))
    moments, codes = random.Random(f"{kind}{world_size}"), []
    for _ in range(times):
        codes += run(tmp_path, kind, world_size, moments.randrange(num_events // 10, num_events // 4))
        assert files_of_checkpoints(tmp_path) <= files_of_checkpoints(straight(kind, world_size))
    assert codes.count(-signal.SIGKILL) > 1
    assert_ends_like(straight, tmp_path, kind, world_size)


def assert_told_how_to_go_on(output_dir: Path) -> str:
    log = Path(f"{output_dir}.log")
    text = log.read_text()
    assert "--resume_from_checkpoint true" in text
    assert not list(output_dir.rglob("*.tmp"))
    log.unlink()
    return text


def shards(output_dir: Path, name: str = f"train-{64 * '?'}") -> set[Path]:
    return set(output_dir.glob(f"self_play/iteration-*/completions-*/{name}.arrow"))


def test_signals_stop_a_run_and_lose_nothing(tmp_path, straight):
    assert_killed(straight, tmp_path, "full", 1, BATCH, signal.SIGTERM)
    assert "SIGTERM" in assert_told_how_to_go_on(tmp_path)
    first = shards(tmp_path)
    assert first
    assert_killed(straight, tmp_path, "full", 1, BATCH, signal.SIGINT)  # Ctrl-C
    assert "KeyboardInterrupt" in assert_told_how_to_go_on(tmp_path)
    assert first < shards(tmp_path)
    assert_killed(straight, tmp_path, "full", 1, SCORING, signal.SIGTERM)
    assert_told_how_to_go_on(tmp_path)
    assert {path.parent.parent.name for path in shards(tmp_path)} == {"iteration-1"}
    scores = shards(tmp_path, "train-scores-*")
    assert scores
    assert_killed(straight, tmp_path, "full", 1, SCORING, signal.SIGTERM)
    assert scores < shards(tmp_path, "train-scores-*")  # the first ones were used
    assert_ends_like(straight, tmp_path)


def test_sigterm_of_one_process_stops_all_and_loses_nothing(tmp_path, straight):
    assert_killed(straight, tmp_path, "full", 2, BATCH, signal.SIGTERM)
    assert_told_how_to_go_on(tmp_path)
    assert shards(tmp_path)
    assert_killed(straight, tmp_path, "full", 2, SCORING, signal.SIGTERM)
    assert shards(tmp_path, "train-scores-*")
    assert_killed(straight, tmp_path, "full", 2, "in the middle of an epoch", signal.SIGTERM)
    assert_told_how_to_go_on(tmp_path)
    assert (tmp_path / "checkpoint-9").is_dir()
    assert_ends_like(straight, tmp_path, "full", 2)
