"""One value of every policy, for tests that ask the same of all of them."""

from graphkv import (
    CAKE,
    CAOTE,
    H2O,
    SAGEKV,
    TOVA,
    AdaKV,
    Bar,
    Decay,
    Degree,
    Enhance,
    ExpectedAttention,
    GraphKV,
    KeyDiff,
    KNorm,
    LayerBudgets,
    LayerShares,
    PageRank,
    PerLayer,
    PyramidKV,
    Random,
    RoCo,
    SnapKV,
    StreamingLLM,
)


def every_policy(budget, window=4):
    """Name to policy: every base, every wrapper, and the graph on top of each base; some with the degree signal."""
    options = {"budget": budget, "window": window, "kernel_size": 3}
    bases = {
        "cake": CAKE(**options),
        "expected-attention": ExpectedAttention(budget=budget, num_sinks=1),
        "h2o": H2O(budget=budget),
        "h2o-max-age": H2O(budget=budget, num_recent=2, group_reduction="max", age_normalised=True),
        "keydiff": KeyDiff(budget=budget),
        "knorm": KNorm(budget=budget, num_sinks=1),
        "pyramidkv": PyramidKV(**options),
        "random": Random(budget=budget, num_sinks=1),
        "roco": RoCo(budget=budget),
        "sagekv": SAGEKV(budget=budget, num_sinks=1),
        "snapkv": SnapKV(**options),
        "snapkv-max": SnapKV(**options, pooling="max", group_reduction="max", num_sinks=2),
        "streaming-llm": StreamingLLM(budget=budget, num_sinks=2),
        "tova": TOVA(budget=budget),
    }
    wrappers = {
        "caote-snapkv": CAOTE(bases["snapkv"]),
        "caote-h2o": CAOTE(bases["h2o"]),
        "adakv-snapkv": AdaKV(bases["snapkv"]),
        "adakv-graphkv-snapkv": AdaKV(GraphKV(bases["snapkv"], Decay(neighbors=1))),
        "graphkv-adakv-knorm": GraphKV(AdaKV(bases["knorm"]), Decay(neighbors=1)),
        "layer-budgets": LayerBudgets(bases["knorm"], budgets=[1, budget, budget + 1, 2]),
        "layer-shares": LayerShares(bases["knorm"], shares=[0, 1, 2, 1]),
        "per-layer": PerLayer(bases["snapkv"], policies=[bases["snapkv"], GraphKV(bases["snapkv"], Degree())]),
    }
    graphs = {f"graphkv-{name}": GraphKV(base) for name, base in bases.items()}
    degrees = {
        "degree-snapkv": GraphKV(bases["snapkv"], Degree()),
        "degree-knorm": GraphKV(bases["knorm"], Degree(exponent=2)),
        "degree-h2o-max-rank": GraphKV(bases["h2o"], Degree(fusion="max_rank")),
        "degree-knorm-mean-rank": GraphKV(bases["knorm"], Degree(fusion="mean_rank")),
        "degree-graphkv-snapkv": GraphKV(GraphKV(bases["snapkv"], Decay(neighbors=1)), Degree()),
    }
    others = {
        "bar-snapkv": GraphKV(bases["snapkv"], Bar()),
        "enhance-knorm": GraphKV(bases["knorm"], Enhance()),
        "pagerank-h2o": GraphKV(bases["h2o"], PageRank()),
        "pagerank-knorm": GraphKV(bases["knorm"], PageRank(damping=0.5, rounds=3)),
        "pagerank-snapkv": GraphKV(bases["snapkv"], PageRank()),
    }
    return bases | wrappers | graphs | degrees | others
