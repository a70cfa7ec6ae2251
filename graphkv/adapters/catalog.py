"""One entry for every policy: tests, documentation pages and the command line are made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import adapters
from ..core.graphkv import GraphKV
from ..core.policy import Policy, Wrapper

__all__ = ["BASES", "ENTRIES", "LOADED", "LOADED_WRAPPERS", "WRAPPERS", "Entry"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of a policy beside its code.

    Attributes
    ----------
    policy : type
        The class.
    name : str
        On the command line. Empty for a policy that options in parentheses cannot describe.
    paper : str
        Its arXiv number; empty if it is from no paper.
    importance : str
        What the policy ranks tokens by, in one line of Markdown.
    protects : str
        Which tokens it keeps before all others.
    checked : str
        What its values were checked against.
    small : mapping of str to object
        Options for tests, whose rows have some tens of tokens.
    needed : callable, base to mapping of str to object
        Options without a default, beyond budget and base, that suit a base and a model of four layers.
    holds_arrays : bool
        The policy cannot be made without arrays, so that no budget makes one.
    """

    policy: type[Policy]
    name: str = ""
    paper: str = ""
    importance: str
    protects: str
    checked: str
    small: Mapping[str, Any] = field(default_factory=dict)
    needed: Callable[[Policy], Mapping[str, Any]] = lambda base: {}
    holds_arrays: bool = False

    @property
    def is_wrapper(self) -> bool:
        """Whether the policy stands on another one."""
        return issubclass(self.policy, Wrapper)

    def make(self, budget: int | Policy, /, **options: Any) -> Policy:
        """Make a value of the policy.

        Parameters
        ----------
        budget : int or Policy
            Tokens to keep; for a wrapper, its base.
        **options
            Of the policy; `small` for tests.

        Returns
        -------
        Policy
        """
        # Signatures differ from class to class.
        kind: Any = self.policy
        if isinstance(budget, Policy):
            return kind(budget, **{**self.needed(budget), **options})  # type: ignore[no-any-return]
        return kind(budget=budget, **options)  # type: ignore[no-any-return]


SINKS = "the first `num_sinks` tokens"
WINDOW = "the window, and the first `num_sinks` tokens"
RECENTS = "the first `num_sinks` and the newest `num_recent` tokens"
BASE = "what its base protects"

ENTRIES = (
    Entry(
        policy=adapters.SnapKV,
        name="snapkv",
        paper="2404.14469",
        importance="attention from the window, pooled; ≥ 0",
        protects=WINDOW,
        checked="vectors of the public code, loops",
        small={"window": 4, "kernel_size": 3},
    ),
    Entry(
        policy=adapters.DefensiveKV,
        name="defensivekv",
        paper="2510.13334",
        importance="the largest attention from any query of the window, pooled, at least the mean of its head; ≥ 0",
        protects=WINDOW,
        checked="loops over the formulas of the public code",
        small={"window": 4, "kernel_size": 3},
    ),
    Entry(
        policy=adapters.RKV,
        name="rkv",
        paper="2505.24133",
        importance="attention from the window, less the share of a key that the others repeat; in [-1, 1]",
        protects=WINDOW,
        checked="loops, the public code's formula with all pairs at once",
        small={"window": 4, "kernel_size": 3, "block_size": 7},
    ),
    Entry(
        policy=adapters.PyramidKV,
        name="pyramidkv",
        paper="2406.02069",
        importance="as SnapKV, with more tokens in lower layers",
        protects=WINDOW,
        checked="the public code's schedule in 10,000 cases, vectors",
        small={"window": 4, "kernel_size": 3, "num_sinks": 1},
    ),
    Entry(
        policy=adapters.CAKE,
        name="cake",
        paper="2503.12491",
        importance="mean and variance of the attention from the window, pooled; ≥ 0",
        protects=WINDOW,
        checked="loops, values worked by hand",
        small={"window": 4, "kernel_size": 3, "num_sinks": 1},
    ),
    Entry(
        policy=adapters.TOVA,
        name="tova",
        paper="2401.06104",
        importance="attention from the newest query, averaged over all heads of the layer; ≥ 0",
        protects="the newest token, and the first `num_sinks` tokens",
        checked="loops, values worked by hand",
    ),
    Entry(
        policy=adapters.H2O,
        name="h2o",
        paper="2306.14048",
        importance="all attention that the token has received so far; ≥ 0",
        protects=RECENTS,
        checked="vectors of the public code, a simulation of every decoding step",
        small={"num_recent": 2},
    ),
    Entry(
        policy=adapters.RoCo,
        name="roco",
        paper="2402.06262",
        importance="mean attention that the token has received so far; ≥ 0",
        protects="sinks, recents, and the tokens whose attention varies most",
        checked="a simulation of every decoding step, the public code's mode",
        small={"num_sinks": 1, "num_recent": 2},
    ),
    Entry(
        policy=adapters.LazyEviction,
        name="lazy-eviction",
        paper="2506.15969",
        importance="how often the token is attended to again, and how overdue it is; in [0, 2]",
        protects="the newest `window` tokens, and the first `num_sinks` tokens",
        checked="the public code's bookkeeping at every step, its values, a simulation of every decoding step",
        small={"window": 4, "alpha": 0.05, "num_sinks": 1},
    ),
    Entry(
        policy=adapters.LRA,
        name="lra",
        paper="2401.04881",
        importance="the inverse of the queries since the token was last attended to; in (0, 1]",
        protects=RECENTS,
        checked="a simulation of every decoding step",
        small={"alpha": 0.05, "num_sinks": 1},
    ),
    Entry(
        policy=adapters.LFA,
        name="lfa",
        paper="2401.04881",
        importance="as H2O; ≥ 0",
        protects=RECENTS,
        checked="a simulation of every decoding step, H2O without recents",
        small={"num_recent": 2},
    ),
    Entry(
        policy=adapters.SAGEKV,
        name="sagekv",
        paper="2503.08879",
        importance="logits of the newest query, summed over the group",
        protects=RECENTS,
        checked="loops",
        small={"num_sinks": 1, "num_recent": 2},
    ),
    Entry(
        policy=adapters.ExpectedAttention,
        name="expected-attention",
        paper="2510.00636",
        importance="attention expected from queries distributed like those so far; ≥ 0",
        protects=SINKS,
        checked="loops, moments of rotated queries",
        small={"num_sinks": 1},
    ),
    Entry(
        policy=adapters.Compactor,
        name="compactor",
        paper="2507.08143",
        importance="attention from the tokens around, and statistical leverage of the key, each with mean 0",
        protects=RECENTS,
        checked="loops, orthonormal bases, kvpress",
        small={"num_sinks": 1, "num_recent": 2, "sketch": 5, "chunk": 7},
    ),
    Entry(
        policy=adapters.KNorm,
        name="knorm",
        paper="2406.11430",
        importance="minus the norm of the key; ≤ 0",
        protects=SINKS,
        checked="vectors of the public code",
        small={"num_sinks": 1},
    ),
    Entry(
        policy=adapters.KeyDiff,
        name="keydiff",
        paper="2504.15364",
        importance="minus the mean cosine with all keys; in [-1, 1]",
        protects=SINKS,
        checked="cosines of all pairs",
    ),
    Entry(
        policy=adapters.KVzip,
        name="kvzip",
        paper="2505.23416",
        importance="the most attention that any query gives the token while the text is asked to be repeated; ≥ 0",
        protects=SINKS,
        small={"num_sinks": 1},
        checked="loops over the formulas of the public code, values worked by hand",
    ),
    Entry(
        policy=adapters.EpiCache,
        paper="2509.17396",
        importance="the most attention that any query of a patched prompt gives the token; ≥ 0",
        protects=SINKS,
        small={"num_sinks": 1},
        checked="loops over the formulas of the public code, values worked by hand",
    ),
    Entry(
        policy=adapters.LagKV,
        name="lagkv",
        paper="2504.04704",
        importance="the rank of a token in its part, by how unevenly it lies in the range of the next part; ≥ 0",
        protects="the first `num_sinks` and the newest `lag` tokens",
        checked="loops, kvpress",
        small={"num_sinks": 1, "lag": 5},
    ),
    Entry(
        policy=adapters.StreamingLLM,
        name="streaming-llm",
        paper="2309.17453",
        importance="the position",
        protects=SINKS,
        checked="positions by hand",
        small={"num_sinks": 2},
    ),
    Entry(
        policy=adapters.Random,
        name="random",
        importance="a draw in [0, 1)",
        protects=SINKS,
        checked="equal draws on every library",
        small={"num_sinks": 1},
    ),
    Entry(
        policy=adapters.Given,
        importance="scores that are handed in",
        protects="the tokens marked in `protected`",
        checked="loops of `select`",
        holds_arrays=True,
    ),
    Entry(
        policy=adapters.SmallKV,
        paper="2508.02751",
        importance="attention that the token received in a smaller model, in the head that matches",
        protects="the newest `num_recent` tokens",
        checked="loops, a larger model with the weights of the smaller one",
        holds_arrays=True,
    ),
    Entry(
        policy=adapters.AttentionGate,
        name="attention-gate",
        paper="2410.12876",
        importance="how likely a trained gate lets the token pass; in (0, 1)",
        protects=SINKS,
        checked="loops, values worked by hand",
        holds_arrays=True,
    ),
    Entry(
        policy=GraphKV,
        name="graphkv",
        paper="2509.00388",
        importance="that of its base, changed by its signal",
        protects=BASE,
        checked="golden vectors, loops",
    ),
    Entry(
        policy=adapters.AdaKV,
        name="adakv",
        paper="2407.11550",
        importance="that of its base; heads keep different numbers of tokens",
        protects=BASE,
        checked="loops, sums in 10,000 cases, a loop of the official blend",
    ),
    Entry(
        policy=adapters.CAOTE,
        name="caote",
        paper="2504.14051",
        importance="change of the attention output without the token; ≥ 0",
        protects=BASE,
        checked="the output of attention without the token",
    ),
    Entry(
        policy=adapters.Shared,
        name="shared",
        importance="the mean over the KV heads of each token's share of that of its base; one kept set for all heads",
        protects="what its base protects in any head",
        checked="loops",
    ),
    Entry(
        policy=adapters.ChunkKV,
        name="chunkkv",
        paper="2502.00299",
        importance="the rank of its chunk, by the mean of that of its base; then its own rank",
        protects=BASE,
        checked="loops",
    ),
    Entry(
        policy=adapters.Lossless,
        name="lossless",
        paper="2502.16886",
        importance="that of its base; as many tokens as the newest query needs, at most the budget",
        protects=BASE,
        checked="brute force over all budgets",
        small={"tolerance": 0.3},
    ),
    Entry(
        policy=adapters.AnyQuery,
        name="anyquery",
        paper="2501.06807",
        importance="that of its base, where any of the last queries attends to the token; no other stays",
        protects=BASE,
        checked="loops",
        small={"threshold": 0.2},
    ),
    Entry(
        policy=adapters.Absorb,
        name="absorb",
        importance="that of its base; near-duplicates of kept tokens go into them",
        protects=BASE,
        checked="plain loops; attention with masses",
        small={"threshold": 0.3, "window": 4},
    ),
    Entry(
        policy=adapters.D2O,
        name="d2o",
        paper="2406.13035",
        importance="that of its base; what resembles kept tokens past a moving threshold goes into them",
        protects=BASE,
        checked="plain loops; the published numbers of its weights and budgets",
        small={"window": 4},
    ),
    Entry(
        policy=adapters.KVMerger,
        name="kvmerger",
        paper="2407.08454",
        importance="that of its base, of the best of each run of similar neighbors",
        protects=BASE,
        checked="plain loops; the published widths and weights",
    ),
    Entry(
        policy=adapters.WeightedKV,
        name="weightedkv",
        paper="2503.01330",
        importance="that of its base; values go to the right, weighted by attention",
        protects=BASE,
        checked="plain loops; the paper's listing step by step",
        small={"window": 4},
    ),
    Entry(
        policy=adapters.LESS,
        name="less",
        paper="2402.09398",
        importance="that of its base; a trained state of constant size answers for what is dropped",
        protects=BASE,
        checked="loops, full attention where the features are exact",
        holds_arrays=True,
    ),
    Entry(
        policy=adapters.MiKV,
        name="mikv",
        paper="2402.18096",
        importance="that of its base; what it would drop is kept in 2, 3, 4 or 8 bits",
        protects=BASE,
        checked="loops of the rounding and of the tiers, sizes in bytes",
        # At the base's bytes and without demoted tokens: tests count those of the base.
        needed=lambda base: {"high": 1.0},
    ),
    Entry(
        policy=adapters.LayerBudgets,
        importance="that of its base, with a given budget for each layer",
        protects=BASE,
        checked="budgets by hand",
        needed=lambda base: {"budgets": (1, int(base.budget), int(base.budget) + 1, 2)},
    ),
    Entry(
        policy=adapters.LayerShares,
        importance="that of its base, with budgets in given proportions",
        protects=BASE,
        checked="exact sums, proportions by hand",
        needed=lambda base: {"shares": (0, 1, 2, 1)},
    ),
    Entry(
        policy=adapters.PerLayer,
        importance="that of the layer's own policy",
        protects=BASE,
        checked="each layer's own policy",
        needed=lambda base: {"policies": (base, GraphKV(base))},
    ),
)

# By the names that the command line knows. Those that a name and a budget make, and those that need a file as well.
BASES = {entry.name: entry.policy for entry in ENTRIES if entry.name and not (entry.is_wrapper or entry.holds_arrays)}
LOADED: dict[str, Callable[..., Policy]] = {"attention-gate": adapters.AttentionGate.load}
WRAPPERS = {entry.name: entry.policy for entry in ENTRIES if entry.name and entry.is_wrapper and not entry.holds_arrays}
LOADED_WRAPPERS: dict[str, Callable[..., Policy]] = {"less": adapters.LESS.load}
