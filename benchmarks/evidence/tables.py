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

"""
The tables of the study, and the curves over temperatures, from `results/`.

    python benchmarks/evidence/tables.py
"""

import math
import statistics
from collections import defaultdict
from pathlib import Path

from common import read
from matplotlib import rcParams
from matplotlib.figure import Figure


# 97.5% quantiles of Student's t, by number of runs
_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
_COLORS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7"]  # Okabe and Ito


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95% interval."""
    radius = _T[len(values)] * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), radius


def cell(values: list[float | None], digits: int = 3) -> str:
    if None in values:
        return f"not reached in {values.count(None)} of {len(values)}"
    mean, radius = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(radius) else f" ± {radius:.{digits}f}")


def table(name: str, columns: dict[str, str], by: str = "arm"):
    """Prints a Markdown table: a row for each arm, and the mean over its runs."""
    arms = defaultdict(list)
    for row in read(name):
        arms[row[by], row.get("rate", "")].append(row)
    print(f"\n{name}\n\n| {by} | rate | runs | {' | '.join(columns)} |\n|---|---:|---:|{'---:|' * len(columns)}")
    for (arm, rate), rows in arms.items():
        cells = [cell([row[key] for row in rows]) for key in columns.values()]
        print(f"| {arm} | {rate:g} | {len(rows)} | {' | '.join(cells)} |")


def differences(name: str, measure, arm: str):
    """Prints how far an arm is ahead of each other one, run by run with the same seed."""
    by_arm = defaultdict(dict)
    for row in read(name):
        by_arm[row["arm"]][row["seed"]] = measure(row)
    print(f"\n{name}\n")
    for other in by_arm.keys() - {arm, "start"}:
        seeds = by_arm[arm].keys() & by_arm[other].keys()
        if seeds:
            print(f"{arm} - {other}: {cell([by_arm[arm][s] - by_arm[other][s] for s in sorted(seeds)], 4)}")


def by_iteration(name: str, arm: str, key: str):
    """Prints a number at the start and after each iteration, and what each iteration added."""
    curves = [[point[key] for point in row["curve"]] for row in read(name) if row["arm"] == arm]
    gains = [[after - before for before, after in zip(curve, curve[1:], strict=False)] for curve in curves]
    for what, values in (("", curves), (", gains", gains)):
        print(f"{arm}, {key}{what}: {', '.join(cell(list(column)) for column in zip(*values, strict=True))}")


def draw_temperatures(name: str, prefix: str, label: str):
    """Curves of a share over the temperatures of decoding, with intervals."""
    rcParams.update({"font.size": 9, "legend.fontsize": 8, "legend.frameon": False})
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes, arms = figure.subplots(), defaultdict(lambda: defaultdict(list))
    for row in read(name):
        for key, value in row.items():
            if key.startswith(prefix):
                arms[row["arm"]][float(key.removeprefix(prefix))].append(value)
    for color, (arm, points) in zip(_COLORS, arms.items(), strict=False):
        means, radii = zip(*(interval(points[t]) for t in sorted(points)), strict=True)
        radii = None if any(map(math.isnan, radii)) else radii
        style = "--" if arm == "start" else "-"
        axes.errorbar(sorted(points), means, radii, color=color, label=arm, linestyle=style, capsize=2, linewidth=1.4)
    axes.set(xlabel="temperature of decoding", ylabel=label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    figure.savefig(Path(__file__).with_name(f"{name}.png"), dpi=160)


if __name__ == "__main__":
    right = {f"right at T = {t:g}": f"right at {t:g}" for t in (0, 0.25, 0.5, 0.75, 1)} | {"NLL": "nll"}
    diverse = right | {"different right ones in 8": "different right ones in 8"}
    kept = {f"old at {level}": f"old at {level}" for level in (0.5, 0.8, 0.9)}
    loops = {f"{what} at T = {t}": f"{what} at {t}" for what in ("repeated", "ended") for t in ("0", "0.5", "1")}
    loops |= {"repeated at T = 0.5, penalty": "repeated at 0.5 with a penalty of 1.2", "NLL": "nll"}
    three = {title: key for title, key in right.items() if key not in ("right at 0.25", "right at 0.75")}
    scripts = {"subset_sums": diverse, "few_rows": right, "repetition": loops, "retention": kept, "paper": three}
    for script, columns in scripts.items():
        for stage in ("validate", "test", "ablate", "longer"):
            if read(f"{script}_{stage}"):
                table(f"{script}_{stage}", columns)
    table("smollm2", {title: key for title, key in three.items() if key != "right at 0.5"})
    for name in ("subset_sums_test", "subset_sums_longer"):
        differences(name, lambda row: max(row[key] for key in row if key.startswith("right at")), "verified self-play")
    differences("paper_test", lambda row: row["right at 1"], "4 iterations")
    by_iteration("paper_test", "4 iterations", "right at 1")
    by_iteration("paper_test", "4 iterations", "nll")
    draw_temperatures("subset_sums_test", "right at ", "right completions")
