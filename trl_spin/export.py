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

"""Games as text: to be looked at, or to be trained on elsewhere."""

from pathlib import Path
from typing import Any

import pandas
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .report.card import public_name
from .report.signals import KINDS, SIDES
from .report.tables import render
from .run import games
from .run.files import atomic_open


# By format, what TRL's trainers call the completions
COLUMNS = {"dpo": ["chosen", "rejected"], "kto": ["completion", "label"], "sft": ["completion"]}


def load_game(output_dir: str | Path, iteration: int, dataset: str = "train") -> Dataset:
    """
    Reads the pairs of an iteration, with their texts. Nothing is read that does not match its checksum.

    Args:
        output_dir (`str` or `Path`):
            Output directory of a run, finished or not.
        iteration (`int`):
            Self-play iteration.
        dataset (`str`, *optional*, defaults to `"train"`):
            Name of the dataset: `"eval"` for held-out pairs, unless there are several evaluation sets.

    Returns:
        [`~datasets.Dataset`]: One row per pair. `prompt`, `real` and `generated` are texts as the model sees them,
        with special tokens (but without a beginning-of-sequence token that the tokenizer adds by itself), and
        `real_exact` and `generated_exact` say whether TRL makes the same token ids of them. Then, as stored: `row`,
        the index in the user's dataset; `opponent`, the iteration whose opponent wrote the completion; token ids;
        whether the completion is `truncated`, `empty` or `identical`; whether the pair was `played`; its `weight`; and
        the log-probs under the reference.

    Raises:
        `ValueError`: If the game is not there, not complete or damaged, or has no such dataset.
    """
    pairs = read_pairs(output_dir, iteration)
    if dataset not in pairs:
        raise ValueError(f"`dataset` must be one of {[*pairs]}, which were played on, got {dataset!r}.")
    return pairs[dataset]


def read_pairs(output_dir: str | Path, iteration: int) -> dict[str, Dataset]:
    """All that [`load_game`] reads, by dataset."""
    pairs = games.load_game(str(output_dir), iteration)
    # The tokenizer of a model that the run has saved, or else that of the one that it began with
    saved = sorted(Path(output_dir).glob("*/tokenizer_config.json"))
    name = saved[0].parent if saved else games.read_manifest(str(output_dir), iteration)["opponent"]["model"]
    # In memory: the cache of `map` would lie among the files of the game
    options = {"batched": True, "keep_in_memory": True, "desc": "Decoding"}
    options["fn_kwargs"] = {"tokenizer": AutoTokenizer.from_pretrained(name)}
    return {dataset: part.map(with_texts, **options) for dataset, part in pairs.items()}


def with_texts(pairs: dict[str, list], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """The columns of a batch of pairs that [`load_game`] adds."""
    first, eos, as_it_is = tokenizer("")["input_ids"][:1], tokenizer.eos_token, {"clean_up_tokenization_spaces": False}
    prompt_ids = [ids[len(first) :] if ids[: len(first)] == first else ids for ids in pairs["prompt_ids"]]
    prompts = tokenizer.batch_decode(prompt_ids, **as_it_is)
    columns, prompts_again = {"prompt": prompts}, tokenizer(prompts)["input_ids"]
    for side in SIDES:
        # Behind its prompt: by itself, a completion would lose its first space with some tokenizers
        ids = [prompt + completion for prompt, completion in zip(prompt_ids, pairs[f"{side}_ids"], strict=True)]
        texts = zip(prompts, tokenizer.batch_decode(ids, **as_it_is), strict=True)
        columns[side] = [text.removeprefix(prompt) for prompt, text in texts]
        # TRL ends a text with an end token, if it does not end with one
        ended = [text.removesuffix(eos) + eos for text in columns[side]]
        again = tokenizer(list(map(str.__add__, prompts, ended)))["input_ids"]
        stored = zip(pairs["prompt_ids"], pairs[f"{side}_ids"], prompts_again, again, strict=True)
        columns[f"{side}_exact"] = [p == prompt and p + c == whole for p, c, prompt, whole in stored]
    return columns


def export_game(output_dir: str | Path, iteration: int, format: str = "dpo") -> Path:
    """
    Writes a game as data that TRL and other tools read, with a data card, to
    `output_dir/export/iteration-<t>-<format>`.

    Args:
        output_dir (`str` or `Path`):
            Output directory of a run, finished or not.
        iteration (`int`):
            Self-play iteration.
        format (`str`, *optional*, defaults to `"dpo"`):
            `"dpo"`: `prompt`, `chosen` (the real completion) and `rejected` (the generated one). `"kto"`: `prompt`,
            `completion` and `label`, two rows per pair. `"sft"`: `prompt` and the real `completion`.

    Returns:
        `Path`: The directory.
    """
    directory, splits = Path(output_dir) / "export" / f"iteration-{iteration}-{format}", {}
    pairs, manifest = read_pairs(output_dir, iteration), games.read_manifest(str(output_dir), iteration)
    manifest["opponent"]["model"] = public_name(manifest["opponent"]["model"])
    for split, parts in {"train": [pairs.pop("train")], "test": [*pairs.values()]}.items():
        if parts:
            splits[split], rows = _make_rows(concatenate_datasets(parts).to_pandas(), format)
            with atomic_open(directory / f"{split}.jsonl") as file:
                file.write(rows.to_json(orient="records", lines=True, force_ascii=False).encode())
    with atomic_open(directory / "README.md") as file:
        file.write(render("export.md.jinja", format=format, splits=splits, game=manifest).encode())
    return directory


def _make_rows(pairs: pandas.DataFrame, format: str) -> tuple[dict[str, Any], pandas.DataFrame]:
    """What the card says of a split, and its rows."""
    both = pairs.rename(columns={"real": "chosen", "generated": "rejected"})
    both["exact"] = pairs["real_exact"] & pairs["generated_exact"]
    sides = [pairs.assign(completion=pairs[s], exact=pairs[f"{s}_exact"], label=s == "real") for s in SIDES]
    rows = {"dpo": both, "kto": pandas.concat(sides), "sft": sides[0]}[format]
    # Real completions stand in the pairs with the newest opponent, played or not
    rows = rows.loc[rows["opponent"] == rows["opponent"].max() if format == "sft" else rows["played"]]
    unplayed = pairs.assign(filtered=pairs["weight"] == 0)[~pairs["played"]][[*KINDS, "filtered"]].sum()
    counts = {"rows": len(rows), "inexact": (~rows["exact"]).sum(), "pairs": len(pairs), "unplayed": unplayed}
    return counts, rows[["prompt", *COLUMNS[format], "exact", "row", "opponent", "weight"]]
