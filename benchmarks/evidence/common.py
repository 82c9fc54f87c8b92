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

"""What the experiments share: arms of training that count their FLOPs, and what is measured of a model."""

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from trl_spin import SPINConfig, SPINTrainer


RESULTS = Path(__file__).parent / "results"
_COMMON = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "report_to": "none"}
_COMMON |= {"logging_strategy": "no", "save_strategy": "no", "lr_scheduler_type": "constant_with_warmup"}


def quiet():
    """No progress bars: an experiment has hundreds of short runs."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@dataclass
class Player:
    """A model that is trained in one way after another, its tokenizer, and the FLOPs that this took."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    max_completion_length: int
    flops: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)  # of self-play, one dict for each iteration

    def copy(self) -> "Player":
        return Player(copy.deepcopy(self.model), self.tokenizer, self.max_completion_length)

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def training_flops(self) -> int:
        """Of training on a token, for each parameter: adapters need no gradients of the other weights."""
        return 6 if all(parameter.requires_grad for parameter in self.model.parameters()) else 4

    def _lengths(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(texts)["input_ids"]]

    def sft_flops(self, rows: Dataset) -> float:
        """Of a pass of SFT over rows: 6N for each token of prompt and completion, its end token included."""
        tokens = sum(self._lengths(rows["prompt"][:])) + sum(self._lengths(rows["completion"][:])) + len(rows)
        return self.training_flops * self.size * tokens

    def game_flops(self, num_pairs: int, prompt: float, completion: float, passes: int = 1) -> float:
        """
        Of plain self-play over pairs with a prompt and two completions of these lengths: 2(P + G) for generation,
        2(P + R + G) for scoring and 6(P + R + G) for each pass of training, where a row of SFT counts 6(P + R).
        """
        generation, pair = 2 * (prompt + completion), prompt + 2 * completion
        return self.size * num_pairs * (generation + (2 + passes * self.training_flops) * pair)

    def sft(
        self,
        rows: Dataset,
        learning_rate: float,
        seed: int,
        flops: float | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **options: Any,
    ):
        """
        TRL's SFTTrainer on rows, from the first one on, for one pass, or for as many steps as these FLOPs allow.
        """
        batch_size = options.setdefault("per_device_train_batch_size", 64)
        passes = 1.0 if flops is None else flops / self.sft_flops(rows)
        steps = max(1, round(passes * len(rows) / batch_size))
        trainer = SFTTrainer(
            self.model,
            args=SFTConfig(
                tempfile.mkdtemp(), max_steps=steps, learning_rate=learning_rate, seed=seed, **(_COMMON | options)
            ),
            train_dataset=rows,
            processing_class=self.tokenizer,
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        self.flops += self.sft_flops(rows) * steps * batch_size / len(rows)

    def play(
        self,
        rows: Dataset,
        held_out: Dataset | None,
        seed: int,
        pair_filter: Callable | None = None,
        after: Callable[["Player"], None] | None = None,
        **options: Any,
    ):
        """
        SPINTrainer on rows. Generation counts 2N for each token, scoring 2N and training 6N for each token of a pair.
        In the end, `after` gets the player as of each iteration.
        """
        defaults = {"per_device_train_batch_size": 64, "num_train_epochs": 1, "num_probes": 0, "write_report": False}
        defaults |= {
            "precompute_ref_batch_size": 256,
            "per_device_eval_batch_size": 256,
            "train_sampling_strategy": "random",
        }
        defaults |= {"max_completion_length": self.max_completion_length, "reset_optimizer_state": False, "beta": 1.0}
        with tempfile.TemporaryDirectory() as directory:
            args = SPINConfig(directory, seed=seed, **(_COMMON | defaults | options))
            trainer = SPINTrainer(
                self.model, None, args, None, rows, held_out, self.tokenizer, pair_filter=pair_filter
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            for t in range(args.num_self_play_iterations):
                path = Path(directory, f"iteration-{t}", "self_play.json")
                if path.is_file():
                    self.history.append(json.loads(path.read_text()))
                    self.flops += self._game_flops(trainer, self.history[-1], args)
                    if after is not None:
                        model = LlamaForCausalLM.from_pretrained(path.parent)
                        after(Player(model, self.tokenizer, self.max_completion_length))

    def _game_flops(self, trainer: SPINTrainer, record: dict[str, float], args: SPINConfig) -> float:
        rows = trainer.game.train
        prompt = float(rows.columns.lengths("prompt_ids").mean())
        real, generated = (record[f"self_play/mean_length_{side}"] for side in ("real", "generated"))
        played = record["self_play/played"]  # what is not played is scored, but not trained on
        pair = prompt + real + generated
        passes = args.per_iteration("num_train_epochs")[int(record["iteration"])]
        return (
            self.size
            * len(rows)
            * (2 * (prompt + generated) + 2 * pair + self.training_flops * passes * played * pair)
        )

    @torch.no_grad()
    def complete(
        self, prompts: list[str], temperature: float, seed: int, batch_size: int = 512, **options: Any
    ) -> list[list[int]]:
        """Token ids of completions, up to their end token and including it."""
        tokenizer, completions = self.tokenizer, []
        tokenizer.padding_side = "left"
        torch.manual_seed(seed)
        self.model.eval()
        sampling = {"do_sample": temperature > 0, "top_k": 0} | (
            {"temperature": temperature} if temperature > 0 else {}
        )
        for start in range(0, len(prompts), batch_size):
            batch = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True)
            batch.pop("token_type_ids", None)
            ids = self.model.generate(**batch, **sampling, max_new_tokens=self.max_completion_length, **options)
            for row in ids[:, batch["input_ids"].size(1) :].tolist():
                end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
                completions.append(row[:end])
        return completions

    def texts(self, completions: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(completions, skip_special_tokens=True)

    def right(
        self,
        rows: Dataset,
        is_right: Callable[[str, str], bool],
        temperatures: tuple[float, ...],
        seed: int,
        **options,
    ) -> dict[str, float]:
        """Share of right completions at each temperature."""
        prompts, result = rows["prompt"][:], {}
        for temperature in temperatures:
            texts = self.texts(self.complete(prompts, temperature, seed, **options))
            result[f"right at {temperature:g}"] = sum(map(is_right, prompts, texts)) / len(prompts)
        return result

    @torch.no_grad()
    def nll(self, rows: Dataset, batch_size: int = 256) -> float:
        """Negative log-likelihood of the real completions per token, in nats."""
        self.model.eval()
        total, count, tokenizer = 0.0, 0, self.tokenizer
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            prompts = tokenizer(part["prompt"])["input_ids"]
            ids = [
                p + c + [tokenizer.eos_token_id]
                for p, c in zip(prompts, tokenizer(part["completion"])["input_ids"], strict=True)
            ]
            width = max(map(len, ids))
            tokens = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
            labels = torch.tensor(
                [
                    [-100] * len(p) + row[len(p) :] + [-100] * (width - len(row))
                    for p, row in zip(prompts, ids, strict=True)
                ]
            )
            logits = self.model(
                tokens, attention_mask=torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in ids])
            ).logits
            total += torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            ).item()
            count += (labels != -100).sum().item()
        return total / count


def make_llama(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, max_length: int, seed: int
) -> LlamaForCausalLM:
    """A random Llama."""
    set_seed(seed)
    shape = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "num_hidden_layers": num_layers}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer), **shape, **special, num_attention_heads=4, max_position_embeddings=max_length
    )
    return LlamaForCausalLM(config)


def read(name: str) -> list[dict[str, Any]]:
    """Results so far, a line for each run."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run_all(name: str, plan: list[dict[str, Any]], run: Callable[..., dict[str, float]]):
    """Runs what is missing of a plan. Several processes may share it, each with a part."""
    RESULTS.mkdir(exist_ok=True)
    for what in plan:
        if not any(what.items() <= known.items() for known in read(name)):
            result = what | run(**what)
            with open(RESULTS / f"{name}.jsonl", "a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)
