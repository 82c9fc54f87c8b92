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

"""`examples/evaluate.py` with the real lm-evaluation-harness, on tiny models and a local task."""

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import logp, make_model, make_tokenizer, make_trainer
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM


lm_eval = pytest.importorskip("lm_eval", reason="needs `pip install trl-spin[eval]`")
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


SCRIPT = Path(__file__).parents[1] / "examples" / "evaluate.py"
CHOICES = ["red", "green", "blue", "grey"]
ROWS = [{"question": f"Colour {i}?", "choices": CHOICES, "label": i % 4} for i in range(24)]
TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/colours.jsonl
    test: {folder}/colours.jsonl
output_type: multiple_choice
fewshot_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 7
"""


@pytest.fixture
def sft(tmp_path):
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    (tmp_path / "colours.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "colours.yaml").write_text(TASK.format(folder=tmp_path))
    return tmp_path


def evaluate(monkeypatch, sft, *arguments):
    arguments = [*arguments, "--tasks", "colours", "--include_path", sft, "--device", "cpu", "--batch_size", "4"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    # The thousands of tasks that the harness brings take seconds to list
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))
    runpy.run_path(str(SCRIPT), run_name="__main__")


def accuracy(model, rows=ROWS):
    """Share of questions whose right answer is the most likely one, written out."""
    tokenizer = make_tokenizer()
    right = 0
    for row in rows:
        prompt = tokenizer(row["question"])["input_ids"]
        scores = [logp(model, prompt, tokenizer(" " + choice)["input_ids"]) for choice in row["choices"]]
        right += scores.index(max(scores)) == row["label"]
    return right / len(rows)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(task_type="CAUSAL_LM", r=4)], ids=["full", "adapter"])
def test_a_table_of_all_iterations(sft, peft_config, monkeypatch, capsys):
    output_dir = sft / "run"
    # Large steps: the iterations should answer differently
    make_trainer(output_dir, model=str(sft / "sft"), peft_config=peft_config, learning_rate=0.1).train()
    evaluate(monkeypatch, sft, output_dir)

    load = AutoPeftModelForCausalLM if peft_config else AutoModelForCausalLM
    expected = {"start": accuracy(AutoModelForCausalLM.from_pretrained(sft / "sft"))}
    for name in ("iteration-0", "iteration-1"):
        expected[name] = accuracy(load.from_pretrained(output_dir / name).eval())
    content = json.loads((output_dir / "evaluation.json").read_text())
    assert {name: r["colours"]["results"]["colours"]["acc,none"] for name, r in content.items()} == expected
    assert content["start"]["colours"]["versions"]["colours"] == 7
    table = (output_dir / "evaluation.md").read_text()
    header, _, *rows = table.splitlines()
    assert header == "| model | colours (0-shot acc) | average |"
    for row, (name, value) in zip(rows, expected.items(), strict=True):
        model, cell, average = row.strip("| ").split(" | ")
        assert (model, average) == (name, f"{100 * value:.2f}") and cell.startswith(average + " ± ")
    assert table.strip() in capsys.readouterr().out


def test_shots_and_limit(sft, monkeypatch):
    make_trainer(sft / "run", model=str(sft / "sft"), num_self_play_iterations=1).train()
    rendered, render = [], HFLM.apply_chat_template
    spy = lambda *args, **kwargs: rendered.append(render(*args, **kwargs)) or rendered[-1]  # noqa: E731
    monkeypatch.setattr(HFLM, "apply_chat_template", spy)
    evaluate(monkeypatch, sft, sft / "run", "--num_fewshot", 2, "--limit", 8, "--apply_chat_template")
    assert "2-shot" in (sft / "run" / "evaluation.md").read_text()
    assert json.loads((sft / "run" / "evaluation.json").read_text())["start"]["colours"]["config"]["limit"] == 8
    assert rendered[0].startswith("<|im_start|>user\nColour ")
    with pytest.raises(FileNotFoundError, match="holds no"):
        evaluate(monkeypatch, sft, sft)


def test_the_harness_knows_the_tasks():
    folders = [
        Path(lm_eval.tasks.__file__).parent / name
        for name in ("arc", "hellaswag", "truthfulqa", "mmlu", "winogrande", "gsm8k")
    ]
    assert runpy.run_path(str(SCRIPT))["LEADERBOARD"].keys() <= set(
        TaskManager(include_path=folders, include_defaults=False).all_tasks
    )
