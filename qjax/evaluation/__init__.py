"""What quantization costs and saves: perplexity, agreement with the original, bytes, speed."""

from __future__ import annotations

from qjax.evaluation.agreement import kl_divergence as kl_divergence
from qjax.evaluation.agreement import top1_agreement as top1_agreement
from qjax.evaluation.memory import WeightBytes as WeightBytes
from qjax.evaluation.memory import abstract_params as abstract_params
from qjax.evaluation.memory import kv_bytes_per_token as kv_bytes_per_token
from qjax.evaluation.memory import weight_bytes as weight_bytes
from qjax.evaluation.perplexity import Scores as Scores
from qjax.evaluation.perplexity import score as score
from qjax.evaluation.perplexity import windows as windows
