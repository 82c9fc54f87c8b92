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

"""From SFT rows to token ids: which rows are used, what is the prompt and what the real completion."""

import inspect
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import extract_prompt

from .pairs import IDS, Rules
from .report.tables import printable
from .run.logs import logger
from .spin_config import OPTIONS, SPINConfig


_FEATURES = Features({"row": Value("int64"), "prompt_ids": IDS, "real_ids": IDS, "left_out": Value("string")})
# Why a row is left out before generation
LEFT_OUT = {
    "too_long": "prompt and real completion do not fit `max_length`",
    "empty_real": "the real completion is empty",
    "end_token_in_real": "the real completion contains an end token, where generation would stop",
}
# Known formats, of which the first that fits is taken: the columns that it needs, that of the prompt (`None`: it is
# part of the other one's conversation), that of the real completion, and that of other completions
_FORMATS = (
    ({"messages"}, None, "messages", None),
    ({"conversations"}, None, "conversations", None),
    ({"prompt", "completion"}, "prompt", "completion", None),
    ({"real"}, None, "real", "generated"),
    ({"chosen"}, "prompt", "chosen", "rejected"),
)
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# The template, and what is given to it by us: data must replace none of it
_RESERVED = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
_RESERVED -= {"tools", "documents", "sanitize_control_tokens"}
_RESERVED |= {*PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES}
# Stands for a turn's content, to find out what the chat template writes before and after it
_PROBE = "probe7c1f9a"
_PROBE_TURN = {"role": "assistant", "content": _PROBE}


def hold_out(
    train_dataset: Dataset | None, eval_dataset: Dataset | dict[str, Dataset] | None, args: SPINConfig, measures: bool
) -> tuple[Dataset | dict[str, Dataset] | None, dict[str, list[int]]]:
    """
    What is held out, and the rows of the datasets that are used, if not all of them.

    Args:
        train_dataset ([`~datasets.Dataset`]):
            Training data.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Held-out data.
        args ([`SPINConfig`]):
            `held_out_size`, `max_prompts`, `prompts_per_iteration`, `seed`, and the options that need held-out data.
        measures (`bool`):
            Whether `compute_completion_metrics` is given, which needs held-out data as well.

    Returns:
        `tuple`: Held-out data, and indices of rows by name of the dataset.

    Raises:
        `ValueError` or `TypeError`: If a dataset cannot be used, or two options say what is held out.
    """
    if train_dataset is None:
        raise ValueError("`train_dataset` is required: the SFT data whose completions the model learns to prefer.")
    held_out = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name in held_out:
        fits = str(name).isprintable() and 0 < len(str(name).encode()) <= 100  # files add a checksum to it
        if not fits or Path(str(name)).name != name or name in ("train", ".."):
            what = f"An evaluation dataset cannot be called {name!r}: its files get this name"
            raise ValueError(f"{what}. Choose one of up to 100 printable bytes, without a slash, and not 'train'.")
    for name, dataset in {"train": train_dataset, **(held_out if eval_dataset is not None else {})}.items():
        if not isinstance(dataset, Dataset):
            what = f"The {name} dataset must be a `datasets.Dataset`, got {type(dataset).__name__}"
            remedy = "cannot be streamed, as all prompts are completed before training: load it with `streaming=False`"
            raise TypeError(f"{what}. It {remedy}.")
        if len(dataset) == 0:
            raise ValueError(f"The {name} dataset is empty.")
    subsets, rows, size = {}, range(len(train_dataset)), args.held_out_size
    if size:
        if eval_dataset is not None:
            raise ValueError(f"`held_out_size={size}` and `eval_dataset` both say what is held out: give one of them.")
        if size >= len(rows):
            raise ValueError(f"`held_out_size` ({size}) leaves nothing of the {len(rows)} training rows.")
        eval_dataset, shuffled = train_dataset, random.Random(args.seed).sample(rows, len(rows))
        rows = sorted(shuffled[size:])
        subsets = {"eval": sorted(shuffled[:size]), "train": rows}
    if args.prompts_per_iteration or (args.max_prompts or len(rows)) < len(rows):
        # Those of an iteration lie next to each other
        subsets["train"] = random.Random(args.seed).sample(rows, min(args.max_prompts or len(rows), len(rows)))
    options = {name: getattr(args, name) for name in OPTIONS["held_out"]}
    needed_by = [f"{name}={value}" for name, value in options.items() if value]
    if measures:
        needed_by.append("compute_completion_metrics")
    if needed_by and eval_dataset is None:
        raise ValueError(f"`{needed_by[0]}` needs held-out prompts: pass an `eval_dataset`, or set `held_out_size`.")
    return eval_dataset, subsets


class RowReader:
    """
    Reads the rows of a dataset: texts or conversations, with prompt and real completion in one column or in two.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset, which the reader does not keep: its columns tell the format.
        name (`str`):
            Name of the dataset in messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, with a chat template if the rows are conversations.
        args ([`SPINConfig`]):
            Names of the columns, if they are not known ones, `first_turn_only`, `apply_chat_template`,
            `system_prompt`, and `chat_template_kwargs`, over which those of a row take precedence.

    Raises:
        `ValueError`: If the columns are of no format; the message says what to do.
    """

    def __init__(self, dataset: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, args: SPINConfig):
        self.name, self.tokenizer, self.first_turn_only = name, tokenizer, args.first_turn_only
        self.apply_chat_template, self.system_prompt = args.apply_chat_template, args.system_prompt
        self.chat_template_kwargs = _check_template_kwargs(args.chat_template_kwargs or {})
        columns = dataset.column_names
        if {"image", "images"} & set(columns):
            raise ValueError(f"The {name} dataset has an image column, but only text is played: remove it.")
        named = [c for c in (args.messages_column, args.prompt_column, args.completion_column) if c is not None]
        for column in named:
            if column not in columns:
                raise ValueError(f"The {name} dataset has no column {column!r}. Its columns are {columns}.")
        known = [found for needed, *found in _FORMATS if needed <= set(columns)]
        formats = [(args.prompt_column, named[-1], None)] if named else known
        if not formats:
            known = "`messages`, `prompt` and `completion`, `chosen`, `real`, or `conversations`"
            remedy = "Set `messages_column`, or `prompt_column` and `completion_column`. Split a `text` column in two."
            raise ValueError(f"The {name} dataset has {columns}, and none of the known formats: {known}. {remedy}")
        # Without a column of their own, prompts are part of the conversations in the other one
        self.prompt_column, self.completion_column, ignored = formats[0]
        if ignored is not None:
            logger.warning_once(f"`{ignored}` is ignored: the {name} dataset has `{self.completion_column}`.")

    def make_rules(self, row: dict[str, Any], model: PreTrainedModel, args: SPINConfig, play_identical: bool) -> Rules:
        """What makes a pair of a completion, with the end tokens of model and template, and the model's context."""
        ends = model.generation_config.eos_token_id
        ends = self.find_end_token_ids(row, ends if isinstance(ends, list) else [ends])
        limits = args.max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None)
        max_length = min((limit for limit in limits if limit is not None), default=None)
        truncated, play_empty = args.truncated_completions, args.play_empty_completions
        return Rules(self.tokenizer, ends, max_length, truncated, play_empty, play_identical)

    def find_end_token_ids(self, row: dict[str, Any], model_end_token_ids: list[int | None]) -> list[int]:
        """
        Ids that end a completion: those of the model's generation config, the tokenizer's end-of-sequence token and,
        for conversations, the token with which the chat template closes an assistant turn.

        Args:
            row (`dict[str, Any]`):
                The first row, which is rendered to see how the chat template closes a turn.
            model_end_token_ids (`list[int | None]`):
                End-of-sequence ids of the model's generation config.

        Returns:
            `list[int]`: Sorted ids.
        """
        tokenizer = self.tokenizer
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-sequence token: set `eos_token` (see `processing_class`).")
        end_token_ids = {tokenizer.eos_token_id, *model_end_token_ids} - {None}
        with self._naming_row(0):
            prompt, _, template_kwargs = self._split(row)
            if isinstance(prompt, str):
                if tokenizer.chat_template is not None:
                    what = f"The {self.name} dataset is text, to which the tokenizer's chat template is not applied"
                    remedy = "If the model was fine-tuned with the template, set `apply_chat_template=True`"
                    logger.warning(f"{what}: nothing stands between prompt and completion. {remedy}.")
                return sorted(end_token_ids)
            _, _, after = self._render([*prompt, _PROBE_TURN], template_kwargs).rpartition(_PROBE)
        special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        after_ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        closing = next((token for token in after_ids if token in special), None)
        if closing is None:
            what = "The chat template closes no turn with a special token"
            end = f"{tokenizer.eos_token!r} (`eos_token`) is put after the real completions"
            logger.warning(f"{what}: {end}. A model that was not fine-tuned that way will not end its own ones.")
        return sorted(end_token_ids | {closing} - {None})

    def prepare(
        self, dataset: Dataset, rules: Rules, rows: list[int] | None = None, num_proc: int | None = None
    ) -> tuple[Dataset, Counter]:
        """
        Turns SFT rows into token ids.

        One chat template renders the prompt for generation and for training: `prompt_ids` ends with the generation
        prompt, and `real_ids` is what follows it, up to and including its one end token.

        Args:
            dataset ([`~datasets.Dataset`]):
                Dataset that the reader was made for.
            rules ([`~pairs.Rules`]):
                Ids that end a completion, and the longest prompt plus completion.
            rows (`list[int]`, *optional*):
                Indices of the rows to take. Defaults to all.
            num_proc (`int`, *optional*):
                Number of processes.

        Returns:
            `tuple[Dataset, Counter]`: Dataset with the columns `row` (index in `dataset`), `prompt_ids` and
            `real_ids`, and the number of rows left out by reason.

        Raises:
            `ValueError` or `TypeError`: If a row cannot be used; the message names it.
        """
        taken = dataset if rows is None else dataset.select(rows)
        encoded = taken.map(
            self._encode,
            with_indices=True,
            fn_kwargs={"rows": rows, "rules": rules},
            remove_columns=dataset.column_names,
            features=_FEATURES,
            num_proc=num_proc,
            desc=f"Tokenizing {self.name} dataset",
        )
        reasons = encoded["left_out"][:]
        counts = Counter(reason for reason in reasons if reason is not None)
        for reason, count in counts.items():
            first = encoded["row"][reasons.index(reason)]
            rows_left_out = f"{count} of {len(encoded)} rows of the {self.name} dataset are left out"
            logger.warning(f"{rows_left_out}: {LEFT_OUT[reason]} (the first is row {first}).")
        if counts.total() == len(encoded):
            remedy = f"If `too_long`, raise `max_length` ({rules.max_length})."
            raise ValueError(f"No row of the {self.name} dataset is left: {dict(counts)}. {remedy}")
        if counts:  # written anew, so that the rest is read from where it is
            encoded = encoded.filter(lambda reason: reason is None, input_columns="left_out").flatten_indices()
        return encoded.remove_columns("left_out"), counts

    def _encode(self, row: dict, index: int, rows: list[int] | None, rules: Rules) -> dict[str, Any]:
        """Token ids of a row, and why it is left out. Its number is `rows[index]`, where a subset is taken."""
        index = index if rows is None else rows[index]
        with self._naming_row(index):
            prompt, completion, template_kwargs = self._split(row)
            if conversational := isinstance(prompt, list):
                prompt, completion = self._render_both(prompt, completion, template_kwargs)
        # A rendered chat template already holds the special tokens
        prompt_ids = self.tokenizer(prompt, add_special_tokens=not conversational)["input_ids"]
        full_ids = self.tokenizer(prompt + completion, add_special_tokens=not conversational)["input_ids"]
        while not conversational and prompt_ids and prompt_ids[-1] == self.tokenizer.eos_token_id:
            prompt_ids.pop()  # tokenizers that close whatever they tokenize
        if full_ids[: len(prompt_ids)] == prompt_ids:
            real_ids = full_ids[len(prompt_ids) :]
        else:
            # Tokens merge across the boundary. The opponent continues the prompt's own tokens, so does the real
            # completion
            real_ids = self.tokenizer(completion, add_special_tokens=False)["input_ids"]

        # What a template writes after the end token (a newline, a second end token) is never generated
        end = next((i for i, token in enumerate(real_ids) if token in rules.end_token_ids), len(real_ids))
        real_ids, rest_ids = [*real_ids, self.tokenizer.eos_token_id][: end + 1], real_ids[end + 1 :]
        real_text, rest_text = (text.strip() for text in rules.decode([real_ids, rest_ids]))
        reasons = {
            "end_token_in_real": rest_text,
            "empty_real": not real_text,
            "too_long": rules.max_length is not None and len(prompt_ids) + len(real_ids) > rules.max_length,
        }
        left_out = next((reason for reason, holds in reasons.items() if holds), None)
        return {"row": index, "prompt_ids": prompt_ids, "real_ids": real_ids, "left_out": left_out}

    @contextmanager
    def _naming_row(self, index: int) -> Iterator[None]:
        """Errors that are raised in it begin with the row that is at fault."""
        try:
            yield
        except Exception as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"Row {index} of the {self.name} dataset: {printable(str(error))}") from error

    def read_prompt(self, row: dict[str, Any]) -> str | list[dict]:
        """The prompt of a row as the data has it: text or messages."""
        return self._split(row)[0]

    def _split(self, row: dict[str, Any]) -> tuple[str | list[dict], str | dict, dict[str, Any]]:
        """Prompt (text or messages), real completion (text or one message) and chat template arguments of a row."""
        if self.prompt_column not in (None, *row):  # the prompt is what `chosen` and `rejected` have in common
            row = {**row, **extract_prompt(row)}
        prompt = [] if self.prompt_column is None else row[self.prompt_column]
        completion = row[self.completion_column]
        kinds, expected = ((str, list), "text or messages") if self.prompt_column else (list, "a list of messages")
        for column, value in ((self.prompt_column, prompt), (self.completion_column, completion)):
            if not isinstance(value, kinds):
                raise TypeError(f"`{column}` is {value!r}, expected {expected}. Fix or remove the row.")
        if type(prompt) is not type(completion):
            columns = f"`{self.prompt_column}` and `{self.completion_column}`"
            raise TypeError(f"{columns} are text and messages. Both must be text, or both lists of messages.")
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"`{self.prompt_column}` is empty, there is nothing to complete. Remove the row.")
            if not self.apply_chat_template:
                if self.system_prompt is not None:
                    raise ValueError("`system_prompt` is for conversations: set `apply_chat_template=True` as well.")
                return prompt, completion, {}
            prompt, completion = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": completion}]

        messages = [_clean_message(message) for message in prompt + completion]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= len(prompt)]
        if not turns:
            roles = [message["role"] for message in messages]
            raise ValueError(f"there is no assistant turn (roles: {roles}) to be the real completion. Remove the row.")
        turn = turns[0 if self.first_turn_only else -1]
        if turn == 0:
            raise ValueError("it starts with the assistant turn, so there is no prompt. Remove the row.")
        tools = row.get("tools")
        try:
            tools = json.loads(tools) if isinstance(tools, str) else tools
        except ValueError as error:
            raise ValueError(f"`tools` is no JSON ({error}). Fix or remove the row.") from error
        # Arrow gives all rows the same keys, and fills them with None
        own = {key: value for key, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}
        template_kwargs = self.chat_template_kwargs | _check_template_kwargs(own)
        if tools:
            template_kwargs["tools"] = tools
        prompt = messages[:turn]
        if self.system_prompt is not None and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": self.system_prompt}, *prompt]
        return prompt, messages[turn], template_kwargs

    def _render(self, messages: list[dict], kwargs: dict[str, Any], prompt: bool = False) -> str:
        if self.tokenizer.chat_template is None:
            remedy = "pass one with that of the fine-tuning as `processing_class`, or use columns of text"
            raise ValueError(f"it is a conversation, but the tokenizer has no chat template: {remedy}.")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **kwargs)
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise ValueError(f"the chat template refuses it: {error} Fix the row, its roles are {roles}.") from error

    def _render_both(self, prompt: list[dict], completion: dict, kwargs: dict[str, Any]) -> tuple[str, str]:
        """Prompt with its generation prompt, and the completion that follows it, both as rendered text."""
        prompt_text = self._render(prompt, kwargs, prompt=True)
        full_text = self._render([*prompt, completion], kwargs)
        if "tools" in kwargs and self._render(prompt, kwargs | {"tools": None}, prompt=True) == prompt_text:
            logger.warning_once(f"The chat template ignores the `tools` of the {self.name} dataset's rows.")
        if full_text.startswith(prompt_text):
            return prompt_text, full_text.removeprefix(prompt_text)
        # Some templates end the generation prompt with text that they do not write before a turn, such as an empty
        # thinking block. Completions are sampled after the generation prompt, so that is where the real one goes as
        # well
        before, _, _ = self._render([*prompt, _PROBE_TURN], kwargs).rpartition(_PROBE)
        bare = self._render(prompt, kwargs)
        if not (prompt_text.startswith(bare) and before.startswith(bare) and full_text.startswith(before)):
            what = "the chat template renders the prompt differently when a turn follows. Use one that does not.\n"
            raise ValueError(f"{what}Prompt: {prompt_text!r}\nPrompt and completion: {full_text!r}")
        ends, begins = prompt_text.removeprefix(bare), before.removeprefix(bare)
        what = f"The generation prompt ends with {ends!r}, but a turn begins with {begins!r}"
        logger.warning_once(f"{what}. Real and generated completions both follow the generation prompt.")
        return prompt_text, full_text.removeprefix(before)


def _check_template_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    if reserved := sorted(kwargs.keys() & _RESERVED):
        remedy = "Remove them. The template itself is set as the tokenizer's `chat_template`, for all rows."
        raise ValueError(f"`chat_template_kwargs` holds {reserved}, which are not for the template. {remedy}")
    return kwargs


def _clean_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise TypeError(f"a message is {message!r}, expected a dict with `role` and `content`.")
    if "from" in message:  # ShareGPT
        message = {"role": _SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message.get("value")}
    # Arrow gives every message of a dataset the same keys and fills them with None
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message:
        raise ValueError(f"a message has no `role` ({message}). Fix or remove the row.")
    content = message.setdefault("content", "" if message.get("tool_calls") else None)
    if not isinstance(content, (str, list)):
        raise ValueError(f"the `content` of a {message['role']} message is {content!r}. Fix or remove the row.")
    if isinstance(content, list) and any(not isinstance(p, dict) or p.get("type") != "text" for p in content):
        raise ValueError("a message has parts that are not text. SPINTrainer plays on text only.")
    return message
