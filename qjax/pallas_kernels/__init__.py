"""Pallas (Mosaic GPU) kernels: plain arrays in, plain arrays out."""
