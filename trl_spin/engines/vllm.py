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

"""vLLM, in processes of its own that load the opponent from a folder: its weights do not change while it completes."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import Pipe
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from peft import PeftModel, PeftType
from transformers import PreTrainedModel
from trl.trainer.utils import selective_log_softmax

from ..run.logs import logger
from ..run.processes import StopSignal
from .base import Complete, Engine, grpo_options


# How a process finds the others of its run, which are none of vLLM's business
_LAUNCHER = re.compile("((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|MASTER_.*|TORCHELASTIC_.*")
_SECONDS_TO_END = 30
# Completions whose log-probs are compared with the model's, and how far off they may be on average, in nats times the
# square root of the length: where both sides compute in float32, and otherwise
_NUM_COMPARED, _TOLERANCE, _ROUGH_TOLERANCE = 16, 1e-3, 0.3
_MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM knows


@dataclass
class _Options(grpo_options("use_vllm vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size")):
    vllm_mode: Literal["offline"] = "offline"
    vllm_kwargs: dict[str, Any] | str | None = None
    vllm_python: str | None = None


class VLLM(Engine):
    """
    vLLM. A sample depends on its seed and its prompt, up to rounding.

    TRL's `"colocate"` and `"server"` send new weights into a vLLM that goes on running. An opponent stays the same for
    a whole round. So it is saved, loaded by a process of vLLM's own, and when the round is over, that has given all its
    memory back. This works on a CPU, too, and in environments with other versions of torch and transformers.
    """

    name = "vllm"
    flag = "use_vllm"
    # Arguments of vLLM's `SamplingParams` that would change what a completion is, or how it is sampled
    reserved = """
        n temperature top_p top_k min_p repetition_penalty max_tokens seed stop stop_token_ids ignore_eos logprobs
        prompt_logprobs detokenize
    """.split()

    Options = _Options

    @classmethod
    def check(cls, args: Any, model: str | PreTrainedModel | PeftModel | None = None):
        if model is not None and args.vllm_python is None and find_spec("vllm") is None:
            remedy = "`pip install trl-spin[vllm]`, set `vllm_python` to that of an environment that has it"
            raise ImportError(f"`use_vllm=True` needs vLLM: {remedy}, or leave `use_vllm` unset.")
        if getattr(model, "is_quantized", False):
            what = f"vLLM would load the weights that were quantized by {model.quantization_method.value} as they were"
            what = f"{what} before, and the opponent would not be the reference"
            raise ValueError(f"{what}. Leave `use_vllm` unset.")
        if isinstance(model, PeftModel):
            if model.active_peft_config.peft_type != PeftType.LORA:
                kind = model.active_peft_config.peft_type.value
                raise ValueError(f"vLLM has no {kind} adapters: use LoRA, or leave `use_vllm` unset.")
            if not model.get_base_model().name_or_path:
                what = "vLLM loads the weights below an adapter by name, but the model's `name_or_path` is empty"
                raise ValueError(f"{what}. Save it with `save_pretrained`, and pass the path instead.")
        if isinstance(model, torch.nn.Module):
            dtype, training = _dtypes(args, model)
            if dtype != training:
                what = f"vLLM computes in {dtype}, training in {training}"
                logger.warning(f"{what}: it samples from a rounded opponent.")

    @contextmanager
    def open(self, model: torch.nn.Module) -> Iterator[Complete]:
        args, processes, worker, compared = self.args, self.processes, None, False
        rank, size = self.accelerator.process_index, args.vllm_tensor_parallel_size
        first = rank - rank % size  # of the processes that share a worker
        if self.accelerator.num_processes > 1 and self.accelerator.num_processes % size:
            what = f"`vllm_tensor_parallel_size={size}` does not divide the {self.accelerator.num_processes} processes"
            raise ValueError(f"{what}, each of which has one device: choose another.")
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        folder = processes.on_main(partial(mkdtemp, dir=args.output_dir, prefix=".opponent-"))
        try:
            try:
                self.save_model(folder)
                self.accelerator.wait_for_everyone()
                if rank == first:
                    environment = _environment(self.accelerator.device, size)
                    worker = _Worker(args.vllm_python or sys.executable, environment, processes.stop)
                    worker.ask(*self._describe(self.accelerator.unwrap_model(model), folder))
            finally:
                self.accelerator.wait_for_everyone()  # all have loaded it
                processes.on_main(shutil.rmtree, folder)

            def complete(prompts, seeds, max_new_tokens, temperature):  # see `Complete`
                nonlocal compared
                if size == 1:
                    completions = worker.ask(prompts, seeds, max_new_tokens, temperature, not compared)
                else:
                    shares = gather_object([(prompts, seeds, max_new_tokens)])[first : first + size]
                    all_prompts, all_seeds, limits = zip(*shares, strict=True)
                    request = sum(all_prompts, []), sum(all_seeds, []), max(limits), temperature, not compared
                    completions = gather_object([worker and worker.ask(*request)])[first]
                    start = sum(map(len, all_prompts[: rank - first]))
                    completions = completions and completions[start : start + len(prompts)]
                if completions is None:
                    return None
                if not compared:
                    self._compare(model, prompts[:_NUM_COMPARED], completions[:_NUM_COMPARED])
                    compared = True
                return [ids for ids, _ in completions]

            yield complete
        finally:
            if worker is not None:
                worker.end()

    def _describe(self, model: PreTrainedModel | PeftModel, folder: str) -> tuple[dict, dict, str | None]:
        """vLLM's options, those of sampling, and the folder of the adapter, if there is one."""
        args, rules, adapter = self.args, self.rules, None
        options = {"model": folder, "dtype": _dtypes(args, model)[0], "trust_remote_code": args.trust_remote_code}
        options |= {name: getattr(args, f"vllm_{name}") for name in ("tensor_parallel_size", "gpu_memory_utilization")}
        options |= {"max_model_len": args.vllm_max_model_length or rules.max_length, "skip_tokenizer_init": True}
        options["generation_config"] = "vllm"  # not the model's own, which may have another temperature
        if isinstance(model, PeftModel):
            config, adapter = model.active_peft_config, folder
            rank = max([config.r, *config.rank_pattern.values()])
            options |= {"model": model.get_base_model().name_or_path, "enable_lora": True}
            options["revision"] = (args.model_init_kwargs or {}).get("revision")
            options["max_lora_rank"] = next((known for known in _MAX_LORA_RANKS if known >= rank), rank)
        sampling = {name: getattr(args, name) for name in ("top_p", "top_k", "repetition_penalty")}
        # A completion ends at our end tokens and nowhere else, whatever the model's own config says
        sampling |= {"min_p": args.min_p or 0.0, "ignore_eos": True, "stop_token_ids": rules.end_token_ids}
        sampling |= {"detokenize": False} | (args.generation_kwargs or {})
        return options | (args.vllm_kwargs or {}), sampling, adapter

    @torch.no_grad()
    def _compare(self, model: torch.nn.Module, prompts: list[list[int]], completions: list[tuple[list[int], float]]):
        """Raises a `ValueError` if what vLLM completes with is not the opponent."""
        was_training, gaps = model.training, []
        model.eval()
        for prompt, (generated, theirs) in zip(prompts, completions, strict=True):
            ids = torch.tensor([prompt + generated], device=self.accelerator.device)
            with self.accelerator.autocast():
                logits = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].float()
            ours = selective_log_softmax(logits, ids[:, len(prompt) :]).sum().item()
            gaps.append(abs(theirs - ours) / math.sqrt(len(generated)))
        model.train(was_training)
        gap, dtypes = sum(gaps) / len(gaps), _dtypes(self.args, self.accelerator.unwrap_model(model))
        tolerance = _TOLERANCE if {*dtypes} == {"float32"} else _ROUGH_TOLERANCE
        if not gap <= tolerance:
            raise ValueError(
                f"vLLM does not complete with the opponent: its log-probs of {len(gaps)} completions are off by {gap:.2g} "
                f"nats times the square root of their length, beyond the {tolerance} that rounding explains (vLLM: "
                f"{dtypes[0]}, training: {dtypes[1]}). Usual causes: weights below an adapter that are not those of "
                "`name_or_path`, or a model that vLLM implements differently. Otherwise leave `use_vllm` unset."
            )


class _Worker:
    """A process that runs `vllm_worker.py`, and what is asked of it."""

    def __init__(self, python: str, environment: dict[str, str], stop: StopSignal):
        self.stop, (self.connection, theirs) = stop, Pipe()
        command = [python, str(Path(__file__).parents[1] / "vllm_worker.py"), str(theirs.fileno())]
        options = {"env": environment, "pass_fds": [theirs.fileno()], "stdout": sys.stderr}
        # Ctrl-C is for the run, which ends its worker
        self.process = subprocess.Popen(command, start_new_session=True, **options)
        theirs.close()

    def ask(self, *request) -> Any:
        """Its answer; `None` if a signal came first. Raises a `ValueError` if it fails."""
        with suppress(BrokenPipeError):  # what it has said before it ended is there to be read
            self.connection.send(request)
        while not self.connection.poll(1):
            if self.stop.signum:
                return None
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            answer = f"it ended with exit code {self.process.wait()}, see its output above"
        if isinstance(answer, str):
            raise ValueError(f"vLLM cannot complete the prompts: {answer}")
        return answer

    def end(self):
        self.connection.close()  # upon which it ends
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0 if self.stop.signum else _SECONDS_TO_END)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # it, or what it has left behind
        self.process.wait()


def _environment(device: torch.device, num_devices: int) -> dict[str, str]:
    """Environment of a worker: a program of its own, on the device of this process and the next ones."""
    environment = {name: value for name, value in os.environ.items() if not _LAUNCHER.fullmatch(name)}
    if device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[device.index or 0 :][:num_devices])
    return {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"} | environment


def _dtypes(args: Any, model: PreTrainedModel | PeftModel) -> tuple[str, str]:
    """What vLLM and what training compute in."""
    training = "bfloat16" if args.bf16 else "float16" if args.fp16 else str(model.dtype).removeprefix("torch.")
    return (args.vllm_kwargs or {}).get("dtype", training), training
