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

"""Writes `options.md`, from `SPINConfig` and from the command's own options: `python docs/options.py`."""

import re
from dataclasses import MISSING, fields
from inspect import formatannotation
from pathlib import Path
from typing import get_type_hints

from trl import DPOConfig, ScriptArguments

from trl_spin import SPINConfig
from trl_spin.sources import DataArguments


PAGE = Path(__file__).with_name("options.md")
HEAD = """# Options

<!-- Written by `python docs/options.py`: change the docstring of `SPINConfig` instead. -->

The options of `SPINConfig` that TRL's `DPOConfig` does not have, or that have another default or meaning here, with the gist of each. The [API reference](api.md#spinconfig) has the whole of it; all other options are those of `DPOConfig` and of transformers' `TrainingArguments`. On the command line, `--` stands before the name.
"""


def default_of(option):
    return option.default if option.default_factory is MISSING else option.default_factory()


def gist(option):
    """The first sentence of its help, the second if that is short, and what it is by default if that depends."""
    text = option.metadata["help"].replace("%%", "%").replace("|", "\\|")
    first, *others = re.split(r"(?<=[^.]\.) (?=[A-Z])", text)
    kept = (s for i, s in enumerate(others) if s.startswith(("Defaults", "By default")) or i == 0 and len(first) < 46)
    return " ".join([first, *kept]).removesuffix(".")


def table(options, hints):
    yield "| option | type, default | |\n|---|---|---|\n"
    for option in options:
        kind = re.sub(r"(\w+\.)+", "", formatannotation(hints[option.name]))
        kind, value = kind.removesuffix(" | None").replace(" | ", "` or `"), default_of(option)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        default = "" if value is None else f", `{value!r}`"
        yield f"| `{option.name}` | `{kind}`{default} | {gist(option)} |\n"


def page():
    """The text of `options.md`."""
    own = {option.name: option for option in fields(SPINConfig)}
    groups = {}  # and their order, as in the docstring
    for title, name in re.findall(r"^ {8}(?:> (.+)|(\w+) \(.+\):)$", SPINConfig.__doc__, re.M):
        if title:
            group = groups.setdefault(title, [])
        else:
            group.append(own.pop(name))
    theirs = {option.name: default_of(option) for option in fields(DPOConfig)}
    groups["Parameters of generation, as in GRPOConfig"] = [o for name, o in own.items() if name not in theirs]
    changed = [name for name, o in own.items() if name in theirs and default_of(o) != theirs[name]]
    assert not changed, f"not in the docstring of SPINConfig: {changed}"
    command = [o for o in fields(DataArguments) if o.name not in ScriptArguments.__dataclass_fields__]
    groups["Parameters of the command `trl-spin` alone"] = command
    hints = get_type_hints(SPINConfig) | get_type_hints(DataArguments)
    sections = (f"\n## {title}\n\n{''.join(table(options, hints))}" for title, options in groups.items())
    return HEAD + "".join(sections)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
