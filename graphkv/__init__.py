"""KV-cache eviction that knows about near-duplicates: the GraphKV method (arXiv:2509.00388) on any array library.

Importing this package imports no array library; the first call imports the one of its arrays.
"""

from .adapters import Random, SnapKV, StreamingLLM
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

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "Backend",
    "BackendError",
    "BackendUnavailableError",
    "Eviction",
    "Graph",
    "GraphKV",
    "GraphKVError",
    "Policy",
    "Random",
    "SnapKV",
    "StreamingLLM",
    "build_graph",
    "evict",
    "propagate",
    "select",
]
