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

"""What is shown and kept of a game while it runs, and the comparison of its iterations."""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pandas
from accelerate.logging import get_logger
from datasets import Dataset
from tqdm.auto import tqdm

from .display import show_table
from .game import HISTORY, PROBES, atomic_open, iteration_dir, read_manifest, write_json
from .model_card import iteration_rows, read_records
from .signals import judge, metric_prefix


if TYPE_CHECKING:
    from .spin_trainer import SPINTrainer

logger = get_logger(__name__)


class Watcher:
    """
    Shows the game, keeps what the report needs, and compares the iterations. Its methods that touch files run on the
    main process.

    Args:
        trainer ([`SPINTrainer`]):
            Trainer that trains the main player.
    """

    def __init__(self, trainer: "SPINTrainer"):
        self.trainer = trainer

    # ---- What is kept and shown ----

    def log_completions(self, name: str, iteration: int, pairs: Dataset):
        """All answers of an iteration as text."""
        args, decode = self.trainer.args, self._decode
        table = pandas.DataFrame(
            {
                "step": self.trainer.state.global_step,
                "iteration": iteration,
                "row": pairs["row"][:],
                "prompt": decode(pairs["prompt_ids"]),
                "real": decode(pairs["real_ids"]),
                "generated": decode(pairs["generated_ids"]),
            }
        )
        with atomic_open(Path(args.output_dir) / "completions" / f"{name}-{iteration:05d}.parquet") as file:
            table.to_parquet(file)
        for backend in {"wandb", "trackio"} & set(args.report_to):
            tracker = importlib.import_module(backend)
            tracker.log({f"completions/{name}": tracker.Table(dataframe=table)})

    def _decode(self, ids: list[list[int]]) -> list[str]:
        return self.trainer._tokenizer.batch_decode(ids[:], skip_special_tokens=True)

    def answer_metrics(self, pairs: dict[str, Dataset]) -> dict[str, float]:
        """What the user's function says of the answers to held-out prompts."""
        metrics = {}
        for name in pairs.keys() - {"train"} if self.trainer.compute_answer_metrics is not None else ():
            texts = (self._decode(pairs[name][f"{part}_ids"]) for part in ("prompt", "generated", "real"))
            for key, value in self.trainer.compute_answer_metrics(*texts).items():
                metrics[f"{metric_prefix(name)}answers/{key}"] = float(value)
        return metrics

    def probe_path(self, iteration: int) -> Path:
        """Where the answers to the fixed prompts are kept."""
        return iteration_dir(self.trainer.args.output_dir, iteration) / PROBES

    def write_probes(self, iteration: int, pairs: Dataset):
        """Keeps the answers to the fixed prompts."""
        parts = [self._decode(pairs[f"{part}_ids"]) for part in ("prompt", "real", "generated")]
        probes = [
            dict(zip(("row", "prompt", "real", "generated"), values, strict=True))
            for values in zip(pairs["row"][:], *parts, strict=True)
        ]
        write_json(self.probe_path(iteration), probes)

    def show(self, iteration: int):
        """Prints the iterations so far, and the answers to the fixed prompts side by side."""
        records = read_records(self.trainer.args.output_dir, iteration)
        if records:
            # One column per iteration: there are fewer of them than numbers
            show_table("Self-play so far", [list(row) for row in zip(*iteration_rows(records), strict=True)])
        if self.trainer.args.num_probes:
            show_table("Probes", self._probe_rows(iteration))

    def _probe_rows(self, iteration: int) -> list[list[str]]:
        models = {"start": 0} | {f"iteration {t}": t + 1 for t in range(iteration)}
        probes = {}
        for model, t in models.items():
            path = self.probe_path(t)
            if path.is_file():
                probes[model] = {probe["row"]: probe for probe in json.loads(path.read_text(encoding="utf-8"))}
        newest = list(probes.values())[-1]
        rows = [["prompt", "real answer", *probes]]
        for row, probe in newest.items():
            answers = [by_row[row]["generated"] if row in by_row else "" for by_row in probes.values()]
            rows.append([_shorten(text) for text in (probe["prompt"], probe["real"], *answers)])
        return rows

    def write_history(self):
        """Keeps what was logged so far beside the games, for the report."""
        write_json(Path(self.trainer.args.output_dir) / "self_play" / HISTORY, self.trainer.state.log_history)

    def report(self):
        """Writes the report, where matplotlib is installed. A fault in it does not undo the training."""
        if importlib.util.find_spec("matplotlib") is None:
            logger.info("No report is written: `pip install trl-spin[report]` brings what it needs.")
            return
        from .report import write_report

        try:
            path = write_report(self.trainer.args.output_dir)
        except Exception as error:
            logger.warning(
                f"The report could not be written ({type(error).__name__}: {error}). The models are intact."
            )
        else:
            tqdm.write(f"Report: {path}")

    # ---- Which iteration is the best ----

    def last_logs(self, iteration: int) -> dict[str, float]:
        """What was logged last in an iteration, of training and of evaluation."""
        first_step = self.trainer.iteration_steps[iteration]
        last_logs = {}
        for logs in self.trainer.state.log_history:
            if logs["step"] > first_step and "self_play/iteration" not in logs and "train_runtime" not in logs:
                last_logs |= {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        return last_logs

    def value(self, iteration: int, metrics: dict[str, float]) -> float | None:
        """What compares iterations, of the model of an iteration (-1: the model that self-play starts from)."""
        args = self.trainer.args
        name = args.metric_for_best_iteration
        key = name.replace("nll/real", "self_play/nll_real") if iteration == -1 else name
        if key not in metrics and (args.early_stopping or args.load_best_iteration_at_end):
            known = sorted(key.replace("self_play/nll_real", "nll/real") for key in metrics if key.startswith("eval_"))
            known = [key for key in known if key.endswith("nll/real") or "answers/" in key]
            raise ValueError(f"`metric_for_best_iteration` is {name!r}, which is not measured. There are {known}.")
        return metrics.get(key)

    def judge(self, iteration: int) -> tuple[bool, str | None]:
        """Whether an iteration that has ended is no worse than what it began with, and the verdict in words."""
        name = self.trainer.args.metric_for_best_iteration
        before = self._values(iteration - 1).get(iteration - 1)
        after = self.value(iteration, self.last_logs(iteration))
        if before is None or after is None:
            return True, None
        return judge(before, after, name, greater_is_better="answers/" in name)

    def _values(self, last: int) -> dict[int, float | None]:
        """Values of the model that self-play started from, and of the finished iterations whose folders are there."""
        output_dir = self.trainer.args.output_dir
        manifest = read_manifest(output_dir, 0)
        values = {-1: None if manifest is None else self.value(-1, manifest["metrics"])}
        return values | {r["iteration"]: self.value(r["iteration"], r) for r in read_records(output_dir, last + 1)}

    def why_stop(self, iteration: int) -> str | None:
        """Why the game should end after an iteration, if it should, as far as is known now."""
        name, logs = self.trainer.args.metric_for_best_iteration, self.last_logs(iteration)
        if name not in logs:
            return None  # this was the evaluation of another dataset
        fine, verdict = self.judge(iteration)
        if not fine:
            return f"iteration {iteration} hurt ({verdict})"
        prefix = name.removesuffix("nll/real").split("answers/")[0]
        low, high = (logs[f"{prefix}rewards/accuracies_{end}"] for end in ("low", "high"))
        if low <= 0.5:
            return (
                f"held-out real and generated answers can no longer be told apart (accuracy between {low:.3f} and "
                f"{high:.3f})"
            )
        return None

    def find_best(self, last: int) -> int:
        """
        The best iteration, -1 for the model that self-play started from. Says so if it is not the last one.

        Args:
            last (`int`):
                Last iteration that was played.

        Returns:
            `int`: Iteration; the last one if nothing was measured.
        """
        name = self.trainer.args.metric_for_best_iteration
        values = {t: value for t, value in self._values(last).items() if value is not None}
        if last not in values:
            return last
        best = (max if "answers/" in name else min)(values, key=values.get)
        if best != last:
            model = "the model that self-play started from" if best == -1 else f"iteration {best}'s"
            logger.warning(
                f"The last model is not the best one: `{name}` is {values[last]:.4g} for it, and {values[best]:.4g} for "
                f"{model}."
            )
        return best


def _shorten(text: str, width: int = 300) -> str:
    """The beginning of a text."""
    return text if len(text) <= width else text[: width - 1] + "…"
