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

import glob
import hashlib
import io
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import pyarrow.parquet
import torch
from accelerate.logging import get_logger
from datasets import Dataset, Features, List, Value
from datasets.table import InMemoryTable


logger = get_logger(__name__)

MANIFEST, PROBES, HISTORY = "manifest.json", "probes.json", "log_history.json"
SCHEMA_VERSION = 1
_SHARD_ROWS = 10_000
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
        # Under the model that self-play started from, if the reference is mixed with it
        "base_real_logps": Value("float32"),
        "base_generated_logps": Value("float32"),
    }
)
# What a batch holds beside that which DPOTrainer knows
GAME_COLUMNS = ("played", "base_chosen_logps", "base_rejected_logps")


class Columns:
    """
    Rows of a dataset, read from its columns in memory. `datasets` takes 50 to 150 microseconds for each row, and as much
    for each value of a column that is not read at once (datasets 5.2): with small models, that would be most of a run.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset whose columns are lists of integers, or scalars.
    """

    def __init__(self, dataset: Dataset):
        table = dataset.with_format("arrow")[:]
        self.scalars, self._lists = {}, {}
        for name, column in zip(table.column_names, table.columns, strict=True):
            column = column.combine_chunks()
            if pyarrow.types.is_list(column.type):
                lengths = pyarrow.compute.list_value_length(column).to_numpy()
                self._lists[name] = column.flatten().to_numpy(), np.concatenate([[0], np.cumsum(lengths)])
            else:
                self.scalars[name] = column.to_pylist()

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: values[index] for name, values in self.scalars.items()}
        for name, (values, ends) in self._lists.items():
            row[name] = values[ends[index] : ends[index + 1]].tolist()
        return row

    def lengths(self, name: str) -> np.ndarray:
        """Length of each list of a column."""
        return np.diff(self._lists[name][1])

    def same(self, name: str, other: "Columns") -> bool:
        """Whether a column is the same as another's."""
        if name in self.scalars:
            return self.scalars[name] == other.scalars[name]
        return all(map(np.array_equal, self._lists[name], other._lists[name]))


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
        self.fingerprint = fingerprint(rows)
        self.pairs: list[Dataset] = []  # one dataset per opponent, the newest first
        self._columns: list[Columns] = []
        self.proto_ids = None  # the answers of iteration 0, where the objective needs them
        self.epoch = 0
        self.turn = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._check_started()
        row = self.serve(self._columns[(index + self.turn) % len(self._columns)][index])
        return row if self.proto_ids is None else row | {"proto_ids": self.proto_ids[index]}

    def _check_started(self):
        if not self.pairs:
            raise ValueError(
                f"The game on the {self.name} dataset has not started: the opponent answers the prompts when `train()` "
                "opens an iteration. Call `train()` before `evaluate()`."
            )

    def lengths(self) -> np.ndarray:
        """
        Returns:
            `np.ndarray`: Tokens of each row in this turn: prompt, real and generated answer.
        """
        self._check_started()
        by_opponent = [pair_lengths(columns) for columns in self._columns]
        rows = np.arange(len(self))
        return np.stack(by_opponent)[(rows + self.turn) % len(by_opponent), rows]

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
            "played": pair["played"],
            "base_chosen_logps": pair["base_real_logps"],
            "base_rejected_logps": pair[f"base_{generated}_logps"],
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
        columns, own = [Columns(opponent) for opponent in by_opponent], Columns(self.rows)
        for opponent, theirs in zip(by_opponent, columns, strict=True):
            for column in ("row", "prompt_ids"):
                if not own.same(column, theirs):
                    raise ValueError(
                        f"The pairs for the {self.name} dataset were generated from other prompts than its own (column "
                        f"`{column}`, opponent {opponent['opponent'][0]}, {len(opponent)} pairs for {len(self)} "
                        "prompts). Did the dataset, the tokenizer or its chat template change? Use a new `output_dir`."
                    )
        self.pairs, self._columns = by_opponent, columns


def pair_lengths(pairs: Columns) -> np.ndarray:
    """
    Unique tokens of pairs.

    Args:
        pairs ([`Columns`]):
            Pairs.

    Returns:
        `np.ndarray`: Tokens of prompt, real and generated answer together, one number per pair.
    """
    prompt, real, generated = (pairs.lengths(f"{part}_ids") for part in ("prompt", "real", "generated"))
    return prompt + real + np.where(pairs.scalars["played"], generated, real)


class GameCollator:
    """
    Adds to a batch what DPOTrainer's collator leaves out.

    Args:
        collator (`Callable`):
            Collator for pairs of `chosen_ids` and `rejected_ids`.
    """

    def __init__(self, collator: Callable[[list[dict]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        for column in GAME_COLUMNS:
            if examples[0].get(column) is not None:
                batch[column] = torch.tensor([example[column] for example in examples])
        if "proto_ids" in examples[0]:
            proto = self.collator([example | {"chosen_ids": example["proto_ids"]} for example in examples])
            for key in ("input_ids", "attention_mask", "completion_mask"):
                batch[f"proto_{key}"] = proto[key][: len(examples)]
        return batch


def with_logps(pairs: Dataset, model: str, logps: list[tuple[float, float]]) -> Dataset:
    """
    Sets log-probs of pairs.

    Args:
        pairs ([`~datasets.Dataset`]):
            Pairs.
        model (`str`):
            Whose log-probs: `"ref"` or `"base"`.
        logps (`list[tuple[float, float]]`):
            Summed log-probs of the real and of the generated answer, one tuple per pair.

    Returns:
        [`~datasets.Dataset`]: Pairs.
    """
    table = pairs.data.table
    for side, values in zip(("real", "generated"), zip(*logps, strict=True), strict=True):
        column = f"{model}_{side}_logps"
        position = table.column_names.index(column)
        table = table.set_column(position, table.field(position), [pyarrow.array(values, pyarrow.float32())])
    return Dataset(InMemoryTable(table))


def iteration_dir(output_dir: str, iteration: int) -> Path:
    return Path(output_dir) / "self_play" / f"iteration-{iteration}"


def fingerprint(rows: Dataset) -> str:
    """
    Fingerprint of a dataset's content, whatever file it came from.

    Args:
        rows ([`~datasets.Dataset`]):
            Dataset with the columns `row`, `prompt_ids` and `real_ids`.

    Returns:
        `str`: SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(10_000):
        for column in ("row", "prompt_ids", "real_ids"):
            values = batch[column].combine_chunks()
            if pyarrow.types.is_list(values.type):
                digest.update(pyarrow.compute.list_value_length(values).to_numpy(zero_copy_only=False).tobytes())
                values = values.flatten()
            digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def write_answers(directory: Path, name: str, answers: list[dict[str, Any]]):
    """
    Commits a shard of answers while generation goes on. The file carries its checksum in its name.

    Args:
        directory (`Path`):
            Directory of one opponent's answers.
        name (`str`):
            Name of the dataset.
        answers (`list[dict[str, Any]]`):
            Answers with their `index` in the dataset, see [`~generation.generate_batch`].
    """
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(answers), buffer)
    data = buffer.getvalue()
    with atomic_open(directory / f"{name}-{hashlib.sha256(data).hexdigest()}.parquet") as file:
        file.write(data)


def read_answers(output_dir: str, iteration: int, request: str, names: list[str]) -> dict[str, dict[int, dict]]:
    """
    Answers to the same request that a run left behind when it was stopped: committed shards, or a stored game of which
    a part is damaged. What is damaged is named and left out.

    Args:
        output_dir (`str`):
            Output directory of the run.
        iteration (`int`):
            Self-play iteration.
        request (`str`):
            Hash of all that the answers depend on, see [`store_game`].
        names (`list[str]`):
            Names of the datasets.

    Returns:
        `dict[str, dict[int, dict]]`: Answers by name of the dataset and index.
    """
    directory = iteration_dir(output_dir, iteration)
    answers = {name: {} for name in names}

    def damaged(path: Path):
        logger.warning(f"{path} is damaged: it does not match its checksum. Its rows are generated again.")

    for name in names:
        for path in sorted((directory / f"answers-{request[:16]}").glob(f"{glob.escape(name)}-{64 * '?'}.parquet")):
            if _sha256(path) != path.stem.removeprefix(f"{name}-"):
                damaged(path)
                continue
            for answer in pyarrow.parquet.read_table(path).to_pylist():
                answers[name][answer.pop("index")] = answer
    manifest = read_manifest(output_dir, iteration)
    if manifest is not None and manifest["request"] == request:
        first = defaultdict(int)
        for shard in manifest["shards"]:
            path, name = directory / shard["file"], shard["dataset"]
            if _sha256(path) == shard["sha256"]:
                for index, pair in enumerate(pyarrow.parquet.read_table(path).to_pylist(), first[name]):
                    if pair["opponent"] == iteration:
                        answers[name][index] = {key: pair[key] for key in ("prompt_ids", "generated_ids", "truncated")}
            else:
                damaged(path)
            first[name] += shard["rows"]
    return answers


def store_game(output_dir: str, iteration: int, games: dict[str, Dataset], manifest: dict[str, Any]):
    """
    Writes the pairs of an iteration: Parquet shards, then the manifest with their checksums, each by a temporary name
    and an atomic rename. An iteration without a manifest does not exist.

    Args:
        output_dir (`str`):
            Output directory of the run.
        iteration (`int`):
            Self-play iteration.
        games (`dict[str, Dataset]`):
            Pairs by name of the dataset.
        manifest (`dict[str, Any]`):
            What was played and measured, JSON-serializable, with the hash of all that it depends on as `request`.
    """
    directory = iteration_dir(output_dir, iteration)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    for path in directory.glob("*.parquet"):
        path.unlink()
    shards = []
    for name, pairs in games.items():
        for start in range(0, len(pairs), _SHARD_ROWS):
            table = pairs.data.table.slice(start, _SHARD_ROWS)
            path = directory / f"{name}-{start // _SHARD_ROWS:05d}.parquet"
            with atomic_open(path) as file:
                pyarrow.parquet.write_table(table, file)
            shards.append({"dataset": name, "file": path.name, "rows": len(table), "sha256": _sha256(path)})
    manifest = {"schema_version": SCHEMA_VERSION, "iteration": iteration, **manifest, "shards": shards}
    write_json(directory / MANIFEST, manifest)
    for path in directory.glob("answers-*"):
        shutil.rmtree(path)


def read_manifest(output_dir: str, iteration: int) -> dict[str, Any] | None:
    """
    Reads the manifest of an iteration's game.

    Args:
        output_dir (`str`):
            Output directory of the run.
        iteration (`int`):
            Self-play iteration.

    Returns:
        `dict[str, Any]` or `None`: Manifest, if the game was written to its end.
    """
    path = iteration_dir(output_dir, iteration) / MANIFEST
    if not path.is_file():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has the schema version {manifest['schema_version']}, and this version of trl-spin reads "
            f"{SCHEMA_VERSION}. Go on with the version that wrote it ({manifest.get('versions')}), or start again in a "
            "new `output_dir`."
        )
    return manifest


def find_game_fault(output_dir: str, iteration: int) -> str | None:
    """
    What is wrong with the stored game of an iteration.

    Args:
        output_dir (`str`):
            Output directory of the run.
        iteration (`int`):
            Self-play iteration.

    Returns:
        `str` or `None`: The fault, which names the file; `None` if the game is complete and intact.
    """
    directory = iteration_dir(output_dir, iteration)
    manifest = read_manifest(output_dir, iteration)
    if manifest is None:
        return f"{directory / MANIFEST} does not exist"
    for shard in manifest["shards"]:
        if _sha256(directory / shard["file"]) != shard["sha256"]:
            return f"{directory / shard['file']} is damaged or missing: it does not match its checksum"
    return None


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
        `ValueError`: If the game is not there, not complete, or damaged.
    """
    if fault := find_game_fault(output_dir, iteration):
        raise ValueError(
            f"The game of iteration {iteration} cannot be read: {fault}. Resume from a checkpoint of an earlier "
            "iteration, which generates it again, or start again in a new `output_dir`."
        )
    tables = defaultdict(list)
    for shard in read_manifest(output_dir, iteration)["shards"]:
        table = pyarrow.parquet.read_table(iteration_dir(output_dir, iteration) / shard["file"])
        tables[shard["dataset"]].append(table)
    return {name: Dataset(InMemoryTable(pyarrow.concat_tables(parts))) for name, parts in tables.items()}


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_open(path: Path):
    """
    A temporary file that takes its final name when it is complete and synced to disk.

    Args:
        path (`Path`):
            Final name. Its directory is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any):
    """
    Writes a JSON file, complete or not at all.

    Args:
        path (`Path`):
            File.
        content (`Any`):
            JSON-serializable content.
    """
    with atomic_open(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode())
