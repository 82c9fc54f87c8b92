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
from pathlib import Path

import numpy as np
import pyarrow.compute
from datasets import Dataset


SIDES = ("real", "generated")
KINDS = ("truncated", "empty", "identical")  # of generated completions
FILTERED = ("filtered", "mean_weight")  # what `pair_filter` says of pairs
WARNINGS = tomllib.loads(Path(__file__).with_name("warnings.toml").read_text(encoding="utf-8"))
# Completions that are in memory at a time
_SLICE = 4096


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


def repetition(ids: list[int], n: int = 4) -> float:
    """Share of n-grams that a completion has already used: 0 for text without loops."""
    ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def describe_texts(column: pyarrow.ChunkedArray, lengths: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """
    What token ids of these lengths look like, and the first of each (-1 where there is none): the share of distinct
    texts, that of distinct bigrams (distinct-2, https://huggingface.co/papers/1510.03055), and the mean repetition.
    Only a slice of the texts is in memory at a time, and a number for each text and each distinct bigram.
    """
    firsts, hashes = (np.full(len(lengths), -1) for _ in range(2))
    bigrams, num_bigrams, repeated = np.empty(0, np.int64), 0, 0.0
    for start in range(0, len(lengths), _SLICE):
        tokens = column.slice(start, _SLICE).combine_chunks().flatten().to_numpy().astype(np.int64)
        ends = np.cumsum(lengths[start : start + _SLICE])
        for i, text in enumerate(np.split(tokens, ends[:-1]), start):
            firsts[i], hashes[i] = text[0] if len(text) else -1, hash(text.tobytes())
            repeated += repetition(text.tolist())
        within = np.setdiff1d(np.arange(len(tokens)), ends - 1)  # a text, there is a token after this one
        bigrams = np.union1d(bigrams, tokens[within] << 32 | tokens[within + 1])
        num_bigrams += len(within)
    described = {"distinct": len(np.unique(hashes)) / len(hashes), "repetition": repeated / len(hashes)}
    return described | {"distinct_bigrams": len(bigrams) / max(1, num_bigrams)}, firsts


def first_token_auc(real: np.ndarray, generated: np.ndarray) -> float:
    """
    How well the first token alone tells real from generated completions. Tokens are counted in one half of the pairs
    and score the other half by the log-ratio of their counts, so that no pair is scored by its own counts.
    """
    sides, values = (real + 1, generated + 1), []
    for half in (0, 1) if len(real) > 1 else (1,):
        counts = [1 + np.bincount(side[half::2], minlength=max(map(np.max, sides)) + 1) for side in sides]
        scores = np.log(counts[0] / counts[1])
        values.append(auc(*(scores[side[1 - half :: 2]] for side in sides)))
    return sum(values) / len(values)


def describe_game(pairs: Dataset) -> dict[str, float]:
    """
    Lengths, shares, diversity and likelihoods of one opponent's pairs, which must have been scored, per completion or
    per token. The areas under the curve (AUC) say how well one number alone tells real from generated completions: the
    length, the first token, the log-prob per token under the opponent. Above 0.5, real completions score higher.
    """
    described, lengths, logps, firsts, table = {}, {}, {}, {}, pairs.with_format("arrow")[:]
    # In a pair that is not played, the real completion is scored in place of the generated one as well
    played, weights = table["played"].to_numpy(), table["weight"].to_numpy()
    for side in SIDES:
        lengths[side] = pyarrow.compute.list_value_length(table[f"{side}_ids"]).to_numpy()
        logps[side] = table[f"ref_{side}_logps"].to_numpy().astype(np.float64)
        texts, firsts[side] = describe_texts(table[f"{side}_ids"], lengths[side])
        described |= {f"{name}_{side}": value for name, value in texts.items()}
        described[f"mean_length_{side}"] = float(lengths[side].mean())
    return {
        **described,
        **{name: float(table[name].to_numpy().mean()) for name in (*KINDS, "played")},
        **dict(zip(FILTERED, (float((weights == 0).mean()), float(weights.mean())), strict=True)),
        "nll_real": -float(sum(logps["real"])) / int(lengths["real"].sum()),
        "nll_generated": -float(sum(logps["generated"][played])) / max(1, int(lengths["generated"][played].sum())),
        "auc_length": auc(lengths["real"], lengths["generated"]),
        "auc_first_token": first_token_auc(**firsts),
        "auc_logps": auc(*((logps[side] / np.maximum(1, lengths[side]))[played] for side in SIDES)),
    }


def find_warnings(games: dict[str, dict]) -> list[str]:
    """
    What deserves a look in an iteration's games, and what to do about it: a line with the numbers, then the remedy.
    What several games have in common is said once.

    Args:
        games (`dict[str, dict]`):
            By name of the dataset, what [`describe_game`] returns and what it is judged by: `num_pairs`, the `limit`
            of a completion, the share of real completions `beyond_limit`, the length `fitting` 95% of them, whether
            rows are `text` although there is a chat template, of which kind most pairs are that are `unplayed`, and
            the NLL of the real completions `nll_before` the last iteration (infinite if there was none).
    """
    causes, warnings = {name: _find_causes(game) for name, game in games.items()}, []
    for warning, text in WARNINGS.items():
        for cause in text:
            where = {name: game for name, game in games.items() if causes[name][warning] == cause}
            if where:
                numbers = "; ".join(f"{text['number'].format(**game)} ({name})" for name, game in where.items())
                remedy = text[cause].format(**next(iter(where.values())))
                warnings.append(f"{text['what']}: {numbers}.\n{remedy}")
    return warnings


def _find_causes(game: dict) -> dict[str, str | bool]:
    """The cause of each warning, by which its remedy is chosen; `False` if there is nothing to warn of."""
    template = "text" if game["text"] else "template"
    since = "start" if game["nll_before"] == math.inf else "training"
    few = 0.2 if game["unplayed"] == "filtered" else 0.8  # which is meant to leave out some
    truncated, unplayed = game["truncated"] > 0.2, game["played"] < few and game["unplayed"]
    # Few pairs say little: three standard errors of the Mann-Whitney statistic where both sides are alike
    far = max(0.25, 3 * math.sqrt((2 * game["num_pairs"] + 1) / 12) / game["num_pairs"])
    return {
        "truncated": truncated and ("limit" if game["beyond_limit"] > game["truncated"] / 2 else template),
        "empty": game["empty"] > 0.05 and template,
        "played": unplayed,
        "identical": game["identical"] > 0.5 and unplayed != "identical" and "memorized",
        "repeats_itself": game["distinct_generated"] < 0.5 * game["distinct_real"] and since,
        "loops": game["repetition_generated"] > 0.2 + game["repetition_real"] and since,
        "length": abs(game["auc_length"] - 0.5) > far and ("cut" if truncated and game["auc_length"] > 0.5 else since),
        "first_token": game["auc_first_token"] - 0.5 > far and template,
        "overshot": game["nll_real"] > game["nll_before"] + 0.02 and since,
    }


def metric_prefix(name: str) -> str:
    """Prefix of a dataset's metrics."""
    return {"train": "", "eval": "eval_"}.get(name, f"eval_{name}_")
