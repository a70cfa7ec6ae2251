"""The policies of papers: one file per method, pure functions under an immutable policy.

One line here makes a policy public; `graphkv.adapters.catalog` has an entry for each.
"""

from typing import TYPE_CHECKING

from .absorb import Absorb as Absorb
from .adakv import AdaKV as AdaKV
from .anyquery import AnyQuery as AnyQuery
from .attendre import LFA as LFA
from .attendre import LRA as LRA
from .attention_gate import AttentionGate as AttentionGate
from .cake import CAKE as CAKE
from .caote import CAOTE as CAOTE
from .chunkkv import ChunkKV as ChunkKV
from .compactor import Compactor as Compactor
from .d2o import D2O as D2O
from .defensivekv import DefensiveKV as DefensiveKV
from .epicache import EpiCache as EpiCache
from .expected_attention import ExpectedAttention as ExpectedAttention
from .given import Given as Given
from .h2o import H2O as H2O
from .keydiff import KeyDiff as KeyDiff
from .knorm import KNorm as KNorm
from .kvmerger import KVMerger as KVMerger
from .kvzip import KVzip as KVzip
from .lagkv import LagKV as LagKV
from .lazy_eviction import LazyEviction as LazyEviction
from .less import LESS as LESS
from .lossless import Lossless as Lossless
from .mikv import MiKV as MiKV
from .per_layer import LayerBudgets as LayerBudgets
from .per_layer import LayerShares as LayerShares
from .per_layer import PerLayer as PerLayer
from .pyramidkv import PyramidKV as PyramidKV
from .random import Random as Random
from .rkv import RKV as RKV
from .roco import RoCo as RoCo
from .sagekv import SAGEKV as SAGEKV
from .shared import Shared as Shared
from .smallkv import SmallKV as SmallKV
from .snapkv import SnapKV as SnapKV
from .streaming_llm import StreamingLLM as StreamingLLM
from .tova import TOVA as TOVA
from .weightedkv import WeightedKV as WeightedKV

# Type checkers take the names from the imports, and would take a list that they cannot read for an empty one.
if not TYPE_CHECKING:
    __all__ = sorted(name for name, value in globals().items() if isinstance(value, type))  # noqa: PLE0605
