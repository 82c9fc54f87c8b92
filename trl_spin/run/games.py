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

"""The pairs of an iteration on disk: checksummed shards, and a manifest that is written last."""

import glob
import hashlib
import io
import json
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset
from datasets.table import InMemoryTable

from .files import MANIFEST, atomic_open, checksums, find_fault, game_dir, read_intact, read_records, write_json
from .logs import logger


_SHARD_ROWS = 10_000


@dataclass(frozen=True)
class Request:
    """
    The game of an iteration against these weights: all that its completions depend on.

    Args:
        iteration (`int`):
            Self-play iteration.
        opponent (`str`):
            Fingerprint of the weights.
        settings (`dict[str, Any]`):
            Seed, sampling, rules, data.
    """

    iteration: int
    opponent: str
    settings: dict[str, Any] = field(repr=False)

    @property
    def content(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "opponent": self.opponent, **self.settings}

    @cached_property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    def directory(self, output_dir: str) -> Path:
        """Where completions and their scores are committed while more of them are computed."""
        return game_dir(output_dir, self.iteration) / f"completions-{self.hash[:16]}"


def write_rows(directory: Path, name: str, rows: list[tuple[int, dict[str, Any]]]):
    """Commits results of some rows of a dataset, by index. The file carries its checksum in its name."""
    buffer = io.BytesIO()
    table = pyarrow.Table.from_pylist([{"index": index, **row} for index, row in rows])
    pyarrow.parquet.write_table(table, buffer)
    data = buffer.getvalue()
    with atomic_open(directory / f"{name}-{hashlib.sha256(data).hexdigest()}.parquet") as file:
        file.write(data)


def read_rows(directory: Path, name: str) -> dict[int, dict[str, Any]]:
    """What a stopped run has committed of a dataset, by index. What is damaged is named and left out."""
    paths = sorted(directory.glob(f"{glob.escape(name)}-{64 * '?'}.parquet"))
    rows = [row for path in paths for row in _read_shard(path, path.stem.removeprefix(f"{name}-"))]
    return {row.pop("index"): row for row in rows}


def _read_shard(path: Path, checksum: str) -> list[dict[str, Any]]:
    if checksums([path]) == [checksum]:
        return pyarrow.parquet.read_table(path).to_pylist()
    logger.warning(f"{path} is damaged: it does not match its checksum. Its rows are computed again.")
    return []


def read_completions(output_dir: str, request: Request, names: list[str]) -> dict[str, dict[int, dict]]:
    """
    Completions for the same request that a stopped run left behind, by name of the dataset and index: those that it
    committed, and those of a stored game of which a part is damaged.
    """
    completions = {name: read_rows(request.directory(output_dir), name) for name in names}
    manifest = read_manifest(output_dir, request.iteration)
    if manifest is not None and manifest["request"] == request.hash:
        first = Counter()
        for shard in manifest["shards"]:
            name, path = shard["dataset"], game_dir(output_dir, request.iteration) / shard["file"]
            for index, row in enumerate(_read_shard(path, shard["sha256"]), first[name]):
                # Shards of a game hold pairs of earlier opponents, too
                if name in names and row["opponent"] == request.iteration:
                    completions[name][index] = {key: row[key] for key in ("prompt_ids", "generated_ids", "truncated")}
            first[name] += shard["rows"]
    return completions


def store_game(output_dir: str, iteration: int, pairs: dict[str, Dataset], manifest: dict[str, Any]):
    """
    Writes the pairs of an iteration, by name of the dataset: Parquet shards, then the manifest with their checksums,
    each by a temporary name and an atomic rename. An iteration without a manifest does not exist.
    """
    directory = game_dir(output_dir, iteration)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    for path in directory.glob("*.parquet"):
        path.unlink()
    shards = []
    for name, dataset in pairs.items():
        for start in range(0, len(dataset), _SHARD_ROWS):
            table = dataset.data.table.slice(start, _SHARD_ROWS)
            path = directory / f"{name}-{start // _SHARD_ROWS:05d}.parquet"
            with atomic_open(path) as file:
                pyarrow.parquet.write_table(table, file)
            shards.append({"dataset": name, "file": path.name, "rows": len(table), "sha256": checksums([path])[0]})
    write_json(directory / MANIFEST, {"iteration": iteration, **manifest, "shards": shards})
    remove_completions(output_dir, iteration)


def remove_completions(output_dir: str, iteration: int):
    """Removes committed completions that are not needed any more."""
    for path in game_dir(output_dir, iteration).glob("completions-*"):
        shutil.rmtree(path)


def read_manifest(output_dir: str, iteration: int) -> dict[str, Any] | None:
    """The manifest of an iteration's game; `None` if the game was not written to its end, or it is damaged."""
    return read_intact(game_dir(output_dir, iteration) / MANIFEST, "Until then, its game does not exist.")


def read_models(output_dir: str, last: int) -> list[dict[str, Any]]:
    """
    What is known of each model up to that of an iteration, the one that self-play started from (-1) first, as a flat
    dict: settings and results of the iteration that made it, and the numbers of the game in which it was the opponent.
    """
    models = []
    for record in [{"iteration": -1}, *read_records(output_dir, last + 1)]:
        manifest = read_manifest(output_dir, record["iteration"] + 1) or {"metrics": {}}
        game = {key.replace("self_play/nll_real", "nll/real"): value for key, value in manifest["metrics"].items()}
        # In its record, these are of the game in which it was the player
        models.append(game | {key: value for key, value in record.items() if "self_play/" not in key})
    return models


def find_stored(output_dir: str, request: Request) -> tuple[dict[str, Dataset], dict[str, float]] | None:
    """Pairs and metrics of the game that was requested, if it is stored and intact."""
    if find_fault(game_dir(output_dir, request.iteration), request=request.hash):
        return None
    remove_completions(output_dir, request.iteration)  # of a run that stopped before it did
    return load_game(output_dir, request.iteration), read_manifest(output_dir, request.iteration)["metrics"]


def load_game(output_dir: str, iteration: int, run: str | None = None) -> dict[str, Dataset]:
    """
    Reads the pairs of an iteration.

    Args:
        output_dir (`str`):
            Output directory of the run.
        iteration (`int`):
            Self-play iteration.
        run (`str`, *optional*):
            Run to which the game should belong.

    Returns:
        `dict[str, Dataset]`: Pairs by name of the dataset.

    Raises:
        `ValueError`: If the game is not there, not complete, damaged, or of another iteration or run.
    """
    if fault := find_fault(game_dir(output_dir, iteration), iteration=iteration, **({"run": run} if run else {})):
        remedy = "Resume from an earlier iteration's checkpoint, which makes it again, or use a new `output_dir`."
        raise ValueError(f"The game of iteration {iteration} cannot be read: {fault}. {remedy}")
    tables = defaultdict(list)
    for shard in read_manifest(output_dir, iteration)["shards"]:
        table = pyarrow.parquet.read_table(game_dir(output_dir, iteration) / shard["file"])
        tables[shard["dataset"]].append(table)
    return {name: Dataset(InMemoryTable(pyarrow.concat_tables(parts))) for name, parts in tables.items()}
