"""Flax Linen modules shared by the decoder families."""

from __future__ import annotations

from qjax.nn.attention import Attention as Attention
from qjax.nn.layers import GatedMLP as GatedMLP
from qjax.nn.layers import QuantDense as QuantDense
from qjax.nn.layers import RMSNorm as RMSNorm
from qjax.nn.parallel import TensorParallel as TensorParallel
from qjax.nn.rotary import RopeScaling as RopeScaling
from qjax.nn.rotary import apply_rotary as apply_rotary
from qjax.nn.rotary import rope_frequencies as rope_frequencies
