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

import copy
import math
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    Scripted,
    assert_loss_and_gradient,
    callback_of,
    first_losses,
    load_in_4bit,
    logp,
    make_args,
    make_dataset,
    make_model,
    make_tokenizer,
    make_trainer,
)
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer

from trl_spin import SelfPlayCallback, SPINConfig, SPINTrainer
from trl_spin.pairs import as_preference
from trl_spin.run.games import load_game


LORA = {"r": 4, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.1}


class Snapshots(TrainerCallback):
    """Copies of the trained parameters at the end of each step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.steps.append({k: v.detach().clone() for k, v in model.named_parameters() if v.requires_grad})


# ---- The objective ----


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_loss_and_gradient_are_equation_4_7(tmp_path, beta):
    trainer = make_trainer(tmp_path, num_self_play_iterations=1, beta=beta)
    trainer.train()
    reference, policy = make_model(trainer.processing_class), trainer.model
    rows = [trainer.game.train[i] for i in range(4)]

    expected = []
    for row in rows:
        real, generated = (
            logp(policy, row["prompt_ids"], row[side]) - logp(reference, row["prompt_ids"], row[side]).detach()
            for side in ("chosen_ids", "rejected_ids")
        )
        expected.append(torch.log1p(torch.exp(-(beta * real - beta * generated))))
    assert_loss_and_gradient(trainer, rows, torch.stack(expected).mean())


def test_iteration_0_is_dpo_trainer_on_the_same_pairs(tmp_path):
    # Bit by bit, so in the same layout and order: `test_layout.py` compares the layouts
    trainer = make_trainer(
        tmp_path / "spin",
        num_self_play_iterations=1,
        num_train_epochs=2,
        share_prefix=False,
        train_sampling_strategy="random",
    )
    trainer.train()
    pairs = load_game(trainer.args.output_dir, 0)["train"]
    pairs = Dataset.from_dict(
        {
            "prompt_ids": pairs["prompt_ids"][:],
            "chosen_ids": pairs["real_ids"][:],
            "rejected_ids": pairs["generated_ids"][:],
        }
    )

    class TokenIdsDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    args = {
        f: getattr(trainer.args, f) for f in DPOConfig.__dataclass_fields__ if DPOConfig.__dataclass_fields__[f].init
    }
    args |= {"precompute_ref_log_probs": True, "output_dir": str(tmp_path / "dpo"), "learning_rate": 1e-3}
    dpo_trainer = TokenIdsDPOTrainer(
        make_model(trainer.processing_class),
        args=DPOConfig(**args),
        train_dataset=pairs,
        processing_class=trainer.processing_class,
    )
    dpo_trainer.train()
    for (name, p), q in zip(trainer.model.named_parameters(), dpo_trainer.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_an_identical_pair_has_zero_gradient_and_costs_nothing(tmp_path):
    trainer = make_trainer(tmp_path, num_self_play_iterations=1)
    trainer.train()
    trainer.model.train()
    game = trainer.game.train
    identical = as_preference({**game.pairs[0][3], "played": False})
    rows = [game[0], identical, game[1], identical]
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    seen = []
    handle = trainer.model.model.register_forward_pre_hook(
        lambda m, a, kw: seen.append(len(kw["input_ids"])), with_kwargs=True
    )

    def loss_and_gradients(skip, inputs):
        game.all_played = not skip
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(inputs))
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in trainer.model.parameters()]

    (loss, gradients), (full_loss, full_gradients) = (loss_and_gradients(skip, inputs) for skip in (True, False))
    assert seen == [2, 4]
    torch.testing.assert_close(loss, full_loss)
    torch.testing.assert_close(gradients, full_gradients)
    # A batch of nothing else still has a loss, ℓ(0), and a gradient, 0
    only = trainer._prepare_inputs(trainer.data_collator([rows[1], rows[3]]))
    loss, gradients = loss_and_gradients(True, only)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-5)
    assert all(g.abs().max() < 1e-5 for g in gradients)
    handle.remove()


def test_empty_and_identical_completions_are_counted_and_contribute_nothing(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id

    def play(path, **kwargs):
        trainer = make_trainer(path, tokenizer, num_self_play_iterations=1, use_script=True, **kwargs)
        completions = [[end], trainer.game.train.rows[1]["real_ids"], [5, 6]] + [[7, end]] * 9
        monkeypatch.setattr(Scripted, "script", staticmethod(lambda prompts: completions[: len(prompts)]))
        trainer.train()
        return trainer, trainer.state.log_history[0]

    trainer, logs = play(tmp_path / "default")
    shares = {k: logs[f"self_play/{k}"] for k in ("empty", "identical", "truncated", "played")}
    assert shares == {k: pytest.approx(v / 12) for k, v in zip(shares, (1, 1, 1, 10), strict=True)}
    game = trainer.game.train
    assert game[0]["rejected_ids"] == game[0]["chosen_ids"]
    # A truncated completion stays open, a complete one has the end token that was sampled
    assert game[2]["rejected_ids"] == [5, 6]
    assert game[3]["rejected_ids"] == [7, end]
    assert first_losses(trainer) == [pytest.approx(math.log(2))]

    assert play(tmp_path / "empty", play_empty_completions=True)[1]["self_play/played"] == pytest.approx(11 / 12)
    assert play(tmp_path / "drop", truncated_completions="drop")[1]["self_play/played"] == pytest.approx(9 / 12)
    trainer, _ = play(tmp_path / "cut", truncated_completions="cut_real")
    assert trainer.game.train[2]["chosen_ids"] == trainer.game.train.rows[2]["real_ids"][:2]


# ---- The game, for every kind of model ----


def make_wide_model():
    return make_model(make_tokenizer(), hidden_size=64)  # blocks of 64 weights are quantized together


@pytest.fixture(params=["full", "lora", "qlora", "adapter"])
def played(request, tmp_path):
    """A run of three iterations: all weights, a LoRA adapter, one on a model in 4 bits, and an adapter that is there."""
    tokenizer = make_tokenizer()
    model = make_wide_model()
    kwargs = {"num_self_play_iterations": 3, "learning_rate": 1e-2 if request.param != "full" else 1e-3}
    if request.param == "qlora":
        model.save_pretrained(tmp_path / "base")
        model = load_in_4bit(tmp_path / "base")
    elif request.param == "adapter":
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(**LORA))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(std=0.1)
    if request.param in ("lora", "qlora"):
        kwargs["peft_config"] = LoraConfig(**LORA)
    initial = {k: v.detach().clone() for k, v in model.named_parameters()}
    trainer = make_trainer(tmp_path / "run", tokenizer, model=model, callbacks=[Snapshots()], **kwargs)
    trainer.train()
    return request.param, trainer, initial


def test_every_iteration_starts_at_ln_2_with_one_model_in_memory(played):
    kind, trainer, initial = played
    tolerance = 1e-5 if kind != "qlora" else 0.01
    assert first_losses(trainer) == [pytest.approx(math.log(2), abs=tolerance)] * 3
    assert trainer.ref_model is None
    assert trainer.shares_prefix
    if kind != "full":
        assert list(trainer.model.peft_config) == ["default"]

    # What should train does, in every layer, and nothing else
    trained = {k: v for k, v in trainer.model.named_parameters() if v.requires_grad}
    snapshots = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Snapshots))
    for name, p in trained.items():
        assert not torch.equal(p, snapshots.steps[0][name]), name
    if kind in ("lora", "qlora"):
        assert all("lora_" in name for name in trained)
    for name, p in trainer.model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if not p.requires_grad and name in initial:
            assert torch.equal(p, initial[name]), name


def test_promotion_makes_the_trained_model_the_reference(played):
    kind, trainer, _ = played
    output_dir = trainer.args.output_dir
    row = load_game(output_dir, 2)["train"][0]
    for iteration, is_reference in ((0, False), (1, True)):  # iteration 2 plays against what iteration 1 made
        directory = f"{output_dir}/iteration-{iteration}"
        if kind == "full":
            model = AutoModelForCausalLM.from_pretrained(directory)
        else:
            base = load_in_4bit(trainer.game.base_model) if kind == "qlora" else make_wide_model()
            model = PeftModel.from_pretrained(base, directory)
        score = logp(model, row["prompt_ids"], row["generated_ids"]).item()
        tolerance = 0.5 if kind == "qlora" else 1e-3  # bfloat16, 0.6 off float32, against an effect of several nats
        assert (score == pytest.approx(row["ref_generated_logps"], abs=tolerance)) == is_reference


def test_each_iteration_is_kept(played):
    kind, trainer, _ = played
    for iteration in range(3):
        directory = f"{trainer.args.output_dir}/iteration-{iteration}"
        names = {path.name for path in Path(directory).iterdir()}
        weights = {name for name in names if name.endswith(".safetensors")}
        assert weights == {"model.safetensors" if kind == "full" else "adapter_model.safetensors"}
        assert {"README.md", "self_play.json", "tokenizer.json"} <= names
        assert "ref" not in names
        AutoTokenizer.from_pretrained(directory)
    if kind == "full":
        last = AutoModelForCausalLM.from_pretrained(directory)
        for p, q in zip(trainer.model.parameters(), last.parameters(), strict=True):
            assert torch.equal(p, q)
    elif kind == "qlora":
        AutoPeftModelForCausalLM.from_pretrained(directory)


def test_a_wrong_reference_stops_the_run(tmp_path):
    trainer = make_trainer(tmp_path)
    callback = callback_of(trainer, SelfPlayCallback)
    swap = callback.swap

    def train_on_another_model(iteration, at_start):
        if iteration == 1:
            trainer.model.lm_head.weight.data.mul_(1.1)
        swap(iteration, at_start)

    callback.swap = train_on_another_model
    with pytest.raises(ValueError, match="Iteration 1 does not start at its opponent"):
        trainer.train()


@pytest.mark.parametrize(
    ("loss_type", "at_zero"),
    [
        (["hinge"], 1.0),
        (["ipo"], (1 / (2 * 1.0)) ** 2),
        (["bco_pair"], 2 * math.log(2)),
        (["apo_zero"], 1.0),
        (["sigmoid", "hinge"], math.log(2) + 1.0),
    ],
    ids=str,
)
def test_losses_of_dpo_trainer(tmp_path, loss_type, at_zero):
    # Some pairs are not played, which only the losses of the margin may leave out of the forward pass
    trainer = make_trainer(tmp_path, num_self_play_iterations=1, loss_type=loss_type, truncated_completions="drop")
    rows = []
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    trainer.train()
    assert 0 < sum(load_game(str(tmp_path), 0)["train"]["played"]) < 12
    assert (sum(rows) < 12) == (set(loss_type) <= {"sigmoid", "hinge"})
    assert first_losses(trainer) == [pytest.approx(at_zero, abs=1e-4)]


def test_live_dropout(tmp_path):
    tokenizer = make_tokenizer()
    trainer = make_trainer(tmp_path / "off", tokenizer, model=make_model(tokenizer, attention_dropout=0.5))
    trainer.train()  # `disable_dropout` holds for attention as well
    with pytest.raises(ValueError, match="dropout"):
        make_trainer(
            tmp_path / "on",
            tokenizer,
            model=make_model(tokenizer, attention_dropout=0.5),
            disable_dropout=False,
        ).train()


# ---- Schedules ----


def test_learning_rate_and_lambda_follow_the_iteration(tmp_path):
    trainer = make_trainer(
        tmp_path,
        num_self_play_iterations=3,
        num_train_epochs=[2, 1],
        learning_rate=[4e-4, 1e-4],
        beta=[0.1, 0.5, 5.0],
        warmup_steps=0.34,
    )
    betas = []
    compute_loss = trainer.compute_loss

    def compute_loss_and_watch(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        if torch.is_grad_enabled():  # not the trial run
            betas.append(trainer.beta)
        return loss

    trainer.compute_loss = compute_loss_and_watch
    trainer.train()
    rates = [logs["learning_rate"] for logs in trainer.state.log_history if "learning_rate" in logs]
    # 3 steps per pass; ceil(0.34 · 6) = 3 and ceil(0.34 · 3) = 2 warm-up steps, then linear decay
    expected = [4e-4 * f for f in (0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)] + 2 * [1e-4 * f for f in (0, 1 / 2, 1)]
    assert rates == pytest.approx(expected)
    assert betas == [0.1] * 6 + [0.5] * 3 + [5.0] * 3


@pytest.mark.parametrize("reset", [True, False])
def test_optimizer_state_is_reset_at_the_boundary(tmp_path, reset):
    steps = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer, **kwargs):
            steps.append(int(next(iter(optimizer.state.values()))["step"]))

    make_trainer(tmp_path, callbacks=[Watch()], reset_optimizer_state=reset).train()
    assert steps == [1, 2, 3] + ([1, 2, 3] if reset else [4, 5, 6])


def test_a_given_optimizer_follows_the_schedule(tmp_path):
    model = make_model(make_tokenizer())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    trainer = make_trainer(tmp_path, model=model, optimizers=(optimizer, None), learning_rate=[1e-2, 1e-3])
    trainer.train()
    rates = [logs["learning_rate"] for logs in trainer.state.log_history if "learning_rate" in logs]
    assert rates == pytest.approx([1e-2 * f for f in (1, 2 / 3, 1 / 3)] + [1e-3 * f for f in (1, 2 / 3, 1 / 3)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match="scheduler"):
        make_trainer(tmp_path, model=model, optimizers=(optimizer, scheduler), learning_rate=[1e-2, 1e-3])
    with pytest.raises(ValueError, match="reduce_lr_on_plateau"):
        make_trainer(tmp_path / "plateau", lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="no").train()


# ---- History, evaluation, resuming ----


def test_history_keeps_completions_and_scores_them_anew(tmp_path):
    trainer = make_trainer(tmp_path, num_self_play_iterations=3, opponent_history=1, num_train_epochs=[1, 2])
    seen = []
    compute_loss = trainer.compute_loss

    def watch(model, inputs, *args, **kwargs):
        _, generated = inputs["input_ids"].chunk(2)
        _, mask = inputs["attention_mask"].chunk(2)
        if trainer.game.iteration == 2:
            seen.extend(row[row_mask.bool()].tolist() for row, row_mask in zip(generated, mask, strict=True))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watch
    trainer.train()
    games = [load_game(str(tmp_path), iteration)["train"] for iteration in range(3)]
    assert [set(game["opponent"][:]) for game in games] == [{0}, {0, 1}, {1, 2}]
    newest, previous = games[2].select(range(12)), games[2].select(range(12, 24))
    assert set(newest["opponent"][:]) == {2} and set(previous["opponent"][:]) == {1}
    assert previous["generated_ids"][:] == games[1].select(range(12))["generated_ids"][:]
    reference = AutoModelForCausalLM.from_pretrained(f"{tmp_path}/iteration-1")
    for pair in (previous[0], newest[0]):
        score = logp(reference, pair["prompt_ids"], pair["generated_ids"]).item()
        assert score == pytest.approx(pair["ref_generated_logps"], abs=1e-3)
    # Two passes play every pair of the two opponents once
    assert sorted(seen) == sorted(pair["prompt_ids"] + pair["generated_ids"] for pair in games[2])
    assert trainer.state.log_history[-1]["epoch"] == 5


def test_the_same_game_is_played_on_held_out_prompts(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset={"a": make_dataset(5), "b": make_dataset(3)})
    trainer.train()
    evaluations = [logs for logs in trainer.state.log_history if "eval_a_nll/real" in logs]
    assert [logs["step"] for logs in evaluations] == [3, 6]
    first = [logs["rewards/accuracies"] for logs in trainer.state.log_history if "self_play/initial_loss" in logs]
    assert first == [0.5, 0.5]  # where all margins are 0, up to rounding
    last = AutoModelForCausalLM.from_pretrained(f"{tmp_path}/iteration-1")
    pairs = load_game(str(tmp_path), 1)["a"]
    nll = -sum(logp(last, p["prompt_ids"], p["real_ids"]).item() for p in pairs) / sum(map(len, pairs["real_ids"]))
    assert evaluations[-1]["eval_a_nll/real"] == pytest.approx(nll, rel=1e-4)
    margins = [
        (logp(last, p["prompt_ids"], p["real_ids"]).item() - p["ref_real_logps"])
        - (logp(last, p["prompt_ids"], p["generated_ids"]).item() - p["ref_generated_logps"])
        for p in pairs
    ]
    assert evaluations[-1]["eval_a_rewards/margins"] == pytest.approx(sum(margins) / len(margins), rel=1e-3)
    assert evaluations[-1]["eval_a_rewards/accuracies"] == sum(m > 0 for m in margins) / len(margins)
    assert trainer.evaluate()["eval_b_nll/real"] > 0
    with pytest.raises(ValueError, match="takes no dataset"):
        trainer.evaluate(make_dataset(3))


@pytest.mark.parametrize(
    "step, options",
    [*((step, {"opponent_history": 1}) for step in (2, 4, 6, 7)), (5, {"prompts_per_iteration": 5})],
)
def test_a_resumed_run_is_the_same_run(tmp_path, caplog, step, options):
    kwargs = {"num_self_play_iterations": 3, "num_train_epochs": [1, 2], "save_strategy": "steps", **options}
    straight = make_trainer(tmp_path / "straight", save_steps=1, **kwargs)
    straight.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == step

    make_trainer(tmp_path / "resumed", save_steps=1, callbacks=[Stop()], **kwargs).train()
    resumed = make_trainer(tmp_path / "resumed", save_steps=1, **kwargs)
    resumed.train(resume_from_checkpoint=True)
    assert "finished" not in caplog.text
    resumed.train(resume_from_checkpoint=True)  # once more
    assert "This run is finished, its 3 iterations are played: nothing is left to do" in caplog.text
    for (name, p), q in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    games = [load_game(str(tmp_path / run), 2)["train"][:] for run in ("straight", "resumed")]
    assert games[0] == games[1]


def test_each_iteration_plays_on_other_prompts_until_they_run_out(tmp_path, capsys):
    kwargs = {"prompts_per_iteration": 5, "num_self_play_iterations": 4, "num_train_epochs": 2}
    trainer = make_trainer(tmp_path, dataset=make_dataset(13), **kwargs)
    trainer.train()
    assert "13 prompts (0 rows left out), 5 others in each iteration" in " ".join(capsys.readouterr().out.split())
    assert trainer.state.global_step == 4 * 2 * 2  # iterations, passes, steps of four rows and of one
    rows = [row for iteration in range(4) for row in load_game(str(tmp_path), iteration)["train"]["row"]]
    assert sorted(rows[:13]) == list(range(13)) and rows[13:] == rows[:7]
    assert rows[:13] != sorted(rows[:13])


def test_runs_are_not_mixed(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="has not started"):
        make_trainer(tmp_path / "eval", eval_dataset=make_dataset(3)).evaluate()
    trainer.train()
    with pytest.raises(ValueError, match="holds a finished run of 2 iterations .* raise `num_self_play_iterations`"):
        make_trainer(tmp_path).train()
    with pytest.raises(ValueError, match="holds the games of another run"):
        make_trainer(tmp_path, num_self_play_iterations=3).train()


def test_before_the_game_the_datasets_hold_prompts_and_real_completions(tmp_path, tokenizer):
    dataset = make_trainer(tmp_path).train_dataset
    assert tokenizer.decode(dataset[1]["prompt_ids"]).startswith("<|im_start|>user\nCount to 2.")
    assert tokenizer.decode(dataset[1]["chosen_ids"]) == "1 2<|im_end|>"
    assert (dataset[1]["rejected_ids"], dataset[1]["weight"]) == ([], 0.0) and "chosen_ids" in dataset.column_names
    batches = [*make_trainer(tmp_path).get_train_dataloader()]
    assert sum(len(batch["weight"]) for batch in batches) == 12 and not any(b["weight"].any() for b in batches)


def test_max_steps_cuts_the_game_short(tmp_path):
    trainer = make_trainer(tmp_path, num_self_play_iterations=3, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4
    assert sorted(p.name for p in tmp_path.glob("iteration-*")) == ["iteration-0"]


# ---- What is refused ----


def test_a_reference_model_contradicts_spin(model, tokenizer, dataset, tmp_path):
    with pytest.raises(ValueError, match="SPIN takes no `ref_model`"):
        SPINTrainer(model, copy.deepcopy(model), make_args(tmp_path), train_dataset=dataset)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"precompute_ref_log_probs": False}, "precompute_ref_log_probs"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "persistent"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"num_train_epochs": 1.5}, "whole passes"),
        ({"beta": []}, "empty list"),
        ({"truncated_completions": "shorten"}, "shorten"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ({"max_grad_norm": float("nan")}, "`max_grad_norm` must be finite"),
        ({"prompt_column": "question"}, "go together"),
    ],
)
def test_options_that_contradict_the_game_are_refused(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **kwargs)


def test_values_per_iteration(tmp_path):
    assert make_args(tmp_path, num_self_play_iterations=3, beta=[0.1, "5"]).per_iteration("beta") == [0.1, 5.0, 5.0]
    with pytest.warns(UserWarning, match="3 values"):  # a recipe of three iterations, cut to two
        args = make_args(tmp_path, num_self_play_iterations=2, beta=[0.1, 0.2, 0.3])
    assert args.per_iteration("beta") == [0.1, 0.2]


@pytest.mark.parametrize("name", ["train", "a/b", "..", "", "a\n", "\x1b[2J", "x" * 300, 3])
def test_names_of_evaluation_datasets(tmp_path, name):
    with pytest.raises(ValueError, match=re.escape(f"cannot be called {name!r}")):
        make_trainer(tmp_path, eval_dataset={name: make_dataset(3)})


def test_datasets_that_cannot_be_played_are_refused(model, tokenizer, dataset, tmp_path):
    def build(**kwargs):
        SPINTrainer(model, args=make_args(tmp_path), processing_class=tokenizer, **kwargs)

    with pytest.raises(TypeError, match="streamed"):
        build(train_dataset=dataset.to_iterable_dataset())
    with pytest.raises(ValueError, match="train dataset is empty"):
        build(train_dataset=dataset.select([]))
    with pytest.raises(ValueError, match="eval dataset is empty"):
        build(train_dataset=dataset, eval_dataset=dataset.select([]))
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        build()
    with pytest.raises(TypeError, match="SPINConfig"):
        SPINTrainer(model, args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=dataset)


def test_a_local_directory_and_a_live_model_are_the_same(model, tokenizer, dataset, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    built = []
    init = LlamaForCausalLM.__init__
    monkeypatch.setattr(
        LlamaForCausalLM, "__init__", lambda self, *a, **kw: (built.append(1), init(self, *a, **kw))[1]
    )
    from_path = SPINTrainer(
        str(tmp_path / "sft"), args=make_args(tmp_path / "a"), train_dataset=dataset.select(range(6))
    )
    from_path.train()
    assert len(built) == 1  # there is never a second model
    live = make_trainer(tmp_path / "b", tokenizer, model=model, dataset=dataset.select(range(6)))
    live.train()
    for p, q in zip(from_path.model.parameters(), live.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert F.mse_loss(p, make_model(tokenizer).lm_head.weight) > 0


def test_a_model_from_another_trainer(dataset, tmp_path):
    trainer = make_trainer(tmp_path / "a")
    trainer.train()
    # The same object goes on, a deep copy of it would generate with the weights of the original
    make_trainer(tmp_path / "b", model=trainer.model).train()
    with pytest.raises(ValueError, match="deep copy"):
        make_trainer(tmp_path / "c", model=copy.deepcopy(trainer.model))
    make_trainer(tmp_path / "d", model=copy.deepcopy(make_model(make_tokenizer())))


def test_default_arguments(model, tokenizer, dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    args = SPINConfig("x", use_cpu=True)
    assert (args.num_train_epochs, args.beta) == (2, 5.0)
    assert args.per_iteration("beta") == [5.0] * 3
    # An adapter needs larger steps. The options stay as they are: both trainers are made from the same ones
    for peft_config, learning_rate in ((LoraConfig(), 1e-5), (None, 5e-7)):
        trainer = SPINTrainer(
            model, args=args, train_dataset=dataset, peft_config=peft_config, processing_class=tokenizer
        )
        assert trainer.args.learning_rate == learning_rate
        model = make_model(tokenizer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for supported in (True, False):
        for module in ("trl_spin.spin_config", "transformers.training_args"):
            monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda supported=supported: supported)
        with nullcontext() if supported else pytest.warns(UserWarning, match="`bf16` is off"):
            assert SPINConfig("x").bf16 == supported
    with pytest.raises(ValueError, match="bf16"):  # which is not changed where it was asked for
        SPINConfig("x", bf16=True)
