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
Plain self-play on a model whose SFT was stopped early, beside more SFT with the same compute.

The task is that of `examples/quickstart.py`, which has one run of this and fewer numbers.

1. TRL's SFTTrainer trains a small random Llama for one epoch on 6,000 such rows.
2. SPINTrainer plays three iterations on the same rows.
3. For comparison, the same SFT model gets more SFT instead, with the same compute as the three iterations.

It prints what it measured on 1,000 held-out prompts:

```bash
python benchmarks/letters.py                # one run, two to three minutes on two cores
python benchmarks/letters.py --num_seeds 5  # mean and standard error over five runs
python benchmarks/letters.py --output_dir letters && trl-spin report letters/seed-0  # curves
```
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

import datasets
import torch
import transformers
from transformers import LlamaForCausalLM, PrinterCallback, set_seed

from trl_spin import SPINTrainer


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from quickstart import MAX_COMPLETION_LENGTH, is_valid, make_args, make_data, make_model, make_tokenizer, train_sft  # noqa: E402


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--num_self_play_iterations", type=int, default=3)
parser.add_argument("--num_seeds", type=int, default=1, help="Repeat with other data, weights and samples.")
parser.add_argument("--num_rows", type=int, default=6000, help="Training rows.")
parser.add_argument("--num_held_out", type=int, default=1000, help="Held-out prompts.")
parser.add_argument("--output_dir", help="Where to keep the self-play runs. By default they are temporary.")
parser.add_argument("--loss_type", default="sigmoid", help="Objective, see docs/objectives.md.")
parser.add_argument("--beta", type=float, default=5.0, help="λ")
# Larger learning rates and smaller λ gain faster at first, then overshoot
parser.add_argument("--learning_rate", type=float, nargs="+", default=[3e-4, 3e-4, 1.5e-4], help="Of each iteration.")
options = parser.parse_args()

# ---- Training ----


def train_spin(model_path: str, dataset, held_out, seed: int) -> str:
    """Runs self-play from an SFT model and returns the directory that holds the model of each iteration."""
    given = {
        name: getattr(options, name) for name in ("num_self_play_iterations", "loss_type", "learning_rate", "beta")
    }
    output_dir = f"{options.output_dir}/seed-{seed}" if options.output_dir else tempfile.mkdtemp()
    args = make_args(output_dir, seed=seed, logging_strategy="steps", logging_steps=10, **given)
    trainer = SPINTrainer(model_path, args=args, train_dataset=dataset, eval_dataset=held_out)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return args.output_dir


# ---- Measurements on held-out prompts ----


@torch.no_grad()
def measure(model, tokenizer, held_out, seed: int) -> dict[str, float]:
    """Share of valid answers among samples, and negative log-likelihood of the real completions in nats per token."""
    torch.manual_seed(seed)
    model.eval()
    prompts = torch.tensor(tokenizer(held_out["prompt"][:])["input_ids"])  # all of one length
    samples = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        max_new_tokens=MAX_COMPLETION_LENGTH,
    )[:, prompts.size(1) :]
    completions = tokenizer.batch_decode(samples, skip_special_tokens=True)
    real = torch.tensor(tokenizer([text + tokenizer.eos_token for text in held_out["completion"]])["input_ids"])
    logits = model(torch.cat([prompts, real], dim=1)).logits[:, prompts.size(1) - 1 : -1]
    return {
        "valid": statistics.fmean(map(is_valid, held_out["prompt"], completions)),
        "nll": torch.nn.functional.cross_entropy(logits.flatten(0, 1), real.flatten()).item(),
    }


def run(seed: int) -> list[dict[str, float]]:
    """One row of measurements for the SFT model and one for each iteration."""
    print(f"Seed {seed}: supervised fine-tuning on {options.num_rows} rows ...", flush=True)
    set_seed(seed)
    dataset, held_out = make_data(options.num_rows, options.num_held_out, random.Random(seed))
    tokenizer = make_tokenizer()
    sft_path = train_sft(
        make_model(tokenizer), tokenizer, dataset, num_epochs=1, learning_rate=2e-3, batch_size=32, seed=seed
    )
    start = measure(LlamaForCausalLM.from_pretrained(sft_path), tokenizer, held_out, seed)
    rows = [{**start, "sft_valid": start["valid"], "sft_nll": start["nll"]}]

    print(f"{options.num_self_play_iterations} iterations of self-play ...", flush=True)
    output_dir = train_spin(sft_path, dataset, held_out, seed)
    print("More supervised fine-tuning instead ...", flush=True)
    more_sft = LlamaForCausalLM.from_pretrained(sft_path)
    for iteration in range(options.num_self_play_iterations):
        directory = f"{output_dir}/iteration-{iteration}"
        with open(f"{directory}/self_play.json") as file:
            record = json.load(file)
        model = LlamaForCausalLM.from_pretrained(directory)
        # An iteration trains on 2 sequences per row in 3 passes, generates and scores them: as much as 7 epochs of SFT
        train_sft(more_sft, tokenizer, dataset, num_epochs=7, learning_rate=1e-3, batch_size=64, seed=seed + iteration)
        baseline = measure(more_sft, tokenizer, held_out, seed + iteration)
        rows.append(
            {
                **measure(model, tokenizer, held_out, seed + iteration),
                "accuracy": record["eval_rewards/accuracies"],
                "margin": record["eval_rewards/margins"],
                "real": record["eval_self_play/mean_length_real"],
                "generated": record["eval_self_play/mean_length_generated"],
                "truncated": record["eval_self_play/truncated"],
                "identical": record["eval_self_play/identical"],
                "sft_valid": baseline["valid"],
                "sft_nll": baseline["nll"],
            }
        )
    return rows


def print_table(runs: list[list[dict[str, float]]]):
    """Mean over the runs and, with several of them, its standard error."""
    titles = {
        "valid": "valid",
        "nll": "NLL",
        "accuracy": "accuracy",
        "margin": "margin",
        "real": "length real",
        "generated": "generated",
        "truncated": "truncated",
        "identical": "identical",
        "sft_valid": "valid",
        "sft_nll": "NLL",
    }
    table = [["", *titles.values()]]
    for i in range(len(runs[0])):
        table.append(["SFT model" if i == 0 else f"iteration {i - 1}"])
        for column in titles:
            values = [rows[i][column] for rows in runs if column in rows[i]]
            cell = f"{statistics.fmean(values):.3f}" if values else ""
            if len(values) > 1:
                cell += f" ±{statistics.stdev(values) / len(values) ** 0.5:.3f}"
            table[-1].append(cell)
    for line in table:
        line.insert(-2, "|")
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(
        f"\nHeld-out prompts, {len(runs)} run{'s' if len(runs) > 1 else ''}. Left: self-play. Right: more SFT instead.\n"
    )
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))

    def mean(i: int, column: str) -> float:
        return statistics.fmean(rows[i][column] for rows in runs)

    print(
        f"\nSelf-play took the share of valid answers from {mean(0, 'valid'):.3f} to {mean(-1, 'valid'):.3f} and the NLL "
        f"from {mean(0, 'nll'):.3f} to {mean(-1, 'nll'):.3f}. More SFT with the same compute took them to "
        f"{mean(-1, 'sft_valid'):.3f} and {mean(-1, 'sft_nll'):.3f}."
    )


if __name__ == "__main__":
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    runs = []
    for seed in range(options.num_seeds):
        runs.append(run(seed))
        print_table(runs)
