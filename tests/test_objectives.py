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
The theory, executable: one prompt, a softmax over five answers, expectations instead of samples, float64.

`p_data` is the distribution of the real answers, `p_t` the opponent's, and an iteration is the minimizer of the expected
loss over all distributions.
"""

import math
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck
from trl import DPOTrainer

from trl_spin.objectives import (
    EXP_LIMIT,
    MARGIN_LOSSES,
    OBJECTIVES,
    STRICTLY_PROPER,
    correlation,
    exponential,
    gsil_bernoulli,
    gsil_kliep,
    gsil_lsif,
    hinge,
    logistic,
    mix_reference,
    sft,
    space,
    t_spin,
)


P_DATA = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05], dtype=torch.float64)
P_0 = torch.tensor([0.2, 0.3, 0.1, 0.25, 0.15], dtype=torch.float64)
# At p_0 = p_data, λ of the logistic loss is 1 over the factor of log p_data/p_t. For the exponential loss it is 2λ.
STEP = {name: 0.5 if name == "exponential" else 1.0 for name in STRICTLY_PROPER}
LOSS_AT_ZERO = {
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "exponential": 1.0,
    "correlation": 1.0,
    "space": 2 * math.log(2),
    "gsil_bernoulli": 2 * math.log(2),
    "gsil_brier": 0.5,
    "gsil_hinge": 2.0,
    "gsil_kliep": 1.0,
    "gsil_lsif": -0.5,
    "chi_squared": 0.0,
}


def expect(loss, logratios, p_data, p_t):
    """Expected loss over y ~ p_data and y' ~ p_t, of the log-ratios of all answers."""
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


def iterate(loss, p_data, p_t, reference=None):
    """One iteration, trained to its optimum: log p_{t+1}."""
    reference = p_t.log() if reference is None else reference
    logits = minimize(lambda logits: expect(loss, logits.log_softmax(0) - reference, p_data, p_t), p_t.log())
    return logits.log_softmax(0)


def geometric(*factors):
    """The normalized product of the powers p^a of distributions, as log-probs."""
    return sum(a * p.log() for p, a in factors).log_softmax(0)


def kl(p, q):
    return (p * (p.log() - q.log())).sum().item()


# ---- SPIN and λ ----


@pytest.mark.parametrize("beta", [0.1, 0.4, 1.0, 5.0])
def test_an_iteration_ends_at_theorem_5_4(beta):
    log_p = iterate(partial(logistic, beta=beta), P_DATA, P_0)
    torch.testing.assert_close(log_p, geometric((P_0, 1 - 1 / beta), (P_DATA, 1 / beta)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("beta", [0.25, 0.5, 2.0])
def test_the_exponential_loss_takes_steps_of_half_lambda(beta):
    log_p = iterate(partial(exponential, beta=beta), P_DATA, P_0)
    torch.testing.assert_close(log_p, geometric((P_0, 1 - 0.5 / beta), (P_DATA, 0.5 / beta)), atol=1e-5, rtol=0)


def test_iterations_contract_above_one_half_and_diverge_below():
    def play(beta, num_iterations):
        p_t, distances = P_0, [kl(P_DATA, P_0)]
        for _ in range(num_iterations):
            p_t = iterate(partial(logistic, beta=beta), P_DATA, p_t).exp()
            distances.append(kl(P_DATA, p_t))
        return distances

    for beta in (0.6, 1.0, 5.0):
        distances = play(beta, 3)
        assert all(after < before or after < 1e-9 for before, after in zip(distances, distances[1:], strict=False))
    assert play(1.0, 1)[1] < 1e-9
    distances = play(0.1, 2)
    assert distances[0] < 0.2 and distances[1] > 10 * distances[0] and distances[2] > 10 * distances[1]


@pytest.mark.parametrize(("weight", "contracts"), [(0.03, False), (0.05, True)])
def test_an_sft_anchor_makes_a_small_lambda_contract(weight, contracts):
    # To first order, the log-ratio is multiplied by λ(λ - 1) / (λ² + 2w) (w per answer): contraction for w > λ(1 - 2λ)/2
    beta, direction = 0.1, torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5], dtype=torch.float64)
    p_t = (P_DATA.log() + 1e-4 * direction).softmax(0)

    def loss(logits):
        log_p = logits.log_softmax(0)
        anchor = -(P_DATA * log_p).sum()
        return expect(partial(logistic, beta=beta), log_p - p_t.log(), P_DATA, p_t) + weight * anchor

    p_next = minimize(loss, p_t.log()).softmax(0)
    factor = ((p_next / P_DATA).log()[0] - (p_next / P_DATA).log()[1]) / 2e-4
    assert factor.item() == pytest.approx(beta * (beta - 1) / (beta**2 + 2 * weight), abs=1e-2)
    assert (abs(factor) < 1) == contracts


# ---- Every member ----


def test_members():
    assert OBJECTIVES.keys() == LOSS_AT_ZERO.keys()
    assert OBJECTIVES.keys() - STRICTLY_PROPER == {"hinge", "correlation", "gsil_hinge"}
    assert OBJECTIVES.keys() >= MARGIN_LOSSES
    real, generated = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    for name, loss in OBJECTIVES.items():
        # The margin alone counts: the same constant on both sides changes nothing
        same = torch.allclose(loss(real, generated, 0.7), loss(real + 3, generated + 3, 0.7), atol=1e-5)
        assert same == (name in MARGIN_LOSSES)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_the_loss_of_the_reference_is_the_value_at_zero(name, beta):
    loss, zero = partial(OBJECTIVES[name], beta=beta), torch.zeros(1, dtype=torch.float64)
    assert loss(zero, zero).item() == pytest.approx(LOSS_AT_ZERO[name])
    assert expect(loss, P_0.log() - P_0.log(), P_DATA, P_0).item() == pytest.approx(LOSS_AT_ZERO[name])


@pytest.mark.parametrize("name", sorted(STRICTLY_PROPER))
def test_strictly_proper_losses_recover_the_density_ratio(name):
    # Over all functions r of the answer, not those of normalized models alone
    beta, d = 2.0, P_DATA.log() - P_0.log()
    r = minimize(lambda r: expect(partial(OBJECTIVES[name], beta=beta), r, P_DATA, P_0), torch.zeros_like(d))
    target = 2 * torch.tanh(d / 2) / beta if name == "chi_squared" else STEP[name] * d / beta
    if name in MARGIN_LOSSES:  # up to a constant
        r, target = r - r.mean(), target - target.mean()
    torch.testing.assert_close(r, target, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_where_the_opponent_is_the_data_only_strictly_proper_losses_hold_it(name, beta):
    loss = partial(OBJECTIVES[name], beta=beta)
    stay = expect(loss, torch.zeros_like(P_DATA), P_DATA, P_DATA)
    directions = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gains = []
    for size in (0.1, 1.0):
        for direction in directions:
            log_p = (P_DATA.log() + size * direction / beta).log_softmax(0)
            gains.append((expect(loss, log_p - P_DATA.log(), P_DATA, P_DATA) - stay).item())
    assert min(gains) > -1e-12
    if name in STRICTLY_PROPER:
        assert min(gains) > 1e-6
    else:  # others do as well
        assert min(gains) < 1e-12


@pytest.mark.parametrize("name", sorted(STRICTLY_PROPER))
def test_strictly_proper_losses_land_on_the_data_or_approach_it(name):
    distances, p_t = [kl(P_DATA, P_0)], P_0
    for _ in range(3):
        p_t = iterate(partial(OBJECTIVES[name], beta=STEP[name]), P_DATA, p_t).exp()
        distances.append(kl(P_DATA, p_t))
    assert distances[3] < 1e-8
    if name != "chi_squared":  # its minimizer is within ±2
        assert distances[1] < 1e-9


@pytest.mark.parametrize("name", sorted(STRICTLY_PROPER))
@pytest.mark.parametrize("beta", [0.3, 0.8, 4.0])
def test_near_the_data_lambda_means_the_same_to_all_strictly_proper_losses(name, beta):
    # log p_t/p_data is multiplied by 1 - 1/λ
    direction = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5], dtype=torch.float64)
    p_t = (P_DATA.log() + 1e-4 * direction).softmax(0)
    log_p = iterate(partial(OBJECTIVES[name], beta=beta * STEP[name]), P_DATA, p_t)
    before, after = (p_t / P_DATA).log(), log_p - P_DATA.log()
    factor = (after[0] - after[1]) / (before[0] - before[1])
    assert factor.item() == pytest.approx(1 - 1 / beta, abs=1e-2)


def test_losses_that_are_not_strictly_proper_do_not_find_the_data():
    for name in ("hinge", "gsil_hinge"):
        p_t, distances = P_0, []
        for _ in range(6):
            p_t = iterate(partial(OBJECTIVES[name], beta=1.0), P_DATA, p_t).exp()
            distances.append(kl(P_DATA, p_t))
        assert max(distances[-2:]) > 0.02  # to and fro
    # No minimum: the loss falls with every step in the direction of log p_data/p_t
    values = [
        expect(partial(correlation, beta=1.0), step * (P_DATA - P_0), P_DATA, P_0).item()
        for step in (0, 10, 100, 1000)
    ]
    assert values == sorted(values, reverse=True) and values[-1] < -10


# ---- Single members ----


@pytest.mark.parametrize("mu", [0.5, 3.0, 7.0])
def test_space_finds_the_data_for_every_mu(mu):
    log_p = iterate(partial(space, beta=1.0, mu=mu), P_DATA, P_0)
    torch.testing.assert_close(log_p, P_DATA.log(), atol=1e-5, rtol=0)
    zero = torch.zeros(1, dtype=torch.float64)
    assert space(zero, zero, 1.0, mu).item() == pytest.approx(math.log(1 + mu) + mu * math.log(1 + 1 / mu))


def test_kliep_at_lambda_one_is_sft_in_expectation():
    for log_p in (P_DATA.log(), P_0.log(), torch.full_like(P_0, 0.2).log()):
        loss = expect(partial(gsil_kliep, beta=1.0), log_p - P_0.log(), P_DATA, P_0)
        nll = -(P_DATA * (log_p - P_0.log())).sum()
        assert loss.item() == pytest.approx(nll.item() + 1)


@pytest.mark.parametrize("name", ["gsil_bernoulli", "gsil_brier", "gsil_kliep", "gsil_lsif"])
def test_with_the_right_shift_gsil_ends_at_theorem_5_4(name):
    beta = 0.4
    z = (P_0 * (P_DATA / P_0) ** (1 / beta)).sum().log().item()
    log_p = iterate(partial(OBJECTIVES[name], beta=beta, shift=beta * z), P_DATA, P_0)
    target = geometric((P_0, 1 - 1 / beta), (P_DATA, 1 / beta))
    torch.testing.assert_close(log_p, target, atol=1e-5, rtol=0)
    without = iterate(partial(OBJECTIVES[name], beta=beta), P_DATA, P_0)
    assert not torch.allclose(without, target, atol=1e-2)


def test_the_shift_of_gsil_drives_away_from_the_data():
    loss = partial(gsil_bernoulli, beta=0.01, shift=2.0)
    stay = expect(loss, torch.zeros_like(P_DATA), P_DATA, P_DATA)
    for direction in torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        log_p = (P_DATA.log() + 0.1 * direction).log_softmax(0)
        assert expect(loss, log_p - P_DATA.log(), P_DATA, P_DATA) < stay


def test_alpha_spin():
    beta, loss, p_t = 1.25, partial(logistic, beta=1.25), torch.full_like(P_0, 0.2)
    opponent, base = p_t.log(), P_0.log()
    assert torch.equal(mix_reference(opponent, base, 1.0), opponent)
    assert torch.equal(mix_reference(opponent, base, 0.0), base)
    for alpha in (0.0, 0.5, 1.0):
        log_p = iterate(loss, P_DATA, p_t, reference=mix_reference(opponent, base, alpha))
        target = geometric((p_t, alpha - 1 / beta), (P_0, 1 - alpha), (P_DATA, 1 / beta))
        torch.testing.assert_close(log_p, target, atol=1e-5, rtol=0)

    # The fixed point lies between p_data and p_0, and log-ratios to it are multiplied by α - 1/λ
    alpha = 0.5
    share = (1 - alpha) * beta / ((1 - alpha) * beta + 1)
    fixed = geometric((P_0, share), (P_DATA, 1 - share))
    for _ in range(12):
        p_t = iterate(loss, P_DATA, p_t, reference=mix_reference(p_t.log(), base, alpha)).exp()
    torch.testing.assert_close(p_t.log(), fixed, atol=1e-4, rtol=0)
    # The normalizer is no matter to losses of the margin, but to the others
    for name, objective in OBJECTIVES.items():
        normalized = mix_reference(opponent, base, alpha).log_softmax(0)
        exact = torch.allclose(
            expect(partial(objective, beta=20.0), fixed - normalized, P_DATA, P_0),
            expect(partial(objective, beta=20.0), fixed - mix_reference(opponent, base, alpha), P_DATA, P_0),
        )
        assert exact == (name in MARGIN_LOSSES)


def triplet_iterate(p_t, p_0, history_weight, alpha=1.0):
    def loss(logits):
        log_p = logits.log_softmax(0)
        real, generated, proto = (i.flatten() for i in torch.meshgrid(*[torch.arange(5)] * 3, indexing="ij"))
        losses = t_spin(log_p[real], log_p[generated], log_p[proto], alpha, history_weight)
        return (losses * P_DATA[real] * p_t[generated] * p_0[proto]).sum()

    return minimize(loss, p_t.log()).log_softmax(0)


def test_t_spin():
    for alpha in (1.0, 2.0):
        log_p = triplet_iterate(P_0, P_0, 0.0, alpha)
        torch.testing.assert_close(log_p, geometric((P_DATA, 1 / alpha), (P_0, -1 / alpha)), atol=1e-5, rtol=0)
    # The data is not a fixed point, and p_0 comes back after two iterations
    uniform = torch.full_like(P_DATA, 0.2).log()
    torch.testing.assert_close(triplet_iterate(P_DATA, P_0, 0.0), uniform, atol=1e-5, rtol=0)
    again = triplet_iterate(triplet_iterate(P_0, P_0, 0.0).exp(), P_0, 0.0)
    torch.testing.assert_close(again, P_0.log(), atol=1e-4, rtol=0)
    # The second term damps that, and the iteration settles at a distribution flatter than the data
    p_t = triplet_iterate(P_0, P_0, 0.0).exp()
    for _ in range(8):
        previous, p_t = p_t, triplet_iterate(p_t, P_0, 0.5).exp()
    assert kl(previous, p_t) < 1e-4
    assert kl(P_DATA, p_t) > 0.03 and -(p_t * p_t.log()).sum() > -(P_DATA * P_DATA.log()).sum()
    # It knows no reference: the first loss of an iteration is not a constant
    assert t_spin(*torch.tensor([[-3.0], [-2.0], [-5.0]])).item() == pytest.approx(1.31326 + 0.1 * 0.048587, abs=1e-4)


def test_sft_is_the_mean_over_tokens():
    logps, lengths = torch.tensor([-6.0, -1.0, -5.0]), torch.tensor([3, 1, 8])
    assert sft(logps, lengths).mean().item() == pytest.approx(1.0)
    assert sft(logps, lengths).shape == (3,)


# ---- TRL's own losses ----


def trl_loss(loss_type, beta, per_token_logps, mask, ref_logps):
    """The loss of DPOTrainer's own code, with given log-probs in place of a model's."""
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    outputs = SimpleNamespace(
        log_probs=per_token_logps * mask,
        entropy=torch.zeros_like(per_token_logps),
        mean_logits=torch.zeros_like(per_token_logps),
        is_top1=torch.zeros_like(per_token_logps, dtype=torch.bool),
    )
    completion_mask = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1)
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref_logps[0],
        "ref_rejected_logps": ref_logps[1],
    }
    return DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, return_outputs=False)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_same_names_mean_the_same_as_in_trl(beta):
    generator = torch.Generator().manual_seed(0)
    per_token_logps = -torch.rand(8, 6, generator=generator)
    mask = (torch.arange(6) < torch.tensor([6, 4, 1, 3, 2, 6, 5, 1])[:, None]).long()
    ref_logps = -3 * torch.rand(2, 4, generator=generator)
    real_logps, generated_logps = (per_token_logps * mask).sum(1).chunk(2)
    real, generated = real_logps - ref_logps[0], generated_logps - ref_logps[1]

    def trl(loss_type, beta):
        return trl_loss(loss_type, beta, per_token_logps, mask, ref_logps)

    torch.testing.assert_close(OBJECTIVES["sigmoid"](real, generated, beta).mean(), trl("sigmoid", beta))
    torch.testing.assert_close(OBJECTIVES["hinge"](real, generated, beta).mean(), trl("hinge", beta))
    torch.testing.assert_close(sft(real_logps, mask[:4].sum(1)).mean(), trl("sft", beta))
    # And other names for the same
    torch.testing.assert_close(space(real, generated, beta).mean(), trl("bco_pair", beta))
    torch.testing.assert_close(gsil_bernoulli(real, generated, beta).mean(), trl("bco_pair", beta))
    torch.testing.assert_close(
        OBJECTIVES["chi_squared"](real, generated, beta).mean(), beta**2 / 4 * trl("sppo_hard", beta / 4) - 2
    )


# ---- Numbers ----


CALLS = [pytest.param(partial(loss, beta=0.7), id=name) for name, loss in OBJECTIVES.items()] + [
    pytest.param(partial(space, beta=0.7, mu=3.0), id="space with mu"),
    pytest.param(partial(gsil_bernoulli, beta=0.7, shift=0.5), id="gsil_bernoulli with shift"),
    pytest.param(partial(gsil_lsif, beta=0.7, shift=0.5), id="gsil_lsif with shift"),
    pytest.param(lambda real, generated: t_spin(real, generated, real * generated, 0.7, 0.3), id="t_spin"),
    pytest.param(lambda real, generated: sft(real + generated, torch.arange(1, 8)), id="sft"),
]


@pytest.mark.parametrize("loss", CALLS)
def test_gradients(loss):
    # Through the limit of the safe exponentials, and on either side of the hinges
    values = torch.tensor([-40.0, -3.1, -0.2, 0.0, 0.4, 2.9, 35.0], dtype=torch.float64, requires_grad=True)
    other = torch.full_like(values, 0.3)
    assert gradcheck(lambda real: loss(real, other), values, eps=1e-5, rtol=1e-6)
    assert gradcheck(lambda generated: loss(other, generated), values, eps=1e-5, rtol=1e-6)


@pytest.mark.parametrize("name", [*OBJECTIVES, "t_spin"])
@pytest.mark.parametrize("beta", [0.01, 1.0, 10.0])
def test_extreme_log_ratios_stay_finite(name, beta):
    values = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    real, generated = (i.flatten().requires_grad_() for i in torch.meshgrid(values, values, indexing="ij"))
    if name == "t_spin":
        losses = t_spin(real, generated, -generated, beta)
    else:
        losses = OBJECTIVES[name](real, generated, beta)
    losses.mean().backward()
    assert losses.dtype == torch.float32 and losses.shape == real.shape
    assert all(x.isfinite().all() for x in (losses, losses.mean(), real.grad, generated.grad))


def test_safe_exponentials_are_exact_up_to_their_limit():
    zero = torch.zeros(1, dtype=torch.float64)

    def x(value):
        return torch.tensor([value], dtype=torch.float64)

    for value in (-700.0, -1.0, 3.0, EXP_LIMIT):
        assert torch.equal(exponential(x(-value), zero, 1.0), x(value).exp())
        assert torch.equal(gsil_kliep(zero, x(value), 1.0), x(value).exp())
        assert torch.equal(gsil_lsif(x(value), x(value), 1.0), -x(value).exp() + 0.5 * (2 * x(value)).exp())
    for value in (EXP_LIMIT + 1, 50.0):  # beyond: smaller, convex and increasing
        assert exponential(x(-value), zero, 1.0) < x(value).exp()
    margins = torch.linspace(-30, 5, 400, dtype=torch.float64)
    losses = exponential(margins, torch.zeros_like(margins), 1.0)
    assert (losses.diff() < 0).all() and (losses.diff().diff() > -1e-6).all()


def test_correlation_cut_off_is_a_hinge():
    margins, cut = torch.linspace(-5, 20, 101), 8.0
    zero = torch.zeros_like(margins)
    cut_off = correlation(margins, zero, 1.0).clamp(min=1 - cut)
    torch.testing.assert_close(cut_off, 1 - cut + cut * hinge(margins, zero, 1.0 / cut))
