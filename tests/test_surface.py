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

"""What users and TRL see of the package: names, options, and the places where it takes hold of its parents."""

import ast
import inspect
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import numpy
import pytest
import torch
import trl.trainer.dpo_trainer
import trl.trainer.utils
from bitsandbytes.nn import Linear4bit
from conftest import make_args, make_dataset, make_model, make_tokenizer, make_trainer
from huggingface_hub import HfApi, RepoUrl
from peft import LoraConfig
from torch.optim.lr_scheduler import LambdaLR
from transformers import HfArgumentParser, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, ModelConfig, ScriptArguments

import trl_spin
from trl_spin import SharedPrefixDPOTrainer, SPINConfig, SPINTrainer
from trl_spin.spin_config import PER_ITERATION


OPTIONS = SPINConfig.__dataclass_fields__
OWN_OPTIONS = sorted(OPTIONS.keys() - DPOConfig.__dataclass_fields__.keys())
# Options of DPOConfig with another default here, and why
OTHER_DEFAULTS = {
    "learning_rate": "the paper's first",
    "num_train_epochs": "the paper's, which are those of an iteration",
    "beta": "an iteration ends on the data at λ = 1",
    "gradient_checkpointing": "decided by the memory there is",
    "hub_strategy": "all others upload the games, and with them the data",
    "precompute_ref_log_probs": "the reference is the policy at the start of an iteration",
    "save_total_limit": "there is a checkpoint stream over all iterations",
    "train_sampling_strategy": "less padding",
}

# Methods of DPOTrainer and Trainer, public or not, that are overridden and that these must go on calling. TRL changes
# monthly, and an override that nothing calls any more raises nothing.
OVERRIDES = {
    SPINTrainer: """
        _build_accelerator_args _compute_loss _get_output_dir _init_training_state _load_from_checkpoint
        _precompute_ref_logps _prepare_dataset _save _save_checkpoint _set_signature_columns_if_needed
        compute_ref_log_probs create_model_card create_scheduler evaluate get_optimizer_cls_and_kwargs log push_to_hub
        set_initial_training_values train
    """.split(),
    SharedPrefixDPOTrainer: """
        _compute_loss _get_eval_sampler _get_train_sampler compute_ref_log_probs log
    """.split(),
}
# Not called in a run: the first has a test of its own, the second is replaced in SPINTrainer
NOT_CALLED = {(SPINTrainer, "push_to_hub"), (SharedPrefixDPOTrainer, "compute_ref_log_probs")}
# What is read or set of a trainer, and elsewhere
ATTRIBUTES = """
    _created_lr_scheduler _globalstep_last_logged _is_vision_dataset _load_from_checkpoint _metrics _prepare_inputs
    _signature_columns _tokenizer _total_loss_scalar _total_train_tokens _tr_loss aux_loss_enabled beta loss_types loss_weights precompute_ref_logps use_weighting
""".split()
ELSEWHERE = {
    (trl.trainer.dpo_trainer, "hash_module"),
    (trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE"),
    (trl.trainer.utils, "_use_triton"),
    (TrainingArguments, "_VALID_DICT_FIELDS"),
}


def default_of(config, name):
    field = config.__dataclass_fields__[name]
    return field.default_factory() if callable(field.default_factory) else field.default


def test_exported_names():
    assert trl_spin.__all__ == [
        "SPINConfig",
        "SPINTrainer",
        "SelfPlayCallback",
        "SharedPrefixDPOTrainer",
        "load_game",
        "probe",
    ]
    assert all(getattr(trl_spin, name).__name__ == name for name in trl_spin.__all__)
    with pytest.raises(AttributeError):
        trl_spin.Nothing  # noqa: B018


def test_importing_has_no_side_effects():
    code = (
        "import sys; before = set(sys.modules); import trl_spin; print(set(sys.modules) & {'torch', 'transformers'})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# ---- Options ----


def test_every_option_has_help_that_can_be_printed():
    shown = HfArgumentParser(SPINConfig).format_help()
    assert "%%" not in shown
    for name, option in OPTIONS.items():
        if option.init:
            assert f"--{name}" in shown
            assert option.metadata.get("help", "").strip(), name
    assert "the 95% interval of the accuracy" in " ".join(shown.split())  # from the docstring, with its per cent sign
    assert "[`" not in "".join(OPTIONS[name].metadata["help"] for name in OWN_OPTIONS)  # nor with its links


@pytest.mark.parametrize("other", [ModelConfig, ScriptArguments])
def test_the_command_line_can_tell_options_apart(other):
    assert not {*OWN_OPTIONS} & other.__dataclass_fields__.keys()


def test_options_of_dpo_and_grpo_have_their_defaults():
    for name in OWN_OPTIONS:
        if name in GRPOConfig.__dataclass_fields__ and name != "vllm_mode":
            assert default_of(SPINConfig, name) == default_of(GRPOConfig, name), name
    others = {
        name for name in DPOConfig.__dataclass_fields__ if default_of(SPINConfig, name) != default_of(DPOConfig, name)
    }
    assert others == OTHER_DEFAULTS.keys()


VALUES = [None, True, False, -1, 0, 0.5, 1, 1.5, math.nan, math.inf, "", "false", "1e-3", '{"a": 1}', "{a", {"a": 1}]
VALUES += [{}, [], [1, 0.5], [-1], [math.nan], [True], ["1e-3"], ["hinge"], numpy.float32(0.5), numpy.int64(3)]
TAKEN = {  # which of the numbers from -1 to 1.5 an option takes
    "0 1": "opponent_history held_out_size num_probes top_k",
    "1": "num_self_play_iterations num_train_epochs max_prompts prompts_per_iteration max_completion_length "
    "generation_token_budget",
    "0 0.5 1 1.5": "sft_weight temperature eval_temperature step_size_search",
    "0 0.5 1": "min_p",
    "0.5 1": "top_p",
    "0.5 1 1.5": "learning_rate beta space_mu loss_weights initial_loss_tolerance repetition_penalty compare_sft",
}


@pytest.mark.parametrize("name", sorted({*OWN_OPTIONS, *PER_ITERATION, "loss_weights", "loss_type"}))
def test_an_option_is_refused_by_its_name_or_means_what_it_says(tmp_path, name):
    types, numbers = f"{inspect.formatannotation(get_type_hints(SPINConfig)[name])} NoneType", []
    types = types.replace("float", "float int")  # whole passes
    others = {"loss_type": ["space"]} if name == "space_mu" else {}  # without which it would mean nothing
    for value in VALUES:
        try:
            stored = getattr(make_args(tmp_path, **others | {name: value}), name)
        except (ValueError, TypeError) as error:
            assert f"`{name}" in str(error), value
            continue
        stored, value = (v[0] if isinstance(v, list) else v for v in (stored, value))
        assert type(stored).__name__ in types and isinstance(stored, bool) == isinstance(value, bool)
        assert stored == value or stored == json.loads(value)  # 1e-3 is a number in JSON
        if type(value) in (int, float):
            assert math.isfinite(value)
            numbers.append(value)
    expected = [taken for taken, names in TAKEN.items() if name in names.split()]
    assert name.startswith("vllm_") or " ".join(map(str, dict.fromkeys(numbers))) == "".join(expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts_per_iteration": 2, "opponent_history": 1}, "needs the same prompts.* got 2"),
        ({"use_vllm": True, "vllm_mode": "server"}, "`vllm_mode` must be .*'offline'.*, got 'server'"),
        ({"vllm_python": "python"}, "`vllm_python='python'` means nothing to .*'generate'"),
        ({"generation_kwargs": {"top_p": 0.9, "max_new_tokens": 5}}, r"\['max_new_tokens', 'top_p'\].*Remove them"),
        ({"generation_kwargs": {"suppress": [1]}}, r"`generation_kwargs=.*has no \['suppress'\]"),
        ({"cache_implementation": "sttaic"}, r"Invalid `cache_implementation` \(sttaic\)"),
        ({"use_vllm": True, "cache_implementation": "static"}, "`cache_implementation='static'`"),
        ({"use_vllm": True, "generation_kwargs": {"stop": ["a"], "seed": 1}}, r"\['seed', 'stop'\].*Remove them"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **options)


# ---- What it takes hold of ----


def test_signature_is_that_of_dpo_trainer():
    own, parent = (list(inspect.signature(cls).parameters) for cls in (SPINTrainer, DPOTrainer))
    assert own == [*parent, "compute_completion_metrics", "objective", "pair_filter"]
    assert list(inspect.signature(SharedPrefixDPOTrainer).parameters) == parent


def test_overrides_exist_upstream_and_are_called(tmp_path, monkeypatch):
    called = set()

    def spy(cls, name):
        original = vars(cls)[name]
        function = original.__func__ if isinstance(original, staticmethod) else original

        def wrapper(*args, **kwargs):
            called.add((cls, name))
            return function(*args, **kwargs)

        monkeypatch.setattr(cls, name, staticmethod(wrapper) if function is not original else wrapper)

    for cls, names in OVERRIDES.items():
        own = {name for name in vars(cls) if callable(getattr(cls, name)) and not name.startswith("__")}
        assert {name for name in own if hasattr(DPOTrainer, name)} == {*names}
        for name in names:
            spy(cls, name)
    options = {"save_strategy": "epoch", "load_best_iteration_at_end": True}
    trainer = make_trainer(tmp_path, eval_dataset=make_dataset(4), **options)
    trainer.train()
    assert called == {(cls, name) for cls, names in OVERRIDES.items() for name in names} - NOT_CALLED
    assert [name for name in ATTRIBUTES if not hasattr(trainer, name)] == []


def test_private_names_of_others_are_listed_and_exist():
    assert [(owner, name) for owner, name in ELSEWHERE if not hasattr(owner, name)] == []
    model = make_model(make_tokenizer())
    assert hasattr(model.config, "_attn_implementation")
    assert hasattr(LambdaLR(torch.optim.SGD(model.parameters(), lr=1.0), lambda step: 1.0), "_last_lr")
    assert hasattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu")

    nodes = [n for p in Path(trl_spin.__file__).parent.rglob("*.py") for n in ast.walk(ast.parse(p.read_text()))]
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute) and re.match("_[^_]", n.attr)}
    own = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    own |= {n.id for n in nodes if isinstance(n, ast.Name)}
    own |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    assert used - own <= {*ATTRIBUTES, "_attn_implementation", *(name for _, name in ELSEWHERE)}


def test_the_model_is_not_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        trl.trainer.dpo_trainer, "hash_module", lambda model: pytest.fail("a minute for a model of 7B")
    )
    make_trainer(tmp_path, eval_dataset=make_dataset(4))


# ---- Model card and Hub ----


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4)], ids=["full", "lora"])
def test_a_push_to_the_hub_holds_the_model_and_neither_data_nor_secrets(tmp_path, monkeypatch, peft_config):
    pushed = {}
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **kwargs: RepoUrl(f"https://huggingface.co/{repo_id}")
    )

    def upload_folder(self, repo_id, folder_path, **kwargs):
        paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        pushed[repo_id] = {str(path.relative_to(folder_path)): path.read_bytes() for path in paths}

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    options = {"push_to_hub": True, "hub_model_id": "user/model", "hub_token": "hf_SECRET", "save_strategy": "epoch"}
    options |= {"model_init_kwargs": {"token": "hf_SECRET"}, "write_report": True, "report_to": "none"}
    args = make_args(tmp_path / "run", **options)
    path = str(tmp_path / "sft")
    trainer = SPINTrainer(path, args=args, train_dataset=make_dataset(), peft_config=peft_config)
    trainer.train()
    trainer.push_to_hub(dataset_name="user/data")
    files = pushed["user/model"]
    assert {"adapter_model.safetensors" if peft_config else "model.safetensors", "tokenizer.json"} <= files.keys()
    assert not {"self_play", "iteration-0"} & {name.split("/")[0] for name in files}
    assert b"\xe2\x86\x92 iteration 1" in files["README.md"]
    report = tmp_path / "run" / "report" / "report.html"
    for name, content in (files | {"report.html": report.read_bytes()}).items():
        assert str(tmp_path).encode() not in content, name
    for kept in tmp_path.rglob("*"):
        assert kept.is_dir() or b"hf_SECRET" not in kept.read_bytes(), kept
    assert "hf_SECRET" not in str(trainer.args.to_dict())
    assert trainer.args.output_dir == str(tmp_path / "run")
    with pytest.raises(ValueError, match="hub_strategy.*your data"):
        make_args(tmp_path, hub_strategy="every_save")


def test_model_card(tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    trainer = SPINTrainer(
        str(tmp_path / "sft"),
        args=make_args(tmp_path / "run", beta=[0.1, 5.0], learning_rate=1e-3),
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(4),
    )
    trainer.train()
    cards = [(tmp_path / "run" / f"iteration-{t}" / "README.md").read_text() for t in range(2)]
    path = "sft"
    number = r"-?[\d.e-]+%?"
    pattern = rf"""---
library_name: transformers
model_name: run-iteration-1
.*# Model Card for run-iteration-1

This model is a fine-tuned version of `{path}`\.
.*prompt = \[{{'role': 'user', 'content': 'Hello!'}}\]
.*model="run/iteration-1".*
## Self-play
.*
- Base model: `{path}`
- Data: `a local dataset`, 12 prompts \(0 rows left out\)
- Lineage: `{path}` → iteration 0 → iteration 1
- Settings: .*per_device_train_batch_size = 4.*temperature = 1\.0.*

\| iteration \| λ \| learning rate \| passes \| accuracy \| margin \| held-out accuracy .* \|
\| ---: .*
\| start \|  \|  .*\| {number} .*\|
\| 0 \| 0\.1 \| 0\.001 \| 1 (\| {number} )+\|
\| 1 \(best\) \| 5 \| 0\.001 \| 1 (\| {number} )+(\|  )+\|

### Framework versions
.*@inproceedings{{chen2024selfplay,.*2401\.01335.*"""
    assert re.fullmatch(pattern, cards[1], re.S), cards[1]
    assert "→ iteration 0\n" in cards[0] and "| 1 |" not in cards[0].split("Framework")[0].split("---:")[-1][:3]
    assert "None" not in cards[1]
