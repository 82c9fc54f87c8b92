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

"""Prefix-shared rows: a prompt and its two answers in one row, and batches of rows of similar length."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import trl.trainer.utils
from peft import PeftModel
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from .game import GameDataset


_MEGA_BATCH = 50
# Rows whose lengths fall into the same span of tokens are not told apart. Sorted to the token, short answers of a kind
# (cut short, run on) would share a step: in the quickstart, whose rows have 16 to 24 tokens, training suffered from it
_LENGTH_SPAN = 32
_PER_TOKEN_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def forward_shared(
    model: nn.Module,
    base_model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor | None = None,
    fused_lm_head: bool = False,
    pad_to_multiple_of: int | None = None,
    **kwargs,
) -> Any:
    r"""
    Takes the place of a model that is called with DPOTrainer's batch of real and generated sequences, and computes the
    same outputs with one row per pair:

        prompt[:-1] | prompt[-1], real[:-1] | prompt[-1], generated[:-1]

    The generated branch does not see the real one, and its positions go on from the prompt. As the last prompt token
    stands in both branches, each answer token is predicted at a position of its own. The last token of an answer
    predicts nothing and is left out. So P + R + G - 1 positions are computed for a pair instead of 2 · max(P + R, P +
    G), and the sums are the same. The idea is that of [Accelerating Direct Preference Optimization with Prefix
    Sharing](https://huggingface.co/papers/2410.20305).

    Rows are cut out of DPOTrainer's batch on the device, so that collator, losses and metrics need not know of them.

    Args:
        model (`nn.Module`):
            Model with TRL's fused head, as prepared for training.
        base_model ([`~transformers.PreTrainedModel`]):
            The same model, without what wraps it.
        input_ids (`torch.Tensor` of shape `(2 * batch, seq_len)`):
            Prompts with their real answers, then the same prompts with the generated ones; padded on the right.
        attention_mask (`torch.Tensor` of shape `(2 * batch, seq_len)`):
            1 where there is a token.
        labels (`torch.Tensor` of shape `(2 * batch, seq_len)`, *optional*):
            Answer tokens, -100 elsewhere.
        fused_lm_head (`bool`, *optional*, defaults to `False`):
            Without it, logits are asked for, and the model is called as it is.
        pad_to_multiple_of (`int`, *optional*):
            Number of which the length of the rows is made a multiple.
        **kwargs:
            Further arguments of the model.

    Returns:
        [`~trl.trainer.utils.FusedCausalLMOutput`]: Per-token outputs of shape `(2 * batch, seq_len - 1)`, zero where
        there is no answer token.
    """
    if not fused_lm_head:
        return model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    shared_ids, shared_labels, position_ids, branch, index = _share(
        input_ids, attention_mask, labels, pad_to_multiple_of or 1
    )
    with _head_on_labels_only():
        outputs = model(
            input_ids=shared_ids,
            attention_mask=_attention_masks(base_model, branch, position_ids),
            position_ids=position_ids,
            shift_labels=shared_labels,
            fused_lm_head=True,
            **kwargs,
        )
    label_mask = labels[:, 1:] != -100
    return FusedCausalLMOutput(
        label_mask=label_mask,
        **{
            name: outputs[name].repeat(2, 1).gather(1, index).masked_fill(~label_mask, 0)
            for name in _PER_TOKEN_OUTPUTS
            if outputs.get(name) is not None
        },
    )


def _share(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, multiple: int
) -> tuple[torch.Tensor, ...]:
    """Rows, their next tokens and positions, the branch of each position, and where each padded one is in the row."""
    num_answer = (labels != -100).sum(dim=1, keepdim=True)
    num_real, num_generated = num_answer.chunk(2)
    num_shared = (attention_mask.sum(dim=1, keepdim=True) - num_answer).chunk(2)[0] - 1  # of the prompt
    width = multiple * math.ceil(max(1, int((num_shared + num_real + num_generated).max())) / multiple)
    place = torch.arange(width, device=input_ids.device).expand(len(num_real), width)
    # 0 is the shared part, 1 the real answer, 2 the generated answer and what fills the row up
    branch = (place >= num_shared).long() + (place >= num_shared + num_real).long()
    last = input_ids.size(1) - 1
    position_ids = torch.where(branch == 2, place - num_real, place).clamp(max=last)

    def cut(padded: torch.Tensor) -> torch.Tensor:
        real, generated = (half.gather(1, position_ids) for half in padded.chunk(2))
        return torch.where(branch == 2, generated, real)

    next_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    padded_place = torch.arange(last, device=input_ids.device).expand(len(num_real), last)
    index = torch.cat([padded_place, padded_place + num_real]).clamp(max=width - 1)
    # In the shared part, the next token of the real sequence is a prompt token, which has no label
    return cut(input_ids), cut(next_labels), position_ids, branch, index


def _attention_masks(
    model: PreTrainedModel, branch: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What each position sees, for the layers of the model, in the form that transformers passes through unchanged."""
    config = model.config.get_text_config()
    ones = torch.ones(branch.size(1), branch.size(1), dtype=torch.bool, device=branch.device)
    # Rows are filled up on the right, where nothing but the filling sees it
    sees = ones.tril() & ~((branch[:, :, None] == 2) & (branch[:, None, :] == 1))
    window = getattr(config, "sliding_window", None)
    windowed = sees
    if window is not None:
        windowed = sees & (position_ids[:, :, None] - position_ids[:, None, :] < window)

    def finish(mask: torch.Tensor) -> torch.Tensor:
        mask = mask[:, None]
        if config._attn_implementation == "eager":  # is added to the scores, SDPA takes booleans
            return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
                ~mask, torch.finfo(model.dtype).min
            )
        return mask

    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds:  # such models take one mask for each kind of layer
        return {"full_attention": finish(sees), "sliding_attention": finish(windowed)}
    return finish(sees if kinds else windowed)


@contextmanager
def _head_on_labels_only():
    # Where there is no Triton, TRL's fused head scores every position, as if it had a label, for the sake of compilers
    # that need constant shapes (trl 1.16, `add_fused_lm_head`). On a CPU, that can be half of the time of a step.
    use_triton = trl.trainer.utils._use_triton
    trl.trainer.utils._use_triton = lambda device: device.type == "cpu" or use_triton(device)
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = use_triton


def supports_shared_prefix(model: PreTrainedModel | PeftModel) -> str | None:
    """
    Why a model cannot take prefix-shared rows, as far as its configuration tells.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model.

    Returns:
        `str` or `None`: Reason.
    """
    if isinstance(model, PeftModel):
        if any(config.is_prompt_learning for config in model.peft_config.values()):
            return "the adapter puts virtual tokens before the sequence"
        model = model.get_base_model()
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return "the model has an encoder"
    if config._attn_implementation not in ("sdpa", "eager"):
        return (
            f"`attn_implementation={config._attn_implementation!r}` takes no mask of its own for each row, which 'sdpa' "
            "does"
        )
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return f"`{type(model).__name__}` takes no `position_ids`"
    other = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if other:
        return f"the model has layers of the kind {other[0]!r}, in which a token also depends on those it must not see"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "the model's attention is cut into chunks"
    return None


class LengthGroupedSampler(Sampler[int]):
    """
    Puts pairs of similar length into the same step, in an order that is random all the same: the rows are shuffled, cut
    into mega-batches of 50 steps, sorted there by length (in spans of 32 tokens, so that short rows stay mixed) and cut
    into steps, and the steps are shuffled. The step with the longest row goes first, so that running out of memory
    happens at once.

    The order depends on the seed, the epoch and the lengths, and on nothing that was drawn before. It is made when an
    epoch begins, as the lengths change with the answers.

    Args:
        game ([`~game.GameDataset`]):
            Pairs.
        step_size (`int`):
            Number of rows that are computed at the same time, on all processes together.
        seed (`int`):
            Seed.
    """

    def __init__(self, game: GameDataset, step_size: int, seed: int):
        self.game = game
        self.step_size = step_size
        self.seed = seed

    def __len__(self) -> int:
        return len(self.game)

    def __iter__(self) -> Iterator[int]:
        lengths, size = self.game.lengths(), self.step_size
        random = np.random.default_rng([self.seed, self.game.epoch])
        order = random.permutation(len(lengths))
        longest = int(lengths.argmax())
        order = np.concatenate([[longest], order[order != longest]])
        # The rows that do not fill a step are any rows, not the shortest ones
        num_full = len(lengths) // size * size
        order, rest = order[:num_full], order[num_full:]
        mega_batch = size * max(1, min(_MEGA_BATCH, len(lengths) // (4 * size)))
        mega_batches = [order[start : start + mega_batch] for start in range(0, num_full, mega_batch)]
        order = np.concatenate(
            [rows[np.argsort(-(lengths[rows] // _LENGTH_SPAN), kind="stable")] for rows in mega_batches] + [rest]
        )
        steps = np.array_split(order[:num_full], math.ceil(num_full / size)) if num_full else []
        # The first mega-batch begins with the longest row
        shuffled = [steps[0], *(steps[1 + i] for i in random.permutation(len(steps) - 1))] if steps else []
        return iter(np.concatenate([*shuffled, rest]).tolist())
