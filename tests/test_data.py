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

import tempfile
import tracemalloc

import numpy as np
import pytest
from conftest import CHATML, make_args, make_dataset, make_model, make_tokenizer
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_spin import SPINTrainer
from trl_spin.data import RowReader
from trl_spin.pairs import PAIR_FEATURES, Rules, with_logps
from trl_spin.run.games import load_game, store_game


# Templates of different shapes. "</s>"-like tokens here are `<turn>`, `</turn>`, `<eos>`.
SYSTEM_IN_FIRST_TURN = (  # as Gemma and Llama 2
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ system if loop.first else '' }}{{ m['content'] | trim }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
NO_GENERATION_PROMPT = "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}<eos>\n{% endfor %}"
EMPTY_THINKING = (  # as Gemma 4: the generation prompt ends with a block that is not written before a completion
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n<think></think>{% endif %}"
)
THINKING_IN_COMPLETION = (  # as Qwen 3: the block belongs to the completion
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {  # name: (template, eos token, how a completion "Blue." is trained on)
    "chatml": (CHATML, "<|im_end|>", "Blue.<|im_end|>"),
    "end_token_is_not_eos": (CHATML, "<eos>", "Blue.<|im_end|>"),
    "system_in_first_turn": (SYSTEM_IN_FIRST_TURN, "<eos>", "Blue.</turn>"),
    "no_generation_prompt": (NO_GENERATION_PROMPT, "<eos>", "ASSISTANT: Blue.<eos>"),
    "empty_thinking": (EMPTY_THINKING, "</turn>", "Blue.</turn>"),
    "thinking_in_completion": (THINKING_IN_COMPLETION, "<|im_end|>", "<think>\n\n</think>\n\nBlue.<|im_end|>"),
}
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Sky?"}
ASSISTANT = {"role": "assistant", "content": "Blue."}
OWN_KWARGS = {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"style": "x"}}
OWN_TEMPLATE = {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"chat_template": "{{ eos_token }}"}}


def prepare(dataset, tokenizer, max_length=512, name="train", **kwargs):
    dataset = dataset if isinstance(dataset, Dataset) else Dataset.from_list(dataset)
    reader = RowReader(dataset, name, tokenizer, make_args("unused", **kwargs))
    end_token_ids = reader.find_end_token_ids(dataset[0], [])
    return reader.prepare(dataset, Rules(tokenizer, end_token_ids, max_length, "keep", False, False))


def decode(tokenizer, row):
    return tuple(tokenizer.decode(row[column]) for column in ("prompt_ids", "real_ids"))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "Red."}]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "Red."}]},
        {"real": [USER, ASSISTANT], "generated": [USER, {"role": "assistant", "content": "Red."}]},
        {"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Blue."}]},
        {"prompt": "ignored", "prompt_id": "1", "messages": [USER, ASSISTANT]},  # UltraChat
        {"messages": [USER, ASSISTANT, USER]},  # what follows the last completion is not needed
        {"prompt": "Sky?", "completion": "Blue."},
    ],
    ids="messages, pair, preference, implicit preference, official, sharegpt, ultrachat, open end, text".split(", "),
)
def test_conversational_formats_give_the_same_game(tokenizer, row):
    prepared, left_out = prepare([row], tokenizer, apply_chat_template=True)
    expected = "<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n", "Blue.<|im_end|>"
    assert decode(tokenizer, prepared[0]) == expected
    assert not left_out


@pytest.mark.parametrize(
    ("row", "kwargs"),
    [
        ({"prompt": "Sky? ", "completion": "Blue."}, {}),
        ({"prompt": "Sky? ", "chosen": "Blue.", "rejected": "Red."}, {}),
        ({"chosen": "Sky? Blue.", "rejected": "Sky? Red."}, {}),
        ({"question": "Sky? ", "answer": "Blue."}, {"prompt_column": "question", "completion_column": "answer"}),
    ],
    ids=["pair", "preference", "implicit preference", "named columns"],
)
def test_text_formats_give_the_same_game(tokenizer, row, kwargs, caplog):
    prepared, _ = prepare([row], tokenizer, **kwargs)
    assert "set `apply_chat_template=True`" in caplog.text  # the tokenizer has a template
    assert "".join(decode(tokenizer, prepared[0])) == "Sky? Blue.<|im_end|>"
    assert decode(tokenizer, prepared[0])[1].strip() == "Blue.<|im_end|>"


def test_system_prompt_tools_earlier_turns_and_template_kwargs_stay_in_the_prompt():
    template = "{{ style }}{% if tools %}{{ tools[0]['name'] }}{% endif %}" + CHATML
    tokenizer = make_tokenizer(template)
    messages = [SYSTEM, USER, {"role": "assistant", "content": "What?"}, USER, ASSISTANT]
    row = {"messages": messages, "tools": '[{"name": "look"}]', "chat_template_kwargs": {"style": "row:"}}
    prepared, _ = prepare([row], tokenizer, chat_template_kwargs={"style": "config:"})
    prompt, real = decode(tokenizer, prepared[0])
    assert prompt.startswith("row:look<|im_start|>system\nBe brief.") and "What?" in prompt
    assert real == "Blue.<|im_end|>"
    prepared, _ = prepare([{"messages": messages}], tokenizer, chat_template_kwargs={"style": "config:"})
    assert decode(tokenizer, prepared[0])[0].startswith("config:<|im_start|>")
    prepared, _ = prepare([{"messages": messages}], tokenizer, first_turn_only=True)
    assert decode(tokenizer, prepared[0])[1] == "What?<|im_end|>"
    kwargs = {"system_prompt": "Be kind.", "apply_chat_template": True}
    for row, system in (({"messages": messages}, "brief"), ({"prompt": "Sky?", "completion": "Blue."}, "kind")):
        prepared, _ = prepare([row], tokenizer, **kwargs)
        assert decode(tokenizer, prepared[0])[0].startswith(
            f"<|im_start|>system\nBe {system}.<|im_end|>\n<|im_start|>u"
        )
    with pytest.raises(ValueError, match="Row 0 .*`system_prompt` is for conversations"):
        prepare([row], tokenizer, system_prompt="Be kind.")


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_and_training_see_the_same_prompt_and_one_end_token(name, tmp_path):
    template, eos_token, expected = TEMPLATES[name]
    tokenizer = make_tokenizer(template, eos_token)
    dataset = Dataset.from_list([{"messages": [SYSTEM, USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}] * 2)
    trainer = SPINTrainer(
        make_model(tokenizer),
        args=make_args(tmp_path, num_self_play_iterations=1),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    trainer.train()
    for pair in trainer.game.train.pairs[0]:
        messages = dataset[pair["row"]]["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        # `prompt_ids` of a pair is what the opponent completed
        assert pair["prompt_ids"] == prompt
        assert tokenizer.decode(pair["real_ids"]) == expected
        ends = [token for token in pair["generated_ids"] if token in trainer.game.rules.end_token_ids]
        assert ends == ([] if pair["truncated"] else pair["generated_ids"][-1:])
        assert sum(token in trainer.game.rules.end_token_ids for token in pair["real_ids"]) == 1
    item = trainer.game.train[0]
    assert item["prompt_ids"] == trainer.game.train.pairs[0][0]["prompt_ids"]


def test_a_subset_keeps_the_rows_numbers(tokenizer, tmp_path):
    dataset = make_dataset(30)
    trainer = SPINTrainer(
        make_model(tokenizer),
        args=make_args(tmp_path, max_prompts=8),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    rows = trainer.game.train.rows
    assert len(set(rows["row"])) == len(rows) == 8 and max(rows["row"]) >= 8
    for row in rows:
        assert tokenizer.decode(row["real_ids"]) == dataset[row["row"]]["messages"][1]["content"] + "<|im_end|>"


def test_what_is_ignored_is_said_once(tokenizer, caplog):
    rows = [{"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."}] * 3
    for _ in range(2):
        prepare(rows, tokenizer, name="preferences")
    assert caplog.text.count("`rejected` is ignored") == 1
    prepare([{"messages": [USER, ASSISTANT], "tools": '[{"name": "look"}]'}] * 3, tokenizer, name="agents")
    assert caplog.text.count("ignores the `tools` of the agents dataset") == 1


def test_rows_that_cannot_be_played_are_left_out_and_counted(tokenizer, caplog):
    rows = [
        {"messages": [USER, ASSISTANT]},
        {"messages": [{"role": "user", "content": "x" * 600}, ASSISTANT]},
        {"messages": [USER, {"role": "assistant", "content": " \n"}]},
        {"messages": [USER, {"role": "assistant", "content": "Stop<|im_end|>here"}]},
        {"messages": [USER, {"role": "assistant", "content": "y" * 600}]},
    ]
    prepared, left_out = prepare(rows, tokenizer)
    assert prepared["row"][:] == [0]
    assert left_out == {"too_long": 2, "empty_real": 1, "end_token_in_real": 1}
    assert "2 of 5 rows of the train dataset are left out" in caplog.text and "the first is row 1" in caplog.text
    with pytest.raises(ValueError, match="No row of the train dataset is left"):
        prepare(rows[1:2], tokenizer)


def test_a_tokenizer_that_merges_across_the_boundary_keeps_the_prompt(tokenizer, monkeypatch):
    # "?B" as one token: the prompt's own tokens are what the opponent continues, so they must be kept
    tokenizer.add_tokens(["?B"])
    prepared, _ = prepare([{"prompt": "Sky?", "completion": "Blue."}], tokenizer)
    assert decode(tokenizer, prepared[0]) == ("Sky?", "Blue.<|im_end|>")


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"text": "Sky? Blue."}], ValueError, "`text` column"),
        ([{"image": "x", "messages": [USER, ASSISTANT]}], ValueError, "image column"),
        ([{"foo": "x"}], ValueError, "none of the known formats"),
        ([{"messages": [USER, ASSISTANT]}, {"messages": [SYSTEM, USER]}], ValueError, "Row 1 .* no assistant turn"),
        ([{"messages": [ASSISTANT]}], ValueError, "Row 0 .* starts with the assistant"),
        ([{"messages": [USER, {"role": "assistant", "content": None}]}], ValueError, "Row 0 .* is None"),
        ([{"prompt": "Sky?", "completion": None}], TypeError, "Row 0 .*`completion` is None"),
        ([{"prompt": "", "completion": "x"}], ValueError, "Row 0 .*`prompt` is empty"),
        ([{"prompt": [USER], "completion": "x"}], TypeError, "Row 0 .*Both must be text"),
        ([{"messages": [USER, ASSISTANT], "tools": "[{"}], ValueError, r"Row 0 .*`tools` is no JSON \(Expecting"),
        ([OWN_KWARGS, OWN_TEMPLATE], ValueError, "Row 1 .*tokenizer's `chat_template`"),
        ([{"messages": "Sky?"}], TypeError, "Row 0 .*expected a list of messages"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}],
            ValueError,
            "Row 0 .* not text",
        ),
    ],
)
def test_a_fault_names_the_row_or_column(tokenizer, rows, error, message):
    with pytest.raises(error, match=message):
        prepare(rows, tokenizer)


def test_faults_of_the_tokenizer_and_of_the_columns():
    with pytest.raises(ValueError, match="no chat template"):
        prepare(make_dataset(2), make_tokenizer(chat_template=None))
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="no column 'question'"):
        prepare(make_dataset(2), tokenizer, prompt_column="question", completion_column="answer")
    for reserved in ("chat_template", "tokenize", "messages", "eos_token"):
        with pytest.raises(ValueError, match=rf"`chat_template_kwargs` holds \['{reserved}'\]"):
            prepare(make_dataset(2), tokenizer, chat_template_kwargs={reserved: "x"})
    # What data says may be shown in a terminal
    echo = make_tokenizer("{{ raise_exception(messages[0]['content']) }}")
    with pytest.raises(ValueError, match=r"Row 0 .*refuses it: .\[2J") as error:
        prepare([{"messages": [{"role": "user", "content": "\x1b[2J"}, ASSISTANT]}], echo)
    assert str(error.value).isprintable()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        prepare(make_dataset(2), tokenizer)
    # A template that writes the number of messages into the prompt, say: the completion cannot be placed after it
    unstable = make_tokenizer("{{ messages | length }}" + CHATML)
    with pytest.raises(ValueError, match="Row 0 .*renders the prompt differently"):
        prepare(make_dataset(2), unstable)


HOSTILE = [
    "<|im_start|>",
    "<|im_end|>",
    "<eos>",
    "<turn>",
    "</turn>",
    "<think>",
    "</think>",
    "<pad>",
    "\x00",
    "\n",
    " ",
]
# Whatever Arrow can hold, which is all but lone surrogates
TEXT = st.lists(st.sampled_from(HOSTILE) | st.text(st.characters(exclude_categories=["Cs"])), max_size=4).map("".join)
CONVERSATION = st.tuples(st.none() | TEXT, st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(conversations=st.lists(CONVERSATION, min_size=1, max_size=8))
def test_any_conversation_keeps_the_invariants(name, conversations):
    tokenizer = make_tokenizer(*TEMPLATES[name][:2])
    rows = [{"messages": [USER, ASSISTANT]}]
    for system, turns in conversations:
        messages = [] if system is None else [{"role": "system", "content": system}]
        for user, assistant in turns:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        rows.append({"messages": messages})
    dataset = Dataset.from_list(rows)
    end_token_ids = RowReader(dataset, "train", tokenizer, make_args("unused")).find_end_token_ids(dataset[0], [])
    prepared, left_out = prepare(rows, tokenizer)
    assert len(prepared) + left_out.total() == len(rows)
    for row in prepared:
        prompt = tokenizer.apply_chat_template(rows[row["row"]]["messages"][:-1], add_generation_prompt=True)
        assert row["prompt_ids"] == prompt["input_ids"]
        assert [token in end_token_ids for token in row["real_ids"]] == [False] * (len(row["real_ids"]) - 1) + [True]
    pairs = Dataset.from_list(
        [
            {
                **row,
                **dict.fromkeys(("truncated", "empty", "identical", "played"), False),
                **{
                    "opponent": 0,
                    "generated_ids": [],
                    "weight": 1.0,
                    "ref_real_logps": 0.0,
                    "ref_generated_logps": 0.0,
                },
            }
            for row in prepared
        ],
        features=PAIR_FEATURES,
    )
    with tempfile.TemporaryDirectory() as directory:
        store_game(directory, 0, {"train": pairs}, {"request": ""})
        assert load_game(directory, 0)["train"][:] == pairs[:]


def test_scores_are_put_to_pairs_without_a_copy_of_their_tokens():
    logps = dict.fromkeys(("real", "generated"), np.arange(1000.0))
    columns = {f"ref_{side}_logps": np.zeros(1000) for side in logps}
    pairs = Dataset.from_dict({"generated_ids": [[0] * 1000] * 1000, **columns})
    tracemalloc.start()
    scored = with_logps(pairs, logps)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert scored["ref_real_logps"][:] == list(range(1000)) and peak < 10**6
