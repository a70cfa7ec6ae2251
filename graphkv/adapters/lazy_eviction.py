"""LazyEviction: keep the tokens that are due to be attended to again, by their own rhythm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ..core import checks
from ..core.errors import ArgumentError
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.policy import Requirements
from ..core.protection import Protection
from ..core.types import Array, Namespace
from . import running
from .protection import SinkPolicy

__all__ = ["LazyEviction", "active_steps", "recurrence", "recurrence_importance", "steps_cost"]

STATE = ("gap", "idle")


def active_steps(layer: Layer, alpha: float, block_size: int, /) -> Iterator[tuple[Array, Array]]:
    """Yield which tokens the new positions attend to, a block of positions at a time.

    Parameters
    ----------
    layer : Layer
        With queries, or attention rows.
    alpha : float
        Above 0: the least attention, of any query head of a KV head, that makes a token active.
    block_size : int
        Positions per block.

    Yields
    ------
    tuple of array, shapes (batch, kv_heads, block, E) and (batch, kv_heads, block), bool
        As `recurrence` takes them.
    """
    for rows in running.new_rows(layer, block_size):
        block, end = rows.shape[-2:]
        yield layer.xp.any(rows >= alpha, axis=2), layer.valid[:, :, end - block : end]


def recurrence(idle: Array, gap: Array, is_active: Array, asks: Array, /, *, xp: Namespace) -> tuple[Array, Array]:
    """Let some steps pass: how long each token has been idle after them, and its longest time of rest so far.

    Clocks are relative, so that they need no common zero: at each step every token that is there gets older by 1, a new
    one from 0, and an active token is idle for 0 steps again.

    Parameters
    ----------
    idle, gap : array, shape (..., N)
        Steps since the token was active last, and the most that they have been when it became active. 0 for new tokens.
    is_active : array, shape (..., Q, E), bool
        Which of the first E tokens each of Q steps attends to; the step's own token is number E - Q + step.
    asks : array, shape (..., Q), bool
        False for a step that is padding: no time passes.

    Returns
    -------
    tuple of array, shape (..., N)

    Examples
    --------
    Two tokens, the second of them new. The first was idle for 3 steps and has waited 4 already; the second sees itself:

    >>> import numpy as np
    >>> idle, gap = np.asarray([[3.0, 0.0]]), np.asarray([[2.0, 0.0]])
    >>> recurrence(idle, gap, np.asarray([[[True, True]]]), np.asarray([[True]]), xp=np)
    (array([[0., 0.]]), array([[4., 1.]]))
    """
    block, end = is_active.shape[-2:]
    step = xp.astype(asks, idle.dtype)
    # The time of each step, counted from before the first of them.
    clock = xp.astype(xp.cumulative_sum(xp.astype(asks, xp.int64), axis=-1), idle.dtype)
    arrived = xp.concat([-idle[..., : end - block], clock - step], axis=-1)[..., None, :]
    now = clock[..., :, None]
    seen = xp.where(is_active, now, xp.full_like(now, -xp.inf))
    last = _running_maximum(xp.concat([arrived, seen], axis=-2), xp=xp)
    waited = xp.max(xp.where(is_active, now - last[..., :-1, :], xp.zeros_like(seen)), axis=-2)
    return (
        xp.concat([clock[..., -1:] - last[..., -1, :], idle[..., end:]], axis=-1),
        xp.concat([xp.maximum(gap[..., :end], waited), gap[..., end:]], axis=-1),
    )


def recurrence_importance(idle: Array, gap: Array, /, *, shift: bool, xp: Namespace) -> Array:
    r"""Score tokens by how overdue they are and how often they come back.

    Parameters
    ----------
    idle, gap : array, shape (..., N)
        As for `recurrence`.
    shift : bool
        Subtract 1 in the first sigmoid, as the public code does.

    Returns
    -------
    array, shape (..., N)
        In [0, 2].

    Examples
    --------
    >>> import numpy as np
    >>> idle, gap = np.asarray([0.0, 5.0, 50.0, 50.0]), np.asarray([1.0, 5.0, 50.0, 10.0])
    >>> recurrence_importance(idle, gap, shift=True, xp=np).round(5)
    array([1.53788, 0.27438, 0.23841, 0.00519])
    >>> recurrence_importance(idle, gap, shift=False, xp=np).round(5)
    array([2.     , 0.57386, 0.53788, 0.01363])
    """
    overdue = _twice_sigmoid(int(shift) + idle / (gap + 1e-5), xp=xp)
    often = _twice_sigmoid(xp.maximum(gap - 1, xp.zeros_like(gap)), xp=xp)
    return overdue + xp.where(gap > 0, often, xp.zeros_like(gap))


def _twice_sigmoid(x: Array, /, *, xp: Namespace) -> Array:
    """Return 2 sigmoid(-x) for x >= 0, where exp(-x) cannot overflow."""
    small = xp.exp(-x)
    return 2 * small / (1 + small)


def _running_maximum(x: Array, /, *, xp: Namespace) -> Array:
    """Return the maximum so far along the last axis but one: doubling, because the standard has no cumulative one."""
    reach = 1
    while reach < x.shape[-2]:
        x = xp.concat([x[..., :reach, :], xp.maximum(x[..., reach:, :], x[..., :-reach, :])], axis=-2)
        reach *= 2
    return x


def steps_cost(shape: LayerShape, block_size: int, /) -> Cost:
    """Return the cost of the attention of all positions, and of their steps; in memory is one block of rows."""
    pairs = shape.batch * shape.num_tokens * (shape.num_tokens + 1) // 2
    block = shape.batch * shape.query_heads * min(block_size, shape.num_tokens) * shape.num_tokens
    return Cost(pairs * (shape.query_heads * (2 * shape.head_size + 7) + 8 * shape.kv_heads), 4 * block)


@dataclass(frozen=True, kw_only=True)
class LazyEviction(SinkPolicy):
    r"""Keep the newest tokens and those that are attended to again and again, as long as they are not overdue.

    A token is active at a step whose query gives it attention of at least `alpha`, from any query head of its KV head.
    With :math:`e` the steps since it was active last and :math:`M` the most steps that it has ever waited, its
    importance is

    .. math:: 2 \sigma\left(-\frac{e}{M}\right) + [M > 0] \, 2 \sigma(1 - M).

    Made for decoding, one eviction per window: ``evicting(model, LazyEviction(budget=512, window=64), every=64)``. So
    every token is watched for a whole window before it can go, and a layer stores at most its budget and a window.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, window and sinks included; a float is a share of the tokens.
    window : int
        W, the newest tokens, which are always kept. The paper measures it: the 80th percentile of the waiting times.
    alpha : float
        Above 0 and at most 1. The paper tunes it per model: 5e-4 or 1e-4.
    shift : bool
        :math:`2 \sigma(-1 - e / M)` for the first term, as the public code has it. The order by that term is the same,
        but the second weighs more.
    read_prompt : bool
        Count the positions of the first call, the prompt, as steps too. False: its tokens begin without a past, as in
        the public code; then nothing is known that could rank them until the next call.
    num_sinks : int
        First tokens that are kept as well.
    block_size : int
        Queries whose attention is in memory at a time. It changes nothing but rounding.

    Raises
    ------
    ArgumentError
        If an option is out of range; when evicting, if fewer queries (or attention rows) than new positions are given,
        or no state and no queries, or the state of another policy.
    ArgumentTypeError
        If an option has the wrong type.

    Notes
    -----
    State: ``"idle"``, which is :math:`e`, and ``"gap"``, which is :math:`M`, each (batch, kv_heads, N), whole numbers.
    The paper keeps the step of the last activity instead; a difference needs no clock. A new token arrives a step
    before its own, so one that attends to itself has :math:`M = 1`. :math:`M` is increased by 1e-5 before it divides,
    as in the public code: where it is 0, the first term is 0 unless the token is a prompt's at its first step. There
    the paper prints 0/0. Padding is no step.

    The public code stores keys per query head and tracks each of them; here a KV head's query heads are taken together.
    It never evicts right after the prompt, as ``every=`` does where the prompt exceeds the budget; with
    ``protect_prompt=True`` that cannot happen. `official` has its formula and its start. Notes in circulation have a
    second term that rises with :math:`M`; the public code's, and this one, fall.

    References
    ----------
    .. [1] Zhang et al., "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long
       Reasoning", arXiv:2506.15969.

    Examples
    --------
    Three steps after a prompt of two tokens. Token 0 is active at each (waits of 1), token 1 at the last (a wait of 3),
    tokens 2 and 3 only at their own. Token 4 is the window:

    >>> import numpy as np
    >>> from graphkv import LazyEviction, evict, observe
    >>> policy = LazyEviction(budget=3, window=1, alpha=0.1, read_prompt=False)
    >>> start = observe(policy, np.ones((1, 1, 2, 2)), attention=np.eye(2)[None, None])
    >>> rows = [[0.5, 0, 0.5, 0, 0], [0.5, 0, 0, 0.5, 0], [0.4, 0.3, 0, 0, 0.3]]
    >>> done = evict(policy, np.ones((1, 1, 5, 2)), attention=np.asarray([[rows]]), state=start)
    >>> done.importance.round(3), done.kept
    (array([[[2.   , 1.238, 1.238, 1.538, 2.   ]]]), array([[[0, 3, 4]]]))
    """

    requirements: ClassVar[Requirements] = Requirements(queries="new", state=STATE)

    window: int = 52
    alpha: float = 5e-4
    shift: bool = False
    read_prompt: bool = True
    block_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("window", self.window)
        if checks.fraction("alpha", self.alpha) == 0:
            raise ArgumentError(f"alpha must be above 0; got {self.alpha}")
        checks.flag("shift", self.shift)
        checks.flag("read_prompt", self.read_prompt)
        checks.count("block_size", self.block_size, minimum=1)

    @classmethod
    def official(cls, budget: int, /, *, window: int, alpha: float) -> LazyEviction:
        """Return the public code's formula, with tokens of the prompt that begin without a past.

        Its window trigger is ``every=window``. Stores per query head are not expressed.

        Parameters
        ----------
        budget, window : int
            Its capacity, and its observation window: 52 for a Llama of 8B parameters on MATH; 101, 175 and 363 for a
            Qwen of 7B on GSM8K, MATH and AIME.
        alpha : float
            5e-4 for the Llama, 1e-4 for the Qwen.

        Returns
        -------
        LazyEviction
        """
        return cls(budget=budget, window=window, alpha=alpha, shift=True, read_prompt=False)

    def protection(self, budget: int, /) -> Protection:
        """Protect the window and the sinks."""
        return Protection(first=self.num_sinks, last=self.window)

    def num_queries(self, num_tokens: int, /) -> int:
        """Return N; after the first call the queries of the new positions are enough."""
        return num_tokens

    def observe(self, layer: Layer, memory: Memory | None, /) -> Memory:
        """Let the new positions pass, one step each."""
        xp = layer.xp
        gap, idle = (running.grown(memory, layer, name) for name in STATE)
        if memory is not None or self.read_prompt:
            for is_active, asks in active_steps(layer, self.alpha, self.block_size):
                idle, gap = recurrence(idle, gap, is_active, asks, xp=xp)
        return Memory(tokens={"gap": gap, "idle": idle})

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Weigh how overdue a token is, and how often it comes back."""
        sums = running.sums_of(memory)
        return recurrence_importance(sums["idle"], sums["gap"], shift=self.shift, xp=layer.xp)

    def cost(self, shape: LayerShape, /) -> Cost:
        """Attend once more: half of N x N logits of 2 D, their softmax, and the steps. In memory: one block of rows."""
        return steps_cost(shape, self.block_size)
