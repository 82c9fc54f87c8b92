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

"""SharedPrefixDPOTrainer against DPOTrainer, on ordinary preference data."""

import copy
import logging

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_spin import SharedPrefixDPOTrainer
from trl_spin.layout import LengthGroupedSampler


LOSS_TYPES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
OVERRIDES = {"_compute_loss", "_get_eval_sampler", "_get_train_sampler", "compute_ref_log_probs", "log"}


def make_preferences(num_rows=8, conversational=False):
    """Pairs of many lengths, some of them much longer than the others."""
    rows = []
    for i in range(num_rows):
        prompt, chosen, rejected = f"Count to {i}:" + i % 3 * " please", " 1" * (i % 5 + 1), " 2" * (5 * i % 7 + 1)
        if conversational:
            prompt = [{"role": "user", "content": prompt}]
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def make_trainer(cls, tmp_path, model=None, dataset=None, ref_model=None, **kwargs):
    tokenizer = make_tokenizer()
    names = ("peft_config", "data_collator", "eval_dataset", "compute_metrics")
    trainer_kwargs = {name: kwargs.pop(name) for name in names if name in kwargs}
    defaults = {
        "output_dir": str(tmp_path / cls.__name__),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return cls(
        copy.deepcopy(make_model(tokenizer) if model is None else model),
        ref_model=copy.deepcopy(ref_model),
        args=DPOConfig(**(defaults | kwargs)),
        train_dataset=dataset or make_preferences(),
        processing_class=tokenizer,
        **trainer_kwargs,
    )


def make_trainers(tmp_path, **kwargs):
    """Two trainers that differ in their class only, whose policy is not its reference."""
    if "ref_model" not in kwargs and "peft_config" not in kwargs and not isinstance(kwargs.get("model"), PeftModel):
        kwargs["ref_model"] = None if kwargs.get("precompute_ref_log_probs") else make_model(make_tokenizer())
    trainers = [make_trainer(cls, tmp_path, **kwargs) for cls in (SharedPrefixDPOTrainer, DPOTrainer)]
    for trainer in trainers:
        perturb(trainer.model)
    return trainers


def perturb(model):
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.requires_grad and ".ref." not in name:
            p.data += 0.05 * torch.randn(p.shape, generator=generator)


def loss_and_gradients(trainer, num_rows=6):
    model = trainer.model
    inputs = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(num_rows)]))
    shapes, hooks = [], []
    for part in filter(None, (trainer.ref_model, model)):
        backbone = (part.get_base_model() if isinstance(part, PeftModel) else part).model
        hooks.append(
            backbone.register_forward_pre_hook(
                lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
            )
        )
    model.train()
    model.zero_grad()
    trainer._metrics["train"].clear()
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, inputs)
    loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, shapes, dict(trainer._metrics["train"])


def assert_same(shared, plain, num_rows=6):
    (loss, gradients, shapes, metrics), expected = loss_and_gradients(shared), loss_and_gradients(plain)
    assert shared.shares_prefix is True
    # Policy and reference see one row per pair, where DPOTrainer has two. Two pairs are compared first, in both layouts
    assert num_rows in {shape[0] for shape in shapes} <= {num_rows, 2, 4}
    assert {shape[0] for shape in expected[2]} == {2 * num_rows}
    assert len(shapes) - 4 <= len(expected[2]) <= len(shapes)
    assert loss == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert gradients.keys() == expected[1].keys() and gradients
    scale = max(gradient.abs().max() for gradient in expected[1].values())
    assert scale > 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], atol=1e-5 * scale, rtol=1e-3, msg=name)
    assert metrics.pop("tokens") and metrics.keys() == expected[3].keys()
    for name, values in metrics.items():
        assert values == pytest.approx(expected[3][name], rel=1e-4, abs=1e-5), name
    assert metrics["rewards/margins"] != [0.0]  # the policy is not the reference


# ---- The same loss and gradients ----


@pytest.fixture(scope="module", params=["ref model", "precomputed", "lora", "lora, precomputed", "existing adapter"])
def trainers(request, tmp_path_factory):
    kwargs = {"precompute_ref_log_probs": "precomputed" in request.param}
    if "lora" in request.param:
        kwargs["peft_config"] = LoraConfig(**LORA)
    elif request.param == "existing adapter":
        kwargs["model"] = get_peft_model(make_model(make_tokenizer()), LoraConfig(**LORA))
        perturb(kwargs["model"])
    trainers = make_trainers(tmp_path_factory.mktemp("run"), **kwargs)
    assert trainers[0].shares_prefix is (True if kwargs["precompute_ref_log_probs"] else None)
    return trainers


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradients_are_those_of_dpo_trainer(trainers, loss_type):
    for trainer in trainers:
        trainer.loss_types = [loss_type]
        trainer.label_smoothing = 0.1 if loss_type in ("exo_pair", "robust") else 0.0
    assert_same(*trainers)


@pytest.mark.parametrize(
    "options",
    [
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"ld_alpha": 0.5, "precompute_ref_log_probs": True},
        {"f_divergence_type": "js_divergence"},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"label_smoothing": 0.2},
        {"pad_to_multiple_of": 16},
        {"max_length": 20},
        {"max_length": 20, "precompute_ref_log_probs": True},
        {"gradient_checkpointing": False},
    ],
    ids=", ".join,
)
def test_options(tmp_path, options):
    assert_same(*make_trainers(tmp_path, **options))


def test_conversations(tmp_path):
    assert_same(*make_trainers(tmp_path, dataset=make_preferences(conversational=True)))


def test_pairs_without_a_common_prompt(tmp_path):
    rows = [{"chosen": f"{i} is even", "rejected": f"{i + 1} is odd" * (i % 3 + 1)} for i in range(8)]
    shared, plain = make_trainers(tmp_path, dataset=Dataset.from_list(rows))
    assert not any(shared.train_dataset["prompt_ids"])
    assert_same(shared, plain)


def test_a_saved_model_brings_its_reference(tmp_path):
    make_model(make_tokenizer()).save_pretrained(tmp_path / "model")
    assert_same(*make_trainers(tmp_path, model=str(tmp_path / "model"), ref_model=None))


def test_mixed_precision_trains_every_weight_at_the_first_step(tmp_path):
    shared, plain = make_trainers(tmp_path, bf16=True)
    (loss, gradients, *_), (expected_loss, expected, *_) = loss_and_gradients(shared), loss_and_gradients(plain)
    assert shared.shares_prefix is True
    assert loss == pytest.approx(expected_loss, rel=0.05)
    assert gradients.keys() == expected.keys()
    difference = sum((gradients[name] - expected[name]).square().sum() for name in expected)
    assert difference < 0.1**2 * sum(gradient.square().sum() for gradient in expected.values())


# ---- The same training and evaluation ----


@pytest.mark.parametrize("kind", ["ref model", "precomputed", "lora"])
def test_training_and_evaluation_end_at_the_same_numbers(tmp_path, kind):
    kwargs = {"peft_config": LoraConfig(**LORA)} if kind == "lora" else {}
    shared, plain = make_trainers(
        tmp_path,
        precompute_ref_log_probs=kind == "precomputed",
        eval_dataset=make_preferences(5),
        eval_strategy="epoch",
        num_train_epochs=2,
        **kwargs,
    )
    logs = []
    for trainer in (shared, plain):
        trainer.train()
        logs.append(trainer.state.log_history)
    assert shared.shares_prefix is True and shared.precompute_ref_logps == (kind == "precomputed")
    for (name, p), (_, q) in zip(shared.model.named_parameters(), plain.model.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-3, msg=name)
    for entry, expected in zip(*logs, strict=True):
        ratio = entry.pop("computed_over_unique_tokens", None)
        assert (ratio is not None) == ("loss" in entry) and (ratio is None or ratio < 1.6)
        assert entry.keys() == expected.keys()
        for name, value in entry.items():
            if not any(word in name for word in ("second", "time", "flos")):
                assert value == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


def test_evaluation_before_training_and_logits_for_compute_metrics(tmp_path):
    shapes = []

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {}

    trainers = make_trainers(tmp_path, eval_dataset=make_preferences(4), compute_metrics=compute_metrics)
    metrics = [trainer.evaluate() for trainer in trainers]
    assert trainers[0].shares_prefix is True
    assert metrics[0]["eval_loss"] == pytest.approx(metrics[1]["eval_loss"], rel=1e-5)
    assert shapes[0] == shapes[1]  # DPOTrainer's two rows per pair


# ---- Batches of similar length ----


def watch_batches(trainer):
    batches = []
    compute_loss = trainer.compute_loss

    def watch(model, inputs, *args, **kwargs):
        batches.append(inputs["input_ids"].tolist())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = watch
    return batches


def test_batches_are_grouped_by_length_and_resumed_in_the_middle_of_an_epoch(tmp_path):
    kwargs = {
        "dataset": make_preferences(23),
        "precompute_ref_log_probs": True,
        "train_sampling_strategy": "group_by_length",
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 4,  # of 3 per epoch
        "per_device_eval_batch_size": 4,
        "eval_dataset": make_preferences(9),
        "max_length": 32,
    }
    trainer = make_trainer(SharedPrefixDPOTrainer, tmp_path, **kwargs)
    batches = watch_batches(trainer)
    trainer.train()

    rows = [trainer.train_dataset[i] for i in range(23)]
    cut = [
        {k: v[: 32 - len(row["prompt_ids"])] for k, v in row.items() if k in ("chosen_ids", "rejected_ids")}
        for row in rows
    ]
    lengths = np.array(
        [len(row["prompt_ids"]) + sum(map(len, ids.values())) for row, ids in zip(rows, cut, strict=True)]
    )
    expected = []
    for epoch in range(2):
        order = list(LengthGroupedSampler(23, lambda: lengths, 4, trainer.args.seed, lambda epoch=epoch: epoch))
        assert lengths[order[:4]].max() == lengths.max()
        for start in range(0, 23, 4):
            batch = trainer.data_collator([rows[i] for i in order[start : start + 4]])
            expected.append(batch["input_ids"].tolist())
    assert batches == expected and expected[:6] != expected[6:]

    weights = {name: p.clone() for name, p in trainer.model.named_parameters()}
    resumed = make_trainer(SharedPrefixDPOTrainer, tmp_path, **kwargs)
    batches = watch_batches(resumed)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-4")
    assert batches == expected[8:]
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, weights[name]), name

    batches.clear()
    resumed.evaluate()
    assert len({len(row) for row in batches[0]}) == 1 and len(batches) == 3
    assert len(batches[0][0]) == max(len(batch[0]) for batch in batches)


# ---- Falling back ----


class Leaky(nn.Module):
    """A layer as in a recurrent model: what comes later depends on all that was before, whatever the mask."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + hidden_states.cumsum(dim=1) / 10


def leaky_model():
    model = make_model(make_tokenizer())
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, Leaky())
    return model


def stubborn_model():
    model = make_model(make_tokenizer())

    def refuse(module, args, kwargs):
        if kwargs["position_ids"].unique(dim=0).size(0) > 1:
            raise NotImplementedError("positions per row")

    model.model.layers[0].register_forward_pre_hook(refuse, with_kwargs=True)
    return model


def mixture_of_experts():
    size = {"vocab_size": len(make_tokenizer()), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **size, **heads))


class OwnCollator(DataCollatorForPreference):
    pass


FALLBACKS = {
    "keep_end": (lambda: {"truncation_mode": "keep_end"}, "cuts the prompt differently"),
    "collator": (
        lambda: {"data_collator": OwnCollator(pad_token_id=make_tokenizer().pad_token_id)},
        "`data_collator`",
    ),
    "router": (lambda: {"model": mixture_of_experts(), "ref_model": mixture_of_experts()}, "auxiliary loss"),
    "policy": (
        lambda: {"model": leaky_model(), "ref_model": make_model(make_tokenizer())},
        "keep the completions apart",
    ),
    "reference": (lambda: {"ref_model": leaky_model()}, "keep the completions apart"),
    "error": (lambda: {"model": stubborn_model()}, "NotImplementedError: positions per row"),
}


@pytest.mark.parametrize(
    ("name", "precompute"),
    [(name, False) for name in FALLBACKS] + [(name, True) for name in ("keep_end", "collator", "policy", "reference")],
)
def test_falling_back(tmp_path, caplog, name, precompute):
    kwargs, reason = FALLBACKS[name][0](), FALLBACKS[name][1]
    kwargs.setdefault("ref_model", make_model(make_tokenizer()))
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            SharedPrefixDPOTrainer, tmp_path, precompute_ref_log_probs=precompute, num_train_epochs=1, **kwargs
        )
        assert trainer.shares_prefix is (False if precompute else None)
        trainer.train()
    assert trainer.shares_prefix is False
    assert caplog.text.count("Prompts are computed twice") == 1 and reason in caplog.text
    assert all(logs["computed_over_unique_tokens"] > 1.5 for logs in trainer.state.log_history if "loss" in logs)


def test_reasons_that_are_known_without_a_forward_pass(tmp_path, caplog):
    flex = make_model(make_tokenizer(), attn_implementation="flex_attention")
    trainer = make_trainer(SharedPrefixDPOTrainer, tmp_path, ref_model=flex)
    inputs = trainer.data_collator([trainer.train_dataset[0]])
    for reason in ("attn_implementation='flex_attention'", "the dataset has images"):
        trainer.choose_layout(inputs)
        assert trainer.shares_prefix is False and reason in caplog.text
        trainer._is_vision_dataset = True


def test_the_padded_layout_can_be_chosen(tmp_path, caplog):
    class Padded(SharedPrefixDPOTrainer):
        share_prefix = False

    trainer = make_trainer(Padded, tmp_path, ref_model=make_model(make_tokenizer()))
    trainer.train()
    assert trainer.shares_prefix is False and "Prompts are computed twice" not in caplog.text


def test_a_failed_comparison_decides_nothing(tmp_path, monkeypatch):
    trainer = make_trainer(SharedPrefixDPOTrainer, tmp_path, ref_model=make_model(make_tokenizer()))
    token_logps = trainer.token_logps

    def run_out_of_memory(*args):
        if trainer.shares_prefix:
            raise torch.OutOfMemoryError
        return token_logps(*args)

    monkeypatch.setattr(trainer, "token_logps", run_out_of_memory)
    trainer.model.train()
    with pytest.raises(torch.OutOfMemoryError):
        loss_and_gradients(trainer)
    assert trainer.shares_prefix is None and trainer.model.training and not trainer.precompute_ref_logps


# ---- What it relies on ----


def test_overrides_exist_upstream_and_are_called(tmp_path, monkeypatch):
    own = {name for name, value in vars(SharedPrefixDPOTrainer).items() if callable(value) and name[:2] != "__"}
    assert {name for name in own if hasattr(DPOTrainer, name)} == OVERRIDES
    called = set()
    for name in OVERRIDES:
        function = vars(SharedPrefixDPOTrainer)[name]

        def spy(*args, name=name, function=function, **kwargs):
            called.add(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(SharedPrefixDPOTrainer, name, spy)
    kwargs = {"ref_model": make_model(make_tokenizer()), "eval_dataset": make_preferences(4), "eval_strategy": "epoch"}
    make_trainer(SharedPrefixDPOTrainer, tmp_path, num_train_epochs=1, **kwargs).train()
    assert called == OVERRIDES
