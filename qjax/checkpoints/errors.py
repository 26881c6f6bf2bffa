"""The one exception of the checkpoint readers and writers."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file or tensor and what to do."""
