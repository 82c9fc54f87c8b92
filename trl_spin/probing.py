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

"""`trl-spin probe`: before any training, from some hundred completions, whether self-play is worth it."""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tqdm.auto import tqdm

from .generation import row_seed, weigh
from .memory import DEFAULT_BUDGET
from .pairs import Columns, as_preference
from .report.signals import proportion_interval, repetition
from .report.tables import render
from .shared_prefix_trainer import SharedPrefixDPOTrainer


_MOST_GROUPS, _MOST_COORDINATES, _FOLDS, _HASHES = 16, 2**20, 5, 16
SHORTCUTS = ("length", "repetition", "ending", *["first token"] * _HASHES)


class Sketch:
    """
    Gradients at a fixed random choice of the trained weights, scaled so that inner products of sketches are unbiased
    estimates of those of gradients, however many weights there are.
    """

    def __init__(self, model: torch.nn.Module, size: int = _MOST_COORDINATES):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ends = np.cumsum([parameter.numel() for parameter in self.parameters])
        chosen = np.random.default_rng(0).choice(ends[-1], min(size, ends[-1]), replace=False, shuffle=False)
        chosen.sort()
        self.scale = math.sqrt(ends[-1] / len(chosen))
        parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
        self.indices = [torch.from_numpy(part - start) for part, start in zip(parts, [0, *ends], strict=False)]

    def __call__(self, loss: torch.Tensor) -> torch.Tensor:
        gradients = torch.autograd.grad(loss, self.parameters, retain_graph=True, materialize_grads=True)
        found = zip(gradients, self.indices, strict=True)
        return self.scale * torch.cat([g.flatten()[index.to(g.device)].float().cpu() for g, index in found])


def inner_product(a: torch.Tensor, b: torch.Tensor, paired: bool = False) -> tuple[float, float]:
    """
    Inner product of the means of two samples of vectors, and its standard error by the jackknife over both. Where
    vector i of both comes from the same rows (`paired`), their product is left out, so that noise adds nothing.
    """
    kept = 1 - torch.eye(len(a), dtype=torch.float64) if paired else torch.ones(len(a), len(b), dtype=torch.float64)
    products = (a @ b.T).double() * kept
    sums, counts = ([x.sum(dim=1), x.sum(dim=0)] for x in (products, kept))
    if paired:
        sums, counts = [sums[0] + sums[1]], [counts[0] + counts[1]]
    without = [(products.sum() - s) / (kept.sum() - n) for s, n in zip(sums, counts, strict=True)]
    variance = sum((len(w) - 1) * w.var(correction=0) for w in without)
    return (products.sum() / kept.sum()).item(), math.sqrt(variance)


def compare(a: torch.Tensor, b: torch.Tensor, paired: bool = False) -> dict[str, float]:
    """By how many standard errors the inner product of two mean gradients differs from 0, and their cosine."""
    (mean, error), norms = inner_product(a, b, paired), [inner_product(x, x, paired=True)[0] for x in (a, b)]
    # Without what noise adds to the norms, which may leave nothing
    cosine = max(-1.0, min(1.0, mean / math.sqrt(norms[0] * norms[1]))) if min(norms) > 0 else math.nan
    return {"z": mean / max(error, 1e-30), "cosine": cosine}


def noise_scale(groups: torch.Tensor, size: int) -> float:
    """Batch size at which noise equals signal, tr Σ / |G|², from the mean gradients of groups of `size` examples."""
    signal, _ = inner_product(groups, groups, paired=True)
    spread = size * (groups.square().sum(dim=1).mean().item() - signal)
    return spread / signal if signal > 0 else math.inf


def tell_apart(real: torch.Tensor, generated: torch.Tensor) -> tuple[float, float, float]:
    """
    Cross-validated accuracy of a linear classifier of features, with its 95% interval: ridge regression on the side,
    with a Gaussian prior on the weights under which the prediction has the variance of the noise. Both sides of a pair
    are in one fold.
    """
    x, y = torch.cat([real, generated]).double(), torch.tensor([-1.0, 1.0]).repeat_interleave(len(real)).double()
    fold, right = torch.arange(len(real)).repeat(2) % _FOLDS, 0
    for test in (fold == held_out for held_out in range(_FOLDS)):
        z = (x - x[~test].mean(dim=0)) / (x[~test].std(dim=0) + 1e-6)
        kernel = z @ z[~test].T / x.size(1)  # in as many dimensions as there are completions
        dual = torch.linalg.solve(kernel[~test] + torch.eye(kernel.size(1)), y[~test])
        right += (kernel[test] @ dual * y[test] > 0).sum().item()
    return right / len(y), *proportion_interval(right / len(y), len(y))


def shortcuts(ids: list[int], end_token_ids: list[int]) -> list[float]:
    """What tells completions apart without reading them, see `SHORTCUTS`."""
    first = [float(token % _HASHES == i) for i in range(_HASHES) for token in ids[:1] or [-1]]
    return [len(ids), repetition(ids), float(bool({*ids[-1:]} & {*end_token_ids})), *first]


def measure(trainer: SharedPrefixDPOTrainer, sketch: Sketch, pairs: list[dict], num_groups: int) -> dict[str, Any]:
    """
    Sketches of gradients, each the mean over a group of `size` pairs: of the NLL of the `real` completions, and of the
    `game`, where pairs are played. Then the `nll` per token of all these real completions, and the mean last hidden
    state over each completion, `hidden`, by side.
    """
    model, beta, batch_size = trainer.model, trainer.args.per_iteration("beta")[0], trainer.args.train_batch_size
    base_model = model.get_base_model() if isinstance(model, PeftModel) else model
    size, groups, hidden, nll, num_tokens = len(pairs) // num_groups, [], [], 0.0, 0
    for start in tqdm(range(0, size * num_groups, size), desc="Gradients", leave=False):
        group, sketches = pairs[start : start + size], 0
        for batch in (group[first : first + batch_size] for first in range(0, size, batch_size)):
            inputs = trainer._prepare_inputs(trainer.data_collator(list(map(as_preference, batch))))
            with trainer.accelerator.autocast():
                real, generated = trainer.token_logps(model, inputs).sum(dim=1).chunk(2)
                with torch.no_grad():
                    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
                    states = base_model.base_model(**ids).last_hidden_state.float()
            mask = inputs["completion_mask"][..., None]
            hidden.append(((states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).unflatten(0, (2, -1)).cpu())
            nll, num_tokens = nll - real.sum().item(), num_tokens + mask.chunk(2)[0].sum().item()
            # At its start, the slope of the logistic loss is one half
            weights = real.new_tensor([beta / 2 * pair["played"] * pair["weight"] for pair in batch])
            losses = [-real.sum() / size] + [(weights * (generated - real)).sum() / size] * pairs[0]["played"]
            sketches = sketches + torch.stack(list(map(sketch, losses)))
        groups.append(sketches)
    real, game = torch.stack(groups, dim=1)[[0, -1]]
    return {"real": real, "game": game, "nll": nll / num_tokens, "hidden": torch.cat(hidden, dim=1), "size": size}


def probe(trainer: SharedPrefixDPOTrainer, num_prompts: int = 300) -> dict[str, Any]:
    """
    Says before any training, from completions of held-out prompts, whether self-play is worth it: prints a table and a
    verdict with the setting to try, or the advice not to play.

    Args:
        trainer ([`SPINTrainer`]):
            Trainer before training. Its model stays as it is, and nothing is written.
        num_prompts (`int`, *optional*, defaults to `300`):
            Number of prompts to complete, held out if there are any, and of training rows to compare them with.

    Returns:
        `dict[str, Any]`: The numbers of the table, by name, and the `verdict` in words.

    Raises:
        `ValueError`: If there are several processes, or fewer than 4 rows on either side.
    """
    args, game, watched, engine = trainer.args, trainer.game, trainer.game.watched, trainer.self_play.engine
    if args.world_size > 1:
        raise ValueError(f"`probe` needs one process, and there are {args.world_size}: start it without a launcher.")
    # Without held-out rows, one half of the training rows takes their place
    chosen, others = (np.random.default_rng(args.seed).permutation(len(d.all_rows)) for d in (watched, game.train))
    chosen = chosen[: num_prompts if game.held_out else min(num_prompts, len(chosen) // 2)]
    others = others[::-1][: len(chosen)]
    num_groups = len(others) // math.ceil(len(others) / _MOST_GROUPS)
    if num_groups < 4:
        raise ValueError(f"`probe` needs 4 prompts and 4 training rows, and has {len(chosen)} and {len(others)}.")
    rows, real = Columns(watched.all_rows.select(chosen)), Columns(game.train.all_rows.select(others))
    engine.token_budget = args.generation_token_budget or DEFAULT_BUDGET
    with engine.open(trainer.model_wrapped) as generate:
        given = rows, partial(row_seed, args.seed, 0, f"{watched.name} probe"), args.max_completion_length
        completions = engine.complete(generate, *given, args.temperature, "Completing prompts").to_pylist()
    pairs = [game.rules.make_pair(*row, 0, held_out=True) for row in zip(rows, completions, strict=True)]
    for pair, weight in zip(pairs, weigh(game, watched.name, pairs), strict=True):
        pair["weight"] = weight
    real_only = [row | {"played": False, "weight": 0.0, "ref_real_logps": 0.0} for row in real]
    kept = sum(pair["weight"] > 0 for pair in pairs) / len(pairs)

    training, sketch = trainer.model.training, Sketch(trainer.model)
    trainer.model.eval()
    train, held = (measure(trainer, sketch, part, num_groups) for part in (real_only, pairs))
    trainer.model.train(training)
    sides, ends = ("real", "generated"), game.rules.end_token_ids
    features = [torch.tensor([shortcuts(pair[f"{side}_ids"], ends) for pair in pairs]) for side in sides]
    means = torch.stack([side.mean(dim=0) for side in features])
    distances = (means[1] - means[0]) / (torch.cat(features).std(dim=0) + 1e-6)
    strongest = int(distances.abs().argmax())
    found = {
        "num_prompts": len(pairs),
        "held_out": bool(game.held_out),
        "nll": {"train": train["nll"], "held_out": held["nll"]},
        "sft": compare(train["real"], held["real"]),
        "game": compare(held["game"], held["real"], paired=True),
        "noise_scale": noise_scale(held["game"], held["size"]),
        "batch": args.train_batch_size * args.gradient_accumulation_steps,
        "by_shortcuts": tell_apart(*features),
        "by_content": tell_apart(*held["hidden"]),
        "shortcut": {"name": SHORTCUTS[strongest], "distance": distances[strongest].item()},
        **{name: dict(zip(sides, means[:, i].tolist(), strict=True)) for i, name in enumerate(SHORTCUTS[:3])},
        "kept": (kept, *proportion_interval(kept, len(pairs))) if game.pair_filter else None,
    }
    facts = {"args": args, "beta": args.per_iteration("beta")[0], "pairs": len(game.train)}
    text = render("probe.txt.jinja", **found, **facts)
    tqdm.write(text)
    return found | {"verdict": text.partition("Verdict\n")[2]}
