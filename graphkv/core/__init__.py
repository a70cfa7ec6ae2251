"""The specification: three steps over tokens, written once in the array API standard.

``build_graph`` links the most important tokens to those that resemble them, ``propagate`` lowers those, ``select``
fills the budget. ``distance`` and ``fuse`` are another way to the scores, without edges, and ``pagerank`` is a third.
Nothing here names an array library; a call learns its namespace from the `Backend` of its arrays.

One letter per axis, with the same length everywhere:

======  =====================================================================
axis    meaning
======  =====================================================================
...     leading axes: batch, then KV heads; every row is independent
N       tokens in the cache
D       head size
K       source tokens per row
M       neighbors per source
Q       queries
B       budget: tokens kept per row
======  =====================================================================

Order, everywhere: higher score first; equal scores by lower token index; NaN after every number; -0.0 equals 0.0.
Arithmetic is float32 or wider, inputs are never written to, and values are never read on the host.
"""

from .answer import Answer
from .backend import Backend
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    BackendUnavailableError,
    GraphKVError,
    GraphKVWarning,
)
from .eviction import Eviction, evict, evict_layers, observe, wants
from .fusion import degree, distance, fuse
from .graph import build_graph
from .graphkv import GraphKV
from .layer import Cost, Layer, LayerShape, Memory, Probe
from .merging import Merge
from .pagerank import pagerank
from .policy import Assessment, Policy, Requirements, Wrapper
from .precision import Precision
from .propagation import propagate
from .protection import Protection
from .selection import Choice, select
from .signals import Bar, Decay, Degree, Enhance, PageRank, Signal
from .types import Graph

__all__ = [
    "Answer",
    "ArgumentError",
    "ArgumentTypeError",
    "Assessment",
    "Backend",
    "BackendError",
    "BackendUnavailableError",
    "Bar",
    "Choice",
    "Cost",
    "Decay",
    "Degree",
    "Enhance",
    "Eviction",
    "Graph",
    "GraphKV",
    "GraphKVError",
    "GraphKVWarning",
    "Layer",
    "LayerShape",
    "Memory",
    "Merge",
    "PageRank",
    "Policy",
    "Precision",
    "Probe",
    "Protection",
    "Requirements",
    "Signal",
    "Wrapper",
    "build_graph",
    "degree",
    "distance",
    "evict",
    "evict_layers",
    "fuse",
    "observe",
    "pagerank",
    "propagate",
    "select",
    "wants",
]
