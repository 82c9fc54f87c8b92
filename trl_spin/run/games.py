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
import json
import shutil
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, concatenate_datasets

from .files import MANIFEST, SFT, atomic_open, checksums, find_fault, game_dir, read_intact, read_records, write_json
from .logs import logger


_SHARD_ROWS = 50_000


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
        # Another run may have the same completions made
        content = {key: value for key, value in self.content.items() if key != "run"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def directory(self, output_dir: str) -> Path:
        """Where completions and their scores are committed while more of them are computed."""
        return game_dir(output_dir, self.iteration) / f"completions-{self.hash[:16]}"


def write_rows(directory: Path, name: str, rows: pyarrow.Table):
    """
    Commits results of some rows of a dataset, by `index`. The file carries its checksum in its name, so that others
    may commit at the same time, and commit the same.
    """
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    data = sink.getvalue()
    with atomic_open(directory / f"{name}-{hashlib.sha256(data).hexdigest()}.arrow", f".{uuid.uuid4().hex}") as file:
        file.write(data)


def write_pairs(path: Path, tables: Iterable[pyarrow.Table], schema: pyarrow.Schema) -> Dataset:
    """Writes a file of pairs, and maps it into memory."""
    with atomic_open(path) as file, pyarrow.ipc.new_stream(file, schema) as stream:
        for table in tables:
            stream.write_table(table)
    return Dataset.from_file(str(path))


def read_rows(directory: Path, name: str) -> list[Dataset]:
    """What is committed of a dataset, in no order, as it lies on disk. What is damaged is named and left out."""
    paths, shards = sorted(directory.glob(f"{glob.escape(name)}-{64 * '?'}.arrow")), []
    for path, checksum in zip(paths, checksums(paths), strict=True):
        if path.stem == f"{name}-{checksum}":
            shards.append(Dataset.from_file(str(path)))
        else:
            logger.warning(f"{path} is damaged: it does not match its checksum. Its rows are computed again.")
    return shards


def committed(shards: list[Dataset]) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rows that are committed, in order, and where each of them is in the shards, put together."""
    indices = [np.empty(0, np.int64), *(shard.data["index"].to_numpy() for shard in shards)]
    return np.unique(np.concatenate(indices), return_index=True)


def store_game(output_dir: str, iteration: int, pairs: dict[str, Dataset], manifest: dict[str, Any]):
    """
    Writes the pairs of an iteration, by name of the dataset: Arrow shards, then the manifest with their checksums,
    each by a temporary name and an atomic rename. An iteration without a manifest does not exist.
    """
    directory = game_dir(output_dir, iteration)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).unlink(missing_ok=True)
    for path in directory.glob("*.arrow"):
        path.unlink()
    shards = []
    for name, dataset in pairs.items():
        for start in range(0, len(dataset), _SHARD_ROWS):
            path = directory / f"{name}-{start // _SHARD_ROWS:05d}.arrow"
            table = dataset.data.table.slice(start, _SHARD_ROWS)
            write_pairs(path, [table], table.schema)
            shards.append({"dataset": name, "file": path.name, "rows": len(table), "sha256": checksums([path])[0]})
    write_json(directory / MANIFEST, {"iteration": iteration, **manifest, "shards": shards})


def remove_completions(output_dir: str, iteration: int):
    """Removes committed completions that are not needed any more."""
    for path in game_dir(output_dir, iteration).glob("completions-*"):
        shutil.rmtree(path, ignore_errors=True)  # a worker may come late


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


def read_sft(output_dir: str | Path) -> list[dict[str, Any]]:
    """The models of `compare_sft`, the best one first, as those above."""
    content = read_intact(Path(output_dir) / "self_play" / SFT, "Until then, SFT is missing in tables.")
    return content["arms"] if content else []


def find_stored(output_dir: str, request: Request) -> dict[str, float] | None:
    """Metrics of the game that was requested, if it is stored and intact."""
    if find_fault(game_dir(output_dir, request.iteration), request=request.hash, run=request.settings["run"]):
        return None
    return read_manifest(output_dir, request.iteration)["metrics"]


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
        `dict[str, Dataset]`: Pairs by name of the dataset, mapped into memory. Sent to another process, they are
        mapped there as well.

    Raises:
        `ValueError`: If the game is not there, not complete, damaged, or of another iteration or run.
    """
    if fault := find_fault(game_dir(output_dir, iteration), iteration=iteration, **({"run": run} if run else {})):
        remedy = "Resume from an earlier iteration's checkpoint, which makes it again, or use a new `output_dir`."
        raise ValueError(f"The game of iteration {iteration} cannot be read: {fault}. {remedy}")
    shards = defaultdict(list)
    for shard in read_manifest(output_dir, iteration)["shards"]:
        shards[shard["dataset"]].append(Dataset.from_file(str(game_dir(output_dir, iteration) / shard["file"])))
    return {name: concatenate_datasets(parts) for name, parts in shards.items()}
