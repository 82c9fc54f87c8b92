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

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from pyarrow import Table, compute

from ..run import files
from ..run.games import load_game
from .card import public_name
from .signals import metric_prefix


@dataclass
class Iteration:
    """What there is of an iteration: its manifest, its completions by dataset and, once it is finished, its record."""

    number: int
    manifest: dict[str, Any]
    record: dict[str, Any]
    values: dict[str, Any]  # its settings, as planned or as played, and all metrics
    completions: dict[str, pandas.DataFrame]  # see `_measure`
    examples: list[dict[str, Any]]  # held-out pairs with the largest and the smallest margins
    blind: list[dict[str, Any]]  # random ones, for the blind game


@dataclass
class Run:
    """Everything the report is made of. `notes` says what could not be read."""

    output_dir: Path
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    iterations: list[Iteration] = field(default_factory=list)
    probes: dict[int, dict[str, Any]] = field(default_factory=dict)  # by row, with the completions by model
    log_history: pandas.DataFrame = field(default_factory=pandas.DataFrame)  # by step
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

    def logged(self, key: str, first: float = 0, end: float = np.inf) -> pandas.Series:
        """What was logged after step `first`, up to and including step `end`, by step."""
        values = self.log_history.get(key, pandas.Series(dtype=float))
        return values[np.isfinite(values) & (values.index > first) & (values.index <= end)]

    @property
    def starts(self) -> dict[int, float]:
        """The step after which each iteration's own steps begin, as logged."""
        return {int(number): step for step, number in self.logged("self_play/iteration", -1).items()} or {0: 0}

    @property
    def metrics(self) -> pandas.DataFrame:
        """Settings and metrics, a row per iteration."""
        return pandas.DataFrame([i.values for i in self.iterations], index=[i.number for i in self.iterations])

    @property
    def metric(self) -> str:
        """What compares the models: `metric_for_best_iteration`, or "" if it was not measured."""
        named = [i.record.get("verdict_metric") for i in self.iterations]
        named += [f"{metric_prefix(name)}nll/real" for name in self.held_out]
        return next((name for name in named if name in self.metrics), "")

    def scores(self, metric: str) -> pandas.DataFrame:
        """A metric of the models and its interval, a row per model, -1 for the one that self-play started from."""
        opponent = metric.replace("nll/real", "self_play/nll_real")
        measured = [(-1, i.manifest["metrics"], opponent) for i in self.iterations if i.number == 0]
        measured += [(i.number, i.record, metric) for i in self.iterations]
        rows = {number: [found.get(key + end) for end in ("", "_low", "_high")] for number, found, key in measured}
        table = pandas.DataFrame.from_dict(rows, "index", dtype=float, columns=["value", "low", "high"])
        return table.dropna(subset="value")

    @property
    def best(self) -> int:
        """The best model by what compares them."""
        values = self.scores(self.metric)["value"]
        return int(values.idxmax() if "completions/" in self.metric else values.idxmin())


def read_run(output_dir: str | Path) -> Run:
    """
    Reads what a run has left on disk. What is missing or damaged is left out, and named in the run's notes if it
    should be there. Raises `FileNotFoundError` if the directory holds no run.
    """
    run = Run(Path(output_dir))
    directory = run.output_dir / "self_play"
    if not (directory / files.SETTINGS).is_file():
        missing = f"{run.output_dir} holds no run: {directory / files.SETTINGS} does not exist."
        raise FileNotFoundError(f"{missing} Give the `output_dir` of a run that has begun.")
    content = _attempt(run, {}, files.load_json, directory / files.SETTINGS)
    run.settings, run.versions = content.get("settings", {}), content.get("versions", {})
    for number in _numbers(directory.glob("iteration-*")):
        _read_iteration(run, number)
    log_history = _attempt(run, [], files.load_json, directory / files.HISTORY)
    # The last entry sums up the whole training
    if log_history := [logs for logs in log_history if "step" in logs and "train_runtime" not in logs]:
        run.log_history = pandas.DataFrame(log_history).set_index("step").apply(pandas.to_numeric, errors="coerce")
    finished = _numbers(path.parent for path in run.output_dir.glob(f"iteration-*/{files.RECORD}"))
    if lost := [str(number) for number in finished if number not in run.metrics.index]:
        run.notes.append(f"The games of these iterations are missing: {', '.join(lost)}.")
    return run


def _read_iteration(run: Run, number: int):
    directory = files.game_dir(run.output_dir, number)
    manifest = _attempt(run, None, files.load_json, directory / files.MANIFEST)
    # The last model's probes stand in the folder of an iteration that is not played
    for probe in _attempt(run, {}, files.load_json, directory / files.PROBES).get("probes", ()):
        run.probes.setdefault(probe["row"], probe | {"by_model": {}})["by_model"][number] = probe
    if manifest is None:
        # What is there after the last iteration was written to measure its model
        if number < run.planned and any(directory.glob("completions-*")):
            run.notes.append(f"Iteration {number} has no pairs yet: its opponent has not completed all prompts.")
        return
    manifest["opponent"]["model"] = public_name(manifest["opponent"]["model"])
    record = _attempt(run, {}, files.load_json, files.model_dir(run.output_dir, number) / files.RECORD)
    completions = {}
    for name, pairs in _attempt(run, {}, load_game, str(run.output_dir), number).items():
        # Completions by earlier opponents, which come last, belong to earlier iterations
        newest = compute.sum(compute.equal(pairs.data["opponent"], number)).as_py()
        completions[name] = _measure(pairs.data.table.slice(0, newest))
    settings = {key: run.settings.get(key, []) for key in files.RECORDED_OPTIONS}
    planned = {key: values[number] for key, values in settings.items() if number < len(values)}
    values = planned | manifest["metrics"] | record
    kept = _attempt(run, {}, files.load_json, directory / files.EXAMPLES)
    examples = [kept.get(name, []) for name in ("examples", "blind")]
    run.iterations.append(Iteration(number, manifest, record, values, completions, *examples))


def _measure(pairs: Table) -> pandas.DataFrame:
    """
    What the figures show of pairs, by kind and side: `lengths` in tokens, and the opponent's log-prob per token
    (`logps`).
    """
    measures = {}
    # In a pair that is not played, the real completion is scored in place of the generated one as well
    for side, scored in {"real": True, "generated": pairs["played"].to_pandas()}.items():
        lengths = compute.list_value_length(pairs[f"{side}_ids"]).to_pandas()
        logps = pairs[f"ref_{side}_logps"].to_pandas() / lengths
        measures |= {("lengths", side): lengths, ("logps", side): logps.where(scored & (lengths > 0))}
    return pandas.DataFrame(measures)


def _numbers(paths: Iterable[Path]) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in paths if re.fullmatch(r"\w+-\d+", path.name))


def _attempt(run: Run, default: Any, function: Callable, *args: Any) -> Any:
    # A damaged file costs the report the part that it holds, and no more
    try:
        return function(*args) or default
    except ValueError as error:
        run.notes.append(str(error).replace(f"{run.output_dir}/", ""))
    return default
