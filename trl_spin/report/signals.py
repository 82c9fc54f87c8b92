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

"""What the two sides of a game look like, in numbers, and what deserves a warning."""

import math
import tomllib
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import Dataset


SIDES = ("real", "generated")
WARNINGS = tomllib.loads(Path(__file__).with_name("warnings.toml").read_text(encoding="utf-8"))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def auc(positive: list[float], negative: list[float]) -> float:
    """
    Area under the ROC curve: the probability that a random positive scores higher than a random negative, where ties
    count half (the Mann-Whitney statistic). 0.5 is chance.
    """
    negative = np.sort(negative)
    below, up_to = (np.searchsorted(negative, positive, side=side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(negative)))


def proportion_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """
    Wilson's score interval of a proportion, which stays accurate near 0 and 1 and with few observations. `z` is the
    quantile of the normal distribution: 1.96 for 95%.
    """
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    radius = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return center - radius, center + radius


def distinct_ngrams(completions: list[list[int]], n: int) -> float:
    """Share of distinct n-grams among all n-grams (distinct-n, https://huggingface.co/papers/1510.03055)."""
    windows = [np.lib.stride_tricks.sliding_window_view(ids, n) for ids in completions if len(ids) >= n]
    if not windows:
        return 0.0
    ngrams = np.concatenate(windows)
    return len(np.unique(ngrams, axis=0)) / len(ngrams)


def repetition(completions: list[list[int]], n: int = 4) -> float:
    """Mean share of n-grams that their completion has already used: 0 for text without loops."""
    shares = []
    for ids in completions:
        ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        shares.append(1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0)
    return _mean(shares)


def first_token_auc(pairs: Dataset) -> float:
    """
    How well the first token alone tells real from generated completions. Tokens are counted in one half of the pairs
    and score the other half by the log-ratio of their counts, so that no pair is scored by its own counts.
    """
    firsts = [[ids[0] if ids else -1 for ids in pairs[f"{side}_ids"][:]] for side in SIDES]
    values = []
    for half in (0, 1) if len(pairs) > 1 else (1,):
        real, generated = (Counter(tokens[half::2]) for tokens in firsts)
        scores = {token: math.log((real[token] + 1) / (generated[token] + 1)) for token in {*firsts[0], *firsts[1]}}
        values.append(auc(*([scores[token] for token in tokens[1 - half :: 2]] for tokens in firsts)))
    return _mean(values)


def describe_game(pairs: Dataset) -> dict[str, float]:
    """
    Lengths, shares, diversity and likelihoods of one opponent's pairs, which must have been scored, per completion or
    per token. The areas under the curve (AUC) say how well one number alone tells real from generated completions: the
    length, the first token, the log-prob per token under the opponent. Above 0.5, real completions score higher.
    """
    described, lengths, logps = {}, {}, {}
    # In a pair that is not played, the real completion is scored in place of the generated one as well
    played = pairs.with_format("numpy")["played"][:]
    for side in SIDES:
        texts = pairs[f"{side}_ids"][:]
        lengths[side] = np.array([len(ids) for ids in texts])
        logps[side] = np.array(pairs[f"ref_{side}_logps"][:])
        described |= {
            f"mean_length_{side}": float(lengths[side].mean()),
            f"distinct_{side}": len(set(map(tuple, texts))) / len(texts),
            f"distinct_bigrams_{side}": distinct_ngrams(texts, 2),
            f"repetition_{side}": repetition(texts),
        }
    return {
        **described,
        **{name: _mean(pairs[name][:]) for name in ("truncated", "empty", "identical", "played")},
        "nll_real": -sum(logps["real"].tolist()) / int(lengths["real"].sum()),
        "nll_generated": -sum(logps["generated"][played].tolist()) / max(1, int(lengths["generated"][played].sum())),
        "auc_length": auc(lengths["real"], lengths["generated"]),
        "auc_first_token": first_token_auc(pairs),
        "auc_logps": auc(*((logps[side] / np.maximum(1, lengths[side]))[played] for side in SIDES)),
    }


def find_warnings(game: dict[str, float], earlier: dict[str, float] | None) -> list[str]:
    """
    What deserves a look in a game, and what to do about it. `game` and `earlier`, the game before it if there is one,
    are as [`describe_game`] returns them.
    """
    earlier = earlier or game
    holds = {
        **{kind: game[kind] > 0.5 for kind in ("truncated", "empty", "identical")},
        "repeats_itself": game["distinct_generated"] < 0.5 * game["distinct_real"],
        "loops": game["repetition_generated"] > 0.2 + game["repetition_real"],
        "length": max(game["auc_length"], 1 - game["auc_length"]) > 0.75,
        "first_token": game["auc_first_token"] > 0.75,
        "overshot": game["nll_real"] > earlier["nll_real"] + 0.02,
    }
    longer = "real" if game["auc_length"] > 0.5 else "generated"
    return [WARNINGS[name].format(earlier=earlier, longer=longer, **game) for name, found in holds.items() if found]


def judge(before: float, after: float, name: str, greater_is_better: bool) -> tuple[bool, str]:
    """
    Whether the model is no worse than before the iteration, by one metric of the opponent (`before`) and of the
    trained model (`after`), and the verdict in words.
    """
    fine = after >= before if greater_is_better else after <= before
    return fine, f"{name} {before:.4g} -> {after:.4g}: {'helped' if fine else 'hurt'}"


def metric_prefix(name: str) -> str:
    """Prefix of a dataset's metrics."""
    return {"train": "", "eval": "eval_"}.get(name, f"eval_{name}_")
