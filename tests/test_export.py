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

"""Games as text: that TRL makes the tokens of the game of them, and what the files and their card say."""

import json
import sys

import pandas
import pytest
from conftest import CHATML, Scripted, make_dataset, make_model, make_tokenizer, make_trainer
from datasets import load_dataset
from jinja2 import Template
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

import trl_spin
from trl_spin import SharedPrefixDPOTrainer
from trl_spin.__main__ import main
from trl_spin.export import export_game, with_texts
from trl_spin.run import games


END = "<|im_end|>"
# By turns: one that is real where one counts to 2, one that was cut off, an empty one
WRITTEN = [f"1 2{END}", "3 <think>\n 4 5 6", END]


def play(output_dir, **kwargs):
    tokenizer = make_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in WRITTEN]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scripted, "script", lambda self, prompts: [ids[i % 3] for i in range(len(prompts))])
        make_trainer(output_dir, use_script=True, **kwargs).train()
    return str(output_dir)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two iterations, in the second of which the first opponent plays on."""
    output_dir = tmp_path_factory.mktemp("export") / "run"
    return play(output_dir, eval_dataset=make_dataset(4), opponent_history=1)


def test_a_game_with_its_texts(run):
    pairs, stored = trl_spin.load_game(run, 1), games.load_game(run, 1)["train"]
    assert all(pairs[name][:] == stored[name][:] for name in stored.column_names)
    assert pairs["opponent"][:] == [1] * 12 + [0] * 12
    for i, pair in enumerate(pairs):
        user, assistant = make_dataset()["messages"][pair["row"]]
        assert pair["prompt"] == Template(CHATML).render(messages=[user], add_generation_prompt=True)
        assert pair["real"] == assistant["content"] + END and pair["generated"] == WRITTEN[i % 3]
        assert pair["real_exact"] and pair["generated_exact"] == (not pair["truncated"])
    assert trl_spin.load_game(run, 1, "eval")["real"][1] == f"1 2{END}"
    with pytest.raises(ValueError, match=r"one of \['train', 'eval'\].*got 'test'"):
        trl_spin.load_game(run, 1, "test")
    # Nothing is left among the files of the game
    files = {path.name for path in games.game_dir(run, 1).glob("*.arrow")}
    assert files == {"train-00000.arrow", "eval-00000.arrow"}


def read(directory, tmp_path):
    return load_dataset(str(directory), cache_dir=str(tmp_path / "cache"))


def options(tmp_path, **kwargs):
    steps = {"max_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
    return {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "disable_tqdm": True, **steps, **kwargs}


def stored_ids(run):
    """Prompt, real and generated ids of the pairs of the second game, by row and opponent."""
    pairs = games.load_game(run, 1)["train"]
    return {(pair["row"], pair["opponent"]): pair for pair in pairs}


def ended(ids, tokenizer):
    """TRL ends what was cut off."""
    return ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


@pytest.mark.parametrize("trainer_class", [DPOTrainer, SharedPrefixDPOTrainer])
def test_dpo_trains_on_the_tokens_of_the_game(run, tmp_path, tokenizer, trainer_class):
    splits, game = read(export_game(run, 1), tmp_path), stored_ids(run)
    left_out = {key for key, pair in game.items() if pair["identical"] or pair["empty"]}
    rows = splits["train"]
    assert {*zip(rows["row"], rows["opponent"], strict=True)} == game.keys() - left_out and len(splits["test"]) == 4
    args, models = DPOConfig(**options(tmp_path)), [make_model(tokenizer) for _ in range(2)]
    trainer = trainer_class(*models, args=args, train_dataset=rows, processing_class=tokenizer)
    for row in trainer.train_dataset:
        pair = game[row["row"], row["opponent"]]
        assert row["prompt_ids"] == pair["prompt_ids"] and row["chosen_ids"] == pair["real_ids"]
        assert row["rejected_ids"] == ended(pair["generated_ids"], tokenizer)
        assert row["exact"] == (row["rejected_ids"] == pair["generated_ids"])
    assert {True, False} == {*rows["exact"]}
    assert trainer.train().global_step == 1


def test_kto_and_sft(run, tmp_path, tokenizer):
    game = stored_ids(run)
    rows = read(export_game(run, 1, "kto"), tmp_path)["train"]
    assert sorted(rows["label"]) == [False] * (len(rows) // 2) + [True] * (len(rows) // 2)
    args = KTOConfig(**options(tmp_path))
    trainer = KTOTrainer(
        make_model(tokenizer), make_model(tokenizer), args=args, train_dataset=rows, processing_class=tokenizer
    )
    for row in trainer.train_dataset:
        pair = game[row["row"], row["opponent"]]
        assert row["completion_ids"] == ended(pair["real_ids" if row["label"] else "generated_ids"], tokenizer)
    trainer.train()

    rows = read(export_game(run, 1, "sft"), tmp_path)["train"]
    assert rows["row"][:] == [*range(12)] and all(rows["exact"])  # the real ones of unplayed pairs as well
    args = SFTConfig(**options(tmp_path))
    trainer = SFTTrainer(make_model(tokenizer), args=args, train_dataset=rows, processing_class=tokenizer)
    for row, pair in zip(trainer.train_dataset, games.load_game(run, 1)["train"], strict=False):
        assert row["input_ids"] == pair["prompt_ids"] + pair["real_ids"]
    trainer.train()


def test_an_end_token_that_is_not_trls(tmp_path):
    """The template closes a turn with another token than `eos_token`, which TRL puts behind it."""
    play(tmp_path, tokenizer=make_tokenizer(eos_token="<eos>"), num_self_play_iterations=1)
    pairs = trl_spin.load_game(tmp_path, 0)
    assert pairs["real"][1] == f"1 2{END}" and not any(pairs["real_exact"])


def test_a_first_token_and_a_first_space(tmp_path):
    """As with SentencePiece: the tokenizer puts a token first, and a text of its own loses its first space."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "▁", "a", "b"])}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    prompt, whole = (tokenizer(text)["input_ids"] for text in ("a", "a b</s>"))
    ids = {"prompt_ids": [prompt], "real_ids": [whole[len(prompt) :]], "generated_ids": [whole[len(prompt) : -1]]}
    expected = {"prompt": "a", "real": " b</s>", "generated": " b", "real_exact": True, "generated_exact": False}
    assert with_texts(ids, tokenizer) == {name: [value] for name, value in expected.items()}


def test_the_card_says_what_is_there(run):
    directory = export_game(run, 1)
    lines = [json.loads(line) for line in (directory / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    card = (directory / "README.md").read_text(encoding="utf-8")
    table = games.load_game(run, 1)["train"].to_pandas()
    unplayed = table[~table["played"]]
    counts = [
        len(lines),
        sum(not line["exact"] for line in lines),
        len(table),
        *unplayed[["truncated", "empty"]].sum(),
    ]
    assert f"| train | {' | '.join(map(str, counts))} | {unplayed['identical'].sum()} | 0 |" in card
    fingerprint = games.read_manifest(run, 1)["opponent"]["fingerprint"]
    for text in (f"`iteration-0`, weights {fingerprint}", "by `scripted`: seed = 42, max_completion_length = 12"):
        assert text in card
    for text in ("contains the user's data", '"ranking": true, "columns": {"prompt": "prompt", "chosen"', "rl: dpo"):
        assert text in card
    assert run not in card and len(pandas.DataFrame(lines).columns) == 7


def test_command(run, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["trl-spin", "export", *arguments])
        main()

    command(run, "--iteration", "0", "--format", "sft")
    assert capsys.readouterr().out == f"{run}/export/iteration-0-sft\n"
    with pytest.raises(SystemExit, match="^0$"):
        command("--help")
    assert "--format {dpo,kto,sft}" in " ".join(capsys.readouterr().out.split())
    for arguments, message in (
        ([run, "--iteration", "7"], "The game of iteration 7 cannot be read: .*manifest.json is missing"),
        ([run, "--iteration", "0", "--format", "ppo"], "invalid choice: 'ppo'"),
        ([run], "required: --iteration"),
    ):
        with pytest.raises(SystemExit, match=f"^trl-spin: error: [^\n]*{message}[^\n]*$"):
            command(*arguments)
