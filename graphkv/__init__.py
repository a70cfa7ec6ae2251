"""KV-cache eviction that knows about near-duplicates: the GraphKV method (arXiv:2509.00388) on any array library.

Importing this package imports no array library; the first call imports the one of its arrays.
"""

from .adapters import (
    CAKE,
    CAOTE,
    H2O,
    SAGEKV,
    TOVA,
    AdaKV,
    ExpectedAttention,
    KeyDiff,
    KNorm,
    LayerBudgets,
    PyramidKV,
    Random,
    RoCo,
    SnapKV,
    StreamingLLM,
)
from .core import (
    ArgumentError,
    ArgumentTypeError,
    Backend,
    BackendError,
    BackendUnavailableError,
    Eviction,
    Graph,
    GraphKV,
    GraphKVError,
    Policy,
    build_graph,
    evict,
    propagate,
    select,
)

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - in the order of sorted(), as a test asks
    "AdaKV",
    "ArgumentError",
    "ArgumentTypeError",
    "Backend",
    "BackendError",
    "BackendUnavailableError",
    "CAKE",
    "CAOTE",
    "Eviction",
    "ExpectedAttention",
    "Graph",
    "GraphKV",
    "GraphKVError",
    "H2O",
    "KNorm",
    "KeyDiff",
    "LayerBudgets",
    "Policy",
    "PyramidKV",
    "Random",
    "RoCo",
    "SAGEKV",
    "SnapKV",
    "StreamingLLM",
    "TOVA",
    "build_graph",
    "evict",
    "propagate",
    "select",
]
