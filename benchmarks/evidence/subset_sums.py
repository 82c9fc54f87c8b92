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
Question B: with a program that recognizes wrong completions, does self-play beat more SFT?

Three of five numbers that add up to a given one: "17 4 15 9 12 = 38 :" -> "17 9 12". There are several right
completions (at the least, six orders), and each row of data has one of them. There are as many rows as one wants, so
nothing is memorized: a model of 31,000 parameters settles where it stops getting better by SFT.

    python benchmarks/evidence/subset_sums.py start          # the SFT model, some ten minutes
    python benchmarks/evidence/subset_sums.py validate       # each arm at three learning rates
    python benchmarks/evidence/subset_sums.py test           # each arm at its best rate, five seeds
    python benchmarks/evidence/subset_sums.py ablate         # verified self-play, one thing changed at a time
    python benchmarks/evidence/subset_sums.py longer         # twice the budget, in rounds of ten steps at λ = 5
"""

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Player, make_llama, quiet, read, run_all
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, set_seed


LARGEST, NUM_GIVEN, NUM_CHOSEN = 20, 5, 3
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
PROMPTS, BATCH = 2048, 2048  # of a round
RATES = (1e-4, 3e-4, 1e-3)
STAGES = {"start": 0, "validate": 1, "ablate": 1, "test": 2, "longer": 4}  # seeds of the prompts


def make_rows(num_rows: int, seed: int) -> Dataset:
    rng, rows = random.Random(seed), []
    for _ in range(num_rows):
        given = rng.sample(range(1, LARGEST + 1), NUM_GIVEN)
        chosen = rng.sample(given, NUM_CHOSEN)
        prompt = f"{' '.join(map(str, given))} = {sum(chosen)} :"
        rows.append({"prompt": prompt, "completion": " " + " ".join(map(str, chosen))})
    return Dataset.from_list(rows)


def is_right(prompt: str, completion: str) -> bool:
    """Whether the numbers of a completion are different ones of the prompt's, and add up."""
    given, total = prompt.removesuffix(" :").split(" = ")
    chosen = completion.split()
    fits = len(chosen) == NUM_CHOSEN == len(set(chosen)) and set(chosen) <= set(given.split())
    return fits and sum(map(int, chosen)) == int(total)


def wrong_ones(prompts: list[str], completions: list[str], real: list[str]) -> list[bool]:
    """The pair filter: what is right is not played against."""
    return [not is_right(*pair) for pair in zip(prompts, completions, strict=True)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "=", ":", *map(str, range(1, NUM_CHOSEN * LARGEST + 1))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def measure(player: Player, rows: Dataset, seed: int, num_samples: int = 8) -> dict[str, float]:
    result = {"nll": player.nll(rows), "flops": player.flops} | player.right(rows, is_right, TEMPERATURES, seed)
    some = rows["prompt"][:500]
    samples = [player.texts(player.complete(some, 1.0, seed + 1 + i)) for i in range(num_samples)]
    right = [[text for text in texts if is_right(prompt, text)] for prompt, *texts in zip(some, *samples, strict=True)]
    result[f"right once in {num_samples}"] = sum(map(bool, right)) / len(some)
    result[f"different right ones in {num_samples}"] = sum(len(set(texts)) for texts in right) / len(some)
    return result


def play(player: Player, rows: Dataset, rate: float, seed: int, pair_filter=None, **more):
    args = {"num_self_play_iterations": options.rounds, "prompts_per_iteration": PROMPTS, "learning_rate": rate}
    args |= {"per_device_train_batch_size": BATCH, "warmup_steps": 0}
    player.play(rows, None, seed, pair_filter, **(args | more))


def sft(player: Player, rows: Dataset, rate: float, seed: int, num_pairs: int | None = None, **more):
    """As many FLOPs as plain self-play on so many pairs, those of all rounds by default."""
    flops = player.game_flops(num_pairs or options.rounds * PROMPTS, NUM_GIVEN + 3, NUM_CHOSEN + 1)
    player.sft(rows, rate, seed, flops=flops, **({"per_device_train_batch_size": BATCH} | more))


def rejection(player: Player, rows: Dataset, rate: float, seed: int, steps: int = 1):
    """Rejection-sampling fine-tuning: in each round, SFT on the real completions and on the model's own right ones."""
    optimizer = torch.optim.AdamW(player.model.parameters(), rate, weight_decay=0.0)  # goes on from round to round
    size = steps * PROMPTS
    for t in range(len(rows) // size):
        part = rows.select(range(t * size, (t + 1) * size))
        texts = player.texts(player.complete(part["prompt"][:], 1.0, seed * 1000 + t))
        player.flops += 2 * player.size * size * (NUM_GIVEN + NUM_CHOSEN + 4)
        right = [pair for pair in zip(part["prompt"], texts, strict=True) if is_right(*pair)]
        own = [{"prompt": prompt, "completion": " " + text} for prompt, text in right]
        player.sft(
            Dataset.from_list(part.to_list() + own), rate, seed, None, optimizer, per_device_train_batch_size=BATCH
        )


ARMS = {
    "more SFT": sft,
    "DFT": partial(sft, loss_type="dft"),
    "rejection sampling": rejection,
    "self-play": play,
    "verified self-play": partial(play, pair_filter=wrong_ones),
}
# What matters in verified self-play: one thing is changed at a time
VERIFIED = partial(play, pair_filter=wrong_ones)
LONG = partial(VERIFIED, prompts_per_iteration=10 * PROMPTS, num_self_play_iterations=6)
# In a round of one step, all losses have the same gradient, up to a factor that Adam removes: they differ in longer ones
ABLATIONS = {
    "verified, batches of 256": partial(VERIFIED, per_device_train_batch_size=256),
    "verified, optimizer reset in each round": partial(VERIFIED, reset_optimizer_state=True),
    "verified, 1 round of 60 steps": partial(VERIFIED, prompts_per_iteration=60 * PROMPTS, num_self_play_iterations=1),
    "verified, 6 rounds of 10 steps": LONG,
    "verified, 6 rounds of 10 steps, λ = 0.1": partial(LONG, beta=0.1),
    "verified, 6 rounds of 10 steps, λ = 5": partial(LONG, beta=5.0),
    "verified, 6 rounds of 10 steps, correlation loss": partial(LONG, loss_type=["correlation"]),
    "verified, 6 rounds of 10 steps, hinge loss": partial(LONG, loss_type=["hinge"]),
}
LONGER = {
    "rejection sampling": partial(rejection, steps=10),
    "verified self-play": partial(LONG, num_self_play_iterations=12, beta=5.0),
}


def start() -> Player:
    """SFT to its end: many rows, many passes, and a learning rate that falls to nothing."""
    tokenizer, path = make_tokenizer(), options.output_dir / "subset-sums-start"
    if not path.exists():
        player = Player(make_llama(tokenizer, 32, 2, 32, seed=0), tokenizer, NUM_CHOSEN + 1)
        schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05}
        rows = make_rows(options.start_rows, seed=0)
        player.sft(rows, 3e-3, 0, 6 * player.sft_flops(rows), per_device_train_batch_size=512, **schedule)
        player.model.save_pretrained(path)
    return Player(LlamaForCausalLM.from_pretrained(path), tokenizer, NUM_CHOSEN + 1)


def run(arm: str, rate: float, seed: int) -> dict[str, float]:
    player, rows = start(), make_rows(options.rounds * PROMPTS, seed=1000 + seed)
    set_seed(seed)
    if arm != "start":
        arms = ARMS | ABLATIONS | (LONGER if options.stage == "longer" else {})
        arms[arm](player, rows, rate, seed)
    return measure(player, make_rows(options.num_held_out, seed=STAGES[options.stage]), seed)


def main():
    quiet()
    if options.stage == "start":
        return print(measure(start(), make_rows(options.num_held_out, seed=STAGES["validate"]), 0))
    plan = [{"arm": "start", "rate": 0.0, "seed": 0}]
    if options.stage == "validate":
        plan += [{"arm": arm, "rate": rate, "seed": 0} for arm in options.arms for rate in options.rates]
    elif options.stage == "ablate":
        plan = [{"arm": arm, "rate": 3e-4, "seed": 0} for arm in ABLATIONS]
        plan[1:1] = [{"arm": "verified, batches of 256", "rate": rate, "seed": 0} for rate in (1e-4, 3e-5)]
    else:
        best = {row["arm"]: row["rate"] for row in sorted(read("subset_sums_validate"), key=best_of)}
        seeds = range(1, options.num_seeds + 1)
        if options.stage == "longer":
            options.rounds, options.arms = 120, [arm for arm in options.arms if arm != "self-play"]
        plan += [{"arm": arm, "rate": best[arm], "seed": seed} for seed in seeds for arm in options.arms]
    run_all(f"subset_sums_{options.stage}", plan, run)


def best_of(row: dict[str, Any]) -> float:
    """What the rate is chosen by, on validation: right completions at the best temperature."""
    return max(row[f"right at {temperature:g}"] for temperature in TEMPERATURES)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="Learning rates to validate.")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--num_seeds", type=int, default=5)
    parser.add_argument("--num_held_out", type=int, default=4000)
    parser.add_argument("--start_rows", type=int, default=300_000)
    parser.add_argument("--output_dir", type=Path, default=Path("evidence"), help="Where the start is kept.")
    options = parser.parse_args()
    main()
