"""Numbers in fewer bits: groups with a scale and an offset each, and the balance of keys with queries."""

from __future__ import annotations

from dataclasses import dataclass

from . import checks, primitives
from .backend import Backend, resolve
from .errors import ArgumentError
from .types import Array, Namespace

__all__ = ["Precision", "Quantized", "demote", "dequantize", "key_balance", "peaks", "quantize"]

BITS = (2, 3, 4, 8)
# A balance is at least that and at most one over it, so that one odd channel cannot use up the range of all others.
SMALLEST_BALANCE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How demoted tokens are stored.

    Parameters
    ----------
    bits : int
        2, 3, 4 or 8 per number.
    group : int
        Numbers that share a scale and an offset: neighbors along the head size of one token. The last group of a head
        size that is no multiple of it is smaller.
    balanced : bool
        Divide keys, channel by channel, by what `key_balance` returns before they are rounded, and multiply afterwards.

    Raises
    ------
    ArgumentError
        If a number is out of range.
    ArgumentTypeError
        If an option has the wrong type.

    Examples
    --------
    A head of 64 numbers in 4 bits, with a scale and an offset in 16 bits: 32 bytes and 4 more, instead of 128.

    >>> from graphkv import Precision
    >>> Precision(bits=4).row_bytes(64)
    36
    """

    bits: int = 4
    group: int = 64
    balanced: bool = True

    def __post_init__(self) -> None:
        if checks.count("bits", self.bits) not in BITS:
            raise ArgumentError(f"bits must be 2, 3, 4 or 8; got {self.bits}")
        checks.count("group", self.group, minimum=1)
        checks.flag("balanced", self.balanced)

    @property
    def word(self) -> tuple[int, int]:
        """Codes that are packed together without a gap, and the bytes that they take."""
        return (8, 3) if self.bits == 3 else (8 // self.bits, 1)

    def num_groups(self, head_size: int, /) -> int:
        """Return the number of groups that a head is parted into."""
        return -(-head_size // self.group)

    def row_bytes(self, head_size: int, /, *, full_bits: int = 16) -> int:
        """Return the bytes of one key or value, packed.

        Parameters
        ----------
        head_size : int
            D.
        full_bits : int
            Of a scale, of an offset, and of a number that is not demoted. 0 counts the codes alone.

        Returns
        -------
        int
        """
        codes, size = self.word
        return -(-head_size // codes) * size + 2 * self.num_groups(head_size) * full_bits // 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """Numbers as codes: code x scale + offset, with a scale and an offset per group.

    Attributes
    ----------
    codes : array, shape (..., D), uint8
        In [0, 2^bits - 1].
    scale, offset : array, shape (..., groups), float32 or wider
        A step, and the smallest number.
    """

    codes: Array
    scale: Array
    offset: Array


def quantize(x: Array, /, precision: Precision, *, backend: Backend | str | None = None) -> Quantized:
    r"""Round every group of numbers to 2^bits steps between its smallest and its largest.

    .. math:: \alpha = \frac{\max x - \min x}{2^b - 1}, \quad \beta = \min x, \quad
              c = \operatorname{round}\Bigl(\frac{x - \beta}{\alpha}\Bigr), \quad \hat x = \alpha c + \beta

    Parameters
    ----------
    x : array, shape (..., D)
        Half precision and integers are widened to float32.
    precision : Precision
        Its `balanced` has no say here.
    backend : Backend or str, optional
        Default: inferred from the array.

    Returns
    -------
    Quantized
        No number is off by more than half a step, rounding aside; equal numbers are exact; halves are rounded to even
        codes. A group that holds an infinity or NaN has no finite step, and reads back as NaN.

    Raises
    ------
    ArgumentError
        If `x` has no axis.
    ArgumentTypeError
        If `x` is not real or `precision` not a Precision.
    BackendError
        If `x` is not an array of the backend's library.

    References
    ----------
    .. [1] Yang et al., "No Token Left Behind", arXiv:2402.18096, the quantization of the retained cache.

    Examples
    --------
    Steps of (7 - 1) / 3 = 2 from 1 on:

    >>> import numpy as np
    >>> from graphkv import Precision
    >>> from graphkv.core.precision import dequantize, quantize
    >>> found = quantize(np.asarray([1.0, 2.5, 4.5, 7.0]), Precision(bits=2))
    >>> found.codes, found.scale, found.offset
    (array([0, 1, 2, 3], dtype=uint8), array([2.]), array([1.]))
    >>> dequantize(found, Precision(bits=2))
    array([1., 3., 5., 7.])
    """
    backend = resolve(backend, x=x)
    checks.numeric("x", x, "(..., D)", backend=backend)
    checks.instance("precision", precision, Precision)
    xp = backend.xp
    with backend.guarded(x):
        x = primitives.widen(x, xp=xp)
        grouped, top = _grouped(x, precision, xp=xp), 2**precision.bits - 1
        least, most = xp.min(grouped, axis=-1, keepdims=True), xp.max(grouped, axis=-1, keepdims=True)
        scale = (most - least) / top
        steps = xp.round((grouped - least) / xp.where(scale > 0, scale, xp.ones_like(scale)))
        # What cannot be rounded has to have some code.
        codes = xp.where(xp.isfinite(steps), xp.clip(steps, 0, top), xp.zeros_like(steps))
        codes = _ungrouped(xp.astype(codes, xp.uint8), x.shape[-1], xp=xp)
        return Quantized(codes=codes, scale=scale[..., 0], offset=least[..., 0])


def dequantize(quantized: Quantized, /, precision: Precision, *, backend: Backend | str | None = None) -> Array:
    """Read quantized numbers back.

    Parameters
    ----------
    quantized : Quantized
    precision : Precision
        That they were quantized with.
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Returns
    -------
    array, shape (..., D), dtype of the scale

    Raises
    ------
    ArgumentTypeError
        If an argument has the wrong type.
    BackendError
        If the arrays are not all of the backend's library and on one device.
    """
    checks.instance("quantized", quantized, Quantized)
    checks.instance("precision", precision, Precision)
    backend = resolve(backend, codes=quantized.codes, scale=quantized.scale, offset=quantized.offset)
    xp, codes = backend.xp, quantized.codes
    with backend.guarded(codes):
        grouped = _grouped(xp.astype(codes, quantized.scale.dtype), precision, xp=xp)
        numbers = grouped * quantized.scale[..., None] + quantized.offset[..., None]
        return _ungrouped(numbers, codes.shape[-1], xp=xp)


def _grouped(x: Array, precision: Precision, /, *, xp: Namespace) -> Array:
    """Part the last axis into groups (..., groups, group); the last number fills up the last group."""
    size = x.shape[-1]
    # A group larger than the head is the head.
    group = max(1, min(precision.group, size))
    missing = -size % group
    if missing:
        x = xp.concat([x, xp.broadcast_to(x[..., -1:], (*x.shape[:-1], missing))], axis=-1)
    return xp.reshape(x, (*x.shape[:-1], (size + missing) // group, group))


def _ungrouped(x: Array, size: int, /, *, xp: Namespace) -> Array:
    """Join groups (..., groups, group) to the first numbers of a row (..., size)."""
    return xp.reshape(x, (*x.shape[:-2], x.shape[-2] * x.shape[-1]))[..., :size]


def peaks(x: Array, valid: Array | None = None, /, *, xp: Namespace) -> Array:
    """Find the largest absolute value of every channel.

    Parameters
    ----------
    x : array, shape (..., N, D), float32 or wider
    valid : array, shape (..., N), bool, optional
        False for tokens that do not count.
    xp : namespace

    Returns
    -------
    array, shape (..., D)
        0 without a token.
    """
    sizes = xp.abs(x)
    if valid is not None:
        sizes = xp.where(valid[..., None], sizes, xp.zeros_like(sizes))
    # So that there is something to take the maximum of.
    nothing = xp.zeros((*x.shape[:-2], 1, x.shape[-1]), dtype=x.dtype, device=primitives.device_of(x))
    return xp.max(xp.concat([sizes, nothing], axis=-2), axis=-2)


def key_balance(query_peaks: Array, key_peaks: Array, /, *, xp: Namespace) -> Array:
    r"""Compute what each channel of the keys is multiplied by before it is rounded.

    .. math:: b_c = \sqrt{\max_t |q_{tc}| / \max_t |k_{tc}|}

    A query divided by it meets a key multiplied by it at the same logit, and both have channels of the same size. So a
    channel that the queries hardly use does not widen the steps of the others.

    Parameters
    ----------
    query_peaks : array, shape (batch, kv_heads, D), float32 or wider
        `peaks` of the queries of all query heads of a KV head.
    key_peaks : array, shape (batch, kv_heads, D), float32 or wider
    xp : namespace

    Returns
    -------
    array, shape (batch, kv_heads, D)
        In [0.01, 100]; 1 for a channel whose keys are all 0, or that holds an infinity or NaN.

    References
    ----------
    .. [1] Yang et al., "No Token Left Behind", arXiv:2402.18096, the outlier-aware channel balancer.

    Examples
    --------
    The keys' outlier meets small queries: sqrt(0.5 / 50) = 0.1 makes it 5, as large as the queries then are.

    >>> import numpy as np
    >>> from graphkv.core.precision import key_balance
    >>> key_balance(np.asarray([[[0.5, 2.0]]]), np.asarray([[[50.0, 2.0]]]), xp=np)
    array([[[0.1, 1. ]]])
    """
    one = xp.ones_like(key_peaks)
    balance = xp.sqrt(query_peaks / xp.where(key_peaks > 0, key_peaks, one))
    is_usable = xp.isfinite(balance) & xp.isfinite(key_peaks) & (key_peaks > 0)
    return xp.where(is_usable, xp.clip(balance, SMALLEST_BALANCE, 1 / SMALLEST_BALANCE), one)


def demote(
    x: Array,
    levels: Array,
    /,
    precision: Precision,
    *,
    balance: Array | None = None,
    backend: Backend | str | None = None,
) -> Array:
    """Return keys or values as they read once the demoted ones have been stored in fewer bits.

    Parameters
    ----------
    x : array, shape (batch, kv_heads, b, D)
        Of the kept tokens: ``Eviction.apply(keys)``.
    levels : array, shape (batch, kv_heads, b), integer
        ``Eviction.levels``.
    precision : Precision
    balance : array, shape (batch, kv_heads, D), optional
        For keys: what `key_balance` returned. Default: all 1.
    backend : Backend or str, optional
        Default: inferred from the arrays.

    Returns
    -------
    array, shape (batch, kv_heads, b, D), float32 or wider
        Tokens of level 0 are as they were.

    Raises
    ------
    ArgumentError
        If shapes disagree.
    ArgumentTypeError
        If an argument has the wrong type.
    BackendError
        If the arrays are not all of the backend's library and on one device.
    """
    backend = resolve(backend, x=x, levels=levels, balance=balance)
    shape = checks.numeric("x", x, "(batch, kv_heads, b, D)", ndim=4, backend=backend)
    checks.integers("levels", levels, backend=backend)
    checks.same_leading("levels", tuple(levels.shape), shape[:3], "x")
    xp = backend.xp
    if balance is not None:
        checks.numeric("balance", balance, "(batch, kv_heads, D)", ndim=3, backend=backend)
        checks.same_leading("balance", tuple(balance.shape), (*shape[:2], shape[3]), "x")
    with backend.guarded(x):
        x = primitives.widen(x, xp=xp)
        factor = None if balance is None else xp.astype(balance, x.dtype)[:, :, None, :]
        stored = quantize(x if factor is None else x * factor, precision, backend=backend)
        read = dequantize(stored, precision, backend=backend)
        return xp.where((levels > 0)[..., None], read if factor is None else read / factor, x)
