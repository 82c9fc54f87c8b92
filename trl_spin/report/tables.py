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

"""Tables of a run: the one of its iterations, and how a table is printed in the terminal."""

import shutil
import tomllib
from pathlib import Path
from typing import Any

import pandas
from tqdm.auto import tqdm
from transformers.utils import is_rich_available


TITLES = tomllib.loads(Path(__file__).with_name("titles.toml").read_text(encoding="utf-8"))


def iteration_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """Titles, then a row per record of an iteration. Columns without any value are left out."""
    columns = {title: key for title, key in TITLES["table"].items() if any(key in record for record in records)}
    cells = [["" if key not in record else f"{record[key]:.4g}" for key in columns.values()] for record in records]
    return [list(columns), *cells]


def show_table(title: str, rows: list[list[str]]):
    """Prints a table whose first row holds the titles of the columns, with rich where it is installed."""
    columns, *rows = [[printable(cell) for cell in row] for row in rows]
    if not is_rich_available():
        width = max(12, shutil.get_terminal_size().columns // len(columns) - 2)
        table = pandas.DataFrame(rows, columns=columns).to_string(index=False, max_colwidth=width)
        tqdm.write(f"{title}\n{table}")
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    # As `Text`: what a model or a dataset wrote is never markup
    headers = [Column(Text(column), overflow="fold") for column in columns]
    long = any(len(cell) > 30 or "\n" in cell for row in [columns, *rows] for cell in row)
    table = Table(*headers, title=Text(title), show_lines=long)
    for row in rows:
        table.add_row(*map(Text, row))
    with tqdm.external_write_mode():
        Console().print(table)


def printable(text: str) -> str:
    """Text without the control characters, escape among them, that a terminal would obey. rich lets some through."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
