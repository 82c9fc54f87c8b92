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

import base64
import hashlib
import io
import json
import re
import tomllib
from collections import defaultdict
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from tqdm.auto import tqdm

from ..run.files import atomic_open
from ..run.games import read_sft
from .reader import read_run
from .signals import metric_prefix
from .tables import iteration_rows


SUMMARY = tomllib.loads(Path(__file__).with_name("summary.toml").read_text(encoding="utf-8"))
# Control characters, halves of characters, and what changes the direction of the text around it, so that it reads as
# something else
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


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
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("The report needs matplotlib: `pip install trl-spin[report]`.", name="matplotlib")
    from . import figures

    run = read_run(output_dir)
    path = run.output_dir / "report" / "report.html"
    images = defaultdict(lambda: defaultdict(dict))  # SVG in base64, by kind, dataset and title
    with figures.style():
        for kind, name, title, figure in figures.draw_all(run):
            parts = filter(None, [kind, name, re.split("[:(,]", title)[0].strip()])
            file_name = re.sub(r"[^\w-]+", "-", "_".join(parts))
            with atomic_open(path.with_name(f"{file_name}.png")) as file:
                figure.savefig(file, format="png", dpi=150)
            svg = io.BytesIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})
            images[kind][name][title] = base64.b64encode(svg.getvalue()).decode()
    # What models, datasets and users wrote is escaped wherever the template shows it, and loses what is not text
    environment = Environment(autoescape=True, finalize=_plain, undefined=StrictUndefined, trim_blocks=True)
    environment.loader = FileSystemLoader(Path(__file__).parent)
    filters = {"code": _code, "number": _number, "setting": _setting, "prefix": metric_prefix}
    environment.filters |= filters | {"duration": tqdm.format_interval}
    # The name of the script in the page's policy, which lets no other run
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    template = environment.get_template("report.html.jinja")
    facts = {"now": f"{datetime.now():%Y-%m-%d %H:%M}", "sft": iteration_rows(read_sft(output_dir))}
    page = template.render(run=run, images=images, **facts, **SUMMARY)
    with atomic_open(path) as file:
        file.write(page.encode())
    return path


def _plain(value: Any) -> str:
    """Text without control characters, and without those that change the direction of writing."""
    return value if isinstance(value, Markup) else _NOT_TEXT.sub("\N{REPLACEMENT CHARACTER}", str(value))


def _code(message: str) -> Markup:
    """A message of the package's own, with what stands between backticks set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(_plain(message)))))


def _number(value: Any, spec: str) -> str:
    return f"{value:{spec}}" if isinstance(value, (int, float)) else str(value)


def _setting(value: Any) -> str:
    """A setting as text, of an absolute path its name: nobody else has that folder."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r'(^|")/(?:[^"]*/)?([^"/]+)/*(?="|$)', r"\1\2", text)
