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

"""What engines have in common: their interface, their registry, and the model made ready to generate."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import field, fields, make_dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from trl import GRPOConfig
from trl.distributed import DistributedBackend
from trl.models.utils import unwrap_model_for_generation

from ..compat import checkpointing_hidden
from ..pairs import Columns, Rules
from ..run.processes import Processes


# Engines that schedule their rows themselves want many at once: while the last of them end, there is little to do. But
# only between batches are completions committed and signals heard
LARGE_BATCH = 4096

# Prompts, their seeds, the number of tokens to generate at most, and the temperature -> generated ids; `None` if a signal
# cut them short
Complete = Callable[[list[list[int]], list[int], int, float], list[list[int]] | None]


def grpo_options(names: str) -> type:
    """A dataclass of options that have name, type, default and help of [`~trl.GRPOConfig`]."""
    options = [GRPOConfig.__dataclass_fields__[name] for name in names.split()]
    own = [(o.name, o.type, field(default=o.default, metadata=o.metadata)) for o in options]
    return make_dataclass("Options", own)


# Options of all engines
SamplingOptions = grpo_options("temperature top_p top_k min_p repetition_penalty generation_kwargs")

ENGINES: dict[str, type["Engine"]] = {}


class Engine:
    """
    Completes prompts. A subclass is an engine as soon as it is defined: it is chosen where its `flag` is set.

    Args:
        args ([`SPINConfig`]):
            Options.
        processes ([`~run.processes.Processes`]):
            Processes that share the work.
        rules ([`~pairs.Rules`]):
            Tokenizer, end tokens, and the longest prompt plus completion.
        save_model (`Callable`):
            Saves the model as it is, without optimizer, to a folder. All processes call it.
    """

    name: ClassVar[str]
    flag: ClassVar[str | None] = None  # option that chooses this engine
    reserved: ClassVar[Collection[str]] = ()  # what `generation_kwargs` must not hold

    Options: ClassVar[type] = grpo_options("")  # those that no other engine honours

    def __init_subclass__(cls):
        ENGINES[cls.name] = cls

    def __init__(self, args: Any, processes: Processes, rules: Rules, save_model: Callable[[str], None]):
        self.args, self.processes, self.rules, self.save_model = args, processes, rules, save_model
        self.accelerator = processes.accelerator
        # Left open, it is settled before the first iteration. Until then, each prompt is a batch of its own
        self.token_budget: int | None = args.generation_token_budget

    @classmethod
    def check(cls, args: Any, model: str | PreTrainedModel | PeftModel | None = None):
        """
        Raises an error if it cannot complete prompts, before anything is computed: when the options are made, when the
        trainer is given its model, perhaps as a name, and when that is loaded.
        """

    def batches(self, lengths: np.ndarray, max_new_tokens: int) -> list[np.ndarray]:
        """
        Which prompts, of these lengths, are completed together. By default large batches of similar size, as many on
        each process.
        """
        num_processes = self.accelerator.num_processes
        rounds = math.ceil(len(lengths) / (num_processes * LARGE_BATCH))
        num_batches = min(len(lengths), rounds * num_processes)
        return [np.arange(start, len(lengths), num_batches) for start in range(num_batches)]

    def complete(
        self,
        generate: Complete,
        rows: Columns,
        seed_of: Callable[[int], int],
        max_new_tokens: int,
        temperature: float,
        desc: str | None,
        commit: Callable[[pyarrow.Table], None] | None = None,
        done: np.ndarray | None = None,
    ) -> pyarrow.Table | None:
        """
        Completes the prompts of all rows.

        Args:
            generate (`Callable`):
                What [`open`] gives.
            rows ([`~pairs.Columns`]):
                Rows, with `row` and `prompt_ids`.
            seed_of (`Callable[[int], int]`):
                Seed of a row, by its `row`.
            max_new_tokens (`int`):
                Longest completion, in tokens, where `max_length` does not end it before.
            temperature (`float`):
                Temperature for sampling.
            desc (`str`, *optional*):
                Title of the progress bar, if there should be one.
            commit (`Callable`, *optional*):
                See [`~run.processes.Processes.map`].
            done (`np.ndarray`, *optional*):
                Whether each row needs no completion.

        Returns:
            `pyarrow.Table` or `None`: `generated_ids`, whether they are `truncated` (see [`~pairs.Rules.finish`]), and
            `index` of each row, in their order, if there is no `commit`.
        """
        lengths = rows.lengths("prompt_ids")
        limits = np.minimum(max_new_tokens, (self.rules.max_length or np.inf) - lengths).astype(int)
        batches, kept = self.batches(lengths, max_new_tokens), []

        def complete_batch(batch: np.ndarray) -> pyarrow.Table | None:
            prompts, seeds = zip(*((rows[i]["prompt_ids"], seed_of(rows[i]["row"])) for i in batch), strict=True)
            generated = generate(list(prompts), list(seeds), int(limits[batch].max()), temperature)
            if generated is None:
                return None
            of_row = zip(generated, limits[batch].tolist(), strict=True)
            ids, truncated = zip(*(self.rules.finish(*row) for row in of_row), strict=True)
            ids = pyarrow.array(ids, pyarrow.list_(pyarrow.int32()))
            return pyarrow.table({"generated_ids": ids, "truncated": truncated, "index": batch})

        self.processes.map(batches, complete_batch, desc, commit or kept.append, done)
        clear_device_cache()
        return pyarrow.concat_tables(kept).sort_by("index") if kept else None

    def open(self, model: torch.nn.Module) -> AbstractContextManager[Complete]:
        """
        Completes prompts with the model as prepared for training, for as long as its weights stay as they are. Model
        mode, gradient checkpointing and generation config are as before afterwards.
        """
        raise NotImplementedError


def chosen_engine(args: Any) -> type[Engine]:
    """The engine that the options choose. Raises a `ValueError` if they choose two, or set what it cannot honour."""
    chosen = [engine for engine in ENGINES.values() if engine.flag and getattr(args, engine.flag, False)]
    engine, *more = chosen or [ENGINES["generate"]]
    if more:
        raise ValueError(f"`{engine.flag}` and `{more[0].flag}` are both set, but one engine generates: set one.")
    # An option that has no effect would be taken for one that has
    options = type(args).__dataclass_fields__
    for name in (o.name for other in ENGINES.values() if other is not engine for o in fields(other.Options)):
        if name in options and getattr(args, name) != options[name].default:
            what = f"`{name}={getattr(args, name)!r}` means nothing to the engine that generates ({engine.name!r})"
            raise ValueError(f"{what}. Leave it unset.")
    if reserved := sorted((args.generation_kwargs or {}).keys() & engine.reserved):
        rule = "each prompt gets one completion, sampled and limited by options of their own, and ended by end tokens"
        raise ValueError(f"`generation_kwargs` holds {reserved}, but {rule}. Remove them.")
    engine.check(args)
    return engine


def forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """Leaves torch's random state as it was."""
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


@contextmanager
def ready_to_generate(model: torch.nn.Module, accelerator: Accelerator) -> Iterator[PreTrainedModel | PeftModel]:
    """The unwrapped model in evaluation mode, without a generation config."""
    was_training = model.training
    unwrapped = unwrap_model_for_generation(model, accelerator)
    all_weights = DistributedBackend(accelerator).summon_full_params(model, recurse=False)
    with checkpointing_hidden(), unwrapped as unwrapped_model, all_weights:
        unwrapped_model.eval()
        # `generate` fills gaps in a config from the model's own config: leave it nothing to take
        base_model = unwrapped_model.get_base_model() if isinstance(unwrapped_model, PeftModel) else unwrapped_model
        own_config, base_model.generation_config = base_model.generation_config, GenerationConfig()
        try:
            yield unwrapped_model
        finally:
            base_model.generation_config = own_config
            model.train(was_training)
