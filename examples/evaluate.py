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
Evaluates the model of each iteration with lm-evaluation-harness and writes one table. The default tasks are those of
the SPIN paper: the first Open LLM Leaderboard, with its numbers of shots.

```bash
pip install "trl-spin[eval]"
python examples/evaluate.py zephyr-7b-spin --base_model alignment-handbook/zephyr-7b-sft-full --dtype bfloat16
python examples/evaluate.py run --tasks my_task --include_path folder_of_my_task --limit 100
```

The table goes to `evaluation.md` in the run's directory; standard errors, all metrics and the versions of the tasks
and of the harness go to `evaluation.json`. Both are rewritten after each model. The harness has changed since the
leaderboard was closed, so compare the rows of this table with each other, not with numbers from elsewhere.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


# Task: number of shots, metric. Names as of lm-evaluation-harness 0.4
LEADERBOARD = {
    "arc_challenge": (25, "acc_norm,none"),
    "hellaswag": (10, "acc_norm,none"),
    "truthfulqa_mc2": (0, "acc,none"),
    "mmlu": (5, "acc,none"),
    "winogrande": (5, "acc,none"),
    "gsm8k": (5, "exact_match,strict-match"),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="Output directory of a run: its `iteration-*` are evaluated.")
    parser.add_argument("--base_model", help="Model that self-play started from, for the first row of the table.")
    parser.add_argument("--tasks", nargs="+", default=list(LEADERBOARD), help="Tasks of the harness.")
    parser.add_argument(
        "--num_fewshot",
        type=int,
        help="Number of shots, for all tasks. Default: the leaderboard's, or the task's own.",
    )
    parser.add_argument("--include_path", help="Folder of tasks of your own, in YAML.")
    parser.add_argument("--limit", type=float, help="Number of rows per task, or share of them, for a quick look.")
    parser.add_argument("--batch_size", default="auto", help="Batch size, or `auto`.")
    parser.add_argument("--device", help="For example `cuda:0` or `cpu`. Default: the harness chooses.")
    parser.add_argument("--dtype", default="auto", help="For example `bfloat16`. Default: as saved.")
    return parser.parse_args()


def find_models(output_dir: Path, base_model: str | None) -> dict[str, dict[str, str]]:
    """What the harness needs to load the model of each row."""
    models = {"start": {"pretrained": base_model}} if base_model else {}
    for directory in sorted(output_dir.glob("iteration-*"), key=lambda path: int(path.name.rpartition("-")[2])):
        path, adapter = str(directory), directory / "adapter_config.json"
        if adapter.is_file():
            base = base_model or json.loads(adapter.read_text())["base_model_name_or_path"]
            models[directory.name] = {"pretrained": base, "peft": path, "tokenizer": path}
        else:
            models[directory.name] = {"pretrained": path}
    if not models:
        raise SystemExit(f"{output_dir} holds no `iteration-*`, and no --base_model was given.")
    return models


def evaluate(model: dict[str, str], options: argparse.Namespace, task_manager: TaskManager) -> dict[str, Any]:
    """Results of one model by task. The tasks differ in their numbers of shots, so each is a run of its own."""
    lm = HFLM(**model, batch_size=options.batch_size, device=options.device, dtype=options.dtype)
    results = {}
    for task in options.tasks:
        num_fewshot = options.num_fewshot
        if num_fewshot is None and task in LEADERBOARD:
            num_fewshot = LEADERBOARD[task][0]
        output = simple_evaluate(
            lm,
            tasks=[task],
            num_fewshot=num_fewshot,
            limit=options.limit,
            task_manager=task_manager,
            log_samples=False,
        )
        metrics = {key: value for key, value in output["results"][task].items() if isinstance(value, (int, float))}
        # A group such as mmlu has no number of shots of its own, its members do
        shots = set(output["n-shot"].values())
        results[task] = {
            "metrics": metrics,
            "num_fewshot": max(shots, default=num_fewshot),
            "version": output["versions"].get(task),
        }
    return results


def metric_of(task: str, metrics: dict[str, float]) -> str:
    """The leaderboard's metric, or the first one of another task."""
    if task in LEADERBOARD:
        return LEADERBOARD[task][1]
    return next(key for key in metrics if "," in key and "_stderr," not in key)


def make_table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown table: a row per model, a column per task, and their average."""
    tasks = next(iter(results.values()))
    metrics = {task: metric_of(task, result["metrics"]) for task, result in tasks.items()}
    titles = [f"{task} ({tasks[task]['num_fewshot']}-shot {metrics[task].removesuffix(',none')})" for task in tasks]
    lines = [["model", *titles, "average"], ["---", *["---:"] * (len(tasks) + 1)]]
    for model, by_task in results.items():
        values = [by_task[task]["metrics"][metric] for task, metric in metrics.items()]
        cells = []
        for (task, metric), value in zip(metrics.items(), values, strict=True):
            stderr = by_task[task]["metrics"].get(metric.replace(",", "_stderr,"))
            cells.append(f"{100 * value:.2f}" + (f" ± {100 * stderr:.2f}" if stderr is not None else ""))
        lines.append([model, *cells, f"{100 * sum(values) / len(values):.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    options = parse_arguments()
    models = find_models(options.output_dir, options.base_model)
    task_manager = TaskManager(include_path=options.include_path)
    results = {}
    for name, model in models.items():
        print(f"{name}: {model}", flush=True)
        results[name] = evaluate(model, options, task_manager)
        content = {"lm_eval": version("lm_eval"), "limit": options.limit, "models": models, "results": results}
        (options.output_dir / "evaluation.json").write_text(json.dumps(content, indent=2))
        (options.output_dir / "evaluation.md").write_text(make_table(results) + "\n")
    print(make_table(results))


if __name__ == "__main__":
    main()
