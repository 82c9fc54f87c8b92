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
vLLM by contract. vLLM itself is not run: TRL's own code runs, and in the place of vLLM's classes, and of TRL's client of a
server, stand ones that check what they are given, hold a copy of the model, and complete with it. They are our picture of
vLLM, and of the places where TRL reaches into it: they show what we hand over, not what vLLM makes of it.
"""

import copy
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import trl.generation.vllm_generation
from accelerate import Accelerator
from conftest import (
    callback_of,
    first_losses,
    load_in_4bit,
    make_args,
    make_dataset,
    make_model,
    make_tokenizer,
    make_trainer,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl.generation.vllm_client import VLLMClient

from trl_spin import SelfPlayCallback
from trl_spin.engines.vllm import VLLM, unchanged_base_weights
from trl_spin.pairs import Rules
from trl_spin.run.games import load_game, read_manifest
from trl_spin.run.processes import Processes, StopSignal


LORA = {"target_modules": "all-linear", "lora_dropout": 0.1}


class Copy:
    """A copy of the trained model, as vLLM has one: loaded from its files, and filled with the weights it is sent."""

    def __init__(self, path):
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.received = []

    def load_weights(self, weights):
        for name, weight in weights:
            self.model.get_parameter(name).data.copy_(weight)
            self.received.append(name)

    def check(self, trainer):
        """All weights have come, each once, and they are those of the model, with the adapter merged."""
        names = [name for name, _ in self.model.named_parameters()]
        assert sorted(self.received) == sorted(names)
        self.received.clear()
        trained = copy.deepcopy(trainer.model)
        if hasattr(trained, "merge_and_unload"):
            trained = trained.merge_and_unload()
        assert all(torch.equal(weight, self.model.get_parameter(name)) for name, weight in trained.named_parameters())

    @torch.no_grad()
    def complete(self, prompt, temperature, max_tokens, stop_token_ids):
        ids = []
        while len(ids) < max_tokens and not (ids and ids[-1] in stop_token_ids):
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1]
            if temperature == 0:
                ids.append(logits.argmax().item())
            else:
                ids.append(torch.multinomial((logits / temperature).softmax(dim=-1), 1).item())
        return ids


def check_sampling(args, end_token_ids, given):
    assert given.pop("max_tokens") <= args.max_completion_length
    assert given.pop("stop_token_ids") == end_token_ids
    assert given == {
        "n": 1,
        "temperature": args.temperature,
        "top_p": 0.9,
        "top_k": args.top_k,
        "min_p": args.min_p or 0.0,
        "repetition_penalty": args.repetition_penalty,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "logprobs": None,
    }


def sampling_params(**kwargs):
    if unknown := kwargs.keys() & {"suppress_tokens"}:  # which are transformers'
        raise TypeError(f"Unexpected keyword argument {unknown}")
    return kwargs


@pytest.fixture(autouse=True)
def vllm_installed(monkeypatch):
    monkeypatch.setattr("trl_spin.engines.vllm.is_vllm_available", lambda: True)
    monkeypatch.setattr("trl.generation.vllm_generation.is_vllm_available", lambda: True)
    monkeypatch.setattr(trl.generation.vllm_generation, "SamplingParams", sampling_params, raising=False)
    with mock.patch.dict(os.environ):  # TRL sets variables that would make the next Accelerator a distributed one
        yield


@pytest.fixture
def llm(monkeypatch):
    """The class in the place of vLLM's `LLM`. It knows the trainer, once there is one."""

    class LLM:
        trainer = None
        made = []

        def __init__(self, model, max_model_len, gpu_memory_utilization, enable_sleep_mode, **kwargs):
            assert max_model_len == self.trainer.game.rules.max_length and gpu_memory_utilization == 0.3
            assert kwargs["model_impl"] == "vllm" and kwargs["tensor_parallel_size"] == 1
            torch.manual_seed(kwargs["seed"])  # as vLLM does
            self.copy, self.asleep, self.num_syncs = Copy(model), False, 0
            worker = SimpleNamespace(model_runner=SimpleNamespace(model=self.copy))
            self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
            self.made.append(self)

        def generate(self, prompts, sampling_params, use_tqdm):
            assert not self.asleep
            sampling = copy.copy(sampling_params)
            check_sampling(self.trainer.args, self.trainer.game.rules.end_token_ids, sampling)
            if self.copy.received:
                self.num_syncs += 1
                self.copy.check(self.trainer)
            limits = {name: sampling_params[name] for name in ("temperature", "max_tokens", "stop_token_ids")}
            ids = [prompt["prompt_token_ids"] for prompt in prompts]
            return [
                SimpleNamespace(
                    prompt_token_ids=prompt,
                    outputs=[SimpleNamespace(token_ids=tuple(self.copy.complete(prompt, **limits)), logprobs=None)],
                )
                for prompt in ids
            ]

        def sleep(self, level):
            assert level == 2
            self.asleep = {"weights", "kv_cache"}
            for weight in self.copy.model.parameters():
                weight.data.fill_(float("nan"))

        def wake_up(self, tags):
            self.asleep -= set(tags)

        def reset_prefix_cache(self):
            pass

    module = trl.generation.vllm_generation
    monkeypatch.setattr(module, "LLM", LLM, raising=False)
    return LLM


def saved_model(path, **config):
    model = make_model(make_tokenizer(), hidden_size=64, **config)
    model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path)


def vllm_trainer(tmp_path, model=None, **kwargs):
    options = {
        "use_vllm": True,
        "top_p": 0.9,
        "generation_kwargs": {"frequency_penalty": 0.0},
        "learning_rate": 1e-2,
    }
    model = model or saved_model(tmp_path / "sft")
    return make_trainer(tmp_path / "run", model=model, **(options | kwargs))


@pytest.mark.parametrize(("adapter", "sleep"), [(False, False), (True, True)], ids=["full", "lora-sleep"])
def test_a_run_with_vllm(tmp_path, llm, adapter, sleep, monkeypatch):
    monkeypatch.setattr("trl_spin.engines.base.LARGE_BATCH", 5)
    options = {"peft_config": LoraConfig(**LORA)} if adapter else {}
    # Full training starts elsewhere than the files say
    model = saved_model(tmp_path / "sft")
    if not adapter:
        model.lm_head.weight.data += 0.01
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer = vllm_trainer(
        tmp_path, model, eval_dataset=make_dataset(4), vllm_enable_sleep_mode=sleep, max_length=40, **options
    )
    llm.trainer = trainer
    assert not llm.made  # until it is needed
    callback = callback_of(trainer, SelfPlayCallback)
    generate, rng = callback.generate, []

    def watched(*args):
        rng.append(torch.get_rng_state())
        pairs = generate(*args)
        rng.append(torch.get_rng_state())
        return pairs

    callback.generate = watched
    trainer.train()
    assert torch.equal(rng[0], rng[1]) and torch.equal(rng[2], rng[3])
    assert len(llm.made) == 1
    # Twice for the trial run, and for both datasets in each iteration: asleep, for each of their batches
    assert llm.made[0].num_syncs == (3 + 2 * (2 + 1) if sleep else 2 + 2 * 2)
    assert first_losses(trainer) == pytest.approx([0.6931, 0.6931], abs=1e-3)
    truncated = 0
    for iteration in range(2):
        assert read_manifest(trainer.args.output_dir, iteration)["engine"] == "vllm"
        for pair in load_game(trainer.args.output_dir, iteration)["train"]:
            ids = pair["generated_ids"]
            assert len(ids) <= min(12, 40 - len(pair["prompt_ids"]))
            assert pair["truncated"] == (ids[-1] not in trainer.game.rules.end_token_ids)
            truncated += pair["truncated"]
    assert truncated > 0
    if adapter:
        base = {
            name.replace(".base_layer", ""): weight
            for name, weight in trainer.model.get_base_model().named_parameters()
            if "lora_" not in name
        }
        assert base.keys() == before.keys()
        assert all(torch.equal(before[name], base[name]) for name in before)


def test_other_seeds_give_other_completions(tmp_path, llm):
    llm.trainer = trainer = vllm_trainer(tmp_path, learning_rate=1e-30)
    trainer.train()
    games = [load_game(trainer.args.output_dir, t)["train"]["generated_ids"] for t in range(2)]
    assert games[0] != games[1]  # of one and the same model


def test_greedy_completions_are_those_of_generate(tmp_path, llm):
    options = {"temperature": 0.0, "num_self_play_iterations": 1}
    model = saved_model(tmp_path / "sft")
    make_trainer(tmp_path / "plain", model=model, **options).train()
    llm.trainer = trainer = vllm_trainer(tmp_path, **options)
    trainer.train()
    games = [load_game(str(tmp_path / run), 0)["train"] for run in ("plain", "run")]
    assert games[0]["generated_ids"] == games[1]["generated_ids"]
    assert games[0]["truncated"] == games[1]["truncated"]


def test_merging_leaves_the_base_weights_as_they_are():
    model = get_peft_model(
        make_model(make_tokenizer()), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    before = copy.deepcopy(model.state_dict())

    def changed():
        return [name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])]

    with unchanged_base_weights(model):
        model.merge_adapter()
        model.unmerge_adapter()
    assert not changed()
    with pytest.raises(KeyError), unchanged_base_weights(model):
        model.merge_adapter()
        raise KeyError
    assert not changed() and not any(getattr(module, "merged", False) for module in model.modules())
    model.merge_adapter()
    model.unmerge_adapter()
    assert changed()  # which is why


def test_a_run_with_a_vllm_server(tmp_path, monkeypatch):
    class Client(VLLMClient):
        """TRL's client, without the network."""

        def __init__(self, base_url, group_port, connection_timeout):
            assert (base_url, group_port, connection_timeout) == ("http://there:9000", 51216, 240.0)
            self.base_url, self.model, self.num_syncs = base_url, "model", 0
            self.copy = Copy(tmp_path / "sft")
            clients.append(self)

        def init_communicator(self, device):
            pass

        def update_named_params(self, metadata, params):
            for (name, dtype, shape), (sent, weight) in zip(metadata, params, strict=True):
                assert (name, dtype, shape) == (sent, "float32", list(weight.shape))
                self.copy.load_weights([(name, weight)])
            self.num_syncs += 1

        def reset_prefix_cache(self):
            pass

        def _post(self, url, json):
            assert url == "http://there:9000/v1/completions"
            assert json.pop("return_token_ids") and json.pop("return_tokens_as_token_ids")
            assert json.pop("model") == "model"
            prompts = json.pop("prompt")
            if self.copy.received:
                self.copy.check(trainer)
            limits = {name: json[name] for name in ("temperature", "max_tokens", "stop_token_ids")}
            check_sampling(trainer.args, trainer.game.rules.end_token_ids, json)
            return {
                "choices": [
                    {"prompt_token_ids": prompt, "token_ids": self.copy.complete(prompt, **limits), "logprobs": None}
                    for prompt in prompts
                ]
            }

    clients = []
    monkeypatch.setattr("trl.generation.vllm_generation.VLLMClient", Client)
    trainer = vllm_trainer(
        tmp_path,
        peft_config=LoraConfig(**LORA),
        vllm_mode="server",
        vllm_server_host="there",
        vllm_server_port=9000,
    )
    trainer.train()
    assert [client.num_syncs for client in clients] == [4]
    assert first_losses(trainer) == pytest.approx([0.6931, 0.6931], abs=1e-3)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("parallel", [1, 2])
def test_each_process_gets_the_completions_of_its_own_prompts(tmp_path, monkeypatch, rank, parallel):
    """In the place of TRL's `VLLMGeneration` among two processes, which takes and returns as many prompts of each."""
    prompts, seeds = [[[1], [2], [3]], [[4], [5]]], [[10, 11, 12], [20, 21]]
    seen = {}

    def generate(prompts, images, num_generations):
        seen.update(prompts=prompts, seed=torch.initial_seed())
        return None, [tuple(prompt * 2) for prompt in prompts], None, None

    accelerator = SimpleNamespace(num_processes=2, process_index=rank, device=torch.device("cpu"))
    monkeypatch.setattr("trl_spin.engines.vllm.gather_object", lambda share: [(3, 10), (2, 20)])
    rules = Rules(make_tokenizer(), [0], None, truncated="keep", play_empty=False, play_identical=False)
    args = make_args(tmp_path, use_vllm=True, vllm_tensor_parallel_size=parallel)
    engine = VLLM(args, Processes(accelerator, StopSignal(accelerator), quiet=True), rules)
    engine._generation = SimpleNamespace(
        model=torch.nn.Linear(1, 1), sync_weights=lambda: None, generate=generate, max_completion_length=None
    )
    with engine.open(None) as complete:
        generated = complete(prompts[rank], seeds[rank], 7)
    assert generated == [prompt * 2 for prompt in prompts[rank]]
    assert len(seen["prompts"]) == 3 and engine._generation.max_completion_length == 7
    assert seen["seed"] == (10 if parallel == 2 or rank == 0 else 20)  # one for the processes that share a model


def test_what_vllm_cannot_complete_is_refused(tmp_path, monkeypatch, llm):
    saved_model(tmp_path / "sft")
    with pytest.raises(ValueError, match="quantized by bitsandbytes.*would not be the reference"):
        vllm_trainer(tmp_path, load_in_4bit(tmp_path / "sft"), peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="`name_or_path` is empty"):
        vllm_trainer(tmp_path, make_model(make_tokenizer()))
    with pytest.raises(ValueError, match="`generation_kwargs=.*Unexpected keyword argument"):
        vllm_trainer(tmp_path, generation_kwargs={"suppress_tokens": [1]})
    monkeypatch.setattr("trl_spin.engines.vllm.is_vllm_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install trl-spin\[vllm\]"):
        vllm_trainer(tmp_path)
    assert Accelerator().num_processes == 1 and not llm.made
