"""Conversations to text: the chat template's own prompt, and after it every answer as it was written, up to its end.

An answer is what a model writes after the template's generation prompt. Most templates write answers as they are given,
but some rewrite them: those of reasoning models drop or move the reasoning. So every part of an answer is looked for in
what the template wrote. If one is missing, the answer is placed as written between the generation prompt and the end
that the template gives to any answer. Where that cannot be done, the row is left out with a reason of its own.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from orpo_lite.common.errors import RequestError
from orpo_lite.data.dropped_rows import CHANGED, REFUSED, WRONG_TYPES, Dropped
from orpo_lite.data.messages import REASONING, Messages
from orpo_lite.data.row_shapes import Pair
from orpo_lite.model.tokenizer import MARKER, TemplateRefused, render_chat
from orpo_lite.recipe.validation import leaves

Span = tuple[int, int]
MARK = "the 7th answer"
"""An answer that no template rewrites; it shows what the template writes around any answer."""
THINK = re.compile(r"</?think>|\[/?THINK\]")
TYPED = re.compile("""["']type["']: ["']thinking""")
"""A part of a message that a template writes as it is in Python or JSON."""


class Answers(NamedTuple):
    """A prompt and one completion as text."""

    text: str
    context: tuple[Span, ...] = ()
    """Characters after the prompt that belong to no answer: turns of tools and users, and what opens the next answer."""
    ended: bool = False
    """True where the text ends with an end of turn of the template, so that no EOS belongs behind it."""


class Rendered(NamedTuple):
    """A pair as text."""

    prompt: str
    chosen: Answers
    rejected: Answers
    unopened: bool = False
    """True where an answer does not go on with what the generation prompt opens, such as reasoning."""

    unheard: str = ""
    """Role of a turn whose text the template leaves out of the prompt."""

    @property
    def texts(self) -> tuple[str, str, str]:
        """The prompt, and the whole of prompt + chosen and of prompt + rejected."""
        return self.prompt, self.chosen.text, self.rejected.text


@dataclass
class Side:
    """A completion on its way through the template."""

    turns: Messages
    """As written; `openings` has each turn of the assistant."""
    whole: str
    """Prompt and completion as the template writes them."""
    openings: dict[int, str] = field(default_factory=dict)
    """Turn of the assistant -> everything before it and the generation prompt."""

    @property
    def plain(self) -> bool:
        """Tell whether it is one turn of text, which can be placed without the template's help."""
        return len(self.turns) == 1 and bool(self.openings) and not self.turns[0].get("tool_calls")


@dataclass
class Written:
    """Texts that the template writes for one pair."""

    conversation: Messages
    """The prompt, without a started answer."""
    prefill: str
    """A started answer, which the completions continue."""
    options: dict[str, Any]
    prompt: str
    """Up to its generation prompt, where the completions begin with an answer."""
    sides: tuple[Side, Side]


class Renderer:
    """Messages to text with the tokenizer's chat template.

    Args:
        cut: end completions with their end of turn; without it all that the template writes stays, as in TRL.
        strict: begin every answer where generation begins; without it only where that keeps something from being lost,
            and else, as in TRL, where the texts with and without an answer part.

    Raises:
        RequestError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any], cut: bool, strict: bool):
        if not tokenizer.chat_template:
            raise RequestError(
                "the rows are conversations, but the tokenizer has no chat template: name one with model.chat_template "
                "(chatml, zephyr, llama-3, or the path of a Jinja file), or set tokenizer.chat_template in Python"
            )
        self.tokenizer, self.template_kwargs, self.cut, self.strict = tokenizer, template_kwargs, cut, strict
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        self.special = special_tokens(tokenizer)
        self.forms, after_call = find_forms(tokenizer, template_kwargs)
        after_answer = (self._frame([{"role": "user", "content": "the question"}], template_kwargs) or ("", ""))[1]
        first = either(token.content for token in added).search(after_answer)
        self.turn_end = first.group() if first else None
        ends = [tokenizer.eos_token, self.turn_end, last_special(self.special, after_call)]
        self.ends = either(str(end) for end in ends if end)

    def __call__(self, pair: Pair) -> Rendered:
        """Return a pair as text.

        Raises:
            Dropped: the template cannot write it.
        """
        written = self._write(pair)
        found = self._read(written)
        left = (turn["role"] for turn in written.conversation if turn["role"] != "assistant"
                and not is_heard(turn, found.prompt))  # fmt: skip
        return found._replace(unheard=next(left, ""))

    def _write(self, pair: Pair) -> Written:
        options = self.template_kwargs | {"tools": pair.tools} | pair.template_kwargs

        def render(turns: Messages, generate: bool) -> str:
            try:
                text = render_chat(
                    self.tokenizer, formed(turns, self.forms), **options | {"add_generation_prompt": generate}
                )
                text.encode()
            except TemplateRefused as refusal:
                raise Dropped(REFUSED, str(refusal)[:200]) from None
            except UnicodeEncodeError as error:
                part = error.object[error.start]
                raise Dropped(WRONG_TYPES, f"the row holds half a character ({part!a}), not valid Unicode") from None
            return text

        conversation: Any = pair.prompt
        completions: Any = pair.chosen, pair.rejected
        answered = all(turns and turns[0]["role"] == "assistant" for turns in completions)
        prefill = ""
        started = len(conversation) > 1 and conversation[-1]["role"] == "assistant"
        if started and answered and not conversation[-1].get("tool_calls"):
            prefill, conversation = conversation[-1]["content"], conversation[:-1]
        prompt = render(conversation, answered)
        sides = []
        for turns in completions:
            first = [turns[0] | {"content": prefill + (turns[0].get("content") or "")}] if prefill else turns[:1]
            whole = conversation + first + turns[1:]
            side = Side(turns, render(whole, False))
            for number, turn in enumerate(turns):
                if turn["role"] == "assistant":
                    before = whole[: len(conversation) + number]
                    side.openings[number] = render(before, True) if number or not answered else prompt
            sides.append(side)
        return Written(conversation, prefill, options, prompt, (sides[0], sides[1]))

    def _read(self, written: Written) -> Rendered:
        """Find prompt and answers in what the template wrote, or place the answers there."""
        prompt, wholes = written.prompt, [side.whole for side in written.sides]
        thoughts = [
            side for side in written.sides if side.turns[0].get(REASONING) or THINK.match(spoken(side.turns[0]))
        ]
        if prompt.rstrip().endswith("</think>") and thoughts:
            closed = (
                "the generation prompt closes a reasoning, and the answer has its own: leave out enable_thinking: false"
            )
            raise Dropped(CHANGED, closed)
        follows = all(whole.startswith(prompt) for whole in wholes)
        if prefill := written.prefill:
            prompt = continued(shared_prefix([prompt, *wholes]), prefill, wholes) or prompt + prefill
            follows = all(whole.startswith(prompt) for whole in wholes)
        lost = Dropped(CHANGED, "the template writes the prompt differently once an answer follows")
        shared = prompt if follows else shared_prefix([prompt, *wholes])  # which goes by characters
        asked = follows or not written.conversation or is_heard(written.conversation[-1], shared)
        if asked and (follows or not (self.strict or prefill)):
            try:
                return self._found(written, shared, unopened=not follows)
            except Dropped as drop:
                lost = drop
        if all(side.plain for side in written.sides) and (placed := self._place(written, asked)):
            return placed
        if follows or prefill or not asked:
            raise lost
        return self._found(written, shared, unopened=True)

    def _found(self, written: Written, prompt: str, unopened: bool) -> Rendered:
        """Find all answers of a pair in what the template wrote.

        Raises:
            Dropped: a part of an answer is missing, or the template writes turns differently once others follow.
        """
        chosen, rejected = (self._answers(side, written.prompt, prompt) for side in written.sides)
        return Rendered(prompt, chosen, rejected, unopened)

    def _answers(self, side: Side, asked: str, prompt: str) -> Answers:
        whole, place, end = side.whole, len(prompt), None
        # as far as the whole follows the template's opening of each answer: it may open reasoning that this answer has not
        starts = {number: len(prompt if opening == asked else shared_prefix([opening, whole]))
                  for number, opening in side.openings.items()}  # fmt: skip
        context: list[Span] = []
        done = 0
        for number, start in starts.items():
            if start < place or not all(is_heard(turn, whole[place:start]) for turn in side.turns[done:number]):
                raise Dropped(
                    CHANGED, f"the template writes the turns before turn {number + 1} differently once it follows"
                )
            done = number + 1
            if start > place:
                context.append((place, start))
            following = [later for later in starts.values() if later > start]
            said = end_of_parts(whole, start, side.turns[number])
            end = self._end_of_turn(whole, said, min(following, default=len(whole)), final=not following)
            place = end or said
        if side.turns[-1]["role"] != "assistant":
            context.append((place, len(whole)))
        return self._closed(whole, end, tuple(context), bool(side.turns[-1].get("tool_calls")))

    def _closed(self, text: str, end: int | None, context: tuple[Span, ...], called: bool) -> Answers:
        if self.cut and end is not None:
            return Answers(text[:end], context, ended=True)
        # TRL writes EOS behind all that the template wrote; behind the end of a call it would be a second end
        return Answers(text, context, ended=called and bool(last_special(self.special, text)))

    def _end_of_turn(self, text: str, start: int, limit: int, final: bool) -> int | None:
        """Return where a turn ends whose last part ends at `start`; None if the template writes no end of turn."""
        if found := self.ends.search(text, start, limit):
            return found.end()
        if not final:
            return found.end() if (found := self.special.search(text, start, limit)) else None
        rest = text[start:limit].rstrip()
        return start + len(rest) if last_special(self.special, rest) else None

    # ---- answers that the template rewrites --------------------------------------------------------------------------

    def _place(self, written: Written, asked: bool) -> Rendered | None:
        """Write both answers between the generation prompt and the end of any answer; None where that shows no place.

        Args:
            asked: the template writes the last turn before the generation prompt as it does where an answer follows.
        """
        if not (frame := self._frame(written.conversation, written.options)):
            return None
        (head, tail), prompt, prefill = frame, written.prompt, written.prefill
        if not (prompt.startswith(head) or head.startswith(prompt)):
            if asked:
                return None
            head = prompt
        opening = prompt[len(head) :].strip()
        said = [in_one_text(side.turns[0], prompt) for side in written.sides]
        begun = begin(prompt, head, opening, prefill) if prefill else ""
        answers = []
        for text in said:
            if text is None:
                return None
            body = begun + text if begun else begin(prompt, head, opening, text)
            end = self._end_of_turn(body + tail, len(body), len(body + tail), final=True)
            answers.append(self._closed(body + tail, end, (), called=False))
        begun_so = [(prefill or text or "").lstrip().startswith(opening) or THINK.search(text or "") for text in said]
        unopened = bool(opening) and not all(begun_so)
        return Rendered(begun or prompt, answers[0], answers[1], unopened)

    def _frame(self, conversation: Messages, options: dict[str, Any]) -> tuple[str, str] | None:
        """Return what the template writes before and after an answer; None where it takes none."""
        try:
            turns = [*conversation, {"role": "assistant", "content": MARK}]
            head, found, tail = render_chat(self.tokenizer, turns, **options).rpartition(MARK)
        except TemplateRefused:
            return None
        return (head, tail) if found else None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern of the tokenizer's control tokens."""
    return either(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def template_markers(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern of what shows that a text carries a chat template: control tokens, and how answers are opened."""
    named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    plain = {str(token) for token in named}
    markers = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - plain
    if tokenizer.chat_template:
        try:
            asked = [{"role": "user", "content": MARK}]
            opening = render_chat(tokenizer, asked, add_generation_prompt=True).rpartition(MARK)[2]
            markers |= {line.strip() for line in opening.splitlines() if not line.strip().isalnum()} - {"", *plain}
        except TemplateRefused:  # of templates that expect other conversations
            pass
    # and those of other families: a text made for another model carries a template too
    return re.compile(f"{either(markers).pattern}|{MARKER.pattern}")


def last_special(special: re.Pattern[str], text: str) -> str | None:
    """Return the control token with which a text ends, before white space."""
    *_, last = [None, *special.finditer(text.rstrip())]
    return last.group() if last and last.end() == len(text.rstrip()) else None


def either(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of any of the texts, the longest first; of none, one that matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(set(texts), key=len, reverse=True))) or "(?!)")


def shared_prefix(texts: list[str]) -> str:
    """Return how the texts begin alike, without a mark of which only the beginning is alike."""
    common = os.path.commonprefix(texts)
    return common if common in texts else re.sub(r"[<\[][^<>\[\]\s]*$", "", common)


def spoken(turn: dict[str, Any]) -> str:
    """Return a turn's content, without spaces around it."""
    return str(turn.get("content") or "").strip()


def is_heard(turn: dict[str, Any], text: str) -> bool:
    """Return whether a text holds a turn's content, as it is or within JSON, as some templates write what tools say."""
    return any(form in text for form in spellings(spoken(turn)))


def continued(prompt: str, prefill: str, wholes: list[str]) -> str:
    """Return the prompt with the started answer as the template writes it behind it, or nothing where it does not."""
    started, space = prefill.strip(), prefill[len(prefill.rstrip()) :]
    found = []
    for whole in wholes:
        if (place := whole.find(started, len(prompt))) < 0:
            return ""
        end = place + len(started)
        found.append(whole[: end + len(os.path.commonprefix([space, whole[end:]]))])
    return os.path.commonprefix(found)


def begin(prompt: str, head: str, opening: str, answer: str) -> str:
    """Return prompt and answer, without the answer's beginning where the generation prompt ends with it already.

    Args:
        prompt: what the template writes up to its generation prompt.
        head: what it writes before an answer.
        opening: what the generation prompt has beyond that, such as `<think>`.
        answer: as written.
    """
    answered, thought = answer.lstrip(), THINK.match(answer.lstrip())
    for mark in (opening, thought and thought.group()):
        if mark and answered.startswith(mark) and prompt.rstrip().endswith(mark):
            space = prompt[len(prompt.rstrip()) :]
            return prompt + answered[len(mark) :].removeprefix(space)
    return (prompt if thought else max(prompt, head, key=len)) + answer


def in_one_text(turn: dict[str, Any], prompt: str) -> str | None:
    """Return reasoning and answer of a turn as one text; None if nothing shows how the reasoning is marked."""
    content, reasoning = turn.get("content") or "", turn.get(REASONING)
    if not reasoning:
        return content
    opened = prompt.rstrip().endswith("<think>")
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{content}" if opened else None


def end_of_parts(text: str, start: int, turn: dict[str, Any]) -> int:
    """Return where the last part of a turn ends in what the template wrote from `start` on.

    Raises:
        Dropped: a part is not there, or not as it was written.
    """
    place = end = start
    for forms in parts(turn):
        found = [(text.find(form, place), form) for form in forms] + [(text.find(form, start), form) for form in forms]
        first, form = next(((spot, form) for spot, form in found if spot >= 0), (-1, ""))
        if first < 0:
            what = ""
            if forms[0] == str(turn.get(REASONING)).strip():
                what = ", the answer's reasoning: write it into the content, between the marks that the model knows"
            elif turn.get("tool_calls") and forms[0] not in (turn.get("content") or ""):
                what = ", of a tool call: this template writes no calls; name one that does in model.chat_template"
            raise Dropped(CHANGED, f"the template leaves out or changes {forms[0][:60]!r}{what}")
        if place == start and THINK.match(turn.get("content") or "") and "</think>" in text[start:first]:
            raise Dropped(CHANGED, "the template closes a reasoning of its own before that of the answer")
        place = first + len(form)
        end = max(end, place)
    return end


def parts(turn: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the forms in which each part of a turn may be written: reasoning, answer, names and arguments of calls."""
    for text in (turn.get(REASONING) or "", *THINK.split(turn.get("content") or "")):
        if text.strip():
            yield [text.strip()]
    for call in turn.get("tool_calls") or []:
        function = call["function"]
        yield [function["name"]]
        for _, value in leaves(function["arguments"]):
            if isinstance(value, str) and value.strip():
                yield spellings(value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                yield [json.dumps(value), str(value)]


def spellings(text: str) -> list[str]:
    """Return the forms in which a template may write a text: within JSON, or as it is."""
    return [json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1], text.strip()]


# ---- templates differ in the form in which they take reasoning and the arguments of calls -----------------------------


class Forms(NamedTuple):
    """Forms in which a template takes what a message holds beside its content."""

    calls_as_text: bool
    """True where the arguments of calls are JSON text; else they are a mapping."""
    reasoning: str | None
    """Field of the reasoning, or `parts` where it is a part of a list as content; None where there is no place for it."""


def find_forms(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> tuple[Forms, str]:
    """Find the forms of a template by trying them; also what it writes after a call's last argument."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "weather", "description": "", "parameters": schema}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": MARK}}}

    def written(turn: dict[str, Any], form: Forms, **options: Any) -> str:
        """Return what the template writes of a turn, or nothing."""
        asked = {"role": "user", "content": "the question"}
        try:
            text = render_chat(tokenizer, formed([asked, turn], form), **options, **template_kwargs)
        except TemplateRefused:
            return ""
        text = text.rpartition("the question")[2]
        # encoded twice, JSON has \"city\"; a value that was not encoded at all has 'city'
        return (
            text if MARK in text and '\\"city' not in text and "'city'" not in text and not TYPED.search(text) else ""
        )

    thought = {"role": "assistant", REASONING: MARK, "content": "the answer"}
    reasoning = next((name for name in (REASONING, "thinking", "reasoning", "parts", "lists of parts")
                      if "the answer" in written(thought, Forms(False, name))), None)  # fmt: skip
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    for as_text in (False, True):
        form = Forms(as_text, reasoning)
        if "weather" in (text := written(called, form, tools=[tool])):
            return form, text.rpartition(MARK)[2]
    return Forms(False, reasoning), ""


def formed(turns: Messages, forms: Forms) -> Messages:
    """Return turns with reasoning and the arguments of calls in the forms that the template takes."""
    return [formed_turn(turn, forms) if turn["role"] == "assistant" else turn for turn in turns]


def formed_turn(turn: dict[str, Any], forms: Forms) -> dict[str, Any]:
    """Return one turn in a template's forms."""
    if forms.calls_as_text and turn.get("tool_calls"):
        calls = []
        for call in turn["tool_calls"]:
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            calls.append(call | {"function": call["function"] | {"arguments": arguments}})
        turn = turn | {"tool_calls": calls}
    if forms.reasoning in (None, REASONING) or not turn.get(REASONING):
        return turn
    rest = {name: value for name, value in turn.items() if name != REASONING}
    if forms.reasoning not in ("parts", "lists of parts"):
        return rest | {forms.reasoning: turn[REASONING]}
    text = {"type": "text", "text": turn[REASONING]}
    thinking = {"type": "thinking", "thinking": turn[REASONING] if forms.reasoning == "parts" else [text]}
    return rest | {"content": [thinking, {"type": "text", "text": turn.get("content") or ""}]}
