"""Protection that several policies share: the first tokens, the newest ones, and an observation window."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from ..core import checks, primitives
from ..core.errors import ArgumentError
from ..core.layer import Cost, Layer, LayerShape, Memory
from ..core.policy import Policy, Requirements
from ..core.protection import Protection
from ..core.types import Array
from . import attention

__all__ = ["SinkPolicy", "WindowPolicy"]


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

    def protection(self, budget: int, /) -> Protection:
        """Protect the sinks."""
        return Protection(first=self.num_sinks)


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

    requirements: ClassVar[Requirements] = Requirements(queries="window")
    # Whether the method says what an even kernel, which has no middle, is to look at.
    even_kernels: ClassVar[bool] = False

    window: int = 32
    kernel_size: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.count("window", self.window, minimum=1)
        if checks.count("kernel_size", self.kernel_size, minimum=1) % 2 == 0 and not self.even_kernels:
            raise ArgumentError(f"kernel_size must be odd; got {self.kernel_size}")

    @abstractmethod
    def score_past(self, layer: Layer, window: int, /) -> Array:
        """Score the tokens before the window.

        Parameters
        ----------
        layer : Layer
            One layer.
        window : int
            W, at most N.

        Returns
        -------
        array, shape (batch, kv_heads, N - W)
        """

    def num_queries(self, num_tokens: int, /) -> int:
        """Return the window's length."""
        return min(self.window, num_tokens)

    def protection(self, budget: int, /) -> Protection:
        """Protect the window and the first tokens."""
        return Protection(first=self.num_sinks, window=self.window)

    def score(self, layer: Layer, memory: Memory | None, /) -> Array:
        """Score the past; inside the window, the importance is the place."""
        xp, window = layer.xp, self.num_queries(layer.num_tokens)
        past = self.score_past(layer, window)
        place = xp.arange(1, window + 1, dtype=past.dtype, device=primitives.device_of(past))
        return xp.concat([past, xp.broadcast_to(place, (*past.shape[:-1], window))], axis=-1)

    def cost(self, shape: LayerShape, /) -> Cost:
        """Return the cost of the window's attention."""
        return attention.window_cost(shape, self.window)
