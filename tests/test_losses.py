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

"""The objectives in the trainer: what they are given, what they are combined with, and what is refused."""

import math
from functools import partial

import pytest
import torch
from conftest import Scripted, assert_loss_and_gradient, first_losses, logp, make_args, make_dataset, make_trainer
from transformers import TrainerCallback

from trl_spin.objectives import OBJECTIVES, TRL_LOSSES, objective
from trl_spin.pairs import as_preference
from trl_spin.run.games import load_game, read_manifest


OWN = sorted(OBJECTIVES.keys() - TRL_LOSSES.keys())
OPTIONS = {"space": {"space_mu": 2.0}}


def side_logps(model, row, *sides):
    return [logp(model, row["prompt_ids"], row[f"{side}_ids"]) for side in sides]


def log_ratios(trainer, row):
    real, generated = side_logps(trainer.model, row, "chosen", "rejected")
    return real - row["ref_chosen_logps"], generated - row["ref_rejected_logps"]


def assert_objective(trainer, loss, beta):
    """The trainer minimizes this function of the log-ratios."""
    rows = [trainer.game.train[i] for i in range(4)]
    assert_loss_and_gradient(
        trainer, rows, torch.stack([loss(*log_ratios(trainer, row), beta) for row in rows]).mean()
    )


@pytest.mark.parametrize("loss_type", OWN)
def test_each_objective_is_its_function_of_the_log_ratios(tmp_path, loss_type):
    options, registered = OPTIONS.get(loss_type, {}), OBJECTIVES[loss_type]
    trainer = make_trainer(tmp_path, loss_type=loss_type, beta=0.5, learning_rate=1e-4, **options)
    trainer.train()
    loss = partial(registered.loss, **{argument: options[name] for argument, name in registered.options.items()})
    zero = torch.zeros(1)
    assert first_losses(trainer) == [pytest.approx(loss(zero, zero, 0.5).item(), abs=1e-4)] * 2
    assert_objective(trainer, loss, 0.5)
    logs = next(logs for logs in trainer.state.log_history if "loss" in logs)
    # Each side has a value of its own where the loss is not of the margin
    assert ("objective/real_accuracies" in logs) == (not registered.of_margin)


@pytest.mark.parametrize("loss_type", ["space", "bco_pair", "exponential"])
def test_pairs_that_are_not_played_have_no_gradient_under_any_loss(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, num_self_play_iterations=1, loss_type=loss_type, beta=0.5, learning_rate=1e-3)
    trainer.train()
    game, loss = trainer.game.train, OBJECTIVES["space" if loss_type == "bco_pair" else loss_type].loss
    unplayed = as_preference({**game.pairs[0][3], "played": False})
    played = [game[i] for i in range(3)]
    losses = [loss(*log_ratios(trainer, row), 0.5) for row in played]
    # The loss of the unplayed pair is a constant
    ratio = log_ratios(trainer, unplayed)[0].detach()
    losses.append(loss(ratio, ratio, 0.5))
    game.all_played = True  # it goes through the model
    assert_loss_and_gradient(trainer, [*played, unplayed], torch.stack(losses).mean())


def play_an_identical_pair(tmp_path, monkeypatch, **kwargs):
    """A run in which the opponent writes the first real completion as it is, and something else in its other rows."""
    trainer = make_trainer(tmp_path, num_self_play_iterations=1, use_script=True, **kwargs)
    real, end = trainer.game.train.rows[0]["real_ids"], trainer.processing_class.eos_token_id
    others = [[5, 6, i, end] for i in range(1, len(trainer.game.train))]
    monkeypatch.setattr(Scripted, "script", staticmethod(lambda prompts: [real, *others][: len(prompts)]))
    trainer.train()
    return trainer


def test_identical_completions_are_played_where_they_have_a_gradient(tmp_path, monkeypatch):
    for loss_type, played in (("space", True), ("sigmoid", False)):
        trainer = play_an_identical_pair(tmp_path / loss_type, monkeypatch, loss_type=loss_type)
        assert trainer.game.train.pairs[0]["identical"][0]
        assert trainer.game.train.pairs[0]["played"][0] == played


def test_sft_anchor_with_weights_per_iteration(tmp_path):
    trainer = make_trainer(tmp_path, sft_weight=[0.0, 2.0], beta=0.5, learning_rate=1e-4)
    trainer.train()
    nll = next(
        logs["nll/real"] for logs in trainer.state.log_history if logs.get("step", 0) > 3 and "nll/real" in logs
    )
    assert first_losses(trainer) == [
        pytest.approx(math.log(2), abs=1e-4),
        pytest.approx(math.log(2) + 2 * nll, abs=1e-3),
    ]
    rows = [trainer.game.train[i] for i in range(4)]
    losses, tokens = [], sum(len(row["chosen_ids"]) for row in rows)
    for row in rows:
        real, generated = side_logps(trainer.model, row, "chosen", "rejected")
        margin = 0.5 * (real - row["ref_chosen_logps"] - generated + row["ref_rejected_logps"])
        losses.append(torch.log1p(torch.exp(-margin)) / 4 - 2 * real / tokens)
    assert_loss_and_gradient(trainer, rows, torch.stack(losses).sum())


def test_pairs_that_are_not_played_count_in_the_sft_anchor_but_have_no_gradient(tmp_path):
    trainer = make_trainer(tmp_path, num_self_play_iterations=1, sft_weight=2.0, learning_rate=1e-4)
    trainer.train()
    game = trainer.game.train
    rows = [game[0], game[1], game[2], as_preference({**game.pairs[0][6], "played": False})]
    assert len(rows[3]["chosen_ids"]) > len(rows[0]["chosen_ids"])
    losses, num_tokens = [], sum(len(row["chosen_ids"]) for row in rows)
    for row in rows:
        real, generated = side_logps(trainer.model, row, "chosen", "rejected")
        margin = real - row["ref_chosen_logps"] - generated + row["ref_rejected_logps"]
        losses.append(torch.log1p(torch.exp(-margin)) / 4 - 2 * real / num_tokens)
    losses[3] = losses[3].detach()
    game.all_played = False
    assert_loss_and_gradient(trainer, rows, torch.stack(losses).sum())


def test_combinations(tmp_path):
    trainer = make_trainer(tmp_path, num_self_play_iterations=1, loss_type=["space", "hinge"], loss_weights=[0.5, 2.0])
    trainer.train()
    assert first_losses(trainer) == [pytest.approx(0.5 * 2 * math.log(2) + 2.0, abs=1e-4)]


@pytest.mark.parametrize("loss_type", sorted(TRL_LOSSES.keys() - {"exo_pair", "robust"}))
def test_losses_of_dpo_trainer_keep_their_names(tmp_path, loss_type):
    make_trainer(tmp_path, num_self_play_iterations=1, loss_type=loss_type, max_steps=1).train()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"loss_type": "exponental"}, "'exponental' is unknown. Self-play has .*'exponential'.*and of .*'ipo'"),
        ({"space_mu": 2.0}, r"`space_mu=2.0` does nothing for `loss_type=\['sigmoid'\]`"),
        ({"loss_type": "space", "space_mu": 0.0}, "must be > 0, got 0.0"),
        ({"label_smoothing": 0.1}, "`label_smoothing=0.1` does nothing"),
        ({"loss_type": ["sigmoid", "sft"], "sft_weight": 1.0}, "are the same anchor"),
        ({"loss_type": "space", "use_weighting": True}, "`use_weighting` is an option of"),
    ],
)
def test_options_that_do_not_apply_are_refused(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **kwargs)


# ---- Weights ----

WEIGHTS = [i % 7 % 3 / 2 for i in range(12)]


def by_length(prompts, completions, real):
    return [len(message["content"]) // 2 % 3 / 2 for [message] in real]


@pytest.mark.parametrize("loss_type", ["sigmoid", "bco_pair"])
def test_a_weight_scales_the_gradient_of_a_pair_in_any_loss(tmp_path, loss_type):
    options = {"num_self_play_iterations": 1, "beta": 0.5, "learning_rate": 1e-4, "loss_type": loss_type}
    trainer = make_trainer(tmp_path, pair_filter=by_length, **options)
    trainer.train()
    game, loss, losses = trainer.game.train, OBJECTIVES["space" if loss_type == "bco_pair" else loss_type].loss, []
    assert first_losses(trainer) == [pytest.approx(loss(*torch.zeros(2, 1), 0.5).item(), abs=1e-4)]
    for i in range(4):  # of which two have weight 0: the mean is over four all the same
        value = loss(*log_ratios(trainer, game[i]), 0.5)
        losses.append(value.detach() + WEIGHTS[i] * (value - value.detach()))
    assert_loss_and_gradient(trainer, [game[i] for i in range(4)], torch.stack(losses).mean())


def test_weights_are_counted_and_stay_with_the_run(tmp_path, capsys):
    options = {"opponent_history": 1, "save_strategy": "epoch", "eval_dataset": make_dataset(5)}
    make_trainer(tmp_path, pair_filter=by_length, **options).train()
    shown = " ".join(capsys.readouterr().out.split())
    assert "by_length (`pair_filter`) gives each pair its weight" in shown and "filtered out 42%" in shown
    pairs, metrics = load_game(str(tmp_path), 1), read_manifest(str(tmp_path), 1)["metrics"]
    assert pairs["train"]["weight"][:] == WEIGHTS * 2
    assert pairs["train"]["played"][:] == [weight > 0 for weight in WEIGHTS * 2]
    assert pairs["eval"]["weight"][:] == WEIGHTS[:5] and all(pairs["eval"]["played"])
    for prefix, weights in {"": WEIGHTS, "eval_": WEIGHTS[:5]}.items():
        assert metrics[f"{prefix}self_play/filtered"] == pytest.approx(weights.count(0) / len(weights))
        assert metrics[f"{prefix}self_play/mean_weight"] == pytest.approx(sum(weights) / len(weights))
    with pytest.raises(ValueError, match="`pair_filter` was 'by_length' and is None"):
        make_trainer(tmp_path, num_self_play_iterations=3, **options).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "weight, message",
    [
        (-0.5, "gives row 0 of the train dataset the weight -0.5: it must be finite"),
        (math.nan, "gives row 0 of the train dataset the weight nan"),
        (False, "Iteration 0 has nothing to learn from: `pair_filter` .* gives each of 12 pairs weight 0"),
        ([1.0, 2.0], r"returns weights of shape \(.*, 2\) for . pairs of the train dataset"),
    ],
)
def test_what_are_no_weights_is_refused(tmp_path, weight, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, pair_filter=lambda prompts, *texts: [weight] * len(prompts)).train()


# ---- Objectives of one's own ----


def squared(real_logratios, generated_logratios, beta, target=1.0):
    return (target - beta * real_logratios) ** 2 + (beta * generated_logratios) ** 2


def other(real_logratios, generated_logratios, beta):
    return squared(real_logratios, generated_logratios, beta)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_function_of_ones_own_takes_the_place_of_loss_type(tmp_path, monkeypatch):
    given = partial(squared, target=0.5)
    trainer = play_an_identical_pair(tmp_path, monkeypatch, objective=given, beta=0.5, learning_rate=1e-4)
    assert first_losses(trainer) == [pytest.approx(0.25, abs=1e-4)]
    assert trainer.game.train.pairs[0]["identical"][0] and trainer.game.train.pairs[0]["played"][0]
    assert_objective(trainer, given, 0.5)  # row 0, of identical completions, among them


def test_a_function_of_ones_own_has_an_sft_anchor_if_asked(tmp_path):
    trainer = make_trainer(tmp_path, num_self_play_iterations=1, objective=squared, sft_weight=2.0, learning_rate=1e-4)
    trainer.train()
    rows = [trainer.game.train[i] for i in range(4)]
    num_tokens = sum(len(row["chosen_ids"]) for row in rows)
    anchors = [-2 * side_logps(trainer.model, row, "chosen")[0] / num_tokens for row in rows]
    losses = [squared(*log_ratios(trainer, row), 1.0) / 4 for row in rows]
    assert_loss_and_gradient(trainer, rows, torch.stack(losses + anchors).sum())


@pytest.mark.parametrize("options", [{"loss_type": "space"}, {"use_weighting": True}], ids=str)
def test_a_function_of_ones_own_and_an_option_in_its_place_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="`objective` takes the place of `loss_type`"):
        make_trainer(tmp_path, objective=squared, **options)


def test_a_run_goes_on_with_its_own_objective_alone(tmp_path):
    options = {"num_self_play_iterations": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    options["learning_rate"] = 1e-4
    given = partial(squared, target=0.5)
    make_trainer(tmp_path, objective=given, callbacks=[StopAt(1)], **options).train()
    for changed in (None, squared, partial(squared, target=0.25), partial(other)):
        with pytest.raises(ValueError, match=r"`objective` was .*squared.*0\.5.* and is "):
            make_trainer(tmp_path, objective=changed, **options).train(resume_from_checkpoint=True)
    resumed = make_trainer(tmp_path, objective=partial(squared, target=0.5), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


def test_another_objective_is_a_change_in_one_place(tmp_path, request):
    objective("squared", target="space_mu")(squared)
    request.addfinalizer(lambda: OBJECTIVES.pop("squared"))
    options = {"num_self_play_iterations": 1, "beta": 0.5, "learning_rate": 1e-4}
    trainer = make_trainer(tmp_path, loss_type="squared", space_mu=0.5, **options)
    trainer.train()
    assert first_losses(trainer) == [pytest.approx(0.25, abs=1e-4)]
    assert_objective(trainer, partial(squared, target=0.5), 0.5)
    with pytest.raises(ValueError, match=r"`space_mu=0.5` does nothing .* belongs to \['space', 'squared'\]"):
        make_args(tmp_path, space_mu=0.5)
    with pytest.raises(ValueError, match="`use_weighting` is an option of"):
        make_args(tmp_path, loss_type="squared", use_weighting=True)
