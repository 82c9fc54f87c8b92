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

"""Runs of two processes on the CPU (gloo), against the same run of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import callback_of, make_args, make_dataset, make_model, make_tokenizer
from peft import LoraConfig
from safetensors.torch import load_file

from trl_spin import SelfPlayCallback, SPINTrainer, memory
from trl_spin.run.games import load_game


def play(output_dir, kind: str, batch_size: int, **options):
    lora, tokenizer = kind == "lora", make_tokenizer()
    trainer = SPINTrainer(
        make_model(tokenizer),
        args=make_args(
            output_dir,
            per_device_train_batch_size=batch_size,
            opponent_history=1,
            optim="sgd",  # Adam would blow rounding up to the size of the learning rate
            learning_rate=1e-2,
            max_completion_length=60,
            # Pairs that are not played fall on the processes unevenly
            truncated_completions="drop" if kind == "full" else "keep",
            # At 0, all engines give the same completions
            temperature=0.0 if kind == "continuous" else 1.0,
            **{"generation_token_budget": 400} | options,
        ),
        train_dataset=make_dataset(16),
        eval_dataset=make_dataset(5),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["full", "lora", "continuous"])
def test_two_processes_play_the_same_game_as_one(tmp_path, kind):
    play(tmp_path / "one", kind, batch_size=4)
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            __file__,
            str(tmp_path / "two"),
            kind,
        ],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    if kind == "lora":
        assert first[0] and first[1] < memory.DEFAULT_BUDGET
    for iteration in range(2):
        one, two = (load_game(str(tmp_path / run), iteration) for run in ("one", "two"))
        for name in ("train", "eval"):
            for pair, other in zip(one[name], two[name], strict=True):
                logps = [(p.pop("ref_real_logps"), p.pop("ref_generated_logps")) for p in (pair, other)]
                assert pair == other
                assert logps[0] == pytest.approx(logps[1], abs=1e-3)
        # A sampler of two processes repeats one of the five rows
        paths = (tmp_path / run / f"self_play/iteration-{iteration}/examples.json" for run in ("one", "two"))
        margins = [{e["row"]: e["margin"] for e in json.loads(path.read_text())["examples"]} for path in paths]
        assert len(margins[0]) == 5 and margins[0] == pytest.approx(margins[1], abs=1e-3)
        played = one["train"]["played"][:]
        assert all(played) if kind != "full" else 0 < sum(played) < len(played)
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    one, two = (load_file(tmp_path / run / "iteration-1" / name) for run in ("one", "two"))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)


if __name__ == "__main__":
    kind, options = sys.argv[2], {}
    if kind == "lora":  # one of the processes has little memory, and both must do as it needs
        memory.available_memory = lambda device: 1e6 if os.environ["RANK"] == "1" else 1e12
        options = {"gradient_checkpointing": None, "generation_token_budget": None}
    trainer = play(
        sys.argv[1], kind, batch_size=2, use_transformers_continuous_batching=kind == "continuous", **options
    )
    decisions = trainer.model.is_activation_checkpointing, callback_of(trainer, SelfPlayCallback).engine.token_budget
    Path(f"{sys.argv[1]}-{os.environ['RANK']}.json").write_text(json.dumps(decisions))
    trainer.accelerator.end_training()  # a process that left before the other was done would be aborted
