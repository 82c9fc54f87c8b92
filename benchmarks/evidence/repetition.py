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
Questions A and D: a model that is deployed with a low temperature repeats itself and does not come to an end. Do opponents
decoded at that temperature cure it, or opponents of which only those that repeat themselves are played?

The text is GSM8K's: of a problem, the first sentence is the prompt, and what follows the completion. A model of a
quarter of a million parameters is trained on 4,000 of them, with a learning rate that falls to nothing.

    python benchmarks/evidence/repetition.py start --data train.jsonl      # GSM8K's file
    python benchmarks/evidence/repetition.py validate --data train.jsonl
    python benchmarks/evidence/repetition.py test --data train.jsonl
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from common import Player, make_llama, quiet, read, run_all
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_spin.report.signals import repetition


MAX_COMPLETION_LENGTH, TEMPERATURES = 128, (0.0, 0.5, 1.0)
ROUNDS, PROMPTS, BATCH, RATES = 3, 384, 64, (3e-5, 1e-4, 3e-4)
NUM_HELD_OUT, NUM_START = 300, 4000
NLL_MARGIN = 0.05  # a rate whose model is further above the start's NLL than that is not chosen


def make_rows() -> dict[str, Dataset]:
    rows = []
    for line in options.data.read_text(encoding="utf-8").splitlines():
        first, end, rest = json.loads(line)["question"].partition(". ")
        if end:
            rows.append({"prompt": first + ".", "completion": " " + rest.strip()})
    splits = {"validate": NUM_HELD_OUT, "test": NUM_HELD_OUT, "start": NUM_START}
    splits["play"] = len(rows) - sum(splits.values())
    result, begin = {}, 0
    for name, size in splits.items():
        result[name] = Dataset.from_list(rows[begin : begin + size])
        begin += size
    return result


def make_tokenizer(rows: Dataset) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*rows["prompt"], *rows["completion"]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def loops(prompts: list[str], completions: list[str], real: list[str]) -> list[bool]:
    """The pair filter: only completions that repeat themselves are played against."""
    return [repetition(list(text.encode())) > 0.25 for text in completions]


def measure(player: Player, rows: Dataset, seed: int) -> dict[str, float]:
    result, prompts = {"nll": player.nll(rows, batch_size=64), "flops": player.flops}, rows["prompt"][:]
    for name, penalty in (("", 1.0), (" with a penalty of 1.2", 1.2)):
        for temperature in TEMPERATURES:
            ids = player.complete(prompts, temperature, seed, repetition_penalty=penalty)
            ended = [row[-1] == player.tokenizer.eos_token_id for row in ids]
            result[f"repeated at {temperature:g}{name}"] = statistics.fmean(map(repetition, ids))
            result[f"ended at {temperature:g}{name}"] = sum(ended) / len(ended)
            result[f"length at {temperature:g}{name}"] = statistics.fmean(map(len, ids))
    return result


def start() -> Player:
    """SFT to its end: a learning rate that falls to nothing."""
    tokenizer, path = make_tokenizer(ROWS["start"]), options.output_dir / "repetition-start"
    if not path.exists():
        player = Player(make_llama(tokenizer, 64, 3, 512, seed=0), tokenizer, MAX_COMPLETION_LENGTH)
        schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "per_device_train_batch_size": 32}
        player.sft(ROWS["start"], 5e-3, 0, 12 * player.sft_flops(ROWS["start"]), **schedule)
        player.model.save_pretrained(path)
    return Player(LlamaForCausalLM.from_pretrained(path), tokenizer, MAX_COMPLETION_LENGTH)


def play(player: Player, rows: Dataset, rate: float, seed: int, pair_filter=None, **more: Any):
    args = {"num_self_play_iterations": ROUNDS, "prompts_per_iteration": PROMPTS, "learning_rate": rate}
    args |= {"per_device_train_batch_size": BATCH, "warmup_steps": 0}
    player.play(rows, None, seed, pair_filter, **(args | more))


def sft(player: Player, rows: Dataset, rate: float, seed: int, **more: Any):
    """As many FLOPs as plain self-play with completions as long as the real ones."""
    lengths = {name: [len(ids) for ids in player.tokenizer(rows[name][:])["input_ids"]] for name in rows.column_names}
    prompt, completion = statistics.fmean(lengths["prompt"]), statistics.fmean(lengths["completion"]) + 1
    flops = player.game_flops(ROUNDS * PROMPTS, prompt, completion)
    player.sft(rows, rate, seed, flops, per_device_train_batch_size=BATCH, **more)


ARMS = {
    "more SFT": sft,
    "DFT": partial(sft, loss_type="dft"),
    "self-play, T = 1, λ = 1": play,
    "self-play, T = 1, λ = 5": partial(play, beta=5.0),
    "self-play, T = 0.5, λ = 2": partial(play, temperature=0.5, beta=2.0),
    "self-play, T = 0.01, λ = 5": partial(play, temperature=0.01, beta=5.0),
    "self-play against loops, T = 0.5": partial(play, temperature=0.5, beta=2.0, pair_filter=loops),
}


def run(arm: str, rate: float, seed: int) -> dict[str, float]:
    player = start()
    if arm != "start":
        rows = ROWS["play"].shuffle(seed=seed)
        ARMS[arm](player, rows.select(range(ROUNDS * PROMPTS)), rate, seed)
    return measure(player, ROWS[options.stage], seed)


def best_rates() -> dict[str, float]:
    """The least repetition at T = 0.5 among the rates whose NLL is near the start's; if there is none, the lowest NLL."""
    rows = read("repetition_validate")
    limit = next(row["nll"] for row in rows if row["arm"] == "start") + NLL_MARGIN

    def order(row):
        return (row["nll"] > limit, row["nll"] if row["nll"] > limit else row["repeated at 0.5"])

    return {row["arm"]: row["rate"] for row in sorted(rows, key=order, reverse=True)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["start", "validate", "test"])
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl.")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--output_dir", type=Path, default=Path("evidence"), help="Where the start is kept.")
    options = parser.parse_args()
    quiet()
    ROWS = make_rows()
    if options.stage == "start":
        print(start().nll(ROWS["validate"], batch_size=64))
    else:
        plan = [{"arm": "start", "rate": 0.0, "seed": 0}]
        if options.stage == "validate":
            plan += [{"arm": arm, "rate": rate, "seed": 0} for arm in options.arms for rate in RATES]
        else:
            best = best_rates()
            plan += [{"arm": arm, "rate": best[arm], "seed": seed} for seed in range(1, 6) for arm in options.arms]
        run_all(f"repetition_{options.stage}", plan, run)
