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
Ten minutes on one GPU: what self-play costs there, with random models of 1B and 7B, and which kernel is the fastest
for rows with a shared prompt.

1. Rows: forward and backward pass of the same pairs as padded rows, as rows with a shared prompt (SDPA with a dense
   mask, FlexAttention) and as one packed row with the tree attention of TRL's AsyncGRPO. Each kind's log-probs are
   compared with those of padded rows in float32.
2. Runs, by `speed.py`: tokens per second of generation, scoring and training, and peak memory against the plan's
   estimate, for full fine-tuning in mixed precision and for QLoRA, trl-spin against DPOTrainer.

What does not run is listed with the reason. Results go to `OUTPUT/gpu.json` and, as tables, to `OUTPUT/gpu.md`.

    python benchmarks/gpu.py [--output_dir OUTPUT]
    python benchmarks/gpu.py --tiny  # on a CPU, with tiny shapes: that it runs, not how fast
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from speed import PASSES, SHAPES, VARIANTS, draw_lengths
from torch.nn.functional import logsigmoid, scaled_dot_product_attention
from transformers import MistralConfig, MistralForCausalLM


# Dense bfloat16, by the data sheets
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
# Shape, layers and pairs; and shape, variants of `speed.py`, pairs, and options
ROWS = [("7b", 8, 8), ("1b", 16, 8)]
RUNS = [
    # Full fine-tuning of 7B in float32 fits 80 GB with an optimizer in 8 bits
    ("7b", "cgbh", 64, ["--optim=rmsprop_bnb_8bit"]),
    ("1b", "cagh", 64, []),
]
TINY_ROWS, TINY_RUNS = [("tiny", 2, 4)], [("tiny", "bg", 8, ["--scale=0.1", "--batch_size=4"])]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output_dir", default="gpu", help="Folder for results.")
parser.add_argument("--minutes", type=float, default=10, help="What has not begun by then is left out.")
parser.add_argument("--tiny", action="store_true", help="Tiny shapes on a CPU.")
parser.add_argument("--rows", nargs=3, help=argparse.SUPPRESS)  # in a process of its own
args = parser.parse_args()
device = torch.device("cpu" if args.tiny else "cuda")
if not args.tiny and not torch.cuda.is_available():
    sys.exit("There is no GPU here. `--tiny` shows on a CPU that the script runs.")


# ---- Rows ----


def make_batch(num_pairs: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """DPOTrainer's batch, padded: prompts with one completion, then the same prompts with another one."""
    rng = np.random.default_rng(0)
    prompts, real = draw_lengths(rng, num_pairs)
    _, generated = draw_lengths(rng, num_pairs)
    scale = 0.1 if args.tiny else 1
    prompts, completions = (1 + (scale * np.concatenate(c)).astype(int) for c in ([prompts] * 2, [real, generated]))
    lengths = list(zip(prompts.tolist(), completions.tolist(), strict=True))
    tokens = torch.from_numpy(rng.integers(2, vocab_size, (2 * num_pairs, max(map(sum, lengths)))))
    labels, mask = tokens.clone(), torch.ones_like(tokens)
    for i, (prompt, completion) in enumerate(lengths):
        tokens[i, :prompt] = tokens[i % num_pairs, :prompt]
        labels[i, :prompt] = labels[i, prompt + completion :] = -100
        mask[i, prompt + completion :] = 0
    return {"input_ids": tokens.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def padded(model, batch):
    return model(**batch, use_cache=False, fused_lm_head=True).log_probs


def shared(model, batch, multiple=None):
    from trl_spin.layout import forward_shared

    return forward_shared(model, model, batch | {"use_cache": False, "fused_lm_head": True}, multiple).log_probs


def shared_flex(model, batch):
    from torch.nn.attention.flex_attention import create_block_mask

    from trl_spin import layout
    from trl_spin.compat import replaced

    def block_mask(model, branch, position_ids):
        def sees(b, h, query, key):
            return (query >= key) & ~((branch[b, query] == 2) & (branch[b, key] == 1))

        return create_block_mask(sees, len(branch), None, *2 * [branch.size(1)], device=device)

    with replaced(layout, "_attention_masks", block_mask):
        return shared(model, batch, multiple=128)


class Varlen:
    """The interface of FlashAttention by what PyTorch has."""

    @staticmethod
    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal, window_size):
        if device.type == "cuda":
            from torch.nn.attention.varlen import varlen_attn

            same_heads = [x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v)]
            return varlen_attn(q, *same_heads, cu_q, cu_k, max_q, max_k, scale=softmax_scale, window_size=(-1, 0))
        parts = []
        for i, j, m, n in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
            q_i, k_i, v_i = (x.transpose(0, 1) for x in (q[i:j], k[m:n], v[m:n]))
            sees = torch.ones(j - i, n - m, dtype=torch.bool).tril(n - m - (j - i))  # up to the end of the path
            out = scaled_dot_product_attention(q_i, k_i, v_i, sees, scale=softmax_scale, enable_gqa=True)
            parts.append(out.transpose(0, 1))
        return torch.cat(parts)


def pack(batch) -> dict[str, torch.Tensor]:
    """All pairs in one row, in which every prompt is once."""
    from trl.experimental.async_grpo.packing import TreeRow

    row, label_mask, num_tokens = TreeRow(), batch["labels"] != -100, batch["attention_mask"].sum(dim=1).tolist()
    for i, length in enumerate(num_tokens):
        sample = {"input_ids": batch["input_ids"][i, :length], "completion_mask": label_mask[i, :length].long()}
        sample |= {"old_log_probs": torch.zeros(length), "advantage": 0.0, "group_id": i % (len(num_tokens) // 2)}
        row.add(sample)
    return {name: value.to(device) for name, value in row.pack().items()}


def tree(model, batch, packed={}):  # noqa: B006 - in a run, a collator would do it, beside the GPU
    packed = packed or packed.update(pack(batch)) or packed
    inputs = {name: packed[name][None] for name in ("input_ids", "position_ids", "shift_labels")}
    inputs |= {name: packed[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    inputs["tree_max_seqlen_q"], inputs["tree_max_seqlen_k"] = packed["tree_max_seqlens"].tolist()
    log_probs = model(**inputs, use_cache=False, fused_lm_head=True).log_probs.flatten()[packed["token_index"]]
    labelled = batch["labels"][:, 1:] != -100
    return torch.zeros(labelled.shape, device=device).masked_scatter(labelled, log_probs.float())


def tree_by_torch(model, batch):
    from trl.experimental.async_grpo import packing

    from trl_spin.compat import replaced

    with replaced(packing, "_flash_attn", Varlen):
        return tree(model, batch)


LAYOUTS = {
    "padded, SDPA": ("sdpa", padded),
    "padded, FlashAttention 2": ("flash_attention_2", padded),
    "shared prompt, SDPA with a dense mask": ("sdpa", shared),
    "shared prompt, FlexAttention": ("flex_attention", shared_flex),
    "tree attention of TRL, its kernel (FlashAttention 3)": ("tree_fa3", tree),
    "tree attention of TRL, " + ("a loop" if args.tiny else "PyTorch's varlen_attn"): ("tree_fa3", tree_by_torch),
}
ON_GPU_ONLY = {
    "padded, FlashAttention 2": "FlashAttention has no kernel for CPUs",
    "tree attention of TRL, its kernel (FlashAttention 3)": "FlashAttention has no kernel for CPUs",
}


def synchronized() -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def compare_rows(shape: str, num_layers: int, num_pairs: int) -> dict:
    from trl.experimental.async_grpo.packing import register_tree_attention
    from trl.trainer.utils import add_fused_lm_head

    register_tree_attention()
    torch.manual_seed(0)
    config = MistralConfig(sliding_window=None, **SHAPES[shape] | {"num_hidden_layers": num_layers})
    with device:
        model = MistralForCausalLM(config)
    dtype = torch.float32 if args.tiny else torch.bfloat16
    model.to(dtype).float().train()  # the same numbers in both
    add_fused_lm_head(model)
    batch = make_batch(num_pairs, config.vocab_size)
    labelled = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        exact = padded(model, batch)[labelled].float()
    model.to(dtype)
    sides = batch["attention_mask"].sum(dim=1).chunk(2)
    unique = int(sum(sides).sum() - (batch["attention_mask"] & (batch["labels"] == -100)).chunk(2)[0].sum())

    def step(forward) -> torch.Tensor:
        real, generated = forward(model, batch).float().sum(dim=1).chunk(2)
        (-logsigmoid(0.01 * (real - generated))).mean().backward()
        model.zero_grad()

    results = {"unique tokens": unique, "parameters": sum(p.numel() for p in model.parameters()), "layouts": {}}
    for name, (attention, forward) in LAYOUTS.items():
        result = results["layouts"][name] = {}
        try:
            if device.type == "cpu" and name in ON_GPU_ONLY:
                raise NotImplementedError(ON_GPU_ONLY[name])
            model.set_attn_implementation(attention)
            with torch.no_grad():
                error = (forward(model, batch)[labelled].float() - exact).abs()
            result |= {"mean error": error.mean().item(), "largest error": error.max().item()}
            of_padded = results["layouts"]["padded, SDPA"]["mean error"]
            result["exact"] = result["mean error"] <= 2 * of_padded + 1e-5
            for _ in range(1 if args.tiny else 3):  # compiles
                step(forward)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start, repetitions = synchronized(), 1 if args.tiny else 5
            for _ in range(repetitions):
                step(forward)
            result["seconds"] = (synchronized() - start) / repetitions
            if device.type == "cuda":
                result["peak"] = torch.cuda.max_memory_allocated()
        except Exception as error:  # whatever it is, the others go on
            message = str(error).strip().splitlines() or [""]
            result["not run"] = f"{type(error).__name__}: {message[0]}"
            model.zero_grad()
    return results


# ---- All of it ----


def describe_device() -> dict:
    facts = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cpu":
        return facts | {"device": "a CPU: this was not run on a GPU, and its times mean nothing", "peak": None}
    name = torch.cuda.get_device_name()
    facts |= {"device": name, "memory": torch.cuda.mem_get_info()[1]}
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(2):
        start = synchronized()
        for _ in range(20):
            matrix @ matrix
        facts["matmul"] = 20 * 2 * 8192**3 / (synchronized() - start)
    del matrix
    torch.cuda.empty_cache()
    return facts | {"peak": next((peak for part, peak in PEAKS.items() if part in name), facts["matmul"])}


def run(command: list[str], deadline: float) -> str | None:
    """Runs a script beside this one, and returns why it failed, if it did."""
    if (seconds := deadline - time.monotonic() + 30) < 60:  # its own parts end a little before
        return "out of time"
    command = [sys.executable, str(Path(__file__).parent / command[0]), *command[1:]]
    try:
        process = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return "out of time"
    return (process.stderr.strip().splitlines() or ["failed"])[-1] if process.returncode else None


def rows_table(results: dict, peak: float | None) -> list[str]:
    lines = ["| layout | s per step | unique tokens/s | peak | error per token, mean and largest | exact |"]
    lines.append("|---" * 6 + "|")
    for name, result in results["layouts"].items():
        error = f"{result['mean error']:.1e}, {result['largest error']:.1e}" if "exact" in result else ""
        exact = {True: "yes", False: "**no**", None: ""}[result.get("exact")]
        if "not run" in result:
            lines.append(f"| {name} | not run: {result['not run']} | | | {error} | {exact} |")
            continue
        memory = f"{result['peak'] / 1e9:.1f} GB" if "peak" in result else "not measured"
        speed = f"{result['seconds']:.3f} | {results['unique tokens'] / result['seconds']:,.0f}"
        lines.append(f"| {name} | {speed} | {memory} | {error} | {exact} |")
    timed = {n: r["seconds"] for n, r in results["layouts"].items() if r.get("exact") and "seconds" in r}
    return [*lines, "", f"Fastest that is exact: {min(timed, key=timed.get)}." if timed else "None is exact."]


def runs_table(runs: dict, peak: float | None) -> list[str]:
    lines = ["| | generation, tokens/s | scoring | training | training, of the peak | memory: peak, planned |"]
    lines = [lines[0] + " an iteration of 50k pairs |", "|---" * 7 + "|"]
    for key, (variant, num_pairs, result) in runs.items():
        if isinstance(result, str):
            lines.append(f"| {key} | not run: {result} | | | | | |")
            continue
        seconds, tokens = result["seconds"], result["tokens"]
        phases = ("generation", "scoring", "training")
        speeds = [f"{tokens[p] / seconds[p]:,.0f}" if seconds[p] else "in training" for p in phases]
        # What the model has to compute: unique tokens once in each pass, and no gradient of a frozen weight
        flops = (4 if variant in "gh" else 6) * result["num_parameters"] * tokens["training"]
        share = f"{flops / seconds['training'] / peak:.0%}" if peak else "no GPU"
        memory = f"{result['peaks']['training'] / 1e9:.1f} GB" if result["peaks"] else "no GPU"
        planned = f"{result['planned peak'] / 1e9:.1f} GB" if result["planned peak"] else "-"
        hours = sum(seconds[p] for p in phases) / num_pairs * 50_000 / 3600
        lines.append(f"| {key} | {' | '.join(speeds)} | {share} | {memory}, {planned} | {hours:.1f} h |")
    return lines


def main():
    deadline, output = time.monotonic() + 60 * args.minutes, Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    facts, rows, runs = describe_device(), {}, {}
    tables = [f"Device: {facts['device']}. " + ", ".join(f"{k} {facts[k]}" for k in ("torch", "python")) + "."]
    if facts["peak"]:
        tables[0] += (
            f" Peak {facts['peak'] / 1e12:.0f} TFLOP/s, a matrix product reaches {facts['matmul'] / 1e12:.0f}."
        )
    for shape, num_layers, num_pairs in TINY_ROWS if args.tiny else ROWS:
        path = output / f"rows-{shape}.json"
        path.unlink(missing_ok=True)
        command = ["gpu.py", "--rows", shape, str(num_layers), str(num_pairs), f"--output_dir={path}"]
        fault = run(command + ["--tiny"] * args.tiny, deadline)
        rows[shape] = json.loads(path.read_text()) if path.exists() else {"not run": fault}
        tables += ["", f"Rows, {shape}, {num_layers} layers, {num_pairs} pairs, forward and backward pass:", ""]
        tables += [f"Not run: {fault}"] if fault else rows_table(rows[shape], facts["peak"])
    for shape, variants, num_pairs, options in TINY_RUNS if args.tiny else RUNS:
        path = output / f"run-{shape}-{variants}.json"
        path.unlink(missing_ok=True)
        given = [f"--shape={shape}", f"--variants={variants}", f"--num_pairs={num_pairs}", f"--json={path}"]
        seconds = max(30, deadline - time.monotonic()) / len(variants)
        given += [f"--device={device.type}", "--repetitions=1", "--scale=1", f"--timeout={seconds}", *options]
        fault = run(["speed.py", *given], deadline)
        found = json.loads(path.read_text()) if path.exists() else {"results": {}, "faults": {}}
        for variant in variants:
            result = found["results"].get(variant, [found["faults"].get(variant, fault)])[0]
            runs[f"{shape}, ({variant}) {VARIANTS[variant]}"] = variant, num_pairs, result
    tables += ["", f"Runs, {PASSES} passes, lengths like UltraChat's:", "", *runs_table(runs, facts["peak"])]
    (output / "gpu.json").write_text(json.dumps({"facts": facts, "rows": rows, "runs": runs}, indent=1))
    (output / "gpu.md").write_text("\n".join(tables) + "\n")
    print("\n".join(tables))
    failed = [name for name, (*_, result) in runs.items() if isinstance(result, str)]
    sys.exit(f"Not run: {failed}" if args.tiny and failed else 0)


if __name__ == "__main__":
    if args.rows:
        shape, *sizes = args.rows
        Path(args.output_dir).write_text(json.dumps(compare_rows(shape, *map(int, sizes))))
    else:
        main()
