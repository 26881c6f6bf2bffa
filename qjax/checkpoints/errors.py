"""The one exception of the checkpoint readers and writers."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message names the file or tensor, the values, and what to do."""
