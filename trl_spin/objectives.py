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
The self-play objectives: functions of the summed log-probs of a real answer y and a generated answer y'.

All but [`t_spin`] and [`sft`] are functions of the two log-ratios r = log p_θ(y|x)/p_ref(y|x) and
r' = log p_θ(y'|x)/p_ref(y'|x), unscaled, and of λ (`beta`); the tensors have the shape (batch,), and so has the result.
With [`~trl.DPOTrainer`]'s `loss_type` names they share what is the same (`"sigmoid"`, `"hinge"`, `"sft"`), and no other
name.

Where an iteration starts, p_θ is the reference, and a loss is ℓ(0), the function's value at two zeros.
"""

import math

import torch
import torch.nn.functional as F


# `_exp` is exact up to here, where the slope is e^10 = 22026. Far beyond, a single pair would be the whole gradient of its
# batch; farther, at 88, float32 overflows.
EXP_LIMIT = 10.0


def _exp(x: torch.Tensor, limit: float = EXP_LIMIT) -> torch.Tensor:
    """e^x up to `limit`, and its tangent from there on: still convex and increasing, but it cannot overflow."""
    clipped = x.clamp(max=limit)
    return clipped.exp() * (1 + x - clipped)


# ---- SPIN: the loss of the margin λ(r - r') ----


def logistic(real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float) -> torch.Tensor:
    r"""
    Logistic loss, from [Self-Play Fine-Tuning Converts Weak Language Models to Strong Language
    Models](https://huggingface.co/papers/2401.01335), Equation 4.7 with \\( \ell(m) = \log(1 + e^{-m}) \\):

    $$ \ell(\lambda (r - r')) = -\log \sigma(\lambda (r - r')) $$

    Its minimizer is \\( p_{t+1} \propto p_t (p_{data}/p_t)^{1/\lambda} \\) (Theorem 5.4). The same as `"sigmoid"` in
    [`~trl.DPOTrainer`].

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real answers.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated answers.
        beta (`float`):
            λ.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    return -F.logsigmoid(beta * (real_logratios - generated_logratios))


def hinge(real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float) -> torch.Tensor:
    r"""
    Hinge loss, from [SPIN](https://huggingface.co/papers/2401.01335), Equation 4.7 with
    \\( \ell(m) = \max(0, 1 - m) \\):

    $$ \ell(\lambda (r - r')) = \max(0, 1 - \lambda (r - r')) $$

    Not strictly proper: its minimizers tell which of \\( p_{data}, p_t \\) is larger, not by how much, and at
    \\( p_t = p_{data} \\) every model whose margins stay within ±1 has the same expected loss. The same as `"hinge"` in
    [`~trl.DPOTrainer`].

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real answers.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated answers.
        beta (`float`):
            λ.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    return torch.relu(1 - beta * (real_logratios - generated_logratios))


def exponential(real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float) -> torch.Tensor:
    r"""
    Exponential loss, from [SPIN](https://huggingface.co/papers/2401.01335), Equation 4.7 with
    \\( \ell(m) = e^{-m} \\):

    $$ \ell(\lambda (r - r')) = e^{-\lambda (r - r')} $$

    Exact for margins \\( \lambda (r - r') \geq -10 \\); below, the tangent at -10 goes on, so that the loss stays convex
    and decreasing (the paper's Assumption 5.1) and finite. Its minimizer is \\( p_{t+1} \propto p_t
    (p_{data}/p_t)^{1/(2\lambda)} \\): λ does half of what it does in the logistic loss.

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real answers.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated answers.
        beta (`float`):
            λ.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    return _exp(-beta * (real_logratios - generated_logratios))


def correlation(real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float) -> torch.Tensor:
    r"""
    Correlation loss, from [SPIN](https://huggingface.co/papers/2401.01335), Equation 4.7 with
    \\( \ell(m) = 1 - m \\), which makes it an integral probability metric:

    $$ \ell(\lambda (r - r')) = 1 - \lambda (r - r') $$

    Exact everywhere: a line needs no care. But it is not bounded below and has no minimizer unless
    \\( p_t = p_{data} \\), where all models are minimizers (so it is not strictly proper): only the number of steps and
    the learning rate limit how far an iteration goes, and λ does no more than scale the gradient. To bound it, take
    [`hinge`], which is this loss cut off at the margin 1 (and, with λ/c, c times smaller, cut off at the margin c).

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real answers.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated answers.
        beta (`float`):
            λ.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    return 1 - beta * (real_logratios - generated_logratios)


# ---- Density-ratio estimation: one loss for each side, so that r and r' have values of their own ----


def space(
    real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float, mu: float = 1.0
) -> torch.Tensor:
    r"""
    Noise contrastive loss, from [SPACE: Noise Contrastive Estimation Stabilizes Self-Play Fine-Tuning for Large Language
    Models](https://huggingface.co/papers/2512.07175):

    $$ -\log \sigma_\mu(\lambda r) - \mu \log \sigma_{1/\mu}(-\lambda r'), \qquad \sigma_\mu(z) = \frac{1}{1 + \mu
    e^{-z}} $$

    The paper has λ = 1, for which the minimizer is \\( p_{data} \\) itself, for every μ. Its equation is taken from a
    third-party note on the paper (its number is not known to us); with λ = 1 it is the objective of noise contrastive
    estimation (Gutmann and Hyvärinen, 2010) with \\( p_t \\) as the noise. With μ = 1 it is the same as `"bco_pair"` in
    [`~trl.DPOTrainer`] (TRL 1.16, whose `"bco_pair"` has no running mean).

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real answers.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated answers.
        beta (`float`):
            λ.
        mu (`float`, *optional*, defaults to `1.0`):
            Weight μ of the generated answers: how many of them there are to one real answer.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    # σ_μ(z) = σ(z - log μ) and σ_{1/μ}(-z) = σ(log μ - z)
    log_mu = math.log(mu)
    real, generated = beta * real_logratios - log_mu, beta * generated_logratios - log_mu
    return -F.logsigmoid(real) - mu * F.logsigmoid(-generated)


def gsil_bernoulli(
    real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float, shift: float = 0.0
) -> torch.Tensor:
    r"""
    Bernoulli loss, from [How to Leverage Demonstration Data in Alignment for Large Language Model? A Self-Imitation
    Learning Perspective](https://huggingface.co/papers/2410.10093) (GSIL), as in the authors' code:

    $$ -\log \sigma(\lambda r + s) - \log \sigma(-\lambda r' - s) $$

    With s = 0 it is `"bco_pair"` of [`~trl.DPOTrainer`], and with λ = 1 as well, [`space`] with μ = 1.

    The shift: all GSIL losses estimate \\( \log p_{data}/p_t \\) by λr + s. As p_θ is normalized, that can be exact at
    λ ≠ 1 only with \\( s = \lambda \log Z(x) \\), where Z(x) normalizes \\( p_t (p_{data}/p_t)^{1/\lambda} \\). The
    authors set a constant, with λ = 0.01 and s = 2 in their script. But Z goes to 1 as the opponent approaches the data:
    once \\( p_t = p_{data} \\), these values make \\( p_{data} \\) a local maximum of the expected loss. Without a shift it
    is the minimum, for every λ.

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real answers.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated answers.
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

    Bounded by 2; the gradient of answers far on either side vanishes. About the shift, see [`gsil_bernoulli`].

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real answers.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated answers.
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

    Not strictly proper, as [`hinge`]. About the shift, see [`gsil_bernoulli`].

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real answers.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated answers.
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
    Loss of the Kullback-Leibler importance estimation procedure, from [GSIL](https://huggingface.co/papers/2410.10093),
    as in the authors' code:

    $$ -(\lambda r + s) + e^{\lambda r' + s} $$

    Exact for \\( \lambda r' + s \leq 10 \\), a tangent above. At λ = 1 the expectation of \\( e^{r'} \\) over y' ~ p_t is 1
    for every model: there, the expected loss is that of SFT, and the generated answers add nothing but noise. About the
    shift, see [`gsil_bernoulli`].

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real answers.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated answers.
        beta (`float`):
            λ, the α of GSIL.
        shift (`float`, *optional*, defaults to `0.0`):
            Shift s, the β of GSIL.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    real, generated = beta * real_logratios + shift, beta * generated_logratios + shift
    return -real + _exp(generated)


def gsil_lsif(
    real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float, shift: float = 0.0
) -> torch.Tensor:
    r"""
    Loss of least-squares importance fitting, from [GSIL](https://huggingface.co/papers/2410.10093), as in the authors'
    code:

    $$ -e^{\lambda r + s} + \frac{1}{2} e^{2(\lambda r' + s)} $$

    Exact for \\( \lambda r + s \leq 10 \\) and \\( \lambda r' + s \leq 10 \\), tangents above; the minimizer stays the
    same where \\( p_{data}/p_t < e^{10} \\). The better the model knows a real answer, the larger its weight: with
    answers of many tokens, λ must be small. About the shift, see [`gsil_bernoulli`].

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real answers.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated answers.
        beta (`float`):
            λ, the α of GSIL.
        shift (`float`, *optional*, defaults to `0.0`):
            Shift s, the β of GSIL.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    real, generated = beta * real_logratios + shift, beta * generated_logratios + shift
    # The same limit on both sides: otherwise the loss would fall without end for large log-ratios
    return -_exp(real) + 0.5 * _exp(2 * generated, limit=2 * EXP_LIMIT)


def chi_squared(real_logratios: torch.Tensor, generated_logratios: torch.Tensor, beta: float) -> torch.Tensor:
    r"""
    Variational form of the χ²-divergence between the data and the mixture of data and opponent:

    $$ -\lambda r + \lambda r' + \frac{1}{4} \left((\lambda r)^2 + (\lambda r')^2\right) = \left(\frac{\lambda r}{2} -
    1\right)^2 + \left(\frac{\lambda r'}{2} + 1\right)^2 - 2 $$

    The penalty bounds the reward: the best λr is \\( 2 (p_{data} - p_t) / (p_{data} + p_t) = 2 \tanh(\frac{1}{2} \log
    p_{data}/p_t) \\), within ±2 and close to the log-ratio where that is small. Our derivation, after the mixture penalty
    of [LS-IQ](https://huggingface.co/papers/2303.00599), in the style of [Your Self-Play Algorithm is Secretly an
    Adversarial Imitator](https://huggingface.co/papers/2602.01357) (SPIF), which proposes a χ² objective with bounded
    rewards. We could not check SPIF's own equation: it may differ. Up to the factor λ²/4 and a constant it is
    `"sppo_hard"` of [`~trl.DPOTrainer`] with a `beta` of λ/4.

    Args:
        real_logratios (`torch.Tensor`):
            Log-ratios r of the real answers.
        generated_logratios (`torch.Tensor`):
            Log-ratios r' of the generated answers.
        beta (`float`):
            λ.

    Returns:
        `torch.Tensor`: Loss of each pair.
    """
    real, generated = beta * real_logratios, beta * generated_logratios
    return -real + generated + 0.25 * (real**2 + generated**2)


# ---- Without a reference ----


def t_spin(
    real_logps: torch.Tensor,
    generated_logps: torch.Tensor,
    proto_logps: torch.Tensor,
    alpha: float = 1.0,
    history_weight: float = 0.1,
) -> torch.Tensor:
    r"""
    Triplet loss, from [Triplets Better Than Pairs: Towards Stable and Effective Self-Play Fine-Tuning for
    LLMs](https://huggingface.co/papers/2601.08198) (T-SPIN), Equation 7 with the logistic loss:

    $$ -\log \sigma(\alpha \log p_\theta(y|x) - \alpha \log p_\theta(y'|x)) - \beta \log \sigma(\alpha \log p_\theta(y'|x)
    - \alpha \log p_\theta(y_0|x)) $$

    where \\( y_0 \sim p_{\theta_0} \\) is the answer of the SFT model, generated once. There is no reference, so an
    iteration does not start at ℓ(0). The paper has α = 1, and β = 0 in iteration 0, β = 0.1 after it.

    Not strictly proper: \\( p_{data} \\) is not a fixed point. With β = 0 the minimizer is \\( p_{t+1} \propto
    (p_{data}/p_t)^{1/\alpha} \\), uniform at \\( p_t = p_{data} \\), and at α = 1 the iteration has period 2. With β > 0,
    the second term damps this; where it settles, in our tests, is flatter than the data.

    Args:
        real_logps (`torch.Tensor`):
            Log-probs of the real answers y.
        generated_logps (`torch.Tensor`):
            Log-probs of the generated answers y'.
        proto_logps (`torch.Tensor`):
            Log-probs of the answers y_0 of the SFT model.
        alpha (`float`, *optional*, defaults to `1.0`):
            α, the scale of the log-probs.
        history_weight (`float`, *optional*, defaults to `0.1`):
            β, the weight of the second term.

    Returns:
        `torch.Tensor`: Loss of each triplet.
    """
    current = -F.logsigmoid(alpha * (real_logps - generated_logps))
    history = -F.logsigmoid(alpha * (generated_logps - proto_logps))
    return current + history_weight * history


def sft(real_logps: torch.Tensor, real_lengths: torch.Tensor) -> torch.Tensor:
    r"""
    Negative log-likelihood of the real answers per token, the anchor that other objectives are combined with:

    $$ -\frac{\sum_i \log p_\theta(y_i|x_i)}{\sum_i |y_i|} $$

    The mean is over the tokens of the batch, not over its answers: the same as `"sft"` in [`~trl.DPOTrainer`] (TRL 1.16,
    which has no `rpo_alpha` any more).

    Args:
        real_logps (`torch.Tensor`):
            Log-probs of the real answers.
        real_lengths (`torch.Tensor`):
            Numbers of tokens of the real answers.

    Returns:
        `torch.Tensor`: Share of each answer, such that their mean is the loss.
    """
    return -real_logps / real_lengths.to(real_logps.dtype).mean()


# ---- α-SPIN: another reference, for any of the objectives that have one ----


def mix_reference(opponent_logps: torch.Tensor, base_logps: torch.Tensor, alpha: float) -> torch.Tensor:
    r"""
    Log-probs under the geometric mixture of opponent and SFT model, from [Investigating Regularization of Self-Play
    Language Models](https://huggingface.co/papers/2404.04291) (α-SPIN):

    $$ \alpha \log p_{\theta_t}(y|x) + (1 - \alpha) \log p_{\theta_0}(y|x) $$

    α = 1 is SPIN, α = 0 a fixed reference. The mixture's normalizer is left out. It cancels in r - r', so the losses of the
    margin are exact; to the others it is a shift of r and r'. With α < 1, iterations after the first do not start at ℓ(0),
    as p_θt is not the reference. With the logistic loss the minimizer is \\( p_{t+1} \propto p_t^\alpha p_0^{1-\alpha}
    (p_{data}/p_t)^{1/\lambda} \\): α < 1 moves the fixed point from \\( p_{data} \\) towards \\( p_0 \\). That the
    reference is the geometric mixture is what summaries of the paper say; its equation we could not check.

    Args:
        opponent_logps (`torch.Tensor`):
            Log-probs under the opponent, p_θt.
        base_logps (`torch.Tensor`):
            Log-probs of the same answers under the SFT model, p_θ0.
        alpha (`float`):
            α, from 0 to 1.

    Returns:
        `torch.Tensor`: Log-probs under the mixture, up to a constant that depends on the prompt alone.
    """
    return alpha * opponent_logps + (1 - alpha) * base_logps


# `loss_type` -> objective, for those that take the two log-ratios and λ
OBJECTIVES = {
    "sigmoid": logistic,
    "hinge": hinge,
    "exponential": exponential,
    "correlation": correlation,
    "space": space,
    "gsil_bernoulli": gsil_bernoulli,
    "gsil_brier": gsil_brier,
    "gsil_hinge": gsil_hinge,
    "gsil_kliep": gsil_kliep,
    "gsil_lsif": gsil_lsif,
    "chi_squared": chi_squared,
}

# These depend on a pair through r - r' alone: a pair of identical answers has zero gradient
MARGIN_LOSSES = frozenset({"sigmoid", "hinge", "exponential", "correlation"})

# Where p_t = p_data, p_data is the one and only minimizer (without a shift): the game ends there, and only there
STRICTLY_PROPER = frozenset(
    {"sigmoid", "exponential", "space", "gsil_bernoulli", "gsil_brier", "gsil_kliep", "gsil_lsif", "chi_squared"}
)
