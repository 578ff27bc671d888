"""Figures of a rollout that need no model: rewards, lengths, repetition; and of memory."""

import resource
from collections.abc import Sequence

import jax
import numpy as np

from refine_af.requests import Completion, TokenIds
from refine_af.rewards import Judgement


def of(completions: Sequence[Completion], judgements: Sequence[Judgement]) -> dict[str, float]:
    """Means over the answers, of components over those that have them; lengths in tokens.

    Deviations are the biased ones.
    """
    scores = np.asarray([j.reward for j in judgements])
    lengths = np.asarray([len(c.token_ids) for c in completions])
    usable = [j.components for j in judgements if j.components is not None]
    means = {
        f"reward/{name}": float(np.mean([c[name] for c in usable]))
        for name in (usable[0] if usable else ())
    }
    return {
        **means,
        "reward/mean": float(scores.mean()),
        "reward/std": float(scores.std()),
        "reward/usable_share": len(usable) / len(judgements),
        "length/mean": float(lengths.mean()),
        "length/std": float(lengths.std()),
        "length/max": float(lengths.max()),
        "length/eos_rate": float(np.mean([c.finish_reason == "stop" for c in completions])),
        "repetition": float(np.mean([_repetition(c.token_ids) for c in completions])),
    }


def _repetition(ids: TokenIds) -> float:
    """`1 - distinct / all` 4-grams (seq-rep-4 of Welleck et al., arXiv 1908.04319); 0 of none."""
    grams = list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def peak_memory() -> float:
    """Most memory so far in GiB: of the first device, or of the process where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    known = stats.get("peak_bytes_in_use")
    return (known or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30
