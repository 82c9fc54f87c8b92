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

"""What is measured, shown and said of a game, and when it ends."""

import itertools
import json
import random
import re
import signal
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import tqdm.std
from conftest import Scripted, callback_of, load_in_4bit, logp, make_dataset, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import ProgressCallback, TrainerCallback
from trl import SFTTrainer

from trl_spin.compare_sft import CompareSFTCallback
from trl_spin.measures import Measures
from trl_spin.pairs import PAIR_FEATURES
from trl_spin.report.page import write_report
from trl_spin.report.reader import read_run
from trl_spin.report.signals import auc, describe_game, find_warnings, proportion_interval
from trl_spin.report.tables import show_table
from trl_spin.run.files import write_json
from trl_spin.run.games import load_game, read_sft
from trl_spin.run.weights import weights_fingerprint


# ---- Numbers ----


def test_auc_is_the_share_of_pairs_in_the_right_order():
    rng = random.Random(0)
    positive, negative = ([rng.randrange(10) for _ in range(30)] for _ in range(2))
    expected = sum((p > n) + 0.5 * (p == n) for p, n in itertools.product(positive, negative)) / 900
    assert auc(positive, negative) == pytest.approx(expected)
    assert auc([2, 3], [0, 1]) == 1.0 and auc([1], [1, 1]) == 0.5


def test_intervals():
    # Wilson (1927), as in every table
    assert proportion_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert proportion_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert proportion_interval(0.0, 10)[0] == pytest.approx(0.0, abs=1e-9)


def make_pairs(real, generated, real_nll=1.0, **flags):
    return Dataset.from_list(
        [
            {
                **{"row": i, "opponent": 0, "prompt_ids": [0], "real_ids": r, "generated_ids": g},
                **{"truncated": False, "empty": False, "identical": False, "played": True, "weight": 1.0, **flags},
                **{"ref_real_logps": -real_nll * len(r), "ref_generated_logps": -1.0 * len(g)},
            }
            for i, (r, g) in enumerate(zip(real, generated, strict=True))
        ],
        features=PAIR_FEATURES,
    )


def texts(length, seed, first=None, num=100):
    rng = random.Random(seed)
    return [
        [rng.randrange(50) if first is None else first] + [rng.randrange(50) for _ in range(length - 1)]
        for _ in range(num)
    ]


def judged(pairs, **context):
    """A game with what it is judged by: unless said otherwise, nothing is wrong with its data."""
    fine = {"num_pairs": len(pairs), "limit": 8, "beyond_limit": 0.0, "fitting": 8, "text": False}
    return describe_game(pairs) | fine | {"unplayed": "identical", "nll_before": 1.0} | context


@pytest.mark.parametrize("size", [1, 2, 100])  # of a slice
def test_diversity(monkeypatch, size):
    monkeypatch.setattr("trl_spin.report.signals._SLICE", size)
    described = describe_game(make_pairs([[1, 2, 1, 2], [1], [], [1]], [[1, 2, 3, 4, 1, 2, 3, 4], [7] * 8, [5], []]))
    names = [
        f"{name}_{side}" for side in ("real", "generated") for name in ("distinct", "distinct_bigrams", "repetition")
    ]
    assert [described[name] for name in names] == pytest.approx([3 / 4, 2 / 3, 0, 1, 5 / 14, (1 / 5 + 4 / 5) / 4])


FINE, FEW = make_pairs(texts(8, 0), texts(8, 1)), make_pairs(texts(12, 0, num=6), texts(8, 1, num=6))
TRUNCATED, EMPTY = (make_pairs(texts(8, 0), texts(8, 1), **{kind: True}) for kind in ("truncated", "empty"))
UNPLAYED = make_pairs(texts(8, 0), texts(8, 1), played=False)
FILTERED = make_pairs(texts(8, 0), texts(8, 1), played=False, weight=0.0)


@pytest.mark.parametrize(
    "games, message",
    [
        ({"train": judged(FINE)}, None),
        (
            {"train": judged(make_pairs(texts(8, 0), texts(12, 1)))},
            r"Length alone .*: AUC 0.00, 8 tokens in a real one and 12 .* \(train\).\n.* raise `beta`",
        ),
        ({"train": judged(make_pairs(texts(12, 0), texts(8, 1)), nll_before=float("inf"))}, r"AUC 1.00.*\n.*starts"),
        ({"train": judged(make_pairs(texts(12, 0), texts(8, 1), truncated=True))}, r"AUC 1.00.*\n.*'cut_real'"),
        ({"train": judged(FEW)}, None),
        ({"train": judged(make_pairs(texts(8, 0, first=1), texts(8, 1)))}, r"first token alone .*AUC 0.9.*\nUsually"),
        (
            {"train": judged(TRUNCATED, beyond_limit=0.9, fitting=300), "eval": judged(TRUNCATED, beyond_limit=1.0)},
            r"^Generated completions are truncated: 100% \(train\); 100% \(eval\).\n90% .*up to 300 tokens.$",
        ),
        ({"train": judged(TRUNCATED, beyond_limit=0.1)}, r"100% \(train\).\n.*10% are longer.* does not end"),
        (
            {"train": judged(EMPTY), "eval": judged(FINE)},
            r"^Generated completions are empty: 100% \(train\).\n.*Is the",
        ),
        ({"train": judged(EMPTY, text=True)}, r"empty: .*\nThe rows are text"),
        ({"train": judged(UNPLAYED, unplayed="truncated")}, r"Few pairs are played: 0% \(train\).\n.*'drop'"),
        ({"train": judged(FILTERED, unplayed="filtered")}, r"played: 0% \(train\).\n`pair_filter` gives 100%"),
        (
            {"train": judged(make_pairs(texts(8, 0), texts(8, 1)[:1] * 100))},
            "are distinct: 1%, of the real ones 100%",
        ),
        ({"eval": judged(make_pairs(texts(8, 0), [[i] * 8 for i in range(100)]))}, r"80% of the 4-grams .*\(eval\)"),
        (
            {"eval": judged(make_pairs(texts(8, 0), texts(8, 1), real_nll=1.1))},
            r"less likely: 1.000 -> 1.100 nats per token \(eval\).\n.*overshot",
        ),
    ],
    ids="none longer shorter cut few first limit endless empty text drop filter collapse loops overshooting".split(),
)
def test_shortcuts_and_collapse_are_named_with_the_remedy(games, message):
    warnings = "\n".join(find_warnings(games))
    if message is None:
        assert not warnings
    else:
        assert re.search(message, warnings), warnings


def test_pairs_that_are_not_played_say_nothing_of_generated_completions():
    pairs = make_pairs(texts(8, 0), texts(8, 1), real_nll=2.0)
    # As the trainer stores them: twice the real completion's log-prob
    unplayed = [
        row | {"played": False, "ref_generated_logps": row["ref_real_logps"]} for row in pairs.select(range(50))
    ]
    mixed = Dataset.from_list([*unplayed, *pairs.select(range(50, 100))], features=PAIR_FEATURES)
    described = describe_game(mixed)
    assert (described["nll_real"], described["nll_generated"], described["auc_logps"]) == (2.0, 1.0, 0.0)


def test_ties_count_one_half_in_accuracies(tmp_path):
    model = make_model(make_tokenizer())
    torch.nn.init.zeros_(model.lm_head.weight)  # so that all tokens are alike, and no step changes that
    kwargs = {"learning_rate": 1e-30, "num_self_play_iterations": 1, "loss_type": "space"}
    trainer = make_trainer(tmp_path, model=model, eval_dataset=make_dataset(5), **kwargs)
    trainer.train()
    for name in ("rewards/accuracies", "objective/real_accuracies", "objective/generated_accuracies"):
        for key in (name, f"eval_{name}"):
            assert {logs[key] for logs in trainer.state.log_history if key in logs} == {0.5}
    low, high = (trainer.state.log_history[-2][f"eval_rewards/accuracies_{end}"] for end in ("low", "high"))
    assert low + high == pytest.approx(1.0)


# ---- Held-out prompts ----


def test_rows_are_held_out_by_an_option(tmp_path):
    dataset = make_dataset(20)
    trainer = make_trainer(tmp_path, dataset=dataset, held_out_size=6, max_prompts=10)
    trainer.train()
    rows = {name: game.rows["row"][:] for name, game in trainer.game.datasets.items()}
    assert len(rows["train"]) == 10 and len(rows["eval"]) == 6 and not {*rows["train"]} & {*rows["eval"]}
    for game in trainer.game.datasets.values():
        for row in game.rows:
            real = trainer.processing_class.decode(row["real_ids"])
            assert real == dataset[row["row"]]["messages"][1]["content"] + "<|im_end|>"
    logs = [logs for logs in trainer.state.log_history if "eval_rewards/accuracies" in logs]
    assert len(logs) == 2
    for name in ("accuracies", "margins"):
        low, value, high = (logs[-1][f"eval_rewards/{name}{end}"] for end in ("_low", "", "_high"))
        assert low < value + 1e-6 and value < high + 1e-6 and low < high
    with pytest.raises(ValueError, match=r"`held_out_size` \(20\) leaves nothing of the 20"):
        make_trainer(tmp_path / "all", dataset=dataset, held_out_size=20)
    with pytest.raises(ValueError, match="both say what is held out"):
        make_trainer(tmp_path / "both", dataset=dataset, held_out_size=2, eval_dataset=dataset)


@pytest.mark.parametrize(
    "option, value",
    [
        ("early_stopping", True),
        ("load_best_iteration_at_end", True),
        ("step_size_search", [0.5]),
        ("compare_sft", [1.0]),
    ],
)
def test_choosing_needs_held_out_prompts(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"`{option}={re.escape(str(value))}` needs held-out prompts"):
        make_trainer(tmp_path, **{option: value})


def test_held_out_prompts_are_completed_as_the_model_will_be_deployed(tmp_path, caplog):
    options, games, probes = {"num_self_play_iterations": 1, "eval_dataset": make_dataset(5)}, {}, {}
    kinds = {"sampled": {}, "greedy": {"temperature": 0.0}, "both": {"eval_temperature": 0.0, "beta": 0.5}}
    for kind, more in kinds.items():
        caplog.clear()
        make_trainer(tmp_path / kind, **options, **more).train()
        # Where the game does not settle
        assert ("`temperature` (1) is 1/2 or less" in caplog.text) == (kind == "both")
        assert ("`temperature` (0) is 1/2 or less" in caplog.text) == (kind == "greedy")
        games[kind] = {name: pairs["generated_ids"][:] for name, pairs in load_game(str(tmp_path / kind), 0).items()}
        probes[kind] = json.loads((tmp_path / kind / "self_play/iteration-0/probes.json").read_text())["probes"]
    assert games["both"] == {"train": games["sampled"]["train"], "eval": games["greedy"]["eval"]}
    assert games["sampled"]["eval"] != games["greedy"]["eval"]
    assert probes["both"] == probes["greedy"] != probes["sampled"]


def test_numbers_of_the_user_are_those_of_each_model(tmp_path):
    seen, dataset = [], make_dataset(5)

    def measure(prompts, completions, real):
        completions = [completion[0]["content"] for completion in completions]
        seen.append((prompts, completions, real))
        return {"length": sum(map(len, completions)) / len(completions)}

    trainer = make_trainer(
        tmp_path, eval_dataset=dataset, compute_completion_metrics=measure, num_self_play_iterations=2
    )
    trainer.train()
    tokenizer = trainer.processing_class
    assert seen[0][0][0] == dataset[0]["messages"][:1] and seen[0][2][1] == dataset[1]["messages"][1:]
    for iteration in range(2):
        generated = load_game(str(tmp_path), iteration)["eval"]["generated_ids"]
        completions = tokenizer.batch_decode(generated[:], skip_special_tokens=True)
        manifest = json.loads((tmp_path / "self_play" / f"iteration-{iteration}" / "manifest.json").read_text())
        expected = sum(map(len, completions)) / 5
        assert manifest["metrics"]["eval_completions/length"] == expected
        if iteration == 1:  # the completions of the model that iteration 0 made
            record = json.loads((tmp_path / "iteration-0" / "self_play.json").read_text())
            assert record["eval_completions/length"] == expected
            assert seen[1][1] == completions
    assert len(seen) == 3  # models
    # Of the last one, against which nothing is played, nothing is left that looks like an iteration to come
    assert not list(tmp_path.rglob("completions-*"))
    assert read_run(tmp_path).notes == []


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda prompts, completions, real: {"n": prompts == ["5?", "3?"] and completions == ["b", "a"]}, 1),
        (lambda prompts, completions, real, right: {"n": real == ["5", "3"] and right == [5, 3]}, 1),
        (lambda prompts, completions, texts, **columns: {"n": [*columns] == ["prompt", "real", "answer", "right"]}, 1),
        (lambda real, generated, right, **columns: {"n": "real" not in columns and "right" not in columns}, 1),
        (lambda *texts: {"n": len(texts)}, 3),
    ],
)
def test_a_function_of_the_user_gets_the_columns_that_it_takes(tmp_path, function, expected):
    rows = [{"prompt": f"{i}?", "real": "-", "answer": f"{i}", "right": i} for i in range(6)]
    columns = {"prompt_column": "prompt", "completion_column": "answer"}
    trainer = make_trainer(tmp_path, dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows), **columns)
    pairs = make_pairs(*(map(trainer.processing_class.encode, side) for side in (["5", "3"], ["b", "a"])))
    pairs = pairs.remove_columns("row").add_column("row", [5, 3])
    assert Measures(trainer.game, function).of_completions({"eval": pairs}) == {"eval_completions/n": expected}


def untimed(log_history):
    """What was logged, without times and what the user's function measured."""
    left_out = ("time", "second", "completions/")
    logged = [{k: v for k, v in logs.items() if not any(part in k for part in left_out)} for logs in log_history]
    return [logs for logs in logged if logs.keys() - {"step", "epoch"}]


def test_numbers_of_the_user_leave_all_others_alone(tmp_path):
    kwargs = {"eval_dataset": make_dataset(5), "logging_steps": 2}
    plain = make_trainer(tmp_path / "plain", **kwargs)
    plain.train()
    trainer = make_trainer(tmp_path / "run", compute_completion_metrics=lambda *texts: {"one": 1.0}, **kwargs)
    trainer.train()
    # Logs of the last steps against one opponent, too, and of the first ones against the next
    assert untimed(trainer.state.log_history) == untimed(plain.state.log_history)
    for iteration, last_step in enumerate((3, 6)):
        logs = next(logs for logs in trainer.state.log_history if logs["step"] == last_step and "loss" in logs)
        record = json.loads((tmp_path / "run" / f"iteration-{iteration}" / "self_play.json").read_text())
        card = (tmp_path / "run" / f"iteration-{iteration}" / "README.md").read_text()
        for name in ("rewards/accuracies", "rewards/margins"):
            assert record[name] == logs[name] != 0
            assert f"| {logs[name]:.4g} " in card


def test_a_run_with_numbers_of_the_user_can_be_resumed(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    kwargs = {"eval_dataset": make_dataset(5), "save_strategy": "steps", "save_steps": 4}
    kwargs["compute_completion_metrics"] = lambda *texts: {"length": len(str(texts[1]))}
    straight = make_trainer(tmp_path / "straight", **kwargs)
    straight.train()
    make_trainer(tmp_path / "run", callbacks=[Stop()], **kwargs).train()
    trainer = make_trainer(tmp_path / "run", **kwargs)
    trainer.train(resume_from_checkpoint=True)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, straight.model.state_dict()[name]), name
    for iteration in range(2):
        path = Path(f"iteration-{iteration}", "self_play.json")
        records = [json.loads((tmp_path / run / path).read_text()) for run in ("run", "straight")]
        assert records[0]["eval_completions/length"] == records[1]["eval_completions/length"] > 0
        record, expected = untimed(records)
        # Tokens are counted from where a run goes on
        counted = {"num_tokens": 0, "eval_num_tokens": 0, "sha256": ""}
        assert record | counted == expected | counted


# ---- Stopping and choosing ----


def test_the_game_ends_when_an_iteration_hurts_and_returns_to_the_best_model(tmp_path, caplog, capsys):
    kwargs = {"eval_dataset": make_dataset(6), "num_self_play_iterations": 4}
    trainer = make_trainer(tmp_path, **kwargs, learning_rate=1.0, early_stopping=True, load_best_iteration_at_end=True)
    start = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("iteration-*")) == ["iteration-0"]
    assert "The game ends after iteration 0: iteration 0 hurt (eval_nll/real" in caplog.text
    assert "for the model that self-play started from." in capsys.readouterr().out
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, start[name]), name
    record = json.loads((tmp_path / "iteration-0" / "self_play.json").read_text())
    assert record["verdict"].endswith("hurt")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_step_that_hurts_is_taken_back(tmp_path, kind):
    options = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if kind == "lora" else {}
    kwargs = {
        "eval_dataset": make_dataset(6),
        "learning_rate": 5.0 if options else 3.0,
        "step_size_search": [1.0],
        **options,
    }
    trainer = make_trainer(tmp_path, num_self_play_iterations=1, early_stopping=True, **kwargs)
    start = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(start[name], weight) for name, weight in trainer.model.state_dict().items())
    record = json.loads((tmp_path / "iteration-0" / "self_play.json").read_text())
    assert record["self_play/step_size"] == 0 and record["self_play/step_size_1"] > record["self_play/step_size_0"]
    assert record["self_play/step_size_0"] == trainer.state.log_history[0]["eval_self_play/nll_real"]
    assert record["eval_nll/real"] == pytest.approx(record["self_play/step_size_0"], rel=1e-6)
    assert record["verdict"].endswith("helped")  # it did not hurt


@pytest.mark.parametrize("metric", ["eval_nll/real", "eval_completions/short"])
def test_an_iteration_goes_as_far_as_held_out_data_says(tmp_path, metric):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    def short(prompts, completions, real):
        return {"short": -sum(len(message["content"]) for [message] in completions)}

    kwargs = {"eval_dataset": make_dataset(6), "learning_rate": 0.01, "step_size_search": [0.5, 1.5]}
    kwargs |= {"metric_for_best_iteration": metric, "compute_completion_metrics": short, "save_strategy": "steps"}
    straight = make_trainer(tmp_path / "straight", save_steps=1, **kwargs)
    straight.train()
    make_trainer(tmp_path / "run", save_steps=1, callbacks=[Stop()], **kwargs).train()
    resumed = make_trainer(tmp_path / "run", save_steps=1, **kwargs)
    resumed.train(resume_from_checkpoint=True)
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, straight.model.state_dict()[name]), name
    sign = 1 if metric == "eval_nll/real" else -1
    for iteration in range(2):
        record = json.loads((tmp_path / "run" / f"iteration-{iteration}" / "self_play.json").read_text())
        tried = {size: record[f"self_play/step_size_{size}"] for size in ("0", "0.5", "1", "1.5")}
        best = min(tried.values(), key=lambda number: sign * number)
        assert tried[f"{record['self_play/step_size']:g}"] == best
        assert record[metric] == pytest.approx(best, rel=1e-6) and len({*tried.values()}) > 1
        assert record["self_play/step_size"] == 1 or tried["1"] != best  # of equals, what was trained
    assert not [*tmp_path.glob("*/self_play/*/completions-*")]


def test_a_game_that_has_ended_does_not_go_on_when_it_is_resumed(tmp_path):
    kwargs = {"eval_dataset": make_dataset(6), "learning_rate": [1.0, 1e-3], "save_strategy": "epoch"}
    for _ in range(3):  # the same command
        trainer = make_trainer(tmp_path, early_stopping=True, **kwargs)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 3
        assert [path.name for path in tmp_path.glob("iteration-*")] == ["iteration-0"]
        assert [path.parent.name for path in tmp_path.glob("self_play/*/manifest.json")] == ["iteration-0"]
        kept = load_file(tmp_path / "iteration-0" / "model.safetensors")
        for name, tensor in kept.items():
            assert torch.equal(tensor, trainer.model.state_dict()[name]), name
    # Nobody had asked to keep the model that self-play started from, which turns out to be the best
    trainer = make_trainer(tmp_path, early_stopping=True, load_best_iteration_at_end=True, **kwargs)
    start = weights_fingerprint(trainer.accelerator, trainer.model)
    trainer.train(resume_from_checkpoint=True)
    assert weights_fingerprint(trainer.accelerator, trainer.model) == start
    trainer = make_trainer(tmp_path, **kwargs)  # without `early_stopping`, it does
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert (tmp_path / "iteration-1" / "self_play.json").is_file()


def test_a_damaged_best_model_is_named_and_not_loaded(tmp_path):
    class Damage(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:  # of 6
                (tmp_path / "iteration-0" / "model.safetensors").write_bytes(b"")

    kwargs = {"eval_dataset": make_dataset(6), "learning_rate": [3e-3, 1.0], "load_best_iteration_at_end": True}
    with pytest.raises(ValueError, match="iteration 0 cannot be loaded: .*model.safetensors is damaged"):
        make_trainer(tmp_path, callbacks=[Damage()], **kwargs).train()


def test_the_best_iteration_may_be_one_in_between(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trl_spin.showing._NEWEST", 1)  # of many iterations, a terminal has no room for all
    (tmp_path / "iteration-1").mkdir()  # by a run that was killed while it kept this model
    (tmp_path / "iteration-1" / "manifest.json.tmp").write_text("{")
    trainer = make_trainer(
        tmp_path,
        eval_dataset={"a": make_dataset(6), "b": make_dataset(3)},
        num_self_play_iterations=3,
        learning_rate=[3e-3, 3e-3, 1.0],
        load_best_iteration_at_end=True,
        metric_for_best_iteration="eval_a_nll/real",
        compute_completion_metrics=lambda *texts: {"one": 1.0},
    )
    trainer.train()
    out = capsys.readouterr().out
    assert "The last model is not the best one" in out.splitlines()[-3]
    assert f'from_pretrained("{tmp_path}/iteration-1")' in out.splitlines()[-2]
    table = [re.split(" *[│┃|] *", line.strip(" │┃|")) for line in out.split("Self-play so far")[-1].splitlines()]
    table = {row[0]: row[1:] for row in table}
    assert table["iteration"] == ["start", "1 (best)", "2"]
    assert table["held-out a one"] == table["held-out b one"] == ["1"] * 3
    assert table["held-out accuracy b"][0] == "" and float(table["held-out NLL b"][0]) > 1
    # Of its own completions, so that nothing is known of the last model's
    assert table["truncated"][1].endswith("%") and len(table["truncated"]) == 2
    card = (tmp_path / "README.md").read_text()
    assert "| start |" in card and "| 1 (best) |" in card and "held-out NLL b" in card
    best = load_file(tmp_path / "iteration-1" / "model.safetensors")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, best[name]), name
    assert trainer.state.log_history[-1]["self_play/best_iteration"] == 1
    values = []
    for iteration in range(3):
        record = json.loads((tmp_path / f"iteration-{iteration}" / "self_play.json").read_text())
        values.append(record["eval_a_nll/real"])
    model, pairs = trainer.model.eval(), load_game(str(tmp_path), 0)["a"]
    nll = -sum(logp(model, p["prompt_ids"], p["real_ids"]).item() for p in pairs) / sum(map(len, pairs["real_ids"]))
    assert min(values) == values[1] == pytest.approx(nll, rel=1e-4)


def test_the_game_ends_when_the_sides_cannot_be_told_apart(tmp_path, caplog):
    # Nothing is learned, so the margins are rounding errors
    trainer = make_trainer(
        tmp_path,
        eval_dataset=make_dataset(6),
        learning_rate=1e-12,
        early_stopping=True,
        metric_for_best_iteration="eval_completions/none",
        compute_completion_metrics=lambda *texts: {"none": 0.0},
    )
    trainer.train()
    assert "can no longer be told apart (accuracy between" in caplog.text
    assert sorted(p.name for p in tmp_path.glob("iteration-*")) == ["iteration-0"]


def test_a_metric_that_is_not_measured_is_named_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"'eval_nll/reel', which is not measured. There are \['eval_nll/real'\]"):
        make_trainer(
            tmp_path, eval_dataset=make_dataset(3), early_stopping=True, metric_for_best_iteration="eval_nll/reel"
        ).train()


# ---- What is shown ----


def test_probes_have_the_same_seeds_in_every_iteration(tmp_path, capsys):
    trainer = make_trainer(tmp_path, learning_rate=1e-12, num_probes=2)
    trainer.train()
    paths = [tmp_path / "self_play" / f"iteration-{t}" / "probes.json" for t in range(3)]
    probes = [json.loads(path.read_text())["probes"] for path in paths]
    assert probes[0] == probes[1] == probes[2] and len(probes[0]) == 2
    games = [load_game(str(tmp_path), t)["train"]["generated_ids"][:2] for t in range(2)]
    assert games[0] != games[1]
    out = capsys.readouterr().out.partition("Iteration 0:")[2]  # after the plan
    assert "Self-play so far" in out and "iteration 1" in out and "<|im_start|>" not in out and "user" not in out
    # The same model answers the same
    assert out.count("Count to 1.") == 3 and out.count("(unchanged)") == 2 * (0 + 1 + 2)
    assert out.count("(cut)") == 3 * sum(probe["truncated"] for probe in probes[0]) > 0


def test_an_empty_probe_is_marked(tmp_path, capsys):
    probe = {"row": 0, "prompt": "P", "real": "R", "generated": " "}
    write_json(tmp_path / "self_play" / "iteration-0" / "probes.json", {"probes": [probe]})
    make_trainer(tmp_path, num_self_play_iterations=1, num_probes=1).train()
    assert capsys.readouterr().out.count("(empty)") == 2  # once before and once after the iteration


@pytest.mark.parametrize("disable_tqdm, environment", [(True, False), (False, False), (False, True)])
def test_the_console_shows_lines(tmp_path, capsys, monkeypatch, disable_tqdm, environment):
    if environment:  # as TQDM_DISABLE does
        monkeypatch.setattr(tqdm.std.tqdm, "__init__", partialmethod(tqdm.std.tqdm.__init__, disable=True))

    class Waits(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock[0] += 1

    def script(prompts):
        clock[0] += 3600
        return [[50, 60] for _ in prompts]

    clock = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr(Scripted, "script", staticmethod(script))
    options = {"use_script": True, "eval_dataset": make_dataset(4), "num_probes": 0, "disable_tqdm": disable_tqdm}
    trainer = make_trainer(tmp_path, callbacks=[Waits()], **options)
    trainer.train()
    shown = capsys.readouterr()
    assert "self_play/" not in shown.out and "[RANK 0]" not in shown.err
    lines = [line for line in shown.out.splitlines() if line.startswith(("Iteration", "Step", "Trying", "Done"))]
    patterns = ["Trying out a few rows", "Iteration 0: 16 prompts .* played 100%", r"Step 1/6: loss 0\.6931, accuracy"]
    patterns += ["Step 2/6", "Step 3/6", r"Iteration 0, held out: NLL \d+\.\d{3}, accuracy", "Iteration 1: 16 prompts"]
    for line, pattern in zip(lines, patterns, strict=False):
        assert re.match(pattern, line), line
    assert lines[-1].startswith("Done.")
    logged = next(logs for logs in trainer.state.log_history if "self_play/iteration" in logs)
    assert {"self_play/mean_length_real", "self_play/generation_time"} <= logged.keys()
    # The clock of the bar does not run while the opponent plays
    bars = re.findall(r"Iteration 1: .*?(\d)/6 \[(.*?)<(.*?),", shown.err)
    assert bool(bars) == (not disable_tqdm and not environment) and all(
        int(a[-2:]) < 10 and len(a + b) < 11 for _, a, b in bars
    )


def test_only_the_progress_that_the_trainer_attached_is_replaced(tmp_path, capsys):
    class Own(ProgressCallback):
        pass

    trainer = make_trainer(tmp_path, callbacks=[Own()], disable_tqdm=False, num_self_play_iterations=1, num_probes=0)
    trainer.remove_callback(Own)
    trainer.remove_callback(ProgressCallback)
    trainer.train()
    assert "Step 1" not in capsys.readouterr().out


def test_model_output_is_text_in_tables(monkeypatch, capsys):
    rows = [["prompt", "completion"], ["[bold]x[/bold] [link=http://a]b[/link]", "\x1b[31mred\x07 :smile:"]]
    show_table("[red]title", rows)
    out = capsys.readouterr().out
    for text in ("[red]title", "[bold]x[/bold]", ":smile:"):
        assert text in out
    assert "\x07" not in out and "\x1b[31m" not in out


def test_what_was_logged_lies_beside_the_games(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model(make_tokenizer()))
    trainer.train()
    history = json.loads((tmp_path / "self_play" / "log_history.json").read_text())
    assert history == trainer.state.log_history


# ---- SFT with the same compute ----


@pytest.mark.parametrize("adapter", [False, True])
def test_sft_with_the_same_compute_stands_beside_self_play_and_changes_nothing_of_it(tmp_path, adapter, capsys):
    kwargs = {"eval_dataset": make_dataset(5), "num_train_epochs": [2, 1], "opponent_history": 1, "num_probes": 0}
    kwargs |= {"compute_completion_metrics": lambda *texts: {"length": len(str(texts[1]))}, "save_strategy": "epoch"}
    if adapter:
        make_model(make_tokenizer(), hidden_size=64).save_pretrained(tmp_path / "start")
        kwargs |= {"peft_config": LoraConfig(target_modules="all-linear"), "bf16": True}

    def make(directory, **options):
        model = load_in_4bit(tmp_path / "start") if adapter else None
        return make_trainer(directory, model=model, share_prefix=adapter, **kwargs | options)

    plain, run = make(tmp_path / "plain"), tmp_path / "run"
    plain.train()
    trainer = make(run, compare_sft=[1e-2, 1e-4])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        step, steps = SFTTrainer.training_step, itertools.count()  # the signal comes in the second arm

        def training_step(arm, *args, **kwargs):
            if arm.args.learning_rate == 1e-4 and next(steps) == 2:
                arm.stop.signum = signal.SIGTERM
            return step(arm, *args, **kwargs)

        patch.setattr(SFTTrainer, "training_step", training_step)
        trainer.train()

    def unchanged():
        found = weights_fingerprint(trainer.accelerator, trainer.model)
        return found == weights_fingerprint(plain.accelerator, plain.model)

    assert unchanged() and untimed(trainer.state.log_history) == untimed(plain.state.log_history)
    assert not read_sft(run)
    trainer = make(run, compare_sft=[1e-4, 1e-2])
    trainer.train(resume_from_checkpoint=True)
    assert unchanged()
    arms = read_sft(run)
    assert [arm["learning_rate"] for arm in arms] == [1e-2, 1e-4] and arms[1]["eval_completions/length"] > 0
    start = trainer.best_iteration.best_metric.values(1)[-1]
    assert arms[0]["eval_nll/real"] < arms[1]["eval_nll/real"] < start
    # Twice the FLOPs of a forward pass for the backward one, half of it where weights are not trained
    cost, forwards = 0, 2 if adapter else 3
    for iteration, passes in enumerate((2, 1)):
        lengths = [
            [len(pair[f"{s}_ids"]) for s in ("prompt", "real", "generated")]
            for pair in load_game(str(run), iteration)["train"]
        ]
        computed = [(1 if adapter else 2) * prompt + real + generated for prompt, real, generated in lengths]
        cost += sum(prompt + generated for prompt, _, generated in lengths[:12]) + sum(computed)
        cost += forwards * passes * sum(computed) / (iteration + 1)
    tokens = sum(prompt + real for prompt, real, _ in lengths[:12])
    assert arms[0]["num_train_epochs"] == pytest.approx(cost / forwards / tokens, abs=0.01)
    assert arms[0]["steps"] == round(3 * cost / forwards / tokens)
    for text in ((run / "README.md").read_text(), write_report(run).read_text()):
        assert "SFT instead, 0.01<" in text.replace(" |", "<")
    assert "with the best of 2 learning rates (0.01)" in capsys.readouterr().out
    assert (
        not {path.name for path in run.iterdir()} - {path.name for path in (tmp_path / "plain").iterdir()} - {"report"}
    )
    # Measured as iterations are, on the rows that they were played on
    callback = callback_of(trainer, CompareSFTCallback)
    record = json.loads((run / "iteration-1" / "self_play.json").read_text())
    measured = trainer.self_play.measure(1)
    assert measured["eval_nll/real"] == pytest.approx(record["eval_nll/real"], rel=1e-2 if adapter else 1e-5)
    row, pair = callback.count_passes(1)[0][3], load_game(str(run), 0)["train"][3]
    assert row["input_ids"] == pair["prompt_ids"] + pair["real_ids"]
    assert [label for label in row["labels"] if label != -100] == pair["real_ids"]
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="does not work with DeepSpeed and FSDP"):
        trainer._attach_callbacks(type(trainer.self_play.engine), None)
