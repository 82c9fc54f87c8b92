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

"""Prefix-shared rows against DPOTrainer's padded layout, and batches of similar length."""

import copy
import logging
import math
import random
import re

import numpy as np
import pytest
import torch
from conftest import make_dataset, make_model, make_tokenizer, make_trainer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from trl_spin import layout
from trl_spin.layout import LengthGroupedSampler, forward_shared, supports_shared_prefix


SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention"]
CONFIGS = {
    "llama": LlamaConfig(**SIZE),
    "llama-eager": LlamaConfig(**SIZE, attn_implementation="eager"),
    "qwen2": Qwen2Config(**SIZE),
    "qwen2-window": Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=5, layer_types=MIXED),
    "qwen3": Qwen3Config(**SIZE, head_dim=8),
    "gemma2": Gemma2Config(**SIZE, head_dim=8, sliding_window=5, layer_types=MIXED, attn_implementation="eager"),
    "gemma3": Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=64, layer_types=MIXED),
    "gemma3-window": Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=5, layer_types=MIXED),
    "mistral": MistralConfig(**SIZE, sliding_window=None),
    "mistral-window": MistralConfig(**SIZE, sliding_window=5),
    "phi3": Phi3Config(**SIZE, sliding_window=5),
    "gpt2": GPT2Config(
        **(SIZE | {"initializer_range": 0.3}), n_positions=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
    ),
}


def make_random_model(name, **kwargs):
    torch.manual_seed(0)
    # A copy: `from_config` writes the dtype and the attention implementation into the config
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), **kwargs).eval()


def make_batch(seed=0):
    """Pairs of all lengths: long, short, identical, empty; prompts of one token and of none; cut at `max_length`."""
    rng = random.Random(seed)

    def ids(length):
        return [rng.randrange(3, 97) for _ in range(length)]

    same = ids(6)
    completions = [
        (ids(9), ids(4)),
        (same, same),
        (ids(1), ids(12)),
        (ids(5), []),
        (ids(3), ids(20)),
        ([], ids(2)),
        (ids(3), ids(4)),
    ]
    prompts = [ids(7), ids(3), ids(1), ids(12), ids(15), ids(2), []]
    pairs = zip(prompts, completions, strict=True)
    collator = DataCollatorForPreference(pad_token_id=0, max_length=30)
    rows = [{"prompt_ids": p, "chosen_ids": chosen, "rejected_ids": rejected} for p, (chosen, rejected) in pairs]
    batch = collator(rows)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def both_layouts(model, batch, fields=("log_probs", "entropy", "mean_logits", "log_sum_sq_probs")):
    """Outputs and gradients of the same batch, padded and with shared prefixes."""
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "forward" not in vars(base_model):
        add_fused_lm_head(base_model, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
    results = []
    for shared in (False, True):
        model.zero_grad()
        call = (lambda **inputs: forward_shared(model, base_model, inputs)) if shared else model
        outputs = call(**batch, fused_lm_head=True, use_cache=False)
        # Chosen and rejected completions pull in opposite directions, as in the loss
        signs = torch.tensor([1.0, -0.7]).repeat_interleave(len(outputs.log_probs) // 2)
        (signs @ outputs.log_probs.sum(dim=1)).backward()
        gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        results.append((outputs, gradients))
    (padded, padded_gradients), (shared, shared_gradients) = results
    for name in fields:
        assert torch.allclose(shared[name], padded[name], atol=2e-5, rtol=1e-5), name
    assert torch.equal(shared.is_top1, padded.is_top1)
    assert torch.equal(shared.label_mask, padded.label_mask)
    assert shared_gradients.keys() == padded_gradients.keys() and shared_gradients
    scale = max(g.abs().max() for g in padded_gradients.values())
    for name, gradient in shared_gradients.items():
        torch.testing.assert_close(gradient, padded_gradients[name], atol=2e-6 * scale, rtol=1e-4)


# ---- The same numbers ----


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_and_gradients_are_those_of_the_padded_layout(name, checkpointing):
    model = make_random_model(name)
    assert supports_shared_prefix(model) is None
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    both_layouts(model, make_batch())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters(name, checkpointing):
    model = get_peft_model(
        make_random_model(name), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for parameter_name, p in model.named_parameters():
        if "lora_B" in parameter_name:
            p.data.normal_(std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    assert supports_shared_prefix(model) is None
    both_layouts(model, make_batch())


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_bfloat16(attn_implementation):
    model = make_random_model("llama", dtype=torch.bfloat16, attn_implementation=attn_implementation)
    add_fused_lm_head(model)
    batch = make_batch()
    with torch.no_grad():
        padded = model(**batch, fused_lm_head=True).log_probs
        shared = forward_shared(model, model, batch | {"fused_lm_head": True}).log_probs
        exact = model.float()(**batch, fused_lm_head=True).log_probs
    noise = (padded - exact).abs().sum() / (exact != 0).sum()
    assert (shared - exact).abs().sum() / (exact != 0).sum() < 2 * noise
    assert torch.isfinite(shared).all()


def test_only_what_is_unique_is_computed_and_only_completions_go_through_the_head(monkeypatch):
    model = make_random_model("llama")
    add_fused_lm_head(model)
    seen = {}
    apply = layout.trl.trainer.utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        layout.trl.trainer.utils._ChunkedLogProbFunction,
        "apply",
        lambda hidden, *args: (seen.update(head=len(hidden)), apply(hidden, *args))[1],
    )
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(rows=kwargs["input_ids"].shape), with_kwargs=True
    )
    batch = make_batch()
    forward_shared(model, model, batch | {"fused_lm_head": True})
    num_pairs = len(batch["labels"]) // 2
    num_labels = (batch["labels"][:, 1:] != -100).sum(dim=1)
    lengths = batch["attention_mask"].sum(dim=1)[:num_pairs] + num_labels[num_pairs:] - 1
    assert seen == {"rows": (num_pairs, lengths.max()), "head": num_labels.sum()}
    model(**batch, fused_lm_head=True)  # elsewhere, TRL's head is as it was
    assert seen["head"] == batch["labels"][:, 1:].numel()


def test_rows_are_filled_up_to_a_multiple(tmp_path):
    trainer = make_trainer(tmp_path, pad_to_multiple_of=16, num_self_play_iterations=1)
    widths = set()
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.add(kwargs["input_ids"].shape[1]) if module.training else None,
        with_kwargs=True,
    )
    trainer.train()
    assert trainer.shares_prefix and widths and all(width % 16 == 0 for width in widths)
    plain = make_trainer(tmp_path / "plain", num_self_play_iterations=1)
    plain.train()
    for name, p in plain.model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), p, atol=1e-5, rtol=1e-4, msg=name)


# ---- Wrong layouts are caught ----


def no_mask(model, branch, position_ids):
    return torch.ones(branch.size(1), branch.size(1), dtype=torch.bool).tril().expand(len(branch), 1, -1, -1)


def prompt_unseen(model, branch, position_ids):
    return no_mask(model, branch, position_ids) & (branch[:, None, :, None] == branch[:, None, None, :])


def no_window(model, branch, position_ids):
    return masks(model, branch, position_ids)["full_attention"]


masks, share = layout._attention_masks, layout._share


def positions_go_on(*args):
    rows, branch, index = share(*args)
    rows["position_ids"] = torch.arange(branch.size(1)).expand_as(branch)
    return rows, branch, index


@pytest.mark.parametrize(
    ("name", "function", "wrong"),
    [
        ("llama", "_attention_masks", no_mask),
        ("llama", "_attention_masks", prompt_unseen),
        ("gpt2", "_attention_masks", no_mask),
        ("llama", "_share", positions_go_on),
        ("gpt2", "_share", positions_go_on),
        ("gemma3-window", "_attention_masks", no_window),
    ],
)
def test_a_wrong_layout_is_caught(monkeypatch, name, function, wrong):
    monkeypatch.setattr(layout, function, wrong)
    with pytest.raises(AssertionError, match="log_probs"):
        both_layouts(make_random_model(name), make_batch())


@pytest.mark.parametrize(
    ("function", "wrong"), [("_attention_masks", no_mask), ("_share", positions_go_on)], ids=["mask", "positions"]
)
def test_a_model_that_mixes_the_completions_is_detected_at_the_start(tmp_path, monkeypatch, caplog, function, wrong):
    monkeypatch.setattr(layout, function, wrong)
    trainer = make_trainer(tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "do not keep the completions apart" in caplog.text
    assert not trainer.shares_prefix


# ---- Falling back ----


def hybrid_config():
    return AutoConfig.for_model(
        "qwen3_next",
        **SIZE,
        layer_types=["linear_attention", "full_attention"],
        **{"head_dim": 8, "num_experts": 0, "mlp_only_layers": [0, 1], "linear_num_value_heads": 2},
        **{"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    )


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: get_peft_model(
                make_random_model("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
            ),
            "virtual tokens",
        ),
        (lambda: make_random_model("llama", attn_implementation="flex_attention"), "'flex_attention'"),
        (lambda: AutoModelForCausalLM.from_config(hybrid_config()), "linear_attention"),
        (
            lambda: AutoModelForCausalLM.from_config(
                AutoConfig.for_model("bloom", vocab_size=97, hidden_size=32, n_layer=1, n_head=2)
            ),
            "position_ids",
        ),
        (
            lambda: AutoModelForCausalLM.from_config(
                AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=1)
            ),
            "sdpa|position_ids",
        ),
    ],
    ids=["prompt-tuning", "flex", "hybrid", "alibi", "state-space"],
)
def test_reasons(model, reason):
    assert re.search(reason, supports_shared_prefix(model()))


class Leaky(nn.Module):
    """A layer as in a recurrent model: what comes later depends on all that was before, whatever the mask."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + hidden_states.cumsum(dim=1) / 10


def test_a_model_with_unknown_layers_falls_back_and_says_so_once(tmp_path, caplog):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, Leaky())
    trainer = make_trainer(tmp_path, tokenizer, model=model)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count("Prompts are computed twice") == 1
    assert "do not keep the completions apart" in caplog.text


def test_a_collator_of_ones_own_keeps_the_padded_layout(tmp_path, caplog):
    class Collator(DataCollatorForPreference):
        pass

    tokenizer = make_tokenizer()
    trainer = make_trainer(tmp_path, tokenizer, data_collator=Collator(pad_token_id=tokenizer.pad_token_id))
    trainer.train()
    assert "`data_collator`" in caplog.text


# ---- The same training ----


@pytest.mark.parametrize("kind", ["full", "lora", "sft loss", "weighting", "not all played"])
def test_training_is_that_of_the_padded_layout(tmp_path, kind, caplog):
    kwargs = {"optim": "sgd", "learning_rate": 1e-2, "num_train_epochs": 2}
    if kind == "lora":
        kwargs["peft_config"] = LoraConfig(r=4, target_modules="all-linear")
    elif kind == "not all played":
        kwargs |= {"truncated_completions": "drop", "max_completion_length": 40}
    elif kind == "sft loss":
        kwargs["loss_type"] = ["sigmoid", "sft"]
    elif kind == "weighting":
        kwargs["use_weighting"] = True
    trainers = []
    for share_prefix in (True, False):
        trainer = make_trainer(
            tmp_path / str(share_prefix), share_prefix=share_prefix, eval_dataset=make_dataset(5), **kwargs
        )
        trainer.train()
        assert trainer.shares_prefix == share_prefix
        trainers.append(trainer)
    assert "Prompts are computed twice" not in caplog.text
    shared, padded = trainers
    for (name, p), q in zip(shared.model.named_parameters(), padded.model.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], atol=1e-5, rtol=1e-3, msg=name)
    for logs, others in zip(shared.state.log_history, padded.state.log_history, strict=True):
        assert logs.keys() == others.keys()
        for key in logs:
            if key.endswith("computed_over_unique_tokens"):
                assert logs[key] < 1.3 < others[key]
            # Where margins are 0, or two scores the same, rounding decides which is above
            elif not any(word in key for word in ("second", "time", "flos", "rewards/accuracies", "auc_")):
                assert logs[key] == pytest.approx(others[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize(
    "kwargs", [{"bf16": True}, {"gradient_checkpointing": True}], ids=["autocast", "checkpointing"]
)
def test_mixed_precision_and_checkpointing(tmp_path, kwargs):
    trainer = make_trainer(tmp_path, **kwargs)
    trainer.train()
    assert trainer.shares_prefix
    assert trainer.state.log_history[1]["self_play/initial_loss"] == pytest.approx(math.log(2), abs=1e-2)


def test_logits_of_the_padded_batch_for_compute_metrics(tmp_path):
    shapes = []
    trainer = make_trainer(
        tmp_path,
        eval_dataset=make_dataset(4),
        per_device_eval_batch_size=4,
        compute_metrics=lambda prediction: shapes.append(prediction.predictions.shape) or {},
    )
    trainer.train()
    assert trainer.shares_prefix
    longest = max(
        len(pair["prompt_ids"]) + max(len(pair["real_ids"]), len(pair["generated_ids"]))
        for pair in trainer.game.datasets["eval"].pairs[0]
    )
    assert shapes[-1] == (8, longest, len(trainer.processing_class))


def test_a_mixture_of_experts_falls_back_where_its_router_is_trained(tmp_path, caplog):
    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(
        "mixtral", **(SIZE | {"vocab_size": len(tokenizer)}), num_local_experts=2, num_experts_per_tok=1
    )
    trainer = make_trainer(tmp_path, tokenizer, model=AutoModelForCausalLM.from_config(config))
    trainer.train()
    assert "auxiliary loss" in caplog.text


# ---- Batches ----


def ultrachat_lengths(num_rows, seed=0):
    """Prompts, real and generated completions as long as in UltraChat, roughly."""
    rng = np.random.default_rng(seed)
    prompt = np.clip(rng.lognormal(np.log(130), 0.95, num_rows), 1, 512).astype(int)
    real = np.minimum(np.clip(rng.lognormal(np.log(260), 0.55, num_rows), 1, None).astype(int), 1024 - prompt)
    return prompt, real, np.clip(rng.lognormal(np.log(260), 0.6, num_rows), 1, 256).astype(int)


@pytest.mark.parametrize(("num_rows", "step_size"), [(20_000, 8), (20_000, 64), (1003, 8), (12, 4), (7, 8), (5, 1)])
def test_order_of_the_rows(num_rows, step_size):
    lengths = sum(ultrachat_lengths(num_rows))
    epoch = iter((0, 1, 1))
    sampler = LengthGroupedSampler(num_rows, lambda: lengths, step_size, seed=1, epoch=lambda: next(epoch))
    assert len(sampler) == num_rows
    epochs = [list(sampler) for _ in range(3)]
    assert epochs[0] != epochs[1] == epochs[2] or num_rows < 10
    for order in epochs:
        assert sorted(order) == list(range(num_rows))
        assert lengths[order[:step_size]].max() == lengths.max()
    steps = lengths[epochs[0][: num_rows // step_size * step_size]].reshape(-1, step_size)
    if num_rows >= 20_000:
        assert (steps.max(axis=1) * step_size).sum() / steps.sum() < 1.05
        # No order in time: the first half of the epoch is as long as the second
        first, second = np.array_split(steps.mean(axis=1), 2)
        assert first.mean() == pytest.approx(second.mean(), rel=0.1)


def test_lengths_are_those_of_the_epoch(tmp_path):
    trainer = make_trainer(tmp_path, opponent_history=1, truncated_completions="drop")
    trainer.train()
    game = trainer.game.train
    assert len(game.pairs) == 2 and not all(game.pairs[0]["played"])
    epochs = []
    for game.epoch in (0, 1):
        rows = [game[i] for i in range(len(game))]
        epochs.append([sum(len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")) for row in rows])
        assert game.lengths().tolist() == epochs[-1]
    assert epochs[0] != epochs[1]


def test_batches_are_grouped_and_the_longest_comes_first(tmp_path):
    batches = []

    def run(name, **kwargs):
        batches.clear()
        dataset = make_dataset(40).map(lambda row, i: {"messages": lengthen(row["messages"], i)}, with_indices=True)
        trainer = make_trainer(tmp_path / name, dataset=dataset, per_device_train_batch_size=2, **kwargs)
        compute_loss = trainer.compute_loss

        def watch(model, inputs, *args, **kwargs):
            if torch.is_grad_enabled():  # not the trial run
                batches.append(inputs["attention_mask"].sum(dim=1).reshape(2, -1).sum(dim=0).tolist())
            return compute_loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = watch
        trainer.train()
        ratios = [logs.get("computed_over_unique_tokens") for logs in trainer.state.log_history]
        ratios = [ratio for ratio in ratios if ratio is not None]
        return sum(ratios) / len(ratios)

    def lengthen(messages, i):
        return [messages[0], {**messages[1], "content": messages[1]["content"] * (1 + 7 * (i % 5))}]

    grouped = run("grouped")
    assert max(batches[0]) == max(map(max, batches[:20])) and max(batches[20]) == max(map(max, batches[20:]))
    assert grouped < run("random", train_sampling_strategy="random")


def test_short_rows_stay_mixed():
    """Completions that were cut short are spread over the steps, as in a random order."""
    lengths = np.full(6400, 24)
    lengths[:320] = 20
    order = np.array(list(LengthGroupedSampler(6400, lambda: lengths, 64, seed=0, epoch=lambda: 0)))
    assert (lengths[order].reshape(-1, 64) == 20).sum(axis=1).max() < 16
