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
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, concatenate_datasets
from trl import DPOTrainer

from .engines import Engine
from .engines.generate import length_sorted_batches
from .pairs import PAIR_FEATURES, Columns, Game, as_preference, with_logps
from .run.games import Request, committed, read_rows, write_pairs, write_rows
from .run.logs import logger
from .run.processes import Processes, explain_out_of_memory
from .run.weights import OVERFLOW_REMEDY


# Pairs that are made, and in memory, at a time
_SLICE = 1000


def row_seed(*position: Any) -> int:
    """
    Seed of a row's sample, 63 bits: a function of its position (seed of the run, iteration, name of the dataset, index
    of the row) and of nothing that happened before.
    """
    digest = hashlib.sha256("/".join(map(str, position)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def commit_completions(
    engine: Engine, model: torch.nn.Module, game: Game, request: Request, names: list[str], share: tuple = (0, 1)
) -> dict[str, np.ndarray]:
    """
    Commits the opponent's completions of some datasets' prompts to disk, every few minutes. Those that are there
    already, from a stopped run or a worker elsewhere, are not generated again.

    Args:
        engine ([`~engines.Engine`]):
            What generates.
        model (`torch.nn.Module`):
            Opponent.
        game ([`~pairs.Game`]):
            Game.
        request ([`~run.games.Request`]):
            For which iteration, and where completions are committed.
        names (`list[str]`):
            Names of the datasets.
        share (`tuple[int, int]`, *optional*, defaults to `(0, 1)`):
            With (i, n), only rows are completed whose index is i modulo n.

    Returns:
        `dict[str, np.ndarray]`: Whether each row of each dataset was missing, and is now completed.
    """
    args, iteration, write, missing = engine.args, request.iteration, engine.processes.write, {}
    directory = request.directory(args.output_dir)
    for name in names:
        game.datasets[name].turn_to(iteration)
        indices = np.arange(len(game.datasets[name]))
        done = np.isin(indices, committed(engine.processes.on_main(read_rows, directory, name))[0])
        missing[name] = ~done & (indices % share[1] == share[0])
        if done.any() and name == "train":
            counted = f"{done.sum()} of {len(indices)} {name} prompts have been completed already"
            logger.warning(f"Iteration {iteration}: {counted}. Their completions are used.")
    nothing = not any(rows.any() for rows in missing.values())
    with nullcontext() if nothing else engine.open(model) as generate:
        for name, rows in missing.items():
            desc = f"Iteration {iteration}: completing {name} prompts"
            seed_of = partial(row_seed, args.seed, iteration, name)
            commit = partial(write, directory, write_rows, directory, name)
            columns, limit = game.datasets[name].columns, args.max_completion_length
            engine.complete(generate, columns, seed_of, limit, args.temperature_of(name), desc, commit, ~rows)
    return missing


def pair_completions(game: Game, output_dir: str, request: Request, name: str) -> Dataset:
    """
    The opponent's pairs on a dataset, made of the committed completions slice by slice, in a file beside them. Raises
    a `ValueError` if some are missing.
    """
    dataset, iteration, schema = game.datasets[name], request.iteration, PAIR_FEATURES.arrow_schema
    shards = read_rows(request.directory(output_dir), name)
    indices, positions = committed(shards)
    if len(indices) < len(dataset):
        missing = f"{len(dataset) - len(indices)} of {len(dataset)} completions of the {name} dataset"
        raise ValueError(f"Iteration {iteration}: {missing} are not there. Resume the run to make them.")
    rows = zip(dataset.columns, map(Columns(concatenate_datasets(shards)).__getitem__, positions), strict=True)
    held_out = name != "train"
    pairs = (game.rules.make_pair(*row, iteration, held_out) for row in rows)

    def weighted(part: list[dict[str, Any]]) -> pyarrow.Table:
        for pair, weight in zip(part, weigh(game, name, part), strict=True):
            pair |= {"weight": weight, "played": held_out or (pair["played"] and weight > 0)}
        return pyarrow.Table.from_pylist(part, schema)

    slices = iter(lambda: list(islice(pairs, _SLICE)), [])
    path = request.directory(output_dir) / f"{name}-pairs.arrow"
    return write_pairs(path, map(weighted, slices), schema)


def weigh(game: Game, name: str, pairs: list[dict[str, Any]]) -> list[float]:
    """The weights that `pair_filter` gives pairs of a dataset. Raises a `ValueError` if it returns something else."""
    if game.pair_filter is None:
        return [1.0] * len(pairs)
    columns = {column: [pair[column] for pair in pairs] for column in ("row", "generated_ids", "real_ids")}
    weights = np.asarray(game.ask(game.pair_filter, name, columns), np.float32)
    if weights.shape != (len(pairs),):
        what = f"`pair_filter` ({game.filter_name}) returns weights of shape {weights.shape} for {len(pairs)} pairs"
        raise ValueError(f"{what} of the {name} dataset: it must return a list with one for each.")
    for i in np.flatnonzero(~((weights >= 0) & np.isfinite(weights)))[:1]:
        what = f"`pair_filter` ({game.filter_name}) gives row {columns['row'][i]} of the {name} dataset"
        raise ValueError(f"{what} the weight {weights[i]}: it must be finite, and 0 or more.")
    return weights.tolist()


def check_played(pairs: Dataset, game: Game, iteration: int):
    """Raises a `ValueError` if there is no pair to learn from."""
    if any(pairs["played"][:]):
        return
    if not any(pairs["weight"][:]):
        what = f"`pair_filter` ({game.filter_name}) gives each of {len(pairs)} pairs weight 0"
        raise ValueError(f"Iteration {iteration} has nothing to learn from: {what}. Look at what it is given.")
    shares = ", ".join(f"{sum(pairs[kind][:])} are {kind}" for kind in ("empty", "identical", "truncated"))
    examples, decode = pairs.select(range(min(3, len(pairs)))), game.rules.tokenizer.decode
    examples = "\n".join(f"Row {pair['row']}: {decode(pair['generated_ids'])!r}" for pair in examples)
    raise ValueError(
        f"Iteration {iteration} has nothing to learn from: of {len(pairs)} completions, {shares}.\n{examples}\nEmpty "
        "ones: is the chat template that of the fine-tuning? Truncated ones: raise `max_completion_length`, or play "
        "them (`truncated_completions='keep'`). Identical ones: the data is memorized, or `temperature` is 0."
    )


def score(
    trainer: DPOTrainer, processes: Processes, pairs: Dataset, name: str, directory: Path | None = None
) -> Dataset:
    """
    The reference scores all pairs of a dataset, the longest in batches of `precompute_ref_batch_size`, shorter ones in
    larger numbers, with as many tokens in all. Scores are committed as completions are, and used by a run that goes
    on.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            Trainer, whose model is the reference.
        processes ([`~run.processes.Processes`]):
            Processes that share the work.
        pairs ([`~datasets.Dataset`]):
            Pairs.
        name (`str`):
            Name of the dataset.
        directory (`Path`, *optional*):
            Where to commit scores, if at all: see [`~run.games.Request`].

    Returns:
        [`~datasets.Dataset`]: The same pairs with their reference log-probs.

    Raises:
        `ValueError`: If a log-prob is not finite.
    """
    columns, args, model = Columns(pairs), trainer.args, trainer.model_wrapped
    batch_size = args.precompute_ref_batch_size or args.per_device_train_batch_size
    logps = {side: np.full(len(pairs), np.nan, np.float32) for side in ("real", "generated")}

    def note(scores: pyarrow.Table):
        for side, values in logps.items():
            values[scores["index"].to_numpy()] = scores[side].to_numpy()

    # Of these very pairs: completions that were lost may have been drawn anew
    scores_name = f"{name}-scores-{columns.fingerprint()[:16]}"
    for shard in processes.on_main(read_rows, directory, scores_name) if directory is not None else ():
        note(shard.data)

    def score_batch(batch: np.ndarray) -> pyarrow.Table:
        remedy = f"Lower `precompute_ref_batch_size` ({batch_size}), here and on resume."
        with explain_out_of_memory("scoring", remedy):
            inputs = trainer._prepare_inputs(trainer.data_collator([as_preference(columns[i]) for i in batch]))
            scores = trainer.compute_ref_log_probs(model, inputs)
        real, generated = (values.tolist() for values in scores)
        return pyarrow.table({"real": real, "generated": generated, "index": batch})

    def commit(scores: pyarrow.Table):
        note(scores)
        real, generated, index = (scores[column].to_numpy() for column in scores.column_names)
        for i in np.flatnonzero(~np.isfinite(real + generated))[:1]:
            what = f"log-probs of row {columns[index[i]]['row']} of the {name} dataset are {real[i]} (real completion)"
            what = f"The model's {what} and {generated[i]} (generated completion): its weights or activations overflow"
            raise ValueError(f"{what}. {OVERFLOW_REMEDY} Or check the model that self-play started from.")
        if directory is not None:
            processes.write(directory, write_rows, directory, scores_name, scores)

    lengths = columns.pair_lengths()
    batches = length_sorted_batches(lengths, lambda longest: batch_size * int(lengths.max()) // longest)
    training = model.training
    model.eval()
    processes.map(batches, score_batch, f"Scoring {name} pairs", commit, ~np.isnan(logps["real"]))
    model.train(training)
    clear_device_cache()
    return with_logps(pairs, logps)
