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

"""Pairs of a real and a generated completion: what makes one, who its opponent is, and the dataset that holds them."""

import hashlib
import inspect
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable
from transformers import PreTrainedTokenizerBase

from .schedule import Schedule


# As on disk: no vocabulary needs more than four bytes for a token
IDS = List(Value("int32"))
# One row per pair. `row` is the index in the user's dataset, `opponent` the iteration whose opponent wrote the
# completion, `weight` what the user's `pair_filter` gives it
PAIR_FEATURES = Features(
    {name: Value("int64") for name in ("row", "opponent")}
    | dict.fromkeys(("prompt_ids", "real_ids", "generated_ids"), IDS)
    | {name: Value("bool") for name in ("truncated", "empty", "identical", "played")}
    | {name: Value("float32") for name in ("weight", "ref_real_logps", "ref_generated_logps")}
)


@dataclass(frozen=True)
class Rules:
    """
    What makes a pair of a completion, and whether it is played.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        end_token_ids (`list[int]`):
            Ids that end a completion.
        max_length (`int` or `None`):
            Longest prompt plus completion, in tokens.
        truncated (`str`):
            See `truncated_completions` in [`SPINConfig`].
        play_empty (`bool`):
            Whether pairs with an empty generated completion are played.
        play_identical (`bool`):
            Whether pairs of identical completions are played. They have zero gradient in losses of the margin.
    """

    tokenizer: PreTrainedTokenizerBase
    end_token_ids: list[int]
    max_length: int | None
    truncated: str
    play_empty: bool
    play_identical: bool

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Completions or prompts as text, without special tokens."""
        return self.tokenizer.batch_decode(ids[:], skip_special_tokens=True)

    def finish(self, generated_ids: list[int], limit: int) -> tuple[list[int], bool]:
        """
        Cuts what comes from an engine, which goes on until the whole batch has ended, at the limit and at its first
        end token: an end token stands where one was sampled and nowhere else. Returns whether there was none as well.
        """
        ids = generated_ids[:limit]
        end = next((i for i, token in enumerate(ids) if token in self.end_token_ids), None)
        return ids if end is None else ids[: end + 1], end is None

    def make_pair(self, row: dict, completion: dict, opponent: int, held_out: bool) -> dict[str, Any]:
        """A pair without reference log-probs. Held out, nothing is trained: every pair counts."""
        real_ids, generated_ids, truncated = row["real_ids"], completion["generated_ids"], completion["truncated"]
        empty = not self.tokenizer.decode(generated_ids, skip_special_tokens=True).strip()
        if truncated and self.truncated == "cut_real" and not held_out:
            real_ids = real_ids[: len(generated_ids)]
        identical = generated_ids == real_ids
        left_out = (identical and not self.play_identical) or (empty and not self.play_empty)
        left_out = left_out or (truncated and self.truncated == "drop")
        ids = {"prompt_ids": row["prompt_ids"], "real_ids": real_ids, "generated_ids": generated_ids}
        flags = {"truncated": truncated, "empty": empty, "identical": identical, "played": held_out or not left_out}
        numbers = {"weight": 1.0, "ref_real_logps": 0.0, "ref_generated_logps": 0.0}
        return {"row": row["row"], "opponent": opponent, **ids, **flags, **numbers}


class Columns:
    """
    Rows of a dataset, read from its columns where these are: in memory or, as those of a game, mapped from files.
    `datasets` takes 50 to 150 microseconds for each row, and as much for each value of a column that is not read at
    once (datasets 5.2): with small models, that would be most of a run.
    """

    def __init__(self, dataset: Dataset):
        self._dataset, self._starts, self._chunks = dataset, [0], []
        for batch in dataset.with_format("arrow")[:].to_batches():
            self._starts.append(self._starts[-1] + len(batch))
            self._chunks.append({name: _views(batch[name]) for name in batch.schema.names})

    def __reduce__(self):  # for processes of a dataloader: they map the files, too
        return Columns, (self._dataset,)

    def __getitem__(self, index: int) -> dict[str, Any]:
        chunk = bisect_right(self._starts, index) - 1
        i, row = index - self._starts[chunk], {}
        for name, (values, ends) in self._chunks[chunk].items():
            row[name] = values.item(i) if ends is None else values[ends.item(i) : ends.item(i + 1)].tolist()
        return row

    def values(self, name: str) -> np.ndarray:
        """A column of numbers or flags."""
        return np.concatenate([chunk[name][0] for chunk in self._chunks])

    def lengths(self, name: str) -> np.ndarray:
        """Length of each list of a column."""
        return np.concatenate([np.diff(chunk[name][1]) for chunk in self._chunks], dtype=np.int64)

    def pair_lengths(self) -> np.ndarray:
        """Tokens of prompt, real and generated completion of each pair together."""
        prompt, real, generated = (self.lengths(f"{part}_ids") for part in ("prompt", "real", "generated"))
        return prompt + real + np.where(self.values("played"), generated, real)

    def fingerprint(self, *names: str) -> str:
        """SHA-256 of the content of some columns, or of all, whatever file it came from."""
        digest = hashlib.sha256()
        for name in names or self._dataset.column_names:
            digest.update(name.encode())
            for values, ends in (chunk[name] for chunk in self._chunks):
                digest.update(values if ends is None else np.diff(ends))
            for values, ends in (chunk[name] for chunk in self._chunks):
                digest.update(b"" if ends is None else values[ends[0] : ends[-1]])
        return digest.hexdigest()


def _views(column: pyarrow.Array) -> tuple[np.ndarray, np.ndarray | None]:
    """The values of a column, not copied, and where its lists begin and end in them if it holds lists."""
    if pyarrow.types.is_list(column.type):
        return column.values.to_numpy(), column.offsets.to_numpy()
    return column.to_numpy(zero_copy_only=False), None


def as_preference(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair under the names of DPOTrainer's collator: the real completion is chosen, the generated one rejected."""
    # A pair that is not played is twice the real completion: its log-ratios cancel, the gradient is 0
    generated = "generated" if pair["played"] else "real"
    ids = {"chosen_ids": pair["real_ids"], "rejected_ids": pair[f"{generated}_ids"]}
    logps = {"ref_chosen_logps": pair["ref_real_logps"], "ref_rejected_logps": pair[f"ref_{generated}_logps"]}
    # Held out, what the filter says is measured, and changes nothing: there is no gradient
    weight = pair["weight"] if pair["played"] else 0.0
    return {"row": pair["row"], "prompt_ids": pair["prompt_ids"], "weight": weight} | ids | logps


class PairCollator:
    """Adds to a batch of DPOTrainer's collator which rows its pairs are of, and their weights: 0 if not played."""

    def __init__(self, collator: Callable[[list[dict]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        more = {name: torch.tensor([example[name] for example in examples]) for name in ("row", "weight")}
        return self.collator(examples) | more


class GameDataset(torch.utils.data.Dataset):
    """
    Prompts with their real completions, and the generated completions of the current iteration.

    The dataloader is built once per `train()`, so what changes from one iteration to the next is the content of this
    dataset, never its length: one row per prompt. With several opponents, prompt `i` plays against opponent
    `(i + epoch) mod K` (the newest is 0), so K epochs of an iteration play every pair once. Before the game has
    started, the generated completions are empty, and the prompts are those of all iterations.

    Args:
        name (`str`):
            Name of the dataset.
        rows ([`~datasets.Dataset`]):
            Dataset with the columns `row`, `prompt_ids` and `real_ids`.
        size (`int`, *optional*):
            Number of prompts in an iteration. Defaults to all.
    """

    def __init__(self, name: str, rows: Dataset, size: int | None = None):
        self.name, self.all_rows, self.size = name, rows, min(size or len(rows), len(rows))
        self.epoch = 0  # of the iteration
        self.clear()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._columns:
            return as_preference(self._columns[(index + self.epoch) % len(self._columns)][index])
        row = self.columns[index]
        return {"chosen_ids": row.pop("real_ids"), "rejected_ids": [], "weight": 0.0} | row

    column_names = property(lambda self: list(self[0]))

    def lengths(self) -> np.ndarray:
        """Tokens of each row in this epoch: prompt, real and generated completion."""
        if not self._columns:
            return self.columns.lengths("prompt_ids") + self.columns.lengths("real_ids")
        by_opponent = np.stack([columns.pair_lengths() for columns in self._columns])
        rows = np.arange(len(self))
        return by_opponent[(rows + self.epoch) % len(by_opponent), rows]

    def turn_to(self, iteration: int):
        """Takes the prompts of an iteration: the next ones and, where they run out, the first ones again."""
        start = iteration * self.size % len(self.all_rows)
        self.rows = concatenate_datasets([self.all_rows] * 2).select(range(start, start + self.size))
        self.columns = Columns(self.rows)

    def clear(self):
        """Forgets the pairs, and which iteration it is."""
        self.rows, self.columns = self.all_rows, Columns(self.all_rows)
        self.pairs: list[Dataset] = []  # one dataset per opponent, the newest first
        self._columns: list[Columns] = []
        self.all_played = True  # no pair is left out

    def swap(self, pairs: Dataset):
        """
        Puts the pairs of an iteration in the place of the last one's.

        Args:
            pairs ([`~datasets.Dataset`]):
                Pairs of all opponents, one opponent after the other, the newest first.

        Raises:
            `ValueError`: If the pairs were not generated from this dataset's prompts, token by token.
        """
        starts = range(0, len(pairs), len(self))
        by_opponent = [pairs.select(range(start, min(start + len(self), len(pairs)))) for start in starts]
        columns = [Columns(opponent) for opponent in by_opponent]
        for opponent, theirs in zip(by_opponent, columns, strict=True):
            for column in ("row", "prompt_ids"):
                if self.columns.fingerprint(column) != theirs.fingerprint(column):
                    what = f"`{column}` of opponent {opponent['opponent'][0]}, {len(opponent)} for {len(self)} prompts"
                    what = f"The pairs for the {self.name} dataset ({what}) were generated from other prompts"
                    raise ValueError(f"{what}. Did data, tokenizer or chat template change? Use a new `output_dir`.")
        self.pairs, self._columns = by_opponent, columns
        self.all_played = all(theirs.values("played").all() for theirs in columns)


@dataclass
class Game:
    """
    The state of play. The trainer reads it, [`SelfPlayCallback`] changes it where an iteration begins.

    Args:
        datasets (`dict[str, GameDataset]`):
            Training data (`"train"`) and held-out data.
        left_out (`dict[str, dict[str, int]]`):
            Number of rows that cannot be played, by dataset and reason.
        sources (`dict[str, tuple[Dataset, Callable]]`):
            The user's datasets, each with what reads the prompt (text or messages) of a row.
        base_model (`str`):
            Name or path of the model that self-play starts from.
        rules ([`Rules`], *optional*):
            What becomes of a completion. Known once the first dataset is tokenized.
        pair_filter (`Callable`, *optional*):
            See `pair_filter` in [`SPINTrainer`].
        settings (`dict[str, Any]`):
            All that a completion depends on, beside opponent and iteration.
        schedule ([`~schedule.Schedule`], *optional*):
            Where iterations begin. Known once training begins.
        iteration (`int`):
            Current iteration.
        at_start (`bool`):
            Whether no step of the iteration has been taken: the policy is the opponent, and the loss ℓ(0).
    """

    datasets: dict[str, GameDataset] = field(default_factory=dict)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    sources: dict[str, tuple[Dataset, Callable[[dict], str | list[dict]]]] = field(default_factory=dict)
    base_model: str = ""
    rules: Rules | None = None
    pair_filter: Callable[..., list[float]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    schedule: Schedule | None = None
    iteration: int = 0
    at_start: bool = False

    @property
    def train(self) -> GameDataset:
        return self.datasets["train"]

    @property
    def held_out(self) -> dict[str, GameDataset]:
        return {name: dataset for name, dataset in self.datasets.items() if name != "train"}

    @property
    def watched(self) -> GameDataset:
        """The dataset to watch: held-out prompts, if there are any, as the model memorizes training pairs."""
        return next(iter(self.held_out.values()), self.train)

    @property
    def filter_name(self) -> str | None:
        return self.pair_filter and describe_function(self.pair_filter)

    def ask(self, function: Callable, name: str, pairs: Mapping[str, list] | Dataset) -> Any:
        """
        What a function of the user's says of pairs of a dataset: of prompts, generated and real completions, as texts
        or messages, and of those other columns of the dataset that it has parameters for.
        """
        dataset, read_prompt = self.sources[name]
        dataset = dataset.select(pairs["row"][:])
        texts = [[read_prompt(row) for row in dataset]]
        texts += [self.rules.decode(pairs[f"{side}_ids"]) for side in ("generated", "real")]
        if isinstance(texts[0][0], list):
            texts[1:] = ([[{"role": "assistant", "content": text}] for text in side] for side in texts[1:])
        taken = inspect.signature(function).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        names = [c for c in dataset.column_names if (takes_all or c in taken) and c not in [*taken][:3]]
        return function(*texts, **{name: dataset[name][:] for name in names})

    def swap(self, iteration: int, pairs: dict[str, Dataset], at_start: bool):
        """Puts the pairs of an iteration in the place of the last one's."""
        for name, dataset in self.datasets.items():
            dataset.turn_to(iteration)
            dataset.swap(pairs[name])
        self.iteration, self.at_start = iteration, at_start


def describe_function(function: Callable) -> str:
    """Name of a function of the user's, with the arguments that are set in it."""
    arguments, function = getattr(function, "keywords", {}), getattr(function, "func", function)
    return f"{getattr(function, '__qualname__', type(function).__qualname__)}{arguments or ''}"


def with_logps(pairs: Dataset, logps: dict[str, np.ndarray]) -> Dataset:
    """Pairs with the reference's summed log-probs of the real and of the generated completions."""
    table = pairs.data.table
    for side, values in logps.items():
        position = table.column_names.index(f"ref_{side}_logps")
        table = table.set_column(position, table.field(position), [pyarrow.array(values)])
    # Without a fingerprint, `datasets` would hash a copy of all rows in memory
    return Dataset(InMemoryTable(table), fingerprint=generate_random_fingerprint())


def leave_out_unplayed(inputs: dict[str, Any], accelerator: Accelerator) -> tuple[dict[str, Any], float]:
    """
    A batch without the pairs that are not played, where these have zero gradient, and the share of the pairs that
    stays. At least one pair does, so that the backward pass runs, and as many on all processes, which gather their
    metrics.
    """
    inputs = {key: value for key, value in inputs.items() if key != "row"}
    played = inputs["weight"] > 0
    keep = max(1, int(accelerator.gather(played.sum()).max()))
    if keep == len(played):
        return inputs, 1.0
    rows = played.long().argsort(descending=True, stable=True)[:keep]
    both = torch.cat([rows, rows + len(played)])
    of_pairs = {key for key in inputs if key.startswith("ref_")} | {"weight"}  # others are of each side
    inputs = {key: value[rows if key in of_pairs else both] for key, value in inputs.items()}
    return inputs, keep / len(played)
