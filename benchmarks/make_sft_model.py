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
Makes a small model that was fine-tuned on questions and answers, to run self-play on real text without a GPU.

A byte-pair tokenizer and a random Llama of about 1M parameters are made on the spot and trained with TRL's SFTTrainer:

```bash
python benchmarks/make_sft_model.py --dataset train.jsonl --output_dir gsm8k-sft
trl-spin --model_name_or_path gsm8k-sft --dataset_name train.jsonl --prompt_column question --completion_column answer ...
```
"""

import argparse

import torch
from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dataset", required=True, help="JSON Lines file.")
parser.add_argument("--prompt_column", default="question")
parser.add_argument("--completion_column", default="answer")
parser.add_argument("--output_dir", required=True)
parser.add_argument("--num_train_epochs", type=float, default=2)
parser.add_argument("--max_length", type=int, default=320)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
set_seed(options.seed)

dataset = load_dataset("json", data_files=options.dataset, split="train")
dataset = dataset.rename_columns({options.prompt_column: "prompt", options.completion_column: "completion"})

backend = Tokenizer(models.BPE())
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = decoders.ByteLevel()
backend.train_from_iterator(
    (row["prompt"] + row["completion"] for row in dataset),
    trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")

model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
)
print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")

trainer = SFTTrainer(
    model,
    args=SFTConfig(
        output_dir=options.output_dir,
        num_train_epochs=options.num_train_epochs,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        max_length=options.max_length,
        gradient_checkpointing=False,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
        save_strategy="no",
        seed=options.seed,
    ),
    train_dataset=dataset,
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()
