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
The theory, executable: one prompt, a softmax over five completions, expectations instead of samples, float64.

`p_data` is the distribution of the real completions, `p_t` the opponent's, and an iteration is the minimizer of the
expected loss over all distributions.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck
from trl import DPOTrainer


P_DATA = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05], dtype=torch.float64)
P_0 = torch.tensor([0.2, 0.3, 0.1, 0.25, 0.15], dtype=torch.float64)
DIRECTION = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5], dtype=torch.float64)


def random_directions(num_directions):
    return torch.randn(num_directions, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def expect(loss, logratios, p_data, p_t):
    """Expected loss over y ~ p_data and y' ~ p_t, of the log-ratios of all completions."""
    real, generated = torch.meshgrid(torch.arange(len(p_data)), torch.arange(len(p_t)), indexing="ij")
    losses = loss(logratios[real.flatten()], logratios[generated.flatten()])
    return (losses * (p_data[:, None] * p_t[None, :]).flatten()).sum()


def minimize(function, start):
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = function(point)
        value.backward()
        return value

    optimizer.step(closure)
    return point.detach()


def iterate(loss, p_data, p_t):
    """One iteration, trained to its optimum: log p_{t+1}."""
    logits = minimize(lambda logits: expect(loss, logits.log_softmax(0) - p_t.log(), p_data, p_t), p_t.log())
    return logits.log_softmax(0)


def play(loss, num_iterations):
    """Distances from the data, of p_0 and after each iteration."""
    p_t, distances = P_0, [kl(P_DATA, P_0)]
    for _ in range(num_iterations):
        p_t = iterate(loss, P_DATA, p_t).exp()
        distances.append(kl(P_DATA, p_t))
    return distances


def geometric(*factors):
    """The normalized product of the powers p^a of distributions, as log-probs."""
    return sum(a * p.log() for p, a in factors).log_softmax(0)


def kl(p, q):
    return (p * (p.log() - q.log())).sum().item()


@dataclass(frozen=True)
class Case:
    """An objective and what theory says about it."""

    loss: Callable
    at_zero: float  # ℓ(0)
    of_margin: bool = False
    strictly_proper: bool = True  # where p_t = p_data, p_data is the one and only minimizer
    step: float = 1.0  # the λ that takes the step of the logistic loss at λ = 1
    reward: Callable = lambda log_ratio: log_ratio  # what the best λr makes of log p_data/p_t, at that λ
    options: tuple = ({},)  # arguments to check the gradients with

    @property
    def exact(self):  # the best λr is log p_data/p_t itself
        return self.reward is Case.reward


class ObjectiveTheory:
    """What is checked of every objective. A subclass has their `cases`, by name."""

    cases: dict[str, Case] = {}

    def pytest_generate_tests(self, metafunc):
        proper = {name: case for name, case in self.cases.items() if case.strictly_proper}
        for fixture, cases in {"case": self.cases, "proper": proper}.items():
            if fixture in metafunc.fixturenames:
                metafunc.parametrize(fixture, cases.values(), ids=cases.keys())

    @pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
    def test_the_loss_of_the_reference_is_the_value_at_zero(self, case, beta):
        loss, zero = partial(case.loss, beta=beta), torch.zeros(1, dtype=torch.float64)
        assert loss(zero, zero).item() == pytest.approx(case.at_zero)
        assert expect(loss, P_0.log() - P_0.log(), P_DATA, P_0).item() == pytest.approx(case.at_zero)

    def test_losses_of_the_margin_learn_nothing_from_identical_pairs(self, case):
        real, generated = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        # The margin alone counts: the same constant on both sides changes nothing
        same = torch.allclose(case.loss(real, generated, 0.7), case.loss(real + 3, generated + 3, 0.7))
        logratio = real.clone().requires_grad_()
        case.loss(logratio, logratio, 0.7).sum().backward()
        assert same == (logratio.grad.abs().max() < 1e-12).item() == case.of_margin

    def test_strictly_proper_losses_recover_the_density_ratio(self, proper):
        # Over all functions r of the completion, not those of normalized models alone
        beta, log_ratio = 2.0, P_DATA.log() - P_0.log()
        r = minimize(lambda r: expect(partial(proper.loss, beta=beta), r, P_DATA, P_0), torch.zeros_like(log_ratio))
        target = proper.step * proper.reward(log_ratio) / beta
        if proper.of_margin:  # up to a constant
            r, target = r - r.mean(), target - target.mean()
        torch.testing.assert_close(r, target, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
    def test_where_the_opponent_is_the_data_only_strictly_proper_losses_hold_it(self, case, beta):
        loss = partial(case.loss, beta=beta)
        stay = expect(loss, torch.zeros_like(P_DATA), P_DATA, P_DATA)
        gains = []
        for size in (0.1, 1.0):
            for direction in random_directions(50):
                log_p = (P_DATA.log() + size * direction / beta).log_softmax(0)
                gains.append((expect(loss, log_p - P_DATA.log(), P_DATA, P_DATA) - stay).item())
        assert min(gains) > -1e-12
        if case.strictly_proper:
            assert min(gains) > 1e-6
        else:  # others do as well
            assert min(gains) < 1e-12

    def test_strictly_proper_losses_land_on_the_data_or_approach_it(self, proper):
        distances = play(partial(proper.loss, beta=proper.step), 3)
        assert distances[3] < 1e-8
        if proper.exact:
            assert distances[1] < 1e-9

    @pytest.mark.parametrize("beta", [0.3, 0.8, 4.0])
    def test_near_the_data_lambda_means_the_same_to_all_strictly_proper_losses(self, proper, beta):
        # log p_t/p_data is multiplied by 1 - 1/λ
        p_t = (P_DATA.log() + 1e-4 * DIRECTION).softmax(0)
        log_p = iterate(partial(proper.loss, beta=beta * proper.step), P_DATA, p_t)
        before, after = (p_t / P_DATA).log(), log_p - P_DATA.log()
        factor = (after[0] - after[1]) / (before[0] - before[1])
        assert factor.item() == pytest.approx(1 - 1 / beta, abs=1e-2)

    def test_gradients(self, case):
        # Through the limit of the safe exponentials, and on either side of the hinges
        values = torch.tensor([-40.0, -3.1, -0.2, 0.0, 0.4, 2.9, 35.0], dtype=torch.float64, requires_grad=True)
        other = torch.full_like(values, 0.3)
        for options in case.options:
            loss = partial(case.loss, beta=0.7, **options)
            assert gradcheck(lambda real, loss=loss: loss(real, other), values, eps=1e-5, rtol=1e-6)
            assert gradcheck(lambda generated, loss=loss: loss(other, generated), values, eps=1e-5, rtol=1e-6)

    @pytest.mark.parametrize("beta", [0.01, 1.0, 10.0])
    def test_extreme_log_ratios_stay_finite(self, case, beta):
        values = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
        real, generated = (i.flatten().requires_grad_() for i in torch.meshgrid(values, values, indexing="ij"))
        losses = case.loss(real, generated, beta)
        losses.mean().backward()
        assert losses.dtype == torch.float32 and losses.shape == real.shape
        assert all(x.isfinite().all() for x in (losses, losses.mean(), real.grad, generated.grad))


class TRLBatch:
    """A batch of four pairs, and the losses of DPOTrainer's own code with given log-probs in place of a model's."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.per_token_logps = -torch.rand(8, 6, generator=generator)
        self.lengths = torch.tensor([6, 4, 1, 3, 2, 6, 5, 1])
        self.mask = (torch.arange(6) < self.lengths[:, None]).long()
        self.ref_logps = -3 * torch.rand(2, 4, generator=generator)
        self.real_logps, generated_logps = (self.per_token_logps * self.mask).sum(1).chunk(2)
        self.logratios = self.real_logps - self.ref_logps[0], generated_logps - self.ref_logps[1]

    def loss(self, loss_type, beta, label_smoothing=0.0, discopop_tau=0.05):
        trainer = SimpleNamespace(
            accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
            args=SimpleNamespace(discopop_tau=discopop_tau),
            model=SimpleNamespace(training=True),
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=[loss_type],
            loss_weights=[1.0],
            beta=beta,
            label_smoothing=label_smoothing,
            use_weighting=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
        )
        outputs = SimpleNamespace(
            log_probs=self.per_token_logps * self.mask,
            entropy=torch.zeros_like(self.per_token_logps),
            mean_logits=torch.zeros_like(self.per_token_logps),
            is_top1=torch.zeros_like(self.per_token_logps, dtype=torch.bool),
        )
        completion_mask = torch.cat([torch.zeros_like(self.mask[:, :1]), self.mask], dim=1)
        inputs = {
            "input_ids": torch.zeros_like(completion_mask),
            "attention_mask": torch.ones_like(completion_mask),
            "completion_mask": completion_mask,
            "ref_chosen_logps": self.ref_logps[0],
            "ref_rejected_logps": self.ref_logps[1],
        }
        return DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, return_outputs=False)
