"""The two batched calls into the tokenizer: text to token ids, and messages to text."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orpo_lite.common.errors import RequestError
from orpo_lite.data.dropped_rows import REFUSED, WRONG_TYPES, Dropped
from orpo_lite.model.tokenizer import Job, TemplateRefused, render_chat, render_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from orpo_lite.data.row_shapes import Pair

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
        ids = self._plain([text for triple in triples for text in triple])
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

    def _plain(self, texts: list[str]) -> list[Ids]:
        if not texts:
            return []
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]  # fmt: skip

    def _fast(self, texts: list[str]) -> list[Ids]:
        backend: Any = self.tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue] (is_fast)
        if backend.truncation or backend.padding:
            return self._plain(texts)
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


class Renderer:
    """Messages to text with the tokenizer's chat template; a row that it refuses does not stop the others."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]):
        if not tokenizer.chat_template:
            raise RequestError(
                "the rows are conversations, but the tokenizer has no chat template: name one with model.chat_template "
                "(chatml, zephyr, llama-3, or the path of a Jinja file), or set tokenizer.chat_template in Python"
            )
        self.tokenizer, self.template_kwargs = tokenizer, template_kwargs

    def triples(self, pairs: Sequence[Pair]) -> list[Texts | Dropped]:
        """Return prompt, prompt + chosen and prompt + rejected of each pair as TRL renders them, or why not."""
        plain = self.template_kwargs | {"tools": None}
        prompts: list[Job] = []
        wholes: list[Job] = []
        for pair in pairs:
            own = bool(pair.tools or pair.template_kwargs)
            options = self.template_kwargs | {"tools": pair.tools} | pair.template_kwargs if own else plain
            prompt: Any = pair.prompt
            # TRL's rule: a prompt that ends with an assistant turn is continued, any other gets the generation prompt
            ended = prompt[-1]["role"] == "assistant"
            prompts.append((prompt, options | {"add_generation_prompt": not ended, "continue_final_message": ended}))
            wholes += [(prompt + side, options) for side in (pair.chosen, pair.rejected)]
        texts = render_chats(self.tokenizer, prompts + wholes)
        sides = texts[len(pairs) :]
        return [agreed(triple) for triple in zip(texts[: len(pairs)], sides[::2], sides[1::2], strict=True)]


def agreed(texts: Sequence[str | TemplateRefused]) -> Texts | Dropped:
    """Return the three texts of a pair, or the template's words where it refused one of them.

    The prompt is cut to what both whole texts begin with: some templates write more after it than a prompt's end.
    """
    for text in texts:
        if isinstance(text, TemplateRefused):
            return Dropped(REFUSED, str(text)[:200])
    prompt, chosen, rejected = map(str, texts)
    try:
        "".join((prompt, chosen, rejected)).encode()
    except UnicodeEncodeError as error:  # of a template or a tool call: no tokenizer accepts it
        half = f"the row holds half a character ({error.object[error.start]!a}), not valid Unicode"
        return Dropped(WRONG_TYPES, half)
    if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
        prompt = os.path.commonprefix([prompt, chosen, rejected])
    return prompt, chosen, rejected


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the source of the chat template(s), to see which variables it mentions."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else json.dumps(template or "")


def turn_end(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> int | None:
    """Return the token that the template writes after an assistant turn (<|im_end|>, <|eot_id|>, EOS ...), if any."""
    mark = "the answer"
    try:
        turns = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": mark}]
        text = render_chat(tokenizer, turns, **template_kwargs)
    except TemplateRefused:  # a template that expects other conversations
        return None
    if mark not in text:
        return None
    after: Any = tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
    added = {n for n, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return next((token for token in after if token in added), None)
