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

"""What is shown of a game while it is played, and kept for its report. One callback for each."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pandas
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from trl import DPOTrainer

from .engines import Engine
from .generation import row_seed
from .pairs import Columns, Game
from .report.signals import metric_prefix
from .report.tables import log_line, show_table
from .run.files import EXAMPLES, HISTORY, PROBES, game_dir, read_intact, write_json
from .run.logs import logger
from .run.processes import Processes
from .spin_config import SPINConfig


# Newest models that a terminal has room for
_NEWEST = 4


class ExamplesCallback(TrainerCallback):
    """
    Keeps the held-out pairs with the largest and the smallest margins of the model that an iteration made, which it
    tells apart best and worst, and random ones for the blind game.
    """

    def __init__(self, trainer: DPOTrainer, game: Game, processes: Processes):
        self.trainer, self.game, self.processes = trainer, game, processes

    def on_evaluate(self, args: SPINConfig, state: TrainerState, control: TrainerControl, metrics: dict, **kwargs):
        iteration, prefix = self.game.schedule.ended(state.global_step), metric_prefix(self.game.watched.name)
        if self.trainer.is_in_train and iteration is not None and f"{prefix}loss" in metrics:
            path = game_dir(args.output_dir, iteration) / EXAMPLES
            self.processes.write(args.output_dir, self._write, path, self.trainer.monitor.margins, Random(args.seed))

    def _write(self, path: Path, margins: dict[int, float], random: Random):
        ranked, pairs = sorted(margins, key=margins.get, reverse=True), self.game.watched.pairs[0]
        (data, read_prompt), rows = self.game.sources[self.game.watched.name], pairs["row"][:]

        def describe(row: int) -> dict[str, Any]:
            pair, prompt = pairs[rows.index(row)], _last_turn(read_prompt(data[row]))
            texts = map(_shorten, (prompt, *self.game.rules.decode([pair["real_ids"], pair["generated_ids"]])))
            names = ("row", "margin", "real_first", "prompt", "real", "generated")
            return dict(zip(names, (row, margins[row], random.random() < 0.5, *texts), strict=True))

        blind = random.sample(sorted(margins), min(16, len(margins)))
        chosen = {"examples": ranked[:5] + ranked[5:][-5:], "blind": blind}
        write_json(path, {name: list(map(describe, of_name)) for name, of_name in chosen.items()})


class ProbeCallback(TrainerCallback):
    """
    Lets each model complete a few fixed prompts, and shows them below the earlier ones' completions and a table of the
    models so far. The seeds are the same in every iteration, so that only the model differs.
    """

    def __init__(self, trainer: DPOTrainer, game: Game, processes: Processes, engine: Engine, table: Callable):
        self.trainer, self.game, self.processes, self.engine = trainer, game, processes, engine
        self.table = table  # of the models up to that of an iteration

    def on_epoch_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if self.game.schedule.begins(state.global_step):
            # Of many short iterations, some ten times are shown
            every = max(1, args.num_self_play_iterations // 10)
            self.probe(args, self.game.iteration, show=self.game.iteration % every == 0)

    def on_train_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        last = self.game.schedule.ended(state.global_step)
        if last is not None and not self.processes.stop.signum:
            self.probe(args, last + 1, show=True)

    def probe(self, args: SPINConfig, iteration: int, show: bool):
        """Probes the model that an iteration begins with."""
        path = game_dir(args.output_dir, iteration) / PROBES
        if args.num_probes and not self.processes.on_main(read_intact, path, "The prompts are probed again."):
            dataset = self.game.watched
            rows = dataset.all_rows.select(range(min(args.num_probes, len(dataset))))
            seed_of = partial(row_seed, args.seed, -1, f"{dataset.name} probes")
            with self.engine.open(self.trainer.model_wrapped) as generate:
                given = Columns(rows), seed_of, args.max_completion_length, args.temperature_of("probes"), "Probes"
                completions = self.engine.complete(generate, *given).to_pydict()
            data, read_prompt = self.game.sources[dataset.name]
            probes = pandas.DataFrame({"row": rows["row"][:], "truncated": completions["truncated"]})
            probes["prompt"] = [_last_turn(read_prompt(data[row])) for row in rows["row"][:]]
            ids = rows["real_ids"], completions["generated_ids"]
            probes["real"], probes["generated"] = map(self.game.rules.decode, ids)
            self.processes.write(args.output_dir, write_json, path, {"probes": probes.to_dict("records")})
        if show and self.trainer.is_world_process_zero():
            self._show(args, iteration)

    def _show(self, args: SPINConfig, iteration: int):
        if iteration:
            # One column per model, if there are not too many: the first, the best and the newest
            titles, start, *models = self.table(iteration - 1)
            models[:-_NEWEST] = [model for model in models[:-_NEWEST] if "best" in model[0]]
            columns = [list(column) for column in zip(titles, start, *models, strict=True)]
            show_table("Self-play so far", columns, justify="right")
        if not args.num_probes:
            return
        models = {"start": 0} | {f"iteration {t}": t + 1 for t in range(max(0, iteration - _NEWEST), iteration)}
        probes = {m: read_intact(game_dir(args.output_dir, t) / PROBES, "Not shown.") for m, t in models.items()}
        probes = {model: {p["row"]: p for p in found["probes"]} for model, found in probes.items() if found}
        for row, newest in list(probes.values())[-1].items():
            shown, before = [["prompt", _shorten(newest["prompt"])], ["real", _shorten(newest["real"])]], None
            for model, probe in ((model, by_row[row]) for model, by_row in probes.items() if row in by_row):
                text = (_shorten(probe["generated"].strip()) or "(empty)") + " (cut)" * probe.get("truncated", False)
                shown.append([model, "(unchanged)" if probe["generated"] == before else text])
                before = probe["generated"]
            show_table(f"Probe, row {row} of the {self.game.watched.name} dataset", shown)


class LineCallback(PrinterCallback):
    """
    Shows what is logged as a line of the numbers to watch, in place of transformers' callback that prints all of them.
    Trackers and the `log_history` get all.
    """

    def __init__(self, game: Game):
        super().__init__()
        self.game = game

    def on_log(self, args: SPINConfig, state: TrainerState, control: TrainerControl, logs: dict, **kwargs):
        if state.is_world_process_zero and "self_play/best_iteration" not in logs:  # which the end of the run says
            num_prompts = sum(map(len, self.game.datasets.values()))
            tqdm.write(log_line(logs, game=self.game, state=state, num_prompts=num_prompts))


class BarCallback(LineCallback, ProgressCallback):
    """Shows, below these lines, a bar of the training steps. Its clock stops while the opponent plays."""

    def on_epoch_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if state.is_world_process_zero and not self.training_bar.disable:  # as TQDM_DISABLE does
            bar = self.training_bar
            # The steps before a resume took no time
            bar.initial += state.global_step - self.current_step
            bar.n = bar.last_print_n = self.current_step = state.global_step
            bar.unpause()
            bar.set_description(f"Iteration {self.game.iteration}")


class ReportCallback(TrainerCallback):
    """Keeps what was logged beside the games, and writes the report at the end, where matplotlib is installed."""

    def __init__(self, game: Game, processes: Processes):
        self.game, self.processes = game, processes

    def on_save(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        history = Path(args.output_dir) / "self_play" / HISTORY
        self.processes.write(args.output_dir, write_json, history, state.log_history)

    def on_train_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if self.game.schedule.ended(state.global_step) is not None:
            self.on_save(args, state, control)
            if args.write_report:
                self.processes.on_main(self._report, args.output_dir)

    def _report(self, output_dir: str):
        from .report.page import write_report

        try:
            write_report(output_dir)
        except ModuleNotFoundError as error:
            logger.info(f"No report was written. {error}")
        except Exception as error:  # a fault of the report does not undo the training
            logger.warning(f"The report could not be written: {type(error).__name__}: {error}. The models are intact.")


def _last_turn(prompt: str | list[dict]) -> str:
    """What a prompt asks: its text, or that of the user's last turn."""
    if isinstance(prompt, str):
        return prompt
    content = next((turn for turn in reversed(prompt) if turn["role"] == "user"), prompt[-1])["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _shorten(text: str, width: int = 300) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
