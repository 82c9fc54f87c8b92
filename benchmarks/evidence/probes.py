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
What `trl-spin probe` says of the start of each question, to be read beside what training then did.

    python benchmarks/evidence/probes.py --data train.jsonl --model smollm2        # see repetition.py and smollm2.py
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import common
import few_rows
import paper
import repetition
import retention
import smollm2
import subset_sums
from datasets import Dataset

from trl_spin import SPINConfig, SPINTrainer, probe


def ask(player: common.Player, rows: Dataset, held_out: Dataset, pair_filter=None, **options: Any):
    """What the probe says of a game that would be played like this."""
    with tempfile.TemporaryDirectory() as directory:
        options |= {"max_completion_length": player.max_completion_length, "use_cpu": True, "bf16": False}
        args = SPINConfig(directory, report_to="none", disable_tqdm=True, **options)
        trainer = SPINTrainer(
            player.model, None, args, None, rows, held_out, player.tokenizer, pair_filter=pair_filter
        )
        return probe(trainer)


def sums(**options: Any):
    rows, batch = subset_sums.make_rows(subset_sums.PROMPTS, seed=1000), subset_sums.BATCH
    held_out = subset_sums.make_rows(1000, seed=1)
    return ask(subset_sums.start(), rows, held_out, per_device_train_batch_size=batch, beta=5.0, **options)


def few():
    player, held_out = subset_sums.start(), few_rows.ascending(subset_sums.make_rows(1000, seed=1))
    player.model.load_state_dict(few_rows.best_sft(0))
    return ask(player, few_rows.rows_of(0), held_out, per_device_train_batch_size=few_rows.BATCH, beta=5.0)


def new_skill():
    rows, held_out = retention.make_new_rows(retention.PROMPTS, 3000), retention.make_new_rows(1000, 11)
    return ask(subset_sums.start(), rows, held_out, per_device_train_batch_size=retention.BATCH, beta=5.0)


def letters():
    weights, *rows = paper.start(0)
    player = paper.new_player(0)
    player.model.load_state_dict(weights)
    return ask(player, *rows, per_device_train_batch_size=64, beta=5.0)


def text(**options: Any):
    repetition.ROWS = repetition.make_rows()
    rows = repetition.ROWS["play"].select(range(repetition.PROMPTS)), repetition.ROWS["validate"]
    return ask(repetition.start(), *rows, per_device_train_batch_size=repetition.BATCH, **options)


def sentences(**options: Any):
    rows = smollm2.make_rows()
    player = smollm2.new_player(smollm2.start())
    return ask(player, rows["train"], rows["held_out"], per_device_train_batch_size=smollm2.BATCH, beta=5.0, **options)


CASES = {
    "B, no checker": sums,
    "B, verified": lambda: sums(pair_filter=subset_sums.wrong_ones),
    "C": few,
    "A, T = 1, λ = 1": lambda: text(beta=1.0),
    "A, T = 0.5, λ = 2": lambda: text(temperature=0.5, beta=2.0),
    "D, T = 0.5, λ = 2": lambda: text(temperature=0.5, beta=2.0, pair_filter=repetition.loops),
    "E": new_skill,
    "F": letters,
    "G, no checker": sentences,
    "G, verified": lambda: sentences(pair_filter=smollm2.wrong_ones),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl.")
    parser.add_argument("--model", required=True, help="Directory with SmolLM2-135M-Instruct.")
    parser.add_argument("--output_dir", type=Path, default=Path("evidence"), help="Where the starts are kept.")
    options = parser.parse_args()
    subset_sums.options = few_rows.options = repetition.options = smollm2.options = options
    common.quiet()
    common.run_all("probes", [{"case": case} for case in options.cases], lambda case: CASES[case]())
