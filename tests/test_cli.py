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

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from functools import partial
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from conftest import make_args, make_dataset, make_model, make_tokenizer
from datasets import Dataset, DatasetDict, load_dataset
from safetensors.torch import load_file
from trl import DatasetMixtureConfig

from trl_spin import SPINConfig, SPINTrainer
from trl_spin.__main__ import main
from trl_spin.run.games import load_game, read_manifest, write_rows
from trl_spin.sources import DataArguments, load_data


OPTIONS = {
    "prompt_column": "question",
    "completion_column": "answer",
    "use_cpu": True,
    "bf16": False,
    "num_self_play_iterations": 2,
    "num_train_epochs": 1,
    "beta": 1.0,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def sft(tmp_path):
    """A model directory and a JSON Lines file of questions and answers."""
    tokenizer = make_tokenizer()
    make_model(tokenizer, hidden_size=64).save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    rows = [{"question": m[0]["content"], "answer": m[1]["content"]} for m in make_dataset()["messages"]]
    Dataset.from_list(rows).to_json(tmp_path / "data.jsonl")
    return tmp_path


def command_line(sft, output_dir, **options):
    options = {
        "model_name_or_path": sft / "sft",
        "dataset_name": sft / "data.jsonl",
        "output_dir": sft / output_dir,
        "learning_rate": [1e-3, 1e-4],
        **OPTIONS,
        **options,
    }
    arguments = []
    for key, value in options.items():
        arguments += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return arguments


def run(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["trl-spin", *arguments])
    assert main() is None  # which becomes the exit code


def assert_equal_weights(*paths):
    first, *others = (load_file(path) for path in paths)
    for other in others:
        assert first.keys() == other.keys()
        for key in first:
            assert torch.equal(first[key], other[key]), key


def test_python_command_and_accelerate_launch_give_the_same_run(sft, monkeypatch):
    trainer = SPINTrainer(
        str(sft / "sft"),
        args=make_args(sft / "python", **OPTIONS, learning_rate=[1e-3, 1e-4], gradient_checkpointing=True),
        train_dataset=load_dataset("json", data_files=str(sft / "data.jsonl"), split="train"),
    )
    trainer.train()
    run(monkeypatch, command_line(sft, "command", resume_from_checkpoint=False))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "trl_spin"]
    result = subprocess.run(
        [*launch, *command_line(sft, "accelerate")], capture_output=True, text=True, env=os.environ | {"CI": "1"}
    )
    assert result.returncode == 0, result.stderr
    for iteration in ("iteration-0", "iteration-1"):
        assert_equal_weights(
            *(sft / run / iteration / "model.safetensors" for run in ("python", "command", "accelerate"))
        )
    assert_equal_weights(sft / "command" / "model.safetensors", sft / "command" / "iteration-1" / "model.safetensors")
    assert "`data.jsonl`, 12 prompts" in (sft / "command" / "README.md").read_text()


def test_probe_from_the_command_line(sft, monkeypatch, capsys):
    run(monkeypatch, ["probe", *command_line(sft, "probe", use_peft=True, load_in_4bit=True), "--num_prompts", "5"])
    out = capsys.readouterr().out
    assert "Self-play probe: 5 training prompts" in out and "\nVerdict\n- " in out
    assert not [*(sft / "probe").iterdir()]


def killed_worker(arguments):
    """A worker that dies as soon as a part of its share is on disk."""

    def write(*args):
        write_rows(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_spin.run.processes.COMMIT_SECONDS", -1)
        patch.setattr("trl_spin.generation.write_rows", write)
        run(patch, arguments)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_workers_complete_a_round(sft, monkeypatch, capsys, caplog, adapter):
    """Three of them: one is killed and started again, one does its share twice. The run then generates nothing."""
    options = {"held_out_size": 4, "save_strategy": "epoch", "generation_token_budget": 60}
    options |= {"use_peft": True, "lora_target_modules": "all-linear"} if adapter else {}
    run(monkeypatch, command_line(sft, "alone", **options))
    for iteration in range(2):

        def worker(share, iteration=iteration):
            own = ["--iteration", str(iteration), "--shard", share]
            return ["generate", *command_line(sft, "fleet", **options), *own]

        run(monkeypatch, worker("0/3"))
        process = multiprocessing.get_context("fork").Process(target=killed_worker, args=[worker("1/3")])
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        for share in ("1/3", "2/3", "2/3"):
            run(monkeypatch, worker(share))
        said = [line for line in capsys.readouterr().out.splitlines() if "completed" in line and "share" in line]
        numbers = [[int(number) for number in re.findall(r"(\d+) (?:train|eval)", line)] for line in said]
        assert numbers[0][0] == 3 and 0 < sum(numbers[1]) < 5 and numbers[2][0] == 2 and numbers[3] == [0, 0]
        caplog.clear()
        length = {"num_self_play_iterations": iteration + 1, "resume_from_checkpoint": True}
        run(monkeypatch, command_line(sft, "fleet", **options | length))
        assert "8 of 8 train prompts have been completed already" in caplog.text
        metrics, games = read_manifest(sft / "fleet", iteration)["metrics"], []
        assert metrics["self_play/generated_tokens_per_second"] == 0
        for directory in ("alone", "fleet"):
            games.append({name: rows[:] for name, rows in load_game(sft / directory, iteration).items()})
        assert games[0] == games[1]
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    assert_equal_weights(*(sft / run / "iteration-1" / name for run in ("alone", "fleet")))


def test_a_function_of_ones_own_by_its_name(sft, monkeypatch):
    checks = (
        "def odd(prompts, completions, real, answer):\n    return [len(text) % 4 == 1 for text in answer]\nten = 10\n"
    )
    (sft / "checks.py").write_text(checks)
    monkeypatch.chdir(sft)
    monkeypatch.setattr(sys, "path", [*sys.path])
    options = {"num_self_play_iterations": 1, "pair_filter": "checks:odd"}
    run(monkeypatch, ["generate", *command_line(sft, "run", **options), "--iteration", "0"])
    run(monkeypatch, command_line(sft, "run", **options, resume_from_checkpoint=True))
    assert load_game(sft / "run", 0)["train"]["weight"][:] == [i % 7 % 2 == 0 for i in range(12)]
    for name, reason in (
        ("checks:even", "no attribute 'even'"),
        ("none:odd", "No module"),
        ("checks:ten", "is `int`"),
    ):
        with pytest.raises(SystemExit, match=f"`pair_filter` must .*{name}.*{reason}"):
            run(monkeypatch, command_line(sft, "other", pair_filter=name))


@pytest.mark.parametrize(
    "own, message",
    [
        (["--iteration", "0", "--shard", "3/3"], "`--shard 3/3` is no share: 0/3, 1/3 and 2/3 make a round"),
        (["--iteration", "1"], "There is no opponent for iteration 1: .*iteration-0/manifest.json is missing"),
        (["--shard", "0/3"], "the following arguments are required: --iteration"),
    ],
)
def test_a_share_that_does_not_exist_is_refused(sft, monkeypatch, own, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, ["generate", *own, *command_line(sft, "fleet")])


def test_the_command_line_overrides_yaml(sft, monkeypatch):
    Dataset.from_json(str(sft / "data.jsonl")).to_parquet(sft / "data.parquet")
    recipe = {key: str(value) if isinstance(value, os.PathLike) else value for key, value in OPTIONS.items()}
    recipe |= {
        "model_name_or_path": str(sft / "sft"),
        "dataset_name": str(sft / "data.parquet"),
        "output_dir": str(sft / "run"),
        "beta": [0.1, 5.0],
        "learning_rate": "1e-3",  # YAML reads 1e-3 without a point as text
        "generation_kwargs": {"suppress_tokens": [1]},
    }
    (sft / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    run(monkeypatch, ["--config", str(sft / "recipe.yaml"), "--learning_rate", "1e-7", "--beta", "0.5", "5"])
    record = json.loads((sft / "run" / "iteration-1" / "self_play.json").read_text())
    assert (record["learning_rate"], record["beta"]) == (1e-7, 5.0)

    recipe["betta"] = 1.0
    (sft / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit, match="betta"):
        run(monkeypatch, ["--config", str(sft / "recipe.yaml")])


def test_a_mixture_of_datasets_and_evaluation(sft, monkeypatch, capsys):
    recipe = {
        "datasets": [{"path": "json", "data_files": str(sft / "data.jsonl")}] * 2,
        "test_split_size": 0.25,
        "eval_strategy": "epoch",
    }
    (sft / "mixture.yaml").write_text(json.dumps(recipe))
    arguments = command_line(sft, "run", dataset_name="none")
    del arguments[arguments.index("--dataset_name") : arguments.index("--dataset_name") + 2]
    run(monkeypatch, ["--config", str(sft / "mixture.yaml"), *arguments])
    end = capsys.readouterr().out.split("Done. The model is in ")
    assert len(end) == 2 and end[1].startswith(f"{sft / 'run'}, ")
    record = json.loads((sft / "run" / "iteration-1" / "self_play.json").read_text())
    assert record["eval_nll/real"] > 0
    with pytest.raises(SystemExit, match="exactly one source"):
        run(monkeypatch, arguments)
    with pytest.raises(SystemExit, match="model_name_or_path"):
        run(monkeypatch, ["--output_dir", str(sft / "run2"), "--use_cpu", "--dataset_name", "data.jsonl"])


def test_qlora_by_flags_alone(sft, monkeypatch):
    """Flags turn the recipe into a run on a model in 4 bits, computed in bfloat16 and not in TRL's float32."""
    seen = {}

    class Spy(SPINTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen["trainer"] = self

    monkeypatch.setattr("trl_spin.spin_trainer.SPINTrainer", Spy)
    run(monkeypatch, [*command_line(sft, "run", bf16=True), "--use_peft", "--load_in_4bit"])
    model = seen["trainer"].model
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer.base_layer).__name__ == "Linear4bit"
    assert layer.base_layer.compute_dtype == torch.bfloat16
    assert sorted(p.name for p in (sft / "run" / "iteration-1").glob("*.safetensors")) == ["adapter_model.safetensors"]

    with pytest.raises(SystemExit, match="--use_peft"):
        run(monkeypatch, [*command_line(sft, "run4"), "--load_in_4bit"])


def test_a_run_goes_on_with_more_iterations(sft, monkeypatch):
    options = {"save_strategy": "epoch", "lr_scheduler_type": "constant"}
    run(monkeypatch, command_line(sft, "straight", num_self_play_iterations=3, **options))
    run(monkeypatch, command_line(sft, "resumed", **options))
    with pytest.raises(SystemExit, match="--resume_from_checkpoint true"):
        run(monkeypatch, command_line(sft, "resumed", **options))
    run(monkeypatch, command_line(sft, "resumed", num_self_play_iterations=3, resume_from_checkpoint=True, **options))
    assert_equal_weights(*(sft / run / "iteration-2" / "model.safetensors" for run in ("straight", "resumed")))


def test_dry_run_leaves_no_model(sft, monkeypatch, capsys):
    with patch.object(Accelerator, "end_training") as end:
        run(monkeypatch, [*command_line(sft, "dry"), "--dry_run"])
    end.assert_called_once()  # or else one of several processes is aborted while the other leaves
    assert "Self-play plan" in capsys.readouterr().out
    assert not list((sft / "dry").rglob("*.safetensors"))


@pytest.mark.parametrize("suffix", ["jsonl.gz", "json", "csv", "tsv", "parquet", "arrow", "folder", "splits"])
def test_data_is_found_by_its_name(sft, suffix):
    dataset = Dataset.from_json(str(sft / "data.jsonl"))
    path = str(sft / f"my.{suffix}")
    save = {
        "jsonl.gz": partial(dataset.to_json, path, compression="gzip"),
        "csv": partial(dataset.to_csv, path),
        "tsv": partial(dataset.to_csv, path, sep="\t"),
        "parquet": partial(dataset.to_parquet, path),
        "arrow": lambda: dataset.save_to_disk(sft / "saved") or next((sft / "saved").glob("*.arrow")).rename(path),
        "folder": partial(dataset.save_to_disk, path),
        "splits": partial(DatasetDict(train=dataset, test=dataset.select(range(4))).save_to_disk, path),
    }
    save.get(suffix, partial(dataset.to_json, path))()
    train, held_out = load_data(DataArguments(path, dataset_train_split="train[:5]"), DatasetMixtureConfig())
    assert train[:] == dataset[:5]
    assert held_out is None if suffix != "splits" else held_out[:] == dataset[:4]


def test_held_out_data(sft, monkeypatch, capsys):
    """The test split where there is one, a part of it, other rows, or another file."""
    splits, dataset = str(sft / "splits"), Dataset.from_json(str(sft / "data.jsonl"))
    DatasetDict(train=dataset, test=dataset.select(range(4))).save_to_disk(splits)
    for options, num_rows in (
        ({"dataset_name": splits}, 4),
        ({"dataset_name": splits, "dataset_test_split": "test[:3]"}, 3),
        ({"dataset_name": splits, "held_out_size": 2}, 2),
        ({"eval_dataset_name": sft / "data.jsonl", "eval_strategy": "epoch"}, 12),
    ):
        run(monkeypatch, command_line(sft, f"run-{num_rows}", **options, num_self_play_iterations=1))
        game = load_game(str(sft / f"run-{num_rows}"), 0)
        assert len(game["eval"]) == num_rows
        record = json.loads((sft / f"run-{num_rows}" / "iteration-0" / "self_play.json").read_text())
        assert record["eval_nll/real"] > 0
        assert f"{num_rows} prompts (eval), completed and measured" in capsys.readouterr().out


def test_what_the_user_must_change_is_said_in_one_line(sft, monkeypatch):
    (sft / "empty.jsonl").touch()
    (sft / "broken.jsonl").write_text('{"question": "a"\n{"x"')
    for options, message in (
        ({"dataset_name": sft / "empty.jsonl"}, r"empty.jsonl' cannot be loaded: it is empty"),
        ({"dataset_name": sft / "broken.jsonl"}, r"broken.jsonl' cannot be loaded: .*(JSON parse error|decoding)"),
        ({"dataset_name": "missing.jsonl"}, r"'missing.jsonl' cannot be loaded"),
        ({"dataset_train_split": "a[:1]", "dataset_test_split": "b"}, r"""Unknown split "b". .* \['a'\]"""),
        ({"dataset_streaming": True}, "cannot be streamed"),
        ({"beta": "high"}, "argument --beta: invalid float value: 'high'"),
        ({"config": "zephyr"}, "none of the recipes: tulu3_70b, zephyr_7b, "),
        ({"config": sft / "data.jsonl"}, "expected .* but found"),
    ):
        with pytest.raises(SystemExit, match=f"^trl-spin: error: [^\n]*{message}[^\n]*$"):
            run(monkeypatch, command_line(sft, "run", **options))
    with pytest.raises(ValueError, match="cannot be streamed"):
        run(monkeypatch, [*command_line(sft, "run", dataset_streaming=True), "--traceback"])
    with pytest.raises(SystemExit, match=r"trl-spin report OUTPUT_DIR"):
        run(monkeypatch, [])
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match=r"^trl-spin: error: \[rank 1\] .* cannot be streamed"):
        run(monkeypatch, command_line(sft, "run", dataset_streaming=True))


def test_faults_keep_their_traceback_and_ctrl_c_has_none(monkeypatch):
    def fail(arguments):
        eval(arguments[0])

    monkeypatch.setattr("trl_spin.__main__.parse", fail)
    for code, error in (("{}['x']", KeyError), ("int('x')", ValueError), ("len(1)", TypeError)):
        with pytest.raises(error):
            run(monkeypatch, [code])

    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_spin.__main__.parse", interrupt)
    with pytest.raises(SystemExit, match="^130$"):
        run(monkeypatch, ["x"])


def test_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    run(monkeypatch, ["--help"])
    short = capsys.readouterr().out
    own = SPINConfig.__annotations__.keys()
    assert {f"--{name}" for name in own} <= {*short.split()} and len(short.splitlines()) < 150
    for text in ("model_name_or_path", "control the game", "iterations (T in", "trl-spin report", "zephyr_7b_qlora"):
        assert text in short
    assert "--weight_decay" not in short
    result = subprocess.run([sys.executable, "-m", "trl_spin", "--help_all"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    for option in ("num_self_play_iterations", "weight_decay", "load_in_4bit", "dataset_name", "datasets", "beta"):
        assert f"--{option}" in result.stdout
