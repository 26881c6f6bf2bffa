"""Calibration of whole models: from a checkpoint folder to a quantized one, block by block."""

from __future__ import annotations

from qjax.calibrate.report import Report as Report
from qjax.calibrate.run import calibrate_checkpoint as calibrate_checkpoint
from qjax.calibrate.settings import METHODS as METHODS
from qjax.calibrate.settings import Settings as Settings
from qjax.calibrate.text import read_documents as read_documents
from qjax.calibrate.text import sample_tokens as sample_tokens
