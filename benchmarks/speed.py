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
One self-play iteration, from a saved model to a saved model, on the same model, data and seed:

(a) TRL as one would script it: `generate` in batches of 8, decode, `DPOTrainer` with its defaults;
(b) the same with `precompute_ref_log_probs`;
(c) trl-spin with its defaults, which leave out gradient checkpointing where memory allows;
(d) trl-spin with gradient checkpointing, as (a) and (b) have it;
(e) the script of (b) with the class name changed to `SharedPrefixDPOTrainer`;
(f) the same with `train_sampling_strategy="group_by_length"`, which DPOTrainer cannot do;
(g) (c) with QLoRA;
(h) (b) with QLoRA.

Each variant runs in a process of its own, in turn, and the best of the repetitions counts. The model is random, with a
bias on the end token that lets half of the completions run into their limit. Lengths are drawn from a distribution
like that of UltraChat and scaled down.

    python benchmarks/speed.py

`gpu.py` runs it on a GPU, with models of other shapes.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path


VARIANTS = {
    "a": "DPOTrainer, scripted",
    "b": "the same, reference precomputed",
    "c": "trl-spin",
    "d": "trl-spin, gradient checkpointing",
    "e": "(b) with SharedPrefixDPOTrainer",
    "f": "the same, grouped by length",
    "g": "trl-spin, QLoRA",
    "h": "(b) with QLoRA",
}
# Llamas, in the names of `MistralConfig`: the two are the same but for a window
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 512},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 32000},
}
PASSES = 2

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--num_pairs", type=int, default=128)
parser.add_argument("--scale", type=float, default=0.25, help="Lengths in units of UltraChat's.")
parser.add_argument("--hidden_size", type=int, default=128)
parser.add_argument("--num_layers", type=int, default=4)
parser.add_argument("--vocab_size", type=int, default=4096)
parser.add_argument("--num_iterations", type=int, default=1, help="Self-play iterations of trl-spin.")
parser.add_argument("--opponent_history", type=int, default=0, help="Earlier opponents that trl-spin plays against.")
parser.add_argument("--repetitions", type=int, default=3)
parser.add_argument("--shape", choices=SHAPES, help="Instead of a Phi of the sizes above.")
parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="A GPU computes in mixed precision.")
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--optim", default="adamw_torch")
parser.add_argument("--timeout", type=float, help="Seconds that a variant may take.")
parser.add_argument("--json", help="File for all results.")
parser.add_argument(
    "--clock",
    choices=["wall", "cpu"],
    default="wall",
    help="Seconds of the clock, or of the processor, for a machine that others use.",
)
parser.add_argument("--variants", default="abcdef", help="Which to run, such as 'ac'.")
parser.add_argument("--work_dir", help=argparse.SUPPRESS)
parser.add_argument("--variant", help=argparse.SUPPRESS)
args = parser.parse_args(None if __name__ == "__main__" else [])
on_gpu, is_qlora = args.device == "cuda", (args.variant or "") in [*"gh"]
args.vocab_size = SHAPES[args.shape]["vocab_size"] if args.shape else args.vocab_size
limit = int(256 * args.scale)  # tokens of a completion
# A completion ends at each token with a probability of 0.7 / limit, so that half of them reach it
end_bias = math.log(args.vocab_size / (limit / 0.7 - 1))
# Phi's head has it as a bias
sampling = {"sequence_bias": [[[1], end_bias]]} if args.shape else {}


def clock() -> float:
    if on_gpu:
        import torch

        torch.cuda.synchronize()
    return {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]()


def training_options() -> dict:
    return {
        "num_train_epochs": PASSES,
        "per_device_train_batch_size": args.batch_size,
        "optim": args.optim,
        "model_init_kwargs": {"dtype": "bfloat16" if is_qlora else "float32"},
        "use_cpu": not on_gpu,
        "bf16": on_gpu or is_qlora,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def quantization() -> dict:
    """QLoRA, as arguments of a trainer."""
    if not is_qlora:
        return {}
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    in_4bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
    )
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return {"quantization_config": in_4bit, "peft_config": adapter}


def draw_lengths(rng, num_pairs: int):
    """Tokens of prompts and of real completions."""
    prompts = rng.lognormal(math.log(130), 0.95, num_pairs).clip(1, 512)
    return prompts, rng.lognormal(math.log(260), 0.55, num_pairs).clip(1, 1024 - prompts)


def make_model_and_data():
    import numpy as np
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        MistralConfig,
        MistralForCausalLM,
        PhiConfig,
        PhiForCausalLM,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<eos>"] + [f"w{i}" for i in range(args.vocab_size - 2)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    common = {"max_position_embeddings": 2048, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if args.shape:
        config = MistralConfig(sliding_window=None, **SHAPES[args.shape], **common)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(args.device):
            model = MistralForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    else:
        config = PhiConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=4 * args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.hidden_size // 64,
            **common,
        )
        model = PhiForCausalLM(config)
        model.lm_head.bias.data[1] = end_bias
    model.save_pretrained(f"{args.work_dir}/model")
    # A matrix is used twice per position in the forward pass, and four times in the backward pass; the table of
    # embeddings is none
    num_parameters = sum(p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:
        num_parameters -= args.vocab_size * config.hidden_size
    Path(f"{args.work_dir}/model/num_parameters").write_text(str(num_parameters))
    del model
    if on_gpu:
        torch.cuda.empty_cache()
    tokenizer.save_pretrained(f"{args.work_dir}/model")

    rng = np.random.default_rng(0)
    prompts, completions = draw_lengths(rng, args.num_pairs)

    def text(length: float) -> str:
        return " ".join(words[i] for i in rng.integers(2, args.vocab_size, max(1, int(length * args.scale))))

    rows = [(text(p), " " + text(c)) for p, c in zip(prompts, completions, strict=True)]
    columns = {"prompt": [p for p, _ in rows], "completion": [a for _, a in rows]}
    Dataset.from_dict(columns).to_json(f"{args.work_dir}/data.jsonl")


class Watch:
    """Seconds and peak memory by phase, and tokens."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self.peaks = defaultdict(int)
        self.positions = defaultdict(int)  # that went through the model, by phase and whether there is a gradient
        self.unique = self.generated = 0
        self.phase = "other"
        self.in_model = False

    @contextmanager
    def time(self, phase: str):
        before = self.phase
        self.enter(phase)
        start = clock()
        try:
            yield
        finally:
            self.seconds[phase] += clock() - start
            self.enter(before)

    def enter(self, phase: str):
        if on_gpu:
            import torch

            self.peaks[self.phase] = max(self.peaks[self.phase], torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        self.phase = phase

    def wrap(self, cls, name: str, phase: str):
        function = getattr(cls, name)

        def timed(*args, **kwargs):
            with self.time(phase):
                return function(*args, **kwargs)

        setattr(cls, name, timed)


def time_model(watch: Watch):
    """Forward and backward passes, and steps of the optimizer."""
    import torch
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import PreTrainedModel

    def timed(function):
        def call(self, *args, **kwargs):
            if watch.in_model or (isinstance(self, torch.nn.Module) and not isinstance(self, PreTrainedModel)):
                return function(self, *args, **kwargs)
            watch.in_model = True
            start = clock()
            try:
                return function(self, *args, **kwargs)
            finally:
                watch.in_model = False
                watch.seconds["model"] += clock() - start

        return call

    torch.nn.Module.__call__ = timed(torch.nn.Module.__call__)
    torch.Tensor.backward = timed(torch.Tensor.backward)
    AcceleratedOptimizer.step = timed(AcceleratedOptimizer.step)


def count_positions(watch: Watch):
    import torch
    from transformers import MistralModel, PhiModel

    def counting(forward):
        def call(self, input_ids=None, **kwargs):
            key = "with gradient" if torch.is_grad_enabled() and self.training else "without"
            watch.positions[f"{watch.phase} {key}"] += input_ids.numel()
            return forward(self, input_ids=input_ids, **kwargs)

        return call

    for cls in (PhiModel, MistralModel):
        cls.forward = counting(cls.forward)


def scripted(watch: Watch):
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from trl_spin import SharedPrefixDPOTrainer

    trainer_class = SharedPrefixDPOTrainer if args.variant in "ef" else DPOTrainer
    watch.wrap(DPOTrainer, "_precompute_ref_logps", "scoring")
    watch.wrap(DPOTrainer, "train", "training")
    dataset = load_dataset("json", data_files=f"{args.work_dir}/data.jsonl", split="train")
    tokenizer = AutoTokenizer.from_pretrained(f"{args.work_dir}/model", padding_side="left")
    options = quantization()
    model = AutoModelForCausalLM.from_pretrained(
        f"{args.work_dir}/model", quantization_config=options.get("quantization_config")
    )
    model, completions = model if is_qlora else model.to(args.device), []
    with watch.time("generation"):
        for start in range(0, len(dataset), 8):
            batch = tokenizer(dataset["prompt"][start : start + 8], return_tensors="pt", padding=True).to(model.device)
            # The sampling of the paper's theory, as `top_k` is 50 by default
            output = model.generate(**batch, max_new_tokens=limit, do_sample=True, top_k=0, **sampling)
            output = output[:, batch["input_ids"].shape[1] :]
            completions += tokenizer.batch_decode(output, skip_special_tokens=True)
    del model
    if on_gpu:
        torch.cuda.empty_cache()
    pairs = dataset.rename_column("completion", "chosen").add_column("rejected", [" " + text for text in completions])
    trainer = trainer_class(
        f"{args.work_dir}/model",
        args=DPOConfig(
            f"{args.work_dir}/output",
            precompute_ref_log_probs=args.variant != "a",
            **({"train_sampling_strategy": "group_by_length"} if args.variant == "f" else {}),
            **training_options(),
        ),
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(f"{args.work_dir}/model"),
        **options,
    )
    trainer.train()
    trainer.save_model()
    for row in trainer.train_dataset:
        watch.unique += sum(len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))
        watch.generated += len(row["rejected_ids"])
    return True, None


def spin(watch: Watch):
    from datasets import load_dataset

    from trl_spin import SelfPlayCallback, SPINConfig, SPINTrainer, preflight
    from trl_spin.iterations import IterationCallback
    from trl_spin.preflight import PreflightCallback
    from trl_spin.run.games import load_game
    from trl_spin.showing import ProbeCallback

    watch.wrap(SPINTrainer, "train", "training")
    for cls, name, phase in (
        (PreflightCallback, "on_train_begin", "other"),
        (IterationCallback, "on_epoch_begin", "other"),
        (IterationCallback, "on_train_end", "other"),
        (ProbeCallback, "on_epoch_begin", "other"),
        (ProbeCallback, "on_train_end", "other"),
        (SelfPlayCallback, "on_epoch_begin", "boundary"),
        (SelfPlayCallback, "generate", "generation"),
        (SelfPlayCallback, "score", "scoring"),
    ):
        watch.wrap(cls, name, phase)
    plans, plan_memory = [], preflight.plan_memory
    preflight.plan_memory = lambda *args: plans.append(plan_memory(*args)) or plans[0]
    trainer = SPINTrainer(
        f"{args.work_dir}/model",
        args=SPINConfig(
            f"{args.work_dir}/output",
            num_self_play_iterations=args.num_iterations,
            opponent_history=args.opponent_history,
            max_completion_length=limit,
            learning_rate=1e-6,
            generation_kwargs=sampling or None,
            **({"gradient_checkpointing": True} if args.variant == "d" else {}),
            **training_options(),
            write_report=False,  # the others write none
        ),
        train_dataset=load_dataset("json", data_files=f"{args.work_dir}/data.jsonl", split="train"),
        **quantization(),
    )
    trainer.train()
    watch.seconds["training"] -= watch.seconds["other"] + watch.seconds["boundary"]
    for iteration in range(args.num_iterations):
        for pair in load_game(f"{args.work_dir}/output", iteration)["train"].select(range(len(trainer.game.train))):
            watch.unique += sum(len(pair[f"{part}_ids"]) for part in ("prompt", "real", "generated"))
            watch.generated += len(pair["generated_ids"])
    return trainer.model.is_gradient_checkpointing, plans[0].estimate["peak"]


def measure():
    import datasets
    import torch
    import transformers
    from trl import DPOTrainer  # noqa: F401

    import trl_spin
    from trl_spin import SPINTrainer  # noqa: F401

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watch = Watch()
    count_positions(watch)
    if not on_gpu:
        time_model(watch)
    start = clock()
    checkpointing, planned = scripted(watch) if args.variant in "abefh" else spin(watch)
    seconds = {phase: watch.seconds[phase] for phase in ("generation", "scoring", "training", "model")}
    seconds["iteration"] = clock() - start
    num_parameters = int(Path(f"{args.work_dir}/model/num_parameters").read_text())
    positions = watch.positions
    trained = positions["training with gradient"]
    flops = 2 * num_parameters * (sum(positions.values()) + trained * (2 + checkpointing))
    result = {
        "seconds": seconds,
        "tokens": {
            "generation": watch.generated,
            "scoring": watch.unique,
            "training": PASSES * watch.unique,
            "iteration": watch.unique,
        },
        "computed/unique": trained / PASSES / watch.unique,
        "flops/bound": flops / (2 * num_parameters * watch.unique * (1 + 3 * PASSES)),
        "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - imports) / 1024,
        "memory with libraries": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "planned peak": planned,
        "peaks": watch.peaks,
        "checkpointing": checkpointing,
        "num_parameters": num_parameters,
        "num_threads": torch.get_num_threads(),
        "package": trl_spin.__file__,
    }
    Path(f"{args.work_dir}/result.json").write_text(json.dumps(result))


def run(variant: str, work_dir: str) -> dict:
    given = {name: value for name, value in vars(args).items() if value is not None}
    options = [f"--{name}={value}" for name, value in given.items() if name not in ("variant", "work_dir")]
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as output:
        os.symlink(f"{work_dir}/model", f"{output}/model")
        os.symlink(f"{work_dir}/data.jsonl", f"{output}/data.jsonl")
        process = subprocess.run(
            [sys.executable, __file__, *options, f"--variant={variant}", f"--work_dir={output}"],
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("VERBOSE") else subprocess.PIPE,
            text=True,
            timeout=args.timeout,
            env=os.environ | {"HF_DATASETS_CACHE": cache},  # nothing is left over from the last repetition
        )
        if process.returncode:
            raise RuntimeError((process.stderr or "").strip().splitlines()[-1:] or process.returncode)
        return json.loads(Path(f"{output}/result.json").read_text())


def main():
    with tempfile.TemporaryDirectory() as work_dir:
        args.work_dir = work_dir
        make_model_and_data()
        results, faults = defaultdict(list), {}
        for _ in range(args.repetitions):
            for variant in [variant for variant in args.variants if variant not in faults]:
                try:
                    result = run(variant, work_dir)
                    results[variant].append(result)
                    print(variant, json.dumps(result), file=sys.stderr, flush=True)
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    faults[variant] = f"{type(error).__name__}: {error}"
                    print(variant, "failed:", faults[variant], file=sys.stderr, flush=True)
                if args.json:  # whatever happens to the next one
                    Path(args.json).write_text(json.dumps({"results": results, "faults": faults}))
    if not results:
        sys.exit("No variant came to its end.")
    phases = ("generation", "scoring", "training", "iteration")
    best = {
        variant: {phase: min(runs, key=lambda r, p=phase: r["seconds"][p] / r["tokens"][p]) for phase in phases}
        for variant, runs in results.items()
    }
    first = next(iter(results.values()))[0]
    print(
        f"{args.num_pairs} pairs, {args.num_iterations} iterations of {PASSES} passes, history {args.opponent_history}, lengths {args.scale} of UltraChat's, batches of {args.batch_size}, "
        f"{first['num_parameters'] / 1e6:.1f}M parameters without embeddings, {first['num_threads']} threads; best of "
        f"{args.repetitions}. Seconds ({args.clock}), and tokens per second: generated ones, unique ones, unique ones times passes, "
        "unique ones. In brackets, speed in units of the first row.\n"
    )
    columns = [*phases, "outside the model", "computed/unique", "FLOPs/bound", "peak memory (without libraries)"]
    print("| |", " | ".join(columns), "|")
    print("|---|" + "---|" * len(columns))
    for variant, by_phase in best.items():
        cells = []
        for phase, result in by_phase.items():
            seconds, tokens = result["seconds"][phase], result["tokens"][phase]
            if not seconds:
                cells.append("in training")
                continue
            cell = f"{seconds:.1f} s, {tokens / seconds:,.0f}"
            reference = next(iter(best.values()))[phase]
            if reference["seconds"][phase]:
                ratio = tokens / seconds / (reference["tokens"][phase] / reference["seconds"][phase])
                cell += f" ({ratio:.2f}x)"
            cells.append(cell)
        last = by_phase["iteration"]
        memory = min(r["memory with libraries"] for r in results[variant])
        outside = last["seconds"]["iteration"] - last["seconds"]["model"]
        cells.append(f"{outside:.1f} s ({outside / last['seconds']['iteration']:.0%})")
        cells += [f"{last['computed/unique']:.2f}", f"{last['flops/bound']:.2f}"]
        cells.append(f"{memory:,.0f} MB ({min(r['memory'] for r in results[variant]):,.0f})")
        print(f"| ({variant}) {VARIANTS[variant]} |", " | ".join(cells), "|")


if __name__ == "__main__":
    if args.variant:
        measure()
    else:
        main()
