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
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .reader import Run
from .signals import metric_prefix


# Colours that colour-blind readers can tell apart (Okabe and Ito); in grey, marker and line style do
LOOKS = {
    "real": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "generated": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
}
SERIES = [
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#009E73", "linestyle": "--", "marker": "D"},
    {"color": "#CC79A7", "linestyle": "-.", "marker": "^"},
    {"color": "#E69F00", "linestyle": ":", "marker": "v"},
    {"color": "#56B4E9", "linestyle": "--", "marker": "P"},
]
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "legend.fontsize": 8,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.8,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a dataset's name may hold a dollar sign
    "svg.hashsalt": "trl-spin",  # the same run gives the same file
}
# What the panels of a training figure show of the logs: by legend ("" for the only line), the metric
TRAINING_PANELS = {
    "loss": {"": "loss"},
    "accuracy (reward of real > generated)": {"": "rewards/accuracies"},
    "margin (reward of real - generated)": {"": "rewards/margins"},
    "rewards: λ log(player / opponent)": {"real": "rewards/real", "generated": "rewards/generated"},
    "log-probs of the completions": {"real": "logps/real", "generated": "logps/generated"},
    "NLL of the real completions, per token": {"": "nll/real"},
    "learning rate": {"": "learning_rate"},
    "gradient norm": {"": "grad_norm"},
    "entropy, per token": {"": "entropy"},
}
# What the panels of an iterations figure show of the games, in the same way
GAME_PANELS = {
    "length of the completions, tokens": {"real": "mean_length_real", "generated": "mean_length_generated"},
    "share of the generated completions": {"truncated": "truncated", "empty": "empty", "identical": "identical"},
    "share of distinct completions": {"real": "distinct_real", "generated": "distinct_generated"},
    "AUC of one number alone": {"length": "auc_length", "first token": "auc_first_token", "log-prob": "auc_logps"},
}


@contextmanager
def style():
    """Context in which figures look the same, whatever the user's own settings of matplotlib are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def draw_training(run: Run) -> Figure | None:
    """Curves over the steps, with a gap where an iteration begins: from there on, the opponent is another."""
    logged = {key for logs in run.log_history for key in logs}
    panels = {title: lines for title, lines in TRAINING_PANELS.items() if logged.intersection(lines.values())}
    if not panels:
        return None
    figure, all_axes = _grid(len(panels), num_columns=3, height=2.15)
    handles = {}
    for ax, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for side, key in lines.items():
            look = LOOKS[side] if side else SERIES[0]
            for first, end in _spans(run, math.inf):
                steps, values = run.series(key, first, end)
                (line,) = ax.plot(steps, values, **look)
                # A line of one point would be invisible without its marker
                line.set_marker(look["marker"] if len(steps) == 1 else "None")
                handles.setdefault(f"{side}, training" if side else "training", line)
            for i, name in enumerate(run.held_out):
                steps, values = run.series(metric_prefix(name) + key, 0, math.inf)
                if steps:
                    held_out = SERIES[1 + i % (len(SERIES) - 1)]
                    (line,) = ax.plot(steps, values, marker=held_out["marker"], markersize=6.5, clip_on=False)
                    line.set(linestyle="none", markeredgecolor="white", markeredgewidth=0.5)
                    line.set_color(look["color"] if side else held_out["color"])
                    handles.setdefault(f"{side}, {name}" if side else name, line)
        _shade_iterations(ax, run)
        ax.set_title(title)
    for ax in all_axes[-3:]:
        ax.set_xlabel("step; number and shade: iteration")
    _legend(figure, handles)
    return figure


def _spans(run: Run, last_step: float) -> list[tuple[float, float]]:
    """First and last step of each iteration."""
    starts = list(run.starts.values())
    return list(zip(starts, [*starts[1:], last_step], strict=True))


def _shade_iterations(ax: Axes, run: Run):
    spans = _spans(run, max(logs["step"] for logs in run.log_history))
    for i, (number, (first, end)) in enumerate(zip(run.starts, spans, strict=True)):
        if i % 2:
            ax.axvspan(first, end, color="0.93", linewidth=0, zorder=0)
        if len(spans) <= 12:
            middle, text_height = (first + max(end, first)) / 2, ax.get_xaxis_transform()
            ax.text(middle, 0.99, number, transform=text_height, ha="center", va="top", fontsize=8, color="0.45")
    ax.margins(x=0.01, y=0.14)


@dataclass
class _Line:
    """Values by iteration or model, with the lower and upper ends of their intervals where they were logged."""

    x: list[int]
    values: list[float | None]
    low: list[float | None] | None = None
    high: list[float | None] | None = None

    @property
    def points(self) -> list[int]:
        return [j for j, value in enumerate(self.values) if value is not None]


def _iteration_panels(run: Run) -> list[tuple[str, str, dict[str, _Line]]]:
    """Title, label of the x axis and lines of each panel."""
    numbers = [iteration.number for iteration in run.iterations]
    metrics = [iteration.manifest["metrics"] for iteration in run.iterations]
    models, likelihoods = run.likelihoods()
    lines = {name: _Line(models, values) for name, values in likelihoods.items()}
    panels = [("NLL of the real completions, per token", "model", lines)]
    for title, key in {"accuracy at the end": "rewards/accuracies", "margin at the end": "rewards/margins"}.items():
        lines = {}
        for name in ["train", *run.held_out]:
            keys = [metric_prefix(name) + key + end for end in ("", "_low", "_high")]
            lines[name] = _Line(numbers, *([i.record.get(key) for i in run.iterations] for key in keys))
        panels.append((title, "iteration", lines))
    for title, keys in GAME_PANELS.items():
        lines = {label: _Line(numbers, [m.get(f"self_play/{key}") for m in metrics]) for label, key in keys.items()}
        panels.append((title, "opponent of iteration", lines))
    return panels


def draw_iterations(run: Run) -> Figure | None:
    """Curves over the iterations, or over the models that they made."""
    panels = [panel for panel in _iteration_panels(run) if any(line.points for line in panel[2].values())]
    if not panels:
        return None
    figure, all_axes = _grid(len(panels), num_columns=3, height=2.3)
    for ax, (title, xlabel, lines) in zip(all_axes, panels, strict=True):
        for i, (label, line) in enumerate(lines.items()):
            _plot_line(ax, line, label, LOOKS.get(label, SERIES[i % len(SERIES)]))
        if title.startswith(("accuracy", "AUC")):
            ax.axhline(0.5, color="0.5", linewidth=0.9, linestyle=":")
            where = ax.get_yaxis_transform()
            ax.annotate("chance", (1, 0.5), (0, -10), where, "offset points", ha="right", fontsize=8, color="0.4")
        ax.set(title=title, xlabel=xlabel)
        ax.margins(x=0.08, y=0.15)
        ticks = sorted({x for line in lines.values() for x in line.x})
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if xlabel == "model" or len(ticks) <= 12:
            ax.set_xticks(ticks, ["start" if tick == -1 else tick for tick in ticks])
        if len(lines) > 1:
            ax.legend()
    return figure


def _plot_line(ax: Axes, line: _Line, label: str, look: dict[str, str]):
    if not line.points:
        return
    x, values = [line.x[j] for j in line.points], [line.values[j] for j in line.points]
    ax.plot(x, values, label=label, **look)
    if line.low and all(line.low[j] is not None and line.high[j] is not None for j in line.points):
        errors = [[abs(line.values[j] - end[j]) for j in line.points] for end in (line.low, line.high)]
        ax.errorbar(x, values, yerr=errors, fmt="none", color=look["color"], capsize=3)


def draw_lengths(run: Run, name: str) -> Figure | None:
    """Lengths of real and generated completions, a panel per iteration."""
    panels = {f"iteration {i.number}": i.completions[name].lengths for i in run.iterations if name in i.completions}
    return _draw_histograms(panels, "tokens", whole_numbers=True)


def draw_logps(run: Run, name: str) -> Figure | None:
    """The opponent's log-prob per token of real and generated completions, a panel per iteration."""
    completions = {i.number: i.completions[name] for i in run.iterations if name in i.completions}
    panels = {f"iteration {number}": sides.logps_per_token for number, sides in completions.items()}
    return _draw_histograms(panels, "log-prob per token, nats")


def draw_changes(run: Run, name: str) -> Figure | None:
    """How an iteration changed the log-prob per token of the real completions, a panel per iteration."""
    panels = {f"iteration {number}": {"real": change} for number, change in run.changes(name).items()}
    return _draw_histograms(panels, "change, nats per token", mark=0)


def _draw_histograms(panels: dict, xlabel: str, whole_numbers: bool = False, mark: float | None = None):
    panels = {title: {s: values for s, values in sides.items() if len(values)} for title, sides in panels.items()}
    panels = {title: sides for title, sides in panels.items() if sides}
    if not panels:
        return None
    everything = np.concatenate([values for sides in panels.values() for values in sides.values()])
    low, high = everything.min(), everything.max()
    if whole_numbers and high - low <= 40:
        edges = np.arange(low - 0.5, high + 1)
    else:
        # A few outliers would squeeze all others into one bar: they are counted in the outermost ones
        low, high = np.quantile(everything, [0.002, 0.998])
        edges = np.linspace(low, high if high > low else low + 1, 41)
    figure, all_axes = _grid(len(panels), num_columns=4, height=1.9, share_axes=True)
    handles = {}
    for ax, (title, sides) in zip(all_axes, panels.items(), strict=True):
        for side, values in sides.items():
            shares = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)
            color, linestyle = LOOKS[side]["color"], LOOKS[side]["linestyle"]
            if side == "real":
                handles[side] = ax.stairs(shares, edges, fill=True, color=color, alpha=0.4)
            else:
                handles[side] = ax.stairs(shares, edges, color=color, linewidth=1.5)
            handles[f"mean, {side}"] = ax.axvline(values.mean(), color=color, linewidth=1.2, linestyle=linestyle)
        if mark is not None:
            ax.axvline(mark, color="0.2", linewidth=0.9)
        ax.margins(x=0.02)
        ax.set_title(title)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=whole_numbers))
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel("share of completions")
    all_axes[0].set_ylim(bottom=0)
    for ax in all_axes[-4:]:
        ax.set_xlabel(xlabel)
    _legend(figure, handles)
    return figure


def _grid(num_panels: int, num_columns: int, height: float, share_axes: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of panels, row by row, without the empty ones of the last row."""
    # Few panels keep the size that they have among many
    width = 10 / num_columns
    num_columns = min(num_columns, max(2, num_panels))
    num_rows = math.ceil(num_panels / num_columns)
    figure = Figure(figsize=(width * num_columns, height * num_rows + 0.4), layout="constrained")
    all_axes = figure.subplots(num_rows, num_columns, squeeze=False, sharex=share_axes, sharey=share_axes).flatten()
    for ax in all_axes[num_panels:]:
        ax.remove()
    for ax in all_axes[max(0, num_panels - num_columns) : num_panels]:
        ax.tick_params(labelbottom=True)
    return figure, list(all_axes[:num_panels])


def _legend(figure: Figure, handles: dict):
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(6, len(handles)))
