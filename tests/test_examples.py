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
Every block of the README and of `docs/`, every recipe and every file in `examples/`, unchanged, on tiny models and data
of the same names; and what the pages link to.
"""

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import tomllib
from configparser import ConfigParser
from importlib.resources import files
from pathlib import Path
from string import Template

import nbformat
import pytest
import yaml
from conftest import make_dataset, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from nbclient import NotebookClient
from packaging.requirements import Requirement
from trl import DPOConfig

import trl_spin.__main__
from trl_spin import SPINConfig
from trl_spin.__main__ import RECIPES, main


ROOT = Path(__file__).parent.parent
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.M | re.S)
BLOCKS = [(page, m[2], textwrap.dedent(m[3])) for page, text in PAGES.items() for m in BLOCK.finditer(text)]
PYTHON_BLOCKS = [
    pytest.param(code, id=f"{page.stem}: {code.splitlines()[-1][:40]}")
    for page, kind, code in BLOCKS
    if kind == "python"
]
BASH_BLOCKS = [code for _, kind, code in BLOCKS if kind == "bash"]
JOB = {"T": "0", "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "16"}
# The arguments of `trl-spin`, those of a launcher left out. The recipes have a test of their own
COMMANDS = {
    re.sub(r"^accelerate launch .*? -m trl_spin |^trl-spin ", "", line)
    for code in BASH_BLOCKS
    for line in Template(code.replace("\\\n", " ")).safe_substitute(JOB).splitlines()
    if line.startswith(("trl-spin ", "accelerate launch "))
} - {f"--config {name}" for name in RECIPES}
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
# What makes a 7B model on a GPU a toy on a CPU
TINY = {"use_cpu": True, "max_length": 256, "max_completion_length": 8, "logging_steps": 1, "disable_tqdm": True}
TINY["write_report"] = False
OPTIONS = SPINConfig.__dataclass_fields__

ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}"
    "\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A working directory in which the names on the Hub are folders, so that the same code finds them there."""
    tokenizer = make_tokenizer(ZEPHYR)
    zephyr, tulu = "alignment-handbook/zephyr-7b-sft-full", "allenai/Llama-3.1-Tulu-3-70B-SFT"
    for name in (zephyr, tulu, "HuggingFaceTB/SmolLM2-135M-Instruct", "gsm8k-sft"):
        make_model(tokenizer, hidden_size=64).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    messages = make_dataset(8)["messages"][:]
    questions = [{"question": m[0]["content"], "answer": m[1]["content"]} for m in messages]
    splits = {
        "HuggingFaceH4/ultrachat_200k": (
            "default",
            [{"prompt": m[0]["content"], "messages": m * 2} for m in messages],
            ("train_sft", "test_sft"),
        ),
        "allenai/tulu-3-sft-mixture": ("default", [{"messages": m} for m in messages], ("train",)),
        "openai/gsm8k": ("main", questions, ("train", "test")),
        "trl-lib/ultrafeedback_binarized": (
            "default",
            [{"chosen": m, "rejected": m[:1] + messages[i - 1][1:]} for i, m in enumerate(messages)],
            ("train",),
        ),
    }
    for name, (config, rows, names) in splits.items():
        (tmp_path / name).mkdir(parents=True)
        for split in names:
            Dataset.from_list(rows).to_json(tmp_path / name / f"{split}.jsonl")
        files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in names)
        (tmp_path / name / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n"
        )
    Dataset.from_list(questions).to_json(tmp_path / "train.jsonl")
    ultrachat = {"dataset_name": "HuggingFaceH4/ultrachat_200k", "dataset_train_split": "train_sft"}
    recipe = {"model_name_or_path": zephyr, **ultrachat, "num_self_play_iterations": 1, "output_dir": "recipe"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_defaults(monkeypatch):
    """Scripts that make their own config get one for a tiny model."""

    def shrink(config):
        init, tiny = config.__init__, {k: v for k, v in TINY.items() if k in config.__dataclass_fields__}

        def tiny_init(self, *args, **kwargs):
            if "held_out_size" in kwargs:
                kwargs["held_out_size"] = 2
            init(self, *args, **{**kwargs, **tiny})

        monkeypatch.setattr(config, "__init__", tiny_init)

    shrink(SPINConfig)
    shrink(DPOConfig)


def flags(options):
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def run_command(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["trl-spin", *arguments, *flags(TINY)])
    main()


def iterations(directory):
    return sorted(path.name for path in Path(directory).glob("*/iteration-*") if path.parent.name != "self_play")


@pytest.mark.parametrize("code", PYTHON_BLOCKS)
def test_python_blocks(code, hub, tiny_defaults):
    make_model(make_tokenizer(ZEPHYR), hidden_size=64).save_pretrained(hub / "zephyr-7b-spin" / "iteration-3")
    make_tokenizer(ZEPHYR).save_pretrained(hub / "zephyr-7b-spin" / "iteration-3")
    if "load_game" in code:
        make_trainer(hub / "gsm8k-spin", num_self_play_iterations=1).train()
    exec(compile(code, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", sorted(COMMANDS), ids=lambda command: command[:60])
def test_commands(command, hub, monkeypatch, capsys):
    arguments = shlex.split(command)
    if arguments[0] == "export":  # of a run, whose options it does not take
        make_trainer(hub / arguments[1], num_self_play_iterations=1).train()
        monkeypatch.setattr(sys, "argv", ["trl-spin", *arguments])
        return main()
    run_command(monkeypatch, arguments + ["--held_out_size", "4"] * ("--held_out_size" in arguments))
    if arguments[0] == "probe":
        assert "SFT" in capsys.readouterr().out
    elif arguments[0] == "generate":
        assert [*hub.glob("recipe/self_play/iteration-0/*")]
    else:
        assert iterations(hub)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe, hub, monkeypatch):
    text = Path(RECIPES[recipe]).read_text()
    summary, options = text.splitlines()[0].removeprefix("# "), yaml.safe_load(text)
    assert f"  {recipe}" in trl_spin.__main__.__doc__ and summary in trl_spin.__main__.__doc__
    assert all(part in text for part in (f"--config {recipe}\n", "\n# - Memory: ", "\n# - Time: ", "measured"))
    configs = files("trl") / "accelerate_configs"
    assert all((configs / name).is_file() for name in re.findall(r"--config_file \$configs/(\S+)", text))
    # There is no vLLM here, and there are eight rows
    smaller = {name: OPTIONS[name].default for name in options if "vllm" in name}
    smaller |= {"held_out_size": 2} if "held_out_size" in options else {}
    run_command(monkeypatch, ["--config", recipe, *flags(smaller)])
    num_iterations = options["num_self_play_iterations"]
    assert iterations(hub) == [f"iteration-{t}" for t in range(num_iterations)]


@pytest.mark.parametrize("options", [[], ["--qlora"]], ids=["full", "qlora"])
def test_zephyr_script(options, hub, tiny_defaults, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["zephyr_7b.py", *options])
    runpy.run_path(str(ROOT / "examples" / "zephyr_7b.py"), run_name="__main__")
    assert iterations(hub) == ["iteration-0", "iteration-1", "iteration-2", "iteration-3"]
    weights = {p.name for p in hub.glob("*/iteration-3/*.safetensors")}
    assert weights == {"adapter_model.safetensors" if options else "model.safetensors"}


SCRIPTS = [path for path in sorted((ROOT / "examples").glob("*.py")) if "argparse" in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_name_what_they_import(path):
    """So that `uv run examples/quickstart.py` needs no environment."""
    source = path.read_text()
    (block,) = re.findall(r"^# /// script\n((?:#(?: .*)?\n)+)# ///$", source, re.M)
    header = tomllib.loads(re.sub("^# ?", "", block, flags=re.M))
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert header["requires-python"] == setup["options"]["python_requires"]
    nodes = [*ast.walk(ast.parse(source))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {name.partition(".")[0].replace("_", "-") for name in imported} - {*sys.stdlib_module_names}
    assert {Requirement(dependency).name for dependency in header["dependencies"]} == packages


def test_notebook(hub):
    """Its cells as they are, but for the installation and sizes, on a tiny model and rows of the same names."""
    notebook = nbformat.read(ROOT / "examples" / "self_play.ipynb", as_version=4)
    assert len(json.dumps(notebook)) < 150_000
    by_tag = {tag: cell for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    assert by_tag["install"].source.startswith("%pip install") and by_tag["install"] == notebook.cells[1]
    notebook.cells.remove(by_tag["install"])
    by_tag["parameters"].source += "\nnum_train, num_held_out, max_completion_length = 5, 3, 8"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(hub)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = "".join(output.get("text", "") + str(output.get("data", "")) for output in outputs)
    for text in ("the real completion", "loss 0.693", "after one iteration", "<th>before</th>", "image/png"):
        assert text in shown, text
    assert iterations(hub) == ["iteration-0"]


def test_quickstart(tmp_path, tiny_defaults, capsys):
    """`.ci/run` runs it as it is."""
    quickstart = runpy.run_path(str(ROOT / "examples" / "quickstart.py"))
    quickstart["main"](str(tmp_path), num_rows=64, num_held_out=16, num_iterations=1)
    probe, _, game = capsys.readouterr().out.partition("Self-play plan")
    assert "Self-play probe: 16 held-out prompts" in probe
    (arm,) = json.loads((tmp_path / "self_play" / "sft.json").read_text())["arms"]
    assert 0 <= arm["eval_completions/valid"] <= 1 and "SFT" in game
    assert quickstart["valid"](["abc="] * 4, ["cab", "cab", "aab", "ab"], []) == {"valid": 0.5}


def test_letters_with_two_seeds(tiny_defaults, capsys, monkeypatch):
    arguments = {"num_rows": 32, "num_held_out": 16, "num_self_play_iterations": 1}
    monkeypatch.setattr(sys, "argv", ["letters.py", *(f"--{key}={value}" for key, value in arguments.items())])
    letters = runpy.run_path(str(ROOT / "benchmarks" / "letters.py"))
    runs = [letters["run"](seed) for seed in range(2)]
    letters["print_table"](runs)
    table = capsys.readouterr().out.split("Held-out prompts, 2 runs")[1].splitlines()
    header, *lines = table[2:5]
    assert header.split() == (
        "valid NLL accuracy margin length real generated truncated identical | valid NLL".split()
    )
    for i, (title, num_cells) in enumerate({"SFT model": 4, "iteration 0": 10}.items()):
        assert lines[i].strip().startswith(title)
        cells = [tuple(map(float, cell)) for cell in re.findall(r"(-?[\d.]+) ±([\d.]+)", lines[i])]
        assert len(cells) == num_cells and 0 <= cells[0][0] <= 1
        first, second = (rows[i]["nll"] for rows in runs)
        assert cells[1] == pytest.approx(((first + second) / 2, abs(first - second) / 2), abs=6e-4)
    assert table[6].startswith("Self-play took the share of valid answers from")


def test_all_blocks_are_found():
    assert len(PYTHON_BLOCKS) >= 6 and len(COMMANDS) >= 7
    for code in BASH_BLOCKS:
        subprocess.run(["bash", "-n"], input=code, text=True, check=True)
    for _, language, code in BLOCKS:
        assert language in ("", "bash", "bibtex", "python", "text", "yaml")
        assert language != "yaml" or yaml.safe_load(code)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def anchors(path):
    """Anchors of the headings of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    others = [*ROOT.glob("*.md"), ROOT / "docs" / "llms.txt", *(ROOT / "benchmarks").rglob("README.md")]
    for page in [*PAGES, *others]:
        for path, anchor in LINK.findall(BLOCK.sub("", page.read_text())):
            target = (page.parent / path).resolve() if path else page
            assert target.exists() and ROOT in target.parents, (page.name, path)
            assert not anchor or anchor in anchors(target), (page.name, path, anchor)


def test_the_readme_is_a_page_and_the_rest_is_found():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000
    pages = {path.name for path in PAGES} - {"README.md"}
    for listing in ("docs/llms.txt", "docs/index.md", "mkdocs.yml"):
        listed = {*re.findall(r"(?<=[( ])\w+\.md", (ROOT / listing).read_text())} | {"index.md"}
        assert pages <= listed, listing
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "running.md").read_text().split("## In Python")[0], re.M)
    assert sorted(extras) == sorted(setup["options.extras_require"])


def test_the_page_of_options_is_that_of_the_config():
    page = runpy.run_path(str(ROOT / "docs" / "options.py"))["page"]()
    assert page == (ROOT / "docs" / "options.md").read_text(), "run `python docs/options.py`"
