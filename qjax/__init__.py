"""qjax: quantized large-language-model inference in JAX.

Nothing is executed at import: no device is touched before the first array is made.
"""

from qjax.formats import FORMATS as FORMATS
from qjax.formats import FP8_E4M3_BLOCK128 as FP8_E4M3_BLOCK128
from qjax.formats import FP8_E4M3_CHANNEL as FP8_E4M3_CHANNEL
from qjax.formats import FP8_E4M3_TENSOR as FP8_E4M3_TENSOR
from qjax.formats import FP8_E5M2_BLOCK128 as FP8_E5M2_BLOCK128
from qjax.formats import FP8_E5M2_CHANNEL as FP8_E5M2_CHANNEL
from qjax.formats import FP8_E5M2_TENSOR as FP8_E5M2_TENSOR
from qjax.formats import FP8_PER_TENSOR as FP8_PER_TENSOR
from qjax.formats import FP8_PER_TOKEN as FP8_PER_TOKEN
from qjax.formats import FP8_TOKEN_G128 as FP8_TOKEN_G128
from qjax.formats import INT2_G32_ASYM as INT2_G32_ASYM
from qjax.formats import INT3_G128 as INT3_G128
from qjax.formats import INT4_CHANNEL as INT4_CHANNEL
from qjax.formats import INT4_CHANNEL_ASYM as INT4_CHANNEL_ASYM
from qjax.formats import INT4_G32 as INT4_G32
from qjax.formats import INT4_G32_ASYM as INT4_G32_ASYM
from qjax.formats import INT4_G64 as INT4_G64
from qjax.formats import INT4_G64_ASYM as INT4_G64_ASYM
from qjax.formats import INT4_G128 as INT4_G128
from qjax.formats import INT4_G128_ASYM as INT4_G128_ASYM
from qjax.formats import INT8_CHANNEL as INT8_CHANNEL
from qjax.formats import INT8_G128 as INT8_G128
from qjax.formats import INT8_PER_TENSOR as INT8_PER_TENSOR
from qjax.formats import INT8_PER_TOKEN as INT8_PER_TOKEN
from qjax.formats import INT8_TENSOR as INT8_TENSOR
from qjax.formats import W4A8_INT8 as W4A8_INT8
from qjax.formats import W8A8_FP8 as W8A8_FP8
from qjax.formats import W8A8_FP8_BLOCK as W8A8_FP8_BLOCK
from qjax.formats import W8A8_INT8 as W8A8_INT8
from qjax.formats import QuantFormat as QuantFormat
from qjax.formats import parse_format as parse_format
from qjax.ops.dot import quantized_dot as quantized_dot
from qjax.ops.packed import PackedWeight as PackedWeight
from qjax.ops.packed import pack_for_mosaic as pack_for_mosaic
from qjax.ops.packed import pack_tree as pack_tree
from qjax.ops.packed import unpack_tree as unpack_tree
from qjax.quantize import dequantize as dequantize
from qjax.quantize import dequantize_tree as dequantize_tree
from qjax.quantize import fake_quantize as fake_quantize
from qjax.quantize import quantize as quantize
from qjax.quantize import quantize_tree as quantize_tree
from qjax.quantize import quantized_nbytes as quantized_nbytes
from qjax.quantized_array import QuantizedArray as QuantizedArray

__version__ = "0.1.0"
