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
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .signals import metric_prefix


if TYPE_CHECKING:
    from .run_files import Run

# Colours that the colour-blind can tell apart (Okabe and Ito). Marker or line tells them apart in grey
SIDES = {
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
_STYLE = {
    **{"font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "legend.fontsize": 8},
    **{
        "legend.edgecolor": "none",
        "legend.framealpha": 0.8,
        "lines.linewidth": 1.4,
        "lines.markersize": 4.5,
        "axes.grid": True,
    },
    **{"grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
    "text.parse_math": False,  # a dataset's name may hold a dollar sign
    "svg.hashsalt": "trl-spin",  # the same run gives the same file
}


@contextmanager
def style():
    """Context in which figures look the same whatever the user's own settings of matplotlib are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def draw_training(run: "Run") -> Figure | None:
    """Curves per step, with a gap where an iteration begins: from there on, rewards are against another opponent."""
    sides = ("real", "generated")
    panels = {
        "loss": {"": "loss"},
        "accuracy (reward of real > generated)": {"": "rewards/accuracies"},
        "margin (reward of real - generated)": {"": "rewards/margins"},
        "rewards: λ log(player / opponent)": {side: f"rewards/{side}" for side in sides},
        "log-probs of the answers": {side: f"logps/{side}" for side in sides},
        "NLL of the real answers, per token": {"": "nll/real"},
        "learning rate": {"": "learning_rate"},
        "gradient norm": {"": "grad_norm"},
        "entropy, per token": {"": "entropy"},
    }
    logged = {key for logs in run.log_history for key in logs}
    panels = {title: lines for title, lines in panels.items() if logged.intersection(lines.values())}
    if not panels:
        return None
    starts = run.iteration_starts()
    last_step = max(logs["step"] for logs in run.log_history)
    figure, all_axes = _grid(len(panels), num_columns=3, height=2.15)
    handles = {}
    for ax, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for side, key in lines.items():
            look = SIDES[side] if side else SERIES[0]
            for first, end in zip(starts, [*starts[1:], math.inf], strict=True):
                steps, values = run.series(key, first, end)
                marker = look["marker"] if len(steps) == 1 else None
                (line,) = ax.plot(steps, values, **(look | {"marker": marker}))
                handles.setdefault(f"{side}, training" if side else "training", line)
            for i, name in enumerate(run.held_out()):
                steps, values = run.series(metric_prefix(name) + key, 0, math.inf)
                if steps:
                    held_out = SERIES[1 + i % (len(SERIES) - 1)] | ({"color": look["color"]} if side else {})
                    held_out |= {
                        "linestyle": "none",
                        "markeredgecolor": "white",
                        "markeredgewidth": 0.5,
                        "clip_on": False,
                    }
                    (line,) = ax.plot(steps, values, **(held_out | {"markersize": 6.5}))
                    handles.setdefault(f"{side}, {name}" if side else name, line)
        for i, (first, end) in enumerate(zip(starts, [*starts[1:], last_step], strict=True)):
            if i % 2:
                ax.axvspan(first, end, color="0.93", linewidth=0, zorder=0)
            if len(starts) <= 12:
                middle = (first + max(end, first)) / 2
                ax.text(middle, 0.99, run.start_names[i], transform=ax.get_xaxis_transform(), **_NOTE)
        ax.margins(x=0.01, y=0.14)
        ax.set_title(title)
    for ax in all_axes[-3:]:
        ax.set_xlabel("step; number and shade: iteration")
    _legend(figure, handles)
    return figure


_NOTE = {"ha": "center", "va": "top", "fontsize": 8, "color": "0.45"}


def draw_iterations(run: "Run") -> Figure | None:
    """One point per iteration."""
    numbers = [iteration.number for iteration in run.iterations]
    names = ["train", *run.held_out()]
    panels = []

    models, likelihoods = run.likelihoods()
    panels.append(
        (
            "NLL of the real answers, per token",
            "model",
            {name: (models, values, None) for name, values in likelihoods.items()},
        )
    )
    for title, key in {"accuracy at the end": "rewards/accuracies", "margin at the end": "rewards/margins"}.items():
        lines = {}
        for name in names:
            values = [iteration.record.get(metric_prefix(name) + key) for iteration in run.iterations]
            ends = [
                [iteration.record.get(f"{metric_prefix(name)}{key}_{end}") for iteration in run.iterations]
                for end in ("low", "high")
            ]
            lines[name] = (numbers, values, ends)
        panels.append((title, "iteration", lines))
    shares = {
        "length of the answers, tokens": {side: f"mean_length_{side}" for side in SIDES},
        "share of the generated answers": {kind: kind for kind in ("truncated", "empty", "identical")},
        "share of different answers": {side: f"distinct_{side}" for side in SIDES},
        "AUC of one number alone": {"length": "auc_length", "first token": "auc_first_token", "log-prob": "auc_logps"},
    }
    for title, keys in shares.items():
        lines = {
            label: (numbers, [i.manifest["metrics"].get(f"self_play/{key}") for i in run.iterations], None)
            for label, key in keys.items()
        }
        panels.append((title, "opponent of iteration", lines))

    panels = [panel for panel in panels if any(v is not None for _, values, _ in panel[2].values() for v in values)]
    if not panels:
        return None
    figure, all_axes = _grid(len(panels), num_columns=3, height=2.3)
    for ax, (title, xlabel, lines) in zip(all_axes, panels, strict=True):
        for i, (label, (x, values, ends)) in enumerate(lines.items()):
            points = [j for j, value in enumerate(values) if value is not None]
            if not points:
                continue
            look = SIDES.get(label, SERIES[i % len(SERIES)])
            ax.plot([x[j] for j in points], [values[j] for j in points], label=label, **look)
            if ends and all(ends[side][j] is not None for side in (0, 1) for j in points):
                errors = [[abs(values[j] - ends[side][j]) for j in points] for side in (0, 1)]
                ax.errorbar(
                    [x[j] for j in points],
                    [values[j] for j in points],
                    yerr=errors,
                    fmt="none",
                    color=look["color"],
                    capsize=3,
                )
        if title.startswith(("accuracy", "AUC")):
            ax.axhline(0.5, color="0.5", linewidth=0.9, linestyle=":")
            ax.annotate(
                "chance",
                (1, 0.5),
                (0, -10),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color="0.4",
            )
        ax.set(title=title, xlabel=xlabel)
        ax.margins(x=0.08, y=0.15)
        ticks = sorted({x for xs, _, _ in lines.values() for x in xs})
        if xlabel == "model":
            ax.set_xticks(ticks, ["start" if t == -1 else f"{t}" for t in ticks])
        else:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len(ticks) <= 12:
                ax.set_xticks(ticks)
        if len(lines) > 1:
            ax.legend()
    return figure


def draw_lengths(run: "Run", name: str) -> Figure | None:
    """Lengths of real and generated answers, a panel per iteration."""
    panels = {f"iteration {i.number}": i.games[name].lengths for i in run.iterations if name in i.games}
    return _draw_histograms(panels, "tokens", whole_numbers=True)


def draw_logps(run: "Run", name: str) -> Figure | None:
    """The opponent's log-prob per token of real and generated answers, a panel per iteration."""
    panels = {f"iteration {i.number}": i.games[name].logps_per_token for i in run.iterations if name in i.games}
    return _draw_histograms(panels, "log-prob per token, nats")


def draw_changes(run: "Run", name: str) -> Figure | None:
    """How an iteration changed the log-prob per token of the real answers, a panel per iteration."""
    panels = {f"iteration {t}": {"real": change} for t, change in run.changes(name).items()}
    return _draw_histograms(panels, "change, nats per token", mark=0)


def _draw_histograms(panels: dict, xlabel: str, whole_numbers: bool = False, mark: float | None = None):
    panels = {title: sides for title, sides in panels.items() if any(len(values) for values in sides.values())}
    if not panels:
        return None
    everything = np.concatenate([values for sides in panels.values() for values in sides.values()])
    low, high = everything.min(), everything.max()
    if whole_numbers and high - low <= 40:
        edges = np.arange(low - 0.5, high + 1)
    else:
        # A few outliers would leave a single bar: they are counted in the outermost ones
        low, high = np.quantile(everything, [0.002, 0.998])
        edges = np.linspace(low, high if high > low else low + 1, 41)
    figure, all_axes = _grid(len(panels), num_columns=4, height=1.9, sharex=True, sharey=True)
    handles = {}
    for ax, (title, sides) in zip(all_axes, panels.items(), strict=True):
        for side, values in sides.items():
            if not len(values):
                continue
            shares = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)
            color = SIDES[side]["color"]
            if side == "real":
                handles[side] = ax.stairs(shares, edges, fill=True, color=color, alpha=0.4)
            else:
                handles[side] = ax.stairs(shares, edges, color=color, linewidth=1.5)
            handles[f"mean, {side}"] = ax.axvline(
                values.mean(), color=color, linewidth=1.2, linestyle=SIDES[side]["linestyle"]
            )
        if mark is not None:
            ax.axvline(mark, color="0.2", linewidth=0.9)
        ax.margins(x=0.02)
        ax.set_title(title)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=whole_numbers))
    all_axes[0].set_ylim(bottom=0)
    for ax in all_axes[-4:]:
        ax.set_xlabel(xlabel)
    for ax in all_axes:
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel("share of answers")
    _legend(figure, handles)
    return figure


def _grid(num_panels: int, num_columns: int, height: float, **share):
    """A figure of panels, row by row, without the empty ones of the last row."""
    # Few panels keep the size that they have among many
    width = 10 / num_columns
    num_columns = min(num_columns, max(2, num_panels))
    num_rows = math.ceil(num_panels / num_columns)
    figure = Figure(figsize=(width * num_columns, height * num_rows + 0.4), layout="constrained")
    all_axes = figure.subplots(num_rows, num_columns, squeeze=False, **share).flatten()
    for ax in all_axes[num_panels:]:
        ax.remove()
    for ax in all_axes[max(0, num_panels - num_columns) : num_panels]:
        ax.tick_params(labelbottom=True)
    return figure, list(all_axes[:num_panels])


def _legend(figure: Figure, handles: dict):
    if len(handles) > 1:
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(6, len(handles)))
