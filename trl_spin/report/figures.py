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

"""The figures of the report, an image for each panel. The only module that needs matplotlib."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import cycle, pairwise
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .reader import Run
from .signals import metric_prefix
from .tables import TITLES


# How the two sides look (other lines look as report.mplstyle has it), single points, and lines to compare with
LOOKS, POINTS, REFERENCE = (TITLES[kind] for kind in ("looks", "points", "reference"))


def style() -> AbstractContextManager:
    """Context in which figures look the same, whatever the user's own settings of matplotlib are."""
    return matplotlib.style.context(Path(__file__).with_name("report.mplstyle"), after_reset=True)


def draw_all(run: Run) -> Iterator[tuple[str, str, str, Figure]]:
    """Kind, dataset ("" for all of them), title and picture of each panel that has something to show."""
    for kind, draw in (("models", draw_models), ("training", draw_training), ("iterations", draw_iterations)):
        yield from ((kind, "", *panel) for panel in draw(run))
    for name in run.datasets:
        for kind in TITLES["pairs"]:
            yield from ((kind, name, *panel) for panel in draw_pairs(run, name, kind))


def draw_models(run: Run) -> Iterator[tuple[str, Figure]]:
    """What compares the models, with a line per held-out dataset and the best model marked."""
    scores = run.scores(run.metric)
    if len(scores) > 1:
        measure = run.metric[re.search("nll/real|completions/", run.metric).start() :]
        title = TITLES["models"].get(measure, measure)
        figure, ax = _panel(title, width=5)
        for name, look in zip(run.held_out, cycle(matplotlib.rcParams["axes.prop_cycle"])):
            _plot_with_intervals(ax, run.scores(metric_prefix(name) + measure), label=name, **look)
        star = POINTS | {"color": "#009E73", "marker": "*", "markersize": 15, "zorder": 3}
        ax.plot(run.best, scores["value"][run.best], label="best", **star)
        _finish(ax, title, "model after iteration", scores.index)
        yield title, figure


def draw_training(run: Run) -> Iterator[tuple[str, Figure]]:
    """Curves over the steps, with a gap where an iteration begins: from there on, the opponent is another."""
    logs, starts = run.log_history, run.starts
    of_training, *of_held_out = matplotlib.rcParams["axes.prop_cycle"]
    for title, lines in TITLES["training"].items():
        if not {*lines.values()} & {*logs}:
            continue
        figure, ax = _panel(title)
        last = max(logs.index.max(), min(starts.values()) + 1)
        for side, key in lines.items():
            of_side = f"{side}, " if side else ""
            look = LOOKS.get(side, of_training)
            for first, end in pairwise([*starts.values(), last]):
                curve = run.logged(key, first, end)
                # A line of one point would be invisible without its marker
                marker = look["marker"] if len(curve) == 1 else "None"
                ax.plot(curve.index, curve, label=f"{of_side}training", **look | {"marker": marker, "clip_on": False})
            for name, look in zip(run.held_out, cycle(of_held_out)):
                points = run.logged(metric_prefix(name) + key)
                if len(points):
                    color = LOOKS.get(side, look)["color"]
                    ax.plot(points.index, points, label=of_side + name, **look | POINTS | {"color": color})
        initial = run.logged("self_play/initial_loss")
        if title == "loss" and len(initial):
            ax.axhline(initial.iloc[0], label=f"ℓ(0) = {initial.iloc[0]:.3f}", **REFERENCE)
        for i, (number, (first, end)) in enumerate(zip(starts, pairwise([*starts.values(), last]), strict=True)):
            ax.axvspan(first, end, color="0.93" if i % 2 else "white", linewidth=0, zorder=0)
            if len(starts) <= 12:
                place = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "top"}
                ax.text((first + end) / 2, 0.99, number, fontsize=8, color="0.45", **place)
        ax.set_xlim(min(starts.values()), last)
        _finish(ax, title, "step; number and shade: iteration")
        yield title, figure


def draw_iterations(run: Run) -> Iterator[tuple[str, Figure]]:
    """Curves over the iterations, with bars for the intervals."""
    panels = {}
    for title, key in TITLES["end"].items():
        panels[title] = {name: metric_prefix(name) + key for name in run.datasets}
    for title, lines in (panels | TITLES["game"]).items():
        if not {*lines.values()} & {*run.metrics}:
            continue
        figure, ax = _panel(title)
        for (label, key), look in zip(lines.items(), cycle(matplotlib.rcParams["axes.prop_cycle"])):
            points = run.metrics.reindex(columns=[key, f"{key}_low", f"{key}_high"]).dropna(subset=key)
            _plot_with_intervals(ax, points, label=label, **LOOKS.get(label, look))
        _finish(ax, title, "iteration" if title in panels else "opponent of iteration", run.metrics.index)
        yield title, figure


def draw_pairs(run: Run, name: str, kind: str) -> Iterator[tuple[str, Figure]]:
    """
    Which share of a dataset's completions has less than a number: a panel per iteration, a curve per side, which does
    not depend on bins.
    """
    panels = {}
    for iteration in (i for i in run.iterations if name in i.completions):
        game = iteration.completions[name][kind].dropna(how="all", axis="columns")
        if not game.size:
            continue
        figure, ax = panels[iteration.number] = _panel(f"iteration {iteration.number}")
        for side, values in game.items():
            shares = np.linspace(0.005, 0.995, 199)
            ax.plot(values.quantile(shares), shares, label=side, **LOOKS[side] | {"marker": "None"})
        ax.set_ylabel("share below")
        _finish(ax, kind, TITLES["pairs"][kind])
    ends = [end for _, ax in panels.values() for end in ax.get_xlim()]
    for number, (figure, ax) in panels.items():
        ax.set_xlim(min(ends), max(ends))
        yield f"iteration {number}", figure


def _panel(title: str, width: float = 3.7) -> tuple[Figure, Axes]:
    figure = Figure((width, 2.6))
    ax = figure.subplots()
    ax.set_title(title)
    return figure, ax


def _plot_with_intervals(ax: Axes, points: pandas.DataFrame, **look):
    """A curve through the first column, with bars between the other two where there are intervals."""
    errors = points.iloc[:, 1:].sub(points.iloc[:, 0], axis="index").abs().T
    bars = {"yerr": errors, "capsize": 3} if errors.notna().all(axis=None) else {}
    if len(points):
        ax.errorbar(points.index, points.iloc[:, 0], **bars, **look)


def _finish(ax: Axes, title: str, xlabel: str, models: pandas.Index | None = None):
    """Ticks on whole numbers, a y axis that noise does not fill, lines to compare with, and a legend below."""
    ax.set_xlabel(xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=title != "logps"))
    if models is not None:
        ax.margins(x=0.08)
        ax.set_xticks(models[:: len(models) // 12 + 1])
        ax.xaxis.set_major_formatter(lambda x, position: "start" if x == -1 else f"{x:.0f}")
    for label, value in TITLES["lines"].get(title, {}).items():
        ax.axhline(value, label=label, **REFERENCE)
    low, high = ax.get_ylim()
    more = max(0, TITLES["spans"].get(title, 0) - (high - low)) / 2
    ax.set_ylim(TITLES["limits"].get(title, (low - more, high + more)))
    handles = {handle.get_label(): handle for handle in ax.get_legend_handles_labels()[0]}
    if len(handles) > 1:
        ax.figure.legend(handles=handles.values(), loc="outside lower center", ncols=2 if len(handles) > 3 else 3)
