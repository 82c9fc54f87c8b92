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
#     "datasets",
#     "tokenizers",
#     "transformers",
#     "trl",
#     "trl-spin",
# ]
# ///

"""
A whole game in a few minutes on a CPU, without network access: is self-play worth it here, and what did it do?

The task: given six letters, write them in any order, each once ("bdfkmp=" -> "kdbpfm"). There are 720 valid answers
per prompt, and the data has one of them. A model can repeat a letter, forget one or use another; a program can check
this.

1. TRL's SFTTrainer trains a small random Llama for one epoch on 6,000 such rows.
2. `probe` says what it expects of self-play from there.
3. SPINTrainer plays three iterations on the same rows, measures each model on 1,000 held-out prompts and, to compare,
   gives the SFT model more SFT with the same compute.

```bash
python examples/quickstart.py --output_dir quickstart && trl-spin report quickstart  # the second for the curves
```
"""

import argparse
import random
import statistics
import string
import tempfile

import datasets
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from trl_spin import SPINConfig, SPINTrainer, probe


ALPHABET, NUM_LETTERS = string.ascii_lowercase[:16], 6
MAX_COMPLETION_LENGTH = 10
# Everything runs in float32 on the CPU
COMMON = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "report_to": "none"}
COMMON |= {"logging_strategy": "no", "save_strategy": "no"}


def make_data(num_rows: int, num_held_out: int, rng: random.Random) -> tuple[Dataset, Dataset]:
    """Training and held-out rows, with no prompt in common."""
    prompts = {}
    while len(prompts) < num_held_out + num_rows:
        letters = rng.sample(ALPHABET, NUM_LETTERS)
        prompts["".join(sorted(letters)) + "="] = "".join(letters)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in prompts.items()]
    rng.shuffle(rows)
    return Dataset.from_list(rows[num_held_out:]), Dataset.from_list(rows[:num_held_out])


def is_valid(prompt: str, completion: str) -> bool:
    return "".join(sorted(completion)) + "=" == prompt


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "=", *ALPHABET])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # one token per character
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def valid(prompts: list[str], completions: list[str], real: list[str]) -> dict[str, float]:
    """The share of valid answers, which is shown for each model."""
    return {"valid": statistics.fmean(map(is_valid, prompts, completions))}


def train_sft(model, tokenizer, dataset, num_epochs: int, learning_rate: float, batch_size: int, seed: int) -> str:
    """Trains the model and returns the directory that holds it."""
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            tempfile.mkdtemp(),
            num_train_epochs=num_epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            warmup_steps=0.1,
            seed=seed,
            **COMMON,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return trainer.args.output_dir


def make_args(output_dir: str, **options) -> SPINConfig:
    """The game, with other options if wanted."""
    game = {
        "num_train_epochs": 3,
        "learning_rate": [3e-4, 3e-4, 1.5e-4],  # larger ones and a smaller λ gain faster at first, then overshoot
        "beta": 5.0,  # λ
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 256,
        "precompute_ref_batch_size": 256,
        "max_completion_length": MAX_COMPLETION_LENGTH,
        "train_sampling_strategy": "random",  # all rows are about as long: there is nothing to group
        "warmup_steps": 0.1,
    }
    return SPINConfig(output_dir, **(COMMON | game | options))


def main(output_dir: str, num_rows: int, num_held_out: int, num_iterations: int):
    set_seed(0)
    dataset, held_out = make_data(num_rows, num_held_out, random.Random(0))
    tokenizer = make_tokenizer()
    print(f"Supervised fine-tuning (SFT) on {num_rows} rows ...", flush=True)
    sft = train_sft(make_model(tokenizer), tokenizer, dataset, num_epochs=1, learning_rate=2e-3, batch_size=32, seed=0)

    own = {"metric_for_best_iteration": "eval_completions/valid", "compare_sft": [1e-3], "num_probes": 1}
    args = make_args(output_dir, num_self_play_iterations=num_iterations, **own)
    trainer = SPINTrainer(
        sft, args=args, train_dataset=dataset, eval_dataset=held_out, compute_completion_metrics=valid
    )
    print("Is self-play worth it? ...", flush=True)
    probe(trainer)
    trainer.train()


if __name__ == "__main__":
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_iterations", type=int, default=3, help="Of self-play.")
    parser.add_argument("--num_rows", type=int, default=6000, help="Training rows.")
    parser.add_argument("--num_held_out", type=int, default=1000, help="Held-out prompts.")
    parser.add_argument("--output_dir", help="Of the run. By default a temporary one, which stays.")
    options = vars(parser.parse_args())
    main(options.pop("output_dir") or tempfile.mkdtemp(), **options)
