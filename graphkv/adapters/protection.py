"""Protection that several policies share: the first tokens, the newest ones, and an observation window."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ..core import checks, primitives
from ..core.errors import ArgumentError
from ..core.policy import LayerInputs, Policy, Requirements
from ..core.types import Array, Namespace
from . import attention

__all__ = ["SinkPolicy", "WindowPolicy", "newest_tokens"]


def newest_tokens(valid: Array, num_recent: int, /, *, xp: Namespace) -> Array:
    """Mark the last `num_recent` tokens of each row that are not padding."""
    number = xp.sum(xp.astype(valid, xp.int64), axis=-1, keepdims=True)
    return valid & (attention.token_rank(valid, xp=xp) >= number - num_recent)


@dataclass(frozen=True, kw_only=True)
class SinkPolicy(Policy):
    """A policy that keeps the first tokens of every row.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, sinks included; a float is a share of the tokens.
    num_sinks : int
        First tokens, padding not counted, that are kept before all others.
    """

    num_sinks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("num_sinks", self.num_sinks)

    def num_protected(self, budget: int, /) -> int:
        """Count the sinks."""
        return self.num_sinks

    def protect(self, inputs: LayerInputs, /) -> Array:
        """Protect the sinks."""
        return attention.first_tokens(inputs.valid, self.num_sinks, xp=inputs.xp)


@dataclass(frozen=True, kw_only=True)
class WindowPolicy(SinkPolicy):
    """A policy that keeps the last tokens, and scores the past by the attention that their queries give it.

    Parameters
    ----------
    budget : int or float
        Tokens to keep per KV head, window and sinks included; a float is a share of the tokens.
    window : int
        W, the observation window. A prompt shorter than that is all window.
    kernel_size : int
        Odd width of the pooling.
    num_sinks : int
        First tokens that are kept as well.
    """

    requirements: ClassVar[Requirements] = Requirements(
        queries="window", flops=attention.window_flops, bytes=attention.window_bytes
    )

    window: int = 32
    kernel_size: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("window", self.window, minimum=1)
        if checks.count("kernel_size", self.kernel_size, minimum=1) % 2 == 0:
            raise ArgumentError(f"kernel_size must be odd; got {self.kernel_size}")

    @abstractmethod
    def score_past(self, inputs: LayerInputs, window: int, /) -> Array:
        """Score the tokens before the window.

        Parameters
        ----------
        inputs : LayerInputs
            One layer.
        window : int
            W, at most N.

        Returns
        -------
        array, shape (batch, kv_heads, N - W)
        """

    def num_queries(self, num_tokens: int, /) -> int:
        """Ask for the window's queries."""
        return min(self.window, num_tokens)

    def num_protected(self, budget: int, /) -> int:
        """Count window and sinks."""
        return self.window + self.num_sinks

    def score(self, inputs: LayerInputs, /) -> Array:
        """Score the past; inside the window, the importance is the place."""
        xp, window = inputs.xp, self.num_queries(inputs.num_tokens)
        past = self.score_past(inputs, window)
        place = xp.arange(1, window + 1, dtype=past.dtype, device=primitives.device_of(past))
        return xp.concat([past, xp.broadcast_to(place, (*past.shape[:-1], window))], axis=-1)

    def protect(self, inputs: LayerInputs, /) -> Array:
        """Protect the window and the first tokens."""
        xp, num_tokens = inputs.xp, inputs.num_tokens
        position = xp.arange(num_tokens, dtype=xp.int64, device=primitives.device_of(inputs.keys))
        in_window = position >= num_tokens - self.num_queries(num_tokens)
        return inputs.valid & (in_window[None, None, :] | attention.first_tokens(inputs.valid, self.num_sinks, xp=xp))
