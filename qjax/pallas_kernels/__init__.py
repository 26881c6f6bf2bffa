"""Pallas (Mosaic GPU) kernels: plain arrays in, plain arrays out.

No kernel has landed yet; ``qjax.ops`` says so when ``backend="mosaic_gpu"`` is asked for.
"""
