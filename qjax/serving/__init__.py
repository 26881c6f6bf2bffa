"""Batched generation for many requests."""

from qjax.serving.engine import Completion as Completion
from qjax.serving.engine import Engine as Engine
from qjax.serving.engine import EngineConfig as EngineConfig
from qjax.serving.engine import EngineStats as EngineStats
from qjax.serving.scheduler import Request as Request
