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
Question E: a new skill is learned from its own rows only. Is less of an old one forgotten by self-play than by SFT?

The old skill is that of `subset_sums.py`, the new one to name the three largest of five numbers: "17 4 15 9 12 : :" ->
"17 15 12". After each round, both are measured; arms are compared where they are equally good at the new skill.

    python benchmarks/evidence/retention.py validate
    python benchmarks/evidence/retention.py test
"""

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

import subset_sums
import torch
from common import Player, quiet, read, run_all
from datasets import Dataset
from subset_sums import LARGEST, NUM_CHOSEN, NUM_GIVEN, STAGES, make_rows, start
from transformers import set_seed


PROMPTS, BATCH, RATES = 1000, 64, (1e-4, 3e-4, 1e-3)
LEVELS = (0.5, 0.8, 0.9)  # shares of right answers in the new skill at which the old one is compared


def make_new_rows(num_rows: int, seed: int) -> Dataset:
    rng, rows = random.Random(seed), []
    for _ in range(num_rows):
        given = rng.sample(range(1, LARGEST + 1), NUM_GIVEN)
        largest = sorted(given, reverse=True)[:NUM_CHOSEN]
        rows.append({"prompt": f"{' '.join(map(str, given))} : :", "completion": " " + " ".join(map(str, largest))})
    return Dataset.from_list(rows)


def measure(player: Player, seed: int) -> dict[str, float]:
    new, old = make_new_rows(1000, seed=seed), make_rows(1000, seed=seed)
    texts = player.texts(player.complete(new["prompt"][:], 0.0, seed))
    right = sum(text == real.strip() for text, real in zip(texts, new["completion"][:], strict=True))
    texts = player.texts(player.complete(old["prompt"][:], 0.0, seed))
    kept = sum(map(subset_sums.is_right, old["prompt"][:], texts))
    return {"new": right / len(new), "old": kept / len(old), "new nll": player.nll(new), "old nll": player.nll(old)}


def play(player: Player, rows: Dataset, rate: float, seed: int, after, **more: Any):
    subset_sums.play(
        player, rows, rate, seed, prompts_per_iteration=PROMPTS, per_device_train_batch_size=BATCH, after=after, **more
    )


def sft(player: Player, rows: Dataset, rate: float, seed: int, after, **more: Any):
    """In as many parts as self-play has rounds, each with the same FLOPs as a round."""
    optimizer = torch.optim.AdamW(player.model.parameters(), rate, weight_decay=0.0)  # goes on from part to part
    size = len(rows) // options.rounds
    for t in range(options.rounds):
        part = rows.select(range(t * size, (t + 1) * size))
        training = {"per_device_train_batch_size": BATCH, "optimizer": optimizer} | more
        subset_sums.sft(player, part, rate, seed, PROMPTS, **training)
        after(player)


ARMS = {
    "SFT": sft,
    "DFT": partial(sft, loss_type="dft"),
    "self-play, λ = 1": play,
    "self-play, λ = 5": partial(play, beta=5.0),
}


def run(arm: str, rate: float, seed: int) -> dict[str, Any]:
    player, held_out = start(), 10 + STAGES[options.stage]
    curve = [measure(player, held_out)]
    set_seed(seed)
    rows = make_new_rows(options.rounds * PROMPTS, seed=3000 + seed)
    ARMS[arm](player, rows, rate, seed, after=lambda player: curve.append(measure(player, held_out)))
    return {"flops": player.flops, "curve": curve} | {f"old at {level}": old_at(curve, level) for level in LEVELS}


def old_at(curve: list[dict[str, float]], level: float, name: str = "old") -> float | None:
    """Of the old skill, what is left when the new one reaches this level: between two points, on a line."""
    for before, after in zip(curve, curve[1:], strict=False):
        if after["new"] >= level:
            share = (level - before["new"]) / (after["new"] - before["new"])
            return before[name] + share * (after[name] - before[name])
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["validate", "test"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="Learning rates to validate.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output_dir", type=Path, default=Path("evidence"), help="Where the start is kept.")
    options = subset_sums.options = parser.parse_args()
    quiet()
    if options.stage == "validate":
        plan = [{"arm": arm, "rate": rate, "seed": 0} for arm in options.arms for rate in options.rates]
    else:
        known = sorted(read("retention_validate"), key=lambda row: row["old at 0.9"] or 0.0)
        best = {row["arm"]: row["rate"] for row in known}
        plan = [{"arm": arm, "rate": best[arm], "seed": seed} for seed in range(1, 6) for arm in options.arms]
    run_all(f"retention_{options.stage}", plan, run)
