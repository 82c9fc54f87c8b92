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

import pytest
import torch
from conftest import assert_loss_and_gradient, first_losses, logp, make_args, make_model, make_trainer
from peft import LoraConfig
from transformers import TrainerCallback

from trl_spin.game import load_game
from trl_spin.objectives import MARGIN_LOSSES, OBJECTIVES, t_spin
from trl_spin.spin_config import TRL_LOSSES


OWN = sorted(OBJECTIVES.keys() - TRL_LOSSES)
OPTIONS = {"space": {"space_mu": 2.0}, "gsil_brier": {"gsil_shift": 0.5}}


def side_logps(model, row, *sides):
    return [logp(model, row["prompt_ids"], row[f"{side}_ids"]) for side in sides]


@pytest.mark.parametrize("loss_type", OWN)
def test_each_objective_is_its_function_of_the_log_ratios(tmp_path, loss_type):
    options = OPTIONS.get(loss_type, {})
    trainer = make_trainer(tmp_path, loss_type=loss_type, beta=0.5, learning_rate=1e-4, **options)
    trainer.train()
    arguments = {name.split("_")[1]: value for name, value in options.items()}
    zero = torch.zeros(1)
    at_zero = OBJECTIVES[loss_type](zero, zero, 0.5, **arguments).item()
    assert first_losses(trainer) == [pytest.approx(at_zero, abs=1e-4)] * 2
    rows = [trainer.games["train"][i] for i in range(4)]
    losses = []
    for row in rows:
        real, generated = side_logps(trainer.model, row, "chosen", "rejected")
        losses.append(
            OBJECTIVES[loss_type](
                real - row["ref_chosen_logps"], generated - row["ref_rejected_logps"], 0.5, **arguments
            )
        )
    assert_loss_and_gradient(trainer, rows, torch.stack(losses).mean())
    logs = next(logs for logs in trainer.state.log_history if "loss" in logs)
    # Metrics of an objective are logged for it alone
    assert ("objective/real_accuracies" in logs) == (loss_type not in MARGIN_LOSSES)
    assert "objective/history_margins" not in logs


@pytest.mark.parametrize("loss_type", ["space", "bco_pair", "exponential"])
def test_pairs_that_are_not_played_have_no_gradient_under_any_loss(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, num_self_play_iterations=1, loss_type=loss_type, beta=0.5, learning_rate=1e-3)
    trainer.train()
    game = trainer.games["train"]
    unplayed = {**game.pairs[0][3], "played": False}
    played = [game[i] for i in range(3)]
    losses = []
    for row in played:
        real, generated = side_logps(trainer.model, row, "chosen", "rejected")
        ratios = real - row["ref_chosen_logps"], generated - row["ref_rejected_logps"]
        losses.append(OBJECTIVES["space" if loss_type == "bco_pair" else loss_type](*ratios, 0.5))
    # The loss of the unplayed pair is a constant
    real, _ = side_logps(trainer.model, game.serve(unplayed), "chosen", "rejected")
    ratio = (real - unplayed["ref_real_logps"]).detach()
    losses.append(OBJECTIVES["space" if loss_type == "bco_pair" else loss_type](ratio, ratio, 0.5))
    trainer._skip_unplayed = False
    assert_loss_and_gradient(trainer, [*played, game.serve(unplayed)], torch.stack(losses).mean())


def test_identical_answers_are_played_where_they_have_a_gradient(tmp_path, monkeypatch):
    def identical(trainer):
        real = trainer.games["train"].rows["real_ids"][:]

        def generate(*args, prompts, **kwargs):
            answers = [real[0]] + [[5, 6, i, trainer.processing_class.eos_token_id] for i in range(1, len(prompts))]
            return [
                {"prompt_ids": p, "generated_ids": a, "truncated": False}
                for p, a in zip(prompts, answers, strict=True)
            ]

        monkeypatch.setattr("trl_spin.callbacks.generate", generate)
        trainer.train()
        return trainer.games["train"].pairs[0]["played"][0]

    assert identical(make_trainer(tmp_path / "space", num_self_play_iterations=1, loss_type="space"))
    assert not identical(make_trainer(tmp_path / "sigmoid", num_self_play_iterations=1))


def test_t_spin_plays_triplets_with_the_answers_of_iteration_0(tmp_path):
    trainer = make_trainer(
        tmp_path, loss_type="t_spin", beta=1.0, t_spin_history_weight=0.3, learning_rate=1e-4, opponent_history=1
    )
    trainer.train()
    first = load_game(str(tmp_path), 0)["train"]
    rows = [trainer.games["train"][i] for i in range(4)]
    assert [row["proto_ids"] for row in rows] == first["generated_ids"][:4]
    assert any(row["proto_ids"] != row["rejected_ids"] for row in rows)
    losses = [t_spin(*side_logps(trainer.model, row, "chosen", "rejected", "proto"), 1.0, 0.3) for row in rows]
    assert_loss_and_gradient(trainer, rows, torch.stack(losses).mean())
    logs = [logs for logs in trainer.state.log_history if "objective/history_margins" in logs]
    assert logs[0]["objective/history_margins"] == 0  # in iteration 0, both answers are one
    assert logs[-1]["objective/history_margins"] != 0


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_alpha_spin_mixes_opponent_and_base_model(tmp_path, kind):
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if kind == "lora" else None
    trainer = make_trainer(tmp_path, reference_alpha=0.25, beta=1.0, learning_rate=1e-2, peft_config=lora)
    trainer.train()
    base = make_model(trainer.processing_class)  # adapters start as nothing
    pairs = load_game(str(tmp_path), 1)["train"]
    for pair in pairs.select(range(4)):
        for side in ("real", "generated"):
            expected = logp(base, pair["prompt_ids"], pair[f"{side}_ids"]).item()
            assert pair[f"base_{side}_logps"] == pytest.approx(expected, abs=1e-3)
            assert abs(pair[f"ref_{side}_logps"] - expected) > 1e-2
    rows = [trainer.games["train"][i] for i in range(4)]
    losses = []
    for row in rows:
        real, generated = side_logps(trainer.model, row, "chosen", "rejected")
        real_ref, generated_ref = (
            0.25 * row[f"ref_{side}_logps"] + 0.75 * row[f"base_{side}_logps"] for side in ("chosen", "rejected")
        )
        losses.append(torch.log1p(torch.exp(-((real - real_ref) - (generated - generated_ref)))))
    assert_loss_and_gradient(trainer, rows, torch.stack(losses).mean())
    assert first_losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert first_losses(trainer)[1] != pytest.approx(math.log(2), abs=1e-2)  # the opponent is not the reference


def test_alpha_1_is_spin_and_a_resumed_alpha_spin_is_the_same_run(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    options = {"reference_alpha": 0.5, "save_strategy": "steps", "save_steps": 1}
    straight, plain = make_trainer(tmp_path / "straight", **options), make_trainer(tmp_path / "plain")
    straight.train()
    make_trainer(tmp_path / "resumed", callbacks=[Stop()], **options).train()
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=True)
    plain.train()
    almost = make_trainer(tmp_path / "one", reference_alpha=1 - 1e-12)
    almost.train()
    for (name, p), q in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    for (name, p), q in zip(plain.model.named_parameters(), almost.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    assert any(
        not torch.equal(p, q) for p, q in zip(plain.model.parameters(), straight.model.parameters(), strict=True)
    )


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
    rows = [trainer.games["train"][i] for i in range(4)]
    losses, tokens = [], sum(len(row["chosen_ids"]) for row in rows)
    for row in rows:
        real, generated = side_logps(trainer.model, row, "chosen", "rejected")
        margin = 0.5 * (real - row["ref_chosen_logps"] - generated + row["ref_rejected_logps"])
        losses.append(torch.log1p(torch.exp(-margin)) / 4 - 2 * real / tokens)
    assert_loss_and_gradient(trainer, rows, torch.stack(losses).sum())


def test_combinations(tmp_path):
    trainer = make_trainer(tmp_path, num_self_play_iterations=1, loss_type=["space", "hinge"], loss_weights=[0.5, 2.0])
    trainer.train()
    assert first_losses(trainer) == [pytest.approx(0.5 * 2 * math.log(2) + 2.0, abs=1e-4)]


@pytest.mark.parametrize("loss_type", sorted(TRL_LOSSES - {"exo_pair", "robust"}))
def test_losses_of_dpo_trainer_keep_their_names(tmp_path, loss_type):
    make_trainer(tmp_path, num_self_play_iterations=1, loss_type=loss_type, max_steps=1).train()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"loss_type": "exponental"}, "'exponental' is unknown. Self-play has .*'exponential'.*and of .*'ipo'"),
        ({"space_mu": 2.0}, r"`space_mu=2.0` does nothing for `loss_type=\['sigmoid'\]`"),
        ({"loss_type": "space", "space_mu": 0.0}, "must be positive, got 0.0"),
        ({"loss_type": "space", "gsil_shift": 1.0}, "`gsil_shift=1.0` does nothing"),
        ({"t_spin_history_weight": 0.5}, "`t_spin_history_weight=0.5` does nothing"),
        ({"label_smoothing": 0.1}, "`label_smoothing=0.1` does nothing"),
        ({"loss_type": ["sigmoid", "sft"], "sft_weight": 1.0}, "are the same anchor"),
        ({"reference_alpha": 1.5}, "`reference_alpha` must be from 0 .* to 1, got 1.5"),
        ({"loss_type": "space", "reference_alpha": 0.5}, "cancels only in losses of the margin"),
        ({"loss_type": "space", "use_weighting": True}, "`use_weighting` is an option of"),
        ({"loss_type": "t_spin", "truncated_completions": "cut_real"}, "but not those of iteration 0"),
    ],
)
def test_options_that_do_not_apply_are_refused(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **kwargs)
