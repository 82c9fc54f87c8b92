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
Question G: a real model, few rows and LoRA. Does anything of the study look different with SmolLM2-135M-Instruct?

A sentence with two given words: "Words: profit, sell\nSentence:" -> " Tilly needs to sell 100 bags to make $300 in
profit." The sentences are those of GSM8K's problems, and a program sees whether the words are there. SFT on 256 rows
goes to the lowest held-out NLL; then the same rows are played, or trained on for as many FLOPs.

    python benchmarks/real_model.py --only_model smollm2
    python benchmarks/evidence/smollm2.py --model smollm2 --data train.jsonl        # GSM8K's file
"""

import argparse
import json
import random
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common import Player, quiet, run_all
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


NUM_ROWS, NUM_HELD_OUT, NUM_TEST, BATCH, MAX_COMPLETION_LENGTH = 256, 100, 400, 16, 24
GAME = {"num_self_play_iterations": 2, "beta": 5.0, "per_device_train_batch_size": BATCH}


@cache
def make_rows() -> dict[str, Dataset]:
    """Sentences of 6 to 16 words, each once, and two of their longer words."""
    draw, rows = random.Random(0), {}
    for line in options.data.read_text(encoding="utf-8").splitlines():
        for sentence in re.split(r"(?<=[.])\s+", json.loads(line)["question"].strip()):
            words = sorted({word.lower() for word in re.findall("[A-Za-z]{5,}", sentence)})
            if 6 <= len(sentence.split()) <= 16 and sentence.endswith(".") and len(words) >= 2:
                rows.setdefault(sentence, draw.sample(words, 2))
    rows = [{"prompt": f"Words: {', '.join(w)}\nSentence:", "completion": f" {s}"} for s, w in rows.items()]
    draw.shuffle(rows)
    splits, begin = {}, 0
    for name, size in {"test": NUM_TEST, "held_out": NUM_HELD_OUT, "train": NUM_ROWS}.items():
        splits[name] = Dataset.from_list(rows[begin : begin + size])
        begin += size
    return splits


def is_right(prompt: str, completion: str) -> bool:
    """Whether a completion is a sentence that has the words."""
    wanted = re.findall("[a-z]+", prompt.removeprefix("Words: ").split("\n")[0])
    return set(wanted) <= set(re.findall("[a-z]+", completion.lower())) and completion.strip().endswith(".")


def wrong_ones(prompts: list[str], completions: list[str], real: list[str]) -> list[bool]:
    return [not is_right(*pair) for pair in zip(prompts, completions, strict=True)]


def new_player(model: str | Path) -> Player:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    torch.manual_seed(0)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    return Player(get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora), tokenizer, MAX_COMPLETION_LENGTH)


def start() -> Path:
    """SFT with LoRA to the lowest held-out NLL, merged."""
    path = options.output_dir / "sentences-start"
    if not path.exists():
        player, rows, best = new_player(options.model), make_rows(), None
        while True:
            player.sft(rows["train"], 3e-4, 0, per_device_train_batch_size=BATCH)
            nll = player.nll(rows["held_out"], batch_size=25)
            print(f"NLL {nll:.4f}", flush=True)
            if best is not None and nll > best[0]:
                break
            best = nll, {name: w.detach().clone() for name, w in player.model.state_dict().items() if "lora" in name}
        player.model.load_state_dict(best[1], strict=False)
        player.model.merge_and_unload().save_pretrained(path)
    return path


def measure(player: Player) -> dict[str, float]:
    rows = make_rows()["test"]
    shares = player.right(rows, is_right, (0.0, 1.0), seed=0, batch_size=200)
    return {"nll": player.nll(rows, batch_size=25), "flops": player.flops} | shares


def sft(player: Player, rate: float, seed: int, **more: Any):
    """As many FLOPs as plain self-play with completions as long as the real ones."""
    rows = make_rows()["train"]
    prompt, completion = (sum(map(len, player.tokenizer(rows[name][:])["input_ids"])) for name in rows.column_names)
    flops = GAME["num_self_play_iterations"] * player.game_flops(1, prompt, completion + len(rows))
    player.sft(rows, rate, seed, flops, per_device_train_batch_size=BATCH, **more)


def play(player: Player, rate: float, seed: int, pair_filter=None, **more: Any):
    player.play(make_rows()["train"], None, seed, pair_filter, learning_rate=rate, warmup_steps=0, **(GAME | more))


def rejection(player: Player, rate: float, seed: int):
    """Rejection-sampling fine-tuning: in each round, two passes over the real and the model's own right completions."""
    optimizer = torch.optim.AdamW([w for w in player.model.parameters() if w.requires_grad], rate, weight_decay=0.0)
    rows = make_rows()["train"]
    for t in range(GAME["num_self_play_iterations"]):
        ids = player.complete(rows["prompt"][:], 1.0, seed * 1000 + t, batch_size=128)
        length = sum(map(len, ids)) + sum(map(len, player.tokenizer(rows["prompt"][:])["input_ids"]))
        player.flops += 2 * player.size * length
        pairs = [pair for pair in zip(rows["prompt"], player.texts(ids), strict=True) if is_right(*pair)]
        both = Dataset.from_list(rows.to_list() + [dict(zip(rows.column_names, pair, strict=True)) for pair in pairs])
        options = {"optimizer": optimizer, "per_device_train_batch_size": BATCH}
        player.sft(both, rate, seed + t, 2 * player.sft_flops(both), **options)


ARMS = {
    "more SFT": sft,
    "verified self-play": partial(play, pair_filter=wrong_ones),
    "self-play": play,
    "DFT": partial(sft, loss_type="dft"),
    "self-play, λ = 1": partial(play, beta=1.0),
    "rejection sampling": rejection,
}


def run(arm: str, rate: float, seed: int) -> dict[str, float]:
    player = new_player(start())
    set_seed(seed)
    if arm != "start":
        ARMS[arm](player, rate, seed)
    return measure(player)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Directory with SmolLM2-135M-Instruct.")
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl.")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--output_dir", type=Path, default=Path("evidence"), help="Where the start is kept.")
    options = parser.parse_args()
    quiet()
    plan = [{"arm": arm, "rate": options.rate, "seed": seed} for seed in options.seeds for arm in options.arms]
    run_all("smollm2", [{"arm": "start", "rate": 0.0, "seed": 0}, *plan], run)
