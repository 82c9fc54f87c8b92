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

"""What is measured of the opponent's completions: of all when a game is stored, and by a function of the user's own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from .pairs import Game
from .report.signals import describe_game, find_warnings, metric_prefix
from .run.games import read_manifest


def last_logs(log_history: list[dict[str, Any]], first_step: int) -> dict[str, float]:
    """What was logged last in the iteration that began after `first_step`, of training and of evaluation."""
    logged = {}
    for logs in log_history:
        if logs["step"] > first_step and "self_play/iteration" not in logs and "train_runtime" not in logs:
            logged |= {key: value for key, value in logs.items() if isinstance(value, (int, float))}
    return logged


@dataclass(frozen=True)
class Measures:
    """
    Metrics and warnings of the pairs of an iteration.

    Args:
        game ([`~pairs.Game`]):
            Game.
        compute (`Callable`, *optional*):
            See `compute_completion_metrics` in [`SPINTrainer`].
    """

    game: Game
    compute: Callable[[list[str], list[str], list[str]], dict[str, float]] | None

    def of_completions(self, pairs: dict[str, Dataset]) -> dict[str, float]:
        """What the user's function says of completions of held-out prompts."""
        metrics = {}
        for name in self.game.held_out if self.compute is not None else ():
            texts = (self.game.rules.decode(pairs[name][f"{part}_ids"]) for part in ("prompt", "generated", "real"))
            for key, value in self.compute(*texts).items():
                metrics[f"{metric_prefix(name)}completions/{key}"] = float(value)
        return metrics

    def of_game(
        self, output_dir: str, iteration: int, pairs: dict[str, Dataset], log_history: list[dict[str, Any]]
    ) -> tuple[dict[str, float], list[str]]:
        """Metrics of an iteration's pairs, and in words what deserves a look."""
        game, described, metrics = self.game, {}, {}
        for name, dataset in pairs.items():
            prefix = metric_prefix(name) + "self_play/"
            described[name] = describe_game(dataset.select(range(len(game.datasets[name]))))  # the newest opponent's
            metrics |= {prefix + key: value for key, value in described[name].items()}
            metrics[f"{prefix}left_out"] = sum(game.left_out[name].values())
        for age in range(len(pairs["train"]) // len(game.train)):
            metrics[f"self_play/opponent_age_{age}"] = len(game.train) / len(pairs["train"])
        # The opponent's completions of held-out prompts were measured when the iteration that made it ended
        logged = last_logs(log_history, game.schedule.starts[iteration - 1]) if iteration else {}
        known = {key: value for key, value in logged.items() if "completions/" in key}
        metrics |= known or self.of_completions(pairs)
        prefix = metric_prefix(game.watched.name) + "self_play/"
        earlier = read_manifest(output_dir, iteration - 1) if iteration else None
        if earlier is not None:
            earlier = {key.removeprefix(prefix): value for key, value in earlier["metrics"].items()}
        return metrics, find_warnings(described[game.watched.name], earlier)
