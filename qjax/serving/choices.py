"""The text of one answer as its tokens arrive, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from qjax.tokenizer import TokenStream


class ChoiceText:
    """Tokens in, text out.

    Attributes:
      tokens: Tokens that belong to the text, with those of a stop string.
      finish_reason: ``stop`` or ``length`` once the text is complete.
    """

    def __init__(self, stream: TokenStream, stops: Sequence[str] = ()) -> None:
        """Empty.

        Args:
          stream: Decodes the tokens; gives out whole characters only.
          stops: The text ends before the first of them.
        """
        self.tokens = 0
        self.finish_reason: str | None = None
        self._stream = stream
        self._stops = tuple(stops)
        self._held = ""  # may be the beginning of a stop string

    def push(self, tokens: Sequence[int], reason: str | None) -> str:
        """Add tokens; returns the text that is certain now, possibly empty.

        Args:
          tokens: New tokens.
          reason: The finish reason if these are the last.
        """
        pieces = []
        for token in tokens:
            self.tokens += 1
            pieces.append(self._until_stop(self._stream.push(token)))
            if self.finish_reason is not None:
                return "".join(pieces)
        if reason is not None:
            pieces.append(self._until_stop(self._stream.flush()))
            if self.finish_reason is None:
                pieces.append(self._held)
                self.finish_reason = reason
        return "".join(pieces)

    def _until_stop(self, piece: str) -> str:
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.finish_reason = "stop"
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
