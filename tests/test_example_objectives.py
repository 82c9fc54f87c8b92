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

"""`examples/objectives.py`: every statement of its docstrings."""

import math
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from theory import (
    P_0,
    P_DATA,
    Case,
    ObjectiveTheory,
    TRLBatch,
    expect,
    geometric,
    iterate,
    play,
    random_directions,
)

from trl_spin.objectives import EXP_LIMIT, OBJECTIVES, space


REGISTERED = dict(OBJECTIVES)
EXAMPLES = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "examples" / "objectives.py")))
GSIL = {name: getattr(EXAMPLES, f"gsil_{name}") for name in ("bernoulli", "brier", "hinge", "kliep", "lsif")}
SHIFTS = ({}, {"shift": 0.5})


class TestExampleObjectives(ObjectiveTheory):
    cases = {
        "gsil_bernoulli": Case(GSIL["bernoulli"], at_zero=2 * math.log(2), options=SHIFTS),
        "gsil_brier": Case(GSIL["brier"], at_zero=0.5, options=SHIFTS),
        "gsil_hinge": Case(GSIL["hinge"], at_zero=2.0, strictly_proper=False, options=SHIFTS),
        "gsil_kliep": Case(GSIL["kliep"], at_zero=1.0, options=SHIFTS),
        "gsil_lsif": Case(GSIL["lsif"], at_zero=-0.5, options=SHIFTS),
        "chi_squared": Case(EXAMPLES.chi_squared, at_zero=0.0, reward=lambda log_ratio: 2 * torch.tanh(log_ratio / 2)),
    }


def test_the_file_defines_functions_and_registers_nothing():
    defined = {name for name, value in vars(EXAMPLES).items() if getattr(value, "__module__", None) == "<run_path>"}
    assert defined == TestExampleObjectives.cases.keys()
    assert OBJECTIVES == REGISTERED


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_some_are_losses_of_trl_and_of_self_play(beta):
    batch = TRLBatch()
    loss = GSIL["bernoulli"](*batch.logratios, beta)
    torch.testing.assert_close(loss, space(*batch.logratios, beta))
    torch.testing.assert_close(loss.mean(), batch.loss("bco_pair", beta))
    torch.testing.assert_close(
        EXAMPLES.chi_squared(*batch.logratios, beta).mean(), beta**2 / 4 * batch.loss("sppo_hard", beta / 4) - 2
    )


@pytest.mark.parametrize("name", sorted(GSIL.keys() - {"hinge"}))
def test_with_the_right_shift_gsil_ends_at_theorem_5_4(name):
    beta = 0.4
    z = (P_0 * (P_DATA / P_0) ** (1 / beta)).sum().log().item()
    log_p = iterate(partial(GSIL[name], beta=beta, shift=beta * z), P_DATA, P_0)
    target = geometric((P_0, 1 - 1 / beta), (P_DATA, 1 / beta))
    torch.testing.assert_close(log_p, target, atol=1e-5, rtol=0)
    without = iterate(partial(GSIL[name], beta=beta), P_DATA, P_0)
    assert not torch.allclose(without, target, atol=1e-2)


def test_the_shift_of_gsil_drives_away_from_the_data():
    loss = partial(GSIL["bernoulli"], beta=0.01, shift=2.0)
    stay = expect(loss, torch.zeros_like(P_DATA), P_DATA, P_DATA)
    for direction in random_directions(20):
        log_p = (P_DATA.log() + 0.1 * direction).log_softmax(0)
        assert expect(loss, log_p - P_DATA.log(), P_DATA, P_DATA) < stay


def test_brier_is_bounded_and_gives_up_on_what_is_far_off():
    values = torch.tensor([-1e4, -30.0, 30.0, 1e4], dtype=torch.float64)
    real, generated = (i.flatten().requires_grad_() for i in torch.meshgrid(values, values, indexing="ij"))
    losses = GSIL["brier"](real, generated, 1.0)
    losses.sum().backward()
    assert losses.min() >= 0 and losses.max() <= 2
    assert max(real.grad.abs().max(), generated.grad.abs().max()) < 1e-12


def test_the_hinge_of_gsil_does_not_find_the_data():
    assert max(play(partial(GSIL["hinge"], beta=1.0), 6)[-2:]) > 0.02  # to and fro


def test_kliep_at_lambda_one_is_sft_in_expectation():
    for log_p in (P_DATA.log(), P_0.log(), torch.full_like(P_0, 0.2).log()):
        loss = expect(partial(GSIL["kliep"], beta=1.0), log_p - P_0.log(), P_DATA, P_0)
        nll = -(P_DATA * (log_p - P_0.log())).sum()
        assert loss.item() == pytest.approx(nll.item() + 1)


def test_exponentials_of_gsil_are_exact_up_to_their_limit():
    exponents = torch.tensor([-700.0, -1.0, 3.0, EXP_LIMIT], dtype=torch.float64)
    assert torch.equal(GSIL["kliep"](torch.zeros_like(exponents), exponents, 1.0), exponents.exp())
    lsif = -exponents.exp() + 0.5 * (2 * exponents).exp()
    assert torch.equal(GSIL["lsif"](exponents, exponents, 1.0), lsif)
