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

import copy
import hashlib
import inspect
import json
import math
import random
import shutil
import signal
import textwrap
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import trl.trainer.dpo_trainer
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, DatasetDict, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import TrainOutput, sort_checkpoints
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import get_config_model_id

from .callbacks import DryRun, SelfPlayCallback
from .data import find_end_token_ids, prepare_dataset
from .engines import check_vllm, make_vllm_generation
from .game import GAME_COLUMNS, GameCollator, GameDataset, atomic_open, write_json
from .layout import LengthGroupedSampler, forward_shared, supports_shared_prefix
from .model_card import add_self_play_section, read_records
from .objectives import MARGIN_LOSSES, OBJECTIVES, mix_reference, t_spin
from .resume import (
    RunLock,
    StopRequested,
    StopSignal,
    choose_checkpoint,
    compare_settings,
    explain_out_of_memory,
    explain_write_error,
    library_versions,
    on_main_process,
    run_settings,
    weights_fingerprint,
)
from .signals import proportion_interval
from .spin_config import TRL_LOSSES, SPINConfig


logger = get_logger(__name__)

_CARD_SETTINGS = (
    "loss_type",
    "sft_weight",
    "reference_alpha",
    "opponent_history",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "max_completion_length",
    "temperature",
    "top_p",
    "truncated_completions",
    "seed",
)


class SPINTrainer(DPOTrainer):
    r"""
    Trainer for Self-Play Fine-Tuning (SPIN), from [Self-Play Fine-Tuning Converts Weak Language Models to Strong
    Language Models](https://huggingface.co/papers/2401.01335).

    The only changes w.r.t. [`~trl.DPOTrainer`] are: it takes SFT data and the model itself generates the other side of
    each pair; `train()` plays `num_self_play_iterations` iterations, each against the model that the last one left; the
    reference is that same model, scored once per iteration, so there is no second model in memory; and learning rate,
    its schedule, λ (`beta`) and the number of passes belong to the iteration. With the logistic loss (`"sigmoid"`, the
    default), iteration t minimizes Equation 4.7 of the paper:

    $$ L(\theta) = \mathbb{E}\left[\ell\left(\lambda \log \frac{p_\theta(y|x)}{p_{\theta_t}(y|x)} - \lambda \log
    \frac{p_\theta(y'|x)}{p_{\theta_t}(y'|x)}\right)\right], \quad y' \sim p_{\theta_t}(\cdot|x) $$

    The iterations themselves are the work of the [`SelfPlayCallback`], which the trainer attaches itself.

    Example:

    ```python
    from datasets import load_dataset
    from trl_spin import SPINTrainer

    dataset = load_dataset("HuggingFaceH4/ultrachat_200k", split="train_sft")

    trainer = SPINTrainer("alignment-handbook/zephyr-7b-sft-full", train_dataset=dataset)
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, which must have been fine-tuned on the data already: a name on the Hub, a path, or a
            model. Loaded as [`~trl.DPOTrainer`] loads it.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            Must be `None`: the reference of SPIN is the model itself at the start of each iteration.
        args ([`SPINConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            See [`~trl.DPOTrainer`].
        train_dataset ([`~datasets.Dataset`]):
            SFT data: `messages`; `prompt` and `completion`, as text or messages; preferences, of which `chosen` is
            used; `real` answers as in the official SPIN data; or ShareGPT `conversations`.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Held-out data in the same formats. The same game is played on it: it is answered at the start and evaluated
            at the end of every iteration.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            See [`~trl.DPOTrainer`].
        compute_metrics (`Callable`, *optional*):
            See [`~trl.DPOTrainer`].
        callbacks (`list[TrainerCallback]`, *optional*):
            See [`~trl.DPOTrainer`].
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            See [`~trl.DPOTrainer`]. A scheduler passed here spans the whole run.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            See [`~trl.DPOTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            See [`~trl.DPOTrainer`]. Opponent and reference of iteration t are the model with its adapter of that time.
        compute_answer_metrics (`Callable`, *optional*):
            Function of held-out prompts, generated and real answers (three lists of texts without special tokens) that
            returns numbers by name, better when higher, such as the share of exact matches. They are logged as
            `eval_answers/<name>`: of the model that self-play starts from, and of each iteration's.
    """

    _tag_names = ["trl", "spin"]
    _name = "SPIN"
    _paper = {
        "title": "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models",
        "id": "2401.01335",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{chen2024selfplay,
                title        = {{Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models}},
                author       = {Zixiang Chen and Yihe Deng and Huizhuo Yuan and Kaixuan Ji and Quanquan Gu},
                year         = 2024,
                booktitle    = {Forty-first International Conference on Machine Learning, ICML 2024, Vienna, Austria, July 21-27, 2024},
                eprint       = {2401.01335}
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: SPINConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | DatasetDict | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        compute_answer_metrics: Callable[[list[str], list[str], list[str]], dict[str, float]] | None = None,
    ):
        if ref_model is not None:
            raise ValueError(
                "SPIN takes no `ref_model`: the reference of each iteration is the model itself at its start, which is "
                "also the opponent that generates the answers. To train against a fixed reference, use "
                "`trl.DPOTrainer`."
            )
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = SPINConfig(f"{model_id.split('/')[-1]}-SPIN")
        elif not isinstance(args, SPINConfig):
            raise TypeError(f"`args` must be a `SPINConfig`, got {type(args).__name__}.")
        if optimizers[1] is not None and isinstance(args.learning_rate, list):
            raise ValueError(
                f"`learning_rate={args.learning_rate}` sets a peak per iteration, but `optimizers` brings a scheduler "
                "of its own, which spans the whole run. Give one of the two."
            )
        if train_dataset is None:
            raise ValueError("`train_dataset` is required: the SFT data whose answers the model learns to prefer.")
        # Rows of the dataset that are used, if not all of them
        self._subsets: dict[str, list[int]] = {}
        if args.held_out_size:
            if eval_dataset is not None:
                raise ValueError(
                    f"`held_out_size={args.held_out_size}` and `eval_dataset` both say what is held out: give one of them."
                )
            if isinstance(train_dataset, Dataset) and args.held_out_size >= len(train_dataset):
                raise ValueError(
                    f"`held_out_size` ({args.held_out_size}) leaves nothing of the {len(train_dataset)} training rows."
                )
            eval_dataset = train_dataset
        eval_datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        for name in eval_datasets:
            if name == "train" or Path(name).name != name:
                raise ValueError(
                    f"An evaluation dataset cannot be called {name!r}: its game is kept in files of this name, beside those "
                    "of 'train'. Rename it in `eval_dataset`."
                )
        for name, dataset in {"train": train_dataset, **eval_datasets}.items():
            _check_dataset(dataset, name)
        if args.held_out_size:
            shuffled = random.Random(args.seed).sample(range(len(train_dataset)), len(train_dataset))
            self._subsets = {
                "eval": sorted(shuffled[: args.held_out_size]),
                "train": sorted(shuffled[args.held_out_size :]),
            }
        if args.max_prompts is not None:
            rows = self._subsets.get("train", range(len(train_dataset)))
            if args.max_prompts < len(rows):
                self._subsets["train"] = random.Random(args.seed).sample(rows, args.max_prompts)
        for option in ("early_stopping", "load_best_iteration_at_end"):
            if getattr(args, option) and eval_dataset is None:
                raise ValueError(
                    f"`{option}=True` needs held-out prompts: pass an `eval_dataset`, or set `held_out_size`."
                )
        if compute_answer_metrics is not None and eval_dataset is None:
            raise ValueError(
                "`compute_answer_metrics` needs held-out prompts: pass an `eval_dataset`, or set `held_out_size`."
            )
        self.compute_answer_metrics = compute_answer_metrics
        if args.use_vllm:
            check_vllm(args)
        if not isinstance(model, str):
            _check_forward(model)
        # Kept for the model card: what a saved iteration goes back to
        self.base_model_id = model_id
        self.base_model_revision = (args.model_init_kwargs or {}).get("revision")
        self.dataset_name = train_dataset.info.dataset_name or "a local dataset"
        self.run_dir = args.output_dir
        self.left_out: dict[str, dict[str, int]] = {}
        self.games: dict[str, GameDataset] = {}
        # The Trainer does this too, but too late for a new adapter's random weights
        set_seed(args.seed)

        with _no_model_hash():
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )

        if isinstance(self.model, PeftModel) and "ref" in self.model.peft_config:
            # DPOTrainer copies a given adapter for use as a fixed reference
            self.model.delete_adapter("ref")
        if args.use_vllm:
            check_vllm(args, self.model)
        for module in self.model.modules():
            # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights for inference at the first forward pass
            # in evaluation mode, and no gradient flows through them from then on: after generation, nothing would train
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False
        if args.disable_dropout:
            # TRL zeroes the `nn.Dropout` modules only, attention modules keep their rate in an attribute
            for module in self.model.modules():
                if isinstance(getattr(module, "attention_dropout", None), float):
                    module.attention_dropout = 0.0
        # DPOTrainer computes the losses that it has, and `_compute_loss` adds the others
        losses = list(zip(self.loss_types, self.loss_weights, strict=True))
        self.own_losses = [(name, weight) for name, weight in losses if name not in TRL_LOSSES]
        self.trl_losses = [(name, weight) for name, weight in losses if name in TRL_LOSSES]
        # Where real and generated answer are the same, their log-ratios cancel
        self.plays_margins = {name for name, _ in losses} <= MARGIN_LOSSES and not self.use_weighting
        self.plays_triplets = "t_spin" in args.loss_type
        self.data_collator = GameCollator(self.data_collator)
        self.self_play_iteration = 0
        self._skip_unplayed = False
        self._check_next_loss = False
        self._eval_margins: list[float] = []
        self._sums = {"train": defaultdict(float), "eval": defaultdict(float)}  # over tokens, since the last log
        self._shares_prefix = False
        self.add_callback(SelfPlayCallback(self))
        self.stop_signal = StopSignal(self.accelerator)
        self._start_fingerprint = weights_fingerprint(self.accelerator, self.model)

    @cached_property
    def vllm_generation(self):
        """TRL's interface to vLLM, which is started at its first use: the rehearsal before the first iteration."""
        return make_vllm_generation(self)

    def _build_accelerator_args(self, **kwargs):
        if self.args.gradient_checkpointing is None and self.args.ddp_find_unused_parameters is None:
            # What the Trainer chooses with checkpointing, as DPOTrainer has it. Here, that is decided later
            self.args.ddp_find_unused_parameters = False
        return super()._build_accelerator_args(**kwargs)

    # ---- Data ----

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # Too early: the model, whose end tokens are needed, is not there yet. See `_precompute_ref_logps`.
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [
            name for name in (*GAME_COLUMNS, "proto_ids") if name not in self._signature_columns
        ]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> GameDataset:
        # The last thing that DPOTrainer does with a dataset. There is nothing to score before the opponent has
        # answered, so this is where SFT rows become the prompts and real answers of a game.
        if not self.games:
            eos_token_ids = self.model.generation_config.eos_token_id
            eos_token_ids = eos_token_ids if isinstance(eos_token_ids, list) else [eos_token_ids]
            self.end_token_ids = find_end_token_ids(
                dataset, name, self._tokenizer, self.args, [i for i in eos_token_ids if i is not None]
            )
            context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
            lengths = [length for length in (self.args.max_length, context) if length is not None]
            self.max_length = min(lengths) if lengths else None
        with self.args.main_process_first(desc=f"Tokenizing {name} dataset"):
            rows, left_out = prepare_dataset(
                dataset,
                name,
                self._tokenizer,
                self.args,
                self.end_token_ids,
                self.max_length,
                self._subsets.get(name),
            )
        self.left_out[name] = dict(left_out)
        self.games[name] = GameDataset(name, rows)
        return self.games[name]

    def _get_train_sampler(self, train_dataset=None):
        # The Trainer's own grouping finds no lengths in the rows, and would keep those of the first game (trl 1.16)
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        args, game = self.args, self.games["train"]
        step_size = args.train_batch_size * self.accelerator.num_processes
        return LengthGroupedSampler(game, step_size, args.seed if args.data_seed is None else args.data_seed)

    def _get_eval_sampler(self, eval_dataset):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return LengthGroupedSampler(eval_dataset, self.args.eval_batch_size * self.accelerator.num_processes, seed=0)

    @property
    def judged_dataset(self) -> str:
        """Name of the dataset that tells most: held-out prompts, if there are any, as training ones are soon known."""
        return next((name for name in self.games if name != "train"), "train")

    def data_settings(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, Any]`: What tells this run's data from another's: fingerprints of the tokenized rows, and of the
            chat template.
        """
        return {
            "data": {name: f"{len(game)} rows, {game.fingerprint}" for name, game in self.games.items()},
            "chat_template": hashlib.sha256(str(self._tokenizer.chat_template).encode()).hexdigest(),
        }

    # ---- Running, stopping, resuming ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Plays all iterations, or goes on with a run that was stopped.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` goes on from the newest complete checkpoint in `output_dir`, or from the beginning if there is
                none yet: the same call starts a run and continues it. A path names the checkpoint.
            trial:
                See [`~transformers.Trainer.train`].
            ignore_keys_for_eval (`list[str]`, *optional*):
                See [`~transformers.Trainer.train`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: Number of steps, training loss and metrics.

        Raises:
            `ValueError`: If `output_dir` holds another run, is in use, or was made with other settings, or if there is
            nothing to resume from.
        """
        lock = RunLock(self.args.output_dir)
        on_main_process(self.accelerator, lock.acquire)
        try:
            resume_from_checkpoint = on_main_process(self.accelerator, self._open_run, resume_from_checkpoint or False)
            with (
                self.stop_signal,
                explain_out_of_memory(
                    "training",
                    "`gradient_checkpointing=True` needs less and changes no result, so the run can be resumed with it. A "
                    "smaller `per_device_train_batch_size` with more `gradient_accumulation_steps`, or a lower "
                    "`max_length`, needs a new run.",
                ),
            ):
                output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
                if self.stop_signal.signum:
                    raise StopRequested(self.stop_signal.signum)
                return output
        except DryRun:
            return TrainOutput(0, 0.0, {})
        except StopRequested as stop:
            message = (
                f"Stopped by {signal.Signals(stop.signum).name} at step {self.state.global_step}. To go on, give the "
                "same command with `--resume_from_checkpoint true`, or call `train(resume_from_checkpoint=True)`."
            )
            logger.warning(message)
            if stop.signum == signal.SIGINT:
                raise KeyboardInterrupt(message) from None
            raise SystemExit(128 + stop.signum) from None
        finally:
            if self.accelerator.is_main_process:
                lock.release()

    @property
    def _run_file(self) -> Path:
        return Path(self.args.output_dir) / "self_play" / "run.json"

    def _settings(self) -> dict[str, Any]:
        adapter = self.model.peft_config["default"].to_dict() if isinstance(self.model, PeftModel) else None
        for name in ("base_model_name_or_path", "inference_mode", "peft_version"):
            if adapter is not None:
                adapter.pop(name, None)
        return run_settings(
            self.args,
            adapter=adapter,
            model=self._start_fingerprint,
            num_processes=self.accelerator.num_processes,
            end_token_ids=self.end_token_ids,
            **self.data_settings(),
        )

    def _open_run(self, resume_from_checkpoint: str | bool) -> str | None:
        if not resume_from_checkpoint:
            if self._run_file.is_file():
                raise ValueError(
                    f"`output_dir` ({self.args.output_dir}) holds the games of another run ({self._run_file.parent}), and "
                    "runs are never mixed. Continue that run with `trainer.train(resume_from_checkpoint=True)` "
                    "(`--resume_from_checkpoint true`), or choose a new `output_dir`."
                )
            return None
        if not self._run_file.is_file():
            if resume_from_checkpoint is True and not sort_checkpoints(self.args.output_dir):
                return None  # the first of several equal commands
            raise ValueError(
                f"There is no self-play run to resume in `output_dir` ({self.args.output_dir}): {self._run_file} does "
                "not exist. Checkpoints of other trainers cannot be continued; pass one as `model` instead."
            )
        run = json.loads(self._run_file.read_text(encoding="utf-8"))
        compare_settings(self._run_file, run["settings"], self._settings())
        for name, now in library_versions().items():
            if run["versions"].get(name) != now:
                logger.warning(
                    f"The run was made with {name} {run['versions'].get(name)} and goes on with {now}: its result may "
                    "not be the same, to the last digit, as without the change."
                )
        return choose_checkpoint(self.args, resume_from_checkpoint, self.accelerator.num_processes)

    def recorded_token_budget(self) -> int | None:
        """
        Returns:
            `int` or `None`: `generation_token_budget` of the run that is resumed.
        """
        if not self._run_file.is_file():
            return None
        return json.loads(self._run_file.read_text(encoding="utf-8")).get("generation_token_budget")

    def write_run(self):
        """Writes down what the run depends on, to compare with when it is resumed."""

        def write():
            content = {
                "schema_version": 1,
                "settings": self._settings(),
                "generation_token_budget": self.args.generation_token_budget,
                "versions": library_versions(),
            }
            write_json(self._run_file, content)

        with explain_write_error(Path(self.args.output_dir)):
            on_main_process(self.accelerator, write)

    def check_finite_weights(self):
        """
        Raises:
            `ValueError`: If a trained weight is NaN or infinite, on any process.
        """
        bad = next(
            (name for name, p in self.model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()),
            None,
        )
        bad = [name for name in gather_object([bad]) if name is not None]
        if bad:
            raise ValueError(
                f"After step {self.state.global_step} (iteration {self.self_play_iteration}) the weights are not finite "
                f"(the first is {bad[0]}). They are not saved, so the last checkpoint and iteration are intact. Lower "
                "`learning_rate`, set `max_grad_norm`, or train in bfloat16 or float32 instead of float16."
            )

    def _save_checkpoint(self, model, trial):
        self.check_finite_weights()
        args, directory = self.args, Path(self.args.output_dir)
        # A checkpoint that is written over is incomplete until the end, when the Trainer writes this file
        state_file = directory / f"checkpoint-{self.state.global_step}" / "trainer_state.json"
        if args.should_save:
            state_file.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        # The Trainer removes old checkpoints by the clock, and before the other processes have written their part
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            with explain_write_error(directory):
                super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if args.should_save and limit:
            step = self.state.global_step
            older = [path for path in sort_checkpoints(args.output_dir) if int(path.rsplit("-", 1)[1]) <= step]
            start = max(first for first in self.iteration_steps if first <= step)
            # Where the iteration began, it can be played again should its game be damaged
            kept = {*older[-limit:], str(directory / f"checkpoint-{start}"), self.state.best_model_checkpoint}
            for path in older:
                if path not in kept:
                    shutil.rmtree(path)

    # ---- Schedule: iterations are made of whole epochs ----

    def set_initial_training_values(self, args, dataloader):
        if len(dataloader) == 0:
            raise ValueError(
                f"{len(self.games['train'])} rows do not fill one batch of {args.per_device_train_batch_size} on each of "
                f"{self.accelerator.num_processes} processes: lower `per_device_train_batch_size`, or set "
                "`dataloader_drop_last=False`."
            )
        # `num_train_epochs` counts passes per iteration, the Trainer counts all of them
        total = copy.copy(args)
        total.num_train_epochs = sum(args.per_iteration("num_train_epochs"))
        total.max_steps = -1
        values = list(super().set_initial_training_values(total, dataloader))
        self.steps_per_epoch = values[1]
        # First step of each iteration, and the end of the last
        self.iteration_steps = [n * values[1] for n in (0, *accumulate(args.per_iteration("num_train_epochs")))]
        if args.max_steps > 0:
            values[-1] = min(args.max_steps, values[-1])
            values[0] = math.ceil(values[-1] / self.steps_per_epoch)
        return tuple(values)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        first = copy.copy(args)
        first.learning_rate = args.per_iteration("learning_rate")[0]
        return DPOTrainer.get_optimizer_cls_and_kwargs(first, model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        # One schedule per iteration, put one behind the other: a function of the global step and of nothing else, so
        # that a resumed run needs no state
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        learning_rates = self.args.per_iteration("learning_rate")
        factors = []
        for learning_rate, num_epochs in zip(learning_rates, self.args.per_iteration("num_train_epochs"), strict=True):
            placeholder = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=learning_rate)
            schedule = super().create_scheduler(num_epochs * self.steps_per_epoch, placeholder)
            self.lr_scheduler = None
            if not isinstance(schedule, LambdaLR):
                raise ValueError(
                    f"`lr_scheduler_type={self.args.lr_scheduler_type!r}` depends on more than the step, so it cannot "
                    "restart at each iteration. Use 'linear', 'cosine' or another schedule of the step."
                )
            scale = learning_rate / learning_rates[0] if learning_rate != learning_rates[0] else 1.0
            factors += [scale * schedule.lr_lambdas[0](step) for step in range(num_epochs * self.steps_per_epoch)]
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = LambdaLR(optimizer, lambda step: factors[min(step, len(factors) - 1)])
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def begin_iteration(self, iteration: int):
        """
        Takes over the settings of an iteration. Its game has been dealt.

        Args:
            iteration (`int`):
                Self-play iteration.
        """
        self.self_play_iteration = iteration
        self.beta = self.args.per_iteration("beta")[iteration]
        self._check_next_loss = self.state.global_step == self.iteration_steps[iteration]
        anchor = self.args.per_iteration("sft_weight")[iteration]
        losses = self.trl_losses + ([("sft", anchor)] if anchor else []) or [("sigmoid", 0.0)]
        self.loss_types, self.loss_weights = map(list, zip(*losses, strict=True))
        # Where every pair is played, as is usual, there is nothing to look for in the batches
        all_played = all(all(pairs["played"][:]) for pairs in self.games["train"].pairs)
        self._skip_unplayed = self.plays_margins and not anchor and not all_played

    @property
    def _base_file(self) -> Path:
        return Path(self.args.output_dir) / "self_play" / "base.safetensors"

    def _trained_weights(self) -> dict[str, torch.Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def keep_base_weights(self):
        """
        Keeps the weights that self-play starts from, as far as they are trained, for [`~SPINTrainer.base_weights`].

        Raises:
            `ValueError`: If the model is sharded over the processes.
        """
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "`reference_alpha` below 1 and `load_best_iteration_at_end` exchange the model's weights in place, which "
                "DeepSpeed and FSDP do not allow. Leave them unset, or train with plain data parallelism."
            )

        def write():
            with atomic_open(self._base_file) as file:
                tensors = {name: p.to("cpu").contiguous() for name, p in self._trained_weights().items()}
                file.write(safetensors.torch.save(tensors))

        with explain_write_error(Path(self.args.output_dir)):
            on_main_process(self.accelerator, write)

    def load_base_weights(self):
        """Returns to the model that self-play started from."""
        base = safetensors.torch.load_file(self._base_file)
        for name, p in self._trained_weights().items():
            p.copy_(base[name])

    def load_iteration(self, iteration: int):
        """
        Returns to the model of an iteration.

        Args:
            iteration (`int`):
                Finished iteration; -1 for the model that self-play started from.
        """
        if iteration == -1:
            self.load_base_weights()
        else:
            self._load_from_checkpoint(str(Path(self.args.output_dir) / f"iteration-{iteration}"))
        self.log({"self_play/best_iteration": iteration})

    @contextmanager
    def base_weights(self):
        """The model that self-play started from, in the place of the model. Its own weights wait in the main memory."""
        weights = self._trained_weights()
        own = {name: p.to("cpu", copy=True) for name, p in weights.items()}
        try:
            self.load_base_weights()
            yield
        finally:
            for name, p in weights.items():
                p.copy_(own[name])

    # ---- Loss and metrics ----

    def choose_layout(self, rows: list[dict[str, Any]]):
        """
        Settles whether a pair goes through the model as one row, with the prompt shared, or as DPOTrainer's two padded
        ones. The shared row is for models that compute the same in both, which is tried.

        Args:
            rows (`list[dict[str, Any]]`):
                Pairs to try it with, the same ones on all processes, see [`~game.GameDataset.serve`].
        """
        self._shares_prefix = False
        if not self.args.share_prefix:
            return
        reason = supports_shared_prefix(self.model)
        if type(self.data_collator.collator) is not DataCollatorForPreference:
            reason = "`data_collator` is not TRL's, and may give the two answers different prompts"
        elif self.aux_loss_enabled:
            reason = "the router's auxiliary loss counts the prompt twice"
        elif (parallelism := self.accelerator.parallelism_config) and (
            parallelism.cp_enabled or parallelism.sp_enabled
        ):
            reason = "sequences are split over devices"
        if reason is None:
            reason = self._compare_layouts(self._prepare_inputs(self.data_collator(rows)))
        self._shares_prefix = reason is None
        if reason is not None:
            logger.warning(
                f"Prompts are computed twice for each pair, once per answer, because {reason}. The result is the same, "
                "it takes longer. `share_prefix=False` silences this warning."
            )

    def _compare_layouts(self, inputs: dict[str, torch.Tensor]) -> str | None:
        logps = []
        for self._shares_prefix in (False, True):
            try:
                logps.append(self._reference_logps(self.model_wrapped, inputs))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if not self._shares_prefix:
                    raise
                return f"the model does not take rows with a shared prompt ({type(error).__name__}: {error})"
        differences = (logps[0] - logps[1]).abs().sum(dim=1) / (logps[0] != 0).sum(dim=1).clamp(min=1)
        difference = self.accelerator.gather(differences).max().item()
        # Between two kernels, bfloat16 differs by some 0.01; a token that sees the other answer, by some 0.3
        tolerance = 1e-3 if self._is_exact and torch.get_float32_matmul_precision() == "highest" else 0.1
        if not difference <= tolerance:
            return (
                f"the log-probs of two pairs differ between the two layouts, by {difference:.3g} per token where "
                f"rounding explains {tolerance}: the model's layers do not keep the answers apart"
            )
        return None

    @property
    def _is_exact(self) -> bool:
        return self.accelerator.mixed_precision == "no" and self.model.dtype == torch.float32

    def _in_layout(self, model: nn.Module) -> Callable:
        if not self._shares_prefix:
            return model
        base_model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return partial(forward_shared, model, base_model, pad_to_multiple_of=self.args.pad_to_multiple_of)

    def compute_ref_log_probs(self, model, inputs):
        """
        Summed log-probs of real and generated answers under the reference: the model as it stands, adapter included.

        DPOTrainer's method would disable the adapter and score with the model of iteration 0.
        """
        return self._reference_logps(model, inputs).sum(dim=1).chunk(2, dim=0)

    def _reference_logps(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad(), self.accelerator.autocast():
            return self._token_logps(self._in_layout(model), inputs)

    def _token_logps(self, model: Callable, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probs of the answers' tokens in a batch of sequences, 0 elsewhere."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        model_kwargs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        outputs = model(**model_kwargs, labels=labels, use_cache=False, fused_lm_head=True)
        # Prompt-learning PEFT prepends virtual tokens to the outputs
        return outputs.log_probs[:, -(labels.size(1) - 1) :]

    def _compute_loss(self, model, inputs, return_outputs):
        mode = "train" if self.model.training else "eval"
        game = {key: value for key, value in inputs.items() if key in GAME_COLUMNS or key.startswith("proto_")}
        inputs = {key: value for key, value in inputs.items() if key not in game}
        share = 1.0
        if mode == "train" and self._skip_unplayed:
            inputs, game, share = self._drop_unplayed(inputs, game)
        opponent_logps = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        if self.args.reference_alpha < 1:
            for side in ("chosen", "rejected"):
                inputs[f"ref_{side}_logps"] = mix_reference(
                    inputs[f"ref_{side}_logps"], game[f"base_{side}_logps"], self.args.reference_alpha
                )
        seen, forward_pairs = [], self._in_layout(model)

        def forward(**kwargs):
            outputs = forward_pairs(**kwargs)
            if not seen:
                if mode == "train" and not self._skip_unplayed:
                    # A pair that is not played has no gradient, whatever the loss
                    played = game["played"].repeat(2)[:, None]
                    outputs.log_probs = torch.where(played, outputs.log_probs, outputs.log_probs.detach())
                seen.append(outputs)
            return outputs

        result = super()._compute_loss(forward, inputs, return_outputs)
        loss, outputs = result if return_outputs else (result, None)
        logps = seen[0].log_probs[:, -(inputs["input_ids"].size(1) - 1) :].sum(dim=1).chunk(2, dim=0)
        logratios = [logps[0] - inputs["ref_chosen_logps"], logps[1] - inputs["ref_rejected_logps"]]
        for name, weight in self.own_losses:
            if name == "t_spin":
                proto = {key.removeprefix("proto_"): game[key] for key in game if key.startswith("proto_")}
                proto_logps = self._token_logps(model, proto).sum(dim=1)
                if mode == "train":
                    proto_logps = torch.where(game["played"], proto_logps, proto_logps.detach())
                losses = t_spin(*logps, proto_logps, self.beta, self.args.t_spin_history_weight)
                self._log_objective(mode, "current_margins", logps[0] - logps[1])
                self._log_objective(mode, "history_margins", logps[1] - proto_logps)
            else:
                losses = OBJECTIVES[name](*logratios, self.beta, **self._objective_options(name))
                if name not in MARGIN_LOSSES:  # each side has a value of its own
                    self._log_objective(mode, "real_accuracies", (logratios[0] > 0).float())
                    self._log_objective(mode, "generated_accuracies", (logratios[1] < 0).float())
            loss = loss + weight * losses.mean()
        if share < 1:
            # Same mean over the whole batch, and same gradient, as if the unplayed pairs had gone through the model
            loss = share * loss + (1 - share) * self._margin_loss_at_zero()

        self._check_step(mode, loss, logps, opponent_logps, inputs)
        return (loss, outputs) if return_outputs else loss

    def _objective_options(self, name: str) -> dict[str, float]:
        if name == "space":
            return {"mu": self.args.space_mu}
        return {"shift": self.args.gsil_shift} if name.startswith("gsil_") else {}

    def _margin_loss_at_zero(self) -> float:
        zero = torch.zeros(1)
        return sum(weight * OBJECTIVES[name](zero, zero, self.beta).item() for name, weight in self._losses())

    def _losses(self) -> list[tuple[str, float]]:
        return [*zip(self.loss_types, self.loss_weights, strict=True), *self.own_losses]

    def _log_objective(self, mode: str, name: str, values: torch.Tensor):
        """A metric of one objective only."""
        self._metrics[mode][f"objective/{name}"].append(self.accelerator.gather(values.detach()).mean().item())

    def _check_step(self, mode, loss, logps, opponent_logps, inputs):
        """Stops at losses that are not finite, and where an iteration does not start at its reference."""
        metrics = self._metrics[mode]
        num_real, num_generated = (mask.sum(dim=1) for mask in inputs["completion_mask"].chunk(2, dim=0))
        real, generated = (policy - opponent for policy, opponent in zip(logps, opponent_logps, strict=True))
        num_unique = inputs["attention_mask"].chunk(2, dim=0)[0].sum(dim=1) + num_generated
        num_computed = torch.tensor(2 * inputs["input_ids"].size(1), device=loss.device)
        if self._shares_prefix:
            # The last token of the prompt is there twice, and those of the answers are not
            multiple = self.args.pad_to_multiple_of or 1
            num_computed = (num_unique.max() - 1 + multiple - 1) // multiple * multiple
        statistics = (num_real, num_generated, num_unique, num_computed, real, generated, loss)
        statistics = torch.stack([value.detach().to(loss.dtype).expand(len(num_real)) for value in statistics], dim=1)
        num_real, num_generated, num_unique, num_computed, real, generated, losses = self.accelerator.gather(
            statistics
        ).unbind(dim=1)
        if mode == "train" and not math.isfinite(losses.sum().item()):
            raise ValueError(
                f"The loss of step {self.state.global_step + 1} (iteration {self.self_play_iteration}) is "
                f"{losses.mean().item()}, with mean log-probs {metrics['logps/chosen'][-1]:.6g} of the real and "
                f"{metrics['logps/rejected'][-1]:.6g} of the generated answers. The step is not taken, so the last "
                "checkpoint and iteration are intact. Lower `learning_rate`, set `max_grad_norm`, or train in bfloat16 "
                "or float32 instead of float16."
            )
        sums = self._sums[mode]
        sums["real_nll"] -= metrics["logps/chosen"][-1] * len(num_real)
        sums["real"] += num_real.sum().item()
        sums["unique"] += num_unique.sum().item()
        sums["computed"] += num_computed.sum().item()
        if mode == "eval":
            self._eval_margins += (self.beta * (real - generated)).tolist()
        if mode == "train" and self._check_next_loss:
            metrics["self_play/initial_loss"].append(losses.mean().item())
            # Rounding errors of the tokens add up to about the square root of their number
            self._check_initial_logratios(
                (real.mean() / num_real.mean().sqrt()).item(), (generated.mean() / num_generated.mean().sqrt()).item()
            )
            self._check_next_loss = False

    def reset_metrics(self, mode: str):
        """
        Forgets what was measured since the last log.

        Args:
            mode (`str`):
                `"train"` or `"eval"`.
        """
        self._metrics[mode].clear()
        self._sums[mode].clear()

    def _drop_unplayed(self, inputs: dict[str, Any], game: dict[str, Any]) -> tuple[dict, dict, float]:
        """Leaves out pairs that are not played, which have zero gradient, and tells which share of the pairs stays."""
        played = game["played"]
        # At least one pair, so that the backward pass runs, and as many on all processes, which gather their metrics
        keep = max(1, int(self.accelerator.gather(played.sum()).max()))
        if keep == len(played):
            return inputs, game, 1.0
        rows = played.long().argsort(descending=True, stable=True)[:keep]
        both = torch.cat([rows, rows + len(played)])
        inputs = {key: value[rows if key.startswith("ref_") else both] for key, value in inputs.items()}
        return inputs, {key: value[rows] for key, value in game.items()}, keep / len(played)

    def _check_initial_logratios(self, real: float, generated: float):
        """At the first step of an iteration the policy is the opponent: the log-ratios are 0 and the loss is ℓ(0)."""
        tolerance = self.args.initial_loss_tolerance
        if tolerance is None:
            tolerance = 1e-3 if self._is_exact else 0.1
        if not max(abs(real), abs(generated)) <= tolerance:
            raise ValueError(
                f"Iteration {self.self_play_iteration} does not start at its opponent. The model that is trained is the "
                "opponent at this point, so log(p_θ/p_θt) must be 0, and the first loss ℓ(0), log 2 = 0.6931 for the "
                f"logistic loss. But the loss is {self._metrics['train']['self_play/initial_loss'][-1]:.4f}, and the "
                f"log-ratio over the square root of the length is {real:.4g} for the real and {generated:.4g} for the "
                f"generated answers, beyond `initial_loss_tolerance` ({tolerance}). The stored log-probs do not belong "
                "to this model in training. Usual causes: dropout that is on in training (`disable_dropout=False`), a "
                "`data_collator` that changes the sequences, or a callback that changed the weights."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # SPIN's names for the two sides. DPOTrainer averages what it finds and puts "eval_" in front for evaluation, also
        # where there are several datasets, "eval_a" and "eval_b" (trl 1.16)
        mode = "train" if self.model.training else "eval"
        losses = [key for key in logs if mode == "eval" and key.startswith("eval_") and key.endswith("_loss")]
        dataset = losses[0].removeprefix("eval_").removesuffix("loss") if losses else ""
        renamed = defaultdict(list)
        for key, values in self._metrics[mode].items():
            renamed[dataset + key.replace("chosen", "real").replace("rejected", "generated")] = values
        sums = self._sums[mode]
        if sums["real"]:
            renamed[f"{dataset}nll/real"] = [sums["real_nll"] / sums["real"]]
        if sums["unique"] and mode == "train":
            renamed["self_play/computed_over_unique_tokens"] = [sums["computed"] / sums["unique"]]
        self._metrics[mode] = renamed
        sums.clear()
        if mode == "eval" and self._eval_margins:
            # 95% intervals: an accuracy on few prompts says little
            margins = torch.tensor(self._eval_margins)
            ends = proportion_interval((margins > 0).float().mean().item(), len(margins))
            radius = 1.96 * margins.std().item() / math.sqrt(len(margins)) if len(margins) > 1 else math.inf
            ends += (margins.mean().item() - radius, margins.mean().item() + radius)
            names = [f"rewards/{metric}_{end}" for metric in ("accuracies", "margins") for end in ("low", "high")]
            for name, end in zip(names, ends, strict=True):
                renamed[dataset + name] = [end]
            self._eval_margins = []
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if eval_dataset is not None and not isinstance(eval_dataset, (str, GameDataset)):
            raise ValueError(
                "`evaluate` takes no dataset: held-out prompts must be answered by the opponent at the start of an "
                "iteration. Pass it as `eval_dataset` when you create the trainer."
            )
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # ---- Model card and Hub ----

    def push_to_hub(self, *args, **kwargs):
        """
        Pushes the model as [`~transformers.Trainer.push_to_hub`] does, from a folder of its own: the output directory
        also holds the games, and with them the user's data.
        """
        if self.hub_model_id is None:  # the repository is called after the output directory
            self.init_hf_repo(token=kwargs.get("token"), private=kwargs.get("private"))
        output_dir, self.args.output_dir = self.args.output_dir, str(Path(self.args.output_dir) / "hub")
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            self.args.output_dir = output_dir

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name, dataset_name, tags)
        if not self.is_world_process_zero():
            return
        num_prompts = len(self.games["train"])
        left_out = sum(self.left_out["train"].values())
        path = Path(self.args.output_dir) / "README.md"
        card = add_self_play_section(
            path.read_text(),
            records=read_records(self.run_dir, self.args.num_self_play_iterations),
            base_model=self.base_model_id,
            revision=self.base_model_revision,
            data=f"`{self.dataset_name}`, {num_prompts} prompts ({left_out} rows left out)",
            settings={name: value for name, value in self.args.to_dict().items() if name in _CARD_SETTINGS},
            model_name=model_name,
        )
        path.write_text(card)


@contextmanager
def _no_model_hash():
    # DPOTrainer hashes all weights to recognize log-probs that it has cached (trl 1.16): a minute for a model of 7B. Self-play
    # caches none
    hash_module = trl.trainer.dpo_trainer.hash_module
    trl.trainer.dpo_trainer.hash_module = lambda model: ""
    try:
        yield
    finally:
        trl.trainer.dpo_trainer.hash_module = hash_module


def _check_forward(model: PreTrainedModel | PeftModel):
    # TRL trainers leave a patched `forward` on the model (trl 1.16, `add_fused_lm_head`). In a deep copy of such a model,
    # it still calls the original: the copy would be trained, but the original would generate the opponent's answers.
    base_model = model.get_base_model() if isinstance(model, PeftModel) else model
    patched = vars(base_model).get("forward")
    original = patched and inspect.getclosurevars(patched).nonlocals.get("original_forward")
    if getattr(original, "__self__", base_model) is not base_model:
        raise ValueError(
            "The model is a deep copy of a model that was used in a TRL trainer, and it generates with the weights of "
            "that model instead of its own. Save it with `save_pretrained` and pass the path instead."
        )


def _check_dataset(dataset: Any, name: str):
    if dataset is None and name == "eval":
        return
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"The {name} dataset is streamed (`IterableDataset`). Self-play answers every prompt before it trains on "
            "it and needs to know how many there are: load it with `streaming=False`."
        )
    if not isinstance(dataset, Dataset):
        raise TypeError(f"The {name} dataset must be a `datasets.Dataset`, got {type(dataset).__name__}.")
    if len(dataset) == 0:
        raise ValueError(f"The {name} dataset is empty.")
