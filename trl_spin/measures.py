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

"""What is measured: of every step, of the opponent's completions, and by a function of the user's own."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset

from .pairs import Game
from .report.signals import FILTERED, KINDS, describe_game, find_warnings, metric_prefix, proportion_interval
from .run.games import read_manifest
from .run.weights import OVERFLOW_REMEDY
from .spin_config import SPINConfig


def last_logs(log_history: list[dict[str, Any]], first_step: int) -> dict[str, float]:
    """What was logged last in the iteration that began after `first_step`, of training and of evaluation."""
    logged = {}
    for logs in log_history:
        if logs["step"] > first_step and "self_play/iteration" not in logs and "train_runtime" not in logs:
            logged |= {key: value for key, value in logs.items() if isinstance(value, (int, float))}
    return logged


def accuracy(margins: torch.Tensor) -> float:
    """
    How often a margin is positive. A tie counts one half: when an iteration starts, the model is its own opponent and
    all margins are 0, as are those of identical completions and of pairs that are not played.
    """
    return torch.heaviside(margins, margins.new_tensor(0.5)).mean().item()


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
    compute: Callable[..., dict[str, float]] | None

    def of_completions(self, pairs: dict[str, Dataset]) -> dict[str, float]:
        """What the user's function says of completions of held-out prompts."""
        metrics = {}
        for name in self.game.held_out if self.compute is not None else ():
            for key, value in self.game.ask(self.compute, name, pairs[name]).items():
                metrics[f"{metric_prefix(name)}completions/{key}"] = float(value)
        return metrics

    def of_game(
        self, output_dir: str, iteration: int, pairs: dict[str, Dataset], log_history: list[dict[str, Any]]
    ) -> tuple[dict[str, float], list[str]]:
        """Metrics of an iteration's pairs, and in words what deserves a look."""
        game, games, metrics = self.game, {}, {}
        limit, template = game.settings["sampling"]["max_completion_length"], game.rules.tokenizer.chat_template
        earlier = read_manifest(output_dir, iteration - 1) or {"metrics": {}}  # before iteration 0, there is none
        for name, dataset in pairs.items():
            prefix, newest = metric_prefix(name) + "self_play/", dataset.select(range(len(game.datasets[name])))
            described, table = describe_game(newest), newest.with_format("numpy")
            unused = () if game.pair_filter else FILTERED
            metrics |= {prefix + key: value for key, value in described.items() if key not in unused}
            flags = {kind: table[kind][:] for kind in KINDS} | {"filtered": table["weight"][:] == 0}
            metrics[f"{prefix}left_out"] = sum(game.left_out[name].values())
            lengths, (source, read_prompt) = game.datasets[name].columns.lengths("real_ids"), game.sources[name]
            games[name] = described | {
                "num_pairs": len(newest),
                "limit": limit,
                "beyond_limit": (lengths > limit).mean(),
                "fitting": math.ceil(np.quantile(lengths, 0.95)),
                "text": template is not None and isinstance(read_prompt(source[newest["row"][0]]), str),
                "unplayed": max([*flags][::-1], key=lambda kind: (flags[kind] & ~table["played"][:]).sum()),
                "nll_before": earlier["metrics"].get(f"{prefix}nll_real", math.inf),
            }
        for age in range(len(pairs["train"]) // len(game.train)):
            metrics[f"self_play/opponent_age_{age}"] = len(game.train) / len(pairs["train"])
        # The opponent's completions of held-out prompts were measured when the iteration that made it ended
        logged = last_logs(log_history, game.schedule.starts[iteration - 1]) if iteration else {}
        known = {key: value for key, value in logged.items() if "completions/" in key}
        metrics |= known or self.of_completions(pairs)
        return metrics, find_warnings(games)


class StepMonitor:
    """
    Watches the steps of training and evaluation.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
        game ([`~pairs.Game`]):
            Game.
        metrics (`dict[str, dict[str, list[float]]]`):
            DPOTrainer's metrics since the last log, by mode.
        args ([`SPINConfig`]):
            `beta` and `initial_loss_tolerance`.
        exact (`bool`):
            Whether everything is computed in float32.
    """

    def __init__(self, accelerator: Accelerator, game: Game, metrics: dict, args: SPINConfig, exact: bool):
        self.accelerator, self.game, self.metrics, self.args = accelerator, game, metrics, args
        default = 1e-3 if exact else 0.1
        self.tolerance = default if args.initial_loss_tolerance is None else args.initial_loss_tolerance
        self._margins: dict[int, float] = {}  # of the evaluation, by row
        self.margins = self._margins  # of the last one

    def step(self, mode: str, step: int, loss: torch.Tensor, logratios: tuple, inputs: dict[str, torch.Tensor]):
        """
        Takes a step into account. Raises a `ValueError` if its loss is not finite, or not ℓ(0) where it has to be.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
            step (`int`):
                Optimizer steps before this one.
            loss (`torch.Tensor`):
                Loss of the batch.
            logratios (`tuple[torch.Tensor, torch.Tensor]`):
                Log-ratios to the reference of the real and of the generated completions, of shape (batch,).
            inputs (`dict[str, torch.Tensor]`):
                Batch: `completion_mask`, 1 at tokens of completions, of shape (2 * batch, seq_len), first the real,
                then the generated ones; and, in `"eval"`, `row`, see [`~pairs.PairCollator`].
        """
        metrics = self.metrics[mode]
        num_real, num_generated = (mask.sum(dim=1) for mask in inputs["completion_mask"].chunk(2, dim=0))
        statistics = (num_real, num_generated, *logratios, loss)
        statistics = torch.stack([value.detach().to(loss.dtype).expand(len(num_real)) for value in statistics], dim=1)
        num_real, num_generated, real, generated, losses = self.accelerator.gather(statistics).unbind(dim=1)
        # DPOTrainer counts ties as wrong (trl 1.16). Before the first step, whatever margin there is is rounding
        untrained = step == self.game.schedule.starts[self.game.iteration]
        metrics["rewards/accuracies"][-1] = accuracy((real - generated) * (not untrained))
        logps = {side: metrics[f"logps/{side}"][-1] for side in ("chosen", "rejected")}
        if mode == "train" and not math.isfinite(losses.sum().item()):
            what = f"The loss of step {step + 1} (iteration {self.game.iteration}) is {losses.mean().item()}"
            why = f"mean log-probs: real {logps['chosen']:.6g}, generated {logps['rejected']:.6g}"
            raise ValueError(f"{what} ({why}). The step is not taken: what was saved is intact. {OVERFLOW_REMEDY}")
        metrics["real"].append((-logps["chosen"] * len(num_real), num_real.sum().item()))
        if mode == "eval":
            beta = self.args.per_iteration("beta")[self.game.iteration]
            # Samplers of several processes repeat rows to fill the last batch
            rows = self.accelerator.gather(inputs["row"]).tolist()
            self._margins |= dict(zip(rows, (beta * (real - generated)).tolist(), strict=True))
        elif self.game.at_start:
            metrics["self_play/initial_loss"].append(losses.mean().item())
            # Rounding errors of the tokens add up to about the square root of their number
            drift = [(r.mean() / n.mean().sqrt()).item() for r, n in ((real, num_real), (generated, num_generated))]
            self._check_start(losses.mean().item(), *drift)
            self.game.at_start = False

    def _check_start(self, loss: float, real: float, generated: float):
        if not max(abs(real), abs(generated)) <= self.tolerance:
            what = f"Iteration {self.game.iteration} does not start at its opponent, where log(p_θ/p_θt) is 0"
            what = f"{what}: over the square root of the length, it is {real:.4g} (real), {generated:.4g} (generated)"
            what = f"{what}, beyond `initial_loss_tolerance` ({self.tolerance}), and the loss is {loss:.4f}"
            raise ValueError(f"{what}. Usual causes: dropout, a `data_collator`, or a callback that changes weights.")

    def summarize(self, mode: str) -> dict[str, list[float]]:
        """What to log of the steps since the last log, which are forgotten."""
        summary = {}
        if real := self.metrics[mode].pop("real", None):
            nll, num_tokens = map(sum, zip(*real, strict=True))
            summary["nll/real"] = [nll / num_tokens]
        if mode == "eval" and self._margins:
            # 95% intervals: an accuracy on few prompts says little
            margins = torch.tensor([*self._margins.values()])
            ends = proportion_interval(accuracy(margins), len(margins))
            radius = 1.96 * margins.std().item() / math.sqrt(len(margins)) if len(margins) > 1 else math.inf
            ends += (margins.mean().item() - radius, margins.mean().item() + radius)
            names = [f"rewards/{metric}_{end}" for metric in ("accuracies", "margins") for end in ("low", "high")]
            summary |= {name: [end] for name, end in zip(names, ends, strict=True)}
            self.margins, self._margins = self._margins, {}
        return summary
