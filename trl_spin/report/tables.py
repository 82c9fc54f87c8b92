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

"""What is shown of a run in the terminal: lines of what is logged, the table of its models, and how to print one."""

import re
import tomllib
from contextlib import suppress
from functools import partial
from pathlib import Path
from pprint import pformat
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text
from tqdm.auto import tqdm


TITLES = tomllib.loads(Path(__file__).with_name("titles.toml").read_text(encoding="utf-8"))


def iteration_rows(models: list[dict[str, Any]], best: int | None = None) -> list[list[str]]:
    """
    Titles, then a row per model, see [`~run.games.read_models`], of which the best is marked. Columns without any
    value are left out.
    """
    columns, keys = {}, dict.fromkeys(key for model in models for key in model)
    for title, (pattern, form) in TITLES["table"].items():
        for match in filter(None, (re.fullmatch(pattern, key) for key in keys)):
            names = [name.strip("_") for name in match.groups() if name]
            columns[" ".join([title, *names])] = match.string, form
    rows = [["iteration", *columns]]
    for model in models:
        name = "start" if model["iteration"] == -1 else str(model["iteration"])
        cells = (f"{model[key]:{form}}" if key in model else "" for key, form in columns.values())
        rows.append([name + " (best)" * (model["iteration"] == best), *cells])
    return rows


def log_line(logs: dict[str, Any], **facts: Any) -> str:
    """What is logged, in a line for people that titles.toml describes. `facts` are what else it may show."""
    prefix = next((key.removesuffix("loss") for key in logs if re.fullmatch("eval_(.+_)?loss", key)), "eval_")
    values = {key.replace(prefix, "eval_", 1): value for key, value in logs.items()} | facts
    values["dataset"] = prefix.removeprefix("eval").rstrip("_").replace("_", " ", 1)
    line = next((line for key, line in TITLES["console"].items() if key in values), None)
    if line is None:  # something of the user's own
        own = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in logs.items() if k != "epoch")
        return f"Iteration {facts['game'].iteration}: {', '.join(own)}"
    shown = []
    for part in line:
        with suppress(KeyError):  # not every objective has every metric
            shown.append(part.format_map(values))
    return f"{shown[0]}: {', '.join(shown[1:])}"


def show_table(title: str, rows: list[list[str]], justify: str = "left"):
    """
    Prints a table whose first row holds the titles of the columns, `justify` is for all columns but the first.
    """
    columns, *rows = [[printable(cell) for cell in row] for row in rows]
    # As `Text`: what a model or a dataset wrote is never markup
    long = any(len(cell) > 30 or "\n" in cell for row in [columns, *rows] for cell in row)
    headers = [Column(Text(column), overflow="fold", justify=justify) for column in columns]
    headers[0].justify = "left"
    table = Table(*headers, title=Text(title), show_lines=long)
    for row in rows:
        table.add_row(*map(Text, row))
    with tqdm.external_write_mode():
        Console().print(table)


def render(template: str, **facts: Any) -> str:
    """What one of the package's templates says of these facts, for people."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parents[1]), undefined=StrictUndefined)
    environment.filters |= {"count": "{:,}".format, "short": tqdm.format_sizeof, "duration": tqdm.format_interval}
    environment.filters["quote"] = partial(pformat, width=66)
    return environment.get_template(template).render(facts)


def printable(text: str) -> str:
    """Text without the control characters, escape among them, that a terminal would obey. rich lets some through."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
