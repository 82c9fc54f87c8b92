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
The report of a run: one HTML file that needs nothing else, and the figures as PNG files. It is made of what the run has
left on disk, so it may be written at any time, also of a run that is under way or was stopped.
"""

import argparse
import base64
import html
import io
import json
import re
import sys
import unicodedata
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .game import atomic_open
from .run_files import Run, is_number, read_run
from .signals import metric_prefix


_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; } h3 { font-size: 1rem; }
h2 { border-bottom: 1px solid #bbb; } p.meta { color: #555; margin-top: .2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .2rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid #e3e3e3; }
th:first-child, td.text { text-align: left; font-weight: normal; } td.long { overflow-wrap: anywhere; }
thead th { border-bottom: 1.5px solid #555; font-weight: 600; white-space: nowrap; }
tr.group th { font-weight: 600; padding-top: .7rem; }
figure { margin: 1rem 0; break-inside: avoid; } figure img { max-width: 100%; height: auto; }
figcaption { color: #444; font-size: .9rem; }
.warnings li, .notes li { margin: .3rem 0; overflow-wrap: anywhere; } .warnings li::marker { color: #b00020; }
.probe { border-top: 1px solid #ccc; padding: .3rem 0 .8rem; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .6rem; }
.answers h4 { margin: .3rem 0; font-size: .8rem; color: #555; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: .8rem/1.4 ui-monospace, monospace;
  background: #f5f5f5; padding: .4rem .5rem; unicode-bidi: isolate; }
code { font-size: .85em; overflow-wrap: anywhere; }
dl.settings { columns: 2; column-gap: 2rem; font-size: .85rem; } dl.settings div { break-inside: avoid; }
dl.settings dt { display: inline; } dl.settings dd { display: inline; margin: 0; color: #444; overflow-wrap: anywhere; }
dl.settings dt::after { content: ": "; }
@media print { :root { font-size: 11px; } body { margin: 0; max-width: none; font-size: 1rem; } h2 { break-after: avoid; }
  .scroll { overflow: visible; } th, td { padding: .1rem .35rem; } tr { break-inside: avoid; } }
"""
# No scripts, no network, whatever a model has written
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# They turn the text around them about, so that it reads as another
_BIDI = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def text(value: Any) -> str:
    """
    What a model, a dataset or a user wrote, as text in HTML.

    Args:
        value (`Any`):
            Value.

    Returns:
        `str`: Escaped text, without control characters and without those that change the direction of writing.
    """
    plain = "".join(
        c
        if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") and c not in _BIDI
        else "\N{REPLACEMENT CHARACTER}"
        for c in str(value)
    )
    return html.escape(plain)


def _prose(message: str) -> str:
    """A message of the package's own, with its code set as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(message))


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) or isinstance(value, int) and abs(value) >= 1e6:
        return f"{value:.4g}"
    return text(value)


def summary_rows(run: Run) -> list[tuple[str, list[str]]]:
    """
    The summary, with a column per iteration: metrics are many, iterations few.

    Args:
        run ([`Run`]):
            Run.

    Returns:
        `list[tuple[str, list[str]]]`: Title and one cell per iteration; a heading has no cells.
    """
    rows = []

    def add(title: str, values: list[Any]):
        if any(value is not None and value != "" for value in values):
            rows.append((title, [value if isinstance(value, str) else _number(value) for value in values]))

    def add_metrics(heading: str, titles: dict[str, str], prefix: str = ""):
        start = len(rows)
        for title, key in titles.items():
            values = [(i.manifest["metrics"] | i.record).get(prefix + key) for i in run.iterations]
            ends = [[i.record.get(f"{prefix}{key}_{end}") for end in ("low", "high")] for i in run.iterations]
            cells = [
                f"{_number(value)} [{_number(low)}, {_number(high)}]" if is_number(low) and is_number(high) else value
                for value, (low, high) in zip(values, ends, strict=True)
            ]
            add(title, cells)
        if len(rows) > start:
            rows.insert(start, (heading, []))

    add("verdict", [str(i.record.get("verdict") or ("" if i.record else "not finished")) for i in run.iterations])
    rows.append(("Settings", []))
    for title, key in {"λ": "beta", "learning rate": "learning_rate", "passes": "num_train_epochs"}.items():
        planned = run.settings.get(key, [])
        add(title, [i.record.get(key, planned[i.number] if i.number < len(planned) else None) for i in run.iterations])
    game = {
        "length of real answers": "mean_length_real",
        "length of generated answers": "mean_length_generated",
        "truncated": "truncated",
        "empty": "empty",
        "identical": "identical",
        "played": "played",
        "different real answers": "distinct_real",
        "different generated answers": "distinct_generated",
        "AUC of the length": "auc_length",
        "AUC of the first token": "auc_first_token",
        "AUC of the opponent's log-prob per token": "auc_logps",
        "rows left out": "left_out",
    }
    at_end = {
        "loss": "loss",
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
        "reward of real answers": "rewards/real",
        "reward of generated answers": "rewards/generated",
    }
    add_metrics("Training, as logged last", at_end)
    for name in run.held_out():
        prefix = metric_prefix(name)
        own = {
            key.removeprefix(prefix): None
            for i in run.iterations
            for key in i.record
            if key.startswith(f"{prefix}answers/") and not key.endswith(("_low", "_high"))
        }
        titles = {
            **at_end,
            "NLL of real answers, opponent": "self_play/nll_real",
            "NLL of real answers, trained": "nll/real",
            **{key.removeprefix("answers/"): key for key in own},
        }
        add_metrics(f"Held-out prompts ({name}), after training", titles, prefix)
    for name in run.datasets:
        titles = {title: f"self_play/{key}" for title, key in game.items()}
        if name == "train":
            titles |= {"NLL of real answers": "self_play/nll_real"}
        add_metrics(f"Answers of the opponent ({name})", titles, metric_prefix(name))
    return rows


def _summary(run: Run) -> str:
    if not run.iterations:
        return "<p>No iteration has been played yet.</p>"
    head = "".join(f"<th>iteration {i.number}</th>" for i in run.iterations)
    lines = []
    for title, cells in summary_rows(run):
        row_class = "" if cells else ' class="group"'
        span = "" if cells else f' colspan="{len(run.iterations) + 1}"'
        data = "".join(f"<td>{text(cell)}</td>" for cell in cells)
        lines.append(f"<tr{row_class}><th{span}>{text(title)}</th>{data}</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _warnings(run: Run) -> str:
    lines = []
    for iteration in run.iterations:
        warnings = iteration.record.get("warnings") or iteration.manifest.get("warnings") or []
        lines += [f"<li>Iteration {iteration.number}: {_prose(warning)}</li>" for warning in warnings]
    if not lines:
        return ""
    return f'<h2>Warnings</h2><ul class="warnings">{"".join(lines)}</ul>'


def _probes(run: Run) -> str:
    if not run.probes:
        return ""
    models = {number: "before" if number == 0 else f"iteration {number - 1}" for number in run.probes}
    answers = {number: {probe["row"]: probe for probe in probes} for number, probes in run.probes.items()}
    rows = dict.fromkeys(row for by_row in answers.values() for row in by_row)
    blocks = []
    for row in rows:
        probe = next(by_row[row] for by_row in answers.values() if row in by_row)
        cells = {"real answer": probe["real"]}
        cells |= {models[n]: by_row[row]["generated"] for n, by_row in answers.items() if row in by_row}
        columns = "".join(
            f'<div><h4>{text(title)}</h4><pre dir="auto">{text(answer)}</pre></div>' for title, answer in cells.items()
        )
        blocks.append(
            f'<div class="probe"><h4>Prompt, row {text(row)}</h4><pre dir="auto">{text(probe["prompt"])}</pre>'
            f'<div class="answers">{columns}</div></div>'
        )
    return (
        "<h2>Probes</h2><p>The same prompts with the same seeds, answered by the model before self-play and by that of "
        f"each iteration.</p>{''.join(blocks)}"
    )


def _lineage(run: Run) -> str:
    if not run.iterations:
        return ""
    rows = []
    for iteration in run.iterations:
        opponent = iteration.manifest["opponent"]
        pairs = sum(shard["rows"] for shard in iteration.manifest["shards"] if shard["dataset"] == "train")
        made = f"iteration-{iteration.number}" if iteration.record else "not finished"
        rows.append(
            f'<tr><th>{iteration.number}</th><td class="text long">{text(opponent["model"] or "a model without a name")}</td>'
            f'<td class="text long"><code>{text(opponent["fingerprint"])}</code></td><td>{pairs}</td>'
            f"<td>{made}</td></tr>"
        )
    data = "".join(
        f"<li>{text(name)}: <code>{text(fingerprint)}</code></li>"
        for name, fingerprint in run.iterations[-1].manifest.get("data", {}).items()
    )
    return (
        '<h2>Lineage</h2><div class="scroll"><table><thead><tr><th>iteration</th><th>opponent and reference</th>'
        "<th>its weights, by SHA-256</th><th>pairs</th><th>makes</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div><p>Data, by SHA-256:</p><ul>{data}</ul>"
    )


def _settings(run: Run) -> str:
    def items(values: dict[str, Any]) -> str:
        shown = {key: value if isinstance(value, str) else json.dumps(value) for key, value in sorted(values.items())}
        return "".join(f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>" for key, value in shown.items())

    unset = sorted(key for key, value in run.settings.items() if value is None)
    chosen = {key: value for key, value in run.settings.items() if value is not None}
    return (
        f'<h2>Settings</h2><dl class="settings">{items(chosen)}</dl>'
        + (f"<p>Not set: {text(', '.join(unset))}.</p>" if unset else "")
        + f'<h3>Versions</h3><dl class="settings">{items(run.versions)}</dl>'
    )


def _captions(run: Run) -> dict[str, tuple[str, str]]:
    """Heading and caption of each figure, by name of the function that draws it."""
    return {
        "draw_training": (
            "Training",
            "Lines: training, as logged. Single points: held-out prompts. Rewards, margin and loss start afresh in each "
            "iteration, as the opponent is then the model itself; the loss starts at ℓ(0), log 2 for the logistic loss. The "
            "reward of generated answers should fall, and that of real answers rise. Where both fall, look at the negative "
            "log-likelihood (NLL) of held-out real answers: harm is done when that rises. Accuracy on training pairs soon "
            "means memory.",
        ),
        "draw_iterations": (
            "Iterations",
            "The first panel compares the models by one measure that means the same in each iteration: where it rises, the "
            "iteration has overshot. An accuracy near chance on held-out prompts means that the opponent's answers can no "
            "longer be told from the real ones. Bars are 95% intervals, where they were logged.",
        ),
        "draw_lengths": (
            "Lengths of the answers",
            "Where the two sides differ, length alone wins the game. Generated answers are cut at max_completion_length "
            f"({run.settings.get('max_completion_length', 'unknown')}).",
        ),
        "draw_logps": (
            "The opponent's log-prob per token",
            "Of real and of its own answers. Under the opponent the two distributions come closer as self-play goes on. "
            "Generated answers of pairs that were not played are left out; outliers are in the outermost bars.",
        ),
        "draw_changes": (
            "What each iteration did to the real answers",
            "Change of their log-prob per token from one opponent to the next. Right of the line, a real answer has become "
            "more likely. An iteration stands here once the next one has begun.",
        ),
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
    directory = run.output_dir / "report"
    sections = []
    with figures.style():
        for function, (heading, caption) in _captions(run).items():
            draw, per_dataset = getattr(figures, function), function not in ("draw_training", "draw_iterations")
            drawn = {name: draw(run, name) for name in run.datasets} if per_dataset else {"": draw(run)}
            drawn = {name: figure for name, figure in drawn.items() if figure is not None}
            if drawn:
                sections.append(f"<h2>{text(heading)}</h2><p>{text(caption)}</p>")
            for name, figure in drawn.items():
                file_name = "_".join(filter(None, (function.removeprefix("draw_"), re.sub(r"[^\w-]+", "-", name))))
                with atomic_open(directory / f"{file_name}.png") as file:
                    figure.savefig(file, format="png", dpi=150)
                svg = io.BytesIO()
                figure.savefig(svg, format="svg", metadata={"Date": None})
                # As an image of its own it shares neither names nor rights with the page
                source = f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"
                title = f"{heading}: {name}" if name else heading
                shown = f"<figcaption>{text(name)}</figcaption>" if len(drawn) > 1 else ""
                sections.append(f'<figure>{shown}<img alt="{text(title)}" src="{source}"></figure>')

    title = f"Self-play report: {text(run.output_dir.resolve().name)}"
    finished = sum(bool(iteration.record) for iteration in run.iterations)
    planned = len(run.settings.get("beta", [])) or "?"
    versions = ", ".join(f"{name} {run.versions[name]}" for name in ("trl-spin", "trl") if name in run.versions)
    notes = "".join(f"<li>{_prose(note)}</li>" for note in run.notes)
    page = "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{_CSS}</style></head><body>",
            f'<h1>{title}</h1><p class="meta">{finished} of {planned} iterations finished. '
            f"{text(versions)}. Written {datetime.now():%Y-%m-%d %H:%M}.</p>",
            f'<p>To know:</p><ul class="notes">{notes}</ul>' if notes else "",
            _warnings(run),
            f"<h2>Summary</h2>{_summary(run)}",
            *sections,
            _probes(run),
            _lineage(run),
            _settings(run),
            "</body></html>\n",
        ]
    )
    with atomic_open(directory / "report.html") as file:
        file.write(page.encode())
    return directory / "report.html"


def main(arguments: list[str]):
    """
    The `trl-spin report` command.

    Args:
        arguments (`list[str]`):
            Command line after `report`.
    """
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
