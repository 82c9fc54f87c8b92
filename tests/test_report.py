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

"""The report of real runs: what it shows, that it needs nothing else, and that it is there also for runs that are not."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from conftest import make_dataset, make_tokenizer, make_trainer
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import TrainerCallback

from trl_spin.__main__ import main
from trl_spin.report import card, figures
from trl_spin.report.page import write_report
from trl_spin.report.reader import read_run
from trl_spin.run.games import load_game


class Page(HTMLParser):
    """Tags with their attributes, and the text, of the HTML as a browser reads it."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.scripts = [], "", []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts.append(data)
        else:
            self.text += data


def play(output_dir, **kwargs):
    trainer = make_trainer(output_dir, **kwargs)
    trainer.train()
    (output_dir / "self_play" / "log_history.json").write_text(json.dumps(trainer.state.log_history))
    return trainer


def record(output_dir, iteration):
    return json.loads((output_dir / f"iteration-{iteration}" / "self_play.json").read_text())


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_self_contained(page):
    """Nothing comes from elsewhere, and no script but the blind game runs, whatever a model has written."""
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "iframe", "object", "embed", "base", "form"})
    game = Path(card.__file__).with_name("blind.js").read_text().strip()
    assert page.scripts in ([], [game]) and [a for tag, a in page.tags if tag == "script"] == [{}] * len(page.scripts)
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    digest = base64.b64encode(hashlib.sha256(game.encode()).digest()).decode()
    assert policy.split("; ")[3:] == [f"script-src 'sha256-{digest}'" for _ in page.scripts]
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        allowed = "#" if tag == "a" else "data:image/svg+xml;base64,"
        for name in ("src", "href", "srcset", "data", "action", "background"):
            assert attributes.get(name, allowed).startswith(allowed)
        if tag == "img":
            assert attributes["alt"]
    assert "url(" not in page.text and "@import" not in page.text


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two iterations with held-out prompts."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    play(output_dir, eval_dataset=make_dataset(5), save_strategy="epoch")
    assert write_report(output_dir) == output_dir / "report" / "report.html"
    return output_dir


@pytest.fixture
def begun(tmp_path):
    """A run that was stopped before its first opponent had completed a prompt."""

    class Stop(TrainerCallback):
        def on_epoch_begin(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, callbacks=[Stop()]).train()
    return tmp_path


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes most of the time. What is written on the page does not depend on it."""
    monkeypatch.setattr(figures, "draw_all", lambda run: ())


def test_files_of_a_finished_run(finished):
    path = finished / "report" / "report.html"
    page = Page(path)
    assert_self_contained(page)
    figures = {p.stem: matplotlib.image.imread(p) for p in path.parent.glob("*.png")}
    expected = {"training_loss", "training_margin", "iterations_accuracy-at-the-end", "lengths_train_iteration-0"}
    assert expected | {"logps_eval_iteration-1"} <= figures.keys()
    assert {p.suffix for p in path.parent.iterdir()} == {".html", ".png"}
    assert sum(tag == "img" for tag, _ in page.tags) == len(figures)
    headings = [attributes["id"] for tag, attributes in page.tags if tag == "h2"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len({*ids}) == len(ids)
    assert [f"#{heading}" for heading in headings] == [a["href"] for tag, a in page.tags if tag == "a"]
    assert {"probes", "training", "pairs-at-both-ends", "time", "summary", "lineage", "settings"} <= {*headings}
    assert "2 of 2 iterations finished" in page.text and str(finished.parent) not in page.text
    fingerprint = json.loads((finished / "self_play/iteration-1/manifest.json").read_text())["opponent"]["fingerprint"]
    assert fingerprint in page.text and "per_device_train_batch_size" in page.text


def summary(path):
    """Cells by heading and title, of the table as it is on the page."""
    table = path.read_text(encoding="utf-8").split(">Summary</h2>")[1].split("</table>")[0]
    table, rows, heading = re.sub("<small>.*?</small>", "", table), {}, None
    for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL):
        title, *cells = (html.unescape(text) for text in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL))
        heading = heading if cells else title
        rows[heading, title] = cells
    return rows


def test_numbers_are_those_of_the_run(finished):
    run, rows = read_run(finished), summary(finished / "report" / "report.html")
    records = [record(finished, t) for t in range(2)]
    keys = {
        ("Settings", "λ"): "beta",
        ("Settings", "learning rate"): "learning_rate",
        ("Training, as logged last", "margin"): "rewards/margins",
        ("Held-out prompts, after training (eval)", "accuracy"): "eval_rewards/accuracies",
        ("Held-out prompts, after training (eval)", "NLL of real completions, nats per token"): "eval_nll/real",
        ("Completions of the opponent (train)", "length of generated completions, tokens"): (
            "self_play/mean_length_generated"
        ),
        ("Completions of the opponent (eval)", "truncated"): "eval_self_play/truncated",
    }
    for row, key in keys.items():
        shown = [float(cell.strip("%")) / (100 if cell.endswith("%") else 1) for cell in rows[row]]
        assert shown == pytest.approx([r[key] for r in records], rel=2e-3, abs=6e-4), row

    history = json.loads((finished / "self_play" / "log_history.json").read_text())
    losses = [(logs["step"], logs["loss"]) for logs in history if "loss" in logs]
    assert [*run.logged("loss").items()] == losses and [*run.logged("loss", 3).index] == [4, 5, 6]
    assert [*run.logged("loss", 0, 3).index] == [1, 2, 3]
    assert run.starts == {0: 0, 1: 3}
    expected = [records[0]["eval_self_play/nll_real"], *(r["eval_nll/real"] for r in records)]
    assert run.scores(run.metric)["value"].to_dict() == dict(zip((-1, 0, 1), expected, strict=True))
    assert expected[run.best + 1] == min(expected)


def test_distributions_are_those_of_the_games(finished):
    run = read_run(finished)
    for t, iteration in enumerate(run.iterations):
        pairs = load_game(str(finished), t)["train"]
        completions = iteration.completions["train"]
        assert completions["lengths", "generated"].tolist() == [len(ids) for ids in pairs["generated_ids"]]
        # What is not played is not scored: under its name stands the real completion's log-prob
        expected = [p["ref_generated_logps"] / len(p["generated_ids"]) for p in pairs if p["played"]]
        np.testing.assert_allclose(completions["logps", "generated"].dropna(), expected, rtol=1e-6)


def test_signals_are_shown(finished, tmp_path, no_figures):
    """Probes, warnings, verdict, intervals and metrics of the user's own, where the run has left them."""
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    for t in range(3):  # the last model's completions stand with the iteration that was not played
        probes = [
            {"row": row, "prompt": f"prompt {row}", "real": "real", "generated": f"by {t}, {row}"} for row in (4, 2)
        ]
        (output_dir / f"self_play/iteration-{t}").mkdir(exist_ok=True)
        (output_dir / f"self_play/iteration-{t}/probes.json").write_text(json.dumps({"probes": probes}))
    more = {
        "eval_rewards/accuracies_low": 0.123,
        "eval_rewards/accuracies_high": 0.987,
        "eval_completions/exact_match": 0.4321,
        "warnings": ["The model runs in `loops`."],
        "verdict": "eval_nll/real 3 -> 4: hurt",
    }
    change_json(output_dir / "iteration-1" / "self_play.json", lambda content: content.update(more))
    page = Page(write_report(output_dir))
    for t in range(3):
        assert f"by {t}, 4" in page.text and f"by {t}, 2" in page.text
    assert page.text.index("prompt 4") < page.text.index("by 0, 4") < page.text.index("by 1, 4")
    assert page.text.count("prompt 4") == 1 and page.text.index("by 2, 4") < page.text.index("prompt 2")
    for shown in ("[12.3%, 98.7%]", "exact_match", "0.4321", "1: The model runs in loops.", "3 -> 4: hurt"):
        assert shown in page.text
    assert "no probes" not in page.text
    assert [i.number for i in read_run(output_dir).iterations] == [0, 1]


def test_the_verdict_comes_first(finished, tmp_path, no_figures):
    """Which model is the best, and whether that is more than noise; what is beyond a threshold is coloured."""
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)

    def verdict(*values, low=None, high=None):
        interval = {} if low is None else {"eval_nll/real_low": low, "eval_nll/real_high": high}
        for t, value in enumerate(values):
            changes = {"eval_nll/real": value, "self_play/training_time": 100.0, "self_play/empty": 0.06} | interval
            change_json(output_dir / f"iteration-{t}" / "self_play.json", lambda c, changes=changes: c.update(changes))
        page = Page(write_report(output_dir))
        return " ".join(
            page.text[page.text.index("Self-play h" if "Self-play h" in page.text else "Self-play d") :].split()
        )

    change_json(
        output_dir / "self_play/iteration-0/manifest.json",
        lambda c: c["metrics"].update({"eval_self_play/nll_real": 2.0}),
    )
    text = verdict(1.5, 1.75)
    start = "Self-play helped: the held-out NLL of the real completions went from 2.000 to 1.500 nats per token with"
    assert text.startswith(f"{start} iteration 0, the best of 2. The last model is worse, with 1.750.")
    assert "relative to this file: ../iteration-0" in text and "03:20" in text
    assert "beyond the noise (95% interval 1.4 to 1.8)" in verdict(1.5, 1.75, low=1.4, high=1.8)
    assert "within the noise (95% interval 1.4 to 2.1)" in verdict(1.5, 1.75, low=1.4, high=2.1)
    assert verdict(2.5, 2.25).startswith("Self-play did not help: the held-out NLL of the real completions was 2.000")
    beyond = re.findall('<td class="beyond">([^<]*)', (output_dir / "report" / "report.html").read_text())
    assert beyond.count("6.0%") == 2


def test_pairs_at_both_ends(finished):
    """Kept by row, with the margins of the evaluation."""
    for iteration in read_run(finished).iterations:
        margins = {example["row"]: example["margin"] for example in iteration.examples}
        assert sorted(margins) == [*range(5)] and [*margins.values()] == sorted(margins.values(), reverse=True)
        interval = [iteration.record[f"eval_rewards/margins_{end}"] for end in ("low", "high")]
        assert np.mean([*margins.values()]) == pytest.approx(np.mean(interval), rel=1e-5)
        pair = load_game(str(finished), iteration.number)["eval"][iteration.examples[0]["row"]]
        generated = make_tokenizer().decode(pair["generated_ids"], skip_special_tokens=True)
        example = iteration.examples[0]
        assert (example["prompt"], example["generated"]) == (f"Count to {example['row'] % 7 + 1}.", generated)


def test_the_blind_game(finished, tmp_path, no_figures):
    """Random held-out pairs with their margins, one real and one generated side, drawn with the run's seed."""
    again = tmp_path / "again"
    play(again, eval_dataset=make_dataset(5))
    path = "self_play/iteration-1/examples.json"
    kept, same = (json.loads((directory / path).read_text()) for directory in (finished, again))
    assert kept["blind"] == same["blind"] and {pair["real_first"] for pair in kept["blind"]} == {True, False}
    known = {example["row"]: example for example in kept["examples"]}
    assert len(kept["examples"]) == len(kept["blind"]) == 5
    assert all(pair | {"real_first": 0} == known[pair["row"]] | {"real_first": 0} for pair in kept["blind"])

    evil = "</script></button><b>x</b><script>alert(1)</script>"
    change_json(again / path, lambda content: content["blind"][0].update(real=evil, generated=" ", margin=-0.5))
    page = Page(write_report(again))
    assert_self_contained(page)
    buttons = [attributes for tag, attributes in page.tags if tag == "button"]
    assert all(attributes["type"] == "button" for attributes in buttons)
    order = [["generated", "real"][:: -1 if pair["real_first"] else 1] for pair in kept["blind"]]
    assert [attributes["value"] for attributes in buttons] == sum(order, [])
    text = page.text[page.text.index("Can you tell real from generated? 5 held-out pairs") :]
    assert evil in text and "(empty)" in text and "The model was wrong: its margin is -0.50." in text


def test_model_output_is_text(finished, tmp_path, no_figures):
    evil = "</pre></code></td><script>alert(1)</script><img src=x onerror=alert(2)><a href='http://evil.example'>&amp;"
    output_dir = tmp_path / "<b>run<x>"
    shutil.copytree(finished, output_dir)
    probe = {"row": 0, "prompt": f"P{evil}", "real": f"R{evil}", "generated": f"G{evil}\ud800\x00\x1b[31m\u202eשלום"}
    (output_dir / "self_play/iteration-0/probes.json").write_text(json.dumps({"probes": [probe]}))
    change_json(
        output_dir / "iteration-0/self_play.json", lambda c: c.update(verdict=f"V{evil}", warnings=[f"W{evil}"])
    )
    change_json(
        output_dir / "self_play/iteration-0/examples.json", lambda c: c["examples"][0].update(prompt=f"E{evil}")
    )
    change_json(output_dir / "self_play/iteration-0/manifest.json", lambda c: c["opponent"].update(model=f"M{evil}"))
    change_json(output_dir / "self_play/run.json", lambda c: c["settings"].update({f"K{evil}": f"S{evil}"}))
    page = Page(write_report(output_dir))
    assert_self_contained(page)
    for letter in "PRGVWMKSE":
        assert letter + evil in page.text
    assert "<b>run<x>" in page.text
    assert not any(c in page.text for c in "\x00\x1b\ud800\u202e")


def test_a_run_that_stopped_in_the_middle(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    make_trainer(tmp_path, callbacks=[Stop()], save_strategy="steps", save_steps=2).train()
    page = Page(write_report(tmp_path))
    assert_self_contained(page)
    assert "1 of 2 iterations finished" in page.text
    assert "Iteration 1 is not finished" in page.text and "no held-out prompts" in page.text
    run = read_run(tmp_path)
    assert [bool(i.record) for i in run.iterations] == [True, False]
    assert [*run.logged("loss").index] == [1, 2, 3, 4]
    assert (tmp_path / "report" / "training_loss.png").is_file()

    (tmp_path / "self_play" / "log_history.json").unlink()
    (shard,) = (tmp_path / "self_play/iteration-1").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-10])
    page = Page(write_report(tmp_path))
    assert "There are no curves" in page.text and f"{shard.relative_to(tmp_path)} is damaged" in page.text
    assert str(tmp_path) not in page.text
    assert {i.number: list(i.completions) for i in read_run(tmp_path).iterations} == {0: ["train"], 1: []}


def test_a_run_that_has_just_begun(begun):
    page = Page(write_report(begun))
    assert "0 of 2 iterations finished" in page.text and "No iteration has been played yet" in page.text
    (begun / "self_play/iteration-0/completions-0123").mkdir(parents=True)
    (begun / "self_play/iteration-2/completions-0123").mkdir(parents=True)  # those of the last model
    page = Page(write_report(begun))
    assert "Iteration 0 has no pairs yet" in page.text and "Iteration 2" not in page.text
    (begun / "self_play/log_history.json").write_text('[{"step": 1, "loss"')  # cut off
    assert "log_history.json cannot be read" in Page(write_report(begun)).text


def test_adapters_history_and_several_held_out_sets(tmp_path):
    play(
        tmp_path,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        eval_dataset={"b $x$": make_dataset(4), "c": make_dataset(3)},
        opponent_history=1,
        num_train_epochs=[1, 2],
    )
    page = Page(write_report(tmp_path))
    assert_self_contained(page)
    expected = {f"lengths_{name}_iteration-0.png" for name in ("train", "b-x-", "c")}
    assert expected <= {p.name for p in (tmp_path / "report").iterdir()}
    run = read_run(tmp_path)
    assert run.held_out == ["b $x$", "c"]
    # The completions of the earlier opponent belong to its own iteration
    assert [len(i.completions["train"]) for i in run.iterations] == [12, 12]
    assert run.scores("eval_c_nll/real")["value"][1] == record(tmp_path, 1)["eval_c_nll/real"]
    assert "Held-out prompts, after training (b $x$)" in page.text
    # Of several sets, pairs of the first
    assert [len(i.examples) for i in run.iterations] == [4, 4] and run.metric == "eval_b $x$_nll/real"


def test_the_style_is_the_reports_own(finished, tmp_path, monkeypatch):
    output_dir = tmp_path / "run"
    shutil.copytree(finished, output_dir)
    # One figure tells
    monkeypatch.setattr(figures, "draw_all", lambda run: [("training", "", *next(figures.draw_training(run)))])
    settings = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"figure.facecolor": "black", "savefig.facecolor": "black"}):
        path = write_report(output_dir)
    assert dict(matplotlib.rcParams) == settings
    assert matplotlib.image.imread(path.parent / "training_loss.png")[0, 0].tolist() == [1, 1, 1, 1]


@pytest.fixture
def write_card(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "get_trackio_space_url", lambda: "https://space.example?runs=1")

    def write(**changes):
        shown = {
            "model_name": "spin",
            "hub_model_id": "me/spin",
            "base_model": "org/sft",
            "revision": "v1",
            "is_adapter": True,
            "dataset_name": "org/data",
            "run_name": "run",
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Why "so"?\n'}],
            "data": "`data`, 4 prompts",
            "settings": {"seed": 0, "loss_type": ["sigmoid"]},
            "records": [],
            "rows": [],
            "tags": ["trl", "spin", "trackio:https://space.example"],
        }
        card.write_model_card(tmp_path / "README.md", **shown | changes)
        return ModelCard.load(tmp_path / "README.md")

    return write


def test_the_card_of_a_model_of_the_hub(write_card):
    written = write_card()
    assert written.data.base_model == "org/sft" and written.data.datasets == "org/data"
    assert written.data.base_model_relation == "adapter" and "licence" not in written.data.to_dict()
    tags = ["generated_from_trainer", "trl", "spin", "trackio:https://space.example"]
    assert written.data.tags == tags
    for text in (
        "fine-tuned version of [org/sft](https://huggingface.co/org/sft) on the [org/data](",
        'model="me/spin"',
        """prompt = [{'role': 'user', 'content': 'Why "so"?\\n'}]""",
        "](https://space.example?runs=1)\n\nThis model was trained with SPIN",
        "- Lineage: `org/sft` (revision `v1`)\n- Settings: seed = 0, loss_type = ['sigmoid']\n\n### Framework",
    ):
        assert text in written.text


def test_the_card_of_a_local_model_names_no_folders(tmp_path, write_card):
    (tmp_path / "sft").mkdir()
    (tmp_path / "data.jsonl").touch()
    written = write_card(
        hub_model_id=None,
        base_model=str(tmp_path / "sft"),
        dataset_name=str(tmp_path / "data.jsonl"),
        prompt="1 + 1 =",
        records=[{"iteration": 0}, {"iteration": 1}],
    )
    assert str(tmp_path) not in written.content and "fine-tuned version of `sft`" in written.text
    assert not {"base_model", "base_model_relation", "datasets"} & written.data.to_dict().keys()
    assert 'prompt = \'1 + 1 =\'\ngenerator = pipeline("text-generation", model="run/iteration-1"' in written.text


def test_command(begun, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trl-spin", "report", str(begun)])
    main()
    assert capsys.readouterr().out.strip() == str(begun / "report" / "report.html")
    monkeypatch.setattr(sys, "argv", ["trl-spin", "report", str(begun / "report")])
    with pytest.raises(SystemExit, match="holds no run"):
        main()


def test_without_matplotlib(begun):
    code = "import sys; sys.modules['matplotlib'] = None; from trl_spin.__main__ import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "report", str(begun)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.strip().endswith("The report needs matplotlib: `pip install trl-spin[report]`.")
    assert "Traceback" not in result.stderr
