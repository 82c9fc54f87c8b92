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

"""The figures of the report. The only module that needs matplotlib."""

import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from itertools import cycle
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .reader import Run
from .signals import metric_prefix
from .tables import TITLES


# How the two sides look; other lines look as report.mplstyle has it
LOOKS = {
    "real": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "generated": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
}
POINTS = {"linestyle": "none", "markersize": 6.5, "markeredgecolor": "white", "markeredgewidth": 0.5, "clip_on": False}
BARS = {"real": {"histtype": "stepfilled", "alpha": 0.4}, "generated": {"histtype": "step", "linewidth": 1.5}}


def style() -> AbstractContextManager:
    """Context in which figures look the same, whatever the user's own settings of matplotlib are."""
    return matplotlib.style.context(Path(__file__).with_name("report.mplstyle"), after_reset=True)


def draw_all(run: Run) -> Iterator[tuple[str, str, Figure | None]]:
    """Kind, dataset ("" for all of them) and picture of each figure, `None` where there is nothing to show."""
    yield "training", "", draw_training(run)
    yield "iterations", "", draw_iterations(run)
    for name in run.datasets:
        for kind in TITLES["pairs"]:
            yield kind, name, draw_histograms(run, name, kind)


def draw_training(run: Run) -> Figure | None:
    """Curves over the steps, with a gap where an iteration begins: from there on, the opponent is another."""
    logs = run.log_history
    panels = {title: lines for title, lines in TITLES["training"].items() if {*lines.values()} & {*logs}}
    if not panels:
        return None
    figure, all_axes = _panels(panels, num_columns=3, height=2.15)
    figure.supxlabel("step; number and shade: iteration")
    of_training, *of_held_out = matplotlib.rcParams["axes.prop_cycle"]
    steps = [*run.starts.values(), logs.index.max()]
    for ax, lines in zip(all_axes, panels.values(), strict=True):
        for side, key in lines.items():
            of_side = f"{side}, " if side else ""
            look = LOOKS.get(side, of_training)
            for first, end in zip(steps[:-1], steps[1:], strict=True):
                curve = run.logged(key, first, end)
                # A line of one point would be invisible without its marker
                marker = look["marker"] if len(curve) == 1 else "None"
                ax.plot(curve.index, curve, label=f"{of_side}training", **look | {"marker": marker})
            for name, look in zip(run.held_out, cycle(of_held_out)):
                points = run.logged(metric_prefix(name) + key)
                if len(points):
                    color = LOOKS.get(side, look)["color"]
                    ax.plot(points.index, points, label=of_side + name, **look | POINTS | {"color": color})
        for i, number in enumerate(run.starts):
            first, end = steps[i : i + 2]
            ax.axvspan(first, end, color="0.93" if i % 2 else "white", linewidth=0, zorder=0)
            if len(run.starts) <= 12:
                place = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "top"}
                ax.text((first + end) / 2, 0.99, number, fontsize=8, color="0.45", **place)
    _legend(figure)
    return figure


def draw_iterations(run: Run) -> Figure | None:
    """Curves over the iterations, or over the models that they made, with bars for the intervals."""
    panels = {}
    for title, key in TITLES["end"].items():
        panels[title] = {name: metric_prefix(name) + key for name in run.datasets}
    panels |= TITLES["game"]
    panels = {title: lines for title, lines in panels.items() if {*lines.values()} & {*run.metrics, *run.likelihoods}}
    if not panels:
        return None
    figure, all_axes = _panels(panels, num_columns=3, height=2.3)
    for ax, (title, lines) in zip(all_axes, panels.items(), strict=True):
        metrics = run.likelihoods if title.startswith("NLL") else run.metrics
        for (label, key), look in zip(lines.items(), cycle(matplotlib.rcParams["axes.prop_cycle"])):
            points = metrics.reindex(columns=[key, f"{key}_low", f"{key}_high"]).dropna(subset=key)
            errors = points.iloc[:, 1:].sub(points[key], axis="index").abs().T
            if len(points):
                bars = {"yerr": errors, "capsize": 3} if errors.notna().all(axis=None) else {}
                ax.errorbar(points.index, points[key], label=label, **bars, **LOOKS.get(label, look))
        if title.startswith(("accuracy", "AUC")):
            ax.axhline(0.5, color="0.5", linewidth=0.9, linestyle=":", label="chance")
        ax.set_xlabel(TITLES["over"].get(title, "opponent of iteration"))
        ax.margins(x=0.08)
        ax.set_xticks(metrics.index[:: len(metrics) // 12 + 1])
        ax.xaxis.set_major_formatter(lambda x, position: "start" if x == -1 else f"{x:.0f}")
        ax.legend()
    return figure


def draw_histograms(run: Run, name: str, kind: str) -> Figure | None:
    """Shares of a dataset's completions by a number of theirs: a panel per iteration, a distribution per side."""
    games = {i.number: i.completions[name][kind] for i in run.iterations if name in i.completions}
    games = {f"iteration {number}": game.dropna(axis="columns", how="all") for number, game in games.items()}
    games = {title: game for title, game in games.items() if game.size}
    if not games:
        return None
    everything = pandas.concat(games.values()).stack()
    low, high = everything.min(), everything.max()
    if kind == "lengths" and high - low <= 40:
        edges = np.arange(low - 0.5, high + 1)
    else:
        # A few outliers would squeeze all others into one bar: they are counted in the outermost ones
        low, high = everything.quantile([0.002, 0.998])
        edges = np.linspace(low, high if high > low else low + 1, 41)
    figure, all_axes = _panels(games, num_columns=4, height=1.9, sharex=True, sharey=True)
    figure.supylabel("share of completions")
    for ax, game in zip(all_axes, games.values(), strict=True):
        for side, values in game.items():
            look = LOOKS[side] | {"marker": "None"}
            shown = values.dropna().clip(edges[0], edges[-1])
            shares = np.full(len(shown), 1 / len(shown))
            ax.hist(shown, edges, weights=shares, label=side, color=look["color"], linestyle="-", **BARS[side])
            ax.axvline(values.mean(), label=f"mean, {side}", linewidth=1.2, **look)
        if kind == "changes":
            ax.axvline(0, color="0.2", linewidth=0.9)
        ax.set_xlabel(TITLES["pairs"][kind])
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=kind == "lengths"))
    _legend(figure)
    return figure


def _panels(titles: Collection[str], num_columns: int, height: float, **shared: bool):
    """A figure, and the axes of its panels, row by row. Few panels keep the size that they have among many."""
    width = 10 / num_columns
    num_columns = min(num_columns, max(2, len(titles)))
    num_rows = math.ceil(len(titles) / num_columns)
    figure = Figure((width * num_columns, height * num_rows + 0.4))
    all_axes = figure.subplots(num_rows, num_columns, squeeze=False, **shared).flatten()
    for ax in all_axes[len(titles) :]:
        ax.remove()
    for ax, title in zip(all_axes, titles, strict=False):
        ax.set_title(title)
        ax.tick_params(labelbottom=True)
    return figure, all_axes[: len(titles)]


def _legend(figure: Figure):
    """One legend above all panels, which draw the same lines."""
    handles = {handle.get_label(): handle for ax in figure.axes for handle in ax.get_legend_handles_labels()[0]}
    figure.legend(handles=handles.values(), loc="outside upper center", ncols=6)
