"""RocketKV's split of a budget between what is evicted once and what each step leaves out, in whole numbers."""

from __future__ import annotations

from math import isqrt, log2
from typing import NamedTuple

from ..core import checks

__all__ = ["Split", "split"]


class Split(NamedTuple):
    """How RocketKV spends a budget of tokens per step.

    Attributes
    ----------
    first_stage : int
        S1, tokens that the eviction of the prompt leaves.
    page : int
        Tokens per page of the second stage.
    channels : int
        Channels of a key that its approximate scores read.
    chosen : int
        Tokens that a step attends to. The other half of its budget pays for the scores.
    """

    first_stage: int
    page: int
    channels: int
    chosen: int


def split(num_tokens: int, budget: int, /, *, head_size: int = 128, max_new_tokens: int = 0) -> Split:
    r"""Split the ratio S / T of tokens and budget between both stages.

    .. math:: c = S / T, \quad \alpha = \min(0.2 + 0.06 \log_2 c, 0.8), \quad S_1 = \lfloor S / c^\alpha \rfloor

    and of what is left, c' = S1 / T, pages of p = ceil(sqrt c') tokens and floor(D p / c') channels take their shares.

    Parameters
    ----------
    num_tokens : int
        S, tokens of the prompt.
    budget : int
        T, tokens that one step of decoding may read. S or more leave everything.
    head_size : int
        D.
    max_new_tokens : int
        Twice as many tokens, if there are so many, stay after the first stage at least.

    Returns
    -------
    Split

    Raises
    ------
    ArgumentError
        If a number is out of range.
    ArgumentTypeError
        If one is not an integer.

    Notes
    -----
    Only the first stage is an eviction, see `graphkv.SnapKV.rocketkv`; the second is sparse attention, which needs a
    kernel. Written from the formulas alone: the license of the public code does not allow its use here.

    References
    ----------
    .. [1] Behnam et al., "RocketKV: Accelerating Long-Context LLM Inference via Two-Stage KV Cache Compression",
       arXiv:2502.14051, section on the split of the compression ratio.

    Examples
    --------
    c = 64 and alpha = 0.56, so that 32768 / 64^0.56 = 3191.6 tokens stay. Then c' = 6.23: pages of 3, and 61 channels.

    >>> split(32768, 512)
    Split(first_stage=3191, page=3, channels=61, chosen=256)
    """
    num_tokens, budget = checks.count("num_tokens", num_tokens, minimum=1), checks.count("budget", budget, minimum=1)
    head_size = checks.count("head_size", head_size, minimum=1)
    least = min(2 * checks.count("max_new_tokens", max_new_tokens), num_tokens)
    ratio = num_tokens / budget
    kept = num_tokens
    if ratio > 1:
        alpha = min(0.2 + 0.06 * log2(ratio), 0.8)
        kept = max(least, int(num_tokens / ratio**alpha))
    page = isqrt(-(-kept // budget) - 1) + 1
    if page * budget > kept:
        page = 1
    return Split(kept, page, min(head_size, head_size * page * budget // kept), budget // 2)
