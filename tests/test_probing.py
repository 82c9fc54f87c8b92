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

"""What `trl-spin probe` says before any training, and the estimates that it is made of."""

import math
import random
import re

import pytest
import torch
from conftest import make_dataset, make_trainer
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

import trl_spin
from trl_spin.probing import Sketch, compare, inner_product, noise_scale, tell_apart
from trl_spin.report.signals import proportion_interval


def gaussians(mean: torch.Tensor, num_groups: int, size: int, seed: int) -> torch.Tensor:
    """Mean vectors of groups, of vectors with variance 1 in each coordinate."""
    noise = torch.randn(num_groups, len(mean), generator=torch.Generator().manual_seed(seed))
    return mean + noise / math.sqrt(size)


def test_a_sketch_gives_inner_products_of_gradients():
    torch.manual_seed(0)
    model, inputs = torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.Tanh(), torch.nn.Linear(300, 5)), []
    for _ in range(2):
        inputs.append(torch.randn(7, 200))
    whole, part = Sketch(model), Sketch(model, size=6000)
    losses = [model(x).square().mean() for x in inputs]
    exact = [
        torch.cat([g.flatten() for g in torch.autograd.grad(x, [*model.parameters()], retain_graph=True)])
        for x in losses
    ]
    assert all(torch.equal(whole(loss), gradient) for loss, gradient in zip(losses, exact, strict=True))
    sketches = [part(loss) for loss in losses]
    products = exact[0] * exact[1]
    error = len(products) * products.std().item() / math.sqrt(6000)
    assert abs(sketches[0] @ sketches[1] - products.sum()).item() < 3 * error
    assert 0 < error < 0.5 * exact[0].norm() * exact[1].norm()


def test_estimates_on_gaussians():
    # tr Σ / |G|² is 400 / 4
    mean = torch.zeros(400)
    mean[:4] = 1.0
    scales = [noise_scale(gaussians(mean, 16, 50, seed), 50) for seed in range(20)]
    assert sum(scales) / 20 == pytest.approx(100, rel=0.1)
    found = [inner_product(gaussians(mean, 16, 50, s), gaussians(mean, 12, 50, 100 + s)) for s in range(50)]
    means, errors = torch.tensor(found).T
    assert means.mean().item() == pytest.approx(4, abs=4 * means.std().item() / math.sqrt(50))
    assert errors.mean().item() == pytest.approx(means.std().item(), rel=0.3)
    # Without a signal there is none, and vectors of the same rows are not compared with themselves
    nothing = [gaussians(0 * mean, 16, 50, seed) for seed in range(40)]
    assert sum(abs(compare(a, b)["z"]) > 2 for a, b in zip(nothing[::2], nothing[1::2], strict=True)) <= 2
    assert sum(abs(compare(a, a, paired=True)["z"]) > 2 for a in nothing) <= 4
    assert compare(gaussians(mean, 16, 50, 0), gaussians(-mean, 16, 50, 1))["cosine"] == pytest.approx(-1, abs=0.1)
    sides = [gaussians(shift * mean, 150, 1, seed) for seed, shift in enumerate((0, 1.5))]
    assert tell_apart(sides[0], sides[1])[1] > 0.75
    accuracy, low, high = tell_apart(sides[0], gaussians(0 * mean, 150, 1, 2))
    assert low < 0.5 < high and low < accuracy < high


def test_a_probe_says_what_to_do_first(tmp_path, capsys):
    trainer = make_trainer(tmp_path, dataset=make_dataset(48), held_out_size=16, max_completion_length=4)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    numbers = trl_spin.probe(trainer, num_prompts=16)
    out = capsys.readouterr().out.partition("Self-play probe")[2]
    assert max(map(len, out.splitlines())) <= 80 and out.rstrip().endswith(numbers["verdict"].rstrip())
    verdict = " ".join(numbers["verdict"].split())
    assert numbers["sft"]["z"] > 2 and verdict.startswith("- More SFT first")
    assert numbers["by_shortcuts"][1] > 0.7 and numbers["ending"] == {"real": 1.0, "generated": 0.0}
    assert (
        "A shortcut wins the game: whether a completion ends" in verdict and "`max_completion_length` (4)" in verdict
    )
    assert numbers["kept"] is None
    # The same numbers again, and a run that is none the worse for it
    assert trl_spin.probe(trainer, num_prompts=16) == numbers
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert not [*tmp_path.iterdir()]


def test_a_model_that_has_memorized_its_rows_is_not_sent_back_to_sft(tmp_path):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh", k=12)) for _ in range(64)]
    rows = [{"prompt": f"Write {i}.", "completion": text} for i, text in enumerate(texts)]
    trainer = make_trainer(tmp_path, dataset=Dataset.from_list(rows), held_out_size=32, max_completion_length=16)
    optimizer = torch.optim.Adam(trainer.model.parameters(), lr=1e-2)
    for _ in range(120):
        for row in range(0, 32, 8):
            batch = [trainer.game.train.rows[row + i] for i in range(8)]
            ids = pad_sequence([torch.tensor(row["prompt_ids"] + row["real_ids"]) for row in batch], True, -100)
            trainer.model(ids.clamp(min=0), labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    numbers = trl_spin.probe(trainer)
    assert numbers["nll"]["train"] < 0.01 and numbers["sft"]["z"] < -2
    assert numbers["verdict"].startswith("- Overfit: another step of SFT raises the held-out NLL")


def test_a_probe_without_held_out_rows_says_so_and_few_rows_are_refused(tmp_path, capsys, monkeypatch):
    numbers = trl_spin.probe(make_trainer(tmp_path / "a", dataset=make_dataset(16), temperature=0.4))
    out = " ".join(capsys.readouterr().out.split())
    assert numbers["num_prompts"] == 8 and "Nothing is held out" in out
    assert re.search(r"λ must be above 1/\(2T\) = 1.2, and is 1: raise `beta`", out)
    half = {"pair_filter": lambda prompts, completions, real: [i % 2 for i in range(8)]}
    numbers = trl_spin.probe(make_trainer(tmp_path / "filtered", dataset=make_dataset(16), **half))
    assert numbers["kept"] == (0.5, *proportion_interval(0.5, 8)) and "After that, play verified" in numbers["verdict"]
    with pytest.raises(ValueError, match="needs 4 prompts and 4 training rows, and has 3 and 3"):
        trl_spin.probe(make_trainer(tmp_path / "b", dataset=make_dataset(6)))
    trainer = make_trainer(tmp_path / "c")
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ValueError, match="`probe` needs one process, and there are 2"):
        trl_spin.probe(trainer)
