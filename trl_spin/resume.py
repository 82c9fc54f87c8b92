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

"""Stopping a run at any moment, and going on with it as if nothing had happened."""

import hashlib
import json
import os
import shutil
import signal
import socket
import threading
import zipfile
from bisect import bisect_right
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import should_reduce_batch_size
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import sort_checkpoints

from .game import find_game_fault
from .model_card import RECORD
from .spin_config import SPINConfig


logger = get_logger(__name__)

# Options that may differ between a run and its continuation, because they do not change what is computed (up to rounding,
# for those that set the size of a batch without gradients). Every other option is part of the contract: an option that a
# later TRL adds is compared until it is listed here.
_FREE_OPTIONS = {
    *("output_dir", "resume_from_checkpoint", "dry_run", "run_name", "project", "report_to", "disable_tqdm"),
    *("do_train", "do_eval", "do_predict", "local_rank", "debug", "skip_memory_metrics"),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "include_num_input_tokens_seen"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only"),
    *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics"),
    *("batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "metric_for_best_model", "greater_is_better"),
    *("save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_always_push", "hub_revision"),
    *("restore_callback_states_from_checkpoint", "trust_remote_code", "max_steps", "initial_loss_tolerance"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_num_proc"),
    *("dataloader_multiprocessing_context", "ddp_timeout", "ddp_backend", "torch_empty_cache_steps", "use_cache"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "activation_offloading"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "ds3_gather_for_generation"),
    *("generation_token_budget", "precompute_ref_batch_size"),
    # Engines draw from the same distribution
    *("use_transformers_continuous_batching", "transformers_continuous_batching_config"),
    *("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url"),
    *("vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
    *("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"),
    *(
        "num_probes",
        "log_completions",
        "write_report",
        "early_stopping",
        "load_best_iteration_at_end",
        "metric_for_best_iteration",
    ),
    # Compared iteration by iteration, or through the rows that come out
    *("num_self_play_iterations", "messages_column", "prompt_column", "completion_column"),
}
_PER_ITERATION = ("learning_rate", "num_train_epochs", "beta", "sft_weight")


# ---- One decision for all processes ----


def on_main_process(accelerator: Accelerator, function: Callable, *args) -> Any:
    """
    Calls a function on the main process. All processes get its result, or its exception: nobody waits for a process
    that has failed.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
        function (`Callable`):
            Function that works on files, with a result that can be pickled.
        *args:
            Its arguments.

    Returns:
        `Any`: Its result.
    """
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function(*args)
        except Exception as error:
            outcome[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


# ---- Stopping ----


class StopRequested(Exception):
    """The run was told to stop, and what was done so far is on disk."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class StopSignal:
    """
    SIGTERM and SIGINT (Ctrl-C), remembered until the run can stop without losing work. In use as a context manager. A
    second signal stops at once, unless there are several processes: their launcher passes signals on, so that one
    Ctrl-C arrives twice.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.signum = 0
        self._handlers = {}

    def __enter__(self) -> "StopSignal":
        self.signum = 0
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._handlers[signum] = signal.signal(signum, self._remember) or signal.SIG_DFL
        return self

    def __exit__(self, *exception):
        for signum in list(self._handlers):
            signal.signal(signum, self._handlers.pop(signum))

    def _remember(self, signum: int, frame: FrameType | None):
        if self.signum and self.accelerator.num_processes == 1:
            self.__exit__()
            signal.raise_signal(signum)
            return
        self.signum = signum
        # `print` must not be called from a signal handler
        os.write(2, f"\n{signal.Signals(signum).name}: stopping as soon as the work so far is saved.\n".encode())

    def agree(self, flag: bool = False) -> tuple[int, bool]:
        """
        What all processes know together. All of them must call it at the same time.

        Args:
            flag (`bool`, *optional*, defaults to `False`):
                A decision of the first process.

        Returns:
            `tuple[int, bool]`: Signal that reached any of the processes (0: none), and the first process's flag.
        """
        signum = self.signum
        if self.accelerator.num_processes == 1:
            return signum, flag
        state = self.accelerator.gather(torch.tensor([[signum, int(flag)]], device=self.accelerator.device))
        return int(state[:, 0].max()), bool(state[0, 1])


@contextmanager
def explain_out_of_memory(phase: str, remedy: str):
    """
    Adds the way out to an out-of-memory error.

    Args:
        phase (`str`):
            What ran out of memory.
        remedy (`str`):
            What to do about it.
    """
    try:
        yield
    except RuntimeError as error:
        explained = str(error).startswith("Out of memory in ")  # by the phase inside this one
        if not explained and (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise torch.OutOfMemoryError(f"Out of memory in {phase}. {remedy}\n{error}") from error
        raise


@contextmanager
def explain_write_error(directory: Path):
    """
    Adds the directory, its free space and the way out to a failed write: torch and safetensors report a full disk
    without a word about disks.

    Args:
        directory (`Path`):
            Directory that is written to.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(
            f"Writing to {directory} failed: {error}. {shutil.disk_usage(existing(directory)).free / 1e9:.2f} GB are "
            "free there. What was saved before is intact: make room (or lower `save_total_limit`) and resume."
        ) from error


def existing(directory: Path) -> Path:
    """The directory, or the nearest parent that exists."""
    return next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())


# ---- One job per directory ----


class RunLock:
    """
    Keeps a second job out of a run's directory. The system gives the lock back when the process ends, however it ends.

    Args:
        output_dir (`str`):
            Output directory of the run.
    """

    def __init__(self, output_dir: str):
        self.output_dir = output_dir
        self.lock = FileLock(Path(output_dir) / "self_play" / "lock")
        self.holder = Path(output_dir) / "self_play" / "job.json"

    def acquire(self):
        """
        Takes the lock.

        Raises:
            `ValueError`: If another job has it.
        """
        try:
            self.holder.parent.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            self.holder.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        except Timeout:
            holder = self.holder.read_text() if self.holder.is_file() else "unknown"
            raise ValueError(
                f"Another job is running in `output_dir` ({self.output_dir}): {holder}. Wait for it or stop it, or "
                "choose another `output_dir`."
            ) from None
        except NotImplementedError:
            logger.warning(f"The file system of {self.output_dir} has no locks: do not start two jobs in it.")
        except OSError as error:
            raise OSError(
                f"`output_dir` ({self.output_dir}) cannot be written to: {error}. Choose another one."
            ) from error

    def release(self):
        """Gives the lock back."""
        self.lock.release()


# ---- What a run depends on ----


@torch.no_grad()
def weights_fingerprint(accelerator: Accelerator, model: torch.nn.Module) -> str:
    """
    Fingerprint of the weights, computed where they are: a sum over positions for each tensor, exact in 64-bit integers
    and so the same on every device. It tells models apart that are different by mistake, not by intent.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator.
        model (`torch.nn.Module`):
            Model, which may be sharded over the processes.

    Returns:
        `str`: SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        data = getattr(parameter, "ds_tensor", parameter)  # DeepSpeed ZeRO-3
        data = (data.to_local() if isinstance(data, DTensor) else data).detach()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}".encode())
        if data.device.type == "meta":
            continue
        for chunk in data.contiguous().view(-1).view(integers[data.element_size()]).split(2**24):
            factors = torch.arange(1, 2 * len(chunk), 2, device=chunk.device)
            digest.update(str((chunk.long() * factors).sum().item()).encode())
    parts = gather_object([digest.hexdigest()]) if accelerator.num_processes > 1 else [digest.hexdigest()]
    # One and the same for all processes, unless each has another part of the model
    return parts[0] if len(set(parts)) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    return {name: version(name) for name in ("trl-spin", "trl", "transformers", "peft", "accelerate", "torch")}


def run_settings(args: SPINConfig, **more) -> dict[str, Any]:
    """
    All that changes the result of a run.

    Args:
        args ([`SPINConfig`]):
            Options. Those that change nothing are left out.
        **more:
            What is not an option: model, data, adapter, number of processes.

    Returns:
        `dict[str, Any]`: JSON-serializable settings by name.
    """
    settings = {name: value for name, value in args.to_dict().items() if name not in _FREE_OPTIONS} | more
    settings |= {name: args.per_iteration(name) for name in _PER_ITERATION}

    def plain(value):
        return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)

    return json.loads(json.dumps(settings, default=plain))


def compare_settings(path: Path, old: dict[str, Any], new: dict[str, Any]):
    """
    Refuses to go on with a run under other settings. More iterations are no other settings.

    Args:
        path (`Path`):
            Where the old settings are kept.
        old (`dict[str, Any]`):
            Settings of the run.
        new (`dict[str, Any]`):
            Settings of its continuation.

    Raises:
        `ValueError`: If a setting differs; the message lists old and new values.
    """
    changes = []
    for name in sorted(old.keys() & new.keys()):
        before, after = old[name], new[name]
        if name in _PER_ITERATION:
            played = min(len(before), len(after))
            before, after = before[:played], after[:played]
        if before != after:
            changes.append(f"- `{name}` was {before!r} and is {after!r}")
    if changes:
        raise ValueError(
            f"The run would not be the one that is continued. These settings differ from {path}:\n"
            + "\n".join(changes)
            + "\nResume with the old settings, or start a new run in another `output_dir`."
        )


# ---- Where to go on ----


def find_checkpoint_fault(checkpoint: Path, num_processes: int, model_only: bool) -> str | None:
    """
    What a checkpoint lacks. Files are checked for being complete, none is unpickled.

    Args:
        checkpoint (`Path`):
            Directory of the checkpoint.
        num_processes (`int`):
            Number of processes, each of which has a random state.
        model_only (`bool`):
            Whether the run saves models only (`save_only_model`).

    Returns:
        `str` or `None`: The fault, which names the file; `None` if the checkpoint is complete.
    """
    # DeepSpeed and FSDP keep weights and optimizer in folders of their own, whose files are not looked at
    sharded = any(checkpoint.glob("global_step*")) or any(checkpoint.glob("pytorch_model_fsdp*"))
    weights = [*checkpoint.rglob("*.safetensors")]
    archives = [*checkpoint.glob("pytorch_model*.bin")]
    for index in checkpoint.glob("*.safetensors.index.json"):
        try:
            weights += [checkpoint / name for name in set(json.loads(index.read_text())["weight_map"].values())]
        except ValueError:
            return f"{index.name} is cut off"
    if not (weights or archives or sharded):
        return "the model's weights are missing"
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name} is missing or cut off ({error})"
    if not model_only:
        random_states = (
            ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{i}.pth" for i in range(num_processes)]
        )
        states = random_states if sharded else ["optimizer.pt", "scheduler.pt", *random_states]
        archives += [checkpoint / name for name in states]
    for path in archives:
        if not (path.is_file() and zipfile.is_zipfile(path)):
            return f"{path.name} is {'cut off' if path.is_file() else 'missing'}"
    try:
        if "global_step" not in json.loads((checkpoint / "trainer_state.json").read_text()):
            return "trainer_state.json has no `global_step`"
    except (OSError, ValueError):
        return "trainer_state.json is missing or cut off"
    return None


def choose_checkpoint(args: SPINConfig, resume_from_checkpoint: str | bool, num_processes: int) -> str | None:
    """
    The newest checkpoint from which the run can go on, or the given one.

    Args:
        args ([`SPINConfig`]):
            Options.
        resume_from_checkpoint (`str` or `bool`):
            Checkpoint to resume from; `True` for the newest complete one.
        num_processes (`int`):
            Number of processes.

    Returns:
        `str` or `None`: Checkpoint. `None` if there is none and the run goes on from its beginning.

    Raises:
        `ValueError`: If the given checkpoint, or all of them, cannot be used.
    """
    boundaries = [0, *accumulate(args.per_iteration("num_train_epochs"))]
    if resume_from_checkpoint is True:
        candidates = [Path(path) for path in reversed(sort_checkpoints(args.output_dir))]
    else:
        candidates = [Path(resume_from_checkpoint)]
    faults = []
    for checkpoint in candidates:
        fault = find_checkpoint_fault(checkpoint, num_processes, args.save_only_model)
        if fault is None:
            epoch = json.loads((checkpoint / "trainer_state.json").read_text())["epoch"]
            if epoch > boundaries[-1]:
                raise ValueError(
                    f"{checkpoint} is at epoch {epoch:g}, beyond the {boundaries[-1]} epochs of "
                    f"`num_self_play_iterations={args.num_self_play_iterations}`. Ask for at least as many iterations "
                    "as were played, or resume from an earlier checkpoint by its path."
                )
            if epoch not in boundaries:  # in the middle of an iteration, whose game it needs
                fault = find_game_fault(args.output_dir, bisect_right(boundaries, epoch) - 1)
        if fault is None:
            logger.info(f"Resuming from {checkpoint}.")
            return str(checkpoint)
        faults.append(f"{checkpoint}: {fault}.")
        logger.warning(f"Cannot resume from {faults[-1]}")
    finished = [path.parent.name for path in Path(args.output_dir).glob(f"iteration-*/{RECORD}")]
    if resume_from_checkpoint is not True or finished:
        raise ValueError(
            "There is no checkpoint to resume from.\n"
            + "\n".join(faults or [f"{args.output_dir} holds none (`save_strategy={args.save_strategy.value!r}`)."])
            + "\nRestore the files or resume from another checkpoint"
            + (
                f", or start a new run from the model of the last finished iteration ({', '.join(finished)})."
                if finished
                else "."
            )
        )
    logger.warning(f"No checkpoint in {args.output_dir} is complete yet: the run goes on from its beginning.")
    return None
