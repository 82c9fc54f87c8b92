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

"""The opponent completes, the reference scores: what is computed at a boundary, on plain arguments."""

import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset

from .engines import Engine
from .engines.generate import length_sorted_batches
from .pairs import PAIR_FEATURES, Columns, Game, Rules, as_preference, with_logps
from .run.games import Request, read_completions, read_rows, write_rows
from .run.logs import logger
from .run.processes import Processes, explain_out_of_memory
from .spin_config import SPINConfig


# Summed log-probs of the real and of the generated completions of some pairs, see [`~pairs.as_preference`]
LogProbs = Callable[[list[dict[str, Any]]], tuple[torch.Tensor, torch.Tensor]]


def row_seed(*position: Any) -> int:
    """
    Seed of a row's sample, 63 bits: a function of its position (seed of the run, iteration, name of the dataset, index
    of the row) and of nothing that happened before.
    """
    digest = hashlib.sha256("/".join(map(str, position)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_pairs(rows: Dataset, completions: list[dict], rules: Rules, opponent: int, held_out: bool) -> Dataset:
    """Pairs of the real and the generated completions of all rows, without reference log-probs."""
    columns = Columns(rows)
    pairs = [rules.make_pair(columns[i], completion, opponent, held_out) for i, completion in enumerate(completions)]
    return Dataset.from_list(pairs, features=PAIR_FEATURES)


def generate_pairs(
    engine: Engine, model: torch.nn.Module, game: Game, args: SPINConfig, request: Request, names: list[str]
) -> tuple[dict[str, Dataset], int]:
    """
    The opponent's pairs on some datasets of the game, and the number of tokens that it generated for them. Completions
    are committed to disk every few minutes, and those that a stopped run has committed are used.
    """
    iteration, processes, num_tokens, pairs = request.iteration, engine.processes, 0, {}
    directory = request.directory(args.output_dir)
    stored = processes.on_main(read_completions, args.output_dir, request, names)
    for name in names:
        rows, done = game.datasets[name].rows, stored[name]
        if done and name == "train":
            found = f"{len(done)} of {len(rows)} {name} prompts have been completed already"
            logger.warning(f"Iteration {iteration}: {found}. Their completions are used.")
        commit = partial(processes.write, directory, write_rows, directory, name)
        prompts, seeds = rows["prompt_ids"][:], [row_seed(args.seed, iteration, name, row) for row in rows["row"][:]]
        desc = f"Iteration {iteration}: completing {name} prompts"
        completions = engine.complete(model, prompts, seeds, args.max_completion_length, desc, done, commit)
        num_tokens += sum(len(c["generated_ids"]) for i, c in enumerate(completions) if i not in done)
        pairs[name] = make_pairs(rows, completions, game.rules, iteration, held_out=name != "train")
    return pairs, num_tokens


def check_played(pairs: Dataset, rules: Rules, iteration: int):
    """Raises a `ValueError` if there is no pair to learn from."""
    if any(pairs["played"][:]):
        return
    shares = ", ".join(f"{sum(pairs[kind][:])} are {kind}" for kind in ("empty", "identical", "truncated"))
    examples = pairs.select(range(min(3, len(pairs))))
    examples = "\n".join(f"Row {pair['row']}: {rules.tokenizer.decode(pair['generated_ids'])!r}" for pair in examples)
    raise ValueError(
        f"Iteration {iteration} has nothing to learn from: of {len(pairs)} completions, {shares}.\n{examples}\n"
        "Empty completions: is the chat template the one the model was fine-tuned with? Truncated ones, under "
        "`truncated_completions='drop'`: raise `max_completion_length`, or check that the model was fine-tuned to end "
        "its completions. Identical ones: the model has memorized the data, or `temperature` is 0."
    )


def score(
    logps_of: LogProbs, processes: Processes, pairs: Dataset, name: str, batch_size: int, directory: Path | None = None
) -> Dataset:
    """
    The reference scores all pairs of a dataset. Scores are committed as completions are, and used by a run that goes
    on.

    Args:
        logps_of (`Callable`):
            The reference.
        processes ([`~run.processes.Processes`]):
            Processes that share the work.
        pairs ([`~datasets.Dataset`]):
            Pairs.
        name (`str`):
            Name of the dataset.
        batch_size (`int`):
            Number of the longest pairs in a batch. Shorter ones come in larger numbers, with as many tokens in all.
        directory (`Path`, *optional*):
            Where to commit scores, if at all: see [`~run.games.Request`].

    Returns:
        [`~datasets.Dataset`]: The same pairs with their reference log-probs.

    Raises:
        `ValueError`: If a log-prob is not finite.
    """
    columns = Columns(pairs)
    lengths = columns.pair_lengths().tolist()
    batches = length_sorted_batches(lengths, lambda longest: batch_size * max(lengths) // longest)
    # Of these very pairs: completions that were lost may have been drawn anew
    scores_name = f"{name}-scores-{columns.fingerprint()[:16]}"
    done = directory and processes.on_main(read_rows, directory, scores_name)

    def score_batch(batch: list[int]) -> list[dict[str, float]]:
        remedy = f"Lower `precompute_ref_batch_size` ({batch_size}), here and on resume."
        with explain_out_of_memory("scoring", remedy):
            real, generated = logps_of([as_preference(columns[i]) for i in batch])
        return [{"real": r, "generated": g} for r, g in zip(real.tolist(), generated.tolist(), strict=True)]

    def commit(scores: list[tuple[int, dict[str, float]]]):
        for i, logps in scores:
            if not all(map(math.isfinite, logps.values())):
                raise ValueError(
                    f"The model's log-probs of row {columns.scalars['row'][i]} of the {name} dataset are "
                    f"{logps['real']} (real completion) and {logps['generated']} (generated completion): its weights "
                    "or activations overflow. Train in bfloat16 or float32, not float16, lower the learning rate, or "
                    "check the model that self-play started from."
                )
        if directory is not None:
            processes.write(directory, write_rows, directory, scores_name, scores)

    scores = processes.map(batches, score_batch, f"Scoring {name} pairs", done, commit)
    clear_device_cache()
    return with_logps(pairs, [(logps["real"], logps["generated"]) for logps in scores])
