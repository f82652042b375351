"""The batched call into the tokenizer: texts that begin alike to token ids."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Ids = list[int]
Texts = tuple[str, str, str]
"""A prompt, and the whole of prompt + chosen and of prompt + rejected."""

CHECKED = 16
"""Triples of a source on which the fast way is compared with the plain one."""


class Encoder:
    """`tokenizer(text, add_special_tokens=False)` for triples of texts that begin alike.

    Added tokens such as <|im_start|> split a text before anything else is done to it, so what precedes the last of them
    in the prompt is encoded once, and the rest of each text after that one token. A tokenizer for which this does not
    hold (a slow one, or one whose added tokens depend on their neighbors) is called for each text as a whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.unchecked = CHECKED
        self.hard: re.Pattern[str] | None = None
        added = list(tokenizer.added_tokens_decoder.values()) if tokenizer.is_fast else []
        hard = sorted((token.content for token in added if not token.normalized), key=len, reverse=True)
        if hard and not any(token.single_word for token in added):
            self.hard = re.compile("|".join(map(re.escape, hard)))

    def triples(self, triples: list[Texts]) -> list[tuple[Ids, Ids, Ids]]:
        """Return the ids of the three texts of each triple."""
        if self.hard and self.unchecked and triples:
            sample = triples[: self.unchecked]
            self.unchecked -= len(sample)
            if self._anchored(sample) != self._whole(sample):
                self.hard = None
        return self._anchored(triples) if self.hard else self._whole(triples)

    def _whole(self, triples: list[Texts]) -> list[tuple[Ids, Ids, Ids]]:
        ids = self.plain([text for triple in triples for text in triple])
        return list(zip(ids[0::3], ids[1::3], ids[2::3], strict=True))

    def _anchored(self, triples: list[Texts]) -> list[tuple[Ids, Ids, Ids]]:
        assert self.hard
        anchored, texts = [], []
        for triple in triples:
            *_, anchor = [None, *self.hard.finditer(triple[0])]
            # a longer added token may start at the same place in the whole texts
            if anchor and all((other := self.hard.match(text, anchor.start())) and other.end() == anchor.end()
                              for text in triple[1:]):  # fmt: skip
                texts += [triple[0][: anchor.end()], *(text[anchor.start() :] for text in triple)]
                anchored.append(True)
            else:
                texts += triple
                anchored.append(False)
        ids = iter(self._fast(texts))
        result = []
        for has_anchor in anchored:
            head = next(ids)[:-1] if has_anchor else []
            result.append((head + next(ids), head + next(ids), head + next(ids)))
        return result

    def plain(self, texts: list[str]) -> list[Ids]:
        """Return the ids of each text by itself."""
        if not texts:
            return []
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]  # fmt: skip

    def _fast(self, texts: list[str]) -> list[Ids]:
        backend: Any = self.tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue] (is_fast)
        if backend.truncation or backend.padding:
            return self.plain(texts)
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the source of the chat template(s), to see which variables it mentions."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else json.dumps(template or "")
