"""Proximal policy optimisation as pure functions of one answer (a trajectory of T tokens).

The caller vmaps over answers. `mask` is 1 on the answer's tokens and 0 on padding after them;
every sum runs over masked tokens in float32, and the caller divides by a global token count, so
that cutting a batch into pieces changes nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_MAX_LOG_RATIO = 20.0  # exp of more overflows half precision and says nothing new


def kl_k1(logprobs: Float[Array, "*T"], ref_logprobs: Float[Array, "*T"]) -> Float[Array, "*T"]:
    """Estimate `log pi - log ref` of KL(pi || ref) at tokens drawn from pi: unbiased, any sign.

    Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
    """
    return logprobs - ref_logprobs


def kl_k3(logprobs: Float[Array, "*T"], ref_logprobs: Float[Array, "*T"]) -> Float[Array, "*T"]:
    """Estimate `r - 1 - log r`, `r = ref / pi`, of KL(pi || ref): unbiased, never negative.

    Same source as `kl_k1`. Written as `expm1(d) - d`: `exp(d) - d - 1` loses every digit in
    float32 when d is small. Log ratios count as 20 at most, either way: beyond, it is too small.
    """
    d = jnp.clip(ref_logprobs - logprobs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return jnp.expm1(d) - d


def shaped_rewards(
    score: Float[Array, ""],
    logprobs: Float[Array, "T"],
    ref_logprobs: Float[Array, "T"],
    mask: Float[Array, "T"],
    kl_coef: Float[Array, ""] | float,
) -> Float[Array, "T"]:
    """Per-token rewards `-kl_coef * (log pi - log ref)`, plus the score on the last token.

    InstructGPT, arXiv 2203.02155, section 3.5; per token as in arXiv 1909.08593.
    """
    position = jnp.arange(mask.shape[0], dtype=jnp.int32)
    last = position == jnp.sum(mask).astype(jnp.int32) - 1
    return (jnp.where(last, score, 0.0) - kl_coef * kl_k1(logprobs, ref_logprobs)) * mask


def gae(
    rewards: Float[Array, "T"],
    values: Float[Array, "T"],
    mask: Float[Array, "T"],
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "T"], Float[Array, "T"]]:
    """Generalised advantage estimates and returns (arXiv 1506.02438, eq. 16).

    `delta_t = r_t + gamma V_{t+1} - V_t`, `A_t = delta_t + gamma lam A_{t+1}`, `R_t = A_t + V_t`;
    the value after the last token is 0. All are 0 outside the mask.

    Args:
        gamma: discount in [0, 1]. lam: trade of bias for variance in [0, 1]; 1 gives
            `A = discounted return - V`.
    """
    values = values * mask
    following = jnp.append(values[1:], 0.0)
    deltas = (rewards + gamma * following - values) * mask

    def step(carry: Array, delta: Array) -> tuple[Array, Array]:
        advantage = delta + gamma * lam * carry
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros((), values.dtype), deltas, reverse=True)
    advantages = advantages * mask
    return advantages, advantages + values


def whiten(
    values: Float[Array, "*B T"], mask: Float[Array, "*B T"], *, shift_mean: bool = True
) -> Float[Array, "*B T"]:
    """Masked values scaled to unit variance over the whole batch, and to zero mean if asked.

    The variance is the biased one; 1e-8 is added to it. 0 outside the mask.
    """
    count = jnp.maximum(jnp.sum(mask), 1.0)
    mean = jnp.sum(values * mask) / count
    variance = jnp.sum(((values - mean) ** 2) * mask) / count
    scaled = (values - mean) * jax.lax.rsqrt(variance + 1e-8)
    return (scaled if shift_mean else scaled + mean) * mask


def rloo(rewards: Float[Array, "G"]) -> Float[Array, "G"]:
    """Each reward less the mean of the others (REINFORCE leave-one-out, arXiv 2402.14740, eq. 4).

    Args:
        rewards: of G >= 2 answers to one prompt, the KL penalty of the whole answer included.
    """
    count = rewards.shape[0]
    return (rewards - jnp.mean(rewards)) * (count / (count - 1))


def grpo(rewards: Float[Array, "G"]) -> Float[Array, "G"]:
    """Each reward less the group's mean, over its deviation (GRPO, arXiv 2402.03300, sec. 4.1.2).

    The deviation is the unbiased one, and 1e-4 is added to it.

    Args:
        rewards: of G >= 2 answers to one prompt.
    """
    return (rewards - jnp.mean(rewards)) / (jnp.std(rewards, ddof=1) + 1e-4)


class Moments(NamedTuple):
    """Of all numbers seen so far; float32 scalars."""

    total: Float[Array, ""]  # of numbers
    mean: Float[Array, ""]
    squares: Float[Array, ""]  # sum of squared distances from the mean

    def add(self, x: Float[Array, "N"]) -> "Moments":
        """With N more numbers (Chan, Golub & LeVeque, 1979, eq. 2.1); all of them or, where one is
        not finite, none.
        """
        total, mean = self.total + x.shape[0], jnp.mean(x)
        apart = mean - self.mean
        new = Moments(
            total,
            self.mean + apart * x.shape[0] / total,
            self.squares + jnp.sum((x - mean) ** 2) + apart**2 * self.total * x.shape[0] / total,
        )
        finite = jnp.all(jnp.isfinite(x))
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, self)

    def scale(self, x: Float[Array, "N"]) -> Float[Array, "N"]:
        """`(x - mean) / deviation`."""
        return (x - self.mean) * jax.lax.rsqrt(self.squares / jnp.maximum(self.total, 1.0) + 1e-8)


class PolicyLoss(NamedTuple):
    """Sums over the masked tokens of one answer, float32 scalars but for `ratio_max`."""

    loss: Float[Array, ""]
    clipped: Float[Array, ""]  # tokens where the clipped objective is the active one
    approx_kl: Float[Array, ""]  # .5 (log pi - log old)^2
    ratio_max: Float[Array, ""]  # largest ratio


def policy_loss(
    logprobs: Float[Array, "T"],
    old_logprobs: Float[Array, "T"],
    advantages: Float[Array, "T"],
    mask: Float[Array, "T"],
    clip_eps: float,
    dual_clip: float = 0.0,
) -> PolicyLoss:
    """Clipped surrogate (arXiv 1707.06347, eq. 7), to be minimised.

    `-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A)` with `ratio = exp(log pi - log old)`, whose
    logarithm counts as 20 at most, either way.

    Args:
        old_logprobs: of the policy that drew the tokens; constants, not recomputed with the
            current weights (the ratio would be 1 for ever).
        clip_eps: greater than 0.
        dual_clip: c > 1 bounds the loss of a token with A < 0 by `-c A`, whatever its ratio (arXiv
            1912.09729, eq. 5); 0: no bound.
    """
    log_ratio = jnp.clip(logprobs - old_logprobs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = jnp.exp(log_ratio)
    plain = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps)
    loss, active = jnp.maximum(plain, clipped), clipped > plain
    if dual_clip:
        bound = jnp.where(advantages < 0, -dual_clip * advantages, jnp.inf)
        loss, active = jnp.minimum(loss, bound), active | (loss > bound)
    return PolicyLoss(
        loss=jnp.sum(loss * mask),
        clipped=jnp.sum(active * mask),
        approx_kl=jnp.sum(0.5 * log_ratio**2 * mask),
        ratio_max=jnp.max(jnp.where(mask > 0, ratio, 0.0)),
    )


class ValueLoss(NamedTuple):
    """Sums over the masked tokens of one answer, float32 scalars."""

    loss: Float[Array, ""]
    clipped: Float[Array, ""]  # tokens where the clipped value's loss is the larger one


def value_loss(
    values: Float[Array, "T"],
    old_values: Float[Array, "T"],
    returns: Float[Array, "T"],
    mask: Float[Array, "T"],
    clip_eps: float,
) -> ValueLoss:
    """`.5 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)`, summed over the mask.

    Implementation detail of OpenAI's PPO; Huang et al., "The 37 implementation details of PPO".
    """
    near = jnp.clip(values, old_values - clip_eps, old_values + clip_eps)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    return ValueLoss(
        loss=jnp.sum(0.5 * jnp.maximum(plain, clipped) * mask),
        clipped=jnp.sum((clipped > plain) * mask),
    )


def adapt_kl_coef(
    kl_coef: Float[Array, ""],
    kl: Float[Array, ""],
    target: float,
    horizon: int,
    batch_size: int,
) -> Float[Array, ""]:
    """Adaptive controller (arXiv 1909.08593, section 2.2): steer the KL of an answer to `target`.

    `coef *= 1 + clip(kl / target - 1, -.2, .2) * batch_size / horizon`; a KL of NaN leaves it.
    """
    error = jnp.where(jnp.isnan(kl), 0.0, jnp.clip(kl / target - 1.0, -0.2, 0.2))
    return kl_coef * (1.0 + error * batch_size / horizon)


def explained_variance(
    values: Float[Array, "*B T"], returns: Float[Array, "*B T"], mask: Float[Array, "*B T"]
) -> Float[Array, ""]:
    """`1 - Var[R - V] / Var[R]` over the mask: 1 is a perfect critic, 0 a useless one."""
    count = jnp.maximum(jnp.sum(mask), 1.0)

    def variance(x: Array) -> Array:
        mean = jnp.sum(x * mask) / count
        return jnp.sum((x - mean) ** 2 * mask) / count

    return 1.0 - variance(returns - values) / jnp.maximum(variance(returns), 1e-8)
