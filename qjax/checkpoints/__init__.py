"""Checkpoints: one file per on-disk format."""

from __future__ import annotations
