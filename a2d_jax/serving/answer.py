"""The text of an answer while its blocks come in: what may be sent already, and whether it is over.

An answer is over at the first [EOS] or end of turn, at a stop text, or at its token limit. As blocks are finished from
left to right, what stands before such an end is final, and the rest need not be decoded.
"""

from collections.abc import Sequence

from a2d_jax.tokenizer import Tokenizer


class Answer:
    """One answer. `finish_reason` is None while it goes on, then "stop" or "length"."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, stop: Sequence[str] = ()):
        self._tokenizer, self._max_tokens, self._stop = tokenizer, max_tokens, stop
        self._ends = {tokenizer.eos_id, tokenizer.pad_id, tokenizer.eot_id} - {None}
        self.text = ""  # what has been given out
        self.num_tokens = 0
        self.finish_reason: str | None = None

    def extend(self, tokens: Sequence[int], is_complete: bool) -> str:
        """Takes all finished tokens from the start of the answer on; returns the text that is new and final."""
        ids = list(tokens)[: self._max_tokens]
        end = next((i for i, token in enumerate(ids) if token in self._ends), None)
        if end is not None:
            ids, self.finish_reason = ids[:end], "stop"
        elif is_complete or len(ids) == self._max_tokens:
            self.finish_reason = "length"
        self.num_tokens = len(ids) + (end is not None)
        text = self._tokenizer.decode(ids, skip_special_tokens=True).lstrip()
        first_stop = min((text.find(stop) for stop in self._stop if stop in text), default=None)
        if first_stop is not None:
            text, self.finish_reason = text[:first_stop], "stop"
        text = text.rstrip()
        if self.finish_reason is None:
            text = self._without_loose_end(text)
            if not text.startswith(self.text):  # a decoder that rewrites what came before: wait for the whole
                return ""
        delta, self.text = text[len(self.text) :], text
        return delta

    def _without_loose_end(self, text: str) -> str:
        """Without an unfinished character, and without what may become a stop text."""
        text = text.rstrip("\ufffd")
        longest = max((_overlap(text, stop) for stop in self._stop), default=0)
        return text[: len(text) - longest].rstrip()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
