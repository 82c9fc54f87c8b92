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

"""Faults of files, settings, numbers, data and the opponent's completions: each is named, and none changes a result."""

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import Scripted, callback_of, make_dataset, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from trl_spin import SelfPlayCallback, SPINTrainer
from trl_spin.engines import Generate
from trl_spin.generation import commit_completions, pair_completions
from trl_spin.memory import MemoryPlan
from trl_spin.preflight import PreflightCallback
from trl_spin.run.files import game_dir, read_json, write_json
from trl_spin.run.games import load_game, read_manifest
from trl_spin.run.resume import run_lock


GAME = {"num_self_play_iterations": 2, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 4}


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def weights(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def assert_same_weights(trainer, expected):
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped at step 11 of 12, in its second iteration; checkpoints at 4, 6 and 8. And its end."""
    directory = tmp_path_factory.mktemp("runs")
    straight = make_trainer(directory / "straight", save_total_limit=0, **GAME)
    straight.train()
    make_trainer(directory / "stopped", callbacks=[Stop(11)], save_total_limit=0, **GAME).train()
    return directory / "stopped", weights(straight)


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of that run to be damaged, and the weights with which it should end."""
    shutil.copytree(stopped[0], tmp_path / "run")
    return tmp_path / "run", stopped[1]


def resume(output_dir, resume_from_checkpoint=True, **kwargs):
    trainer = make_trainer(output_dir, **({"save_total_limit": 0} | GAME | kwargs))
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


# ---- Checkpoints ----


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero_the_end(path):
    size = path.stat().st_size
    os.truncate(path, size // 2)
    os.truncate(path, size)


def copy_of_iteration_0(path):
    shutil.copy(str(path).replace("iteration-1", "iteration-0"), path)


# A damaged file of a stopped run, and what is said of it. All go on to the right end, from an earlier checkpoint if
# need be
DAMAGES = [
    ("checkpoint-8/optimizer.pt", Path.unlink, "is missing"),
    ("checkpoint-8/optimizer.pt", zero_the_end, "is damaged"),
    ("checkpoint-8/scheduler.pt", Path.unlink, "is missing"),
    ("checkpoint-8/rng_state.pth", flip_a_byte, "is damaged"),
    ("checkpoint-8/trainer_state.json", Path.unlink, "is missing"),
    ("checkpoint-8/model.safetensors", zero_the_end, "is damaged"),
    ("checkpoint-8/config.json", flip_a_byte, "is damaged"),
    ("checkpoint-8/manifest.json", flip_a_byte, ""),
    ("self_play/iteration-1/manifest.json", zero_the_end, "cannot be read"),
    ("self_play/iteration-1/manifest.json", lambda path: path.write_text("{}"), "is damaged"),
    ("self_play/iteration-1/manifest.json", copy_of_iteration_0, "belongs to another iteration (0 instead of 1)"),
    ("self_play/iteration-1/probes.json", lambda path: path.write_text("[1]"), "is damaged"),
    ("iteration-0/self_play.json", flip_a_byte, ""),
    ("iteration-0/self_play.json", Path.unlink, "is missing"),
    ("self_play/iteration-0/manifest.json", Path.unlink, "is missing"),
]


@pytest.mark.parametrize(
    "file, damage, message", DAMAGES, ids=lambda value: getattr(value, "__name__", str(value)[-24:])
)
def test_a_damaged_file_is_named_and_never_used(run, caplog, file, damage, message):
    output_dir, expected = run
    damage(output_dir / file)
    assert_same_weights(resume(output_dir), expected)
    assert f"{output_dir / file} {message}" in caplog.text


def test_settings_that_cannot_be_read_stop_the_run(run):
    zero_the_end(run[0] / "self_play" / "run.json")
    with pytest.raises(ValueError, match="self_play/run.json cannot be read: .*Restore it"):
        resume(run[0])


def test_files_of_another_run_are_refused(run, tmp_path, caplog):
    output_dir, expected = run
    make_trainer(tmp_path / "other", callbacks=[Stop(8)], **GAME | {"seed": 1, "save_total_limit": 0}).train()
    with pytest.raises(ValueError, match="checkpoint-8/manifest.json belongs to another run"):
        resume(output_dir, str(tmp_path / "other" / "checkpoint-8"))
    shutil.rmtree(game_dir(output_dir, 1))
    shutil.copytree(game_dir(tmp_path / "other", 1), game_dir(output_dir, 1))
    with pytest.raises(ValueError, match="manifest.json belongs to another run"):  # as an earlier opponent's game
        load_game(str(output_dir), 1, read_json(output_dir / "self_play" / "run.json")["run"])
    assert_same_weights(resume(output_dir), expected)
    assert "iteration-1/manifest.json belongs to another run" in caplog.text


def test_a_given_checkpoint_is_used_or_refused(run):
    output_dir, expected = run
    assert_same_weights(resume(output_dir, str(output_dir / "checkpoint-4")), expected)
    (output_dir / "checkpoint-6" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="checkpoint-6/optimizer.pt is missing"):
        resume(output_dir, str(output_dir / "checkpoint-6"))


def test_without_a_usable_checkpoint_a_run_starts_over_only_if_no_iteration_is_lost(run, caplog):
    output_dir, expected = run
    for step in (4, 6, 8):
        (output_dir / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"(?s)checkpoint-8/trainer_state.json is missing.*finished iteration"):
        resume(output_dir)
    shutil.rmtree(output_dir / "iteration-0")
    assert_same_weights(resume(output_dir), expected)
    assert "starts from its beginning, with the completions that are there" in caplog.text


def test_model_only_checkpoints_are_complete_if_asked_for(tmp_path):
    make_trainer(tmp_path, callbacks=[Stop(7)], save_only_model=True, **GAME).train()
    with pytest.raises(ValueError, match="checkpoint-6 holds the model alone"):
        resume(tmp_path)
    assert resume(tmp_path, save_only_model=True).state.global_step == 12


def test_checkpoints_that_a_resume_needs_are_kept(tmp_path):
    # The clock of the file system runs backwards
    class Backwards(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            for path in tmp_path.glob("checkpoint-*"):
                os.utime(path, (1e9, 1e9 - int(path.name.split("-")[1])))

    kwargs = GAME | {"save_steps": 1, "save_total_limit": 1, "num_self_play_iterations": 3}
    make_trainer(tmp_path, callbacks=[Stop(9), Backwards()], **kwargs).train()
    # The newest, and the one at which the iteration began
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-9"]
    resume(tmp_path, **kwargs)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-18"]


def test_the_best_checkpoint_is_kept_under_its_own_name(tmp_path):
    kwargs = GAME | {"num_self_play_iterations": 3, "learning_rate": [1e-3, 1.0, 1.0], "save_total_limit": 2}
    kwargs |= {"eval_dataset": make_dataset(5), "metric_for_best_model": "nll/real", "greater_is_better": False}
    make_trainer(tmp_path, callbacks=[Stop(9)], **kwargs).train()
    resume(tmp_path, **kwargs)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-16", "checkpoint-18", "checkpoint-6"]
    for step in (6, 18):
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-6")


# ---- The artefact ----


def test_a_damaged_game_is_named_and_made_again(run, caplog):
    output_dir, expected = run
    shard = game_dir(output_dir, 1) / "train-00000.arrow"
    before = shard.read_bytes()
    flip_a_byte(shard)
    with pytest.raises(ValueError, match="train-00000.arrow is damaged"):
        load_game(str(output_dir), 1)
    assert_same_weights(resume(output_dir), expected)
    assert "checkpoint-8" in caplog.text and "train-00000.arrow is damaged" in caplog.text
    assert shard.read_bytes() == before


# What makes a shard of every round of batches: that it is time, or that enough results are waiting
@pytest.mark.parametrize("limit", ["COMMIT_SECONDS", "_COMMIT_BYTES"])
def test_an_edited_shard_of_completions_is_named_and_made_again(tmp_path, caplog, monkeypatch, limit):
    class Killed(Exception):
        pass

    def scored(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"trl_spin.run.processes.{limit}", -1)
        patch.setattr("trl_spin.callbacks.SelfPlayCallback.score", scored)
        with pytest.raises(Killed):
            make_trainer(tmp_path, generation_token_budget=130).train()
    first, *others = sorted(tmp_path.glob("self_play/iteration-0/completions-*/train-*.arrow"))
    assert others
    flip_a_byte(first)
    trainer = make_trainer(tmp_path, generation_token_budget=130)
    trainer.train(resume_from_checkpoint=True)
    assert f"{first} is damaged" in caplog.text
    # Only the completions of that shard were generated again, and the whole game is as it should be
    assert "prompts have been completed already" in caplog.text and "12 of 12" not in caplog.text
    straight = make_trainer(tmp_path / "straight", generation_token_budget=130)
    straight.train()
    assert_same_weights(straight, weights(trainer))
    assert not list(tmp_path.rglob("completions-*"))


def test_a_round_is_completed_in_shares(tmp_path, caplog, stopped):
    """As workers do, one of them twice, before there is a run."""
    for i, new in ((2, 4), (0, 4), (2, 0), (1, 4)):
        worker = make_trainer(tmp_path, **GAME)
        self_play = callback_of(worker, SelfPlayCallback)
        request, model = self_play.request(0), worker.model
        assert (
            commit_completions(self_play.engine, model, worker.game, request, ["train"], (i, 3))["train"].sum() == new
        )
    next(tmp_path.glob("self_play/iteration-0/completions-*/*")).unlink()
    with pytest.raises(ValueError, match="4 of 12 completions of the train dataset are not there"):
        pair_completions(worker.game, str(tmp_path), request, "train")
    assert_same_weights(resume(tmp_path), stopped[1])
    assert "8 of 12 train prompts have been completed already" in caplog.text


def test_the_manifest_says_what_the_game_depends_on(stopped):
    output_dir, _ = stopped
    manifest = read_manifest(output_dir, 1)
    assert manifest["opponent"]["model"] == "iteration-0"
    assert manifest["opponent"]["fingerprint"] != read_manifest(output_dir, 0)["opponent"]["fingerprint"]
    assert {"run", "seed", "sampling", "data", "chat_template", "versions", "metrics"} <= manifest.keys()
    assert [(s["dataset"], s["rows"]) for s in manifest["shards"]] == [("train", 12)]
    assert not list(output_dir.rglob("self_play/**/*.p*kl")) and not list(output_dir.rglob("self_play/**/*.pt"))


def test_a_run_of_another_schema_is_refused(run, monkeypatch):
    monkeypatch.setattr("trl_spin.run.files.SCHEMA_VERSION", 99)
    with pytest.raises(ValueError, match="run.json has the schema version 5, this trl-spin reads 99"):
        resume(run[0])


def test_an_output_dir_that_is_another_one_for_another_process_is_refused(tmp_path):
    accelerator = SimpleNamespace(is_main_process=True)
    elsewhere = SimpleNamespace(accelerator=accelerator, on_main=lambda acquire: acquire() + ".", smallest=float)
    with pytest.raises(ValueError, match="on a file system that all nodes share"), run_lock(elsewhere, str(tmp_path)):
        pass


# ---- The contract ----


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"beta": 0.5}, r"`beta` was \[1.0, 1.0\] and is \[0.5, 0.5\]"),
        ({"learning_rate": [1e-3, 1e-4]}, "`learning_rate` was"),
        ({"loss_type": ["hinge"]}, "`loss_type` was"),
        ({"seed": 1}, "`seed` was 42 and is 1"),
        ({"max_length": 200}, "`max_length` was"),
        ({"max_completion_length": 13}, "`max_completion_length` was 12 and is 13"),
        ({"temperature": 0.9}, "`temperature` was 1.0 and is 0.9"),
        ({"per_device_train_batch_size": 2}, "`per_device_train_batch_size` was 4 and is 2"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` was 1 and is 2"),
        ({"peft_config": LoraConfig(r=4)}, "`adapter` was None"),
        ({"dataset": make_dataset(13)}, "`data` was .*12 rows.*13 rows"),
        ({"dataset": make_dataset(12).select(range(11, -1, -1))}, "`data` was"),
        ({"model": make_model(make_tokenizer(), seed=1)}, "`model` was"),
        ({"model": make_model(make_tokenizer(), hidden_act="gelu")}, "`model.hidden_act` was 'silu' and is 'gelu'"),
        ({"model": make_model(make_tokenizer(), rms_norm_eps=1e-5)}, "`model.rms_norm_eps` was 1e-06 and is 1e-05"),
        ({"tokenizer": make_tokenizer("{# new #}" + make_tokenizer().chat_template)}, "`chat_template` was"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_settings_are_refused(run, kwargs, message):
    with pytest.raises(ValueError, match=f"(?s){message}.*another `output_dir`"):
        resume(run[0], **kwargs)


def test_lora_of_another_shape_is_refused(tmp_path):
    make_trainer(tmp_path, callbacks=[Stop(5)], peft_config=LoraConfig(r=4), **GAME).train()
    with pytest.raises(ValueError, match=r"`adapter` was .*'r': 4.* and is .*'r': 8"):
        resume(tmp_path, peft_config=LoraConfig(r=8))


def test_settings_that_change_nothing_may_change(run):
    output_dir, expected = run
    kwargs = {"logging_steps": 3, "save_steps": 5, "precompute_ref_batch_size": 4, "generation_token_budget": 9999}
    trainer = resume(output_dir, **kwargs, num_self_play_iterations=3, learning_rate=[1e-3, 1e-3, 1e-4])
    assert trainer.state.global_step == 18
    end_of_iteration_1 = make_trainer(output_dir.parent / "two", model=str(output_dir / "iteration-1"))
    assert_same_weights(end_of_iteration_1, expected)
    with pytest.raises(ValueError, match="checkpoint-18 is at epoch 6, beyond the 4 epochs"):
        resume(output_dir)


def test_more_iterations_are_played_as_if_they_had_been_planned(tmp_path, stopped):
    make_trainer(tmp_path, save_total_limit=0, **GAME | {"num_self_play_iterations": 1}).train()
    assert_same_weights(resume(tmp_path), stopped[1])

    def logged(output_dir):
        history = json.loads((output_dir / "self_play" / "log_history.json").read_text())
        return [(logs["step"], logs["learning_rate"], logs["loss"]) for logs in history if "loss" in logs]

    assert len(logged(tmp_path)) == 12 and logged(tmp_path) == logged(stopped[0].with_name("straight"))


def test_folders_of_earlier_iterations_may_be_deleted(run):
    output_dir, expected = run
    shutil.rmtree(output_dir / "iteration-0")
    shutil.rmtree(game_dir(output_dir, 0))
    assert_same_weights(resume(output_dir), expected)


def test_other_library_versions_are_a_warning(run, caplog):
    path = run[0] / "self_play" / "run.json"
    write_json(path, json.loads(json.dumps(read_json(path)).replace('"trl": "', '"trl": "0.')))
    assert_same_weights(resume(run[0]), run[1])
    assert "started with trl 0." in caplog.text


def test_only_runs_of_self_play_are_resumed(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(ValueError, match="no self-play run to resume"):
        resume(tmp_path)


def test_a_second_job_stops(run):
    class Second(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            code = "from test_faults import resume; import sys; resume(sys.argv[1])"
            job = subprocess.run(
                [sys.executable, "-c", code, str(run[0])], cwd=Path(__file__).parent, capture_output=True, text=True
            )
            assert f"ValueError: Another job is running in `output_dir` ({run[0]})" in job.stderr
            assert f'"pid": {os.getpid()}' in job.stderr

    assert_same_weights(resume(run[0], callbacks=[Stop(9), Second()]), weights(resume(run[0], callbacks=[Stop(9)])))


# ---- Numbers ----


class Poison(TrainerCallback):
    """Makes a weight NaN after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            model.model.norm.weight.data[0] = float("nan")


@pytest.mark.parametrize(
    "step, message",
    [
        (10, r"(?s)loss of step 11 \(iteration 1\) is nan.*intact"),
        (8, r"After step 8 \(iteration 1\) the weights are not finite \(the first is model.norm.weight\)"),
        (6, r"After step 6 .* the weights are not finite"),
    ],
    ids=["in training", "before a checkpoint", "before a promotion"],
)
def test_what_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, stopped, step, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, callbacks=[Poison(step)], save_total_limit=0, **GAME).train()
    assert (tmp_path / "iteration-0").is_dir() == (step > 6)
    assert_same_weights(resume(tmp_path), stopped[1])


def test_promotion_refuses_weights_that_are_not_finite(tmp_path):
    with pytest.raises(ValueError, match="the weights are not finite"):
        make_trainer(tmp_path, callbacks=[Poison(3)]).train()  # with no checkpoints that would have noticed
    assert not (tmp_path / "iteration-0").exists()


def test_a_model_that_overflows_does_not_start(tmp_path):
    model = make_model(make_tokenizer())
    model.lm_head.weight.data[7] = float("inf")
    with pytest.raises(ValueError, match=r"log-probs of row \d+ of the train dataset are"):
        make_trainer(tmp_path, model=model).train()


# ---- Memory and disk ----


@pytest.mark.parametrize(
    "function, option",
    [
        ("transformers.GenerationMixin.generate", "generation_token_budget"),
        ("trl_spin.spin_trainer.SPINTrainer.compute_ref_log_probs", "precompute_ref_batch_size"),
        ("trl_spin.spin_trainer.SPINTrainer.training_step", "gradient_checkpointing"),
    ],
)
def test_out_of_memory_names_the_option(tmp_path, monkeypatch, function, option):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(function, out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match=f"(?s)Out of memory in .*`{option}.*2.00 GiB") as error:
        make_trainer(tmp_path).train()
    assert str(error.value).count("Out of memory in") == 1


def test_the_remedy_of_a_full_memory_works(tmp_path, stopped, monkeypatch):
    def out_of_memory(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return training_step(self, *args, **kwargs)

    training_step = SPINTrainer.training_step
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError, match="`gradient_checkpointing=True`"):
        patch.setattr(SPINTrainer, "training_step", out_of_memory)
        make_trainer(tmp_path, save_total_limit=0, **GAME | {"gradient_checkpointing": None}).train()
    assert_same_weights(resume(tmp_path, gradient_checkpointing=True), stopped[1])


@pytest.mark.parametrize(
    "full",
    [
        "self_play/iteration-1/train-00000.arrow.tmp",
        ".saving/checkpoint-6/optimizer.pt",
        "iteration-0/self_play.json.tmp",
    ],
)
def test_a_full_disk(tmp_path, stopped, full):
    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                (tmp_path / full).parent.mkdir(parents=True)
                (tmp_path / full).symlink_to("/dev/full")  # every write fails with "no space left on device"

    with pytest.raises(OSError, match=rf"Writing to {tmp_path} failed.*B are free there.*intact"):
        make_trainer(tmp_path, callbacks=[Fill()], save_total_limit=0, **GAME).train()
    # A checkpoint is there whole or not at all, and what was written of one goes with the next
    written = ["checkpoint-4"] if "checkpoint" in full else ["checkpoint-4", "checkpoint-6"]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == written
    (tmp_path / full).unlink()
    assert_same_weights(resume(tmp_path), stopped[1])
    written = {f"checkpoint-{step}" for step in (4, 6, 8, 12)}
    assert {p.name for p in tmp_path.iterdir()} == {*written, "README.md", "iteration-0", "iteration-1", "self_play"}
    files, expected = (sorted(p.name for p in (path / "checkpoint-6").iterdir()) for path in (tmp_path, stopped[0]))
    assert files == expected


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    make_trainer(tmp_path, max_steps=1).train()
    assert f"The file system of {tmp_path} has no locks" in caplog.text


def test_a_directory_that_cannot_be_written_to():
    with pytest.raises(OSError, match=r"`output_dir` \(/proc\) cannot be written to") as error:
        make_trainer("/proc").train()
    assert error.value.__cause__.errno in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS)


# ---- Preflight ----


def test_dry_run_prints_the_plan_and_stops(tmp_path, monkeypatch, caplog, capsys):
    ids = make_tokenizer()("\x1b[2JOne")["input_ids"]
    monkeypatch.setattr(Generate, "open", lambda *model: nullcontext(lambda prompts, *more: [ids] * len(prompts)))
    options = {"dry_run": True, "num_train_epochs": [1, 2]}
    trainer = make_trainer(tmp_path, dataset=make_dataset(10), **options)
    before = weights(trainer)
    trainer.train()
    monkeypatch.undo()
    plan = capsys.readouterr().out
    assert max(map(len, plan[plan.index("data") :].splitlines())) <= 80
    plan = " ".join(plan.split())
    for text in (
        "one copy in memory",
        "10 prompts (0 rows left out)",
        "10.0% of the real completions are longer",
        "9 steps in all",
        "learning rate 0.001",
        "20 completions of up to 12 tokens",
        "with completions as long as the real ones: generation 00:0",
        r"<|im_start|>assistant\n' real '1<|im_end|>' generated '\x1b[2JOne' (cut: tried with 7 tokens)",
    ):
        assert text in plan, text
    assert_same_weights(trainer, before)
    assert {p.name for p in tmp_path.rglob("*")} <= {"self_play", "lock", "job.json"}
    make_trainer(tmp_path).train()  # nothing stands in the way


def test_the_trial_run_leaves_no_trace(tmp_path, monkeypatch):
    kwargs = {"peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5), "logging_steps": 2}
    tried = make_trainer(tmp_path / "tried", **kwargs)
    tried.train()

    def decide(self, args):  # as the trial run has it, without one
        self.trainer.shares_prefix = tried.shares_prefix
        budget = callback_of(tried, SelfPlayCallback).engine.token_budget
        for engine in self.engines:
            engine.token_budget = budget
        pair = {"row": 0, "prompt_ids": [], "real_ids": [], "generated_ids": [], "truncated": False}
        return MemoryPlan(None, False, budget), pair, (0.0, 0.0)

    monkeypatch.setattr(PreflightCallback, "run_trial", decide)
    trainer = make_trainer(tmp_path / "not", **kwargs)
    trainer.train()
    assert_same_weights(trainer, weights(tried))
    for logs, others in zip(trainer.state.log_history, tried.state.log_history, strict=True):
        timed = ("time", "second", "runtime")
        assert {k: v for k, v in logs.items() if not any(t in k for t in timed)} == {
            k: v for k, v in others.items() if not any(t in k for t in timed)
        }


def test_a_fault_of_training_shows_before_anything_is_generated(tmp_path):
    model = make_model(make_tokenizer(), attention_dropout=0.5)
    with pytest.raises(ValueError, match="dropout"):
        make_trainer(tmp_path, model=model, disable_dropout=False).train()
    assert not game_dir(str(tmp_path), 0).exists()
    make_trainer(tmp_path).train()  # the directory is not spoiled


def test_a_disk_that_is_too_small(tmp_path, monkeypatch, caplog):
    def free(size):
        monkeypatch.setattr(
            "trl_spin.preflight.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9e9, 0, size)
        )

    # 110 kB of weights, three times as much in a checkpoint
    free(300_000)
    with pytest.raises(ValueError, match="300kB of free space, but the next iteration may need"):
        make_trainer(tmp_path, save_strategy="epoch").train()
    free(1_050_000)
    make_trainer(tmp_path, save_strategy="epoch", num_self_play_iterations=3).train()
    assert "the whole run may need" in caplog.text


@pytest.mark.parametrize(("learning_rate", "lost"), [(5e-7, True), (1e-2, False)])
def test_updates_that_bfloat16_rounds_away_are_warned_of(tmp_path, caplog, learning_rate, lost):
    model = make_model(make_tokenizer()).to(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model=model, learning_rate=learning_rate, max_steps=2)
    trainer.train()
    assert ("round away" in caplog.text) == lost
    changed = [(v != before[k]).float().mean().item() for k, v in trainer.model.state_dict().items()]
    assert (sum(changed) / len(changed) < 0.5) == lost


# ---- Hostile rows, by number in the list of faults ----

USER, COMPLETION = {"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}
GOOD = {"messages": [USER, COMPLETION]}
STRICT = (  # a template that insists on turns, as Mistral's and Gemma's
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate.') }}{% endif %}" + make_tokenizer().chat_template.split("%}", 1)[1]
)


def row(content, completion="Blue."):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": completion}]}


@pytest.mark.parametrize(
    "rows, kwargs, outcome",
    [
        pytest.param([GOOD, row("x" * 300)], {"max_length": 128}, {"too_long": 1}, id="49 prompt beyond max_length"),
        pytest.param([row("x" * 300)], {"max_length": 128}, "No row .*raise `max_length`", id="49 all of them"),
        pytest.param(
            [GOOD, row("x", "y" * 300)], {"max_length": 128}, {"too_long": 1}, id="50 completion beyond max_length"
        ),
        pytest.param(
            [GOOD, row("x" * 600)], {"max_length": None}, {"too_long": 1}, id="51 beyond the model's context"
        ),
        pytest.param([GOOD], {"template": None}, "no chat template", id="52 no chat template"),
        pytest.param(
            [GOOD], {"template": "{{ messages | length }}"}, "Row 0 .*differently", id="52 unstable template"
        ),
        pytest.param(
            [GOOD], {"template": "{{ tools[0]['function']['name'] }}"}, "Row 0 .*refuses", id="52 template needs tools"
        ),
        pytest.param([GOOD, {"messages": [USER, COMPLETION, USER]}], {}, {}, id="53 open end"),
        pytest.param([GOOD, {"messages": [USER]}], {}, "Row 1 .*no assistant turn", id="53 no completion"),
        pytest.param(
            [GOOD, {"messages": [{"role": "system", "content": "x"}]}], {}, "Row 1 .*no assistant", id="53 system only"
        ),
        pytest.param([GOOD, {"messages": []}], {}, "Row 1 .*no assistant turn", id="53 empty conversation"),
        pytest.param([{"messages": [USER, COMPLETION, COMPLETION]}], {}, {}, id="53 two completions in a row"),
        pytest.param(
            [GOOD, {"messages": [USER, COMPLETION, COMPLETION]}],
            {"template": STRICT},
            "Row 1 .*must alternate",
            id="53 refused",
        ),
        pytest.param(
            [GOOD, row("x", None)], {}, "Row 1 .*`content` of a assistant message is None", id="54 None completion"
        ),
        pytest.param([GOOD, row(None)], {}, "Row 1 .*`content` of a user message is None", id="54 None prompt"),
        pytest.param([GOOD, {"messages": None}], {}, "Row 1 .*`messages` is None", id="54 None conversation"),
        pytest.param([{"messages": [{"content": "x"}, COMPLETION]}], {}, "Row 0 .*no `role`", id="54 no role"),
        pytest.param([row(3, 4)], {}, "Row 0 .*`content` of a user message is 3", id="54 numbers"),
        pytest.param([row(["x"], ["y"])], {}, "Row 0 .*parts that are not text", id="54 list of strings"),
        pytest.param([{"messages": ["x"]}], {}, "Row 0 .*a message is 'x'", id="54 strings for messages"),
        pytest.param([{"prompt": "x", "completion": 4}], {}, "Row 0 .*`completion` is 4", id="54 number for text"),
        pytest.param([{"prompt": [USER], "completion": "x"}], {}, "Row 0 .*Both must be", id="54 mixed formats"),
        pytest.param([GOOD, row("x", "")], {}, {"empty_real": 1}, id="54 empty completion"),
        pytest.param([row("", "x")], {}, {}, id="54 empty prompt in a template"),
        pytest.param(
            [GOOD, row("x", "a<|im_end|>b")], {}, {"end_token_in_real": 1}, id="56 end token in a completion"
        ),
        pytest.param([row("a<|im_end|>b<|im_start|>c")], {}, {}, id="56 special tokens in a prompt"),
        pytest.param([row("\u202e\x00 \ufeff", "\U0001f600\x00\u200f")], {}, {}, id="56 unicode"),
        pytest.param([GOOD], {}, {}, id="59 one row"),
        pytest.param([GOOD] * 3, {"per_device_train_batch_size": 8}, {}, id="59 fewer rows than a batch"),
        pytest.param([GOOD, row("x" * 600)] * 2, {"dataset_num_proc": 2}, {"too_long": 2}, id="60 several workers"),
    ],
)
def test_hostile_rows(tmp_path, rows, kwargs, outcome):
    kwargs = dict(kwargs)
    tokenizer = make_tokenizer(kwargs.pop("template", make_tokenizer().chat_template))

    def play():
        kwargs.setdefault("max_length", 512)
        trainer = make_trainer(
            tmp_path, tokenizer, Dataset.from_list(rows), num_self_play_iterations=1, max_completion_length=4, **kwargs
        )
        trainer.train()
        return trainer

    if isinstance(outcome, str):
        with pytest.raises((ValueError, TypeError), match=f"(?s){outcome}"):
            play()
        return
    trainer = play()
    assert trainer.game.left_out["train"] == outcome
    assert trainer.state.log_history[0]["self_play/left_out"] == sum(outcome.values())
    pairs = load_game(str(tmp_path), 0)["train"]
    assert len(pairs) == len(rows) - sum(outcome.values())
    for pair in pairs:
        real = next(m["content"] for m in rows[pair["row"]]["messages"][::-1] if m["role"] == "assistant")
        assert tokenizer.decode(pair["real_ids"]) == real + "<|im_end|>"


def test_duplicates_have_completions_of_their_own(tmp_path):
    make_trainer(tmp_path, dataset=Dataset.from_list([GOOD] * 6)).train()
    assert len(set(map(tuple, load_game(str(tmp_path), 0)["train"]["generated_ids"]))) == 6


def test_more_processes_than_rows_or_batches_without_rows(tmp_path):
    with pytest.raises(ValueError, match="3 rows do not fill one batch of 4"):
        make_trainer(tmp_path, dataset=make_dataset(3), dataloader_drop_last=True).train()


# ---- Oddities of the opponent ----


END = make_tokenizer().eos_token_id


def opponent(monkeypatch, tmp_path, write, **kwargs):
    """A trainer whose opponent completes as a function of the index and the real completion does."""
    trainer = make_trainer(tmp_path, num_self_play_iterations=1, use_script=True, **kwargs)
    real = trainer.game.train.rows["real_ids"][:]
    monkeypatch.setattr(
        Scripted, "script", staticmethod(lambda prompts: [write(i, real[i]) for i in range(len(prompts))])
    )
    return trainer


@pytest.mark.parametrize(
    "write, kwargs, message",
    [
        (lambda i, real: [END], {}, r"12 are empty.*Row 0: '<\|im_end\|>'.*chat template"),
        (lambda i, real: [220, END], {}, "12 are empty"),  # white space
        (
            lambda i, real: [5, 6],
            {"truncated_completions": "drop"},
            "12 are truncated.*raise `max_completion_length`",
        ),
        (lambda i, real: real, {"max_completion_length": 20}, "12 are identical.*memorized"),
    ],
    ids=["37 all empty", "38 all white space", "39 all truncated", "40 all identical"],
)
def test_a_game_without_a_pair_to_learn_from_stops(tmp_path, monkeypatch, write, kwargs, message):
    trainer = opponent(monkeypatch, tmp_path, write, **kwargs)
    with pytest.raises(ValueError, match=f"(?s)Iteration 0 has nothing to learn from: .*{message}"):
        trainer.train()


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda i, real: [END] if i else [5, END], "Generated completions are empty: 92% (train)"),
        (lambda i, real: [5, 6 + i], "Generated completions are truncated: 100% (train)"),
        (lambda i, real: real if i else [5, END], "92% of the generated completions are identical"),
        (lambda i, real: [5, 5, 5, END], "Few generated completions are distinct: 8%, of the real ones 58% (train)"),
    ],
    ids=["38 empty", "39 truncated", "40 identical", "41 the same for all"],
)
def test_a_doubtful_opponent_is_named(tmp_path, monkeypatch, caplog, write, message):
    opponent(monkeypatch, tmp_path, write, max_completion_length=20).train()
    assert message in caplog.text


def test_special_tokens_in_a_completion_open_no_new_turn(tmp_path, monkeypatch):
    start = make_tokenizer().convert_tokens_to_ids("<|im_start|>")
    trainer = opponent(monkeypatch, tmp_path, lambda i, real: [5, start, 6, i, END])
    trainer.train()
    item = trainer.game.train[3]
    assert item["rejected_ids"] == [5, start, 6, 3, END]
    assert item["prompt_ids"] == trainer.game.train.rows[3]["prompt_ids"]


def test_padding_with_the_end_token_masks_no_completion(tmp_path):
    tokenizer = make_tokenizer()
    expected = make_trainer(tmp_path / "pad", tokenizer, model=make_model(tokenizer))
    expected.train()
    same = make_tokenizer()
    same.pad_token = same.eos_token
    trainer = make_trainer(tmp_path / "eos", same, model=make_model(tokenizer))
    trainer.train()
    assert trainer.processing_class.pad_token_id == trainer.processing_class.eos_token_id
    assert_same_weights(trainer, weights(expected))


# ---- Security ----


def test_code_of_a_model_runs_only_if_trusted(tmp_path):
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config |= {"auto_map": {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))

    def play(**kwargs):
        trainer = make_trainer(tmp_path / "run", model=str(tmp_path / "model"), num_self_play_iterations=1, **kwargs)
        trainer.train()
        return trainer

    with pytest.raises(ValueError, match="trust_remote_code"):
        play()
    assert type(play(trust_remote_code=True).model).__name__ == "OwnModel"
