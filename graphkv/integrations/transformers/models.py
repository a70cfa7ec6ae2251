"""Context managers that let a model work with an `EvictingCache`."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ...core.backend import Backend
from ...core.errors import ArgumentError, ArgumentTypeError
from ...core.policy import Policy
from ...naming.policies import policy_of
from . import versions
from .attention import IMPLEMENTATIONS, PREFIX, WITHOUT_CACHE
from .cache import EvictingCache, not_compiled
from .settings import Settings
from .source import FULL, WINDOWED
from .warning import warn

__all__ = ["EvictingRun", "evicting", "observing"]

# Options of `generate` that let it guess tokens, and take back those that were wrong.
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
# What `cache_implementation` may be: caches that grow token by token. Releases before 5.13 put "hybrid" into the
# configurations of some models, and make an ordinary cache of it.
GROWING = (None, "dynamic", "dynamic_full", "hybrid")
# Kinds of layers that cache nothing, or what eviction leaves untouched.
UNTOUCHED = ("dummy", "linear_attention", "conv", "moe", "mlp")


def evicting(
    model: PreTrainedModel,
    policy: Policy | str,
    *,
    budget: int | float | str | None = None,
    every: int | None = None,
    protect_prompt: bool = False,
    rerotate: bool = False,
    record: bool = False,
    backend: Backend | str | None = None,
) -> EvictingRun:
    """Evict the cache of every prompt that the model reads inside the block.

    ``model.generate(**inputs)`` and ``model(**inputs)`` run unchanged. Each layer attends to the full prompt, then
    keeps what the policy keeps; later tokens attend to that, at their true positions. Afterwards the model is as it
    was, also when an exception passes through.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder whose attention goes through transformers' attention interface, loaded with ``"sdpa"`` or ``"eager"``
        attention; of a model with pictures or sound, the decoder inside is evicted and the rest runs as ever. A PEFT
        model is treated as the model that it wraps. Where full and sliding-window layers are mixed, the full ones are
        evicted; layers of linear attention keep their state.
    policy : Policy or str
        For example ``GraphKV(SnapKV(budget=512))``; or its name on the command line, ``"snapkv+graphkv"``, together
        with `budget`.
    budget : int, float or str, optional
        Of a policy that is given by name: tokens, a share, or a percentage such as ``"25%"``.
    every, protect_prompt, rerotate, record, backend
        As for `EvictingCache`, which every call without a cache of its own gets. An empty ``DynamicCache`` that is
        passed to the model becomes one.

    Returns
    -------
    EvictingRun
        What the block is entered with, and what ``as`` gives: the last cache, and its report.

    Raises
    ------
    ArgumentError
        If the model cannot be evicted, the name of a policy is unknown, a cache of another kind or with another policy
        is passed to the model, or the history that `generate` is given does not begin with what the cache has seen.
    ArgumentTypeError
        If `policy` is not a Policy or `model` not a transformers model.

    Warns
    -----
    GraphKVWarning
        At the end of the block, if the model ran and no cache was filled, or none could be evicted. Without ``with``,
        because nothing happens then. Where sinks, recents and window take up the whole budget.

    Examples
    --------
    ::

        with evicting(model, GraphKV(SnapKV(budget=512))) as run:
            output = model.generate(**inputs, max_new_tokens=64)
        print(run.report())
    """
    if isinstance(model, Policy):
        raise ArgumentTypeError(f"model must come first and the policy second; got {type(model).__name__} as model")
    made = policy_of(policy, budget)
    blank = EvictingCache(
        made, every=every, protect_prompt=protect_prompt, rerotate=rerotate, record=record, backend=backend
    )
    return EvictingRun(model, blank)


class EvictingRun:
    """A block of `evicting`, which it is entered with, and what came of it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    blank : EvictingCache
        An empty cache: every call without a cache of its own gets one like it.
    """

    _is_forgotten = False

    def __init__(self, model: PreTrainedModel, blank: EvictingCache, /) -> None:
        # Fail early on a bad model, not inside a forward pass.
        self._decoder = _Decoder(model)
        self._blank = blank
        self._watch = _Watch(blank.settings, self._decoder.modules[-1])
        self._stack = ExitStack()
        self._is_forgotten = True

    @property
    def cache(self) -> EvictingCache | None:
        """The cache that the last call of the model has filled, kept until the next call begins; None before one."""
        return self._watch.cache

    def report(self) -> str:
        """Describe in plain text what the last call evicted, see `EvictingCache.report`, or why it evicted nothing."""
        if self.cache is not None:
            return self.cache.report()
        why = "; ".join(self._watch.reasons) or "no call of the model in the block has filled a cache"
        return f"Nothing was evicted: {why}."

    def __enter__(self) -> EvictingRun:
        if not self._is_forgotten:
            raise ArgumentError("a block of evicting() can be entered once; call evicting() again for another")
        self._is_forgotten = False
        decoder = self._decoder
        # Another block may have begun since.
        decoder.check()
        with ExitStack() as stack:
            stack.enter_context(decoder.attending(self._watch.saw_no_cache))
            for module in decoder.modules:
                stack.enter_context(_Hooks(module, decoder.config, self._watch, self._new_cache).installed())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if kind is None:
            self._watch.warn()

    def __del__(self) -> None:
        if self._is_forgotten:
            warn("evicting() does nothing by itself; write `with evicting(...):` around the calls of the model")

    def _new_cache(self) -> EvictingCache:
        # The one before makes room first.
        self._watch.cache = None
        cache = self._blank.copy()
        cache.prepare(self._decoder.config)
        return cache


@contextmanager
def observing(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's attention work with an `EvictingCache` that is passed to it.

    For a model that always runs so, ``model.set_attn_implementation("graphkv_sdpa")`` does the same for good.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        As for `evicting`.

    Raises
    ------
    ArgumentError
        If the model cannot be evicted, or the history that `generate` is given does not begin with what the cache has
        seen.
    ArgumentTypeError
        If `model` is no transformers model.

    Examples
    --------
    Read a prompt once, then evict copies of its cache::

        with observing(model):
            cache = EvictingCache(num_queries=32)
            model(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24
            small = cache.copy()
            small.evict(SnapKV(budget=512))
    """
    decoder = _Decoder(model)
    with decoder.attending(lambda module: None), ExitStack() as stack:
        for module in decoder.modules:
            stack.enter_context(_Hooks(module, decoder.config, None, None).installed())
        yield


class _Decoder:
    """The part of a model that writes text: its configuration, and the modules on the way to it.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If it cannot be evicted, with the reason.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
            if getattr(getattr(model, "active_peft_config", None), "peft_type", None) == "PREFIX_TUNING":
                raise ArgumentError(
                    "model must leave the cache to its prompts; prefix tuning fills it with keys that are no tokens"
                )
            model = model.get_base_model()
        if not isinstance(model, PreTrainedModel):
            inner = next((name for name in ("_orig_mod", "module", "model") if hasattr(model, name)), None)
            hint = "" if inner is None else f"; the model inside may be its .{inner}"
            raise ArgumentTypeError(f"model must be a transformers.PreTrainedModel; got {type(model).__name__}{hint}")
        name = type(model).__name__
        if model.config.is_encoder_decoder:
            raise ArgumentError(f"model must be a decoder; {name} is an encoder-decoder")
        self.config = model.config.get_text_config(decoder=True)
        self.modules = [
            module
            for module in model.modules()
            if isinstance(module, PreTrainedModel) and module.config.get_text_config(decoder=True) is self.config
        ]
        inmost = self.modules[-1]
        # Some models give their layers copies of the configuration.
        configs = {id(self.config): self.config}
        for module in inmost.modules():
            config = getattr(module, "config", None)
            if type(config) is type(self.config):
                configs[id(config)] = config
        self.configs = list(configs.values())
        self.name = name
        self.check()

    def check(self) -> None:
        """Refuse a decoder that cannot be evicted."""
        name, inmost = self.name, type(self.modules[-1])
        implementation = str(self.config._attn_implementation)
        if implementation.startswith(PREFIX):
            raise ArgumentError(
                f"model must not be inside evicting() or observing() already; {name} is, or one that shares its config"
            )
        if implementation not in IMPLEMENTATIONS:
            raise ArgumentError(
                f"model must be loaded with attn_implementation 'sdpa' or 'eager'; {name} has {implementation!r}: "
                'load it with from_pretrained(..., attn_implementation="sdpa")'
            )
        kinds = versions.layer_kinds(self.config)
        unknown = sorted(set(kinds) - set(FULL + WINDOWED + UNTOUCHED))
        if unknown:
            raise ArgumentError(
                f"model must have layers of kinds that can be evicted or left alone; {name} has {unknown}"
            )
        if not any(kind in FULL + WINDOWED for kind in kinds):
            raise ArgumentError(f"model must have layers that cache keys and values; {name} has {sorted(set(kinds))}")
        no_interface = f"model must use transformers' attention interface; the attention of {inmost.__name__} does not"
        if not inmost._can_set_attn_implementation():
            raise ArgumentError(no_interface)
        own_caches = [
            own for own, value in vars(inspect.getmodule(inmost)).items()
            if isinstance(value, type) and own.endswith("Cache") and value.__module__ == inmost.__module__
            and not own.endswith("PaddingCache")
        ]  # fmt: skip
        if own_caches:
            raise ArgumentError(
                f"model must work with transformers' caches; {name} has one of its own, {own_caches[0]}"
            )
        # Some releases find an interface in files of models that have none.
        files = {each.__module__ for module in self.modules[-1].modules() for each in type(module).__mro__}
        names = [name for file in files & set(sys.modules) for name in vars(sys.modules[file])]
        if implementation == "eager" and not any("eager_attention" in name for name in names):
            raise ArgumentError(no_interface)
        self.implementation = implementation

    @contextmanager
    def attending(self, without_cache: Callable[[torch.nn.Module], None]) -> Iterator[None]:
        """Run the decoder, and nothing else of the model, under our attention function."""
        before = [config._attn_implementation for config in self.configs]
        for config, implementation in zip(self.configs, before, strict=True):
            WITHOUT_CACHE[id(config)] = without_cache
            # The inner name, because the public one is passed on to parts of the configuration.
            if implementation in IMPLEMENTATIONS:
                config._attn_implementation_internal = PREFIX + implementation
        try:
            yield
        finally:
            for config, implementation in zip(self.configs, before, strict=True):
                config._attn_implementation_internal = implementation
                del WITHOUT_CACHE[id(config)]


@dataclass
class _Pass:
    """A forward pass of one module: whether it was given a cache, or the reason why not was noted; what was filled."""

    is_seen_to: bool = False
    was_filled: bool = False


class _Watch:
    """Whether what happened in a block of `evicting` was what had been asked for."""

    def __init__(self, settings: Settings, inmost: torch.nn.Module) -> None:
        self.settings = settings
        self.reasons: dict[str, None] = {}
        # Other models may share the configuration.
        self.modules = {id(module) for module in inmost.modules()}
        self.passes_by_thread: dict[int, list[_Pass]] = {}
        self.cache: EvictingCache | None = None

    @property
    def passes(self) -> list[_Pass]:
        """The passes of this thread that have begun and not ended, the outermost first."""
        return self.passes_by_thread.setdefault(threading.get_ident(), [])

    def saw_no_cache(self, module: torch.nn.Module) -> None:
        """Note attention whose keys came from no `EvictingCache`."""
        if id(module) in self.modules and not any(each.is_seen_to for each in self.passes):
            self.reasons[f"{type(module).__name__} ran without a cache; call the model and not its forward()"] = None

    def saw_pass(self, module: torch.nn.Module, cache: EvictingCache) -> None:
        """Note a forward pass that has gone well."""
        if cache.num_seen > cache.seen_before:
            self.cache = cache
            for each in self.passes:
                each.was_filled = True
            if not any(layer.evicts and layer.num_seen for layer in cache.attention_layers):
                self.reasons[f"{type(module).__name__} has no layer that can be evicted"] = None
        elif not (self.passes and self.passes[-1].was_filled):
            is_checkpointed = module.training and versions.is_checkpointed(module)
            self.reasons[
                "training with gradient checkpointing caches nothing"
                if is_checkpointed
                else f"{type(module).__name__} dropped the cache that it was given"
            ] = None

    def warn(self) -> None:
        """Warn if the block did not do what was asked."""
        if self.reasons:
            warn(f"evicting() could not evict with {type(self.settings.policy).__name__}: {'; '.join(self.reasons)}")


class _Hooks:
    """The hooks of one module of the decoder in a block: they supply a cache, and check it afterwards."""

    def __init__(
        self, module: Any, config: Any, watch: _Watch | None, new_cache: Callable[[], EvictingCache] | None
    ) -> None:
        self.module, self.config, self.watch, self.new_cache = module, config, watch, new_cache
        parameters = inspect.signature(module.forward).parameters
        if not any(name in parameters for name in versions.CACHE_ARGUMENTS):
            # Somebody may have exchanged it for a function that hands on everything.
            own = inspect.signature(type(module).forward.__get__(module)).parameters
            parameters = own if any(name in own for name in versions.CACHE_ARGUMENTS) else parameters
        self.parameters = list(parameters)
        self.name = versions.cache_argument(module.forward)
        self.takes_cache = self.name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        self.is_over = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hook the module for the length of the block."""
        handles = [
            self.module.register_forward_pre_hook(self.before, with_kwargs=True),
            self.module.register_forward_hook(self.after, with_kwargs=True),
            # Also after an exception.
            self.module.register_forward_hook(self.ended, always_call=True),
        ]
        can_generate = callable(getattr(self.module, "generate", None)) and "generate" not in vars(self.module)
        if can_generate:
            self.module.generate = self.wrapped(self.module.generate)
        try:
            yield
        finally:
            self.is_over = True
            for handle in handles:
                handle.remove()
            if can_generate:
                del self.module.generate

    def argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find an argument of the module's forward, by keyword or by place."""
        place = self.parameters.index(name) if name in self.parameters else len(args)
        return kwargs.get(name, args[place] if place < len(args) else None)

    def cache_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find the cache that is passed, under any name that transformers has had for it."""
        found = [self.argument(name, args, kwargs) for name in versions.CACHE_ARGUMENTS]
        # A forward that names nothing may hand on what it gets by place.
        found += [each for each in args if isinstance(each, Cache)]
        return next((cache for cache in found if cache is not None), None)

    def with_cache(self, cache: EvictingCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments with a cache; those by keyword stay by keyword."""
        place = self.parameters.index(self.name) if self.name in self.parameters else len(args)
        if place < len(args):
            return (*args[:place], cache, *args[place + 1 :]), kwargs
        kept = {name: value for name, value in kwargs.items() if name not in versions.CACHE_ARGUMENTS}
        return args, kept | {self.name: cache}

    @not_compiled
    def before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Supply a cache where there is none."""
        this_pass = _Pass()
        if self.watch is not None:
            self.watch.passes.append(this_pass)
        given, result = self.cache_of(args, kwargs), None
        if given is None and not self.takes_cache:
            return None  # the modules inside get one
        this_pass.is_seen_to = True
        other_names = [name for name in kwargs if name in versions.CACHE_ARGUMENTS and name not in self.parameters]
        if given is not None and other_names and self.name in self.parameters:
            # Another release's name, which this forward would take for anything else and drop.
            args, kwargs = result = self.with_cache(given, args, kwargs)
        if self.new_cache is not None and not isinstance(given, EvictingCache):
            uses_cache = self.argument("use_cache", args, kwargs)
            if uses_cache is None:
                uses_cache = getattr(self.config, "use_cache", True)
            if given is None and not uses_cache:
                if self.watch is not None:
                    self.watch.reasons["use_cache is False"] = None
                return None
            given, (args, kwargs) = self.supplied(self.new_cache, given, args, kwargs)
            result = args, kwargs
        if isinstance(given, EvictingCache):
            if self.watch is not None and not given.settings.is_probing:
                self.check_settings(given.settings, self.watch.settings)
            given.prepare(self.config)
            given.seen_before = given.num_seen
            keep = kwargs.get("logits_to_keep")
            if given.is_waiting and isinstance(keep, int) and keep > 1:
                # Assisted decoding asks for the logits of its guesses and of the token before them.
                given.num_guessed = keep - 1
        return result

    def check_settings(self, own: Settings, asked: Settings) -> None:
        """Refuse a cache that would not do what the block asks for."""
        for name in ("policy", "every", "protect_prompt", "rerotate", "record"):
            wanted, found = getattr(asked, name), getattr(own, name)
            if wanted and wanted != found:
                raise ArgumentError(f"{self.name} must have the {name} of evicting(), {wanted}; its own is {found}")

    def supplied(
        self, new_cache: Callable[[], EvictingCache], given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[EvictingCache, Any]:
        """Return a cache for this call, and the arguments that carry it if they have to change."""
        cache = new_cache()
        if given is None:
            return cache, self.with_cache(cache, args, kwargs)
        num_tokens = max((int(layer.get_seq_length()) for layer in getattr(given, "layers", ())), default=0)
        if type(given) is not DynamicCache or num_tokens or given.offloading:
            tokens = f" with {num_tokens} tokens" if isinstance(given, Cache) else ""
            offloading = " with offloading" if getattr(given, "offloading", False) else ""
            raise ArgumentError(
                f"{self.name} must be None, an empty DynamicCache or an EvictingCache inside evicting(); got "
                f"{type(given).__name__}{tokens}{offloading}"
            )
        EvictingCache.adopt(given, cache)
        return given, (args, kwargs)

    @not_compiled
    def after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Look at what became of the cache."""
        cache = self.cache_of(args, kwargs)
        if not isinstance(cache, EvictingCache):
            return
        cache.finish()
        if self.watch is not None:
            self.watch.saw_pass(module, cache)
        cache.note_tokens(self.argument("input_ids", args, kwargs))

    @not_compiled
    def ended(self, *_: Any) -> None:
        """Note the end of a forward pass."""
        if self.watch is not None and self.watch.passes:
            self.watch.passes.pop()

    def wrapped(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """Let `generate` begin with a cache of ours; notice an unknown history, and a block that ends too early."""

        @wraps(generate)
        def checked(*args: Any, **kwargs: Any) -> Any:
            cache = next((kwargs[name] for name in versions.CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
            given = (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
            ids, mask = (
                next((each for each in given if isinstance(each, torch.Tensor)), None),
                kwargs.get("attention_mask"),
            )
            # With a mask of more columns they are no history: they go on after what the cache has seen.
            goes_on = mask is not None and ids is not None and mask.shape[-1] > ids.shape[-1]
            if isinstance(cache, EvictingCache):
                if not goes_on:
                    cache.check_history(ids)
            elif self.new_cache is not None and not self.is_over:
                self.check_implementation(args, kwargs)
                if cache is not None:
                    cache, _ = self.supplied(self.new_cache, cache, args, kwargs)
                elif _uses_cache(self.module, args, kwargs):
                    cache = self.new_cache()
                    kwargs = {**kwargs, self.name: cache}
            if isinstance(cache, EvictingCache) and ids is not None:
                cache.num_given = ids.shape[-1] + (cache.num_seen if goes_on else 0)
            if isinstance(cache, EvictingCache) and _guesses(self.module, args, kwargs):
                # transformers does that itself from 5.20 on.
                cache.activate_past_recording()
            try:
                result = None if self.is_over else generate(*args, **kwargs)
            except Exception as error:
                if self.is_over:
                    raise self.left_too_early() from error
                raise
            if self.is_over:
                raise self.left_too_early()
            return result

        return checked

    def check_implementation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a cache of another kind before `generate` makes it, and masks for it."""
        implementation = _option("cache_implementation", self.module, args, kwargs)
        if implementation not in GROWING:
            raise ArgumentError(
                f"cache_implementation must be left out inside evicting(), which brings its own cache; got "
                f"{implementation!r}"
            )

    def left_too_early(self) -> ArgumentError:
        """Return the error for a block that another thread has left while this one generates."""
        return ArgumentError("the block of evicting() or observing() must last until generate() returns")


def _option(name: str, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Find an option of `generate` where it is given: by keyword, in a configuration, or in that of the model."""
    configs = [each for each in (kwargs.get("generation_config"), *args) if isinstance(each, GenerationConfig)]
    values = (kwargs.get(name), *(getattr(each, name, None) for each in (*configs, model.generation_config)))
    return next((value for value in values if value is not None), None)


def _uses_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether `generate` would make a cache of the ordinary kind for itself."""
    use_cache, implementation = (_option(name, model, args, kwargs) for name in ("use_cache", "cache_implementation"))
    return use_cache is not False and implementation is None


def _guesses(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether `generate` decodes with an assistant of any kind."""
    return any(_option(name, model, args, kwargs) is not None for name in ASSISTED)
