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
from collections import Counter

import numpy as np
from datasets import Dataset


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
    real, generated = ([ids[0] if ids else -1 for ids in pairs[f"{side}_ids"][:]] for side in ("real", "generated"))
    values = []
    for half in (0, 1):
        counts = Counter(real[half::2]), Counter(generated[half::2])
        scores = [
            [math.log((counts[0][token] + 1) / (counts[1][token] + 1)) for token in tokens[1 - half :: 2]]
            for tokens in (real, generated)
        ]
        if scores[0]:
            values.append(auc(*scores))
    return _mean(values)


def describe_game(pairs: Dataset) -> dict[str, float]:
    """
    Lengths, shares, diversity and likelihoods of one opponent's pairs, which must have been scored, per completion or
    per token. The areas under the curve (AUC) say how well one number alone tells real from generated completions: the
    length, the first token, the log-prob per token under the opponent. Above 0.5, real completions score higher.
    """
    completions = {side: pairs[f"{side}_ids"][:] for side in ("real", "generated")}
    measures = {
        "mean_length": lambda texts: _mean([len(ids) for ids in texts]),
        "distinct": lambda texts: len(set(map(tuple, texts))) / len(texts),
        "distinct_bigrams": lambda texts: distinct_ngrams(texts, 2),
        "repetition": repetition,
    }
    # In a pair that is not played, the real completion is scored in place of the generated one as well
    played, lengths, logps, per_token = pairs["played"][:], {}, {}, {}
    for side, texts in completions.items():
        lengths[side] = [len(ids) for ids, p in zip(texts, played, strict=True) if p]
        logps[side] = [v for v, p in zip(pairs[f"ref_{side}_logps"][:], played, strict=True) if p]
        per_token[side] = [v / max(1, n) for v, n in zip(logps[side], lengths[side], strict=True)]
    return {
        **{f"{name}_{side}": measure(completions[side]) for name, measure in measures.items() for side in completions},
        **{name: _mean(pairs[name][:]) for name in ("truncated", "empty", "identical", "played")},
        "nll_real": -sum(pairs["ref_real_logps"][:]) / sum(map(len, completions["real"])),
        "nll_generated": -sum(logps["generated"]) / max(1, sum(lengths["generated"])),
        "auc_length": auc(*([len(ids) for ids in texts] for texts in completions.values())),
        "auc_first_token": first_token_auc(pairs),
        "auc_logps": auc(per_token["real"], per_token["generated"]),
    }


def find_warnings(game: dict[str, float], earlier: dict[str, float] | None) -> list[str]:
    """
    What deserves a look in a game, and what to do about it. `game` and `earlier`, the game before it if there is one,
    are as [`describe_game`] returns them.
    """
    remedies = {
        "truncated": "Raise `max_completion_length`, or check that the model was fine-tuned to end its completions: "
        "otherwise real and generated completions differ mainly in length.",
        "empty": "Is the chat template the one the model was fine-tuned with?",
        "identical": "The model has memorized the data, and there is little left to learn.",
    }
    earlier = earlier or game
    longer = "real" if game["auc_length"] > 0.5 else "generated"
    repeats_itself = game["distinct_generated"] < 0.5 * game["distinct_real"]
    loops = game["repetition_generated"] > 0.2 + game["repetition_real"]
    length_tells = max(game["auc_length"], 1 - game["auc_length"]) > 0.75
    overshot = game["nll_real"] > earlier["nll_real"] + 0.02
    warnings = {
        f"{game[kind]:.0%} of the generated completions are {kind}. {remedy}": game[kind] > 0.5
        for kind, remedy in remedies.items()
    } | {
        f"{game['distinct_generated']:.0%} of the generated completions are distinct, but {game['distinct_real']:.0%} of "
        "the real ones. The model repeats itself: lower the learning rate or raise `beta`, and look at the "
        "completions.": repeats_itself,
        f"{game['repetition_generated']:.0%} of the 4-grams in a generated completion are repeats, but "
        f"{game['repetition_real']:.0%} in a real one: the model loops. Lower the learning rate or raise `beta`.": loops,
        f"Length alone tells real from generated completions (AUC {game['auc_length']:.2f}, the {longer} ones are "
        "longer), which is enough to win the game. Raise `beta` or lower the learning rate or, where completions are "
        "truncated, cut the real ones as well with `truncated_completions='cut_real'`.": length_tells,
        f"The first token alone tells real from generated completions (AUC {game['auc_first_token']:.2f}). Usually the "
        "chat template, or a space, is not what the model was fine-tuned with: compare `real_ids` and `generated_ids` in "
        "a few pairs.": game["auc_first_token"] > 0.75,
        f"The real completions have become less likely: negative log-likelihood {earlier['nll_real']:.3f} -> "
        f"{game['nll_real']:.3f} per token. The last iteration overshot: raise `beta`, lower the learning rate or the "
        "number of passes, or add an anchor with `sft_weight`.": overshot,
    }
    return [warning for warning, holds in warnings.items() if holds]


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
