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

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate",
#     "datasets",
#     "peft",
#     "transformers",
#     "trl-spin",
# ]
# ///

"""
SPIN from zephyr-7b-sft-full with the recipe of the paper (arXiv 2401.01335), in Python. The same from a shell, with
every option on the command line: `trl-spin --config zephyr_7b`.

Full fine-tuning, 8 GPUs:

```bash
accelerate launch --config_file zero3.yaml examples/zephyr_7b.py
```

QLoRA, one GPU of 12 GB or more:

```bash
python examples/zephyr_7b.py --qlora
```
"""

import argparse

from accelerate import PartialState
from datasets import load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from trl_spin import SPINConfig, SPINTrainer


parser = argparse.ArgumentParser()
parser.add_argument("--qlora", action="store_true", help="Train a LoRA adapter on a model in 4 bits.")
qlora = parser.parse_args().qlora

# The paper's 8 x 8 = 64 pairs per step, however many GPUs there are
per_device_train_batch_size = 2 if qlora else 8
num_processes = PartialState().num_processes

args = SPINConfig(
    output_dir="zephyr-7b-spin-qlora" if qlora else "zephyr-7b-spin",
    model_init_kwargs={
        "revision": "ac6e600eefcce74f5e8bae1035d4f66019e93190",  # the one that the paper started from
        "dtype": "bfloat16" if qlora else "float32",
    },
    # Game: iterations 0 to 3, from iteration 1 on against two opponents
    num_self_play_iterations=4,
    num_train_epochs=[2, 4],
    opponent_history=1,
    beta=[0.1, 0.1, 0.1, 5.0],
    # Data
    first_turn_only=True,
    max_prompts=5_000 if qlora else 50_000,
    max_length=1024 if qlora else 2048,
    max_completion_length=512 if qlora else 1024,
    # Optimization. Updates of 5e-7 would round away in the adapter's bfloat16 weights
    learning_rate=[1e-5, 1e-5, 2e-6, 2e-6] if qlora else [5e-7, 5e-7, 1e-7, 1e-7],
    optim="rmsprop",
    weight_decay=0.0,
    lr_scheduler_type="linear",
    warmup_steps=0.1,
    per_device_train_batch_size=per_device_train_batch_size,
    gradient_accumulation_steps=max(1, 64 // (per_device_train_batch_size * num_processes)),
    save_strategy="epoch",
    save_total_limit=1,
)

quantization_config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
)
trainer = SPINTrainer(
    "alignment-handbook/zephyr-7b-sft-full",
    args=args,
    train_dataset=load_dataset("HuggingFaceH4/ultrachat_200k", split="train_sft"),
    eval_dataset=load_dataset("HuggingFaceH4/ultrachat_200k", split="test_sft[:500]"),
    quantization_config=quantization_config if qlora else None,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if qlora else None,
)
trainer.train()
trainer.save_model()
