"""Rows of one JSON array, one at a time: the file may be larger than memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

BLOCK = 1_000_000
SPACE = re.compile(r"[ \t\n\r]*")
NEAR = 32
"""Characters: longer than any literal or escape, so that an error this near to what was read may mend itself."""


class JsonArray:
    """Iterates over the elements of a JSON array.

    Args:
        head: the bytes already read off the stream, without a byte order mark.
        stream: the rest.
        decoder: of the elements.

    Raises:
        json.JSONDecodeError: as `decoder.decode` of the whole text would, with `lineno` and `colno` in the file.
        UnicodeDecodeError: not UTF-8; `start` counts bytes from the beginning.
    """

    def __init__(self, head: bytes, stream: IO[bytes], decoder: json.JSONDecoder):
        self.stream, self.decoder = stream, decoder
        self.utf8 = codecs.getincrementaldecoder("utf-8")()
        self.text, self.ended, self.bytes, self.nul = "", False, 0, False
        self.lines, self.column = 0, 0  # line breaks before the window, and characters between the last and it
        self._take(head)

    def _take(self, block: bytes) -> None:
        pending = len(self.utf8.getstate()[0])
        try:
            self.text += self.utf8.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            start = self.bytes - pending + error.start
            raise UnicodeDecodeError("utf-8", block, start, start + 1, error.reason) from None
        self.bytes += len(block)
        self.nul = self.nul or b"\0" in block

    def _more(self) -> bool:
        """Read on, at least as much as there is; whether there was anything."""
        if self.ended:
            return False
        block = self.stream.read(max(BLOCK, len(self.text)))
        self.ended = not block
        self._take(block)
        if self.ended:
            self.text = self.text.rstrip()
        return True

    def _forget(self, place: int) -> None:
        gone = self.text[:place]
        breaks = gone.count("\n")
        self.column = len(gone) - gone.rfind("\n") - 1 if breaks else self.column + len(gone)
        self.lines += breaks
        self.text = self.text[place:]

    def _space(self, place: int) -> int:
        """The next character that is not space, read on as far as need be."""
        while True:
            place = SPACE.match(self.text, place).end()  # type: ignore[union-attr] (matches nothing as well)
            if place < len(self.text) or not self._more():
                return place

    def _element(self, place: int) -> tuple[Any, int]:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, place)
                if end < len(self.text) - 2 or not self._more():  # a number may go on, 1e+ and then 16
                    return value, end
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - NEAR
                if not cut or not self._more():
                    raise self._placed(error) from None

    def _placed(self, error: json.JSONDecodeError) -> json.JSONDecodeError:
        error.colno += self.column if error.lineno == 1 else 0
        error.lineno += self.lines
        return error

    def _wrong(self, words: str, place: int) -> json.JSONDecodeError:
        return self._placed(json.JSONDecodeError(words, self.text, min(place, len(self.text))))

    def __iter__(self) -> Iterator[Any]:
        place = self._space(self._space(0) + 1)  # the caller has seen the bracket
        if self.text[place : place + 1] != "]":
            while True:
                value, place = self._element(place)
                yield value
                place = self._space(place)
                mark = self.text[place : place + 1]
                if mark == "]":
                    break
                if mark != ",":
                    raise self._wrong("Expecting ',' delimiter", place)
                place = self._space(place + 1)
                if place > BLOCK:
                    self._forget(place)
                    place = 0
        place = self._space(place + 1)
        if place < len(self.text):
            raise self._wrong("Extra data", place)
