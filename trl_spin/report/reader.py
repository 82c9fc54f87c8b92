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

"""Reads what a run has left on disk, for the report and the model card."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import Table, compute

from ..run.files import HISTORY, PROBES, RECORD, SETTINGS, game_dir, model_dir, read_json
from ..run.games import load_game, read_manifest
from .signals import metric_prefix


SIDES = ("real", "generated")
PER_ITERATION = ("beta", "learning_rate", "num_train_epochs")


@dataclass
class Completions:
    """The real completions of one dataset's prompts, and those of an iteration's opponent."""

    pairs: Table

    @cached_property
    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens of each completion, by side."""
        return {side: compute.list_value_length(self.pairs[f"{side}_ids"]).to_numpy() for side in SIDES}

    @cached_property
    def logps_per_token(self) -> dict[str, np.ndarray]:
        """The opponent's log-prob per token of each completion, by side."""
        # In a pair that is not played, the real completion is scored in place of the generated one as well
        scored = {"real": True, "generated": self.pairs["played"].to_numpy()}
        logps = {}
        for side, lengths in self.lengths.items():
            shown = scored[side] & (lengths > 0)
            logps[side] = self.pairs[f"ref_{side}_logps"].to_numpy()[shown] / lengths[shown]
        return logps


@dataclass
class Iteration:
    """What there is of an iteration: its manifest, its completions by dataset and, once it is finished, its record."""

    number: int
    manifest: dict[str, Any]
    record: dict[str, Any]
    values: dict[str, Any]  # its settings, as planned or as played, and all metrics
    completions: dict[str, Completions]


@dataclass
class Run:
    """Everything the report is made of. `notes` says what could not be read."""

    output_dir: Path
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    iterations: list[Iteration] = field(default_factory=list)
    probes: dict[int, dict[str, Any]] = field(default_factory=dict)  # by row, with the completions by model
    log_history: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def planned(self) -> int:
        """Number of iterations that the run is to have."""
        return len(self.settings.get("beta", []))

    @property
    def datasets(self) -> list[str]:
        """Names of the datasets that were played on, the training data first."""
        names = {shard["dataset"]: None for i in self.iterations for shard in i.manifest["shards"]}
        return sorted(names, key=lambda name: name != "train")

    @property
    def held_out(self) -> list[str]:
        """Names of the datasets that were not trained on."""
        return [name for name in self.datasets if name != "train"]

    @cached_property
    def starts(self) -> dict[int, float]:
        """The step after which each iteration's own steps begin, as logged."""
        boundaries = [logs for logs in self.log_history if "self_play/iteration" in logs]
        return {int(logs["self_play/iteration"]): logs["step"] for logs in boundaries} or {0: 0}

    def series(self, key: str, first: float, end: float) -> tuple[list[float], list[float]]:
        """Steps and values of what was logged after step `first`, up to and including step `end`."""
        logged = [logs for logs in self.log_history if is_number(logs.get(key)) and first < logs["step"] <= end]
        return [logs["step"] for logs in logged], [logs[key] for logs in logged]

    def likelihoods(self) -> tuple[list[int], dict[str, list[float | None]]]:
        """
        The models, -1 for the one that self-play started from, and by dataset the negative log-likelihood that each
        gives to the real completions.
        """
        values = {}
        for name in self.datasets:
            prefix = metric_prefix(name)
            # On training data it is an average over the iteration's steps, not the finished model's
            after = {i.number: i.values.get(f"{prefix}nll/real") for i in self.iterations if name != "train"}
            before = {i.number - 1: i.values.get(f"{prefix}self_play/nll_real") for i in self.iterations}
            nlls = [*after.items(), *before.items()]
            values[name] = {model: nll for model, nll in nlls if is_number(nll)}
        models = sorted(set().union(*values.values()))
        return models, {name: [by_model.get(model) for model in models] for name, by_model in values.items()}

    def changes(self, name: str) -> dict[int, np.ndarray]:
        """How each iteration changed the log-prob per token of the real completions, measured by the next opponent."""
        opponents = {i.number: i.completions[name] for i in self.iterations if name in i.completions}
        changes = {}
        for number, before in opponents.items():
            # With `truncated_completions="cut_real"` the real completions differ from one opponent to the next
            if (after := opponents.get(number + 1)) and after.pairs["real_ids"].equals(before.pairs["real_ids"]):
                changes[number] = after.logps_per_token["real"] - before.logps_per_token["real"]
        return changes


def is_number(value: Any) -> bool:
    """Whether a logged value is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_run(output_dir: str | Path) -> Run:
    """
    Reads what a run has left on disk. What is missing or damaged is left out, and named in the run's notes if it
    should be there. Raises `FileNotFoundError` if the directory holds no run.
    """
    run = Run(Path(output_dir))
    directory = run.output_dir / "self_play"
    if not (directory / SETTINGS).is_file():
        raise FileNotFoundError(
            f"{run.output_dir} holds no run: {directory / SETTINGS} does not exist. Give the `output_dir` of a run "
            "that has begun."
        )
    content = _attempt(run, {}, read_json, directory / SETTINGS)
    run.settings, run.versions = content.get("settings", {}), content.get("versions", {})
    for number in _numbers(directory.glob("iteration-*")):
        _read_iteration(run, number)
    log_history = _attempt(run, [], read_json, directory / HISTORY)
    for number in _numbers(run.output_dir.glob("checkpoint-*")) if not log_history else ():
        state = _attempt(run, {}, read_json, run.output_dir / f"checkpoint-{number}" / "trainer_state.json")
        log_history = state.get("log_history") or log_history
    # The last entry sums up the whole training
    run.log_history = [logs for logs in log_history if is_number(logs.get("step")) and "train_runtime" not in logs]
    finished = _numbers(path.parent for path in run.output_dir.glob(f"iteration-*/{RECORD}"))
    played = [iteration.number for iteration in run.iterations]
    if lost := [str(number) for number in finished if number not in played]:
        run.notes.append(f"The games of these iterations are missing: {', '.join(lost)}.")
    return run


def _read_iteration(run: Run, number: int):
    directory = game_dir(run.output_dir, number)
    manifest = _attempt(run, None, read_manifest, str(run.output_dir), number)
    # The last model's probes stand in the folder of an iteration that is not played
    for probe in _attempt(run, [], read_json, directory / PROBES):
        run.probes.setdefault(probe["row"], probe | {"by_model": {}})["by_model"][number] = probe["generated"]
    if manifest is None:
        # What is there after the last iteration was written to measure its model
        if number < run.planned and any(directory.glob("completions-*")):
            run.notes.append(f"Iteration {number} has no pairs yet: its opponent has not completed all prompts.")
        return
    record = _attempt(run, {}, read_json, model_dir(run.output_dir, number) / RECORD)
    completions = {}
    for name, pairs in _attempt(run, {}, load_game, str(run.output_dir), number).items():
        table = pairs.data.table
        # Completions by earlier opponents belong to earlier iterations
        completions[name] = Completions(table.filter(compute.equal(table["opponent"], number)))
    planned = {key: run.settings[key][number] for key in PER_ITERATION if number < len(run.settings.get(key, []))}
    values = planned | manifest["metrics"] | record
    run.iterations.append(Iteration(number, manifest, record, values, completions))


def _numbers(paths: Iterable[Path]) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in paths if re.fullmatch(r"\w+-\d+", path.name))


def _attempt(run: Run, default: Any, function: Callable, *args: Any) -> Any:
    # A damaged file costs the report the part that it holds, and no more
    try:
        return function(*args) or default
    except JSONDecodeError as error:
        run.notes.append(f"{args[0]} cannot be read: {error}.")
    except ValueError as error:
        run.notes.append(str(error))
    return default
