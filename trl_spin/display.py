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

"""Tables in the terminal. What a model or a dataset wrote is text in them, never markup."""

import shutil

from tqdm.auto import tqdm
from transformers.utils import is_rich_available


def show_table(title: str, rows: list[list[str]]):
    """
    Prints a table, with rich where it is installed.

    Args:
        title (`str`):
            Title.
        rows (`list[list[str]]`):
            Cells; the first row holds the titles of the columns.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    if is_rich_available():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(title), show_lines=any("\n" in cell or len(cell) > 30 for row in rows for cell in row)
        )
        for column in rows[0]:
            table.add_column(Text(column), overflow="fold")
        for row in rows[1:]:
            table.add_row(*map(Text, row))
        console = Console()
        with console.capture() as capture:
            console.print(table)
        tqdm.write(capture.get())
        return
    width = max(12, shutil.get_terminal_size().columns // len(rows[0]) - 2)
    cells = [[cell.replace("\n", " ")[:width] for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    tqdm.write("\n".join([title, *lines]))


def printable(text: str) -> str:
    """Text without the control characters, escape among them, that a terminal would obey. rich lets some through."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
