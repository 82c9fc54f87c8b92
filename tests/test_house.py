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

"""The house: what stands on what, and that an engine is built into it in one place."""

import ast
import io
import tokenize
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import Scripted, make_args, make_trainer

import trl_spin
from trl_spin import SPINConfig
from trl_spin.engines.base import ENGINES
from trl_spin.run.games import read_manifest


# Layers, from the ground up. A module imports from the layers below its own, and from nowhere else.
LAYERS = [
    "objectives schedule compat vllm_worker run.files run.logs run.weights report.signals report.tables",  # stand by themselves
    "pairs layout run.processes run.games report.card",  # the game, and what is on disk
    "engines.base report.reader shared_prefix_trainer",
    "engines.generate engines.vllm report.figures",
    "engines report.page",
    "spin_config",  # every option: those of the engines, and its own
    "data export memory measures run.checkpoints sources",
    "generation run.resume",  # stages
    "callbacks preflight probing showing",  # who calls the stages, and when
    "iterations",
    "step_size compare_sft",
    "spin_trainer",
    "trl_spin",
    "__main__",
]
MAX_CODE_LINES = 350
PACKAGE = Path(trl_spin.__file__).parent


def code_lines(path):
    """Lines that are not blank, nor a comment or a docstring."""
    source, lines, docstrings = path.read_text(), set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    return len(lines - docstrings)


FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if code_lines(path)
}


def short(module):
    return module.removeprefix("trl_spin.")


def imports_of(module):
    """Modules of the package that a module imports, anywhere in it: in functions and for types as well."""
    path, found = FILES[module], set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else base for name in names}
    return found & FILES.keys()


IMPORTS = {short(module): {short(name) for name in imports_of(module)} for module in FILES}
RANKS = {module: rank for rank, layer in enumerate(LAYERS) for module in layer.split()}


def test_imports_go_downward_only():
    assert IMPORTS.keys() == RANKS.keys()  # every module has its place, and only what is there has one
    upward = {(m, name) for m, names in IMPORTS.items() for name in names if not RANKS[name] < RANKS[m]}
    assert upward == set()


def test_there_is_no_import_circle():
    assert len([*TopologicalSorter(IMPORTS).static_order()]) == len(FILES)


def test_only_the_doors_import_the_trainer():
    assert {m for m, names in IMPORTS.items() if {"spin_trainer", "trl_spin"} & names} == {"trl_spin", "__main__"}


def test_reports_need_nothing_but_the_files_of_a_run():
    needed = {name for module, names in IMPORTS.items() if module.startswith("report") for name in names}
    assert {name for name in needed if not name.startswith("report.")} == {"run.files", "run.games"}


def test_every_file_fits_a_reader():
    assert {module: n for module, path in FILES.items() if (n := code_lines(path)) > MAX_CODE_LINES} == {}


class Parrot(Scripted):
    """All that there is of another engine."""

    name = "parrot"
    flag = "use_parrot"

    @dataclass
    class Options:
        use_parrot: bool = False
        parrot_word: int = 7

    @classmethod
    def check(cls, args, model=None):
        if args.parrot_word < 0:
            raise ValueError("Parrots know words only.")

    def script(self, prompts):
        return [[self.args.parrot_word] for _ in prompts]


@dataclass
class ParrotConfig(Parrot.Options, SPINConfig):
    """Its options beside all others."""


def test_another_engine_is_a_change_in_one_place(tmp_path, capsys, request):
    request.addfinalizer(lambda: ENGINES.pop("parrot"))
    trainer = make_trainer(tmp_path, config=ParrotConfig, use_parrot=True, parrot_word=5, num_self_play_iterations=1)
    trainer.train()
    assert trainer.game.train.pairs[0]["generated_ids"][:] == [[5]] * 12
    assert "at most 144 tokens, by parrot" in " ".join(capsys.readouterr().out.split())
    assert read_manifest(str(tmp_path), 0)["engine"] == "parrot"
    for options, message in (
        ({"parrot_word": 5}, "`parrot_word=5` means nothing to the engine that generates .'generate'"),
        ({"use_parrot": True, "use_vllm": True}, "`use_vllm` and `use_parrot` are both set"),
        ({"use_parrot": True, "vllm_max_model_length": 1}, "`vllm_max_model_length=1` means nothing .*'parrot'"),
        ({"use_parrot": True, "parrot_word": -1}, "Parrots know words only"),
    ):
        with pytest.raises(ValueError, match=message):
            make_args(tmp_path, config=ParrotConfig, **options)
