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

r"""
Objectives for research, and a pattern for your own. Put this file next to your script:

```python
from objectives import gsil_bernoulli, gsil_brier

trainer = SPINTrainer(..., objective=gsil_brier)
trainer = SPINTrainer(..., objective=functools.partial(gsil_bernoulli, shift=2.0))
```

An objective is any function `f(real_logratios, generated_logratios, beta) -> losses`. It gets the log-ratios r = log
p_θ(y|x)/p_ref(y|x) of the real completions and r' = log p_θ(y'|x)/p_ref(y'|x) of the generated completions, summed
over tokens and unscaled, and λ; it returns the loss of each pair. All tensors have the shape (batch,).

It takes the place of `loss_type`. Pairs of identical completions are then trained on as well, because only losses that
are registered as losses of the margin r - r' leave them out. If yours is one, register it and select it by its name:

```python
from trl_spin.objectives import objective


@objective("squared_margin", of_margin=True)
def squared_margin(real_logratios, generated_logratios, beta):
    return (1 - beta * (real_logratios - generated_logratios)) ** 2


args = SPINConfig(loss_type="squared_margin", ...)
```
"""

import torch
import torch.nn.functional as F

from trl_spin.objectives import EXP_LIMIT, safe_exp


def gsil_bernoulli(
    real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float, shift: float = 0.0
) -> torch.Tensor:
    r"""
    Bernoulli loss, from [How to Leverage Demonstration Data in Alignment for Large Language Model? A Self-Imitation
    Learning Perspective](https://huggingface.co/papers/2410.10093) (GSIL), as in the authors' code:

    $$ -\log \sigma(\lambda r + s) - \log \sigma(-\lambda r' - s) $$

    With s = 0 it is `"bco_pair"` of [`~trl.DPOTrainer`], and also [`~trl_spin.objectives.space`] with μ = 1.

    The shift: all GSIL losses estimate \\( \log p_{data}/p_t \\) by λr + s. As p_θ is normalized, that can be exact at
    λ ≠ 1 only with \\( s = \lambda \log Z(x) \\), where Z(x) normalizes \\( p_t (p_{data}/p_t)^{1/\lambda} \\). The
    authors set a constant, with λ = 0.01 and s = 2 in their script. But Z goes to 1 as the opponent approaches the
    data: once \\( p_t = p_{data} \\), these values make \\( p_{data} \\) a local maximum of the expected loss. Without
    a shift it is the minimum, for every λ.

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real completions.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated completions.
        beta (`float`):
            λ, the α of GSIL.
        shift (`float`, *optional*, defaults to `0.0`):
            Shift s, the β of GSIL.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    real, generated = beta * real_logratios + shift, beta * generated_logratios + shift
    return -F.logsigmoid(real) - F.logsigmoid(-generated)


def gsil_brier(
    real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float, shift: float = 0.0
) -> torch.Tensor:
    r"""
    Brier loss, from [GSIL](https://huggingface.co/papers/2410.10093), as in the authors' code:

    $$ (1 - \sigma(\lambda r + s))^2 + \sigma(\lambda r' + s)^2 $$

    Bounded by 2; the gradient vanishes for completions far out on either side. On the shift, see [`gsil_bernoulli`].

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real completions.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated completions.
        beta (`float`):
            λ, the α of GSIL.
        shift (`float`, *optional*, defaults to `0.0`):
            Shift s, the β of GSIL.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    real, generated = beta * real_logratios + shift, beta * generated_logratios + shift
    return torch.sigmoid(-real) ** 2 + torch.sigmoid(generated) ** 2


def gsil_hinge(
    real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float, shift: float = 0.0
) -> torch.Tensor:
    r"""
    Hinge loss of each side, from [GSIL](https://huggingface.co/papers/2410.10093), as in the authors' code:

    $$ \max(0, 1 - \lambda r - s) + \max(0, 1 + \lambda r' + s) $$

    Not strictly proper, like [`~trl_spin.objectives.hinge`]. On the shift, see [`gsil_bernoulli`].

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real completions.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated completions.
        beta (`float`):
            λ, the α of GSIL.
        shift (`float`, *optional*, defaults to `0.0`):
            Shift s, the β of GSIL.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    real, generated = beta * real_logratios + shift, beta * generated_logratios + shift
    return torch.relu(1 - real) + torch.relu(1 + generated)


def gsil_kliep(
    real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float, shift: float = 0.0
) -> torch.Tensor:
    r"""
    Loss of the Kullback-Leibler importance estimation procedure, from
    [GSIL](https://huggingface.co/papers/2410.10093), as in the authors' code:

    $$ -(\lambda r + s) + e^{\lambda r' + s} $$

    Exact for \\( \lambda r' + s \leq 10 \\), with a tangent above. At λ = 1 the expectation of \\( e^{r'} \\) over y' ~
    p_t is 1 for every model: the expected loss is then that of SFT, and the generated completions add nothing but noise.
    On the shift, see [`gsil_bernoulli`].

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real completions.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated completions.
        beta (`float`):
            λ, the α of GSIL.
        shift (`float`, *optional*, defaults to `0.0`):
            Shift s, the β of GSIL.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    real, generated = beta * real_logratios + shift, beta * generated_logratios + shift
    return -real + safe_exp(generated)


def gsil_lsif(
    real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float, shift: float = 0.0
) -> torch.Tensor:
    r"""
    Loss of least-squares importance fitting, from [GSIL](https://huggingface.co/papers/2410.10093), as in the authors'
    code:

    $$ -e^{\lambda r + s} + \frac{1}{2} e^{2(\lambda r' + s)} $$

    Exact for \\( \lambda r + s \leq 10 \\) and \\( \lambda r' + s \leq 10 \\), tangents above; the minimizer stays the
    same where \\( p_{data}/p_t < e^{10} \\). The better the model knows a real completion, the larger its weight: with
    completions of many tokens, λ must be small. On the shift, see [`gsil_bernoulli`].

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real completions.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated completions.
        beta (`float`):
            λ, the α of GSIL.
        shift (`float`, *optional*, defaults to `0.0`):
            Shift s, the β of GSIL.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    real, generated = beta * real_logratios + shift, beta * generated_logratios + shift
    # The same limit on both sides: otherwise the loss would fall without end for large log-ratios
    return -safe_exp(real) + 0.5 * safe_exp(2 * generated, limit=2 * EXP_LIMIT)


def chi_squared(real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float) -> torch.Tensor:
    r"""
    Variational form of the χ²-divergence between the data and the mixture of data and opponent:

    $$ -\lambda r + \lambda r' + \frac{1}{4} \left((\lambda r)^2 + (\lambda r')^2\right) = \left(\frac{\lambda r}{2} -
    1\right)^2 + \left(\frac{\lambda r'}{2} + 1\right)^2 - 2 $$

    The penalty bounds the reward: the best λr is \\( 2 (p_{data} - p_t) / (p_{data} + p_t) = 2 \tanh(\frac{1}{2} \log
    p_{data}/p_t) \\), within ±2 and close to the log-ratio where that is small. Our derivation, after the mixture
    penalty of [LS-IQ](https://huggingface.co/papers/2303.00599), in the style of [Your Self-Play Algorithm is Secretly
    an Adversarial Imitator](https://huggingface.co/papers/2602.01357) (SPIF), which proposes a χ² objective with
    bounded rewards. We could not check SPIF's own equation: it may differ. Up to the factor λ²/4 and a constant it is
    `"sppo_hard"` of [`~trl.DPOTrainer`] with a `beta` of λ/4.

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real completions.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated completions.
        beta (`float`):
            λ.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    real, generated = beta * real_logratios, beta * generated_logratios
    return -real + generated + 0.25 * (real**2 + generated**2)
