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
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LogitsProcessorList

from trl_spin import SelfPlayCallback
from trl_spin.engines import chosen_engine
from trl_spin.engines.base import LARGE_BATCH
from trl_spin.engines.continuous_batching import PAGE_SIZE, ContinuousBatching
from trl_spin.engines.generate import SampleByRow, length_sorted_batches, sampling_processors, splitmix64
from trl_spin.generation import row_seed
from trl_spin.pairs import Columns, Rules
from trl_spin.run.games import read_manifest
from trl_spin.run.processes import Processes, StopSignal


CONTINUOUS = {"use_transformers_continuous_batching": True}


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
        completions = engine.complete(generate, rows, seed_of, args.max_completion_length, desc=None)
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
    processors = sampling_processors(args, [row_seed(i) for i in range(num_samples)], torch.device("cpu"))
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


@pytest.mark.parametrize("engine", [{}, CONTINUOUS], ids=["generate", "continuous_batching"])
def test_end_tokens_and_limits(tokenizer, prompts, tmp_path, engine):
    model = make_model(tokenizer)
    eos, other_eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<eos>"])
    model.lm_head.weight.data.zero_()
    bias = torch.full((len(tokenizer),), -20.0)
    bias[[eos, other_eos, *range(6)]] = 0.0  # one token in four is an end token, of either kind
    model.lm_head.bias = torch.nn.Parameter(bias)
    ends = {"end_token_ids": [eos, other_eos], **engine}
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
    engine = ContinuousBatching(make_args(tmp_path, **CONTINUOUS), processes, rules, save_model=None)
    batches = engine.batches(np.ones(num_prompts, int), 1)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(np.concatenate(batches)) == list(range(num_prompts))


def test_the_model_sees_the_prompts_as_they_are(model, tokenizer, prompts, tmp_path):
    seen = []
    model.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["input_ids"]), with_kwargs=True)
    complete(model, tokenizer, prompts, tmp_path, max_completion_length=3)
    rows = [[t for t in row.tolist() if t != tokenizer.pad_token_id] for row in seen[0]]
    assert sorted(rows) == sorted(prompts)


# ---- Continuous batching ----


def with_adapter(model):
    return get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_continuous_batching_is_generate(tokenizer, prompts, tmp_path, attention, adapter):
    model = make_model(tokenizer, attn_implementation=attention)
    without = complete(model, tokenizer, prompts, tmp_path, temperature=0.0)
    if adapter:
        model = with_adapter(model)
    model.train()
    model.generation_config.suppress_tokens = list(range(200))
    rng = torch.get_rng_state()
    expected = complete(model, tokenizer, prompts * 9, tmp_path, temperature=0.0)  # more rows than go in at once
    assert complete(model, tokenizer, prompts * 9, tmp_path, temperature=0.0, **CONTINUOUS) == expected
    assert (expected[:5] != without) == adapter
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == attention
    assert model.generation_config.suppress_tokens == list(range(200))
    complete(model, tokenizer, prompts, tmp_path, **CONTINUOUS)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"temperature": 1.5, "top_k": 4}],
    ids=lambda o: str(o),
)
def test_continuous_batching_follows_the_processed_distribution(model, tokenizer, prompts, tmp_path, options):
    num_samples = 2_000
    completions = complete(
        model,
        tokenizer,
        prompts[1:2] * num_samples,
        tmp_path,
        max_completion_length=1,
        **options,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"max_requests_per_batch": 200},
    )
    counts = (
        torch.tensor([c["generated_ids"][0] for c in completions]).bincount(minlength=len(tokenizer)) / num_samples
    )
    processors = LogitsProcessorList(sampling_processors(make_args(tmp_path, **options), [0], model.device)[:-1])
    with torch.no_grad():
        expected = processors(None, model(torch.tensor(prompts[1:2])).logits[:, -1]).softmax(dim=-1)[0]
    # The order of the draws depends on time, so that no seed makes this test deterministic: 6 standard errors
    assert ((counts - expected).abs() <= 6 * (expected * (1 - expected) / num_samples).sqrt() + 2 / num_samples).all()
    assert (counts[expected == 0] == 0).all()
    assert 0.5 * (counts - expected).abs().sum() < 0.2


def test_continuous_batching_draws_anew_for_other_seeds(model, tokenizer, prompts, tmp_path):
    def sample(seed):
        return complete(model, tokenizer, prompts, tmp_path, seeds=[row_seed(seed, i) for i in range(5)], **CONTINUOUS)

    assert sample(0) != sample(1)


def test_continuous_batching_that_fails_says_so(model, tokenizer, prompts, tmp_path):
    config = {"num_blocks": 1, PAGE_SIZE: 16, "max_batch_tokens": 16}
    with pytest.raises(ValueError, match=r"(?s)failed on 5 of 5 prompts: .*`num_blocks`.*unset"):
        complete(
            model,
            tokenizer,
            [prompt * 20 for prompt in prompts],
            tmp_path,
            use_transformers_continuous_batching=True,
            transformers_continuous_batching_config=config,
        )
    with pytest.raises(TypeError, match="no_such_option"):
        complete(
            model,
            tokenizer,
            prompts,
            tmp_path,
            use_transformers_continuous_batching=True,
            transformers_continuous_batching_config={"no_such_option": 1},
        )


@pytest.mark.parametrize("kind", ["float32", "bf16", "lora", "qlora"])
def test_a_run_with_continuous_batching(tmp_path, tokenizer, kind):
    model, options = make_model(tokenizer, hidden_size=64), {}
    if kind == "qlora":
        model.save_pretrained(tmp_path / "base")
        model = load_in_4bit(tmp_path / "base")
    if kind.endswith("lora"):
        options = {"peft_config": LoraConfig(target_modules="all-linear")}
    options["bf16"] = kind in ("bf16", "qlora")
    trainer = make_trainer(
        tmp_path / "run",
        model=model,
        eval_dataset=make_dataset(4),
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config=f'{{"{PAGE_SIZE}": 16}}',
        **options,
    )
    weights = dict(trainer.model.named_parameters())
    trainer.train()
    assert first_losses(trainer) == pytest.approx([0.6931, 0.6931], abs=1e-3 if not options["bf16"] else 0.02)
    # The very weights, in their own precision: copies in another one are gone
    assert all(weights[name] is weight for name, weight in trainer.model.named_parameters())
    manifests = [read_manifest(str(tmp_path / "run"), t) for t in range(2)]
    assert [manifest["engine"] for manifest in manifests] == ["continuous_batching"] * 2


def test_a_run_is_resumed_with_another_engine(tmp_path):
    make_trainer(tmp_path, num_self_play_iterations=1, save_strategy="epoch").train()
    make_trainer(tmp_path, save_strategy="epoch", **CONTINUOUS).train(resume_from_checkpoint=True)
    engines = [read_manifest(str(tmp_path), iteration)["engine"] for iteration in range(2)]
    assert engines == ["generate", "continuous_batching"]
