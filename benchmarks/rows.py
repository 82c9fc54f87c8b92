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

"""
Memory and time of a run as its rows grow: a tiny random model, short rows or, with `--length`, longer ones (32: 190
tokens), everything else as in any run.

Each size is a run of its own, with one process and with two. Of each process it measures the largest private memory
(Linux's `RssAnon`: what the process has for itself) and the largest part of mapped files that was in memory (`RssFile`:
pages that the system shares among processes, and takes back when it needs them), from the moment when the libraries are
loaded and the trainer is to be made.

python benchmarks/rows.py
python benchmarks/rows.py --rows 10000 100000 --processes 1
python benchmarks/rows.py --rows 10000 --processes 1 --length 32
"""

import os


os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ |= {
    "ACCELERATE_USE_CPU": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pyarrow
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_spin import SPINConfig, SPINTrainer


_SLICE = 10_000


def make_data(path: Path, num_rows: int, length: int):
    """Rows of one to five letters and a number, both so many times, in a file that is mapped into memory."""
    schema = pyarrow.schema({"prompt": pyarrow.string(), "completion": pyarrow.string()})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        for start in range(0, num_rows, _SLICE):
            numbers = range(start, min(start + _SLICE, num_rows))
            prompts = ["abcde"[: 1 + i % 5] * length for i in numbers]
            completions = [str(i % 1000) * length for i in numbers]
            stream.write_table(pyarrow.table({"prompt": prompts, "completion": completions}, schema=schema))


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def memory() -> dict[str, float]:
    """Memory of this process, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("private", "RssAnon"), ("mapped", "RssFile"))}


def play(directory: Path, length: int):
    """One process of a run. It leaves what it needed."""
    world_size, tokenizer = int(os.environ.get("WORLD_SIZE", 1)), make_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **special))
    options = {"output_dir": str(directory / "run"), "use_cpu": True, "bf16": False, "report_to": "none"}
    options |= {"disable_tqdm": True, "write_report": False, "num_probes": 0, "save_strategy": "no"}
    options |= {"num_self_play_iterations": 1, "num_train_epochs": 1, "gradient_checkpointing": False}
    # Batches of about as many tokens, whatever the length, except in generation, which would take too long
    size = max(1, 512 // world_size // length)
    options |= {"per_device_train_batch_size": size, "precompute_ref_batch_size": max(1, 256 // length)}
    options |= {"generation_token_budget": 2**12 * length, "max_completion_length": 4 * length, "logging_steps": 1000}
    first, peak, over = memory(), {"private": 0.0, "mapped": 0.0}, threading.Event()

    def watch():
        while not over.wait(0.02):
            for name, megabytes in memory().items():
                peak[name] = max(peak[name], megabytes)

    threading.Thread(target=watch, daemon=True).start()
    start, processor = time.perf_counter(), time.process_time()
    dataset = Dataset.from_file(str(directory / "data.arrow"))
    trainer = SPINTrainer(model, None, SPINConfig(**options), None, dataset, None, tokenizer)
    seconds = {"tokenizing": time.perf_counter() - start}
    trainer.train()
    over.set()
    for phase in ("generation", "scoring", "training"):
        logged = [
            logs[f"self_play/{phase}_time"] for logs in trainer.state.log_history if f"self_play/{phase}_time" in logs
        ]
        seconds[phase] = sum(logged) / len(logged)
    seconds |= {"all": time.perf_counter() - start, "processor": time.process_time() - processor}
    result = {"first": first, "peak": peak, "seconds": seconds}
    (directory / f"result-{trainer.accelerator.process_index}.json").write_text(json.dumps(result))
    trainer.accelerator.end_training()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="Sizes of the data.")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="Numbers of processes.")
    parser.add_argument("--length", type=int, default=1, help="How many times as long rows and completions are.")
    parser.add_argument("--play", type=Path, help=argparse.SUPPRESS)  # a process of a run, which this script starts
    options = parser.parse_args()
    if options.play:
        return play(options.play, options.length)
    phases = ("tokenizing", "generation", "scoring", "training", "processor")
    titles = [
        "rows",
        "processes",
        "private memory, MB",
        "mapped files, MB",
        *(f"{phase}, µs" for phase in phases),
        "all",
    ]
    print("\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---:"] * len(titles))), flush=True)
    for num_processes in options.processes:
        for num_rows in options.rows:
            with tempfile.TemporaryDirectory() as directory:
                make_data(Path(directory, "data.arrow"), num_rows, options.length)
                launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
                command = [sys.executable, *(launcher if num_processes > 1 else ()), __file__, "--play", directory]
                command += ["--length", str(options.length)]
                log = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                if log.returncode:
                    raise SystemExit(log.stdout)
                results = [json.loads(path.read_text()) for path in sorted(Path(directory).glob("result-*.json"))]
            grown = [
                " and ".join(f"{r['first'][name]:.0f} to {r['peak'][name]:.0f}" for r in results)
                for name in ("private", "mapped")
            ]
            seconds = results[0]["seconds"]
            cells = [
                f"{num_rows:,}",
                str(num_processes),
                *grown,
                *(f"{1e6 * seconds[p] / num_rows:.1f}" for p in phases),
            ]
            cells.append(f"{seconds['all']:.0f} s")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
