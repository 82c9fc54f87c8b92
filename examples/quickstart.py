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
#     "torch",
#     "transformers",
#     "trl",
#     "trl-spin",
# ]
# ///

"""
Verified self-play from scratch, in a few minutes on a CPU, without network access.

The task: of four numbers, name two that add up to a given one ("17 4 15 9 = 24 :" -> "15 9"). A program recognizes wrong
answers, and that is all it takes: the model plays against its own wrong answers.

1. TRL's SFTTrainer trains a small random Llama until more of it gives next to nothing.
2. SPINTrainer plays on the same rows: many short rounds, in which right answers are left out (`pair_filter`).
3. For comparison, the same SFT model gets more SFT instead, with as much compute as plain self-play would have taken.

It prints the share of right answers to 4,000 held-out prompts:

```bash
python examples/quickstart.py                # one run
python examples/quickstart.py --num_seeds 5  # mean and standard error over five runs
python examples/quickstart.py --output_dir quickstart && trl-spin report quickstart/seed-0  # curves
```
"""

import argparse
import random
import statistics
import tempfile

import datasets
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from trl_spin import SPINConfig, SPINTrainer


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--num_rounds", type=int, default=100, help="Iterations of self-play, of one step each.")
parser.add_argument("--num_seeds", type=int, default=1, help="Repeat with other data, weights and samples.")
parser.add_argument("--num_rows", type=int, default=40_000, help="Training rows.")
parser.add_argument("--num_held_out", type=int, default=4000, help="Held-out prompts.")
parser.add_argument("--num_epochs", type=int, default=16, help="Of SFT.")
parser.add_argument("--output_dir", help="Where to keep the self-play runs. By default they are temporary.")
options = parser.parse_args()

LARGEST, BATCH_SIZE, MAX_COMPLETION_LENGTH = 20, 1024, 3
# Everything runs in float32 on the CPU, on rows of the same length
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "per_device_train_batch_size": BATCH_SIZE,
}


# ---- Data, checker, tokenizer, model ----


def make_data(num_rows: int, rng: random.Random) -> Dataset:
    rows = []
    for _ in range(num_rows):
        given = rng.sample(range(1, LARGEST + 1), 4)
        chosen = rng.sample(given, 2)
        prompt = f"{' '.join(map(str, given))} = {sum(chosen)} :"
        rows.append({"prompt": prompt, "completion": " " + " ".join(map(str, chosen))})
    return Dataset.from_list(rows)


def is_right(prompt: str, completion: str) -> bool:
    """Whether these are two different ones of the prompt's numbers, and add up."""
    given, total = prompt.removesuffix(" :").split(" = ")
    chosen = completion.split()
    fits = len(chosen) == 2 == len(set(chosen)) and set(chosen) <= set(given.split())
    return fits and sum(map(int, chosen)) == int(total)


def wrong_ones(prompts: list[str], completions: list[str], real: list[str]) -> list[bool]:
    """The pairs to play: those whose generated completion is wrong."""
    return [not is_right(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "=", ":", *map(str, range(1, 2 * LARGEST))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


# ---- Training ----


def train_sft(model, tokenizer: PreTrainedTokenizerFast, dataset: Dataset, seed: int, **sft_options) -> str:
    """Trains the model and returns the directory that holds it."""
    args = SFTConfig(tempfile.mkdtemp(), seed=seed, **COMMON, **sft_options)
    trainer = SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return args.output_dir


def play(model_path: str, dataset: Dataset, seed: int) -> str:
    """Plays against wrong answers, and returns the directory of the last model."""
    args = SPINConfig(
        f"{options.output_dir}/seed-{seed}" if options.output_dir else tempfile.mkdtemp(),
        num_self_play_iterations=options.num_rounds,
        prompts_per_iteration=BATCH_SIZE,  # one step, then a fresh opponent: what pays are many small steps
        num_train_epochs=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        reset_optimizer_state=False,  # Adam's averages live for longer than a round
        precompute_ref_batch_size=BATCH_SIZE,
        max_completion_length=MAX_COMPLETION_LENGTH,
        train_sampling_strategy="random",  # all rows are as long: there is nothing to group
        num_probes=0,
        seed=seed,
        **COMMON,
    )
    trainer = SPINTrainer(model_path, args=args, train_dataset=dataset, pair_filter=wrong_ones)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return f"{args.output_dir}/iteration-{options.num_rounds - 1}"


# ---- Measurements on held-out prompts ----


@torch.no_grad()
def measure(model_path: str, tokenizer: PreTrainedTokenizerFast, held_out: Dataset, seed: int) -> dict[str, float]:
    """Share of right answers, decoded greedily and sampled, and the NLL of the real completions in nats per token."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(model_path).eval()
    prompts = torch.tensor(tokenizer(held_out["prompt"][:])["input_ids"])  # all of one length
    result = {}
    for name, sampling in {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "top_k": 0}}.items():
        ids = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=MAX_COMPLETION_LENGTH, **sampling
        )
        texts = tokenizer.batch_decode(ids[:, prompts.size(1) :], skip_special_tokens=True)
        result[name] = statistics.fmean(map(is_right, held_out["prompt"], texts))
    real = torch.tensor(tokenizer([text + tokenizer.eos_token for text in held_out["completion"]])["input_ids"])
    logits = model(torch.cat([prompts, real], dim=1)).logits[:, prompts.size(1) - 1 : -1]
    return result | {"NLL": torch.nn.functional.cross_entropy(logits.flatten(0, 1), real.flatten()).item()}


def run(seed: int) -> dict[str, dict[str, float]]:
    """Measurements of the three models."""
    print(f"Seed {seed}: supervised fine-tuning (SFT) on {options.num_rows} rows ...", flush=True)
    set_seed(seed)
    rng, tokenizer = random.Random(seed), make_tokenizer()
    dataset, held_out = make_data(options.num_rows, rng), make_data(options.num_held_out, rng)
    schedule = {"num_train_epochs": options.num_epochs, "lr_scheduler_type": "cosine", "warmup_steps": 0.05}
    sft = train_sft(make_model(tokenizer), tokenizer, dataset, seed, learning_rate=1e-2, **schedule)
    print(f"{options.num_rounds} rounds of self-play ...", flush=True)
    played = play(sft, dataset, seed)
    print("More SFT instead ...", flush=True)
    # Plain self-play generates, scores and trains on a pair: with 7 tokens of prompt and 3 of a completion, 2.1 rows' worth
    steps = round(2.1 * options.num_rounds)
    constant = {"max_steps": steps, "lr_scheduler_type": "constant"}
    more = train_sft(LlamaForCausalLM.from_pretrained(sft), tokenizer, dataset, seed, learning_rate=3e-4, **constant)
    models = {"SFT, to its end": sft, "more SFT": more, "self-play against wrong answers": played}
    return {name: measure(path, tokenizer, held_out, seed) for name, path in models.items()}


def print_table(runs: list[dict[str, dict[str, float]]]):
    """Mean over the runs and, with several of them, its standard error."""
    print(
        f"\nRight answers to {options.num_held_out} held-out prompts, {len(runs)} run{'s' if len(runs) > 1 else ''}\n"
    )
    columns = list(next(iter(runs[0].values())))
    width = 6 if len(runs) == 1 else 13
    print(" " * 33 + "".join(name.rjust(width + 2) for name in columns))
    for name in runs[0]:
        cells = []
        for column in columns:
            values = [result[name][column] for result in runs]
            error = f" ±{statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.3f}{error}".rjust(width + 2))
        print(name.ljust(33) + "".join(cells))


if __name__ == "__main__":
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    runs = []
    for seed in range(options.num_seeds):
        runs.append(run(seed))
        print_table(runs)
