"""Rotation of cached keys to other positions, as the model itself was seen to rotate them.

Model files rotate keys in many ways: whole heads or a part of them, halves or neighbors, in some layers or none, by
one position per token or by three, and an attention function learns none of it. So nothing is inferred from names
of models: what turned the keys is read where the attention module has it, in the call that is going on, and the module
is run once on an input of our own to see which numbers of a key it turns together. What does not fit is refused.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from types import CodeType, NoneType
from typing import Any

import torch
from torch.nn import Module

from ...core.errors import ArgumentError
from . import versions

__all__ = ["UNKNOWN", "Rotation", "check", "contiguous", "from_plain", "look", "rotate"]

# The place of a token that could not be found.
UNKNOWN = torch.iinfo(torch.int64).min
# Positions that frequencies are measured at: products with powers of two are exact in float32.
FAR = tuple(2**power for power in range(0, 21, 4))
AXES = (4, 3, 2)


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """How a layer turns its keys: numbers `first` and `second` of a key by the angle in `columns`, pair by pair.

    Attributes
    ----------
    first, second, columns : tuple of int
        One per pair; empty where keys are not turned.
    frequencies : tuple of tuple of float
        Angle per position, for each axis of the positions and each column of the model's cosines.
    scaling : float
        What turned numbers are multiplied by as well, as YaRN does.
    refusal : str or None
        Why keys of this layer cannot be turned.
    """

    first: tuple[int, ...] = ()
    second: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    frequencies: tuple[tuple[float, ...], ...] = ()
    scaling: float = 1.0
    refusal: str | None = None

    def angles(self, places: torch.Tensor, columns: Sequence[int] | None = None) -> torch.Tensor:
        """Compute the angle in all or some columns, in float32 as models do, from places of shape (..., axes)."""
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=places.device)
        if columns is not None:
            frequencies = frequencies[:, torch.tensor(columns, device=places.device)]
        along = (place[..., None].float() * each for place, each in zip(places.unbind(-1), frequencies, strict=True))
        return sum(along, torch.zeros((), device=places.device))


class Enough(Exception):  # noqa: N818
    """Break off an attention module that has shown its keys."""


class Onlooker:
    """Stand in for a cache: take the keys and values of a module, and break it off."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep keys and values, and break off."""
        self.keys, self.values = keys, values
        raise Enough

    def get_seq_length(self, *args: Any) -> int:
        """Return 0: nothing came before."""
        return 0


class Bare:
    """A module without its hooks, which nothing can be written to: running it leaves no trace."""

    def __init__(self, module: Module) -> None:
        self.__dict__["_bare"] = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_bare"], name)
        return Bare(value) if isinstance(value, Module) else value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_bare"].forward(*args, **kwargs)


def look(module: Module, known: Rotation | None, rows: int, first: int, num_new: int) -> tuple[Rotation, Any]:
    """Find how a module turns its keys, and the positions of its new tokens, from inside its forward call.

    Parameters
    ----------
    module : torch.nn.Module
        An attention module whose call is going on.
    known : Rotation or None
        What was found in an earlier call.
    rows, first, num_new : int
        Rows of the batch, tokens that the layer has seen before, and its new tokens: those of the call, or a first or
        last part of them.

    Returns
    -------
    tuple of Rotation and torch.Tensor or None
        The places have shape (rows, num_new, axes), int64; None where nothing is turned.
    """
    if known is not None and (known.refusal or not known.first):
        return known, None
    calls = _calls(module)
    inner = next(calls, None)
    if inner is None:
        return _refused(module, "its forward call cannot be looked into"), None
    seen = inner.get("position_embeddings")
    total = _parts(seen)[0].shape[1] if _parts(seen) else num_new
    start = total - num_new if first else 0
    call = first - start, total
    # Layers of one forward call share their cosines, and so what was found out about them.
    mark = seen[0] if isinstance(seen, tuple | list) and seen else seen
    found = getattr(mark, "graphkv_found", None)
    try:
        with torch.no_grad():
            if found is None or found[0] != call:
                givers, candidates = _surroundings(chain([inner], calls))
                candidates.append(torch.arange(first - start, first - start + total))
                measured = known or _found(module, seen, givers, candidates, total)
                found = call, measured, _places(measured, seen, candidates, rows, total)
                if isinstance(mark, torch.Tensor):
                    mark.graphkv_found = found  # type: ignore[attr-defined]
            if known is None:
                known = found[1] if found[1].refusal else _probed(module, inner, seen, found[1])
    # Whatever it is, only who wants keys turned is to hear of it.
    except Exception as error:
        known = _refused(module, f"it cannot be run by itself, {type(error).__name__}: {error}")
    if not known.first or found is None or found[2] is None:
        return known, None
    return known, found[2][:, start : start + num_new]


def from_plain(plain: Any, name: str, head_size: int) -> Rotation | None:
    """Make a rotation from the dict of its fields, as `dataclasses.asdict` and JSON give it, or None.

    Raises
    ------
    ArgumentError
        If it is no rotation of heads of that size.
    """
    if plain is None:
        return None

    def are_below(bound: int, numbers: Any) -> bool:
        return isinstance(numbers, list) and all(type(each) is int and 0 <= each < bound for each in numbers)

    is_right = isinstance(plain, dict) and set(plain) == {each.name for each in fields(Rotation)}
    if is_right:
        frequencies, pairs = plain["frequencies"], [plain["first"], plain["second"], plain["columns"]]
        is_right = (
            isinstance(frequencies, list)
            and all(isinstance(row, list) and len(row) == len(frequencies[0]) for row in frequencies)
            and all(type(each) is float and abs(each) < 1e9 for row in frequencies for each in row)
            and type(plain["scaling"]) is float
            and 0 < plain["scaling"] < 1e9
            and isinstance(plain["refusal"], str | NoneType)
            and are_below(head_size, pairs[0])
            and are_below(head_size, pairs[1])
            and are_below(len(frequencies[0]) if frequencies else 0, pairs[2])
            and len({len(each) for each in pairs}) == 1
            and len({*pairs[0], *pairs[1]}) == 2 * len(pairs[0])
        )
    if not is_right:
        raise ArgumentError(f"its {name} must hold pairs of a head of {head_size} and the frequencies that turn them")
    given = {key: tuple(plain[key]) for key in ("first", "second", "columns")}
    rows = tuple(map(tuple, plain["frequencies"]))
    return Rotation(**given, frequencies=rows, scaling=plain["scaling"], refusal=plain["refusal"])


def check(rotation: Rotation | None, places: torch.Tensor | None) -> Rotation:
    """Return the rotation if keys at these places can be rotated, or raise with the reason.

    Raises
    ------
    ArgumentError
        If the layer's rotation or the place of a token is not known.
    """
    if rotation is None:
        raise ArgumentError(
            "turning keys needs a cache that looks at how they are turned: one with rerotate=True, with a policy of "
            "unrotated keys or without a policy"
        )
    if rotation.refusal:
        raise ArgumentError(rotation.refusal)
    if rotation.first and (places is None or bool((places == UNKNOWN).any())):
        raise ArgumentError(
            "turning keys needs to know the position of every token; those that the model turned its keys by could not "
            "be found in its calls"
        )
    return rotation


def rotate(
    keys: torch.Tensor, rotation: Rotation, places: torch.Tensor | None, to: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotate keys from their places to others.

    Parameters
    ----------
    keys : torch.Tensor, shape (batch, kv_heads, N, D)
        After the rotary embedding.
    rotation : Rotation
        How they were rotated, see `check`.
    places : torch.Tensor, shape (batch, kv_heads, N, axes), integer
        Where they are.
    to : torch.Tensor, shape (batch, kv_heads, N, axes), integer, optional
        Where they go. None: back to before the rotary embedding.

    Returns
    -------
    torch.Tensor, shape (batch, kv_heads, N, D)
        In the dtype of the keys; computed in float32 at least.
    """
    if not rotation.first or places is None:
        return keys
    stand = rotation.angles(places, rotation.columns)
    cos, sin = stand.cos(), -stand.sin()
    if to is None:
        return _turned(keys, rotation, cos / rotation.scaling, sin / rotation.scaling)
    # The difference of two large angles would be rounded.
    goal = rotation.angles(to, rotation.columns)
    goal_cos, goal_sin = goal.cos(), goal.sin()
    return _turned(keys, rotation, goal_cos * cos - goal_sin * sin, goal_sin * cos + goal_cos * sin)


def contiguous(
    places: torch.Tensor, valid: torch.Tensor | None, count: int, valid_after: torch.Tensor | None
) -> torch.Tensor:
    """Compute places that follow on each other and end at the last of the places so far.

    Parameters
    ----------
    places : torch.Tensor, shape (batch, kv_heads, N, axes), integer
        Those of all tokens, dropped ones included.
    valid : torch.Tensor, shape (batch, kv_heads, N), bool, or None
    count : int
        How many are left.
    valid_after : torch.Tensor, shape (batch, kv_heads, count), bool, or None
        False for slots that take no place.

    Returns
    -------
    torch.Tensor, shape (batch, kv_heads, count, axes), int64
    """
    along = places.amax(dim=-1)
    last = (along if valid is None else along.masked_fill(~valid, 0)).amax(dim=-1, keepdim=True)
    if valid_after is None:
        after = torch.arange(count - 1, -1, -1, device=places.device)
    else:
        after = valid_after.flip(-1).cumsum(dim=-1).flip(-1) - 1
    return (last - after)[..., None].expand(-1, -1, -1, places.shape[-1])


def _turned(keys: torch.Tensor, rotation: Rotation, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn every pair of numbers by an angle of its own, shape (..., pairs)."""
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32), copy=True)
    first, second = (torch.tensor(each, device=keys.device) for each in (rotation.first, rotation.second))
    one, other = wide[..., first], wide[..., second]
    wide[..., first] = one * cos - other * sin
    wide[..., second] = other * cos + one * sin
    return wide.to(keys.dtype)


def _calls(module: Module) -> Iterator[Mapping[str, Any]]:
    """Go through the variables of the calls that are going on, from the module's own forward call outwards."""
    code = inspect.unwrap(type(module).forward).__code__
    frame, is_inside = sys._getframe(1), False
    while frame is not None:
        is_inside = is_inside or (_place_of(frame.f_code) == _place_of(code) and frame.f_locals.get("self") is module)
        if is_inside:
            yield frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]


def _place_of(code: CodeType) -> tuple[str, str, int]:
    """Return where in which file code is written: torch.compile runs a copy of it."""
    return code.co_name, code.co_filename, code.co_firstlineno


def _surroundings(calls: Iterator[Mapping[str, Any]]) -> tuple[list[Module], list[torch.Tensor]]:
    """Collect rotary embeddings and positions, up to the module that has the rotary embedding."""
    givers: list[Module] = []
    positions: dict[int, torch.Tensor] = {}
    for values in calls:
        for named in (values, values.get("kwargs")):
            given = named.get("position_ids") if isinstance(named, Mapping) else None
            if isinstance(given, torch.Tensor):
                positions[id(given)] = given
        owner = values.get("self")
        if isinstance(owner, Module):
            givers += [each for each in owner.children() if "RotaryEmbedding" in type(each).__name__]
        if givers:
            break
    return givers, list(positions.values())


def _parts(seen: Any) -> tuple[torch.Tensor, ...]:
    """Split what a model's rotary embedding gave into cosines and sines, shape (rows or 1, tokens, columns).

    Nothing if it is not of that kind. Where every axis of the positions has columns of its own, they are put in a row.
    """
    if isinstance(seen, torch.Tensor) and seen.is_complex():
        seen = (seen.real, seen.imag)
    if not isinstance(seen, tuple | list) or len(seen) != 2:
        return ()
    if not all(isinstance(part, torch.Tensor) and part.ndim in (3, 4) for part in seen):
        return ()
    return tuple(part.movedim(0, -2).flatten(-2) if part.ndim == 4 else part for part in seen)


def _made_like(seen: Any, angles: torch.Tensor, lengths: torch.Tensor) -> Any:
    """Make what a rotary embedding gives for one row from angles, shape (tokens, columns): the reverse of `_parts`."""
    if seen is None:
        return None
    if isinstance(seen, torch.Tensor):
        return torch.polar(lengths.expand_as(angles), angles)[None].to(seen)
    parts = ((angles.cos() * lengths)[None], (angles.sin() * lengths)[None])
    if seen[0].ndim == 4:
        axes = len(seen[0])
        parts = tuple(part.reshape(*part.shape[:2], axes, -1).movedim(-2, 0) for part in parts)  # type: ignore[assignment]
    return tuple(part.to(like) for part, like in zip(parts, seen, strict=True))


def _refused(module: Module, why: str) -> Rotation:
    return Rotation(refusal=f"turning keys needs to see how the model turns them; {type(module).__name__}: {why}")


def _found(module: Module, seen: Any, givers: list[Module], candidates: list[torch.Tensor], num_new: int) -> Rotation:
    """Find the frequencies of the rotary embedding that a module is given, or why they cannot be found."""
    if "position_embeddings" not in inspect.signature(type(module).forward).parameters:
        return _refused(module, "its forward call takes no rotary embedding")
    if seen is None:
        return Rotation(frequencies=((0.0,),))
    if not _parts(seen):
        return _refused(module, "its rotary embedding is no pair of cosines and sines")
    measured = [each for giver in givers for each in _measured(giver, module, seen)]
    for each in measured:
        if not each.refusal and _is_explained(each, seen, candidates, num_new):
            return each
    # What depends on the length explains nothing, but gives the reason.
    refused = [each for each in measured if each.refusal]
    return refused[0] if refused else _refused(module, "what turned its keys does not follow from positions alone")


def _measured(giver: Module, module: Module, seen: Any) -> Iterator[Rotation]:
    """Measure the frequencies of a rotary embedding, one for each kind of layer that it knows."""
    # A copy, since some change with the positions that they see.
    twin = copy.copy(giver)
    twin.__dict__["_buffers"] = {
        name: None if buffer is None else buffer.detach().cpu().clone() for name, buffer in giver._buffers.items()
    }
    kinds: list[tuple[Any, ...]] = [()]
    if "layer_type" in inspect.signature(type(giver).forward).parameters:
        config: Any = module.config
        types = list(config.layer_types)
        own = types[int(module.layer_idx)]  # type: ignore[arg-type]
        kinds = [(own,), *((each,) for each in sorted(set(types) - {own}))]
    for kind in kinds:
        for axes in (*AXES, 1):
            try:
                yield _measured_along(twin, kind, axes, module, seen)
                break
            except Exception:
                # Of another number of axes, or without frequencies for this kind of layer.
                continue


def _measured_along(twin: Module, kind: tuple[Any, ...], axes: int, module: Module, seen: Any) -> Rotation:
    """Measure the frequencies along every axis of the positions; fails if there are not that many."""

    def angles(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = places.movedim(-1, 0)[:, None] if axes > 1 else places[None, :, 0]
        made = type(twin).forward(twin, torch.zeros(1), given, *kind)
        cos, sin = (part.double() for part in _parts(made))
        wide = (1, len(places), _parts(seen)[0].shape[-1])
        if cos.shape != wide or (made[0].ndim == 4) != (seen[0].ndim == 4 and axes == len(seen[0])):
            raise ValueError(cos.shape)
        return torch.atan2(sin[0], cos[0]), torch.hypot(cos[0], sin[0])

    frequencies, lengths = [], []
    for axis in range(axes):
        places = torch.zeros(len(FAR), axes, dtype=torch.int64)
        places[:, axis] = torch.tensor(FAR)
        alone, _ = angles(places[:1])
        found, length = angles(places)
        if float((alone[0] - found[0]).abs().max()) > 1e-5:
            return _refused(module, "its rotary frequencies depend on the length of the text")
        frequency = found[0]
        for far, angle in zip(FAR[1:], found[1:], strict=True):
            rest = angle - far * frequency
            frequency = frequency + torch.atan2(rest.sin(), rest.cos()) / far
        frequencies.append(tuple(frequency.float().tolist()))
        lengths.append(length)
    scalings = torch.stack(lengths)
    scaling = float(scalings.mean())
    if float((scalings - scaling).abs().max()) > 1e-5 * scaling:
        raise ValueError(scalings)
    return Rotation(frequencies=tuple(frequencies), scaling=scaling)


def _is_explained(rotation: Rotation, seen: Any, candidates: list[torch.Tensor], num_new: int) -> bool:
    """Check whether some positions, turned into cosines and sines, are all that was seen."""
    return any(
        bool(fits.all())
        for _, fits in (_fitted(rotation, seen, each, num_new) for each in candidates)
        if fits is not None
    )


def _fitted(
    rotation: Rotation, seen: Any, candidate: torch.Tensor, num_new: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check for which tokens positions give the cosines and sines that were seen, both of shape (rows, num_new)."""
    axes = len(rotation.frequencies)
    cos, sin = _parts(seen)
    places = candidate.to(cos.device)
    if places.ndim == 3 and places.shape[0] == axes:
        places = places.movedim(0, -1)
    elif places.ndim <= 2:
        places = places.reshape(-1, places.shape[-1], 1).expand(-1, -1, axes)
    wide = (num_new, len(rotation.frequencies[0]))
    if places.ndim != 3 or places.shape[1] != num_new or cos.ndim != 3 or cos.shape[1:] != wide:
        return places, None
    if len({1, len(places), len(cos)}) > 2:
        return places, None
    angles = rotation.angles(places)
    off = torch.maximum(
        (angles.cos() * rotation.scaling - cos).abs().amax(dim=-1),
        (angles.sin() * rotation.scaling - sin).abs().amax(dim=-1),
    )
    return places, off <= rotation.scaling * _tolerance(cos.dtype)


def _tolerance(dtype: torch.dtype) -> float:
    """Return the relative error of a few operations."""
    return max(1e-3, 8 * torch.finfo(dtype).eps)


def _places(
    rotation: Rotation, seen: Any, candidates: list[torch.Tensor], rows: int, num_new: int
) -> torch.Tensor | None:
    """Choose for every token the positions that give what was seen, without waiting for the device."""
    if rotation.refusal or not _parts(seen):
        return None
    places = torch.full((rows, num_new, len(rotation.frequencies)), UNKNOWN, device=_parts(seen)[0].device)
    for candidate in reversed(candidates):
        where, fits = _fitted(rotation, seen, candidate, num_new)
        if fits is not None:
            places = torch.where(fits[..., None], where, places)
    return places


def _probed(module: Module, inner: Mapping[str, Any], seen: Any, rotation: Rotation) -> Rotation:
    """Run the module on one token at several angles, to see which numbers of its keys turn together."""
    frequencies = torch.tensor(rotation.frequencies)
    # Columns of the same frequencies always get the same angle; those that never turn get none.
    kinds, column = torch.unique(frequencies, dim=1, return_inverse=True)
    generator = torch.Generator().manual_seed(0)
    chosen = (torch.rand(3, kinds.shape[1], generator=generator) * 2 - 1) * torch.pi
    chosen = torch.where((kinds == 0).all(dim=0), 0.0, chosen)[:, column]
    somewhere = rotation.angles(torch.tensor([5, 3, 2, 7][: len(frequencies)]))
    angles = torch.cat([torch.zeros_like(chosen[:1]), chosen, somewhere[None]])
    lengths = torch.ones(len(angles), 1)
    lengths[-1] = rotation.scaling
    keys, values = _shown(module, inner, _made_like(seen, angles, lengths), len(angles), generator)
    if keys.ndim != 4 or keys.shape[:3:2] != (1, len(angles)):
        return _refused(module, f"its keys are of shape {tuple(keys.shape)}")
    tolerance = _tolerance(inner["hidden_states"].dtype)
    keys, values = keys[0].float().cpu(), values[0].float().cpu()
    base = keys[:, :1]
    if not _is_same(values[:, :1], values, values[:, :1].abs(), tolerance):
        return _refused(module, "its values depend on the position")
    if _is_same(base, keys, base.abs(), tolerance):
        return Rotation()
    for first, second in _layouts(keys.shape[-1], frequencies):
        columns = _columns(keys, first, second, angles)
        found = replace(rotation, first=tuple(first), second=tuple(second), columns=columns)
        by = angles[:, found.columns]
        wanted = _turned(base.expand_as(keys), found, by.cos() * lengths, by.sin() * lengths)
        size = base.abs().clone()
        size[..., first] = size[..., second] = torch.hypot(base[..., first], base[..., second])
        if _is_same(wanted, keys, size, tolerance):
            return found
    return _refused(module, "its keys are not turned in pairs by its rotary embedding")


def _is_same(wanted: torch.Tensor, got: torch.Tensor, size: torch.Tensor, tolerance: float) -> bool:
    """Check whether numbers agree, by the size of each of them."""
    return bool(((wanted - got).abs() <= tolerance * size + 1e-6 * got.abs().max()).all())


def _layouts(size: int, frequencies: torch.Tensor) -> Iterator[tuple[list[int], list[int]]]:
    """List the ways to place pairs in a head of some size: halves or neighbors, at its start or its end."""
    axes, columns = frequencies.shape
    for pairs in dict.fromkeys((columns // 2, columns, columns // (2 * axes))):
        for start in sorted({0, size - 2 * pairs}) if 0 < 2 * pairs <= size else ():
            at = list(range(start, start + 2 * pairs))
            for one, other in ((at[:pairs], at[pairs:]), (at[::2], at[1::2])):
                yield one, other
                # Turned the other way.
                yield other, one


def _columns(keys: torch.Tensor, first: list[int], second: list[int], angles: torch.Tensor) -> tuple[int, ...]:
    """Find the column that turns each pair, from keys of one token at several angles, shape (kv_heads, angles, D)."""
    pairs = torch.complex(keys[..., first], keys[..., second])
    turned = (pairs * pairs[:, :1].conj()).sum(dim=0).angle()
    off = torch.polar(torch.ones(()), turned[:, :, None] - angles[:, None, :]).angle().abs()
    return tuple(off.amax(dim=0).argmin(dim=-1).tolist())


def _shown(
    module: Module, inner: Mapping[str, Any], embeddings: Any, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the module up to its cache on one token, several times over, with position embeddings."""
    hidden = inner["hidden_states"]
    token = torch.randn(1, 1, hidden.shape[-1], generator=generator).to(hidden).expand(1, count, -1)
    onlooker = Onlooker()
    given: dict[str, Any] = {
        "hidden_states": token,
        "position_embeddings": embeddings,
        "attention_mask": None,
        "position_ids": torch.arange(count, device=hidden.device)[None],
        "use_cache": True,
        **dict.fromkeys(versions.ATTENTION_CACHE_ARGUMENTS, onlooker),
    }
    names = inspect.signature(type(module).forward).parameters
    arguments = {
        name: given[name] if name in given else inner[name]
        for name, parameter in names.items()
        if name != "self"
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and (name in given or parameter.default is parameter.empty)
    }
    devices = [hidden.device] if hidden.device.type == "cuda" else []
    # Dropout of adapters in training takes random numbers.
    with torch.random.fork_rng(devices, enabled=module.training):
        try:
            type(module).forward(Bare(module), **arguments)
        except Enough:
            return onlooker.keys, onlooker.values
    raise ArgumentError("it did not ask the cache")
