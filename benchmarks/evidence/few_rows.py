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
Question C: few rows, and no validation set to say when to stop. Does self-play do less harm than more SFT, or some good?

The model of `subset_sums.py` learns a new convention from 400 rows: the numbers in ascending order. SFT goes to the
minimum of the held-out likelihood; from there on, each arm plays or trains for ten rounds, on the same rows.

    python benchmarks/evidence/few_rows.py validate
    python benchmarks/evidence/few_rows.py test
"""

import argparse
import copy
from functools import cache, partial
from pathlib import Path

import subset_sums
import torch
from common import Player, quiet, read, run_all
from datasets import Dataset
from subset_sums import STAGES, TEMPERATURES, best_of, is_right, make_rows, start
from transformers import set_seed


NUM_ROWS, BATCH, RATES = 400, 64, (3e-5, 1e-4, 3e-4)


def ascending(rows: Dataset) -> Dataset:
    def sort(row: dict[str, str]) -> dict[str, str]:
        return row | {"completion": " " + " ".join(sorted(row["completion"].split(), key=int))}

    return rows.map(sort)


def rows_of(seed: int) -> Dataset:
    return ascending(make_rows(NUM_ROWS, seed=2000 + seed))


def is_fine(prompt: str, completion: str) -> bool:
    numbers = completion.split()
    return is_right(prompt, completion) and numbers == sorted(numbers, key=int)


def wrong_ones(prompts: list[str], completions: list[str], real: list[str]) -> list[bool]:
    return [not is_fine(*pair) for pair in zip(prompts, completions, strict=True)]


def measure(player: Player, rows: Dataset, seed: int) -> dict[str, float]:
    return {"nll": player.nll(rows), "flops": player.flops} | player.right(rows, is_fine, TEMPERATURES, seed)


@cache
def best_sft(seed: int) -> dict[str, torch.Tensor]:
    """Weights after SFT on the seed's rows, pass by pass, to the lowest held-out NLL: patience of three passes."""
    rows, held_out = rows_of(seed), ascending(make_rows(1000, seed=3))  # not those on which arms are compared
    player, best, since = start(), None, 0
    set_seed(seed)
    while since < 3:
        player.sft(rows, 3e-4, seed, per_device_train_batch_size=BATCH)
        nll = player.nll(held_out)
        if best is None or nll < best[0]:
            best, since = (nll, copy.deepcopy(player.model.state_dict())), 0
        else:
            since += 1
    return best[1]


def sft(player: Player, rows: Dataset, rate: float, seed: int, **more):
    num_pairs = options.rounds * NUM_ROWS
    subset_sums.sft(player, rows, rate, seed, num_pairs, per_device_train_batch_size=BATCH, **more)


play = partial(subset_sums.play, prompts_per_iteration=None, per_device_train_batch_size=BATCH)
ARMS = {
    "more SFT": sft,
    "DFT": partial(sft, loss_type="dft"),
    "self-play, λ = 1": play,
    "self-play, λ = 5": partial(play, beta=5.0),
    "verified self-play, λ = 1": partial(play, pair_filter=wrong_ones),
}


def run(arm: str, rate: float, seed: int) -> dict[str, float]:
    player = start()
    player.model.load_state_dict(best_sft(seed))
    if arm != "start":
        ARMS[arm](player, rows_of(seed), rate, seed)
    return measure(player, ascending(make_rows(4000, seed=STAGES[options.stage])), seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["validate", "test"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output_dir", type=Path, default=Path("evidence"), help="Where the start is kept.")
    options = subset_sums.options = parser.parse_args()
    quiet()
    if options.stage == "validate":
        plan = [{"arm": arm, "rate": rate, "seed": 0} for arm in options.arms for rate in RATES]
        plan.insert(0, {"arm": "start", "rate": 0.0, "seed": 0})
    else:
        best = {row["arm"]: row["rate"] for row in sorted(read("few_rows_validate"), key=best_of)}
        plan = [{"arm": arm, "rate": best[arm], "seed": s} for s in range(1, 6) for arm in ["start", *options.arms]]
    run_all(f"few_rows_{options.stage}", plan, run)
