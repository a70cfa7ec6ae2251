"""What the papers say importance and budgets are: one file per method, pure functions under an immutable policy."""

from .adakv import AdaKV
from .cake import CAKE
from .keydiff import KeyDiff
from .knorm import KNorm
from .per_layer import LayerBudgets
from .pyramidkv import PyramidKV
from .random import Random
from .snapkv import SnapKV
from .streaming_llm import StreamingLLM
from .tova import TOVA

__all__ = [
    "CAKE",
    "TOVA",
    "AdaKV",
    "KNorm",
    "KeyDiff",
    "LayerBudgets",
    "PyramidKV",
    "Random",
    "SnapKV",
    "StreamingLLM",
]
