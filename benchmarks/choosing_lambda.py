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
What λ does: draws `choosing_lambda.png`, next to this file, in a few seconds on one core.

One prompt, a softmax over five completions, expectations instead of samples. Nothing is random.

    pip install ".[report]"
    python benchmarks/choosing_lambda.py
"""

from pathlib import Path

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure

from trl_spin.objectives import logistic


P_DATA = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05], dtype=torch.float64)
P_0 = torch.tensor([0.2, 0.3, 0.1, 0.25, 0.15], dtype=torch.float64)
FLOOR = 1e-6  # KL below this is drawn here

# Colours that the colour-blind can tell apart (Okabe and Ito); line and marker tell them apart in grey
STYLES = {
    0.1: {"color": "#D55E00", "linestyle": "-", "marker": "o"},
    0.4: {"color": "#E69F00", "linestyle": "--", "marker": "s"},
    0.6: {"color": "#56B4E9", "linestyle": "-.", "marker": "^"},
    1: {"color": "#000000", "linestyle": "-", "marker": "D"},
    5: {"color": "#0072B2", "linestyle": ":", "marker": "v"},
}


def kl(log_p: torch.Tensor) -> float:
    """KL(p_data || p), from p's log-probs."""
    return max((P_DATA * (P_DATA.log() - log_p)).sum().item(), FLOOR)


def optimum(log_p_t: torch.Tensor, beta: float) -> torch.Tensor:
    """Where an iteration would end: Theorem 5.4, which `tests/test_objectives.py` checks against the loss."""
    return ((1 - 1 / beta) * log_p_t + P_DATA.log() / beta).log_softmax(0)


def descend(log_p_t: torch.Tensor, beta: float, num_steps: int) -> list[torch.Tensor]:
    """The log-probs after each gradient step of an iteration, from its start on."""
    real, generated = (i.flatten() for i in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    weights = P_DATA[real] * log_p_t.exp()[generated]
    logits, path = log_p_t.clone().requires_grad_(), [log_p_t]
    for _ in range(num_steps):
        logratios = logits.log_softmax(0) - log_p_t
        loss = (weights * logistic(logratios[real], logratios[generated], beta)).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        # An iteration starts with λ/2 times the gradient of SFT. Divided by λ, all start with the same first step, as
        # they would under RMSProp or Adam.
        logits = (logits - gradient / beta).detach().requires_grad_()
        path.append(logits.detach().log_softmax(0))
    return path


def draw_iterations(axes):
    for beta, style in STYLES.items():
        log_p, distances = P_0.log(), []
        for _ in range(5):
            distances.append(kl(log_p))
            log_p = optimum(log_p, beta)
        axes.plot(distances, label=f"λ = {beta}", **style)
    axes.legend(loc="upper left")
    axes.set(title="(a) Every iteration to its optimum", xlabel="iteration", xticks=range(5))


def draw_one_iteration(axes, num_steps=3000):
    labels = {0.1: (0, 6), 0.4: (0, 6), 1: (-24, 6), 5: (0, -12)}  # where they are free of the lines, in points
    for beta, offset in labels.items():
        distances = [kl(log_p) for log_p in descend(P_0.log(), beta, num_steps)]
        axes.plot(range(1, num_steps + 1), distances[1:], **(STYLES[beta] | {"marker": None}))
        axes.annotate(
            f"λ = {beta}",
            (num_steps, distances[-1]),
            offset,
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=STYLES[beta]["color"] if beta != 0.4 else "#8A6100",  # the line's own is too light for letters
        )
    axes.axvline(10, color="0.5", linewidth=0.8)
    axes.annotate("stopped\nafter 10", (10, 2e3), (4, 0), textcoords="offset points", fontsize=8, color="0.3")
    axes.set(title="(b) On the way to it: iteration 0", xlabel="gradient steps", xscale="log")


def draw_early_stopping(axes, beta=0.1):
    # From dark to light, all of one hue: all are λ = 0.1
    shades = ["#5A1F00", "#9C3D00", "#D55E00", "#F08A45", "#F5B48A"]
    for num_steps, color, marker in zip((300, 100, 30, 10, 2), shades, "D^svo", strict=True):
        log_p, distances = P_0.log(), []
        for _ in range(9):
            distances.append(kl(log_p))
            log_p = descend(log_p, beta, num_steps)[-1]
        axes.plot(distances, label=f"{num_steps}", color=color, marker=marker)
    axes.legend(loc="upper left", ncols=3, title="gradient steps per iteration", title_fontsize=8, alignment="left")
    axes.set(title="(c) λ = 0.1, stopped early", xlabel="iteration", xticks=range(0, 9, 2))


def main():
    rcParams.update({"font.size": 9, "axes.titlesize": 10, "lines.linewidth": 1.6, "lines.markersize": 4.5})
    rcParams.update({"legend.fontsize": 8, "legend.frameon": False})
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    draw_iterations(axes[0])
    draw_one_iteration(axes[1])
    draw_early_stopping(axes[2])
    for ax in axes:
        ax.set(yscale="log", ylim=(FLOOR / 2, 2e4))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="KL(data ‖ model)", yticks=[10.0**n for n in range(-6, 5, 2)])
    axes[0].set_yticklabels(["$<10^{-6}$", *(f"10$^{{{n}}}$" for n in range(-4, 5, 2))])
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=160)


if __name__ == "__main__":
    main()
