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

"""The study in `benchmarks/evidence/`: every script, with tiny models and few rows."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import make_model, make_tokenizer


STUDY = Path(__file__).parent.parent / "benchmarks" / "evidence"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Sizes of the study's scripts, and a short start for all of them."""
    monkeypatch.syspath_prepend(STUDY)
    import subset_sums

    options = Namespace(stage="validate", rounds=2, start_rows=512, output_dir=tmp_path)
    monkeypatch.setattr(subset_sums, "options", options, raising=False)

    def shrink(module, **values):
        monkeypatch.setattr(module, "options", options, raising=False)
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
        return module

    return shrink


def test_all_arms_get_the_same_compute(study, monkeypatch, tmp_path):
    import common
    import subset_sums

    arms = ["more SFT", "rejection sampling", "self-play", "verified self-play"]
    study(subset_sums, PROMPTS=64, BATCH=32, quiet=lambda: None)
    vars(subset_sums.options).update(arms=arms, rates=[1e-3], num_held_out=16)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    subset_sums.main()
    results = {row["arm"]: row for row in common.read("subset_sums_validate")}
    assert [*results] == ["start", *arms] and all(0 <= row["right at 1"] <= 1 for row in results.values())
    # The completions of an untrained model are as long as they may be, and wrong
    flops = {arm: row["flops"] for arm, row in results.items()}
    assert flops["more SFT"] == pytest.approx(flops["self-play"], rel=0.1)
    assert flops["verified self-play"] == pytest.approx(flops["self-play"], rel=0.1)
    assert 0 == flops["start"] < flops["rejection sampling"]
    subset_sums.main()  # what is there is not run again
    assert len(common.read("subset_sums_validate")) == 5


def few(make, num_rows=16):
    """Makes fewer rows than asked for."""
    return lambda wanted, seed: make(min(wanted, num_rows), seed)


def test_few_rows(study):
    import few_rows

    study(few_rows, NUM_ROWS=16, BATCH=8, make_rows=few(few_rows.make_rows))
    study(few_rows, best_sft=lambda seed: few_rows.start().model.state_dict())  # which would take many passes
    assert few_rows.is_fine("5 1 3 7 9 = 9 :", "1 3 5") and not few_rows.is_fine("5 1 3 7 9 = 9 :", "3 1 5")
    results = {arm: few_rows.run(arm, 1e-3, seed=0) for arm in ["start", *few_rows.ARMS]}
    start = results.pop("start")
    assert len(results) == 5 and all(abs(row["nll"] - start["nll"]) > 1e-3 for row in results.values())
    assert start["flops"] == 0 < results["self-play, λ = 5"]["flops"]


def test_retention(study):
    import retention

    rows = {"make_rows": few(retention.make_rows), "make_new_rows": few(retention.make_new_rows, 32)}
    study(retention, PROMPTS=16, BATCH=8, **rows)
    for arm in retention.ARMS:
        result = retention.run(arm, 1e-3, seed=0)
        assert len(result["curve"]) == 3 and len({point["new nll"] for point in result["curve"]}) == 3
    curve = [{"new": 0.0, "old": 0.9}, {"new": 0.4, "old": 0.7}, {"new": 0.8, "old": 0.3}]
    assert retention.old_at(curve, 0.6) == pytest.approx(0.5) and retention.old_at(curve, 0.9) is None


def test_what_the_paper_says(study):
    import paper

    study(paper, NUM_ROWS=32, NUM_HELD_OUT=16)
    arms = ["more SFT", "4 iterations", "4 iterations, history", "1,500 rows"]
    results = {arm: paper.run(arm, 1e-3, seed=0) for arm in arms}
    assert [len(result["curve"]) for result in results.values()] == [2, 5, 5, 2]
    assert len({json.dumps(result["curve"][0]) for result in results.values()}) == 1  # one start for all
    assert len({result["nll"] for result in results.values()}) == len(arms)
    assert results["more SFT"]["flops"] == pytest.approx(results["4 iterations"]["flops"], rel=0.25)


def test_a_real_model_and_what_the_probe_says_of_it(study, tmp_path):
    import probes
    import smollm2

    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = " ".join(
        f"The farmer sold {i} apples at the market today. Every basket of pears weighs {i} pounds." for i in range(9)
    )
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": text}))
    # SFT to the lowest NLL would take many passes
    study(smollm2, NUM_TEST=4, NUM_HELD_OUT=4, NUM_ROWS=8, MAX_COMPLETION_LENGTH=44, start=lambda: tmp_path / "model")
    vars(smollm2.options).update(model=str(tmp_path / "model"), data=tmp_path / "train.jsonl")
    assert smollm2.is_right("Words: apples, sold\nSentence:", " Sold: two apples.")
    assert not smollm2.is_right("Words: apples, sold\nSentence:", " Apples are sold")
    arms = ("start", "more SFT", "self-play", "verified self-play", "rejection sampling")
    results = {arm: smollm2.run(arm, 1e-2, 1) for arm in arms}
    assert len({row["nll"] for row in results.values()}) == 4
    # No completion of such a model is right: what plays verified plays all of them
    assert results["self-play"] == results["verified self-play"]
    assert results["more SFT"]["flops"] == pytest.approx(results["self-play"]["flops"], rel=0.15)
    assert probes.sentences(pair_filter=smollm2.wrong_ones)["kept"][0] == 1.0
    assert probes.CASES.keys() > {"B, verified", "G, verified"}
