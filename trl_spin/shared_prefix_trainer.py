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

from collections.abc import Callable
from functools import cache, partial, wraps

import torch
from datasets import Dataset
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from .compat import replaced
from .layout import LengthGroupedSampler, forward_shared, pair_lengths, supports_shared_prefix
from .run.logs import logger


class SharedPrefixDPOTrainer(DPOTrainer):
    r"""
    [`~trl.DPOTrainer`] with the same losses, gradients and metrics from fewer computed tokens, as in [Accelerating
    Direct Preference Optimization with Prefix Sharing](https://huggingface.co/papers/2410.20305).

    [`~trl.DPOTrainer`] sends each pair through the model as two sequences, prompt and chosen completion, prompt and
    rejected completion, padded to the longest of the batch. This trainer sends one row, the prompt followed by both
    completions, with an attention mask that hides the chosen completion from the rejected one and with positions that
    continue from the prompt in both. On a CPU, it also applies the language-model head to completion tokens only. The
    same holds for the reference model. All loss types and options of [`~trl.DPOConfig`] work as they do there, and
    `train_sampling_strategy="group_by_length"`, which [`~trl.DPOTrainer`] does not support, groups pairs of similar
    length so that little padding is left. The metric `computed_over_unique_tokens` tells how much.

    Example:

    ```python
    from datasets import load_dataset
    from trl_spin import SharedPrefixDPOTrainer

    dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

    trainer = SharedPrefixDPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", train_dataset=dataset)  # was: DPOTrainer
    trainer.train()
    ```

    Before the first batch, the log-probs of two of its pairs are computed in both layouts and compared. The trainer
    falls back to the layout of [`~trl.DPOTrainer`], and warns with the reason, if they differ by more than rounding
    explains, or if

    - the model has layers other than full and sliding-window attention (state-space models, hybrids), an encoder, or
      no `position_ids`;
    - `attn_implementation` is neither `"sdpa"` nor `"eager"`;
    - the adapter is a prompt-learning one;
    - a router's auxiliary loss is trained, which counts the tokens of the prompt;
    - the dataset has images, `data_collator` is not TRL's, or `truncation_mode="keep_end"` cuts prompts;
    - sequences are split over devices (context or sequence parallelism).

    Set the attribute `share_prefix` to `False` to keep the layout of [`~trl.DPOTrainer`] without a warning.

    Args:
        *args, **kwargs:
            See [`~trl.DPOTrainer`].
    """

    share_prefix: bool = True
    shares_prefix: bool | None = None  # what was decided; None as long as no batch has been seen
    _pair_collator = None

    @wraps(DPOTrainer.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._pair_collator = self.data_collator  # subclasses may wrap it from here on

    # ---- Layout ----

    def choose_layout(self, inputs: dict[str, torch.Tensor], model: torch.nn.Module | None = None):
        """
        Decides whether a pair goes through the model as one row with a shared prompt or as DPOTrainer's two sequences.
        The first batch does this if nobody did before.

        Args:
            inputs (`dict[str, torch.Tensor]`):
                Collated and prepared batch. Up to two of its pairs are computed in both layouts.
            model (`nn.Module`, *optional*):
                Model to try it with, as prepared for the forward pass. Defaults to the policy.
        """
        self.shares_prefix = False
        if not self.share_prefix:
            return
        collator = self._pair_collator or self.data_collator
        is_own = type(collator) is DataCollatorForPreference
        cuts_prompt = is_own and collator.truncation_mode == "keep_end" and collator.max_length is not None
        parallelism = self.accelerator.parallelism_config
        obstacles = {
            "the dataset has images": self._is_vision_dataset,
            "`data_collator` is not TRL's, and may give the two completions different prompts": not is_own,
            "`truncation_mode='keep_end'` cuts the prompt differently for the two completions": cuts_prompt,
            "the router's auxiliary loss counts the prompt twice": self.aux_loss_enabled,
            "sequences are split over devices": parallelism and (parallelism.cp_enabled or parallelism.sp_enabled),
        }
        reason = next((reason for reason, holds in obstacles.items() if holds), None)
        reason = reason or supports_shared_prefix(self._unwrap(self.model))
        # A compiled model has no truth value
        candidates = [self.model_wrapped if model is None else model, self.ref_model]
        for candidate in (candidate for candidate in candidates if candidate is not None):
            reason = reason or supports_shared_prefix(self._unwrap(candidate)) or self._compare(candidate, inputs)
        self.shares_prefix = reason is None
        if reason is not None:
            remedy = "The result is the same, it takes longer. `share_prefix=False` silences this warning."
            logger.warning(f"Prompts are computed twice for each pair, because {reason}. {remedy}")

    def _compare(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> str | None:
        """The reason why the two layouts do not give the same log-probs, or `None` if they do."""
        pairs = {key: torch.cat([side[:2] for side in value.chunk(2)]) for key, value in inputs.items()}
        logps, training = [], model.training
        model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                for self.shares_prefix in (False, True):
                    logps.append(self.token_logps(model, pairs))
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or not self.shares_prefix:
                raise
            return f"the model does not take rows with a shared prompt ({type(error).__name__}: {error})"
        finally:
            self.shares_prefix = None
            model.train(training)
        difference = (logps[0] - logps[1]).abs().sum(dim=1) / (logps[0] != 0).sum(dim=1).clamp(min=1)
        difference = self.accelerator.gather(difference.max()).max().item()
        is_exact = self.accelerator.mixed_precision == "no" and self._unwrap(model).dtype == torch.float32
        # Between two kernels, bfloat16 differs by some 0.01; a token that sees the other completion, by some 0.3
        tolerance = 1e-3 if is_exact and torch.get_float32_matmul_precision() == "highest" else 0.1
        if not difference <= tolerance:
            what = f"log-probs of two pairs differ by {difference:.3g} per token, where rounding explains {tolerance}"
            return f"{what}: the model's layers do not keep the completions apart"
        return None

    def _unwrap(self, model):
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def forward_pairs(self, model: torch.nn.Module, **kwargs):
        """
        Takes the place of `model(**kwargs)` for a batch of chosen and rejected sequences. Log-probs are computed in
        the layout that was chosen, logits always in DPOTrainer's.

        Args:
            model (`nn.Module`):
                Model, as prepared for the forward pass.
            **kwargs:
                Arguments of the model: all inputs of the batch that DPOTrainer does not keep for itself.

        Returns:
            Outputs of the model for the padded batch.
        """
        if not (self.shares_prefix and kwargs.get("fused_lm_head")):
            return model(**kwargs)
        return forward_shared(model, self._unwrap(model), kwargs, self.args.pad_to_multiple_of)

    def token_logps(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Log-probs of the completion tokens of a batch.

        Args:
            model (`nn.Module`):
                Model, as prepared for the forward pass.
            inputs (`dict[str, torch.Tensor]`):
                Collated and prepared batch.

        Returns:
            `torch.Tensor` of shape `(2 * batch, seq_len - 1)`: Log-probs, 0 where there is no completion token.
        """
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        model_kwargs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        outputs = self.forward_pairs(model, **model_kwargs, labels=labels, use_cache=False, fused_lm_head=True)
        # Prompt-learning PEFT prepends virtual tokens to the outputs
        return outputs.log_probs[:, -(labels.size(1) - 1) :]

    # ---- Loss and metrics ----

    def compute_ref_log_probs(self, model, inputs):
        if self.shares_prefix is None:
            # DPOTrainer precomputes the reference before DeepSpeed or FSDP have placed the policy (trl 1.16)
            self.choose_layout(inputs, model if self.is_deepspeed_enabled or self.is_fsdp_enabled else None)
        return super().compute_ref_log_probs(partial(self.forward_pairs, model), inputs)

    def _compute_loss(self, model, inputs, return_outputs):
        if self.shares_prefix is None:
            self.choose_layout(inputs, model)
        with replaced(self, "precompute_ref_logps", self.precompute_ref_logps):
            if self.shares_prefix and not self.precompute_ref_logps:
                # DPOTrainer would call the reference model itself, in its own layout (trl 1.16)
                ref_logps = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
                inputs = inputs | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), ref_logps, strict=True))
                self.precompute_ref_logps = True
            result = super()._compute_loss(partial(self.forward_pairs, model), inputs, return_outputs)
        if self.model.training:
            self._count_tokens(inputs)
        return result

    def _count_tokens(self, inputs: dict[str, torch.Tensor]):
        unique = inputs["attention_mask"].chunk(2)[0].sum(dim=1) + inputs["completion_mask"].chunk(2)[1].sum(dim=1)
        computed = torch.full_like(unique, 2 * inputs["input_ids"].size(1))
        if self.shares_prefix:
            # In a row, the last token of the prompt occurs twice, and the last tokens of the completions are left out
            multiple = self.args.pad_to_multiple_of or 1
            computed[:] = (unique.max() - 1 + multiple - 1) // multiple * multiple
        tokens = self.accelerator.gather(torch.stack([computed.sum(), unique.sum()])).view(-1, 2).sum(dim=0)
        self._metrics["train"]["tokens"].append(tokens.tolist())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and (tokens := self._metrics["train"].pop("tokens", None)):
            computed, unique = map(sum, zip(*tokens, strict=True))
            self._metrics["train"]["computed_over_unique_tokens"] = [computed / unique]
        super().log(logs, start_time)

    # ---- Batches of similar length ----

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        grouped = self._group_by_length(dataset, self.args.train_batch_size, seed, lambda: int(self.state.epoch or 0))
        return grouped or super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset):
        grouped = self._group_by_length(eval_dataset, self.args.eval_batch_size, 0, lambda: 0)
        return grouped or super()._get_eval_sampler(eval_dataset)

    def _group_by_length(self, dataset, batch_size: int, seed: int, epoch: Callable) -> LengthGroupedSampler | None:
        # The Trainer's own sampler needs a column of lengths, which DPOTrainer drops (trl 1.16)
        if self.args.train_sampling_strategy != "group_by_length":
            return None
        if hasattr(dataset, "lengths"):
            lengths = dataset.lengths
        elif isinstance(dataset, Dataset) and "prompt_ids" in dataset.column_names:
            lengths = cache(partial(pair_lengths, dataset, getattr(self._pair_collator, "max_length", None)))
        else:
            return None
        return LengthGroupedSampler(len(dataset), lengths, batch_size * self.accelerator.num_processes, seed, epoch)
