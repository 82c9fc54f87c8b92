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

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "lm-eval[hf]",
#     "tqdm",
#     "trl-spin",
# ]
# ///

"""
The model of each iteration on tasks of lm-evaluation-harness, in one table. The default tasks are those of the SPIN
paper: the first Open LLM Leaderboard, with its numbers of shots. The harness has changed since the leaderboard was
closed, so compare the rows of this table with each other, not with numbers from elsewhere.

    pip install trl-spin[eval]
    python examples/evaluate.py OUTPUT_DIR [--tasks TASK ...]
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm.auto import tqdm

from trl_spin.run.files import MANIFEST, game_dir, read_json


# Names as of lm-evaluation-harness 0.4, and numbers of shots
LEADERBOARD = {"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5}


def find_models(output_dir: Path, base_model: str | None) -> dict[str, dict[str, str]]:
    """What the harness needs to load the model of each row: first the one that self-play started from."""
    directories = sorted(output_dir.glob("iteration-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if not directories:
        raise FileNotFoundError(f"{output_dir} holds no `iteration-*`: it is not the `output_dir` of a run.")
    manifest = read_json(game_dir(output_dir, 0) / MANIFEST)
    models = {"start": {"pretrained": base_model or manifest["opponent"]["model"]}}
    for directory in directories:
        path = str(directory)
        is_adapter = (directory / "adapter_config.json").is_file()
        own = {"peft": path, "tokenizer": path} if is_adapter else {"pretrained": path}
        models[directory.name] = models["start"] | own
    return models


def make_table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown table: a row per model, a column per task, and their average."""
    lines = []
    for model, outputs in results.items():
        cells, values = {}, []
        for task, output in outputs.items():
            metrics = output["results"][task]
            # As the leaderboard chose: normalized, where a task has such a metric, otherwise its first
            names = [name for name in metrics if "," in name and "_stderr," not in name]
            name = min(names, key=lambda name: not name.startswith("acc_norm,"))
            values.append(100 * metrics[name])
            stderr = metrics.get(name.replace(",", "_stderr,"))
            error = f" ± {100 * stderr:.2f}" if isinstance(stderr, float) else ""
            # A group such as mmlu has the shots of its members
            title = f"{task} ({max(output['n-shot'].values())}-shot {name.removesuffix(',none')})"
            cells[title] = f"{values[-1]:.2f}{error}"
        lines = lines or [["model", *cells, "average"], ["---", *["---:"] * (len(cells) + 1)]]
        lines.append([model, *cells.values(), f"{sum(values) / len(values):.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="Output directory of a run: its `iteration-*` are evaluated.")
    parser.add_argument("--base_model", help="Model of the first row. Default: the one that self-play started from.")
    parser.add_argument("--tasks", nargs="+", default=list(LEADERBOARD), metavar="TASK", help="Tasks of the harness.")
    parser.add_argument("--num_fewshot", type=int, help="Number of shots. Default: the leaderboard's, or the task's.")
    parser.add_argument("--apply_chat_template", action="store_true", help="Whether tasks are posed as conversations.")
    parser.add_argument("--include_path", help="Folder of tasks of your own, in YAML.")
    parser.add_argument("--limit", type=float, help="Number of rows per task, or share of them, for a quick look.")
    parser.add_argument("--batch_size", default="auto", help="Batch size, or `auto`.")
    parser.add_argument("--device", help="For example `cuda:0` or `cpu`. Default: the harness chooses.")
    parser.add_argument("--dtype", default="auto", help="For example `bfloat16`. Default: as saved.")
    options = parser.parse_args()
    models, results = find_models(options.output_dir, options.base_model), {}
    shots = LEADERBOARD if options.num_fewshot is None else dict.fromkeys(options.tasks, options.num_fewshot)
    same = {"limit": options.limit, "apply_chat_template": options.apply_chat_template, "log_samples": False}
    same["task_manager"] = TaskManager(include_path=options.include_path)
    for name, model in models.items():
        tqdm.write(f"{name}: {model}")
        lm = HFLM(**model, batch_size=options.batch_size, device=options.device, dtype=options.dtype)
        # The harness takes one number of shots for all tasks
        evaluate = partial(simple_evaluate, lm, **same)
        results[name] = {task: evaluate(tasks=[task], num_fewshot=shots.get(task)) for task in options.tasks}
        (options.output_dir / "evaluation.json").write_text(json.dumps(results, indent=2, default=str))
        (options.output_dir / "evaluation.md").write_text(make_table(results) + "\n")
    tqdm.write(make_table(results))


if __name__ == "__main__":
    main()
