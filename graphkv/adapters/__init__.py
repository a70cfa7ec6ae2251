"""What the papers say importance and budgets are: one file per method, pure functions under an immutable policy."""

from .adakv import AdaKV
from .cake import CAKE
from .caote import CAOTE
from .expected_attention import ExpectedAttention
from .given import Given
from .h2o import H2O
from .keydiff import KeyDiff
from .knorm import KNorm
from .per_layer import LayerBudgets, LayerShares, PerLayer
from .pyramidkv import PyramidKV
from .random import Random
from .roco import RoCo
from .sagekv import SAGEKV
from .snapkv import SnapKV
from .streaming_llm import StreamingLLM
from .tova import TOVA

__all__ = [
    "CAKE",
    "CAOTE",
    "H2O",
    "SAGEKV",
    "TOVA",
    "AdaKV",
    "ExpectedAttention",
    "Given",
    "KNorm",
    "KeyDiff",
    "LayerBudgets",
    "LayerShares",
    "PerLayer",
    "PyramidKV",
    "Random",
    "RoCo",
    "SnapKV",
    "StreamingLLM",
]
