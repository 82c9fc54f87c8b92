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

"""What a run has left on disk, read for the report."""

import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from .game import HISTORY, PROBES, load_game, read_manifest
from .model_card import RECORD
from .signals import metric_prefix


@dataclass
class Game:
    """The answers of an iteration's opponent to the prompts of one dataset."""

    pairs: pyarrow.Table

    @cached_property
    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of each answer, by side."""
        return {
            side: pyarrow.compute.list_value_length(self.pairs[f"{side}_ids"]).to_numpy()
            for side in ("real", "generated")
        }

    @cached_property
    def logps_per_token(self) -> dict[str, np.ndarray]:
        """The opponent's log-prob per token of each answer, by side."""
        logps = {side: self.pairs[f"ref_{side}_logps"].to_numpy() for side in ("real", "generated")}
        # The generated answer of a pair that is not played is not scored: the real one is, in its place
        scored = {"real": True, "generated": self.pairs["played"].to_numpy()}
        return {
            side: logps[side][keep] / self.lengths[side][keep]
            for side, keep in ((side, scored[side] & (self.lengths[side] > 0)) for side in logps)
        }


@dataclass
class Iteration:
    """What is there of an iteration: its manifest and games, and its record once it is finished."""

    number: int
    manifest: dict[str, Any]
    record: dict[str, Any]
    games: dict[str, Game]


@dataclass
class Run:
    """All that the report is made of. `notes` says what is missing."""

    output_dir: Path
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    iterations: list[Iteration] = field(default_factory=list)
    probes: dict[int, list[dict]] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def datasets(self) -> list[str]:
        """Names of the datasets that were played on, the training data first."""
        names = {shard["dataset"]: None for i in self.iterations for shard in i.manifest["shards"]}
        return sorted(names, key=lambda name: name != "train")

    def held_out(self) -> list[str]:
        return [name for name in self.datasets if name != "train"]

    @cached_property
    def _starts(self) -> dict[int, float]:
        # Step at which each iteration began, as logged. The rest of the first one's steps come after it
        logged = {
            int(logs["self_play/iteration"]): logs["step"]
            for logs in self.log_history
            if "self_play/iteration" in logs
        }
        return logged or {0: 0}

    def iteration_starts(self) -> list[float]:
        return list(self._starts.values())

    @property
    def start_names(self) -> list[str]:
        return [str(iteration) for iteration in self._starts]

    def series(self, key: str, first: float, end: float) -> tuple[list[float], list[float]]:
        """Steps and values of what was logged after one step and up to another."""
        points = [
            (logs["step"], logs[key])
            for logs in self.log_history
            if is_number(logs.get(key)) and first < logs["step"] <= end and "train_runtime" not in logs
        ]
        return [step for step, _ in points], [value for _, value in points]

    def likelihoods(self) -> tuple[list[int], dict[str, list[float | None]]]:
        """
        Negative log-likelihood of the real answers by dataset, of each model: the one that self-play started from (-1)
        and that of each iteration.
        """
        values = {name: {} for name in self.datasets}
        for iteration in self.iterations:
            for name in values:
                before = iteration.manifest["metrics"].get(f"{metric_prefix(name)}self_play/nll_real")
                # In training it is an average over the iteration
                after = iteration.record.get(f"{metric_prefix(name)}nll/real") if name != "train" else None
                if is_number(before):
                    values[name][iteration.number - 1] = before
                if is_number(after):
                    values[name][iteration.number] = after
        models = sorted({model for by_model in values.values() for model in by_model})
        return models, {name: [by_model.get(model) for model in models] for name, by_model in values.items()}

    def changes(self, name: str) -> dict[int, np.ndarray]:
        """How each iteration changed the log-prob per token of the real answers: the next opponent is its model."""
        games = {i.number: i.games[name] for i in self.iterations if name in i.games}
        changes = {}
        for number, game in games.items():
            after = games.get(number + 1)
            # Answers that were cut to the length of the generated ones are others each time
            if after is not None and after.pairs["real_ids"].equals(game.pairs["real_ids"]):
                changes[number] = after.logps_per_token["real"] - game.logps_per_token["real"]
        return changes


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_run(output_dir: str | Path) -> Run:
    """
    Reads what a run has left on disk.

    Args:
        output_dir (`str` or `Path`):
            Output directory of the run.

    Returns:
        [`Run`]: The run. What is missing is left out and stands in its notes.

    Raises:
        `FileNotFoundError`: If the directory holds no run.
    """
    run = Run(Path(output_dir))
    directory = run.output_dir / "self_play"
    if not (directory / "run.json").is_file():
        raise FileNotFoundError(
            f"{run.output_dir} holds no run: {directory / 'run.json'} does not exist. Give the `output_dir` of a run that "
            "has begun."
        )
    content = _read_json(run, directory / "run.json", {})
    run.settings, run.versions = content.get("settings", {}), content.get("versions", {})

    for number in _numbers(directory.glob("iteration-*")):
        manifest = _attempt(run, read_manifest, str(run.output_dir), number)
        probes = _read_json(run, directory / f"iteration-{number}" / PROBES, [])
        if probes:
            run.probes[number] = probes
        if manifest is None:
            if any((directory / f"iteration-{number}").glob("answers-*")):
                run.notes.append(f"Iteration {number} is not there yet: its opponent has not answered all prompts.")
            continue
        record = _read_json(run, run.output_dir / f"iteration-{number}" / RECORD, {})
        if not record:
            run.notes.append(f"Iteration {number} is not finished, or its model was deleted: there is no {RECORD}.")
        games = _attempt(run, load_game, str(run.output_dir), number) or {}
        tables = {name: pairs.data.table for name, pairs in games.items()}
        # Answers of earlier opponents are those of earlier iterations
        newest = {
            name: table.filter(pyarrow.compute.equal(table["opponent"], number)) for name, table in tables.items()
        }
        games = {name: Game(table) for name, table in newest.items()}
        run.iterations.append(Iteration(number, manifest, record, games))

    missing = sorted(
        set(_numbers(run.output_dir.glob(f"iteration-*/{RECORD}"), parent=True))
        - {iteration.number for iteration in run.iterations}
    )
    if missing:
        run.notes.append(f"The games of these iterations are not there: {', '.join(map(str, missing))}.")
    planned = len(run.settings.get("beta", []))
    begun = max((iteration.number for iteration in run.iterations), default=-1) + 1
    if begun < planned:
        run.notes.append(f"{begun} of {planned} iterations have begun.")
    if not run.held_out():
        run.notes.append(
            "There are no held-out prompts. On training pairs, accuracy and margin soon tell what was learned by heart."
        )
    if not run.probes:
        run.notes.append("There are no probes.")

    run.log_history = _read_json(run, directory / HISTORY, [])
    if not run.log_history:
        checkpoints = [run.output_dir / f"checkpoint-{n}" for n in _numbers(run.output_dir.glob("checkpoint-*"))]
        for checkpoint in checkpoints:
            state = _read_json(run, checkpoint / "trainer_state.json", {})
            run.log_history = state.get("log_history") or run.log_history
    run.log_history = [logs for logs in run.log_history if is_number(logs.get("step"))]
    if not run.log_history:
        run.notes.append("There are no curves: neither self_play/log_history.json nor a checkpoint is there.")
    return run


def _numbers(paths, parent: bool = False) -> list[int]:
    names = [path.parent.name if parent else path.name for path in paths]
    return sorted(int(name.rpartition("-")[2]) for name in names if re.fullmatch(r"\w+-\d+", name))


def _read_json(run: Run, path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    content = _attempt(run, lambda: json.loads(path.read_text(encoding="utf-8")))
    if content is None:
        run.notes.append(f"{path.relative_to(run.output_dir)} cannot be read.")
        return default
    return content


def _attempt(run: Run, function, *args) -> Any:
    # A file that is damaged takes its part of the report away, and not the rest
    try:
        return function(*args)
    except ValueError as error:
        run.notes.append(str(error))
        return None
