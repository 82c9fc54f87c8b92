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

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import Scripted, callback_of, make_args, make_model, make_tokenizer, make_trainer
from datasets import Dataset
from transformers import GenerationConfig, LogitsProcessorList

from trl_spin import SelfPlayCallback
from trl_spin.engines import chosen_engine
from trl_spin.engines.base import LARGE_BATCH
from trl_spin.engines.generate import SampleByRow, length_sorted_batches, sampling_processors, splitmix64
from trl_spin.engines.vllm import VLLM
from trl_spin.generation import row_seed
from trl_spin.pairs import Columns, Rules
from trl_spin.run.games import read_manifest
from trl_spin.run.processes import Processes, StopSignal


def complete(model, tokenizer, prompts, tmp_path, seeds=None, max_length=None, end_token_ids=None, **kwargs):
    args, accelerator = make_args(tmp_path, **{"generation_token_budget": 4096} | kwargs), Accelerator(cpu=True)
    rules = Rules(
        tokenizer,
        end_token_ids or [tokenizer.eos_token_id],
        max_length,
        truncated="keep",
        play_empty=False,
        play_identical=False,
    )
    engine = chosen_engine(args)(
        args, Processes(accelerator, StopSignal(accelerator), quiet=True), rules, save_model=None
    )
    rows = Columns(Dataset.from_dict({"row": range(len(prompts)), "prompt_ids": prompts}))
    seed_of = seeds.__getitem__ if seeds else partial(row_seed, 0)
    with engine.open(model) as generate:
        given = generate, rows, seed_of, args.max_completion_length, args.temperature
        completions = engine.complete(*given, desc=None)
    assert completions["index"].to_pylist() == list(range(len(prompts)))
    return completions.drop_columns("index").to_pylist()


@pytest.fixture
def prompts(tokenizer):
    return [tokenizer(text)["input_ids"] for text in ("a", "Count to 3.", "bb", "Something longer than that", "c")]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}], ids=lambda o: str(o)
)
def test_samples_follow_the_processed_distribution(options, tmp_path):
    num_samples, logits = 20_000, torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    args = make_args(tmp_path, **options)
    processors = sampling_processors(
        args, args.temperature, [row_seed(i) for i in range(num_samples)], torch.device("cpu")
    )
    scores = logits.expand(num_samples, -1)
    counts = processors(None, scores.clone()).argmax(dim=1).bincount(minlength=5) / num_samples
    expected = LogitsProcessorList(processors[:-1])(None, scores[:1].clone()).softmax(dim=-1)[0]
    assert (counts - expected).abs().max() < 0.015  # more than 4 standard errors
    assert (counts[expected == 0] == 0).all()


def test_random_bits_are_those_of_splitmix64():
    gamma = 0x9E3779B97F4A7C15 - 2**64
    bits = splitmix64(torch.tensor([1234567]) + torch.arange(1, 6) * gamma)
    # The published sequence of the seed 1234567
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [number % 2**64 for number in bits.tolist()] == expected


def test_noise_of_rows_steps_and_tokens_is_gumbel_and_independent(tmp_path):
    sample = SampleByRow([row_seed(i) for i in range(50)], torch.device("cpu"))
    noise = torch.stack([sample(None, torch.zeros(50, 40)) for _ in range(100)])  # steps, rows, tokens
    assert noise.mean() == pytest.approx(0.5772, abs=4 * 1.2825 / 200_000**0.5)
    assert noise.std() == pytest.approx(1.2825, rel=0.01)
    assert noise.unique().numel() > 0.98 * noise.numel()
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[..., 1:], noise[..., :-1])):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.01
    # Rare tokens come as often as they should: P(noise > 10) is 4.54e-5
    tail = SampleByRow(list(range(2000)), torch.device("cpu"))(None, torch.zeros(2000, 2000)) > 10
    assert tail.sum().item() == pytest.approx(4e6 * 4.54e-5, abs=5 * (4e6 * 4.54e-5) ** 0.5)


def test_temperature_zero_is_greedy(model, tokenizer, prompts, tmp_path):
    greedy = complete(model, tokenizer, prompts[:1], tmp_path, temperature=0.0)[0]["generated_ids"]
    ids = list(prompts[0])
    for token in greedy:
        assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
        ids.append(token)


def test_a_sample_depends_on_its_seed_alone(model, tokenizer, prompts, tmp_path):
    together = complete(model, tokenizer, prompts, tmp_path)
    torch.rand(7)  # what ran before does not matter
    alone = [
        complete(model, tokenizer, [prompt], tmp_path, seeds=[row_seed(0, i)])[0] for i, prompt in enumerate(prompts)
    ]
    assert together == alone == complete(model, tokenizer, prompts, tmp_path, generation_token_budget=60)
    assert together != complete(model, tokenizer, prompts, tmp_path, seeds=[row_seed(1, i) for i in range(5)])


def test_end_tokens_and_limits(tokenizer, prompts, tmp_path):
    model = make_model(tokenizer)
    eos, other_eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    model.lm_head.weight.data.zero_()
    bias = torch.full((len(tokenizer),), -20.0)
    bias[[eos, other_eos, *range(6)]] = 0.0  # one token in four is an end token, of either kind
    model.lm_head.bias = torch.nn.Parameter(bias)
    ends = {"end_token_ids": [eos, other_eos]}
    completions = complete(model, tokenizer, prompts * 8, tmp_path, max_completion_length=6, **ends)
    last_tokens = {c["generated_ids"][-1] for c in completions if not c["truncated"]}
    assert last_tokens == {eos, other_eos}
    for c in completions:
        assert len(c["generated_ids"]) <= 6
        assert not {eos, other_eos} & set(c["generated_ids"][:-1])
        assert c["truncated"] == (c["generated_ids"][-1] not in (eos, other_eos))
    assert any(c["truncated"] for c in completions)
    # `max_length` holds for prompt plus completion, row by row
    completions = complete(model, tokenizer, prompts * 8, tmp_path, max_length=27, **ends)
    lengths = [(len(prompt), len(c["generated_ids"])) for prompt, c in zip(prompts * 8, completions, strict=True)]
    assert all(prompt + generated <= 27 for prompt, generated in lengths)
    assert max(generated for prompt, generated in lengths if prompt > 20) == 1


def test_the_models_own_sampling_settings_do_not_leak_in(model, tokenizer, prompts, tmp_path):
    expected = complete(model, tokenizer, prompts, tmp_path)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.01, top_k=1, repetition_penalty=5.0, suppress_tokens=list(range(200))
    )
    assert complete(model, tokenizer, prompts, tmp_path) == expected
    with_suppressed = complete(
        model, tokenizer, prompts, tmp_path, generation_kwargs={"suppress_tokens": expected[0]["generated_ids"]}
    )
    assert not set(with_suppressed[0]["generated_ids"]) & set(expected[0]["generated_ids"])
    with pytest.raises(ValueError, match="num_beams"):
        complete(model, tokenizer, prompts, tmp_path, generation_kwargs={"num_beams": 4})


def test_generation_leaves_no_trace(tmp_path):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.generation_config.temperature = 0.6
    model.generation_config.do_sample = True
    trainer = make_trainer(tmp_path, tokenizer, model=model, gradient_checkpointing=True)
    seen = []

    def snapshot():
        state = {
            "training": [m.training for m in trainer.model.modules()],
            "checkpointing": trainer.model.is_gradient_checkpointing,
            "generation_config": trainer.model.generation_config.to_dict(),
            "use_cache": trainer.model.config.use_cache,
            "padding_side": trainer.processing_class.padding_side,
            "rng": torch.get_rng_state().tolist(),
            "weights": {k: v.clone() for k, v in trainer.model.state_dict().items()},
        }
        return copy.deepcopy(state)

    callback = callback_of(trainer, SelfPlayCallback)
    boundary = callback.on_epoch_begin

    def watched(*args, **kwargs):
        trainer.model.train()
        before = snapshot()
        boundary(*args, **kwargs)
        seen.append((before, snapshot()))

    callback.on_epoch_begin = watched
    trainer.train()
    assert len(seen) == 2
    for before, after in seen:
        weights = before.pop("weights"), after.pop("weights")
        assert before == after
        assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_batches_are_sorted_by_length_and_keep_the_budget():
    lengths = np.array([3, 50, 7, 8, 50, 1, 2])
    batches = length_sorted_batches(lengths, lambda longest: 100 // longest)
    assert sorted(np.concatenate(batches)) == list(range(7))
    assert batches[0].tolist() == [1, 4]
    assert all(len(batch) * lengths[batch].max() <= 100 for batch in batches)
    assert length_sorted_batches(np.array([500]), lambda longest: 0) == [[0]]


@pytest.mark.parametrize(
    ("num_prompts", "num_processes", "sizes"),
    [
        (5, 2, [3, 2]),
        (1, 4, [1]),
        (12 * LARGE_BATCH, 8, 16 * [12 * LARGE_BATCH // 16]),  # one and a half batches for each process: two rounds
    ],
)
def test_large_batches_are_even(tmp_path, tokenizer, num_prompts, num_processes, sizes):
    accelerator = SimpleNamespace(num_processes=num_processes)
    rules = Rules(tokenizer, [0], None, truncated="keep", play_empty=False, play_identical=False)
    processes = Processes(accelerator, StopSignal(accelerator), quiet=True)
    engine = VLLM(make_args(tmp_path, use_vllm=True), processes, rules, save_model=None)
    batches = engine.batches(np.ones(num_prompts, int), 1)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(np.concatenate(batches)) == list(range(num_prompts))


def test_the_model_sees_the_prompts_as_they_are(model, tokenizer, prompts, tmp_path):
    seen = []
    model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["input_ids"]), with_kwargs=True)
    complete(model, tokenizer, prompts, tmp_path, max_completion_length=3)
    rows = [[t for t in row.tolist() if t != tokenizer.pad_token_id] for row in seen[0]]
    assert sorted(rows) == sorted(prompts)


def test_a_run_is_resumed_with_another_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "script", lambda engine, prompts: [[5]] * len(prompts))
    make_trainer(tmp_path, num_self_play_iterations=1, save_strategy="epoch").train()
    make_trainer(tmp_path, save_strategy="epoch", use_script=True).train(resume_from_checkpoint=True)
    engines = [read_manifest(str(tmp_path), iteration)["engine"] for iteration in range(2)]
    assert engines == ["generate", "scripted"]
