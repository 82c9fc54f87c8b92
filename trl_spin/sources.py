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

"""The data that a command line names: on the Hub, in a folder, or in a file."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name

from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from .spin_config import help_from_docstring


@help_from_docstring
@dataclass
class DataArguments(ScriptArguments):
    """
    [`~trl.ScriptArguments`] that know of held-out data.

    Parameters:
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on, if there is one and no `held_out_size`. `test[:200]` takes its first 200 rows; a part
            of `dataset_train_split` is taken in the same way.
        eval_dataset_name (`str`, *optional*):
            Path or name of the data to evaluate on, if it is not in `dataset_name`. Of several splits,
            `dataset_test_split` is taken.
        pair_filter (`str`, *optional*):
            Function of your own, `module:function`, that gives each pair its weight, 0 for those that are not played:
            see `pair_filter` in [`SPINTrainer`]. The module may lie in the current directory.
    """

    dataset_test_split: str = "test"
    eval_dataset_name: str | None = None
    pair_filter: str | None = None


def load_function(option: str, name: str) -> Callable:
    """The function that an option names, `module:function`. Raises a `ValueError` if there is none."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # as for a script of Python's: the current directory
    try:
        function = resolve_name(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(f"`{option}` must be `module:function`, got {name!r}: {error}.") from error
    if not callable(function):
        raise ValueError(f"`{option}` must name a function, but {name!r} is `{type(function).__name__}`.")
    return function


def load_data(arguments: DataArguments, mixture: DatasetMixtureConfig) -> tuple[Dataset, Dataset | None]:
    """
    Loads the data that the arguments name.

    Args:
        arguments ([`DataArguments`]):
            `dataset_name` and `eval_dataset_name` are names on the Hub, folders (also those of `save_to_disk`), or
            files of a format that `datasets` knows, compressed or not.
        mixture ([`~trl.DatasetMixtureConfig`]):
            `datasets`, if the data is a mixture.

    Returns:
        `tuple`: Training data, and held-out data if there is any.

    Raises:
        `ValueError`: If the data cannot be loaded, or has no such split.
    """
    name, test = arguments.dataset_name, arguments.dataset_test_split
    if bool(mixture.datasets) == bool(name):
        given = f"`dataset_name` ({name!r}), or a mixture, `datasets` ({mixture.datasets!r})"
        raise ValueError(f"There must be exactly one source of data: {given}.")
    if arguments.dataset_streaming or mixture.streaming:
        raise ValueError("The data cannot be streamed, as all prompts are completed before training.")
    splits = _load(name or mixture, arguments.dataset_train_split, arguments.dataset_config)
    train_dataset = _take(splits, arguments.dataset_train_split)
    if arguments.eval_dataset_name:
        splits = _load(arguments.eval_dataset_name, test)
    elif test == DataArguments.dataset_test_split and test not in splits:
        return train_dataset, None
    return train_dataset, _take(splits, test)


def _load(source: str | DatasetMixtureConfig, split: str, config: str | None = None) -> DatasetDict:
    """All splits; what has none is the given one."""
    path = Path(str(source))
    try:
        if isinstance(source, DatasetMixtureConfig):
            data = get_dataset(source)
        elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            data = load_from_disk(source)
        elif path.is_file():  # whose name tells the format
            data = load_dataset(str(path.absolute().parent), data_files=path.name, split="train")
        else:
            data = load_dataset(source, config)
    except (DatasetsError, OSError, ValueError, StopIteration) as error:
        # datasets 5.2 has a `StopIteration` for an empty file, and the reason for others in the cause
        reason = str(error.__cause__ or error) or "it is empty"
        raise ValueError(f"The data {source!r} cannot be loaded: {reason}") from error
    return data if isinstance(data, DatasetDict) else DatasetDict({split.partition("[")[0]: data})


def _take(splits: DatasetDict, split: str) -> Dataset:
    """A split, or a part of it, as in `train[:200]`."""
    parts = ReadInstruction.from_spec(split).to_absolute(splits.num_rows)
    return concatenate_datasets([splits[p.splitname].select(range(p.from_, p.to)) for p in parts])
