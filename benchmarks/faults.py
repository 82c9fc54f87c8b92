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
Kills runs and damages their files for as long as you like, and counts how the same command ends when it is given again:

- exact: with the weights, games and records of a run that was left alone, bit for bit;
- named: otherwise, but an error or a warning names the damaged file;
- unnamed: with any other error, or never;
- silent: with another result, of which nothing was said.

The last two are faults of this package: each is printed with its name, and the exit status is 1.

python benchmarks/faults.py --minutes 1
python benchmarks/faults.py --repeat kill-lora-2-81723
"""

import os


os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ |= {"ACCELERATE_USE_CPU": "true", "TRANSFORMERS_VERBOSITY": "error"}

import argparse
import gc
import hashlib
import json
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from trl_spin import SPINConfig, SPINTrainer
from trl_spin.run import processes


KINDS = [("full", 1), ("lora", 1), ("full", 2), ("lora", 2)]
STOPS = (1, 2, 4)  # steps: in the first iteration, at its end, and in the second
FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
LONGEST = 180  # seconds of a run


def zero_the_end(path: Path):
    size = path.stat().st_size
    os.truncate(path, size // 2)
    os.truncate(path, size)


def flip_a_byte(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "zeroed": zero_the_end,
    "flipped": flip_a_byte,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": Path.unlink,
    "list": lambda path: path.write_text("[1]"),
    "object": lambda path: path.write_text("{}"),
}
# What no result depends on: written for people, or for other programs
OUTPUTS = ("README.md", "log_history.json", "lock", "job.json")


# ---- A run ----


class Copies(TrainerCallback):
    """Copies what the run would have left behind, had it been killed after a checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step in STOPS:
            shutil.copytree(args.output_dir, f"{args.output_dir}-{state.global_step}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def make_trainer(output_dir: str, kind: str, world_size: int, callbacks: list[TrainerCallback]) -> SPINTrainer:
    """Two iterations of 2 and 4 steps. The first makes the better model, which is loaded at the end."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape, **special)
    rows = [{"prompt": f"Say {word}: ", "completion": 2 * word} for word in "one two three four five six".split()]
    options = {"output_dir": output_dir, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    options |= {"num_self_play_iterations": 2, "num_train_epochs": [1, 2], "learning_rate": [1e-3, 0.03]}
    options |= {"per_device_train_batch_size": 2 // world_size, "max_completion_length": 6, "opponent_history": 1}
    options |= {"generation_token_budget": 60, "held_out_size": 2, "num_probes": 1, "write_report": False}
    options |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_steps": 1}
    args = SPINConfig(**options, load_best_iteration_at_end=True, gradient_checkpointing=False)
    peft_config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1) if kind == "lora" else None
    data, model = Dataset.from_list(rows), LlamaForCausalLM(config)
    return SPINTrainer(model, None, args, None, data, None, tokenizer, callbacks=callbacks, peft_config=peft_config)


def result_of(trainer: SPINTrainer) -> dict[str, str | dict]:
    """All that a run leaves, without times and counters of this process."""
    output_dir, digest = Path(trainer.args.output_dir), hashlib.sha256()
    for name, tensor in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    result = {"weights": digest.hexdigest()}
    for pattern in ("self_play/iteration-*/*.arrow", "iteration-1/*.safetensors"):
        for path in sorted(output_dir.glob(pattern)):
            result[str(path.relative_to(output_dir))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted([*output_dir.glob("iteration-*/self_play.json"), *output_dir.glob("self_play/*/probes.json")]):
        try:
            content = json.loads(path.read_bytes())
        except ValueError:
            content = None
        if isinstance(content, dict):
            varying = ("time", "per_second", "num_tokens", "sha256")
            content = {key: value for key, value in content.items() if not key.endswith(varying)}
        result[str(path.relative_to(output_dir))] = content
    return result


def play(output_dir: str, kind: str, world_size: int, rank: int, port: int, death: int | None, copies: bool):
    """One process of a run, always started in the same way. It dies at its n-th access to a file of the run."""
    log = os.open(f"{output_dir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world_size)}
    processes.COMMIT_SECONDS = -1  # a shard for every round of batches
    events = 0

    def audit(event: str, args: tuple):
        nonlocal events
        if event in FILE_EVENTS and str(args[event == "os.rename"]).startswith(f"{output_dir}/"):
            events += 1
            if events == death:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    outcome = {}
    try:
        trainer = make_trainer(output_dir, kind, world_size, [Copies()] if copies else [])
        trainer.train(resume_from_checkpoint=True)
        outcome = {"result": result_of(trainer), "events": events}
    except BaseException as error:
        traceback.print_exc()
        outcome = {"error": f"{type(error).__name__}: {error}", "clear": isinstance(error, (ValueError, OSError))}
    Path(f"{output_dir}.{rank}.json").write_text(json.dumps(outcome))


def run(output_dir: Path, kind: str, world_size: int, death=None, seconds=None, copies=False) -> dict | None:
    """
    A run in processes of its own. As a launcher does, it kills the others when one of them dies. `death`: at which access
    to a file a process dies, by rank; `seconds`: when all are killed. Returns the outcome, or `None` if it was killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [Path(f"{output_dir}.{rank}.json") for rank in range(world_size)]
    for path in paths:
        path.unlink(missing_ok=True)
    children = {}
    for rank in range(world_size):
        children[pid := os.fork()] = rank
        if pid == 0:
            try:
                play(str(output_dir), kind, world_size, rank, port, (death or {}).get(rank), copies)
            finally:
                os._exit(0)
    start, killed, hung = time.monotonic(), False, False
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            del children[pid]
            killed |= os.WIFSIGNALED(status)
        late = time.monotonic() - start
        due = seconds is not None and late > seconds
        hung |= late > LONGEST
        if children and (killed or due or hung):
            killed = True
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    if hung:
        return {"error": f"no end after {LONGEST} s", "clear": False}
    if killed:
        return None
    outcomes = [json.loads(path.read_text()) for path in paths if path.exists()]
    # The error of the process that failed first; its partners lose their connection
    errors = sorted((outcome for outcome in outcomes if "error" in outcome), key=lambda outcome: not outcome["clear"])
    return (errors or outcomes)[0]


# ---- Tries ----


class Campaign:
    def __init__(self, directory: Path):
        self.directory, self.straight, self.stopped = directory, {}, {}
        self.counts, self.kills = Counter(), 0

    def prepare(self, kind: str, world_size: int):
        """A run that is left alone, and copies of it to be damaged."""
        if (kind, world_size) in self.straight:
            return
        base, start = self.directory / f"{kind}-{world_size}", time.monotonic()
        outcome = run(base, kind, world_size, copies=True)
        if "error" in outcome:
            raise SystemExit(f"A run that is left alone fails: {outcome['error']}")
        self.straight[kind, world_size] = outcome | {"seconds": time.monotonic() - start}
        for stop in STOPS:
            self.stopped[kind, world_size, stop] = Path(f"{base}-{stop}")

    def table(self, rng: random.Random) -> list[str]:
        """Names of the tries with damaged files: one for each kind of file and of damage, in random order."""
        instances = defaultdict(list)
        for kind, world_size in KINDS:
            self.prepare(kind, world_size)
            for stop in STOPS:
                base = self.stopped[kind, world_size, stop]
                for path in sorted(path for path in base.rglob("*") if path.is_file() and path.name not in OUTPUTS):
                    damages = [name for name in DAMAGES if path.suffix == ".json" or name not in ("list", "object")]
                    file = path.relative_to(base)
                    for name in damages:
                        what = kind, name, re.sub(r"\d+|[0-9a-f]{16,}", "*", str(file))
                        instances[what].append(f"damage-{kind}-{world_size}-{stop}-{name}-{file}")
        names = [rng.choice(found) for found in instances.values()]
        rng.shuffle(names)
        return names

    def attempt(self, name: str) -> str:
        """One try, by its name. Returns how it ended."""
        what, kind, world_size, rest = name.split("-", 3)
        world_size, directory, file = int(world_size), self.directory / "try" / "run", None
        self.prepare(kind, world_size)
        shutil.rmtree(directory.parent, ignore_errors=True)
        directory.parent.mkdir()
        straight, kills, outcome = self.straight[kind, world_size], 0, None
        if what == "damage":
            stop, damage, file = rest.split("-", 2)
            shutil.copytree(self.stopped[kind, world_size, int(stop)], directory)
            DAMAGES[damage](directory / file)
        else:
            rng = random.Random(int(rest))
            for _ in range(rng.randint(1, 8)):
                moment = rng.uniform(0, 0.6)  # a run that goes on is shorter than one from the start
                fault = {"seconds": moment * straight["seconds"]}
                if rng.random() < 0.7:
                    fault = {"death": {rng.randrange(world_size): 1 + int(moment * straight["events"])}}
                outcome = run(directory, kind, world_size, **fault)
                kills += outcome is None
                if outcome and "error" in outcome:
                    break
        if not outcome or "error" not in outcome:
            outcome = run(directory, kind, world_size) or {"error": "a process has died", "clear": False}
        named = file is not None and f"{directory}/{file}" in Path(f"{directory}.log").read_text()
        # What of an earlier iteration is read no more stays as it is
        result, expected = outcome.get("result", {}), straight["result"]
        changed = [key for key in expected if result.get(key) != expected[key] and key != file]
        if "error" in outcome:
            end = "named" if named and outcome["clear"] else "unnamed"
        elif not changed:
            end = "exact"
        else:
            end = "named" if named else "silent"
        self.counts[end] += 1
        self.kills += kills if end == "exact" else 0
        if end in ("unnamed", "silent"):
            print(f"{end}: {name}: {outcome.get('error', f'{changed} differ')}", flush=True)
        return end


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="How long to go on, at least.")
    parser.add_argument("--seed", type=int, default=0, help="Of the order of the tries, and of what happens in them.")
    parser.add_argument("--only", choices=["kill", "damage"], help="One kind of fault alone.")
    parser.add_argument("--repeat", metavar="NAME", help="One try, by the name that was printed.")
    options = parser.parse_args()
    rng, deadline = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    gc.freeze()  # what is imported is no work for the collectors of the runs
    with tempfile.TemporaryDirectory() as directory:
        campaign = Campaign(Path(directory))
        if options.repeat:
            print(end := campaign.attempt(options.repeat))
            raise SystemExit(end in ("unnamed", "silent"))
        table = [] if options.only == "kill" else campaign.table(rng)
        print(f"Seed {options.seed}, {len(table)} damages in the table", flush=True)
        while time.monotonic() < deadline:
            if table and (options.only == "damage" or rng.random() < 0.5):
                campaign.attempt(table.pop())
            elif options.only != "damage":
                kind, world_size = rng.choice(KINDS)
                campaign.attempt(f"kill-{kind}-{world_size}-{rng.randrange(10**6)}")
            else:
                break
        counts = ", ".join(f"{campaign.counts[end]} {end}" for end in ("exact", "named", "unnamed", "silent"))
        print(f"{campaign.counts.total()} tries: {counts}. {campaign.kills} kills in those that ended exact.")
    raise SystemExit(bool(campaign.counts["unnamed"] or campaign.counts["silent"]))


if __name__ == "__main__":
    main()
