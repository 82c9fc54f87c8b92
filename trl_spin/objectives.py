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

r"""
The objectives of the game, each registered under its name in `loss_type`.

An objective is a function of the two log-ratios r = log p_θ(y|x)/p_ref(y|x) of a real completion y and
r' = log p_θ(y'|x)/p_ref(y'|x) of a generated completion y', summed over tokens and unscaled, and of λ (`beta`). The
tensors have the shape (batch,), and so has the result. Where an iteration starts, p_θ is the reference, and a loss is
ℓ(0), the function's value at two zeros.

A name that [`~trl.DPOTrainer`] has as well (`"sigmoid"`, `"hinge"`) means the same here and there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Objective:
    """
    A loss of the two log-ratios.

    Args:
        loss (`Callable[..., torch.Tensor]`):
            Function of the log-ratios of the real completions, those of the generated completions, λ, and the
            arguments in `options`. It returns the loss of each pair.
        of_margin (`bool`, *optional*, defaults to `False`):
            Whether the loss depends on a pair through r - r' alone. A pair of identical completions then has zero
            gradient, and need not be computed.
        options (`dict[str, str]`, *optional*, defaults to `{}`):
            Further arguments of the function, each with the option of [`SPINConfig`] that sets it.
    """

    loss: Callable[..., torch.Tensor]
    of_margin: bool = False
    options: dict[str, str] = field(default_factory=dict)

    def with_options(self, args: Any) -> "Objective":
        """The objective with its options as they are set."""
        values = {argument: getattr(args, option) for argument, option in self.options.items()}
        return replace(self, loss=partial(self.loss, **values))


# By name in `loss_type`
OBJECTIVES: dict[str, Objective] = {}

# The losses that DPOTrainer computes (trl 1.16), each with the options of `DPOConfig` that not all losses share.
# "sigmoid" and "hinge" are in OBJECTIVES as well, which says that they are losses of the margin.
TRL_LOSSES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"), ()),
    **dict.fromkeys(("sft", "sigmoid_norm"), ()),
    **dict.fromkeys(("robust", "exo_pair", "aot", "aot_unpaired"), ("label_smoothing",)),
    "discopop": ("discopop_tau",),
}


def objective(name: str, of_margin: bool = False, **options: str) -> Callable[[Callable], Callable]:
    """
    Decorator that registers a function as an objective and returns it as it is. A name that [`~trl.DPOTrainer`] has as
    well is only for what means the same: the loss is then computed there.

    Args:
        name (`str`):
            Its name in `loss_type`.
        of_margin (`bool`, *optional*, defaults to `False`):
            Whether the loss depends on a pair through r - r' alone.
        **options (`str`):
            Further arguments of the function, each with the option of [`SPINConfig`] that sets it, such as
            `mu="space_mu"`.
    """

    def register(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        if name in OBJECTIVES:
            raise ValueError(f"There is an objective {name!r} already. Register yours under another name.")
        OBJECTIVES[name] = Objective(loss, of_margin, options)
        return loss

    return register


def check_objectives(loss_types: list[str], changed: dict[str, Any]):
    """
    Refuse losses that do not exist, and options that do nothing for the losses that were chosen.

    Args:
        loss_types (`list[str]`):
            Names of the chosen losses.
        changed (`dict[str, Any]`):
            Options that differ from their default, with their values. Those that belong to no loss in particular are
            not looked at.
    """
    options = TRL_LOSSES | {name: (*o.options.values(), *TRL_LOSSES.get(name, ())) for name, o in OBJECTIVES.items()}
    unknown = sorted(set(loss_types) - options.keys())
    if unknown:
        known = f"{sorted(OBJECTIVES)}, and of `DPOTrainer` {sorted(TRL_LOSSES.keys() - OBJECTIVES.keys())}"
        raise ValueError(f"`loss_type` {unknown[0]!r} is unknown. Self-play has {known}.")
    # An option that does nothing for the chosen losses would be taken for one that does
    for option, value in changed.items():
        owners = {name for name in options if option in options[name]}
        if owners and not owners & set(loss_types):
            what = f"`{option}={value!r}` does nothing for `loss_type={loss_types}`"
            raise ValueError(f"{what}: it belongs to {sorted(owners)}. Leave it unset.")


# `safe_exp` is exact up to here, where the slope is e^10 = 22026. Far beyond, a single pair would be the whole
# gradient of its batch; farther, at 88, float32 overflows.
EXP_LIMIT = 10.0


def safe_exp(x: torch.Tensor, limit: float = EXP_LIMIT) -> torch.Tensor:
    """
    e^x up to a limit, and its tangent from there on: still convex and increasing, but it cannot overflow.

    Args:
        x (`torch.Tensor`):
            Exponents.
        limit (`float`, *optional*, defaults to `10.0`):
            Exponent up to which the result is exact.

    Returns:
        `torch.Tensor`: e^x, or its tangent at `limit`.
    """
    clipped = x.clamp(max=limit)
    return clipped.exp() * (1 + x - clipped)


# ---- SPIN: the loss of the margin λ(r - r') ----


@objective("sigmoid", of_margin=True)
def logistic(real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float) -> torch.Tensor:
    r"""
    Logistic loss, from [Self-Play Fine-Tuning Converts Weak Language Models to Strong Language
    Models](https://huggingface.co/papers/2401.01335), Equation 4.7 with \\( \ell(m) = \log(1 + e^{-m}) \\):

    $$ \ell(\lambda (r - r')) = -\log \sigma(\lambda (r - r')) $$

    Its minimizer is \\( p_{t+1} \propto p_t (p_{data}/p_t)^{1/\lambda} \\) (Theorem 5.4). The same as `"sigmoid"` in
    [`~trl.DPOTrainer`].

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real completions.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated completions.
        beta (`float`):
            λ.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    return -F.logsigmoid(beta * (real_logratios - generated_logratios))


@objective("hinge", of_margin=True)
def hinge(real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float) -> torch.Tensor:
    r"""
    Hinge loss, from [SPIN](https://huggingface.co/papers/2401.01335), Equation 4.7 with
    \\( \ell(m) = \max(0, 1 - m) \\):

    $$ \ell(\lambda (r - r')) = \max(0, 1 - \lambda (r - r')) $$

    Not strictly proper: its minimizers tell which of \\( p_{data}, p_t \\) is larger, not by how much, and at \\( p_t
    = p_{data} \\) every model whose margins stay within ±1 has the same expected loss. The same as `"hinge"` in
    [`~trl.DPOTrainer`].

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real completions.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated completions.
        beta (`float`):
            λ.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    return torch.relu(1 - beta * (real_logratios - generated_logratios))


@objective("exponential", of_margin=True)
def exponential(real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float) -> torch.Tensor:
    r"""
    Exponential loss, from [SPIN](https://huggingface.co/papers/2401.01335), Equation 4.7 with
    \\( \ell(m) = e^{-m} \\):

    $$ \ell(\lambda (r - r')) = e^{-\lambda (r - r')} $$

    Exact for margins \\( \lambda (r - r') \geq -10 \\); below, the tangent at -10 goes on, so that the loss stays
    convex and decreasing (the paper's Assumption 5.1) and finite. Its minimizer is \\( p_{t+1} \propto p_t
    (p_{data}/p_t)^{1/(2\lambda)} \\), that of the logistic loss with 2λ.

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real completions.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated completions.
        beta (`float`):
            λ.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    return safe_exp(-beta * (real_logratios - generated_logratios))


@objective("correlation", of_margin=True)
def correlation(real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float) -> torch.Tensor:
    r"""
    Correlation loss, from [SPIN](https://huggingface.co/papers/2401.01335), Equation 4.7 with
    \\( \ell(m) = 1 - m \\), which makes it an integral probability metric:

    $$ \ell(\lambda (r - r')) = 1 - \lambda (r - r') $$

    Exact everywhere: a line needs no care. But it is not bounded below and has no minimizer unless \\( p_t = p_{data}
    \\), where all models are minimizers (so it is not strictly proper): only the number of steps and the learning rate
    limit how far an iteration goes, and λ does no more than scale the gradient. To bound it, take [`hinge`], which is
    this loss cut off at the margin 1 (and, with λ/c, c times smaller, cut off at the margin c).

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real completions.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated completions.
        beta (`float`):
            λ.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    return 1 - beta * (real_logratios - generated_logratios)


# ---- Density-ratio estimation: one loss for each side, so that r and r' have values of their own ----


@objective("space", mu="space_mu")
def space(
    real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float, mu: float = 1.0
) -> torch.Tensor:
    r"""
    Noise contrastive loss, from [SPACE: Noise Contrastive Estimation Stabilizes Self-Play Fine-Tuning for Large
    Language Models](https://huggingface.co/papers/2512.07175):

    $$ -\log \sigma_\mu(\lambda r) - \mu \log \sigma_{1/\mu}(-\lambda r'), \qquad \sigma_\mu(z) = \frac{1}{1 + \mu
    e^{-z}} $$

    The paper has λ = 1, for which the minimizer is \\( p_{data} \\) itself, for every μ. Its equation is taken from a
    third-party note on the paper (its number is not known to us); with λ = 1 it is the objective of noise contrastive
    estimation (Gutmann and Hyvärinen, 2010) with \\( p_t \\) as the noise. With μ = 1 it is the same as `"bco_pair"`
    in [`~trl.DPOTrainer`] (TRL 1.16, whose `"bco_pair"` has no running mean).

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real completions.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated completions.
        beta (`float`):
            λ.
        mu (`float`, *optional*, defaults to `1.0`):
            Weight μ of the generated completions: how many of them there are to one real completion.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    # σ_μ(z) = σ(z - log μ) and σ_{1/μ}(-z) = σ(log μ - z)
    log_mu = math.log(mu)
    real, generated = beta * real_logratios - log_mu, beta * generated_logratios - log_mu
    return -F.logsigmoid(real) - mu * F.logsigmoid(-generated)


class ChosenLosses:
    """
    The losses of a run by who computes them: those that the options name, or a given function in their place.

    `trl` has names and weights of those that DPOTrainer computes, `own` the other objectives, with their options set,
    and their weights. `of_margin` says whether all of them depend on a pair through r - r' alone.

    Args:
        args ([`SPINConfig`]):
            `loss_type`, `loss_weights`, `use_weighting`, and the options of the objectives.
        function (`Callable[..., torch.Tensor]`, *optional*):
            Function of the log-ratios of the real and of the generated completions, and of λ.
    """

    def __init__(self, args: Any, function: Callable[..., torch.Tensor] | None = None):
        names, objectives = args.loss_type, OBJECTIVES
        if function is not None:
            if names != ["sigmoid"] or args.use_weighting:
                raise ValueError("`objective` takes the place of `loss_type` and `use_weighting`: leave them unset.")
            names, objectives = ["objective"], {"objective": Objective(function)}
        weights = args.loss_weights or [1.0] * len(names)
        self._losses = [(name, objectives.get(name), weight) for name, weight in zip(names, weights, strict=True)]
        self.trl = [(name, weight) for name, _, weight in self._losses if name in TRL_LOSSES]
        self.own = [(own.with_options(args), weight) for name, own, weight in self._losses if name not in TRL_LOSSES]
        self.of_margin = not args.use_weighting and all(loss and loss.of_margin for _, loss, _ in self._losses)

    def at_zero(self, beta: float) -> float:
        """ℓ(0), where all losses are of the margin."""
        zero = torch.zeros(1)
        return sum(weight * objective.loss(zero, zero, beta).item() for _, objective, weight in self._losses)
