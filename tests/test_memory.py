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

"""The estimate of memory against what is measured, and the options that follow from it."""

import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import callback_of, load_in_4bit, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import TrlParser

from trl_spin import SelfPlayCallback, SPINConfig, memory, preflight
from trl_spin.memory import optimizer_bytes
from trl_spin.schedule import Schedule


# ---- The estimate ----

CASES = {
    "full": {"gradient_checkpointing": False},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"peft_config": True},
    "autocast": {"bf16": True},
    "padded": {"share_prefix": False, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
}


def resident(kind: str) -> int:
    """Bytes of this process, now (`VmRSS`) or at most (`VmHWM`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{kind}:"))
    return 1024 * int(line.split()[1])


class Peak(TrainerCallback):
    """Measures the memory of training steps, from before the first to the end of the last."""

    def __init__(self):
        self.peak = 0

    def on_step_begin(self, *args, **kwargs):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")

    def on_step_end(self, *args, **kwargs):
        self.peak = max(self.peak, resident("VmHWM"))


def measure(case: str, output_dir: str):
    """Trains a model whose completions all run into their limit, and writes down what was estimated and what was measured."""
    options = dict(CASES[case])
    if options.pop("peft_config", False):
        options["peft_config"] = LoraConfig(r=8, target_modules="all-linear")
    tokenizer, peak, plans = make_tokenizer(), Peak(), []
    trainer = make_trainer(
        output_dir,
        tokenizer,
        dataset=Dataset.from_list([{"prompt": "x" * 300, "completion": "y" * 150}] * 8),
        model=make_model(tokenizer, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=4096),
        callbacks=[peak],
        num_self_play_iterations=1,
        num_train_epochs=2,
        max_completion_length=24,
        generation_kwargs={"suppress_tokens": [tokenizer.eos_token_id]},
        play_empty_completions=True,
        num_probes=0,
        **{"per_device_train_batch_size": 8} | options,
    )
    plan_memory = preflight.plan_memory
    preflight.plan_memory = lambda *args: plans.append(plan_memory(*args)) or plans[0]
    gc.collect()
    before = resident("VmRSS")
    trainer.train()
    assert all(trainer.game.train.pairs[0]["truncated"])
    weights = sum(p.nbytes for p in trainer.model.parameters())
    result = {"estimated": plans[0].estimate["peak"], "measured": peak.peak - before + weights}
    Path(output_dir, "result.json").write_text(json.dumps(result))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux")
def test_the_estimate_is_close_to_what_training_takes(tmp_path):
    # The process gives large blocks back when they are free, so that its size is the size of what it holds
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=env, check=True)
    results = {case: json.loads((tmp_path / case / "result.json").read_text()) for case in CASES}
    far_off = {case: r for case, r in results.items() if r["estimated"] != pytest.approx(r["measured"], rel=0.2)}
    assert not far_off


def test_the_estimate_is_made_with_real_completions_in_full(tmp_path, monkeypatch):
    planned, plan_memory = [], preflight.plan_memory
    monkeypatch.setattr(
        preflight,
        "plan_memory",
        lambda trainer, forward, *args: planned.append(args[0]) or plan_memory(trainer, forward, *args),
    )
    rows = Dataset.from_list([{"prompt": "x" * 20, "completion": "y" * 30}] * 4)
    kwargs = {"truncated_completions": "cut_real", "max_completion_length": 6, "dry_run": True}
    make_trainer(tmp_path, dataset=rows, **kwargs).train()
    (pair,) = planned
    assert [len(pair[f"{part}_ids"]) for part in ("chosen", "rejected")] == [31, 6]  # with its end token


def test_weights_in_lower_precision_are_kept_once_and_not_for_every_token(tmp_path, monkeypatch):
    plans, plan_memory = [], preflight.plan_memory
    monkeypatch.setattr(preflight, "plan_memory", lambda *args: plans.append(plan_memory(*args)) or plans[-1])
    rows = Dataset.from_list([{"prompt": "x" * 60, "completion": "y" * 60}] * 4)
    for bf16 in (False, True):
        model = make_model(make_tokenizer(), hidden_size=256, intermediate_size=1024)
        kwargs = {"gradient_checkpointing": True, "dry_run": True, "max_completion_length": 60}
        make_trainer(tmp_path, dataset=rows, model=model, bf16=bf16, **kwargs).train()
    full, mixed = (plan.estimate["temporary"] for plan in plans)
    assert mixed < full


def optimizer_after_a_run(tmp_path, **kwargs):
    """Weights, what the state of their optimizer was estimated at, and its size once it is there, in bytes."""
    model = make_model(make_tokenizer(), hidden_size=128)
    trainer = make_trainer(tmp_path, model=model, num_self_play_iterations=1, **kwargs)
    estimate = optimizer_bytes(trainer.create_optimizer(), model)
    trainer.train()
    state = trainer.optimizer.state
    size = sum(t.nbytes for p in model.parameters() for t in state[p].values() if isinstance(t, torch.Tensor))
    return sum(p.numel() for p in model.parameters()), estimate, size


@pytest.mark.parametrize(("optim", "per_weight"), [("adamw_torch", 8), ("rmsprop", 4), ("sgd", 0), ("adamw_8bit", 2)])
def test_the_size_of_the_optimizer(tmp_path, optim, per_weight):
    num_weights, estimate, size = optimizer_after_a_run(tmp_path, optim=optim)
    assert estimate == pytest.approx(per_weight * num_weights, rel=0.1)
    if optim != "adamw_8bit":  # small tensors have 32 bits
        assert estimate == pytest.approx(size, rel=0.1, abs=1000)
    else:  # bitsandbytes remembers which, also for later runs
        assert optimizer_after_a_run(tmp_path / "later", optim=optim)[1] == estimate


def test_the_size_of_an_optimizer_that_keeps_rows_and_columns(tmp_path):
    num_weights, estimate, size = optimizer_after_a_run(tmp_path, optim="adafactor")
    assert 0 < estimate < 4 * num_weights / 10 and 0 < size < 4 * num_weights / 10


def test_the_size_of_an_optimizer_that_the_user_gives(tmp_path):
    model = make_model(make_tokenizer(), hidden_size=128)
    momentum = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    trainer = make_trainer(tmp_path, model=model, optimizers=(momentum, None), num_self_play_iterations=1)
    assert optimizer_bytes(trainer.create_optimizer(), model) == sum(p.nbytes for p in model.parameters())

    class Picky(torch.optim.AdamW):
        def step(self, closure):
            raise RuntimeError("not now")

    num_weights = sum(p.numel() for p in model.parameters())
    assert optimizer_bytes(Picky(model.parameters()), model) == 8 * num_weights


def test_the_optimizer_is_as_it_was_once_its_size_is_known(tmp_path):
    model = make_model(make_tokenizer())
    trainer = make_trainer(tmp_path, model=model)
    optimizer = trainer.create_optimizer()
    trainer.game.schedule = Schedule([1, 1], steps_per_epoch=3)
    trainer.create_scheduler(6)  # which has put its own `step` into the optimizer
    groups, before = copy.deepcopy(optimizer.param_groups), copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer_bytes(optimizer, model)
    assert not optimizer.state and len(optimizer.param_groups) == len(groups)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    for group, earlier in zip(optimizer.param_groups, groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in earlier.items() if k != "params"}
        assert len(group["params"]) == len(earlier["params"])


# ---- What follows from it ----


@pytest.mark.parametrize("kind", ["full", "qlora"])
def test_checkpointing_is_off_where_training_fits_and_on_where_it_does_not(tmp_path, monkeypatch, kind):
    def make(path, **kwargs):
        tokenizer, model = make_tokenizer(), None
        if kind == "qlora":
            make_model(tokenizer, hidden_size=64).save_pretrained(tmp_path / "model")
            model = load_in_4bit(tmp_path / "model")
            kwargs["peft_config"] = LoraConfig(r=4, target_modules="all-linear")
        return make_trainer(path, tokenizer, model=model, **kwargs)

    roomy = make(tmp_path / "roomy", gradient_checkpointing=None)
    roomy.train()
    assert not roomy.model.is_gradient_checkpointing

    monkeypatch.setattr(memory, "available_memory", lambda device: 1e6)
    tight = make(tmp_path / "tight", gradient_checkpointing=None)
    tight.train()
    assert tight.model.is_gradient_checkpointing
    for name, p in tight.model.named_parameters():
        assert torch.equal(p, roomy.model.get_parameter(name)), name

    told = make(tmp_path / "told", gradient_checkpointing=False)
    told.train()
    assert not told.model.is_gradient_checkpointing
    # What was decided is not what was asked for
    assert roomy.args.gradient_checkpointing is tight.args.gradient_checkpointing is None


@pytest.mark.parametrize("name", ["gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"])
def test_every_other_layer_can_be_checkpointed(tmp_path, name):
    if name not in SPINConfig.__dataclass_fields__:
        pytest.skip("its name from transformers 5.20 on")
    trainer = make_trainer(tmp_path, gradient_checkpointing=True, **{name: {"every_n_layers": 2}})
    trainer.train()
    assert [layer.gradient_checkpointing for layer in trainer.model.model.layers] == [True, False]


def test_a_batch_that_does_not_fit_in_the_trial_run_is_checkpointed(tmp_path, monkeypatch):
    saved_bytes = memory._saved_bytes

    def run_out(forward, model, pairs):
        if not model.training and len(pairs[0]["chosen_ids"]) > memory._SHORT:
            raise torch.OutOfMemoryError("out of memory")
        return saved_bytes(forward, model, pairs)

    monkeypatch.setattr(memory, "_saved_bytes", run_out)
    rows = Dataset.from_list([{"prompt": "x", "completion": "y" * 100}] * 4)
    trainer = make_trainer(tmp_path / "open", dataset=rows, gradient_checkpointing=None, num_self_play_iterations=1)
    trainer.train()
    assert trainer.model.is_gradient_checkpointing
    with pytest.raises(torch.OutOfMemoryError, match="`gradient_checkpointing=True` needs less"):
        make_trainer(tmp_path / "told", dataset=rows, gradient_checkpointing=False).train()


def budget_of(trainer):
    return callback_of(trainer, SelfPlayCallback).engine.token_budget


def test_generation_batches_fit_the_memory_and_stay_the_same_when_the_run_is_resumed(tmp_path, monkeypatch, capsys):
    trainer = make_trainer(tmp_path, save_strategy="epoch")
    weights = sum(p.nbytes for p in trainer.model.parameters())
    monkeypatch.setattr(memory, "available_memory", lambda device: 10 * weights)
    trainer.train()
    budget = budget_of(trainer)
    assert 50 < budget < memory.DEFAULT_BUDGET and trainer.args.generation_token_budget is None
    assert f"in batches of up to {budget:,}" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "self_play" / "run.json").read_text())["generation_token_budget"] == budget

    monkeypatch.undo()
    resumed = make_trainer(tmp_path, save_strategy="epoch", num_self_play_iterations=3)
    resumed.train(resume_from_checkpoint=True)
    assert budget_of(resumed) == budget
    given = make_trainer(tmp_path / "given", generation_token_budget=77, dry_run=True)
    given.train()
    assert budget_of(given) == 77


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], None), (["--gradient_checkpointing"], True), (["--gradient_checkpointing", "false"], False)],
)
def test_checkpointing_on_the_command_line(tmp_path, options, expected):
    parser = TrlParser(SPINConfig)
    (args,) = parser.parse_args_and_config(["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", *options])
    assert args.gradient_checkpointing is expected
    assert getattr(args, "activation_checkpointing", expected) is expected  # its name from transformers 5.20 on


if __name__ == "__main__":
    for case in CASES:
        # A process of its own, which need not import everything again
        if (pid := os.fork()) == 0:
            measure(case, f"{sys.argv[1]}/{case}")
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            sys.exit(f"{case} failed")
