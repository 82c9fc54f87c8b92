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

"""The game of an iteration: pairs of a real and a generated answer, in memory and on disk."""

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from datasets import Dataset, Features, List, Value
from datasets.table import InMemoryTable


MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
# One row per pair. `row` is the index in the user's dataset, `opponent` the iteration whose model generated the answer.
PAIR_FEATURES = Features(
    {
        "row": Value("int64"),
        "opponent": Value("int64"),
        "prompt_ids": List(Value("int64")),
        "real_ids": List(Value("int64")),
        "generated_ids": List(Value("int64")),
        "truncated": Value("bool"),
        "empty": Value("bool"),
        "identical": Value("bool"),
        "played": Value("bool"),
        "ref_real_logps": Value("float32"),
        "ref_generated_logps": Value("float32"),
    }
)


class GameDataset(torch.utils.data.Dataset):
    """
    Prompts with their real answers, and the generated answers of the current iteration.

    The dataloader is built once per `train()`, so what changes from one iteration to the next is the content of this
    dataset, never its length: one row per prompt. With several opponents, prompt `i` plays against opponent
    `(i + turn) mod K` (the newest is 0), so K passes with rising `turn` play every pair once.

    Args:
        name (`str`):
            Name of the dataset.
        rows ([`~datasets.Dataset`]):
            Dataset with the columns `row`, `prompt_ids` and `real_ids`.
    """

    def __init__(self, name: str, rows: Dataset):
        self.name = name
        self.rows = rows
        self.pairs: list[Dataset] = []  # one dataset per opponent, the newest first
        self.turn = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.pairs:
            raise ValueError(
                f"The game on the {self.name} dataset has not started: the opponent answers the prompts when `train()` "
                "opens an iteration. Call `train()` before `evaluate()`."
            )
        return self.serve(self.pairs[(index + self.turn) % len(self.pairs)][index])

    @staticmethod
    def serve(pair: dict[str, Any]) -> dict[str, Any]:
        """
        A pair under the names that DPOTrainer's collator expects.

        Args:
            pair (`dict[str, Any]`):
                Row of the pairs.

        Returns:
            `dict[str, Any]`: The real answer as `chosen_ids`, the generated one as `rejected_ids`.
        """
        # A pair that is not played is served as twice the real answer: its log-ratios cancel, the gradient is 0
        generated = "generated" if pair["played"] else "real"
        return {
            "prompt_ids": pair["prompt_ids"],
            "chosen_ids": pair["real_ids"],
            "rejected_ids": pair[f"{generated}_ids"],
            "ref_chosen_logps": pair["ref_real_logps"],
            "ref_rejected_logps": pair[f"ref_{generated}_logps"],
        }

    def swap(self, pairs: Dataset):
        """
        Puts the pairs of an iteration in the place of the last one's.

        Args:
            pairs ([`~datasets.Dataset`]):
                Pairs of all opponents, one opponent after the other, the newest first.

        Raises:
            `ValueError`: If the pairs were not generated from this dataset's prompts, token by token.
        """
        by_opponent = [
            pairs.select(range(start, min(start + len(self), len(pairs)))) for start in range(0, len(pairs), len(self))
        ]
        for opponent in by_opponent:
            for column in ("row", "prompt_ids"):
                same = all(a == b for a, b in zip(opponent[column], self.rows[column], strict=False))
                if len(opponent) != len(self) or not same:
                    raise ValueError(
                        f"The pairs for the {self.name} dataset were generated from other prompts than its own (column "
                        f"`{column}`, opponent {opponent['opponent'][0]}, {len(opponent)} pairs for {len(self)} "
                        "prompts). Did the dataset, the tokenizer or its chat template change? Use a new `output_dir`."
                    )
        self.pairs = by_opponent


def with_reference_logps(pairs: Dataset, logps: list[tuple[float, float]]) -> Dataset:
    """
    Sets the reference log-probs of pairs.

    Args:
        pairs ([`~datasets.Dataset`]):
            Pairs.
        logps (`list[tuple[float, float]]`):
            Summed log-probs of the real and of the generated answer, one tuple per pair.

    Returns:
        [`~datasets.Dataset`]: Pairs.
    """
    table = pairs.data.table
    for column, values in zip(("ref_real_logps", "ref_generated_logps"), zip(*logps, strict=True), strict=True):
        position = table.column_names.index(column)
        table = table.set_column(position, table.field(position), [pyarrow.array(values, pyarrow.float32())])
    return Dataset(InMemoryTable(table))


def iteration_dir(output_dir: str, iteration: int) -> Path:
    return Path(output_dir) / "self_play" / f"iteration-{iteration}"


def store_game(output_dir: str, iteration: int, games: dict[str, Dataset], manifest: dict[str, Any]):
    """
    Writes the pairs of an iteration: one Parquet file per dataset, then the manifest, each by a temporary name and an
    atomic rename. An iteration without a manifest does not exist.

    Args:
        output_dir (`str`):
            Output directory of the run.
        iteration (`int`):
            Self-play iteration.
        games (`dict[str, Dataset]`):
            Pairs by name of the dataset.
        manifest (`dict[str, Any]`):
            What was played and measured, JSON-serializable.
    """
    directory = iteration_dir(output_dir, iteration)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    for name, pairs in games.items():
        with _atomic_open(directory / f"{name}.parquet") as file:
            pyarrow.parquet.write_table(pairs.data.table, file)
    manifest = {"schema_version": SCHEMA_VERSION, "iteration": iteration, "games": sorted(games), **manifest}
    with _atomic_open(directory / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=2, ensure_ascii=False).encode())


def load_game(output_dir: str, iteration: int) -> dict[str, Dataset]:
    """
    Reads the pairs of an iteration.

    Args:
        output_dir (`str`):
            Output directory of the run.
        iteration (`int`):
            Self-play iteration.

    Returns:
        `dict[str, Dataset]`: Pairs by name of the dataset.

    Raises:
        `ValueError`: If the iteration is not there, or was not written to its end.
    """
    directory = iteration_dir(output_dir, iteration)
    if not (directory / MANIFEST).is_file():
        raise ValueError(
            f"The game of iteration {iteration} is not complete: {directory / MANIFEST} does not exist. Resume from a "
            "checkpoint of an earlier iteration, or start again in a new `output_dir`."
        )
    manifest = json.loads((directory / MANIFEST).read_text())
    return {
        name: Dataset(InMemoryTable(pyarrow.parquet.read_table(directory / f"{name}.parquet")))
        for name in manifest["games"]
    }


@contextmanager
def _atomic_open(path: Path):
    """A temporary file that takes its final name when it is complete and synced to disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
