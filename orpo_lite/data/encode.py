"""Text to token ids and messages to text, in batches: the two calls into the tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from orpo_lite.common.errors import RequestError
from orpo_lite.data.dropped_rows import REFUSED, Dropped
from orpo_lite.model.chat_template import Job, TemplateRefused, render_chat, render_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from orpo_lite.data.row_shapes import Pair

Ids = list[int]
Texts = tuple[str, str, str]
"""A prompt, and the whole of prompt + chosen and of prompt + rejected."""

CHECKED = 16  # triples of a stream on which the short way is compared with the plain one


class Encoder:
    """`tokenizer(text, add_special_tokens=False)` for triples of texts that open alike.

    Added tokens such as <|im_start|> split a text before anything else is done to it, so what precedes the last of them
    in the prompt is encoded once, and the rest of each text behind that one token. A tokenizer for which this does not
    hold (a slow one, one whose added tokens look at their neighbours) is called for each text as a whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.unchecked = CHECKED
        self.hard: re.Pattern[str] | None = None
        added = [] if not tokenizer.is_fast else list(tokenizer.added_tokens_decoder.values())
        hard = sorted((token.content for token in added if not token.normalized), key=len, reverse=True)
        if hard and not any(token.single_word for token in added):
            self.hard = re.compile("|".join(map(re.escape, hard)))

    def plain(self, texts: list[str]) -> list[Ids]:
        """Ids of each text, nothing added."""
        if not texts:
            return []
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]  # fmt: skip

    def triples(self, triples: list[Texts]) -> list[tuple[Ids, Ids, Ids]]:
        """Ids of the three texts of each triple."""
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
        anchors, texts = [], []
        for triple in triples:
            anchor = None
            for match in self.hard.finditer(triple[0]):
                anchor = match
            # a longer added token may start at the same place in the whole texts
            if anchor and all((other := self.hard.match(text, anchor.start())) and other.end() == anchor.end()
                              for text in triple[1:]):  # fmt: skip
                texts.append(triple[0][: anchor.end()])
                texts += [text[anchor.start() :] for text in triple]
            else:
                anchor = None
                texts += triple
            anchors.append(anchor)
        ids = iter(self._fast(texts))
        result = []
        for anchor in anchors:
            if anchor is None:
                result.append((next(ids), next(ids), next(ids)))
            else:
                head = next(ids)[:-1]
                result.append((head + next(ids), head + next(ids), head + next(ids)))
        return result

    def _fast(self, texts: list[str]) -> list[Ids]:
        backend: Any = self.tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue] (is_fast)
        if backend.truncation or backend.padding:
            return self.plain(texts)
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


class Renderer:
    """Messages to text with the tokenizer's chat template, a failing row apart from the others."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]):
        if not tokenizer.chat_template:
            raise RequestError(
                "the rows are conversations, but the tokenizer has no chat template: name one with model.chat_template "
                "(chatml, zephyr, llama-3, or the path of a Jinja file), or set tokenizer.chat_template in Python"
            )
        self.tokenizer, self.template_kwargs = tokenizer, template_kwargs

    def triples(self, pairs: Sequence[Pair]) -> list[Texts | Dropped]:
        """Prompt, prompt + chosen and prompt + rejected of each pair as TRL renders them, or why it cannot be."""
        plain = self.template_kwargs | {"tools": None}
        asked, wholes = [], []
        for pair in pairs:
            own = bool(pair.tools or pair.template_kwargs)
            options = self.template_kwargs | {"tools": pair.tools} | pair.template_kwargs if own else plain
            asked.append((pair.prompt, options | generation(pair)))
            prompt: Any = pair.prompt
            wholes += [(prompt + side, options) for side in (pair.chosen, pair.rejected)]
        jobs: list[Job] = asked + wholes
        texts = render_chats(self.tokenizer, jobs)
        prompts, sides = texts[: len(pairs)], texts[len(pairs) :]
        return [agreed(triple) for triple in zip(prompts, sides[::2], sides[1::2], strict=True)]


def agreed(texts: Sequence[str | TemplateRefused]) -> Texts | Dropped:
    """The three texts of a pair, or the template's words where it refused one of them."""
    for text in texts:
        if isinstance(text, TemplateRefused):
            return Dropped(REFUSED, str(text)[:200])
    prompt, chosen, rejected = texts
    return common(prompt, chosen, rejected)  # type: ignore[arg-type]  # refusals are gone


def generation(pair: Pair) -> dict[str, bool]:
    """TRL's rule: a prompt that ends with an assistant turn is continued, any other gets the generation prompt."""
    ends_with_assistant = pair.prompt[-1]["role"] == "assistant"  # pyright: ignore[reportArgumentType] (a conversation)
    return {"add_generation_prompt": not ends_with_assistant, "continue_final_message": ends_with_assistant}


def common(prompt: str, chosen: str, rejected: str) -> Texts:
    """The prompt cut to what both whole texts open with: some templates write more after it than a prompt's end."""
    if not (chosen.startswith(prompt) and rejected.startswith(prompt)):
        prompt = common_prefix((prompt, chosen, rejected))
    return prompt, chosen, rejected


def common_prefix(texts: Sequence[Any]) -> Any:
    """Longest common prefix of strings or of lists."""
    low, high = min(texts), max(texts)
    length = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:length]


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The source of the chat template(s), for what it mentions."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else json.dumps(template or "")


def turn_end(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> int | None:
    """The token that the template writes after an assistant turn (<|im_end|>, <|eot_id|>, EOS ...), if it is one."""
    mark = "the answer"
    try:
        turns = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": mark}]
        text = render_chat(tokenizer, turns, **template_kwargs)
    except TemplateRefused:  # a template that wants other conversations than this one
        return None
    if mark not in text:
        return None
    after = tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
    return first_of(after, {n for n, token in tokenizer.added_tokens_decoder.items() if token.content.strip()})  # pyright: ignore


def first_of(ids: Iterable[int], wanted: set[int]) -> int | None:
    return next((token for token in ids if token in wanted), None)
