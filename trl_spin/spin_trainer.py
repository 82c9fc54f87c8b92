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

"""SPINTrainer: the loss of self-play in the place of DPO's, and a run that plays all iterations."""

import copy
import math
import signal
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, DataCollator, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import EvalPrediction, TrainOutput, set_seed
from trl import DPOTrainer
from trl.trainer.utils import get_config_model_id

from .callbacks import SelfPlayCallback
from .compare_sft import CompareSFTCallback
from .compat import check_forward, no_model_hash, prepare_model, replaced
from .data import RowReader, hold_out
from .engines import Generate, chosen_engine
from .iterations import BestIterationCallback, BestMetric, CompletionMetricsCallback, IterationCallback
from .measures import Measures, StepMonitor, accuracy
from .objectives import ChosenLosses
from .pairs import Game, GameDataset, PairCollator, describe_function, leave_out_unplayed
from .preflight import DryRun, PreflightCallback
from .report.card import public_name, write_model_card
from .run.checkpoints import Checkpoints, keep_model, save_model
from .run.files import read_records
from .run.logs import logger
from .run.processes import Processes, StopRequested, StopSignal, explain_out_of_memory
from .run.resume import game_settings, open_run, run_lock, run_settings
from .run.weights import check_finite_weights, weights_fingerprint
from .schedule import Schedule, chain_schedules
from .shared_prefix_trainer import SharedPrefixDPOTrainer
from .showing import BarCallback, ExamplesCallback, LineCallback, ProbeCallback, ReportCallback
from .spin_config import OPTIONS, SPINConfig
from .step_size import StepSizeCallback


_OUT_OF_MEMORY = (
    "`gradient_checkpointing=True` needs less and changes no result, so the run can be resumed with it. A smaller "
    "`per_device_train_batch_size` with more `gradient_accumulation_steps`, or a lower `max_length`, needs a new run."
)
# What names a model, or says how it is stored and run: its fingerprint tells precisions apart
_FREE_OF_MODEL = "_name_or_path architectures auto_map dtype transformers_version unsloth_version use_cache".split()
# What the Trainer and DPOTrainer sum up since the start of `train` (and, in `_tr_loss` and `_metrics`, since the last log)
_SUMS = "_total_train_tokens _total_loss_scalar _globalstep_last_logged".split()


class SPINTrainer(SharedPrefixDPOTrainer):
    r"""
    Trainer for Self-Play Fine-Tuning (SPIN), from [Self-Play Fine-Tuning Converts Weak Language Models to Strong
    Language Models](https://huggingface.co/papers/2401.01335).

    The only changes w.r.t. [`~trl.DPOTrainer`] are: it takes SFT data and the model itself generates the other side of
    each pair; `train()` plays `num_self_play_iterations` iterations, each against the model that the last one left;
    the reference is that same model, scored once per iteration, so there is no second model in memory; and learning
    rate, its schedule, λ (`beta`) and the number of passes belong to the iteration. With the logistic loss
    (`"sigmoid"`, the default), iteration t minimizes Equation 4.7 of the paper:

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
            used; `real` completions as in the official SPIN data; or ShareGPT `conversations`.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Held-out data in the same formats. The same game is played on it: the opponent completes it at the start,
            and it is evaluated at the end of every iteration.
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
        compute_completion_metrics (`Callable`, *optional*):
            Function of held-out prompts, generated and real completions that returns numbers by name, better when
            higher, such as the share of exact matches. They are logged as `eval_completions/<name>`: of the model that
            self-play starts from, and of each iteration's. The three lists are as TRL's reward functions get them,
            without special tokens: texts or, of conversational data, messages, one assistant message in each
            completion. The dataset's other columns are passed as keyword arguments, as lists, if the function has
            parameters with their names, or `**kwargs`.
        objective (`Callable`, *optional*):
            Objective of your own, in the place of `loss_type`: a function `f(real_logratios, generated_logratios,
            beta)` of the log-ratios log p_θ/p_θt of the real and of the generated completions, two tensors of shape
            (batch,), and of λ, that returns the loss of each pair.
        pair_filter (`Callable`, *optional*):
            Function that returns a weight, or a bool, for each pair of a prompt, a generated and a real completion,
            such as a check that drops correct completions. Its arguments are those of `compute_completion_metrics`;
            it is called with up to 1,000 pairs at a time, when they have been generated. The weight scales a pair's
            gradient, in any loss, and the mean is still over the whole batch. A pair of weight 0 costs nothing. Of
            held-out pairs, which are all played, what it says is measured.
    """

    _tag_names = ["trl", "spin"]

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
        compute_completion_metrics: Callable[..., dict[str, float]] | None = None,
        objective: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None,
        pair_filter: Callable[..., list[float]] | None = None,
    ):
        if ref_model is not None:
            reason = "the reference of each iteration is the model itself at its start, which is the opponent as well"
            raise ValueError(f"SPIN takes no `ref_model`: {reason}. For a fixed reference, use `trl.DPOTrainer`.")
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = SPINConfig(f"{model_id.split('/')[-1]}-SPIN")
        elif not isinstance(args, SPINConfig):
            raise TypeError(f"`args` must be a `SPINConfig`, got {type(args).__name__}.")
        args = args.with_learning_rate(adapter=peft_config is not None or isinstance(model, PeftModel))
        if optimizers[1] is not None and isinstance(args.learning_rate, list):
            what = f"`learning_rate={args.learning_rate}` is for each iteration, the scheduler in `optimizers` for all"
            raise ValueError(f"{what}: give one of them.")
        is_logistic = objective is None and args.loss_type == ["sigmoid"]
        if is_logistic and min(args.per_iteration("beta")) * args.temperature <= 0.5:
            what = f"`beta` ({args.beta}) times `temperature` ({args.temperature:g}) is 1/2 or less"
            remedy = "Raise them, or keep the learning rate small"
            logger.warning(f"{what}: an iteration that is trained to its end overshoots the data. {remedy}.")
        eval_dataset, self._rows = hold_out(train_dataset, eval_dataset, args, compute_completion_metrics is not None)
        engine_class = chosen_engine(args)
        engine_class.check(args, model)
        if not isinstance(model, str):
            check_forward(model)
        self.losses, self.objective = ChosenLosses(args, objective), objective
        self.game = Game(base_model=model_id, pair_filter=pair_filter)
        self.run_dir = args.output_dir
        self.dataset_name = train_dataset.info.dataset_name or "a local dataset"
        self.share_prefix = args.share_prefix
        self.shows_end = True  # unless more comes, after which the caller does
        # The Trainer does this too, but too late for a new adapter's random weights
        set_seed(args.seed)

        data = data_collator, train_dataset, eval_dataset, processing_class
        training = compute_metrics, callbacks, optimizers, quantization_config, peft_config
        with no_model_hash():
            super().__init__(model, None, args, *data, *training)

        engine_class.check(args, self.model)
        prepare_model(self.model, args.disable_dropout)
        self.data_collator = PairCollator(self.data_collator)
        exact = self.accelerator.mixed_precision == "no" and self.model.dtype == torch.float32
        self.monitor = StepMonitor(self.accelerator, self.game, self._metrics, args, exact)
        self.processes = Processes(self.accelerator, StopSignal(self.accelerator), args.disable_tqdm)
        self.checkpoints = Checkpoints(self.accelerator)
        self._start_fingerprint = weights_fingerprint(self.accelerator, self.model)
        self._attach_callbacks(engine_class, compute_completion_metrics)

    def _attach_callbacks(self, engine_class, compute_completion_metrics):
        """One callback for each concern, in the order in which they act."""
        args, game, processes = self.args, self.game, self.processes
        engine = probe_engine = engine_class(args, processes, game.rules, lambda folder: save_model(self, folder))
        if engine_class is not Generate:  # probes can be compared: their samples depend on their seeds alone
            probe_args = copy.copy(args)
            probe_args.generation_kwargs = None  # which are the engine's
            probe_engine = Generate(probe_args, processes, game.rules, engine.save_model)
        best_metric = BestMetric(args.metric_for_best_iteration, args.output_dir)
        measures = Measures(game, compute_completion_metrics)
        self_play = self.self_play = SelfPlayCallback(self, game, processes, engine, measures)
        self.best_iteration = BestIterationCallback(self, game, processes, best_metric)
        self.add_callback(PreflightCallback(self, game, processes, [engine, probe_engine], self._settings))
        if args.step_size_search:
            self.add_callback(StepSizeCallback(self_play, self.best_iteration))
        if compute_completion_metrics is not None:
            self.add_callback(CompletionMetricsCallback(self_play))
        self.add_callback(IterationCallback(self, game, processes, best_metric))
        self.add_callback(self_play)
        self.add_callback(ExamplesCallback(self, game, processes))
        if args.compare_sft:
            self.add_callback(CompareSFTCallback(self_play, self.best_iteration))
        self.add_callback(ProbeCallback(self, game, processes, probe_engine, best_metric.table))
        self.add_callback(self.best_iteration)
        self.add_callback(ReportCallback(game, processes))
        # In place of what the Trainer attaches, unless in a notebook
        shown, own = (PrinterCallback, LineCallback) if args.disable_tqdm else (ProgressCallback, BarCallback)
        for callback in [callback for callback in self.callback_handler.callbacks if type(callback) is shown]:
            self.remove_callback(callback)
            self.add_callback(own(game))

    # ---- Loss and metrics ----

    def _compute_loss(self, model, inputs, return_outputs):
        """Equation 4.7, and its family: DPOTrainer's losses, then those of self-play, of the same log-ratios."""
        if "ref_chosen_logps" not in inputs:
            raise ValueError("The game has not started: the opponent completes the prompts. Call `train()` first.")
        mode = "train" if self.model.training else "eval"
        beta, sft_weight = (self.args.per_iteration(name)[self.game.iteration] for name in ("beta", "sft_weight"))
        trl_losses = self.losses.trl + ([("sft", sft_weight)] if sft_weight else [])
        if not trl_losses:
            trl_losses = [("sigmoid", 0.0)]  # DPOTrainer must have one
        self.beta, (self.loss_types, self.loss_weights) = beta, map(list, zip(*trl_losses, strict=True))
        share = 1.0  # of the pairs that go through the model
        if mode == "train" and self.losses.of_margin and not sft_weight and not self.game.train.all_played:
            inputs, share = leave_out_unplayed(inputs, self.accelerator)

        result = super()._compute_loss(model, inputs, return_outputs)
        loss, outputs = result if return_outputs else (result, None)
        references = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        real, generated = (policy - reference for policy, reference in zip(self._logps, references, strict=True))
        for objective, weight in self.losses.own:
            loss = loss + weight * objective.loss(real, generated, beta).mean()
            if not objective.of_margin:  # each side has a value of its own
                for name, logratios in (("real", real), ("generated", -generated)):
                    share_correct = accuracy(self.accelerator.gather(logratios.detach()))
                    self._metrics[mode][f"objective/{name}_accuracies"].append(share_correct)
        if share < 1:
            # Same mean over the whole batch, and same gradient, as if the unplayed pairs had gone through the model
            loss = share * loss + (1 - share) * self.losses.at_zero(beta)

        self.monitor.step(mode, self.state.global_step, loss, (real, generated), inputs)
        return (loss, outputs) if return_outputs else loss

    def forward_pairs(self, model, row=None, weight=None, **kwargs):
        """Keeps the log-probs of the completions, and scales the gradient of pairs by their weights, in any loss."""
        outputs = super().forward_pairs(model, **kwargs)
        if kwargs.get("fused_lm_head"):
            if weight is not None:
                value = outputs.log_probs.detach()
                weight = weight.repeat(2)[:, None].to(value.dtype)
                outputs.log_probs = value + weight * (outputs.log_probs - value)
            # Prompt-learning PEFT prepends virtual tokens to the outputs
            logps = outputs.log_probs[:, -(kwargs["labels"].size(1) - 1) :].sum(dim=1)
            self._logps = logps.chunk(2, dim=0)
        return outputs

    def compute_ref_log_probs(self, model, inputs):
        """
        Summed log-probs of real and generated completions under the reference: the model as it stands, adapter
        included.

        DPOTrainer's method would disable the adapter and score with the model of iteration 0.
        """
        with torch.no_grad(), self.accelerator.autocast():
            return self.token_logps(model, inputs).sum(dim=1).chunk(2, dim=0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # SPIN's names for the two sides. DPOTrainer averages what it finds and puts "eval_" in front for evaluation,
        # also where there are several datasets, "eval_a" and "eval_b" (trl 1.16)
        mode = "train" if self.model.training else "eval"
        losses = [key for key in logs if mode == "eval" and key.startswith("eval_") and key.endswith("_loss")]
        dataset = losses[0].removeprefix("eval_").removesuffix("loss") if losses else ""
        renamed = defaultdict(list)
        for key, values in (self._metrics[mode] | self.monitor.summarize(mode)).items():
            renamed[dataset + key.replace("chosen", "real").replace("rejected", "generated")] = values
        self._metrics[mode] = renamed
        if "train_loss" in logs:  # of the whole run, not of its part since it was resumed
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    def count_on(self):
        """Forgets what a trial run has summed up, and goes on with what a checkpoint has kept."""
        nothing = {"sums": {"_total_train_tokens": 0}, "losses": [0.0] * self.accelerator.num_processes, "metrics": {}}
        counters = self.state.stateful_callbacks.get("counters", nothing)
        vars(self).update(counters["sums"])
        self._tr_loss.fill_(counters["losses"][self.accelerator.process_index])
        self._metrics["train"] = defaultdict(list, counters["metrics"])

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        if eval_dataset is not None and not isinstance(eval_dataset, (str, GameDataset)):
            reason = "the opponent must complete held-out prompts at the start of an iteration"
            raise ValueError(f"`evaluate` takes no dataset: {reason}. Pass it to the trainer as `eval_dataset`.")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # ---- Data ----

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        # Too early: the model, whose end tokens are needed, is not there yet. See `_precompute_ref_logps`
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "row", "weight"]))

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> GameDataset:
        # The last thing that DPOTrainer does with a dataset. There is nothing to score before the opponent has
        # completed the prompts, so this is where SFT rows become the prompts and real completions of a game
        args, tokenizer = self.args, self._tokenizer
        reader, rules = RowReader(dataset, name, tokenizer, args), self.game.rules
        if rules is None:
            play_identical = not self.losses.of_margin
            rules = self.game.rules = reader.make_rules(dataset[0], self.model, args, play_identical)
        with args.main_process_first(desc=f"Tokenizing {name} dataset"):
            rows, left_out = reader.prepare(dataset, rules, self._rows.get(name), args.dataset_num_proc)
        self.game.left_out[name], self.game.sources[name] = dict(left_out), (dataset, reader.read_prompt)
        self.game.datasets[name] = GameDataset(name, rows, args.prompts_per_iteration if name == "train" else None)
        self.game.settings = game_settings(args, self.game)
        return self.game.datasets[name]

    # ---- Running, stopping, resuming ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Plays all iterations, or resumes a run that was stopped.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` continues from the newest checkpoint in `output_dir`, or from the beginning if there is none
                yet: the same call starts a run and continues it. A path names the checkpoint.
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
        args, stop = self.args, self.processes.stop
        try:
            with run_lock(self.processes, args.output_dir), explain_out_of_memory("training", _OUT_OF_MEMORY), stop:
                settings, resume = self._settings(), resume_from_checkpoint or False
                self.game.settings["run"], checkpoint = self.processes.on_main(open_run, args, settings, resume)
                if args.keeps_start and not args.dry_run and self.best_iteration.fault_of(-1):
                    keep_model(self, self.game, self.processes, -1)  # before it is trained
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
                if stop.signum:
                    raise StopRequested(stop.signum)
                if self.shows_end:
                    self.best_iteration.show_end()
                return TrainOutput(output.global_step, output.metrics["train_loss"], output.metrics)
        except DryRun:
            return TrainOutput(0, 0.0, {})
        except StopRequested as request:
            where = f"Stopped by {signal.Signals(request.signum).name} at step {self.state.global_step}"
            command = "give the same command with `--resume_from_checkpoint true`"
            message = f"{where}. To resume, {command}, or `train(resume_from_checkpoint=True)`."
            logger.warning(message)
            if request.signum == signal.SIGINT:
                raise KeyboardInterrupt(message) from None
            raise

    def _settings(self) -> dict[str, Any]:
        """All that changes the result of the run."""
        adapter = self.model.peft_config["default"].to_dict() if isinstance(self.model, PeftModel) else {}
        ignored = ("base_model_name_or_path", "inference_mode", "peft_version")
        more = {
            "adapter": {name: value for name, value in adapter.items() if name not in ignored} or None,
            "model": self._start_fingerprint,
            "objective": self.objective and describe_function(self.objective),
            "pair_filter": self.game.filter_name,
            "step_size_metric": self.args.step_size_search and self.args.metric_for_best_iteration,
            "num_processes": self.accelerator.num_processes,
        }
        config = self.model.config.to_dict()
        more |= {f"model.{name}": value for name, value in config.items() if name not in _FREE_OF_MODEL}
        return run_settings(self.args, self.game, more)

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args):
        epochs, steps = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args)
        # A game that has ended early does not go on when it is resumed
        over = self.best_iteration.game_is_over(self.state.log_history, self.state.global_step)
        return (num_train_epochs, 0) if over else (epochs, steps)

    def _get_output_dir(self, trial):
        return self.checkpoints.staging or super()._get_output_dir(trial)

    def _load_from_checkpoint(self, *args, **kwargs):
        dtypes = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(*args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if parameter.dtype != dtypes[name]:  # adapters in bfloat16 come back in float32 (peft 0.21)
                parameter.data = parameter.data.to(dtypes[name])

    def _save_checkpoint(self, model, trial):
        check_finite_weights(self.accelerator, self.model, self.state.global_step, self.game.iteration)
        # The state of a callback is what the Trainer's state has room for
        losses, sums = self.accelerator.gather(self._tr_loss[None]).tolist(), {n: getattr(self, n) for n in _SUMS}
        counters = {"sums": sums, "losses": losses, "metrics": dict(self._metrics["train"])}
        self.state.stateful_callbacks["counters"] = counters
        with self.checkpoints.saving(self.args, self.state, self.game):
            super()._save_checkpoint(model, trial)

    def _build_accelerator_args(self, **kwargs):
        if self.args.gradient_checkpointing is None and self.args.ddp_find_unused_parameters is None:
            # What the Trainer chooses with checkpointing, as DPOTrainer has it. Here, that is decided later
            self.args.ddp_find_unused_parameters = False
        return super()._build_accelerator_args(**kwargs)

    # ---- Schedule: iterations are made of whole epochs ----

    def set_initial_training_values(self, args, dataloader):
        if len(dataloader) == 0:
            batch = f"one batch of {args.per_device_train_batch_size} on each of {args.world_size} processes"
            remedy = "lower `per_device_train_batch_size`, or set `dataloader_drop_last=False`"
            raise ValueError(f"{len(self.game.train)} rows do not fill {batch}: {remedy}.")
        # `num_train_epochs` counts passes per iteration, the Trainer counts all of them
        total, num_epochs = copy.copy(args), args.per_iteration("num_train_epochs")
        total.num_train_epochs, total.max_steps = sum(num_epochs), -1
        values = list(super().set_initial_training_values(total, dataloader))
        self.game.schedule = Schedule(num_epochs, steps_per_epoch=values[1])
        if args.max_steps > 0:
            values[-1] = min(args.max_steps, values[-1])
            values[0] = math.ceil(values[-1] / values[1])
        return tuple(values)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        first = copy.copy(args)
        first.learning_rate = args.per_iteration("learning_rate")[0]
        return DPOTrainer.get_optimizer_cls_and_kwargs(first, model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is None:
            peaks = self.args.per_iteration("learning_rate")
            self.lr_scheduler = chain_schedules(self.game.schedule, peaks, optimizer or self.optimizer, self.args)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- Model card and Hub ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None):
        super()._save(output_dir, state_dict)
        # Nothing reads it, and it holds `hub_token` and paths of this machine
        (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def push_to_hub(self, *args, **kwargs):
        """
        Pushes the model as [`~transformers.Trainer.push_to_hub`] does, from a folder of its own: the output directory
        also holds the games, and with them the user's data.
        """
        if self.hub_model_id is None:  # the repository is called after the output directory
            self.init_hf_repo(token=kwargs.get("token"), private=kwargs.get("private"))
        adapter = getattr(self.model, "peft_config", {}).get("default", PeftConfig())
        base_model = adapter.base_model_name_or_path and public_name(adapter.base_model_name_or_path)
        hub = str(Path(self.args.output_dir) / "hub")
        with replaced(self.args, "output_dir", hub), replaced(adapter, "base_model_name_or_path", base_model):
            return super().push_to_hub(*args, **kwargs)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        if not self.is_world_process_zero():
            return
        left_out, (dataset, read_prompt) = sum(self.game.left_out["train"].values()), self.game.sources["train"]
        dataset_name = dataset_name or (self.dataset_name if "/" in self.dataset_name else None)
        prompt = read_prompt(dataset[self.game.train.rows[0]["row"]])
        if dataset_name is None or public_name(dataset_name) != dataset_name:  # nothing of it is quoted
            prompt = [{"role": "user", "content": "Hello!"}] if isinstance(prompt, list) else "Hello!"
        write_model_card(
            Path(self.args.output_dir) / "README.md",
            model_name=model_name or Path(self.hub_model_id or self.run_dir).name,
            hub_model_id=self.hub_model_id,
            run_name=Path(self.run_dir).name,
            base_model=self.game.base_model,
            revision=(self.args.model_init_kwargs or {}).get("revision"),
            is_adapter=isinstance(self.model, PeftModel),
            dataset_name=dataset_name,
            data=f"`{public_name(self.dataset_name)}`, {len(self.game.train.all_rows)} prompts ({left_out} rows left out)",
            prompt=prompt,
            settings={name: value for name, value in self.args.to_dict().items() if name in OPTIONS["card"]},
            records=read_records(self.run_dir, self.args.num_self_play_iterations),
            rows=self.best_iteration.best_metric.table(self.args.num_self_play_iterations - 1),
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
        )
