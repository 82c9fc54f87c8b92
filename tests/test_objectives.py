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

"""The registry of objectives, and the theory of those in it."""

import inspect
import math
import re
from functools import partial

import pytest
import torch
from theory import (
    DIRECTION,
    P_0,
    P_DATA,
    Case,
    ObjectiveTheory,
    TRLBatch,
    expect,
    geometric,
    iterate,
    minimize,
    play,
)
from trl import DPOConfig

from trl_spin import objectives
from trl_spin.objectives import (
    EXP_LIMIT,
    OBJECTIVES,
    TRL_LOSSES,
    Objective,
    check_objectives,
    correlation,
    exponential,
    hinge,
    logistic,
    objective,
    safe_exp,
    space,
)


# ---- The registry ----


def test_members():
    assert {name for name in OBJECTIVES if OBJECTIVES[name].of_margin} == OBJECTIVES.keys() - {"space"}
    assert OBJECTIVES["sigmoid"].loss is logistic  # a registered function is still a function
    assert OBJECTIVES["space"].options == {"mu": "space_mu"}
    for member in OBJECTIVES.values():
        arguments = list(inspect.signature(member.loss).parameters)
        assert arguments == ["real_logratios", "generated_logratios", "beta", *member.options]


def test_an_objective_is_registered_once(monkeypatch):
    monkeypatch.setattr(objectives, "OBJECTIVES", {})

    @objective("squared", of_margin=True, target="squared_target")
    def squared(real_logratios, generated_logratios, beta, target=1.0):
        return (target - beta * (real_logratios - generated_logratios)) ** 2

    assert objectives.OBJECTIVES == {"squared": Objective(squared, True, {"target": "squared_target"})}
    with pytest.raises(ValueError, match="There is an objective 'squared' already"):
        objective("squared")(lambda real_logratios, generated_logratios, beta: real_logratios)
    assert objectives.OBJECTIVES["squared"].loss is squared
    check_objectives(["squared"], {"squared_target": 2.0})
    with pytest.raises(ValueError, match=r"does nothing for .*\['ipo'\]`: it belongs to \['squared'\]"):
        check_objectives(["ipo"], {"squared_target": 2.0})


@pytest.mark.parametrize(
    ("loss_types", "changed"),
    [
        *(([name], {}) for name in sorted(OBJECTIVES.keys() | TRL_LOSSES.keys())),
        (["sigmoid", "space"], {"space_mu": 2.0, "learning_rate": 1e-6}),  # for one of them
        (["robust"], {"label_smoothing": 0.1}),
        (["discopop", "aot"], {"label_smoothing": 0.1, "discopop_tau": 0.1}),
    ],
)
def test_losses_with_options_of_their_own_are_accepted(loss_types, changed):
    check_objectives(loss_types, changed)


@pytest.mark.parametrize(
    ("loss_types", "changed", "message"),
    [
        (
            ["sigmoid", "exponental"],
            {},
            "`loss_type` 'exponental' is unknown. Self-play has ['correlation', 'exponential', 'hinge', 'sigmoid', "
            "'space'], and of `DPOTrainer` ['aot', 'aot_unpaired', 'apo_down', 'apo_zero', 'bco_pair', 'discopop', "
            "'exo_pair', 'ipo', 'nca_pair', 'robust', 'sft', 'sigmoid_norm', 'sppo_hard'].",
        ),
        (
            ["sigmoid"],
            {"beta": 0.1, "space_mu": 2.0},
            "`space_mu=2.0` does nothing for `loss_type=['sigmoid']`: it belongs to ['space']. Leave it unset.",
        ),
        (
            ["space", "hinge"],
            {"label_smoothing": 0.1},
            "`label_smoothing=0.1` does nothing for `loss_type=['space', 'hinge']`: it belongs to ['aot', "
            "'aot_unpaired', 'exo_pair', 'robust']. Leave it unset.",
        ),
        (
            ["robust"],
            {"discopop_tau": 0.1},
            "`discopop_tau=0.1` does nothing for `loss_type=['robust']`: it belongs to ['discopop']. Leave it unset.",
        ),
    ],
)
def test_unknown_losses_and_options_that_do_nothing_are_refused(loss_types, changed, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_objectives(loss_types, changed)


# ---- TRL's own losses ----


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_same_names_mean_the_same_as_in_trl(beta):
    batch = TRLBatch()
    for name in OBJECTIVES.keys() & TRL_LOSSES.keys():
        loss = OBJECTIVES[name].loss(*batch.logratios, beta).mean()
        torch.testing.assert_close(loss, batch.loss(name, beta))
    # And other names for the same
    torch.testing.assert_close(space(*batch.logratios, beta).mean(), batch.loss("bco_pair", beta))


def test_the_sft_loss_of_trl_is_the_mean_over_tokens():
    batch = TRLBatch()
    nll = -batch.real_logps.sum() / batch.lengths[:4].sum()
    torch.testing.assert_close(batch.loss("sft", 1.0), nll)


def test_the_losses_of_trl_are_all_there():
    with pytest.raises(ValueError, match="Should be one of") as error:
        TRLBatch().loss("none", 1.0)
    assert set(re.findall(r"'(\w+)'", str(error.value))) == TRL_LOSSES.keys()


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_options_of_trl_change_the_losses_they_belong_to(name):
    batch, changes = TRLBatch(), set()
    before = batch.loss(name, 0.5, label_smoothing=0.1, discopop_tau=0.05)
    for option in {option for options in TRL_LOSSES.values() for option in options}:
        assert option in DPOConfig.__dataclass_fields__
        after = batch.loss(name, 0.5, **{"label_smoothing": 0.1, option: 0.2})
        if not torch.equal(before, after):
            changes.add(option)
    assert changes == {*TRL_LOSSES[name]}


# ---- SPIN and λ ----


@pytest.mark.parametrize("beta", [0.1, 0.4, 1.0, 5.0])
def test_an_iteration_ends_at_theorem_5_4(beta):
    log_p = iterate(partial(logistic, beta=beta), P_DATA, P_0)
    torch.testing.assert_close(log_p, geometric((P_0, 1 - 1 / beta), (P_DATA, 1 / beta)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("beta", [0.25, 0.5, 2.0])
def test_the_exponential_loss_takes_the_steps_of_twice_lambda(beta):
    log_p = iterate(partial(exponential, beta=beta), P_DATA, P_0)
    torch.testing.assert_close(log_p, geometric((P_0, 1 - 0.5 / beta), (P_DATA, 0.5 / beta)), atol=1e-5, rtol=0)


def test_iterations_contract_above_one_half_and_diverge_below():
    for beta in (0.6, 1.0, 5.0):
        distances = play(partial(logistic, beta=beta), 3)
        assert all(after < before or after < 1e-9 for before, after in zip(distances, distances[1:], strict=False))
    assert play(partial(logistic, beta=1.0), 1)[1] < 1e-9
    distances = play(partial(logistic, beta=0.1), 2)
    assert distances[0] < 0.2 and distances[1] > 10 * distances[0] and distances[2] > 10 * distances[1]


@pytest.mark.parametrize(("weight", "contracts"), [(0.03, False), (0.05, True)])
def test_an_sft_anchor_makes_a_small_lambda_contract(weight, contracts):
    # To first order, the log-ratio is multiplied by λ(λ - 1) / (λ² + 2w) (w per completion): contraction for
    # w > λ(1 - 2λ)/2
    beta, p_t = 0.1, (P_DATA.log() + 1e-4 * DIRECTION).softmax(0)

    def loss(logits):
        log_p = logits.log_softmax(0)
        anchor = -(P_DATA * log_p).sum()
        return expect(partial(logistic, beta=beta), log_p - p_t.log(), P_DATA, p_t) + weight * anchor

    p_next = minimize(loss, p_t.log()).softmax(0)
    factor = ((p_next / P_DATA).log()[0] - (p_next / P_DATA).log()[1]) / 2e-4
    assert factor.item() == pytest.approx(beta * (beta - 1) / (beta**2 + 2 * weight), abs=1e-2)
    assert (abs(factor) < 1) == contracts


# ---- Every member ----

THEORY = {
    "sigmoid": {"at_zero": math.log(2)},
    "hinge": {"at_zero": 1.0, "strictly_proper": False},
    # Its λ counts twice
    "exponential": {"at_zero": 1.0, "step": 0.5},
    "correlation": {"at_zero": 1.0, "strictly_proper": False},
    "space": {"at_zero": 2 * math.log(2), "options": ({}, {"mu": 3.0})},
}


class TestRegisteredObjectives(ObjectiveTheory):
    cases = {
        name: Case(member.loss, of_margin=member.of_margin, **THEORY[name]) for name, member in OBJECTIVES.items()
    }


# ---- Single members ----


def test_losses_that_are_not_strictly_proper_do_not_find_the_data():
    assert max(play(partial(hinge, beta=1.0), 6)[-2:]) > 0.02  # to and fro
    # No minimum: the loss falls with every step in the direction of log p_data/p_t
    values = [
        expect(partial(correlation, beta=1.0), step * (P_DATA - P_0), P_DATA, P_0).item()
        for step in (0, 10, 100, 1000)
    ]
    assert values == sorted(values, reverse=True) and values[-1] < -10


def test_correlation_cut_off_is_a_hinge():
    margins, cut = torch.linspace(-5, 20, 101), 8.0
    zero = torch.zeros_like(margins)
    cut_off = correlation(margins, zero, 1.0).clamp(min=1 - cut)
    torch.testing.assert_close(cut_off, 1 - cut + cut * hinge(margins, zero, 1.0 / cut))


@pytest.mark.parametrize("mu", [0.5, 3.0, 7.0])
def test_space_finds_the_data_for_every_mu(mu):
    log_p = iterate(partial(space, beta=1.0, mu=mu), P_DATA, P_0)
    torch.testing.assert_close(log_p, P_DATA.log(), atol=1e-5, rtol=0)
    zero = torch.zeros(1, dtype=torch.float64)
    assert space(zero, zero, 1.0, mu).item() == pytest.approx(math.log(1 + mu) + mu * math.log(1 + 1 / mu))


def test_safe_exponentials_are_exact_up_to_their_limit():
    exponents = torch.tensor([-700.0, -1.0, 3.0, EXP_LIMIT], dtype=torch.float64)
    assert torch.equal(safe_exp(exponents), exponents.exp())
    assert torch.equal(exponential(-exponents, torch.zeros_like(exponents), 1.0), exponents.exp())
    beyond = torch.tensor([EXP_LIMIT + 1, 50.0], dtype=torch.float64)
    assert (safe_exp(beyond) < beyond.exp()).all()  # smaller, convex and increasing
    assert torch.equal(safe_exp(beyond, limit=50.0), beyond.exp())
    margins = torch.linspace(-30, 5, 400, dtype=torch.float64)
    losses = exponential(margins, torch.zeros_like(margins), 1.0)
    assert (losses.diff() < 0).all() and (losses.diff().diff() > -1e-6).all()
