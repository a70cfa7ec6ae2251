"""The settings of a run: read from a suite or a file, changed by options."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

from ...core import checks
from ...core.budgets import tokens_of
from ...core.errors import ArgumentError
from ...core.files import read_toml
from ...core.policy import Policy
from ...integrations.transformers import EvictingCache
from ...naming.names import FULL, is_press
from ...naming.policies import make_policy, parse_budget
from ..prompts.haystack import SPLITS, seeds_of
from ..prompts.riddles import task_names
from ..prompts.ruler import check_ruler, is_ruler
from .presses import check_press

__all__ = ["MODES", "PROTECTED", "Config", "budget_of", "load_config", "suite_names"]

# The question is in the cache when it is evicted; it comes afterwards; it and the prompt are never evicted.
PROTECTED = "protected"
MODES = ("aware", "agnostic", PROTECTED)

# Tokens that no cache has more of.
AMPLE = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Config:
    """A grid of prompts x policies x budgets.

    Attributes
    ----------
    tasks : tuple of str
        Tasks that are joined by ``+`` share their prompts. Ignored where `data` is given.
    lengths : tuple of int
        Tokens of a prompt before the question; for tasks of RULER, with the question and the longest answer.
    budgets : tuple of int or str
        Tokens to keep per KV head, or percentages of a prompt's length such as ``"25%"``. A budget that holds the whole
        prompt is left out, and in mode ``protected`` one that holds the whole answer.
    policies : tuple of str
        Names that `make_policy` knows, or ``kvpress:`` and a press of it. The full cache is always measured as well.
    modes : tuple of str
        Of `MODES`. ``protected`` needs `every`, and budgets are of what is generated there: the prompt comes on top.
    every : int or None
        Evict again whenever so many tokens have come while a model answers. None: only once, before it does.
    sinks : tuple of int
        First tokens that all policies keep before all others; several numbers are several runs of everything but the
        prompt.
    prompts : int
        Prompts per task and length.
    split : str
        ``tuning`` or ``held-out``.
    seed : int
        The first prompt of the split to take.
    generate : bool
        Whether to generate answers as well, for `Record.score`.
    closeness : bool
        Whether to compare attention with that of the full cache, for `Record.output_error`.
    model : str or None
        None: SmolLM2-135M-Instruct.
    text : str or None
        File or folder. None: CPython's language reference.
    data : str or None
        File of rows to ask about instead of `tasks`, see `read_rows`.
    metric : str or None
        For rows that name none.
    batch : int
        Most caches that answer as one batch.
    device : str
        Where the model runs, as PyTorch calls it.
    dtype : str
        Of the model's weights.
    """

    tasks: tuple[str, ...] = ("needle+continuation",)
    lengths: tuple[int, ...] = (1024,)
    budgets: tuple[int | str, ...] = (256,)
    policies: tuple[str, ...] = ("snapkv", "snapkv+graphkv", "snapkv+degree")
    modes: tuple[str, ...] = MODES[:2]
    every: int | None = None
    sinks: tuple[int, ...] = (4,)
    prompts: int = 8
    split: str = "held-out"
    seed: int = 0
    generate: bool = False
    closeness: bool = False
    model: str | None = None
    text: str | None = None
    data: str | None = None
    metric: str | None = None
    batch: int = 16
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, kind in (("tasks", str), ("lengths", int), ("policies", str), ("modes", str)):
            self._check_list(name, kind)
        self._check_budgets()
        self._check_list("sinks", int, minimum=0)
        checks.count("prompts", self.prompts, minimum=1)
        checks.count("batch", self.batch, minimum=1)
        checks.choice("split", self.split, tuple(SPLITS))
        for mode in self.modes:
            checks.choice("modes", mode, MODES)
        self._check_every()
        checks.flag("generate", self.generate)
        checks.flag("closeness", self.closeness)
        for tasks in self.tasks:
            task_names(tasks)
            if is_ruler(tasks) and self.data is None:
                check_ruler(tasks)
        seeds_of(self.split, checks.count("seed", self.seed), self.prompts)
        for policy in self.policies:
            if is_press(policy):
                check_press(policy)
            else:
                make_policy(policy, budget_of(self.budgets[0]), sinks=self.sinks[0])
        for name in ("model", "text", "data", "metric", "device", "dtype"):
            value = getattr(self, name)
            if (value is not None or name in ("device", "dtype")) and not isinstance(value, str):
                raise ArgumentError(f"{name} must be a string; got {value!r}")
        # The full cache is what all others are compared with, so it is always there and comes first.
        policies = tuple(dict.fromkeys(name for name in self.policies if name != FULL))
        object.__setattr__(self, "policies", (FULL, *policies))

    def _check_every(self) -> None:
        """Refuse what cannot be evicted while a model answers."""
        if self.every is None:
            if PROTECTED in self.modes:
                raise ArgumentError(f"every must be given with mode {PROTECTED}, which evicts only answers; got None")
            return
        checks.count("every", self.every, minimum=1)
        if self.closeness:
            raise ArgumentError(f"closeness must be off with every, which evicts during answers; got {self.every}")
        for name in self.policies:
            if is_press(name):
                raise ArgumentError(f"every must be left out for a press, which evicts only prompts; got {name}")
            # Whether budgets have room for a window depends on the mode.
            policy = make_policy(name, AMPLE)
            try:
                EvictingCache(policy, every=self.every)
            except ArgumentError as error:
                raise ArgumentError(f"every must be left out for --policy {name}: {error}") from error
            if policy is not None and policy.needs().queries == "window" and set(self.modes) != {PROTECTED}:
                self._check_window(name, policy)

    def _check_window(self, name: str, policy: Policy) -> None:
        """Refuse a window that an eviction may cut: what it would ask next has not all come when the next is due."""
        lengths = (0,) if self.data else self.lengths
        budgets = dict.fromkeys(tokens_of(budget_of(budget), length) for length in lengths for budget in self.budgets)
        for budget, sinks in product(budgets, self.sinks):
            made = make_policy(name, max(1, budget), sinks=sinks) or policy
            protection = made.protection(budget)
            if protection.room > budget and (self.every or 0) < protection.newest:
                raise ArgumentError(
                    f"every must be at least {protection.newest} with --policy {name}, or the budget at least "
                    f"{protection.room} for its window and sinks; got {self.every} and {budget}"
                )

    def _check_budgets(self) -> None:
        """Turn texts that are numbers into numbers; percentages stay texts."""
        if not isinstance(self.budgets, (tuple, list)):
            raise ArgumentError(f"budgets must be a list of at least one entry; got {self.budgets!r}")
        found = tuple(
            int(budget_of(budget)) if isinstance(budget, str) and "%" not in budget else budget
            for budget in self.budgets
        )
        object.__setattr__(self, "budgets", found)
        self._check_list("budgets", (int, str))
        shares = [budget for budget in found if isinstance(budget, str)]
        for budget in shares:
            budget_of(budget)
        if shares and self.data is not None:
            raise ArgumentError(
                f"--budget must be a number of tokens with --data, whose rows differ in length; got {shares[0]!r}"
            )

    def _check_list(self, name: str, kind: type | tuple[type, ...], minimum: int = 1) -> None:
        values = getattr(self, name)
        if not isinstance(values, (tuple, list)) or not values:
            raise ArgumentError(f"{name} must be a list of at least one entry; got {values!r}")
        for value in values:
            if not isinstance(value, kind) or isinstance(value, bool):
                kinds = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
                raise ArgumentError(f"{name} must hold entries of type {kinds}; got {value!r}")
            if isinstance(value, int) and value < minimum:
                raise ArgumentError(f"{name} must hold numbers of at least {minimum}; got {value}")
        object.__setattr__(self, name, tuple(dict.fromkeys(values)))

    def as_json(self) -> dict[str, Any]:
        """Return all settings; of newer ones what is no default, so that older runs can be continued."""
        newer = ("device", "dtype", "every")
        defaults = {entry.name: entry.default for entry in fields(self) if entry.name in newer}
        return {name: value for name, value in asdict(self).items() if defaults.get(name, ...) != value}


def budget_of(budget: int | str, /) -> int | float:
    """Return an entry of the budgets as tokens or as a share."""
    return parse_budget(budget) if isinstance(budget, str) else budget


def suite_names() -> list[str]:
    """List the suites that come with the package."""
    return sorted(file.name.removesuffix(".toml") for file in _suites().iterdir() if file.name.endswith(".toml"))


def _suites() -> Any:
    return resources.files(__package__) / "suites"


def load_config(suite: str | None, path: Path | None, changes: dict[str, Any]) -> Config:
    """Read a suite of the package or a file of the user's own, and apply options.

    Parameters
    ----------
    suite : str or None
        One of `suite_names`.
    path : pathlib.Path or None
        A TOML file whose keys are the fields of `Config`.
    changes : dict
        Fields with new values.

    Raises
    ------
    ArgumentError
        If a file cannot be read, or a field is unknown or out of range.
    """
    if suite is not None and path is not None:
        raise ArgumentError("--suite and --config exclude each other; got both")
    values: dict[str, Any] = {}
    if suite is not None:
        if suite not in suite_names():
            raise ArgumentError(f"--suite must be one of {', '.join(suite_names())}; got {suite!r}")
        with resources.as_file(_suites() / f"{suite}.toml") as file:
            values = read_toml(file, "--suite")
    elif path is not None:
        values = read_toml(path, "--config")
    known = {entry.name for entry in fields(Config)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ArgumentError(
            f"--config {path} has unknown settings: {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    values |= changes
    if "data" in values:
        # The metrics of a data set are about what the model says.
        values.setdefault("generate", True)
    return Config(**values)
