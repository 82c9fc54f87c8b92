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


def style() -> AbstractContextManager:
    """Context in which figures look the same, whatever the user's own settings of matplotlib are."""
    return matplotlib.style.context(Path(__file__).with_name("report.mplstyle"), after_reset=True)


def draw_all(run: Run) -> Iterator[tuple[str, str, Figure | None]]:
    """Kind, dataset ("" for all of them) and picture of each figure, `None` where there is nothing to show."""
    yield "training", "", draw_training(run)
    yield "iterations", "", draw_iterations(run)
    for name in run.datasets:
        completions = {i.number: i.completions[name] for i in run.iterations if name in i.completions}
        lengths = {number: sides.lengths for number, sides in completions.items()}
        yield "lengths", name, draw_histograms(lengths, "tokens", whole_numbers=True)
        logps = {number: sides.logps_per_token for number, sides in completions.items()}
        yield "logps", name, draw_histograms(logps, "log-prob per token, nats")
        changes = {number: {"real": change} for number, change in run.changes(name).items()}
        yield "changes", name, draw_histograms(changes, "change, nats per token", mark=0)


def draw_training(run: Run) -> Figure | None:
    """Curves over the steps, with a gap where an iteration begins: from there on, the opponent is another."""
    logged = {key for logs in run.log_history for key in logs}
    panels = {title: lines for title, lines in TITLES["training"].items() if logged.intersection(lines.values())}
    if not panels:
        return None
    figure, all_axes = _grid(panels, num_columns=3, height=2.15, xlabel="step; number and shade: iteration")
    of_training, *of_held_out = matplotlib.rcParams["axes.prop_cycle"]
    starts = list(run.starts.values())
    ends = [*starts[1:], max(logs["step"] for logs in run.log_history)]
    for ax, lines in zip(all_axes, panels.values(), strict=True):
        for side, key in lines.items():
            of_side = f"{side}, " if side else ""
            look = LOOKS.get(side, of_training)
            for first, end in zip(starts, ends, strict=True):
                steps, values = run.series(key, first, end)
                # A line of one point would be invisible without its marker
                marker = look["marker"] if len(steps) == 1 else "None"
                ax.plot(steps, values, label=f"{of_side}training", **look | {"marker": marker})
            for name, look in zip(run.held_out, cycle(of_held_out)):
                steps, values = run.series(metric_prefix(name) + key, 0, math.inf)
                if steps:
                    color = LOOKS.get(side, look)["color"]
                    ax.plot(steps, values, label=of_side + name, color=color, marker=look["marker"], **POINTS)
        for i, (number, first, end) in enumerate(zip(run.starts, starts, ends, strict=True)):
            if i % 2:
                ax.axvspan(first, end, color="0.93", linewidth=0, zorder=0)
            if len(starts) <= 12:
                place = {"x": (first + end) / 2, "y": 0.99, "transform": ax.get_xaxis_transform()}
                ax.text(**place, s=number, ha="center", va="top", fontsize=8, color="0.45")
        ax.margins(x=0.01, y=0.14)
    _legend(figure)
    return figure


def draw_iterations(run: Run) -> Figure | None:
    """Curves over the iterations, or over the models that they made."""
    numbers = [iteration.number for iteration in run.iterations]
    models, likelihoods = run.likelihoods()
    lines = {}
    for name, values in likelihoods.items():
        lines[name] = [(model, nll, None, None) for model, nll in zip(models, values, strict=True) if nll is not None]
    panels = [("NLL of the real completions, per token", "model", models, lines)]
    for title, key in TITLES["end"].items():
        lines = {name: _points(run, metric_prefix(name) + key) for name in run.datasets}
        panels.append((title, "iteration", numbers, lines))
    for title, keys in TITLES["game"].items():
        lines = {label: _points(run, f"self_play/{key}") for label, key in keys.items()}
        panels.append((title, "opponent of iteration", numbers, lines))
    panels = [panel for panel in panels if any(panel[-1].values())]
    if not panels:
        return None
    figure, all_axes = _grid([title for title, *_ in panels], num_columns=3, height=2.3)
    for ax, (title, xlabel, ticks, lines) in zip(all_axes, panels, strict=True):
        for (label, points), look in zip(lines.items(), cycle(matplotlib.rcParams["axes.prop_cycle"])):
            if points:
                x, values, low, high = zip(*points, strict=True)
                look = LOOKS.get(label, look)
                ax.plot(x, values, label=label, **look)
                if None not in low + high:
                    errors = np.abs(np.subtract(values, (low, high)))
                    ax.errorbar(x, values, yerr=errors, fmt="none", color=look["color"], capsize=3)
        if title.startswith(("accuracy", "AUC")):
            ax.axhline(0.5, color="0.5", linewidth=0.9, linestyle=":")
            where = ax.get_yaxis_transform()
            ax.annotate("chance", (1, 0.5), (0, -10), where, "offset points", ha="right", fontsize=8, color="0.4")
        ax.set_xlabel(xlabel)
        ax.margins(x=0.08, y=0.15)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if xlabel == "model" or len(ticks) <= 12:
            ax.set_xticks(ticks, ["start" if tick == -1 else tick for tick in ticks])
        if len(lines) > 1:
            ax.legend()
    return figure


def _points(run: Run, key: str) -> list[tuple]:
    """Number of each iteration for which there is a metric, its value, and the ends of its interval or `None`."""
    points = [(i.number, *(i.values.get(key + end) for end in ("", "_low", "_high"))) for i in run.iterations]
    return [point for point in points if point[1] is not None]


def draw_histograms(
    panels: dict[int, dict[str, np.ndarray]], xlabel: str, whole_numbers: bool = False, mark: float | None = None
) -> Figure | None:
    """Shares of the completions by a number of theirs: a panel per iteration, with a distribution per side."""
    drawn = {number: {s: values for s, values in sides.items() if len(values)} for number, sides in panels.items()}
    drawn = {f"iteration {number}": sides for number, sides in drawn.items() if sides}
    if not drawn:
        return None
    everything = np.concatenate([values for sides in drawn.values() for values in sides.values()])
    low, high = everything.min(), everything.max()
    if whole_numbers and high - low <= 40:
        edges = np.arange(low - 0.5, high + 1)
    else:
        # A few outliers would squeeze all others into one bar: they are counted in the outermost ones
        low, high = np.quantile(everything, [0.002, 0.998])
        edges = np.linspace(low, high if high > low else low + 1, 41)
    figure, all_axes = _grid(drawn, num_columns=4, height=1.9, xlabel=xlabel, share_axes=True)
    for ax, sides in zip(all_axes, drawn.values(), strict=True):
        for side, values in sides.items():
            shares = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)
            color, linestyle = LOOKS[side]["color"], LOOKS[side]["linestyle"]
            look = {"fill": True, "alpha": 0.4} if side == "real" else {"linewidth": 1.5}
            ax.stairs(shares, edges, color=color, label=side, **look)
            ax.axvline(values.mean(), color=color, linewidth=1.2, linestyle=linestyle, label=f"mean, {side}")
        if mark is not None:
            ax.axvline(mark, color="0.2", linewidth=0.9)
        ax.margins(x=0.02)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=whole_numbers))
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel("share of completions")
    all_axes[0].set_ylim(bottom=0)
    _legend(figure)
    return figure


def _grid(titles: Collection[str], num_columns: int, height: float, xlabel: str = "", share_axes: bool = False):
    """A figure of panels, row by row, without the empty ones of the last row, and the axes of the panels."""
    # Few panels keep the size that they have among many
    num_panels, width = len(titles), 10 / num_columns
    num_columns = min(num_columns, max(2, num_panels))
    num_rows = math.ceil(num_panels / num_columns)
    figure = Figure(figsize=(width * num_columns, height * num_rows + 0.4), layout="constrained")
    all_axes = figure.subplots(num_rows, num_columns, squeeze=False, sharex=share_axes, sharey=share_axes).flatten()
    for ax in all_axes[num_panels:]:
        ax.remove()
    for i, (ax, title) in enumerate(zip(all_axes, titles, strict=False)):
        ax.set_title(title)
        if i + num_columns >= num_panels:
            ax.tick_params(labelbottom=True)
            ax.set_xlabel(xlabel)
    return figure, all_axes[:num_panels]


def _legend(figure: Figure):
    """One legend above all panels, which draw the same lines."""
    handles = {}
    for ax in figure.axes:
        handles |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(6, len(handles)))
