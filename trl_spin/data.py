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

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import extract_prompt

from .pairs import Rules
from .spin_config import SPINConfig


logger = get_logger(__name__)

_FEATURES = Features(
    {
        "row": Value("int64"),
        "prompt_ids": List(Value("int64")),
        "real_ids": List(Value("int64")),
        "left_out": Value("string"),
    }
)
# Why a row is left out before generation
LEFT_OUT = {
    "too_long": "prompt and real completion do not fit `max_length`",
    "empty_real": "the real completion is empty",
    "end_token_in_real": "the real completion contains an end token, where generation would stop",
}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_PROBE = "probe7c1f9a"


def check_dataset(dataset: Any, name: str):
    """Raises an error if this is no dataset to play on."""
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"The {name} dataset is streamed (`IterableDataset`). Self-play completes every prompt before it trains on "
            "it and needs to know how many there are: load it with `streaming=False`."
        )
    if not isinstance(dataset, Dataset):
        raise TypeError(f"The {name} dataset must be a `datasets.Dataset`, got {type(dataset).__name__}.")
    if len(dataset) == 0:
        raise ValueError(f"The {name} dataset is empty.")


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
            `held_out_size`, `max_prompts`, `seed`, and the options that need held-out data.
        measures (`bool`):
            Whether `compute_completion_metrics` is given, which needs held-out data as well.

    Returns:
        `tuple`: Held-out data, and indices of rows by name of the dataset.

    Raises:
        `ValueError` or `TypeError`: If a dataset cannot be used, or two options say what is held out.
    """
    if train_dataset is None:
        raise ValueError("`train_dataset` is required: the SFT data whose completions the model learns to prefer.")
    eval_datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name in eval_datasets:
        if name == "train" or Path(name).name != name:
            raise ValueError(
                f"An evaluation dataset cannot be called {name!r}: its game is kept in files of this name, beside those "
                "of 'train'. Rename it in `eval_dataset`."
            )
    check_dataset(train_dataset, "train")
    for name, dataset in eval_datasets.items():
        if eval_dataset is not None:
            check_dataset(dataset, name)
    subsets, rows, size = {}, range(len(train_dataset)), args.held_out_size
    if size:
        if eval_dataset is not None:
            raise ValueError(f"`held_out_size={size}` and `eval_dataset` both say what is held out: give one of them.")
        if size >= len(train_dataset):
            raise ValueError(f"`held_out_size` ({size}) leaves nothing of the {len(train_dataset)} training rows.")
        eval_dataset, shuffled = train_dataset, random.Random(args.seed).sample(rows, len(rows))
        subsets = {"eval": sorted(shuffled[:size]), "train": sorted(shuffled[size:])}
    if args.max_prompts is not None and args.max_prompts < len(rows := subsets.get("train", rows)):
        subsets["train"] = random.Random(args.seed).sample(rows, args.max_prompts)
    needed_by = {
        "early_stopping=True": args.early_stopping,
        "load_best_iteration_at_end=True": args.load_best_iteration_at_end,
        "compute_completion_metrics": measures,
    }
    for option, needs in needed_by.items():
        if needs and eval_dataset is None:
            raise ValueError(f"`{option}` needs held-out prompts: pass an `eval_dataset`, or set `held_out_size`.")
    return eval_dataset, subsets


def prepare_dataset(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    args: SPINConfig,
    end_token_ids: list[int],
    max_length: int | None,
    rows: list[int] | None = None,
) -> tuple[Dataset, Counter]:
    """
    Turns SFT rows into token ids.

    One chat template renders the prompt for generation and for training: `prompt_ids` ends with the generation prompt,
    and `real_ids` is what follows it, up to and including its one end token.

    Args:
        dataset ([`~datasets.Dataset`]):
            SFT rows in any of the accepted formats.
        name (`str`):
            Name of the dataset in messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, with a chat template if the rows are conversations.
        args ([`SPINConfig`]):
            Names of the columns, `first_turn_only`, `chat_template_kwargs` and `dataset_num_proc`.
        end_token_ids (`list[int]`):
            Ids that end a completion.
        max_length (`int` or `None`):
            Longest prompt plus real completion, in tokens.
        rows (`list[int]`, *optional*):
            Indices of the rows to take. Defaults to all.

    Returns:
        `tuple[Dataset, Counter]`: Dataset with the columns `row` (index in `dataset`), `prompt_ids` and `real_ids`, and
        the number of rows left out by reason.

    Raises:
        `ValueError` or `TypeError`: If a column or a row cannot be used; the message names it.
    """
    if rows is not None:
        dataset = dataset.select(rows)
    dataset, prompt_column, completion_column = _find_columns(dataset, name, args)
    encoded = dataset.map(
        _encode_row,
        with_indices=True,
        fn_kwargs={
            "rows": rows,
            "name": name,
            "columns": (prompt_column, completion_column),
            "tokenizer": tokenizer,
            "end_token_ids": end_token_ids,
            "max_length": max_length,
            "first_turn_only": args.first_turn_only,
            "chat_template_kwargs": args.chat_template_kwargs,
        },
        remove_columns=dataset.column_names,
        features=_FEATURES,
        num_proc=args.dataset_num_proc,
        desc=f"Tokenizing {name} dataset",
    )
    reasons = encoded["left_out"][:]
    counts = Counter(reason for reason in reasons if reason is not None)
    for reason, count in counts.items():
        first = encoded["row"][reasons.index(reason)]
        logger.warning(
            f"{count} of {len(encoded)} rows of the {name} dataset are left out: {LEFT_OUT[reason]} (the first is row "
            f"{first})."
        )
    prepared = encoded.filter(lambda reason: reason is None, input_columns="left_out").remove_columns("left_out")
    if len(prepared) == 0:
        raise ValueError(
            f"No row of the {name} dataset is left to play: {dict(counts)}. With `too_long`, raise `max_length` "
            f"({max_length}) or shorten the rows."
        )
    return prepared, counts


def make_rules(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    args: SPINConfig,
    play_identical: bool,
) -> Rules:
    """What makes a pair of a completion: with the end tokens of model and chat template, and the model's context."""
    ends = model.generation_config.eos_token_id
    ends = [i for i in (ends if isinstance(ends, list) else [ends]) if i is not None]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = [length for length in (args.max_length, context) if length is not None]
    return Rules(
        tokenizer,
        end_token_ids=find_end_token_ids(dataset, name, tokenizer, args, ends),
        max_length=min(lengths) if lengths else None,
        truncated=args.truncated_completions,
        play_empty=args.play_empty_completions,
        play_identical=play_identical,
    )


def find_end_token_ids(
    dataset: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, args: SPINConfig, model_end_token_ids: list[int]
) -> list[int]:
    """
    Ids that end a completion: those of the model's generation config, the tokenizer's end-of-sequence token and, for
    conversations, the token with which the chat template closes an assistant turn.

    Args:
        dataset ([`~datasets.Dataset`]):
            SFT rows; the first one is rendered to see how the chat template closes a turn.
        name (`str`):
            Name of the dataset in messages.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        args ([`SPINConfig`]):
            Names of the columns and `chat_template_kwargs`.
        model_end_token_ids (`list[int]`):
            End-of-sequence ids of the model's generation config.

    Returns:
        `list[int]`: Sorted ids.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, so neither a real nor a generated completion can end. Set "
            "`tokenizer.eos_token` and pass the tokenizer as `processing_class`."
        )
    end_token_ids = {tokenizer.eos_token_id, *model_end_token_ids}
    dataset, prompt_column, completion_column = _find_columns(dataset, name, args)
    prompt, _, template_kwargs = _split_row(
        dataset[0], 0, name, (prompt_column, completion_column), args.first_turn_only, args.chat_template_kwargs
    )
    if isinstance(prompt, list):
        closing = _render_probe(tokenizer, prompt, template_kwargs, f"Row 0 of the {name} dataset")[1]
        special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        closing_ids = [i for i in tokenizer(closing, add_special_tokens=False)["input_ids"] if i in special]
        if not closing_ids:
            logger.warning(
                f"The chat template does not close an assistant turn with a special token, so `eos_token` "
                f"({tokenizer.eos_token!r}) is appended to the real completions of the {name} dataset. The model should "
                "have been fine-tuned that way, or its own completions will not end."
            )
        elif closing_ids[0] not in end_token_ids:
            logger.info(
                f"The chat template closes an assistant turn with {tokenizer.convert_ids_to_tokens(closing_ids[0])!r}, "
                "which is not an end token of the model: generation will stop there as well."
            )
        end_token_ids.update(closing_ids[:1])
    return sorted(end_token_ids)


def _find_columns(dataset: Dataset, name: str, args: SPINConfig) -> tuple[Dataset, str | None, str]:
    """Which columns hold the prompt (`None`: it is part of the other column's conversation) and the completion."""
    columns = dataset.column_names
    if {"image", "images"} & set(columns):
        raise ValueError(
            f"The {name} dataset has an image column ({sorted(columns)}). SPINTrainer plays on text only: remove the "
            "column if the completions do not depend on it."
        )
    wanted = [c for c in (args.messages_column, args.prompt_column, args.completion_column) if c is not None]
    missing = [c for c in wanted if c not in columns]
    if missing:
        raise ValueError(f"The {name} dataset has no column {missing[0]!r}. Its columns are {columns}.")
    if wanted:
        return dataset, args.prompt_column, wanted[-1]
    if "messages" in columns:
        return dataset, None, "messages"
    if "conversations" in columns:
        return dataset, None, "conversations"
    if "prompt" in columns and "completion" in columns:
        return dataset, "prompt", "completion"
    if "real" in columns:
        logger.info(
            f"The {name} dataset has `real` completions: its other ones are ignored, the opponent is the model."
        )
        return dataset, None, "real"
    if "chosen" in columns:
        logger.warning_once(
            f"The {name} dataset holds preferences: `chosen` is used as the real completion, `rejected` is ignored."
        )
        if "prompt" not in columns:
            dataset = dataset.map(extract_prompt, num_proc=args.dataset_num_proc)
        return dataset, "prompt", "chosen"
    if "text" in columns:
        raise ValueError(
            f"The {name} dataset has a `text` column, which does not say where the prompt ends. SPIN completes "
            "prompts: split it into `prompt` and `completion` columns, or use `messages`."
        )
    raise ValueError(
        f"The {name} dataset has the columns {columns}, and none of the known formats: `messages`, `prompt` and "
        "`completion`, `chosen`, `real`, or `conversations`. Name the columns with `messages_column`, or with "
        "`prompt_column` and `completion_column`."
    )


def _split_row(
    row: dict[str, Any],
    index: int,
    name: str,
    columns: tuple[str | None, str],
    first_turn_only: bool,
    chat_template_kwargs: dict[str, Any] | None,
) -> tuple[str | list[dict], str | dict, dict[str, Any]]:
    """Prompt (text or messages), real completion (text or one message) and chat template arguments of a row."""
    where = f"Row {index} of the {name} dataset"
    prompt_column, completion_column = columns
    completion = row[completion_column]
    prompt = row[prompt_column] if prompt_column is not None else []
    for column, value in ((prompt_column, prompt), (completion_column, completion)):
        if not isinstance(value, (str, list)):
            raise TypeError(
                f"{where}: `{column}` is {value!r}, expected text or a list of messages. Fix or remove the row."
            )
    if prompt_column is not None and type(prompt) is not type(completion):
        raise TypeError(
            f"{where}: `{prompt_column}` is a {type(prompt).__name__} and `{completion_column}` a {type(completion).__name__}. "
            "Both must be text, or both lists of messages."
        )
    if isinstance(completion, str):
        if prompt_column is None:
            raise TypeError(f"{where}: `{completion_column}` is text, expected a list of messages.")
        if not prompt:
            raise ValueError(f"{where}: `{prompt_column}` is empty, there is nothing to complete. Remove the row.")
        return prompt, completion, {}

    messages = [_clean_message(message, where) for message in prompt + completion]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= len(prompt)]
    if not turns:
        raise ValueError(
            f"{where} has no assistant turn (roles: {[m['role'] for m in messages]}), so there is no real completion. "
            "Remove the row."
        )
    last = turns[0] if first_turn_only else turns[-1]
    if last == 0:
        raise ValueError(f"{where} starts with the assistant turn, so there is no prompt. Remove the row.")
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    template_kwargs = {**(chat_template_kwargs or {}), **(row.get("chat_template_kwargs") or {})}
    if tools:
        template_kwargs["tools"] = tools
    return messages[:last], messages[last], template_kwargs


def _clean_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise TypeError(f"{where}: a message is {message!r}, expected a dict with `role` and `content`.")
    if "from" in message:  # ShareGPT
        message = {"role": _SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message.get("value")}
    # Arrow gives every message of a dataset the same keys and fills them with None
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message:
        raise ValueError(f"{where}: a message has no `role` ({message}). Fix or remove the row.")
    content = message.setdefault("content", "" if message.get("tool_calls") else None)
    if content is None:
        raise ValueError(f"{where}: the `content` of a {message['role']} message is None. Fix or remove the row.")
    if not isinstance(content, (str, list)):
        raise TypeError(f"{where}: the `content` of a {message['role']} message is {content!r}, expected text.")
    if isinstance(content, list) and any(not isinstance(p, dict) or p.get("type") != "text" for p in content):
        raise ValueError(f"{where} has message parts that are not text. SPINTrainer plays on text only.")
    return message


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], kwargs: dict, where: str, prompt: bool) -> str:
    if tokenizer.chat_template is None and "chat_template" not in kwargs:
        raise ValueError(
            "The dataset holds conversations, but the tokenizer has no chat template. Set `tokenizer.chat_template` to "
            "the one the model was fine-tuned with and pass the tokenizer as `processing_class`, or use text `prompt` "
            "and `completion` columns."
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **kwargs)
    except TemplateError as error:
        raise ValueError(
            f"{where}: the chat template refuses the conversation, whose roles are {[m['role'] for m in messages]}: "
            f"{error} Fix or remove the row."
        ) from error


def _render_probe(tokenizer: PreTrainedTokenizerBase, prompt: list[dict], kwargs: dict, where: str) -> tuple[str, str]:
    """What the chat template writes before (prompt included) and after an assistant turn's content."""
    rendered = _render(tokenizer, prompt + [{"role": "assistant", "content": _PROBE}], kwargs, where, prompt=False)
    before, _, after = rendered.rpartition(_PROBE)
    return before, after


def _split_rendered(tokenizer, prompt: list[dict], completion: dict, kwargs: dict, where: str) -> tuple[str, str]:
    """Prompt with its generation prompt, and the completion that follows it, both as rendered text."""
    prompt_text = _render(tokenizer, prompt, kwargs, where, prompt=True)
    full_text = _render(tokenizer, prompt + [completion], kwargs, where, prompt=False)
    if full_text.startswith(prompt_text):
        return prompt_text, full_text[len(prompt_text) :]
    # Some templates end the generation prompt with text that they do not write before a turn, such as an empty
    # thinking block. Completions are sampled after the generation prompt, so that is where the real one goes as well.
    before, _ = _render_probe(tokenizer, prompt, kwargs, where)
    bare_prompt = _render(tokenizer, prompt, kwargs, where, prompt=False)
    if not (before.startswith(bare_prompt) and prompt_text.startswith(bare_prompt) and full_text.startswith(before)):
        raise ValueError(
            f"{where}: the chat template renders the prompt differently when a turn follows, so the real completion "
            "cannot be placed after the prompt that is used for generation. Use a chat template that renders earlier "
            f"turns the same way in both cases.\nPrompt: {prompt_text!r}\nPrompt and completion: {full_text!r}"
        )
    logger.warning_once(
        f"The chat template's generation prompt ends with {prompt_text[len(bare_prompt) :]!r}, but before a turn it "
        f"writes {before[len(bare_prompt) :]!r}. Real and generated completions both follow the generation prompt."
    )
    return prompt_text, full_text[len(before) :]


def _encode_row(
    row, index, rows, name, columns, tokenizer, end_token_ids, max_length, first_turn_only, chat_template_kwargs
) -> dict[str, Any]:
    index = index if rows is None else rows[index]
    where = f"Row {index} of the {name} dataset"
    prompt, completion, template_kwargs = _split_row(row, index, name, columns, first_turn_only, chat_template_kwargs)
    if conversational := isinstance(prompt, list):
        prompt, completion = _split_rendered(tokenizer, prompt, completion, template_kwargs, where)
    # A rendered chat template already holds the special tokens
    prompt_ids = tokenizer(prompt, add_special_tokens=not conversational)["input_ids"]
    full_ids = tokenizer(prompt + completion, add_special_tokens=not conversational)["input_ids"]
    while not conversational and prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
        prompt_ids.pop()  # tokenizers that close whatever they tokenize
    if full_ids[: len(prompt_ids)] == prompt_ids:
        real_ids = full_ids[len(prompt_ids) :]
    else:
        # Tokens merge across the boundary. The opponent continues the prompt's own tokens, so does the real completion.
        real_ids = tokenizer(completion, add_special_tokens=False)["input_ids"]

    left_out = None
    first_end = next((i for i, token in enumerate(real_ids) if token in end_token_ids), None)
    if first_end is None:
        real_ids = real_ids + [tokenizer.eos_token_id]
    else:
        # What a template writes after the end token (a newline, a second end token) is never generated
        if tokenizer.decode(real_ids[first_end + 1 :], skip_special_tokens=True).strip():
            left_out = "end_token_in_real"
        real_ids = real_ids[: first_end + 1]
    if left_out is None and not tokenizer.decode(real_ids, skip_special_tokens=True).strip():
        left_out = "empty_real"
    if left_out is None and max_length is not None and len(prompt_ids) + len(real_ids) > max_length:
        left_out = "too_long"
    return {"row": index, "prompt_ids": prompt_ids, "real_ids": real_ids, "left_out": left_out}
