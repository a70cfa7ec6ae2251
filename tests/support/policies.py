"""One value of every policy, for tests that ask the same of all of them."""

from graphkv import CAOTE, H2O, AdaKV, Bar, Decay, Degree, Enhance, GraphKV, PageRank, SnapKV
from graphkv.adapters.catalog import ENTRIES

# `Given` holds arrays of one library and shape, so no name and budget make it.
BASES = {entry.name: entry for entry in ENTRIES if not entry.is_wrapper and not entry.holds_arrays}
WRAPPERS = {
    entry.name or entry.policy.__name__: entry for entry in ENTRIES if entry.is_wrapper and not entry.holds_arrays
}


def every_base(budget, **options):
    """Every base of the catalog by its name, with its small options and these."""
    return {name: entry.make(budget, **{**entry.small, **options}) for name, entry in BASES.items()}


def every_policy(budget):
    """Name to policy: every base, every wrapper, and the graph on top of each base; some with other signals."""
    bases = every_base(budget) | {
        "h2o-half": H2O(budget=budget),
        "h2o-max-age": H2O(budget=budget, num_recent=2, group_reduction="max", age_normalized=True),
        "snapkv-max": SnapKV(budget=budget, window=4, kernel_size=3, pooling="max", group_reduction="max", num_sinks=2),
    }
    wrappers = {f"{name}-snapkv": entry.make(bases["snapkv"], **entry.small) for name, entry in WRAPPERS.items()}
    wrappers |= {
        "caote-h2o": CAOTE(bases["h2o"]),
        "adakv-graphkv-snapkv": AdaKV(GraphKV(bases["snapkv"], Decay(neighbors=1))),
        "graphkv-adakv-knorm": GraphKV(AdaKV(bases["knorm"]), Decay(neighbors=1)),
    }
    graphs = {f"graphkv-{name}": GraphKV(base) for name, base in bases.items()}
    signals = {
        "degree-snapkv": GraphKV(bases["snapkv"], Degree()),
        "degree-knorm": GraphKV(bases["knorm"], Degree(exponent=2)),
        "degree-h2o-max-rank": GraphKV(bases["h2o"], Degree(fusion="max_rank")),
        "degree-knorm-mean-rank": GraphKV(bases["knorm"], Degree(fusion="mean_rank")),
        "degree-graphkv-snapkv": GraphKV(GraphKV(bases["snapkv"], Decay(neighbors=1)), Degree()),
        "bar-snapkv": GraphKV(bases["snapkv"], Bar()),
        "enhance-knorm": GraphKV(bases["knorm"], Enhance()),
        "pagerank-h2o": GraphKV(bases["h2o"], PageRank()),
        "pagerank-knorm": GraphKV(bases["knorm"], PageRank(damping=0.5, rounds=3)),
        "pagerank-snapkv": GraphKV(bases["snapkv"], PageRank()),
    }
    return bases | wrappers | graphs | signals
