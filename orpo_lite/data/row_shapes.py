"""Every shape of preference row -> one Pair: prompt, chosen, rejected, tools.

A row's shape is read off its columns and types; `to_pair` converts it or raises Dropped with the reason.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from orpo_lite.data.dropped_rows import EMPTY, EMPTY_PROMPT, EQUAL, PROMPTS_DIFFER, WRONG_TYPES, Dropped
from orpo_lite.data.messages import (
    HH_TURN,
    Messages,
    checked_text,
    describe_columns,
    kind,
    messages,
    read_tools,
    text_turns,
)
from orpo_lite.recipe.values import leaves, unfit

EXPLICIT = "conversations, explicit prompt"
IMPLICIT = "conversations, implicit prompt"
ULTRAFEEDBACK = "prompt string and conversations (UltraFeedback)"
SHAREGPT = "ShareGPT"
ALPACA = "Alpaca"
STRINGS = "strings, explicit prompt"
BARE_STRINGS = "strings, implicit prompt"
HH = "Anthropic HH strings"

# a source holds rows of one family: within it shapes may mix, across it the answers would be rendered differently
FAMILY = dict.fromkeys((EXPLICIT, IMPLICIT, ULTRAFEEDBACK, SHAREGPT, ALPACA), "conversations") | {
    shape: shape for shape in (STRINGS, BARE_STRINGS, HH)
}
COLUMNS = ("prompt", "chosen", "rejected", "tools", "system", "conversations", "instruction", "input", "history",
           "chat_template_kwargs")  # fmt: skip
HH_ANSWER = "\n\nAssistant:"


class Pair(NamedTuple):
    """A preference pair. Messages get the chat template; strings are tokenised as they are."""

    prompt: Messages | str
    chosen: Messages | str
    rejected: Messages | str
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}

    @property
    def chat(self) -> bool:
        return isinstance(self.prompt, list)

    @property
    def prompt_text(self) -> str:
        """The prompt's words without template, system turns and outer space: equal for equal prompts in any shape."""
        turns = self.prompt if isinstance(self.prompt, list) else text_turns(self.prompt)
        return "\0".join(str(turn.get("content", "")).strip() for turn in turns if turn["role"] != "system")


def row_shape(row: Any) -> str | None:
    """The shape of one row, or None if it is not a preference row."""
    if not isinstance(row, dict):
        return None
    sides = [row.get("chosen"), row.get("rejected")]
    side = next((value for value in sides if value is not None), None)
    prompt = row.get("prompt")
    if not isinstance(side, str | list | dict):
        return None
    if prompt is None and isinstance(row.get("conversations"), list):
        return SHAREGPT
    if prompt is None and isinstance(row.get("instruction"), str):
        return ALPACA if isinstance(side, str) else None
    if isinstance(prompt, list | dict):
        return EXPLICIT
    if not isinstance(side, str):
        return IMPLICIT if prompt is None else ULTRAFEEDBACK if isinstance(prompt, str) else None
    if all(isinstance(value, str) and is_hh(value) for value in sides if value is not None):
        return HH
    return BARE_STRINGS if prompt is None else STRINGS if isinstance(prompt, str) else None


def detect(rows: Iterable[Any]) -> str | None:
    """The most frequent shape among the rows; None if none of them is a preference row."""
    counts = Counter(shape for row in rows if (shape := row_shape(row)))
    return counts.most_common(1)[0][0] if counts else None


def to_pair(row: Any, source_shape: str, *, strict: bool, apply_template: bool, tool_calls: bool) -> Pair:
    """Convert one row.

    Args:
        row: as read, columns already renamed to the standard names.
        source_shape: the shape of its source; a row of another family is refused.
        strict: drop what a curated data set should not hold (empty turns, equal sides, prompts that differ); without
            it rows are taken as TRL takes them.
        apply_template: turn plain strings into one user and one assistant turn, HH strings into their turns.
        tool_calls: whether the template renders `tool_calls`; if not, ShareGPT function calls stay text.

    Raises:
        Dropped: the row cannot or should not be trained on.
    """
    shape = row_shape(row)
    if isinstance(row, dict):
        for side in ("chosen", "rejected"):
            if row.get(side) is None:
                raise Dropped(EMPTY, f"{side} is missing")
            if not isinstance(row[side], str | list | dict):
                raise Dropped(WRONG_TYPES, f"{side} is {kind(row[side])}, expected text or messages")
    if shape is None or FAMILY[shape] != FAMILY[source_shape]:
        found = f"columns {describe_columns(row)}" if isinstance(row, dict) else kind(row)
        raise Dropped(WRONG_TYPES, f"found {shape or found}, the source is {source_shape}")
    if FAMILY[shape] == "conversations":
        prompt, chosen, rejected = conversation_sides(row, shape, strict, tool_calls)
    else:
        prompt, chosen, rejected = string_sides(row, shape, strict)
        if apply_template:
            system = [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) else []
            turns = text_turns(prompt)
            prompt = (system if turns[0]["role"] != "system" and system and system[0]["content"] else []) + turns
            chosen, rejected = (
                [{"role": "assistant", "content": side.strip() if shape == HH else side}] for side in (chosen, rejected)
            )
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise Dropped(WRONG_TYPES, f"chat_template_kwargs is {kind(kwargs)}, expected a mapping")
    tools = read_tools(row.get("tools"))
    for place, value in leaves({"chat_template_kwargs": kwargs, "tools": tools}):
        if wrong := unfit(value):
            raise Dropped(WRONG_TYPES, f"{place}: {wrong}")
    pair = Pair(prompt, chosen, rejected, tools, kwargs)
    check(pair, strict)
    return pair


def conversation_sides(
    row: dict[str, Any], shape: str, strict: bool, tool_calls: bool
) -> tuple[Messages, Messages, Messages]:
    chosen = messages(row["chosen"], "chosen", tool_calls)
    rejected = messages(row["rejected"], "rejected", tool_calls)
    system: Messages = []
    if isinstance(row.get("system"), str) and row["system"].strip() and (strict or shape in (SHAREGPT, ALPACA)):
        system = [{"role": "system", "content": row["system"]}]
    if shape == ALPACA:
        prompt = alpaca_prompt(row)
    elif shape == SHAREGPT:
        prompt = messages(row["conversations"], "conversations", tool_calls)
    elif shape == EXPLICIT:
        prompt = messages(row["prompt"], "prompt", tool_calls)
    elif (
        shape == ULTRAFEEDBACK
        and row["prompt"].strip()
        and all(s and s[0]["role"] == "assistant" for s in (chosen, rejected))
    ):
        prompt = [{"role": "user", "content": checked_text(row["prompt"], "prompt")}]
    else:
        prompt = None
    # the answers of some data sets open with the prompt, or with the part of it that the prompt column lacks
    if (
        prompt is not None
        and strict
        and all(side and side[0]["role"] in ("system", "user") for side in (chosen, rejected))
    ):
        chosen, rejected = (side if side[: len(prompt)] == prompt else prompt + side for side in (chosen, rejected))
        prompt = None
    if prompt is None:
        prompt, chosen, rejected = split_conversations(chosen, rejected, strict)
    if system and (not prompt or prompt[0]["role"] != "system"):
        prompt = system + prompt
    return prompt, chosen, rejected


def split_conversations(chosen: Messages, rejected: Messages, strict: bool) -> tuple[Messages, Messages, Messages]:
    """Split two whole conversations at their last assistant turn."""
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns:
            raise Dropped(EMPTY, f"{side} holds no turn")
        if turns[-1]["role"] != "assistant":
            raise Dropped(WRONG_TYPES, f"{side} ends with a {turns[-1]['role']} turn, expected assistant")
    if chosen[:-1] == rejected[:-1]:
        return chosen[:-1], chosen[-1:], rejected[-1:]
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if strict or not common:
        raise Dropped(PROMPTS_DIFFER, f"chosen and rejected part at turn {common + 1}, before the last answer")
    return chosen[:common], chosen[common:], rejected[common:]


def string_sides(row: dict[str, Any], shape: str, strict: bool) -> tuple[str, str, str]:
    chosen, rejected = (checked_text(row[side], side) for side in ("chosen", "rejected"))
    if shape == STRINGS:
        return checked_text(row["prompt"], "prompt"), chosen, rejected
    if not chosen or not rejected:
        raise Dropped(EMPTY, f"{'rejected' if chosen else 'chosen'} is empty")
    if shape == BARE_STRINGS:
        return split_strings(chosen, rejected)
    cuts = [text.rfind(HH_ANSWER) + len(HH_ANSWER) for text in (chosen, rejected)]
    prompt, other = chosen[: cuts[0]], rejected[: cuts[1]]
    if prompt != other:
        if not strict:
            return split_strings(chosen, rejected)
        place = len(os.path.commonprefix([chosen, rejected]))
        raise Dropped(PROMPTS_DIFFER, f"they part at {chosen[place : place + 30]!r} / {rejected[place : place + 30]!r}")
    answers = chosen[cuts[0] :], rejected[cuts[1] :]
    if strict:
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            if HH_TURN.search(answer):
                raise Dropped(WRONG_TYPES, f"{side} ends with a Human turn, expected Assistant")
        check_turns(text_turns(prompt))
    return prompt, *answers


def split_strings(chosen: str, rejected: str) -> tuple[str, str, str]:
    """TRL's rule for strings without a prompt column: the common prefix, less a space at its end."""
    cut = len(os.path.commonprefix([chosen, rejected]))
    if cut == min(len(chosen), len(rejected)):
        cut -= 1  # one string opens the other: TRL leaves at least a character
    elif cut and chosen[cut - 1] == " ":
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def is_hh(text: str) -> bool:
    return text.lstrip().startswith("Human:") and HH_ANSWER in text


def alpaca_prompt(row: dict[str, Any]) -> Messages:
    turns: Messages = []
    for past in row.get("history") or []:
        if not (isinstance(past, list | tuple) and len(past) == 2 and all(isinstance(text, str) for text in past)):
            raise Dropped(WRONG_TYPES, "history is not a list of [instruction, answer]")
        turns += [{"role": "user", "content": past[0]}, {"role": "assistant", "content": past[1]}]
    parts = [row["instruction"], row.get("input") or ""]
    if not isinstance(parts[1], str):
        raise Dropped(WRONG_TYPES, f"input is {kind(parts[1])}, expected text")
    return [
        *turns,
        {"role": "user", "content": "\n\n".join(checked_text(part, "instruction") for part in parts if part)},
    ]


def check(pair: Pair, strict: bool) -> None:
    """Raise Dropped for what is in no state to be rendered, and if strict for what should not be trained on."""
    if isinstance(pair.prompt, list):
        if not pair.prompt:
            raise Dropped(EMPTY_PROMPT, "the prompt holds no turn")
        if pair.prompt[-1]["role"] not in ("user", "tool", "assistant"):
            raise Dropped(WRONG_TYPES, f"the prompt ends with a {pair.prompt[-1]['role']} turn")
        if strict:
            check_turns(pair.prompt)
    elif strict and not pair.prompt.strip():
        raise Dropped(EMPTY_PROMPT, "the prompt is empty")
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if isinstance(side, list):
            if not side:
                raise Dropped(EMPTY, f"{name} holds no turn")
            if strict and side[-1]["role"] != "assistant":
                raise Dropped(WRONG_TYPES, f"{name} ends with a {side[-1]['role']} turn, expected assistant")
            if strict and not any(turn.get("tool_calls") or turn.get("content", "").strip() for turn in side):
                raise Dropped(EMPTY, f"{name} is empty")
        elif strict and not side.strip():
            raise Dropped(EMPTY, f"{name} is empty")
    if strict and pair.chosen == pair.rejected:
        raise Dropped(EQUAL, "chosen and rejected are the same text")


def check_turns(turns: Messages) -> None:
    for number, turn in enumerate(turns, 1):
        spoken = turn["role"] in ("user", "assistant") and not turn.get("tool_calls")
        if spoken and not turn.get("content", "").strip():
            raise Dropped(EMPTY_PROMPT, f"turn {number} of the prompt ({turn['role']}) is empty")
