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

import os


# Before torch is imported: with models as small as these, threads wait for each other longer than they compute
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # every test makes what it needs; a lookup on the Hub is a fault

import inspect
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from trl_spin import SPINConfig, SPINTrainer
from trl_spin.engines import Engine


pytest.register_assert_rewrite("theory")  # its asserts, too, say what was compared

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHATML, eos_token: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """Byte-level tokenizer: one token per byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos_token, pad_token="<pad>")
    special = ["<|im_start|>", "<|im_end|>", "<eos>", "<bos>", "<turn>", "</turn>", "<think>", "</think>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [t for t in special if t != eos_token]})
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(tokenizer, seed: int = 0, **config) -> LlamaForCausalLM:
    """Random Llama of 2 layers, 32 wide."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    } | config
    model = LlamaForCausalLM(
        LlamaConfig(
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            **config,
        )
    )
    return model.eval()


def load_in_4bit(path):
    """A saved model, of a width that is a multiple of 64: so many weights are quantized together."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype="bfloat16")


def make_dataset(num_rows: int = 12) -> Dataset:
    rows = [
        [
            {"role": "user", "content": f"Count to {i % 7 + 1}."},
            {"role": "assistant", "content": " ".join(str(n + 1) for n in range(i % 7 + 1))},
        ]
        for i in range(num_rows)
    ]
    return Dataset.from_dict({"messages": rows})


def make_args(output_dir, config=None, **kwargs) -> SPINConfig:
    defaults = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "num_self_play_iterations": 2,
        "num_train_epochs": 1,
        "beta": 1.0,  # with which a few steps change more
        "learning_rate": 1e-3,
        "max_completion_length": 12,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "write_report": False,  # which takes longer than such a run
    }
    config = config or (ScriptedConfig if "use_script" in kwargs else SPINConfig)
    return config(**(defaults | kwargs))


class Scripted(Engine):
    """An engine whose completions a test writes, all prompts of a dataset in one batch."""

    name = "scripted"
    flag = "use_script"

    @dataclass
    class Options:
        use_script: bool = False

    @staticmethod
    def script(prompts: list[list[int]]) -> list[list[int]]:
        raise NotImplementedError

    @contextmanager
    def open(self, model):
        yield lambda prompts, seeds, max_new_tokens, temperature: self.script(prompts)


@dataclass
class ScriptedConfig(Scripted.Options, SPINConfig):
    """The options of a run with a scripted opponent."""


def make_trainer(tmp_path, tokenizer=None, dataset=None, model=None, **kwargs):
    """Keyword arguments are those of the trainer, or options."""
    tokenizer = tokenizer or make_tokenizer()
    names = inspect.signature(SPINTrainer.__init__).parameters.keys() & kwargs.keys()
    trainer_kwargs = {name: kwargs.pop(name) for name in names}
    return SPINTrainer(
        model if model is not None else make_model(tokenizer),
        args=make_args(tmp_path, **kwargs),
        train_dataset=dataset or make_dataset(),
        processing_class=tokenizer,
        **trainer_kwargs,
    )


def callback_of(trainer, cls):
    """The callback of a class that the trainer has attached."""
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, cls))


def logp(model, prompt_ids, completion_ids):
    """Summed log-prob of a completion, written out."""
    logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0].float()
    logps = logits.log_softmax(dim=-1)[len(prompt_ids) - 1 : -1]
    return logps[range(len(completion_ids)), completion_ids].sum()


def first_losses(trainer):
    """First training loss of each iteration."""
    boundaries = [i for i, logs in enumerate(trainer.state.log_history) if "self_play/iteration" in logs]
    return [next(logs["loss"] for logs in trainer.state.log_history[i:] if "loss" in logs) for i in boundaries]


def assert_loss_and_gradient(trainer, rows, expected):
    """The trainer's loss on rows of a game, and its gradient, are those of a loss that is written out."""
    policy = trainer.model
    policy.zero_grad()
    expected.backward()
    gradients = {k: p.grad.clone() for k, p in policy.named_parameters() if p.requires_grad}
    policy.zero_grad()
    policy.train()
    loss = trainer.compute_loss(policy, trainer._prepare_inputs(trainer.data_collator(rows)))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    scale = max(g.abs().max() for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(policy.get_parameter(name).grad, gradient, atol=1e-5 * scale, rtol=1e-3, msg=name)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def dataset():
    return make_dataset()
