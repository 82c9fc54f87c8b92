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
Question F: what the paper says of iterations, passes, rows, history and λ. Does it hold for a small model?

The task is that of `examples/quickstart.py`, six letters in any order, and as in the paper the model has had one epoch
of SFT with a falling rate, on the rows that are then played. Of several settings, all but one thing are the same.

    python benchmarks/evidence/paper.py validate
    python benchmarks/evidence/paper.py test
"""

import argparse
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import Player, make_llama, quiet, read, run_all
from datasets import Dataset
from transformers import set_seed


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from quickstart import MAX_COMPLETION_LENGTH, NUM_LETTERS, is_valid, make_data, make_tokenizer  # noqa: E402


NUM_ROWS, NUM_HELD_OUT, RATES = 6000, 1000, (1e-4, 3e-4, 1e-3)
TEMPERATURES = (0.0, 0.5, 1.0)
SCHEDULE = {"lr_scheduler_type": "linear", "warmup_steps": 0.1}
GAME = {"num_self_play_iterations": 4, "num_train_epochs": 2, "beta": 5.0, "reset_optimizer_state": True} | SCHEDULE
ONCE = {"num_self_play_iterations": 1}
# What differs from four iterations of two passes at λ = 5. The first of these iterations is the game of 6,000 rows
ARMS = {
    "more SFT": None,
    "4 iterations": {},
    "8 iterations of 1 pass": {"num_self_play_iterations": 8, "num_train_epochs": 1},
    "4 iterations, batches of 256": {"per_device_train_batch_size": 256},
    "1 iteration of 4 passes": ONCE | {"num_train_epochs": 4},
    "1 iteration of 8 passes": ONCE | {"num_train_epochs": 8},
    "3,000 rows": ONCE | {"max_prompts": 3000},
    "1,500 rows": ONCE | {"max_prompts": 1500},
    "3,000 rows, as many steps": ONCE | {"max_prompts": 3000, "num_train_epochs": 4},
    "1,500 rows, as many steps": ONCE | {"max_prompts": 1500, "num_train_epochs": 8},
    "4 iterations, history": {"opponent_history": 1},
    "4 iterations, λ = 1": {"beta": 1.0},
    "4 iterations, λ = 0.1": {"beta": 0.1},
}


@cache
def start(seed: int) -> tuple[dict[str, torch.Tensor], Dataset, Dataset]:
    """Weights after one epoch of SFT, and the rows, training and held-out."""
    rows, held_out = make_data(NUM_ROWS, NUM_HELD_OUT, random.Random(seed))
    player = new_player(seed)
    player.sft(rows, 2e-3, seed, per_device_train_batch_size=32, **SCHEDULE)
    return player.model.state_dict(), rows, held_out


def new_player(seed: int) -> Player:
    tokenizer = make_tokenizer()
    return Player(make_llama(tokenizer, 64, 2, 32, seed), tokenizer, MAX_COMPLETION_LENGTH)


def measure(player: Player, rows: Dataset, seed: int) -> dict[str, float]:
    return {"nll": player.nll(rows)} | player.right(rows, is_valid, TEMPERATURES, seed)


def run(arm: str, rate: float, seed: int) -> dict[str, Any]:
    weights, rows, held_out = start(seed)
    player = new_player(seed)
    player.model.load_state_dict(weights)
    curve = [measure(player, held_out, seed)]
    set_seed(seed)
    if arm == "more SFT":  # as many FLOPs as four iterations of two passes
        flops = player.game_flops(4 * len(rows), NUM_LETTERS + 1, NUM_LETTERS + 1, passes=2)
        player.sft(rows, rate, seed, flops, **SCHEDULE)
        curve.append(measure(player, held_out, seed))
    else:
        player.play(
            rows,
            None,
            seed,
            after=lambda player: curve.append(measure(player, held_out, seed)),
            learning_rate=rate,
            **(GAME | ARMS[arm]),
        )
    return curve[-1] | {"flops": player.flops, "curve": curve}


def main():
    quiet()
    if options.stage == "validate":
        plan = [{"arm": arm, "rate": rate, "seed": 0} for arm in options.arms for rate in RATES]
    else:
        best = {row["arm"]: row["rate"] for row in sorted(read("paper_validate"), key=lambda row: row["right at 1"])}
        seeds = range(1, options.num_seeds + 1)
        plan = [{"arm": arm, "rate": best[arm], "seed": seed} for seed in seeds for arm in options.arms]
    run_all(f"paper_{options.stage}", plan, run)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["validate", "test"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--num_seeds", type=int, default=5)
    options = parser.parse_args()
    main()
