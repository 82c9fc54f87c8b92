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
import json
import math
import shutil
import time
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from .engines import forked_rng
from .game import (
    PAIR_FEATURES,
    Columns,
    GameDataset,
    find_game_fault,
    iteration_dir,
    load_game,
    pair_lengths,
    read_answers,
    read_manifest,
    store_game,
    with_logps,
    write_answers,
    write_json,
)
from .generation import generate, length_sorted_batches, map_batches, row_seed
from .memory import MemoryEstimate, plan_memory
from .model_card import RECORD
from .preflight import check_disk, make_plan, warn_of_lost_updates
from .resume import explain_out_of_memory, explain_write_error, library_versions, on_main_process, weights_fingerprint
from .signals import describe_game, find_warnings, metric_prefix
from .spin_config import SPINConfig
from .watching import Watcher


if TYPE_CHECKING:
    from .spin_trainer import SPINTrainer

logger = get_logger(__name__)

# Options that a generated answer depends on, beside opponent, prompt and seed
_SAMPLING_OPTIONS = (
    *("max_completion_length", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("generation_kwargs", "cache_implementation"),
)
# Options that decide what becomes of it
_PAIR_OPTIONS = ("truncated_completions", "play_empty_completions", "opponent_history", "reference_alpha")
_REHEARSAL_TOKENS = 16


class DryRun(Exception):
    """The plan was printed, and no more was asked for."""


class SelfPlayCallback(TrainerCallback):
    """
    Plays the iterations of SPIN (Algorithm 1 of the [paper](https://huggingface.co/papers/2401.01335)). It acts where
    an epoch opens an iteration: there, everything that came before is on disk, and the next batch is not yet drawn.

    The [`SPINTrainer`] creates and attaches it.

    Args:
        trainer ([`SPINTrainer`]):
            Trainer that trains the main player.
    """

    def __init__(self, trainer: "SPINTrainer"):
        self.trainer = trainer
        self.watcher = Watcher(trainer)

    def on_train_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        for game in self.trainer.games.values():
            game.pairs = []
        memory = self.rehearse()
        plan, next_iteration, whole_run = make_plan(self.trainer, memory)
        if self.trainer.is_world_process_zero():
            tqdm.write(plan)
        on_main_process(self.trainer.accelerator, check_disk, args.output_dir, next_iteration, whole_run)
        warn_of_lost_updates(self.trainer)
        if args.dry_run:
            raise DryRun
        self.trainer.write_run()
        if (args.reference_alpha < 1 or args.load_best_iteration_at_end) and state.global_step == 0:
            self.trainer.keep_base_weights()

    def on_epoch_begin(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        iteration = bisect_right(self.trainer.iteration_steps, state.global_step) - 1
        step = state.global_step - self.trainer.iteration_steps[iteration]
        turn, step_in_epoch = divmod(step, self.trainer.steps_per_epoch)
        if step == 0:
            self.promote(iteration)
            request = self._request(iteration)
            # Stopped between store and swap, a run has left the game of this very opponent
            recalled = on_main_process(self.trainer.accelerator, self._recall, iteration, request)
            if recalled is None:
                pairs = self.generate(iteration, request)
                pairs = self.score(pairs)
                self.store(iteration, request, pairs)
            else:
                pairs, metrics = recalled
                self.trainer.log(metrics)
            self.swap(iteration, pairs)
            self.probe(iteration)
        elif not self.trainer.games["train"].pairs:  # resumed in the middle of an iteration
            pairs = on_main_process(self.trainer.accelerator, load_game, args.output_dir, iteration)
            self.swap(iteration, pairs)
        elif step_in_epoch != 0:
            raise ValueError(
                f"An epoch ended at step {state.global_step}, before the end of the dataset. Iterations are made of "
                "whole epochs: do not set `control.should_epoch_stop` in a callback."
            )
        self.trainer.games["train"].epoch = state.global_step // self.trainer.steps_per_epoch
        self.trainer.games["train"].turn = turn

    def on_step_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        signum, _ = self.trainer.stop_signal.agree()
        if signum:
            self.trainer.stop_signal.signum = signum
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
        if state.global_step in self.trainer.iteration_steps[1:]:
            # The end of the epoch, a moment later, logs, evaluates and saves, in this order: so the checkpoint at the
            # boundary holds all that was measured, and is written once
            control.should_log = control.should_evaluate = control.should_save = False

    def on_epoch_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step in self.trainer.iteration_steps[1:]:
            # What was learned against this opponent is logged before the next one comes, and the next one can be
            # made again should its answers be lost
            control.should_log = True
            control.should_evaluate = self.trainer.eval_dataset is not None
            control.should_save = args.save_strategy != "no"
            if self.trainer.compute_answer_metrics is not None:
                self._measure_answers(self.trainer.iteration_steps.index(state.global_step))

    def _measure_answers(self, next_iteration: int):
        # The answers of the next opponent to held-out prompts: they are committed, and its game will use them
        trainer, training = self.trainer, self.trainer.model.training
        names = [name for name in trainer.games if name != "train"]
        pairs = self._answer_games(names, next_iteration, self._request(next_iteration))
        trainer.model.eval()  # `log` would add the metrics of training
        trainer.log(self.watcher.answer_metrics(pairs))
        trainer.model.train(training)

    def on_train_end(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if state.global_step in self.trainer.iteration_steps[1:]:
            last = self.trainer.iteration_steps.index(state.global_step) - 1
            self.keep(last)
            if not self.trainer.stop_signal.signum:
                self.probe(last + 1)
                best = on_main_process(self.trainer.accelerator, self.watcher.find_best, last)
                if args.load_best_iteration_at_end:
                    self.trainer.load_iteration(best)
            self._write(self.watcher.write_history)
            if args.write_report:
                on_main_process(self.trainer.accelerator, self.watcher.report)
        elif not self.trainer.stop_signal.signum:
            logger.warning(
                f"Training ended at step {state.global_step}, in the middle of iteration "
                f"{self.trainer.self_play_iteration}, whose model is not kept as an iteration."
            )

    def rehearse(self) -> MemoryEstimate | None:
        """
        Sends the longest and the shortest row through generation, scoring and the loss of a training step, with a few
        tokens, chooses the layout of the batches, and plans the memory. Random state and metrics are as before.

        Returns:
            [`~memory.MemoryEstimate`] or `None`: See [`~memory.plan_memory`].
        """
        trainer, args = self.trainer, copy.copy(self.trainer.args)
        args.max_completion_length = min(args.max_completion_length, _REHEARSAL_TOKENS)
        args.generation_token_budget = args.generation_token_budget or 1
        args.disable_tqdm = True
        rows = trainer.games["train"].rows
        columns = Columns(rows)
        lengths = columns.lengths("prompt_ids") + columns.lengths("real_ids")
        rows = rows.select(sorted({int(lengths.argmax()), int(lengths.argmin())}))
        num_tokens, training = trainer._total_train_tokens, trainer.model_wrapped.training
        with forked_rng(trainer.accelerator.device), torch.no_grad():
            pairs = self._answer("train", rows, 0, args, desc="Rehearsal")
            trainer.model_wrapped.eval()
            trainer.choose_layout([GameDataset.serve(pair) for pair in pairs])
            if trainer.args.generation_token_budget is None:  # a run that is resumed goes on in the same batches
                budget = on_main_process(trainer.accelerator, trainer.recorded_token_budget)
                trainer.args.generation_token_budget = budget
            longest = max(pairs, key=lambda pair: len(pair["prompt_ids"]) + len(pair["real_ids"]))
            memory = plan_memory(trainer, GameDataset.serve(longest))
            logps = self._score("train", pairs, args)
            pairs = with_logps(with_logps(pairs, "ref", logps), "base", logps)
            trainer.begin_iteration(0)
            trainer._check_next_loss = True
            trainer.model_wrapped.train()
            served = [GameDataset.serve(pair) for pair in pairs]
            if trainer.plays_triplets:
                served = [row | {"proto_ids": row["rejected_ids"]} for row in served]
            inputs = trainer.data_collator(served)
            trainer.compute_loss(trainer.model_wrapped, trainer._prepare_inputs(inputs))
            trainer.model_wrapped.train(training)
        trainer.reset_metrics("train")
        trainer._total_train_tokens = num_tokens
        return memory

    def _request(self, iteration: int) -> dict[str, Any]:
        """All that the game of an iteration depends on."""
        trainer, args = self.trainer, self.trainer.args
        return {
            "iteration": iteration,
            "opponent": weights_fingerprint(trainer.accelerator, trainer.model_wrapped),
            "seed": args.seed,
            "sampling": {option: getattr(args, option) for option in _SAMPLING_OPTIONS},
            "pairs": {option: getattr(args, option) for option in _PAIR_OPTIONS} | {"margins": trainer.plays_margins},
            "end_token_ids": trainer.end_token_ids,
            "max_length": trainer.max_length,
            **trainer.data_settings(),
        }

    def _recall(self, iteration: int, request: dict[str, Any]) -> tuple[dict[str, Dataset], dict[str, float]] | None:
        manifest = read_manifest(self.trainer.args.output_dir, iteration)
        if manifest is None or manifest["request"] != _hash(request):
            return None
        if find_game_fault(self.trainer.args.output_dir, iteration):
            return None  # `generate` says what is wrong and makes it again
        return load_game(self.trainer.args.output_dir, iteration), manifest["metrics"]

    def _write(self, function: Callable, *args):
        with explain_write_error(Path(self.trainer.args.output_dir)):
            on_main_process(self.trainer.accelerator, function, *args)

    # ---- The five calls of a boundary ----

    def promote(self, iteration: int):
        """
        The model as it stands becomes opponent and reference of the iteration.

        Nothing moves in memory: the opponent answers and the reference scores before the first step changes the
        weights. What is left to do is to keep the model that the last iteration made, and to start the optimizer anew.

        Args:
            iteration (`int`):
                Self-play iteration that begins.

        Raises:
            `ValueError`: If a weight is not finite.
        """
        trainer = self.trainer
        if iteration > 0:
            self.keep(iteration - 1)
            if trainer.args.reset_optimizer_state:
                trainer.optimizer.state.clear()

    def generate(self, iteration: int, request: dict[str, Any]) -> dict[str, Dataset]:
        """
        The opponent answers every prompt, y' ~ p_θt(·|x). Answers of earlier opponents are added as
        `opponent_history` asks. Answers are committed to disk every few minutes, and those that a stopped run has
        committed are used.

        Args:
            iteration (`int`):
                Self-play iteration.
            request (`dict[str, Any]`):
                All that the answers depend on.

        Returns:
            `dict[str, Dataset]`: Pairs by name of the dataset, without reference log-probs.

        Raises:
            `ValueError`: If there is no pair to learn from.
        """
        trainer, args = self.trainer, self.trainer.args
        start = time.perf_counter()
        self.num_generated = 0
        pairs = self._answer_games(list(trainer.games), iteration, request)
        clear_device_cache()
        self.generation_time = time.perf_counter() - start
        _check_played(pairs["train"], trainer._tokenizer, iteration)

        for opponent in range(iteration - 1, max(-1, iteration - 1 - args.opponent_history), -1):
            earlier = on_main_process(trainer.accelerator, load_game, args.output_dir, opponent)["train"]
            # The first of its opponents is the one that answered at the time
            earlier = earlier.select(range(len(trainer.games["train"])))
            pairs["train"] = concatenate_datasets([pairs["train"], earlier])
        return pairs

    def _answer_games(self, names: list[str], iteration: int, request: dict[str, Any]) -> dict[str, Dataset]:
        trainer, args = self.trainer, self.trainer.args
        request_hash = _hash(request)
        directory = iteration_dir(args.output_dir, iteration) / f"answers-{request_hash[:16]}"
        answered = on_main_process(trainer.accelerator, read_answers, args.output_dir, iteration, request_hash, names)
        pairs = {}
        for name in names:
            game = trainer.games[name]
            if answered[name] and name == "train":
                logger.warning(
                    f"Iteration {iteration}: {len(answered[name])} of {len(game)} {name} prompts have been answered "
                    "already. Their answers are used."
                )

            def commit(answers: list[tuple[int, dict]], name=name):
                self.num_generated += sum(len(answer["generated_ids"]) for _, answer in answers)
                if answers:
                    rows = [{"index": index, **answer} for index, answer in answers]
                    self._write(write_answers, directory, name, rows)

            desc = f"Iteration {iteration}: answering {name} prompts"
            pairs[name] = self._answer(name, game.rows, iteration, args, desc, answered[name], commit)
        return pairs

    def _answer(
        self,
        name: str,
        rows: Dataset,
        iteration: int,
        args: SPINConfig,
        desc: str,
        answered: dict[int, dict] | None = None,
        commit: Callable[[list[tuple[int, dict]]], None] | None = None,
    ) -> Dataset:
        trainer = self.trainer
        answers = generate(
            trainer.model_wrapped,
            trainer.accelerator,
            trainer.stop_signal,
            args,
            prompts=rows["prompt_ids"][:],
            seeds=[row_seed(args.seed, iteration, name, row) for row in rows["row"][:]],
            end_token_ids=trainer.end_token_ids,
            pad_token_id=trainer._tokenizer.pad_token_id,
            max_length=trainer.max_length,
            desc=desc,
            answered=answered,
            commit=commit,
            vllm=trainer.vllm_generation if args.use_vllm else None,
        )
        columns = Columns(rows)
        return Dataset.from_list(
            [
                self._make_pair(columns[i], answer, iteration, held_out=name != "train")
                for i, answer in enumerate(answers)
            ],
            features=PAIR_FEATURES,
        )

    def _make_pair(self, row: dict, answer: dict, iteration: int, held_out: bool) -> dict[str, Any]:
        trainer, args = self.trainer, self.trainer.args
        real_ids, generated_ids, truncated = row["real_ids"], answer["generated_ids"], answer["truncated"]
        empty = not trainer._tokenizer.decode(generated_ids, skip_special_tokens=True).strip()
        if truncated and args.truncated_completions == "cut_real" and not held_out:
            real_ids = real_ids[: len(generated_ids)]
        identical = generated_ids == real_ids
        played = (
            not (identical and trainer.plays_margins)  # which have zero gradient then
            and (args.play_empty_completions or not empty)
            and not (truncated and args.truncated_completions == "drop")
        )
        return {
            "row": row["row"],
            "opponent": iteration,
            "prompt_ids": answer["prompt_ids"],
            "real_ids": real_ids,
            "generated_ids": generated_ids,
            "truncated": truncated,
            "empty": empty,
            "identical": identical,
            # Held out, nothing is trained: every pair counts
            "played": played or held_out,
            "ref_real_logps": 0.0,
            "ref_generated_logps": 0.0,
            "base_real_logps": None,
            "base_generated_logps": None,
        }

    def score(self, pairs: dict[str, Dataset]) -> dict[str, Dataset]:
        """
        The reference scores all pairs, log p_θt(y|x) and log p_θt(y'|x), in the layout and precision of training.

        Args:
            pairs (`dict[str, Dataset]`):
                Pairs by name of the dataset.

        Returns:
            `dict[str, Dataset]`: The same pairs with their reference log-probs.

        Raises:
            `ValueError`: If a log-prob is not finite.
        """
        start = time.perf_counter()
        trainer = self.trainer
        scored = {
            name: with_logps(dataset, "ref", self._score(name, dataset, trainer.args))
            for name, dataset in pairs.items()
        }
        if trainer.args.reference_alpha < 1:
            with trainer.base_weights():
                scored = {
                    name: with_logps(dataset, "base", self._score(name, dataset, trainer.args))
                    for name, dataset in scored.items()
                }
        self.scoring_time = time.perf_counter() - start
        return scored

    def _score(self, name: str, pairs: Dataset, args: SPINConfig) -> list[tuple[float, float]]:
        trainer, columns = self.trainer, Columns(pairs)
        batch_size = args.precompute_ref_batch_size or args.per_device_train_batch_size
        lengths = pair_lengths(columns).tolist()
        # No activations are kept, so shorter rows may come in larger numbers, up to the tokens of the first batch
        batches = length_sorted_batches(lengths, lambda longest: batch_size * max(lengths) // longest)

        def score_batch(batch: list[int]) -> list[tuple[float, float]]:
            rows = [GameDataset.serve(columns[i]) for i in batch]
            inputs = trainer._prepare_inputs(trainer.data_collator(rows))
            with explain_out_of_memory(
                "scoring", f"Lower `precompute_ref_batch_size` ({batch_size}), here and on resume."
            ):
                real_logps, generated_logps = trainer.compute_ref_log_probs(trainer.model_wrapped, inputs)
            return list(zip(real_logps.tolist(), generated_logps.tolist(), strict=True))

        was_training = trainer.model_wrapped.training
        trainer.model_wrapped.eval()
        desc = f"Scoring {name} pairs"
        logps = map_batches(
            trainer.accelerator, trainer.stop_signal, batches, score_batch, desc, disable=args.disable_tqdm
        )
        trainer.model_wrapped.train(was_training)
        clear_device_cache()
        for row, sides in zip(pairs["row"][:], logps, strict=True):
            if not math.isfinite(sum(sides)):
                raise ValueError(
                    f"The model's log-probs of row {row} of the {name} dataset are {sides[0]} (real answer) and "
                    f"{sides[1]} (generated answer). Its weights or activations overflow: train in bfloat16 or float32 "
                    "instead of float16, lower the learning rate, or check the model that self-play started from."
                )
        return logps

    def store(self, iteration: int, request: dict[str, Any], pairs: dict[str, Dataset]):
        """
        Writes the game to `output_dir/self_play/iteration-<t>` and logs what it looks like.

        Args:
            iteration (`int`):
                Self-play iteration.
            request (`dict[str, Any]`):
                All that the game depends on.
            pairs (`dict[str, Dataset]`):
                Pairs by name of the dataset.
        """
        trainer, args = self.trainer, self.trainer.args
        metrics = {
            "self_play/iteration": iteration,
            "self_play/generation_time": self.generation_time,
            "self_play/scoring_time": self.scoring_time,
            "self_play/generated_tokens_per_second": self.num_generated / self.generation_time,
        }
        games = {}
        for name, dataset in pairs.items():
            prefix = metric_prefix(name) + "self_play/"
            newest = dataset.select(range(len(trainer.games[name])))
            games[name] = describe_game(newest)
            metrics |= {prefix + key: value for key, value in games[name].items()}
            metrics[f"{prefix}left_out"] = sum(trainer.left_out[name].values())
            if args.log_completions:
                self._write(self.watcher.log_completions, name, iteration, newest)
        for age in range(len(pairs["train"]) // len(trainer.games["train"])):
            metrics[f"self_play/opponent_age_{age}"] = len(trainer.games["train"]) / len(pairs["train"])
        metrics |= self.watcher.answer_metrics(pairs)
        if iteration == 0:
            self.watcher.value(-1, metrics)  # so that a name that does not exist fails now
        name = trainer.judged_dataset
        earlier = read_manifest(args.output_dir, iteration - 1) if iteration else None
        warnings = find_warnings(
            games[name], earlier and _with_prefix(earlier["metrics"], metric_prefix(name) + "self_play/")
        )
        for warning in warnings:
            logger.warning(f"Iteration {iteration}: {warning}")
        manifest = {
            "request": _hash(request),
            **request,
            "opponent": {
                "model": f"iteration-{iteration - 1}" if iteration else trainer.base_model_id,
                "fingerprint": request["opponent"],
            },
            "engine": args.generation_engine,
            "left_out": trainer.left_out,
            "metrics": metrics,
            "warnings": warnings,
            "versions": library_versions(),
        }
        self._write(store_game, args.output_dir, iteration, pairs, manifest)
        trainer.log(dict(metrics))

    def swap(self, iteration: int, pairs: dict[str, Dataset]):
        """
        Puts the game in the place of the last one, for training and evaluation.

        Args:
            iteration (`int`):
                Self-play iteration.
            pairs (`dict[str, Dataset]`):
                Pairs by name of the dataset.
        """
        trainer = self.trainer
        first = pairs
        if trainer.plays_triplets and iteration > 0:
            first = on_main_process(trainer.accelerator, load_game, trainer.args.output_dir, 0)
        for name, game in trainer.games.items():
            game.swap(pairs[name])
            if trainer.plays_triplets:
                game.proto_ids = first[name]["generated_ids"][: len(game)]
        trainer.begin_iteration(iteration)

    def probe(self, iteration: int):
        """
        Lets the model answer a few fixed prompts, and shows it beside the earlier ones. The seeds are the same in every
        iteration, so that only the model differs; so they are answered by `generate`, whatever the engine.

        Args:
            iteration (`int`):
                Self-play iteration that begins, or the number of iterations at the end of the game.
        """
        trainer, num_probes = self.trainer, self.trainer.args.num_probes
        args = copy.copy(trainer.args)
        args.use_transformers_continuous_batching = False
        if args.use_vllm:
            args.use_vllm, args.generation_kwargs = False, None  # which are vLLM's
        if num_probes and not on_main_process(trainer.accelerator, self.watcher.probe_path(iteration).is_file):
            name = trainer.judged_dataset
            rows = trainer.games[name].rows
            rows = rows.select(range(min(num_probes, len(rows))))
            pairs = self._answer(f"{name} probes", rows, -1, args, desc="Probes")
            self._write(self.watcher.write_probes, iteration, pairs)
        if trainer.is_world_process_zero():
            self.watcher.show(iteration)

    # ---- The end of an iteration ----

    def on_evaluate(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        if args.early_stopping and state.global_step in self.trainer.iteration_steps[1:-1]:
            iteration = self.trainer.iteration_steps.index(state.global_step) - 1
            reason = on_main_process(self.trainer.accelerator, self.watcher.why_stop, iteration)
            if reason is not None:
                logger.warning(f"The game ends after iteration {iteration}: {reason}.")
                control.should_training_stop = True

    def on_save(self, args: SPINConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self._write(self.watcher.write_history)

    def keep(self, iteration: int):
        """
        Keeps the model that an iteration made in `output_dir/iteration-<t>`, with its record and model card.

        Args:
            iteration (`int`):
                Self-play iteration that has ended.
        """
        trainer, args = self.trainer, self.trainer.args
        trainer.check_finite_weights()
        directory = Path(args.output_dir) / f"iteration-{iteration}"
        with explain_write_error(directory):
            trainer.save_model(str(directory))
        if trainer.is_world_process_zero():
            manifest = read_manifest(args.output_dir, iteration)
            settings = {
                name: args.per_iteration(name)[iteration] for name in ("beta", "learning_rate", "num_train_epochs")
            }
            logs = self.watcher.last_logs(iteration)
            record = {"iteration": iteration, **manifest["metrics"], **logs, **settings}
            record |= {"warnings": manifest["warnings"], "verdict": self.watcher.judge(iteration)[1]}
            write_json(directory / RECORD, record)
            name = args.hub_model_id or Path(args.output_dir).name
            trainer.create_model_card(model_name=f"{name.split('/')[-1]}-iteration-{iteration}")
            shutil.copy(Path(args.output_dir) / "README.md", directory / "README.md")
        trainer.accelerator.wait_for_everyone()


def _hash(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _with_prefix(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}


def _check_played(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, iteration: int):
    if any(pairs["played"][:]):
        return
    shares = ", ".join(f"{sum(pairs[kind][:])} are {kind}" for kind in ("empty", "identical", "truncated"))
    examples = "\n".join(
        f"Row {pair['row']}: {tokenizer.decode(pair['generated_ids'])!r}"
        for pair in pairs.select(range(min(3, len(pairs))))
    )
    raise ValueError(
        f"Iteration {iteration} has nothing to learn from: of {len(pairs)} generated answers, {shares}.\n{examples}\n"
        "Empty answers: is the chat template the one the model was fine-tuned with? Truncated ones, under "
        "`truncated_completions='drop'`: raise `max_completion_length`, or check that the model was fine-tuned to end "
        "its answers. Identical ones: the model has learned the data by heart, or `temperature` is 0."
    )
