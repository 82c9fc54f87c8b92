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

import os
import re
import subprocess
import sys

import pytest
import trl.trainer.utils
from bitsandbytes.nn import Linear4bit
from conftest import make_args, make_dataset, make_model, make_tokenizer
from huggingface_hub import HfApi, RepoUrl
from trl import DPOConfig, DPOTrainer, GRPOConfig, ModelConfig, ScriptArguments

import trl_spin
from trl_spin import SPINConfig, SPINTrainer


ADDED_FIELDS = {
    "cache_implementation",
    "chat_template_kwargs",
    "completion_column",
    "dry_run",
    "early_stopping",
    "held_out_size",
    "load_best_iteration_at_end",
    "log_completions",
    "metric_for_best_iteration",
    "num_probes",
    "ds3_gather_for_generation",
    "first_turn_only",
    "generation_kwargs",
    "generation_token_budget",
    "gsil_shift",
    "initial_loss_tolerance",
    "max_completion_length",
    "max_prompts",
    "messages_column",
    "min_p",
    "num_self_play_iterations",
    "opponent_history",
    "play_empty_completions",
    "prompt_column",
    "reference_alpha",
    "repetition_penalty",
    "reset_optimizer_state",
    "sft_weight",
    "share_prefix",
    "space_mu",
    "t_spin_history_weight",
    "temperature",
    "top_k",
    "top_p",
    "transformers_continuous_batching_config",
    "truncated_completions",
    "use_transformers_continuous_batching",
    "use_vllm",
    "vllm_enable_sleep_mode",
    "vllm_gpu_memory_utilization",
    "vllm_group_port",
    "vllm_max_model_length",
    "vllm_mode",
    "vllm_model_impl",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_tensor_parallel_size",
    "write_report",
}
# Methods of DPOTrainer and Trainer, public or not, that SPINTrainer overrides and that they must go on calling. TRL
# changes monthly, and an override that nothing calls any more raises nothing.
OVERRIDES = {
    "_build_accelerator_args",
    "_compute_loss",
    "_get_eval_sampler",
    "_get_train_sampler",
    "_precompute_ref_logps",
    "_prepare_dataset",
    "_save_checkpoint",
    "_set_signature_columns_if_needed",
    "compute_ref_log_probs",
    "create_model_card",
    "create_scheduler",
    "evaluate",
    "get_optimizer_cls_and_kwargs",
    "log",
    "push_to_hub",
    "set_initial_training_values",
    "train",
}
ATTRIBUTES = {
    "_created_lr_scheduler",
    "_metrics",
    "_total_train_tokens",
    "_tokenizer",
    "loss_types",
    "aux_loss_enabled",
    "loss_weights",
    "use_weighting",
}


def test_exported_names():
    assert trl_spin.__all__ == ["SPINConfig", "SPINTrainer", "SelfPlayCallback"]
    assert all(getattr(trl_spin, name).__name__ == name for name in trl_spin.__all__)
    with pytest.raises(AttributeError):
        trl_spin.Nothing  # noqa: B018


def test_importing_has_no_side_effects():
    code = (
        "import sys; before = set(sys.modules); import trl_spin; print(set(sys.modules) & {'torch', 'transformers'})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_added_options():
    added = set(SPINConfig.__dataclass_fields__) - set(DPOConfig.__dataclass_fields__)
    assert added == ADDED_FIELDS
    for other in (ModelConfig, ScriptArguments):  # the command line could not tell them apart
        assert not added & set(other.__dataclass_fields__)


@pytest.mark.parametrize("name", sorted(name for name in ADDED_FIELDS if "vllm" in name or "continuous" in name))
def test_engine_options_are_those_of_grpo(name):
    assert SPINConfig.__dataclass_fields__[name].default == GRPOConfig.__dataclass_fields__[name].default


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_vllm": True, "use_transformers_continuous_batching": True}, "are both set"),
        ({"use_vllm": True, "vllm_mode": "remote"}, "must be 'colocate' or 'server', got 'remote'"),
        ({"vllm_server_port": 1}, "`vllm_server_port=1` means nothing to .*'generate'"),
        ({"use_vllm": True, "vllm_server_port": 1}, "`vllm_server_port=1` .*'vllm', `vllm_mode='colocate'`"),
        ({"use_vllm": True, "vllm_mode": "server", "vllm_enable_sleep_mode": True}, "`vllm_enable_sleep_mode=True`"),
        ({"use_vllm": True, "cache_implementation": "static"}, "`cache_implementation='static'`"),
        ({"use_vllm": True, "generation_kwargs": {"stop": ["a"], "seed": 1}}, r"\['seed', 'stop'\].*Remove them"),
        ({"transformers_continuous_batching_config": {"num_blocks": 8}}, "`transformers_continuous_batching_config="),
        ({"use_transformers_continuous_batching": True, "repetition_penalty": 1.1}, "`repetition_penalty=1.1`"),
        (
            {"use_transformers_continuous_batching": True, "generation_kwargs": {"suppress_tokens": [1]}},
            "`generation_kwargs=.*'continuous_batching'",
        ),
    ],
)
def test_options_that_an_engine_does_not_honour_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **options)


@pytest.mark.parametrize("name", sorted(ADDED_FIELDS | {"beta", "learning_rate", "loss_type", "num_train_epochs"}))
def test_docstring_and_help_agree(name):
    entry = re.search(rf"^ +{name} \(.*?\):\n(.*?)(?=^ +\w+ \(`|^ +> |\Z)", SPINConfig.__doc__, re.M | re.S)
    text = re.sub(r"\[`~?(?:\w+\.)*(\w+)`\]", r"`\1`", " ".join(entry[1].split()))
    assert text == SPINConfig.__dataclass_fields__[name].metadata["help"].replace("%%", "%")


def test_signature_is_that_of_dpo_trainer():
    def arguments(cls):
        code = cls.__init__.__code__
        return code.co_varnames[: code.co_argcount]

    assert arguments(SPINTrainer) == (*arguments(DPOTrainer), "compute_answer_metrics")


def test_overrides_exist_upstream_and_are_called(tmp_path, monkeypatch):
    own = {name for name in vars(SPINTrainer) if callable(getattr(SPINTrainer, name)) and not name.startswith("__")}
    assert {name for name in own if hasattr(DPOTrainer, name)} == OVERRIDES
    called = set()

    def spy(name):
        original = vars(SPINTrainer)[name]
        function = original.__func__ if isinstance(original, staticmethod) else original

        def wrapper(*args, **kwargs):
            called.add(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(SPINTrainer, name, staticmethod(wrapper) if function is not original else wrapper)

    for name in OVERRIDES:
        spy(name)
    tokenizer = make_tokenizer()
    trainer = SPINTrainer(
        make_model(tokenizer),
        args=make_args(tmp_path, save_strategy="epoch"),
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(4),
        processing_class=tokenizer,
    )
    trainer.train()
    assert called == OVERRIDES - {"push_to_hub"}  # which has a test of its own
    assert all(hasattr(trainer, name) for name in ATTRIBUTES)
    assert hasattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu")
    assert callable(trl.trainer.utils._use_triton)


def test_a_push_to_the_hub_holds_the_model_and_no_data(tmp_path, monkeypatch):
    pushed = {}
    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **kwargs: RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    monkeypatch.setattr(
        HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path, **kwargs: pushed.update({repo_id: set(os.listdir(folder_path))}),
    )
    tokenizer = make_tokenizer()
    args = make_args(tmp_path / "run", push_to_hub=True, hub_model_id="user/model")
    trainer = SPINTrainer(make_model(tokenizer), args=args, train_dataset=make_dataset(), processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub(dataset_name="user/data")
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= pushed["user/model"]
    assert not {"self_play", "iteration-0"} & pushed["user/model"]
    assert "→ iteration 1" in (tmp_path / "run" / "hub" / "README.md").read_text()
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
    path = re.escape(str(tmp_path / "sft"))
    number = r"-?[\d.e-]+"
    pattern = rf"""---
library_name: transformers
model_name: run-iteration-1
.*# Model Card for run-iteration-1

This model is a fine-tuned version of `{path}`\.
.*model="run-iteration-1".*
## Self-play
.*
- Base model: `{path}`
- Data: `a local dataset`, 12 prompts \(0 rows left out\)
- Lineage: `{path}` → iteration 0 → iteration 1
- Settings: .*per_device_train_batch_size = 4.*temperature = 1\.0.*

\| iteration \| λ \| learning rate \| passes \| accuracy \| margin \| held-out accuracy .* \|
\| ---: .*
\| 0 \| 0\.1 \| 0\.001 \| 1 (\| {number} )+\|
\| 1 \| 5 \| 0\.001 \| 1 (\| {number} )+\|

### Framework versions
.*@inproceedings{{chen2024selfplay,.*2401\.01335.*"""
    assert re.fullmatch(pattern, cards[1], re.S), cards[1]
    assert "→ iteration 0\n" in cards[0] and "| 1 |" not in cards[0].split("Framework")[0].split("---:")[-1][:3]
    assert "None" not in cards[1]
