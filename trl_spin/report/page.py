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
The report of a run: one HTML file that needs nothing else, and the figures as PNG files. It is made of what the run
has left on disk, so it can be written at any time, also while the run goes on or after it was stopped.
"""

import argparse
import base64
import io
import json
import re
import sys
import unicodedata
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from tqdm.auto import tqdm

from ..run.files import atomic_open
from .reader import Iteration, Run, is_number, read_run
from .signals import metric_prefix


# They change the direction of the text around them, so that it reads as something else
_BIDI = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Titles in the summary, and the settings or metrics that they stand for
_SETTINGS = {"λ": "beta", "learning rate": "learning_rate", "passes": "num_train_epochs"}
_AT_END = {
    "loss": "loss",
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "reward of real completions": "rewards/real",
    "reward of generated completions": "rewards/generated",
}
_HELD_OUT = _AT_END | {
    "NLL of real completions, opponent": "self_play/nll_real",
    "NLL of real completions, trained": "nll/real",
}
_GAME = {
    "length of real completions": "self_play/mean_length_real",
    "length of generated completions": "self_play/mean_length_generated",
    "truncated": "self_play/truncated",
    "empty": "self_play/empty",
    "identical": "self_play/identical",
    "played": "self_play/played",
    "distinct real completions": "self_play/distinct_real",
    "distinct generated completions": "self_play/distinct_generated",
    "AUC of the length": "self_play/auc_length",
    "AUC of the first token": "self_play/auc_first_token",
    "AUC of the opponent's log-prob per token": "self_play/auc_logps",
    "rows left out": "self_play/left_out",
}


def write_report(output_dir: str | Path) -> Path:
    """
    Writes `report/report.html` and the figures as PNG files beside it.

    Args:
        output_dir (`str` or `Path`):
            Output directory of a run, finished or not.

    Returns:
        `Path`: The HTML file.

    Raises:
        `ModuleNotFoundError`: If matplotlib is not installed.
        `FileNotFoundError`: If the directory holds no run.
    """
    try:
        from . import figures
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "The report needs matplotlib: `pip install trl-spin[report]`.", name="matplotlib"
        ) from error

    run = read_run(output_dir)
    path = run.output_dir / "report" / "report.html"
    with figures.style():
        drawn = {"training": {"": figures.draw_training(run)}, "iterations": {"": figures.draw_iterations(run)}}
        for kind in ("lengths", "logps", "changes"):
            draw = getattr(figures, f"draw_{kind}")
            drawn[kind] = {name: draw(run, name) for name in run.datasets}
        images = {kind: _save_figures(path.parent, kind, by_dataset) for kind, by_dataset in drawn.items()}
    # What models, datasets and users wrote is escaped wherever the template shows it, and loses what is not text
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_plain,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"code": _set_code, "json": json.dumps}
    page = environment.get_template("report.html.jinja").render(
        run=run,
        name=run.output_dir.resolve().name,
        finished=sum(bool(iteration.record) for iteration in run.iterations),
        now=f"{datetime.now():%Y-%m-%d %H:%M}",
        summary=summary_rows(run),
        images=images,
        probes=_probes(run),
    )
    with atomic_open(path) as file:
        file.write(page.encode())
    return path


def _plain(value: Any) -> str:
    """Text without control characters, and without those that change the direction of writing."""
    if isinstance(value, Markup):
        return value
    return "".join(
        c
        if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") and c not in _BIDI
        else "\N{REPLACEMENT CHARACTER}"
        for c in str(value)
    )


def _set_code(message: str) -> Markup:
    """A message of the package's own, with what stands between backticks set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(_plain(message)))))


def _save_figures(directory: Path, kind: str, by_dataset: dict[str, Any]) -> dict[str, str]:
    """Writes figures as PNG files, and returns them as SVG in base64."""
    images = {}
    for name, figure in by_dataset.items():
        if figure is None:
            continue
        file_name = re.sub(r"[^\w-]+", "-", f"{kind}_{name}" if name else kind)
        with atomic_open(directory / f"{file_name}.png") as file:
            figure.savefig(file, format="png", dpi=150)
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        images[name] = base64.b64encode(svg.getvalue()).decode()
    return images


def summary_rows(run: Run) -> list[tuple[str, list[str]]]:
    """Title and one cell per iteration: metrics are many, iterations few. A heading has no cells."""
    verdicts = [str(i.record.get("verdict") or ("" if i.record else "not finished")) for i in run.iterations]
    settings = {title: [_setting(run, i, key) for i in run.iterations] for title, key in _SETTINGS.items()}
    sections = {
        "": {"verdict": verdicts},
        "Settings": settings,
        "Training, as logged last": _metrics(run, _AT_END, ""),
    }
    for name in run.held_out:
        prefix = metric_prefix(name)
        logged = {key.removeprefix(prefix): None for i in run.iterations for key in i.record if key.startswith(prefix)}
        own = [key for key in logged if key.startswith("completions/") and not key.endswith(("_low", "_high"))]
        titles = _HELD_OUT | {key.removeprefix("completions/"): key for key in own}
        sections[f"Held-out prompts ({name}), after training"] = _metrics(run, titles, prefix)
    for name in run.datasets:
        titles = _GAME | ({"NLL of real completions": "self_play/nll_real"} if name == "train" else {})
        sections[f"Completions of the opponent ({name})"] = _metrics(run, titles, metric_prefix(name))

    rows = []
    for heading, section in sections.items():
        cells = {title: [_number(value) for value in values] for title, values in section.items()}
        shown = [(title, by_iteration) for title, by_iteration in cells.items() if any(by_iteration)]
        rows += [(heading, []), *shown] if heading and shown else shown
    return rows


def _setting(run: Run, iteration: Iteration, key: str) -> Any:
    planned = run.settings.get(key, [])
    return iteration.record.get(key, planned[iteration.number] if iteration.number < len(planned) else None)


def _metrics(run: Run, titles: dict[str, str], prefix: str) -> dict[str, list[Any]]:
    """Metrics of each iteration by title, followed by their intervals where they were logged."""
    return {title: [_metric(i, prefix + key) for i in run.iterations] for title, key in titles.items()}


def _metric(iteration: Iteration, key: str) -> Any:
    value = (iteration.manifest["metrics"] | iteration.record).get(key)
    low, high = (iteration.record.get(f"{key}_{end}") for end in ("low", "high"))
    if is_number(low) and is_number(high):
        return f"{_number(value)} [{_number(low)}, {_number(high)}]"
    return value


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) or isinstance(value, int) and abs(value) >= 1e6:
        return f"{value:.4g}"
    return str(value)


def _probes(run: Run) -> list[dict[str, Any]]:
    """Each probe with the completions of all models, by their names."""
    probes = {}
    for number, of_model in run.probes.items():
        model = "before" if number == 0 else f"iteration {number - 1}"
        for probe in of_model:
            shown = probes.setdefault(probe["row"], probe | {"completions": {"real completion": probe["real"]}})
            shown["completions"][model] = probe["generated"]
    return list(probes.values())


def main(arguments: list[str]):
    """The `trl-spin report` command, given the command line after `report`."""
    parser = argparse.ArgumentParser(
        prog="trl-spin report",
        description="Writes report/report.html, one file that needs no network, and the figures as PNG files.",
    )
    parser.add_argument("output_dir", help="Output directory of a run, finished or not.")
    options = parser.parse_args(arguments)
    try:
        path = write_report(options.output_dir)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(f"trl-spin report: {error}")
    tqdm.write(str(path))
