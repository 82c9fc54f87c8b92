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

"""The processes of a run, where they act together: one decision, one signal, batches shared out."""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import pyarrow
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import should_reduce_batch_size
from tqdm.auto import tqdm

from .files import explain_write_error


# A run that is killed while it generates loses at most this much work
COMMIT_SECONDS = 300
# Nor does it keep more than this in memory
_COMMIT_BYTES = 2**23
# Small objects that stay keep the C library from using the memory around them again, which batches needed for a moment:
# with the results of thousands of batches waiting, it would grow to gigabytes
_LOOSE_RESULTS = 32


class StopRequested(SystemExit):
    """The run was told to stop, and what was done so far is on disk. The exit code is the one of shells."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


class StopSignal:
    """
    SIGTERM and SIGINT (Ctrl-C), remembered until the run can stop without losing work. In use as a context manager. A
    second signal stops at once, unless there are several processes: their launcher passes signals on, so that one
    Ctrl-C arrives twice.
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
        The signal that reached any of the processes (0: none), and the first process's flag. All processes must call
        this at the same time.
        """
        signum = self.signum
        if self.accelerator.num_processes == 1:
            return signum, flag
        state = self.accelerator.gather(torch.tensor([[signum, int(flag)]], device=self.accelerator.device))
        return int(state[:, 0].max()), bool(state[0, 1])


@dataclass(frozen=True)
class Processes:
    """All processes of the run, acting together."""

    accelerator: Accelerator
    stop: StopSignal
    quiet: bool  # no progress bars

    def on_main(self, function: Callable, *args) -> Any:
        """
        Calls a function that works on files on the main process. All processes get its result, or its exception: none
        waits for a process that has failed.
        """
        outcome = [None, None]
        if self.accelerator.is_main_process:
            try:
                outcome[0] = function(*args)
            except Exception as error:
                outcome[1] = error
        if self.accelerator.num_processes > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def write(self, output_dir: str, function: Callable, *args) -> Any:
        """Calls a function that writes below `output_dir` on the main process."""
        with explain_write_error(output_dir):
            return self.on_main(function, *args)

    def smallest(self, value: float) -> float:
        """The smallest value of all processes, so that they decide alike."""
        value = torch.tensor([value], dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.gather(value).min().item()

    def map(
        self,
        batches: list[np.ndarray],
        function: Callable[[np.ndarray], pyarrow.Table | None],
        desc: str | None,
        commit: Callable[[pyarrow.Table], None],
        done: np.ndarray | None = None,
    ):
        """
        Applies a function to batches of rows, spread over the processes.

        Every process works on the same number of batches (sharded models need all of them in every forward pass).
        After each round of batches the processes agree whether one of them was told to stop. Only results that are not
        yet committed are in memory.

        Args:
            batches (`list[np.ndarray]`):
                Indices of the rows in each batch. Together they hold each of 0..N-1 once.
            function (`Callable[[np.ndarray], pyarrow.Table | None]`):
                Maps the indices of a batch to one result per row, with its `index`, or to `None` if a signal cut it
                short.
            desc (`str`, *optional*):
                Title of the progress bar, if there should be one.
            commit (`Callable[[pyarrow.Table], None]`):
                Is given the new results, on every process: every few minutes, when many are waiting, at the end, and
                when the run is told to stop.
            done (`np.ndarray`, *optional*):
                Whether each row needs no result.

        Raises:
            `StopRequested`: If one of the processes was told to stop.
        """
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        num_rows = sum(map(len, batches))
        if done is not None:
            batches = [left for batch in batches if len(left := batch[~done[batch]])]
        new, num_bytes, last_commit = [], 0, time.monotonic()
        hidden = self.quiet or desc is None or not self.accelerator.is_main_process
        initial = num_rows - sum(map(len, batches))
        bar = tqdm(total=num_rows, initial=initial, desc=desc, unit="row", leave=False, disable=hidden)
        with bar as progress:
            for start in range(0, len(batches), world_size):
                results = function(batches[min(start + rank, len(batches) - 1)])
                if results is not None and start + rank < len(batches):
                    new.append(results)
                    num_bytes += results.nbytes
                if len(new) > _LOOSE_RESULTS:
                    new = [pyarrow.concat_tables(new).combine_chunks()]
                progress.update(sum(map(len, batches[start : start + world_size])))
                # The first process has the clock
                due = time.monotonic() - last_commit > COMMIT_SECONDS or num_bytes * world_size > _COMMIT_BYTES
                signum, due = self.stop.agree(due)
                if signum or due or start + world_size >= len(batches):
                    if gathered := gather_object(new) if world_size > 1 else new:
                        commit(pyarrow.concat_tables(gathered))
                    new, num_bytes, last_commit = [], 0, time.monotonic()
                if signum:
                    raise StopRequested(signum)


@contextmanager
def explain_out_of_memory(phase: str, remedy: str):
    """Adds the phase that ran out of memory, and what to do about it, to the error."""
    try:
        yield
    except RuntimeError as error:
        explained = str(error).startswith("Out of memory in ")  # by the phase inside this one
        if not explained and (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise torch.OutOfMemoryError(f"Out of memory in {phase}. {remedy}\n{error}") from error
        raise
