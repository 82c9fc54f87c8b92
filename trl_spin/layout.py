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

"""Prefix-shared rows: a prompt and its two completions in one row, and batches of rows of similar length."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import trl.trainer.utils
from datasets import Dataset
from peft import PeftModel
from pyarrow.compute import list_value_length
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from .compat import replaced


_MEGA_BATCH = 50
# Lengths within the same span of tokens count as equal. Sorted to the token, short rows that are alike in other ways
# too (completions that were cut off or ran on) would share a step: of rows of 16 to 24 tokens (benchmarks/letters.py),
# training suffered from it
_LENGTH_SPAN = 32
_LAYER_TYPES = ("full_attention", "sliding_attention")
_PER_TOKEN_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def forward_shared(
    model: nn.Module, base_model: PreTrainedModel, inputs: dict[str, Any], multiple: int | None = None
) -> FusedCausalLMOutput:
    r"""
    Calls a model on DPOTrainer's batch of chosen and rejected sequences with one row per pair,

        prompt[:-1] | prompt[-1], chosen[:-1] | prompt[-1], rejected[:-1]

    and returns what the model returns for the padded batch.

    The rejected branch does not see the chosen one, and its positions continue from the prompt. The last prompt token
    is repeated in both branches, so each completion token is predicted at a position of its own. The last token of a
    completion predicts nothing and is left out. This computes P + C + R - 1 positions per pair instead of 2 · max(P +
    C, P + R), and the sums are the same. The idea is that of [Accelerating Direct Preference Optimization with Prefix
    Sharing](https://huggingface.co/papers/2410.20305).

    The rows are cut out of DPOTrainer's batch on the device, so collator, losses and metrics need not know of them.

    Args:
        model (`nn.Module`):
            Model with TRL's fused head, as prepared for training.
        base_model ([`~transformers.PreTrainedModel`]):
            The same model, unwrapped.
        inputs (`dict[str, Any]`):
            Arguments of the model for the padded batch, three of them tensors of shape `(2 * batch, seq_len)`:
            `input_ids`, prompts with their chosen completions, then the same prompts with the rejected ones, padded on
            the right; `attention_mask`, 1 where there is a token; and `labels`, completion tokens, -100 elsewhere.
            Among the further ones is `fused_lm_head=True`.
        multiple (`int`, *optional*):
            The length of the rows is padded to a multiple of this value.

    Returns:
        [`~trl.trainer.utils.FusedCausalLMOutput`]: Per-token outputs of shape `(2 * batch, seq_len - 1)`, zero where
        there is no completion token.
    """
    rows, branch, index = _share(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], multiple or 1)
    rows["attention_mask"] = _attention_masks(base_model, branch, rows["position_ids"])
    label_mask = inputs["labels"][:, 1:] != -100
    with _head_on_labels_only():
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"} | rows)
    given = [name for name in _PER_TOKEN_OUTPUTS if outputs.get(name) is not None]
    padded = {name: outputs[name].repeat(2, 1).gather(1, index).masked_fill(~label_mask, 0) for name in given}
    return FusedCausalLMOutput(label_mask=label_mask, **padded)


def _share(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, multiple: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Rows, as arguments of the model, the branch of each position, and where each padded one is in the row."""
    num_tokens = attention_mask.sum(dim=1, keepdim=True)
    num_prompt, _ = (num_tokens - (labels != -100).sum(dim=1, keepdim=True)).chunk(2)
    num_shared = (num_prompt - 1).clamp(min=0)
    num_chosen, num_rejected = ((num - 1 - num_shared).clamp(min=0) for num in num_tokens.chunk(2))
    width = multiple * math.ceil(max(1, int((num_shared + num_chosen + num_rejected).max())) / multiple)
    place = torch.arange(width, device=input_ids.device).expand(len(num_chosen), width)
    # 0 is the shared part, 1 the chosen completion, 2 the rejected completion and the padding behind it
    branch = (place >= num_shared).long() + (place >= num_shared + num_chosen).long()
    last = input_ids.size(1) - 1
    position_ids = torch.where(branch == 2, place - num_chosen, place).clamp(max=last)

    def cut(padded: torch.Tensor) -> torch.Tensor:
        chosen, rejected = (half.gather(1, position_ids) for half in padded.chunk(2))
        return torch.where(branch == 2, rejected, chosen)

    next_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    padded_place = torch.arange(last, device=input_ids.device).expand(len(num_chosen), last)
    index = torch.cat([padded_place, padded_place + num_chosen]).clamp(max=width - 1)
    # In the shared part, the next token of the chosen sequence is a prompt token, which has no label
    rows = {"input_ids": cut(input_ids), "shift_labels": cut(next_labels), "position_ids": position_ids}
    return rows, branch, index


def _attention_masks(model: PreTrainedModel, branch: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor | dict:
    """Which positions each position sees, in the form that transformers hands on to the layers unchanged."""
    config = model.config.get_text_config()
    ones = torch.ones(branch.size(1), branch.size(1), dtype=torch.bool, device=branch.device)
    # Padding is on the right, where only padding sees it
    sees = ones.tril() & ~((branch[:, :, None] == 2) & (branch[:, None, :] == 1))
    window = getattr(config, "sliding_window", None)

    def make_mask(kind: str) -> torch.Tensor:
        mask = sees
        if kind == "sliding_attention" and window is not None:
            mask = sees & (position_ids[:, :, None] - position_ids[:, None, :] < window)
        if config._attn_implementation == "eager":  # is added to the scores, SDPA takes booleans
            mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
        return mask[:, None]

    kinds = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in kinds:  # such models take one mask per type of layer
        return {kind: make_mask(kind) for kind in _LAYER_TYPES}
    return make_mask("full_attention" if kinds else "sliding_attention")


def _head_on_labels_only() -> AbstractContextManager:
    # Without Triton, TRL's fused head scores every position, labelled or not, for compilers that need constant shapes
    # (trl 1.16, `add_fused_lm_head`). On a CPU, this can take half of the time of a step
    use_triton = trl.trainer.utils._use_triton
    return replaced(trl.trainer.utils, "_use_triton", lambda device: device.type == "cpu" or use_triton(device))


def supports_shared_prefix(model: PreTrainedModel | PeftModel) -> str | None:
    """The reason why a model cannot take prefix-shared rows, as far as its configuration tells, or `None`."""
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    config, parameters = model.config.get_text_config(), inspect.signature(type(model).forward).parameters
    attention, other = config._attn_implementation, {*(getattr(config, "layer_types", None) or ())} - {*_LAYER_TYPES}
    obstacles = {
        "the adapter puts virtual tokens before the sequence": any(a.is_prompt_learning for a in adapters),
        "the model has an encoder": model.config.is_encoder_decoder,
        f"`attn_implementation={attention!r}` takes no mask per row, 'sdpa' does": attention not in ("sdpa", "eager"),
        f"`{type(model).__name__}` takes no `position_ids`": "position_ids" not in parameters,
        f"a token in {sorted(other)} layers also depends on tokens that it must not see": other,
        "the model's attention is cut into chunks": getattr(config, "attention_chunk_size", None) is not None,
    }
    return next((reason for reason, holds in obstacles.items() if holds), None)


def pair_lengths(dataset: Dataset, max_length: int | None = None) -> np.ndarray:
    """Unique tokens of each pair: of the prompt and both completions, as far as `max_length` leaves them."""
    columns = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).with_format("arrow")[:].columns
    prompt, chosen, rejected = (list_value_length(column).to_numpy() for column in columns)
    sequences = np.minimum([prompt + chosen, prompt + rejected, prompt], max_length or np.inf)
    return sequences[0] + sequences[1] - sequences[2]


@dataclass(eq=False)
class LengthGroupedSampler(Sampler[int]):
    """
    Puts rows of similar length into the same step, in an order that is random all the same: the rows are shuffled, cut
    into mega-batches of 50 steps, sorted there by length (in spans of 32 tokens, so that short rows stay mixed) and
    cut into steps, and the steps are shuffled. The step with the longest row comes first, so that a shortage of memory
    shows at once.

    The order depends on seed, epoch and lengths alone. It is drawn at the beginning of an epoch, so the lengths may
    change from one epoch to the next.

    Args:
        num_rows (`int`):
            Number of rows.
        lengths (`Callable[[], np.ndarray]`):
            Returns the number of tokens of each row.
        step_size (`int`):
            Number of rows that are computed at the same time, on all processes together.
        seed (`int`):
            Seed.
        epoch (`Callable[[], int]`):
            Returns the number of the epoch that begins.
    """

    num_rows: int
    lengths: Callable[[], np.ndarray]
    step_size: int
    seed: int
    epoch: Callable[[], int]

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        lengths, size = self.lengths(), self.step_size
        random = np.random.default_rng([self.seed, self.epoch()])
        order = random.permutation(len(lengths))
        longest = int(lengths.argmax())
        order = np.concatenate([[longest], order[order != longest]])
        # The rows that are left over after the last full step are random ones, not the shortest
        num_full = len(lengths) // size * size
        order, rest = order[:num_full], order[num_full:]
        mega_batch = np.arange(num_full) // (size * max(1, min(_MEGA_BATCH, len(lengths) // (4 * size))))
        steps = order[np.lexsort((-(lengths[order] // _LENGTH_SPAN), mega_batch))].reshape(-1, size)
        # The first mega-batch begins with the longest row
        return map(int, np.concatenate([steps[:1].ravel(), random.permutation(steps[1:]).ravel(), rest]))
