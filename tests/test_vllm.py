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
Rounds with vLLM in a process of its own. Where `VLLM_PYTHON` names the Python of an environment that has vLLM, this is
vLLM itself (see `.ci/engines`), otherwise a stand-in.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import callback_of, first_losses, load_in_4bit, make_dataset, make_model, make_tokenizer, make_trainer
from peft import IA3Config, LoraConfig
from transformers import AutoModelForCausalLM

from trl_spin import SelfPlayCallback
from trl_spin.run.games import load_game, read_manifest


LORA = {"target_modules": "all-linear", "lora_dropout": 0.1}


PYTHON = os.environ.get("VLLM_PYTHON")
stand_in_only = pytest.mark.skipif(PYTHON is not None, reason="needs the stand-in")


@pytest.fixture(autouse=True)
def log(monkeypatch, tmp_path):
    """What the stand-ins were told, one line for each."""
    if PYTHON is None:
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).with_name("stand_in")))
        monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("MASTER_ADDR", "localhost")  # of a launcher, which is not to be seen by vLLM
    return tmp_path / "log"


def tiny_model():
    # vLLM has no attention on CPUs for narrower heads than 32
    return make_model(make_tokenizer(), hidden_size=64, num_attention_heads=2)


def saved_model(path):
    tiny_model().save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path)


def vllm_trainer(tmp_path, model=None, vllm_kwargs=None, **kwargs):
    options = {"use_vllm": True, "vllm_python": PYTHON or sys.executable, "learning_rate": 1e-2}
    options |= {"vllm_kwargs": {"enforce_eager": True} | (vllm_kwargs or {})}
    return make_trainer(tmp_path / "run", model=model or tiny_model(), **(options | kwargs))


def generated(tmp_path, iteration, name="train"):
    return load_game(str(tmp_path / "run"), iteration)[name]["generated_ids"][:]


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_run_with_vllm(tmp_path, log, adapter, monkeypatch):
    monkeypatch.setattr("trl_spin.engines.base.LARGE_BATCH", 5)
    # Full training starts elsewhere than any files say
    model, options, lora = None, {"generation_kwargs": {"frequency_penalty": 0.0}, "top_p": 0.99}, (None, None, None)
    if adapter:
        options = {"peft_config": LoraConfig(r=9, **LORA), "vllm_kwargs": {"max_num_seqs": 7}}
        model, lora = saved_model(tmp_path / "sft"), (True, 16, 7)
    trainer = vllm_trainer(tmp_path, model, eval_dataset=make_dataset(4), max_length=40, **options)
    generate, rng = callback_of(trainer, SelfPlayCallback).generate, []

    def watched(*args):
        rng.append(torch.get_rng_state())
        pairs = generate(*args)
        rng.append(torch.get_rng_state())
        return pairs

    callback_of(trainer, SelfPlayCallback).generate = watched
    trainer.train()
    assert torch.equal(rng[0], rng[1]) and torch.equal(rng[2], rng[3])
    assert first_losses(trainer) == pytest.approx([0.6931, 0.6931], abs=1e-3)
    truncated = []
    for iteration in range(2):
        assert read_manifest(trainer.args.output_dir, iteration)["engine"] == "vllm"
        for pair in load_game(trainer.args.output_dir, iteration)["train"]:
            ids, ends = pair["generated_ids"], trainer.game.rules.end_token_ids
            assert len(ids) <= min(12, 40 - len(pair["prompt_ids"]))
            assert pair["truncated"] == (ids[-1] not in ends) and not set(ids[:-1]) & {*ends}
            truncated.append(pair["truncated"])
    assert any(truncated) and not all(truncated)
    assert generated(tmp_path, 0) != generated(tmp_path, 1)
    assert not list(Path(trainer.args.output_dir).glob(".opponent*"))
    told = [json.loads(line) for line in log.read_text().splitlines()] if PYTHON is None else []
    assert PYTHON or len(told) == 2  # for each round
    for options in told:
        assert options["dtype"] == "float32" and options["max_model_len"] == 40 and options["skip_tokenizer_init"]
        assert tuple(map(options.get, ("enable_lora", "max_lora_rank", "max_num_seqs"))) == lora
        assert (options["model"] == str(tmp_path / "sft")) == adapter


def test_completions_are_those_of_the_opponent(tmp_path):
    """The same as with `generate`, where nothing is sampled; and vLLM's own log-probs, where something is."""
    options = {"eval_temperature": 0.0, "num_self_play_iterations": 1, "eval_dataset": make_dataset()}
    make_trainer(tmp_path / "plain", model=tiny_model(), **options).train()
    vllm_trainer(tmp_path, **options).train()
    plain = load_game(str(tmp_path / "plain"), 0)
    assert plain["eval"]["generated_ids"][:] == generated(tmp_path, 0, "eval")
    assert plain["train"]["generated_ids"][:] != generated(tmp_path, 0)


def test_a_run_that_was_stopped_goes_on_to_the_same_game(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_spin.engines.base.LARGE_BATCH", 5)
    options = {"num_self_play_iterations": 1, "temperature": 0.7}
    vllm_trainer(tmp_path, **options).train()
    expected = generated(tmp_path, 0)
    shutil.rmtree(tmp_path / "run")
    trainer = vllm_trainer(tmp_path, **options)
    generate = callback_of(trainer, SelfPlayCallback).generate

    def stopped(*args):
        trainer.processes.stop.agree = lambda flag: (signal.SIGTERM, flag)
        return generate(*args)

    callback_of(trainer, SelfPlayCallback).generate = stopped
    with pytest.raises(SystemExit):
        trainer.train()
    trainer = vllm_trainer(tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert generated(tmp_path, 0) == expected


@stand_in_only
def test_a_signal_is_heard_while_vllm_completes(tmp_path, log):
    trainer = vllm_trainer(tmp_path, vllm_kwargs={"fault": "hang"})

    def interrupt():
        while not Path(f"{log}.hangs").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SystemExit):
        trainer.train()
    thread.join()


def test_completions_of_another_model_are_refused(tmp_path):
    model = saved_model(tmp_path / "sft")
    model.lm_head.weight.data += torch.randn_like(model.lm_head.weight) * 0.1  # not what is in the folder
    trainer = vllm_trainer(tmp_path, model, peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="does not complete with the opponent.*off by .* beyond the 0.001"):
        trainer.train()


@stand_in_only
@pytest.mark.parametrize(
    "options, message",
    [
        ({"vllm_kwargs": {"fault": "load"}}, "vLLM cannot complete the prompts: ValueError: The model does not fit"),
        ({"vllm_kwargs": {"fault": "die"}}, "it ended with exit code 3, see its output above"),
        ({"generation_kwargs": {"suppress_tokens": [1]}}, r"Unexpected keyword argument \['suppress_tokens'\]"),
    ],
)
def test_what_vllm_fails_at_is_said(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        vllm_trainer(tmp_path, **options).train()
    assert not list((tmp_path / "run").glob(".opponent*"))


def test_another_precision_is_said(tmp_path, caplog):
    vllm_trainer(tmp_path, vllm_kwargs={"dtype": "bfloat16"})
    assert "vLLM computes in bfloat16, training in float32" in caplog.text


def test_what_vllm_cannot_complete_is_refused(tmp_path):
    saved_model(tmp_path / "sft")
    with pytest.raises(ValueError, match="quantized by bitsandbytes.*would not be the reference"):
        vllm_trainer(tmp_path, load_in_4bit(tmp_path / "sft"), peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="`name_or_path` is empty"):
        vllm_trainer(tmp_path, peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="vLLM has no IA3 adapters"):
        vllm_trainer(
            tmp_path,
            saved_model(tmp_path / "sft"),
            peft_config=IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
        )
    with pytest.raises(ImportError, match=r"pip install trl-spin\[vllm\]"):
        vllm_trainer(tmp_path, vllm_python=None)
