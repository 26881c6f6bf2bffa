"""Calibration algorithms: arrays and statistics in, quantized arrays out."""

from __future__ import annotations

from qjax.calibration.awq import AWQScale as AWQScale
from qjax.calibration.awq import quantize_clipped as quantize_clipped
from qjax.calibration.awq import search_awq_scale as search_awq_scale
from qjax.calibration.correction import CorrectionStats as CorrectionStats
from qjax.calibration.correction import corrected_error as corrected_error
from qjax.calibration.correction import corrected_weight as corrected_weight
from qjax.calibration.correction import init_correction as init_correction
from qjax.calibration.correction import merge_correction as merge_correction
from qjax.calibration.correction import update_correction as update_correction
from qjax.calibration.gptq import GPTQInfo as GPTQInfo
from qjax.calibration.gptq import gptq_quantize as gptq_quantize
from qjax.calibration.learned_rounding import Rounding as Rounding
from qjax.calibration.learned_rounding import finish_rounding as finish_rounding
from qjax.calibration.learned_rounding import init_rounding as init_rounding
from qjax.calibration.learned_rounding import rounded as rounded
from qjax.calibration.refine import refine as refine
from qjax.calibration.rotation import Rotation as Rotation
from qjax.calibration.rotation import random_hadamard as random_hadamard
from qjax.calibration.rotation import rotate as rotate
from qjax.calibration.rotation import rotate_block as rotate_block
from qjax.calibration.rotation import rotate_decoder as rotate_decoder
from qjax.calibration.rotation import rotate_embedding as rotate_embedding
from qjax.calibration.rotation import rotate_inputs as rotate_inputs
from qjax.calibration.scale_search import search_scale as search_scale
from qjax.calibration.scale_search import search_scale_output as search_scale_output
from qjax.calibration.smoothquant import SmoothScale as SmoothScale
from qjax.calibration.smoothquant import search_smooth_scale as search_smooth_scale
from qjax.calibration.smoothquant import smooth_scale as smooth_scale
from qjax.calibration.stats import ChannelStats as ChannelStats
from qjax.calibration.stats import HessianStats as HessianStats
from qjax.calibration.stats import init_channel as init_channel
from qjax.calibration.stats import init_hessian as init_hessian
from qjax.calibration.stats import merge_channel as merge_channel
from qjax.calibration.stats import merge_hessian as merge_hessian
from qjax.calibration.stats import output_error as output_error
from qjax.calibration.stats import update_channel as update_channel
from qjax.calibration.stats import update_hessian as update_hessian
