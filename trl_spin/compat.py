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

"""What self-play works around in TRL, transformers and bitsandbytes, until the named versions change it."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import trl.trainer.dpo_trainer
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Puts a value in the place of an attribute, and the attribute back at the end."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def no_model_hash() -> AbstractContextManager:
    """Spares DPOTrainer the hash of the model."""
    # DPOTrainer hashes all weights to recognize log-probs that it has cached (trl 1.16): a minute for a model of 7B.
    # Self-play caches none
    return replaced(trl.trainer.dpo_trainer, "hash_module", lambda model: "")


def rename_checkpointing_options(args: TrainingArguments):
    """Gives the options of gradient checkpointing the names that transformers has for them from 5.20 on."""
    # There, the old ones go on to work, with a warning. Before, there are no others
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if getattr(args, new, args) is None:
            setattr(args, new, getattr(args, old))


def enable_checkpointing(model: PreTrainedModel | PeftModel, args: TrainingArguments):
    """Turns gradient checkpointing on, with the options that the Trainer knows."""
    kwargs = dict(args.gradient_checkpointing_kwargs or {})
    # These are for the model, all others for torch
    options = {name: kwargs.pop(name) for name in ("every_n_layers", "offload") if name in kwargs}
    # Its name from transformers 5.20 on, and the one before
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs or None, **options)


def checkpointing_hidden() -> AbstractContextManager:
    """Hides gradient checkpointing from TRL while a model in evaluation mode generates, where nothing is checkpointed."""
    # TRL would turn it off and on again, with other options than the Trainer had, and by its deprecated names (trl 1.16)
    return replaced(PreTrainedModel, "is_gradient_checkpointing", False)


def prepare_model(model: PreTrainedModel | PeftModel, disable_dropout: bool):
    """Takes back what DPOTrainer does to a model for a fixed reference, and what hinders training after generation."""
    if isinstance(model, PeftModel) and "ref" in model.peft_config:
        model.delete_adapter("ref")  # a copy of a given adapter
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights for inference at the first forward pass in
        # evaluation mode, and no gradient flows through them from then on: after generation, nothing would train
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        # TRL zeroes the `nn.Dropout` modules only, attention modules keep their rate in an attribute
        if disable_dropout and isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def check_forward(model: PreTrainedModel | PeftModel):
    """Raises a `ValueError` if the model generates with the weights of another one."""
    # TRL trainers leave a patched `forward` on the model (trl 1.16, `add_fused_lm_head`). In a deep copy of such a
    # model, it still calls the original: the copy would be trained, but the original would be the opponent
    base_model = model.get_base_model() if isinstance(model, PeftModel) else model
    patched = vars(base_model).get("forward")
    original = patched and inspect.getclosurevars(patched).nonlocals.get("original_forward")
    if getattr(original, "__self__", base_model) is not base_model:
        what = "The model is a deep copy of one that was in a TRL trainer, with whose weights it would generate"
        raise ValueError(f"{what}. Save it with `save_pretrained` and pass the path instead.")
