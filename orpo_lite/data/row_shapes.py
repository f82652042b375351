"""Every shape of preference row -> one Pair: prompt, chosen, rejected, tools.

A row's columns and their types determine its shape; `to_pair` converts it or raises Dropped with the reason. Formats
that only name or nest the same things differently are brought into these columns first, by `row_formats`. To add a shape:
name it, put it into a family, recognize it in `row_shape` and convert it in `conversation_sides` or `string_sides`.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from orpo_lite.common.errors import RequestError
from orpo_lite.data.dropped_rows import (
    EMPTY,
    EMPTY_PROMPT,
    EQUAL,
    PROMPTS_DIFFER,
    REMEDIES,
    UNPAIRED,
    WRONG_TYPES,
    Dropped,
)
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
from orpo_lite.data.row_formats import FORMATS, standard
from orpo_lite.recipe.validation import leaves, unfit

EXPLICIT = "conversations, explicit prompt"
IMPLICIT = "conversations, implicit prompt"
ULTRAFEEDBACK = "prompt string and conversations (UltraFeedback)"
SHAREGPT = "ShareGPT"
ALPACA = "Alpaca"
STRINGS = "strings, explicit prompt"
BARE_STRINGS = "strings, implicit prompt"
HH = "Anthropic HH strings"

# a source holds rows of one family: within a family shapes may mix, across families answers are rendered differently
FAMILY = dict.fromkeys((EXPLICIT, IMPLICIT, ULTRAFEEDBACK, SHAREGPT, ALPACA), "conversations") | {
    shape: shape for shape in (STRINGS, BARE_STRINGS, HH)
}
HH_ANSWER = "\n\nAssistant:"
SIDES = ("chosen", "rejected")


class Pair(NamedTuple):
    """A preference pair. Messages get the chat template; strings are tokenized as they are."""

    prompt: Messages | str
    chosen: Messages | str
    rejected: Messages | str
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}

    @property
    def chat(self) -> bool:
        """Tell whether the pair is a conversation."""
        return isinstance(self.prompt, list)

    @property
    def prompt_text(self) -> str:
        """The prompt's words without template, system turns and outer spaces: equal for equal prompts in any shape."""
        turns = self.prompt if isinstance(self.prompt, list) else text_turns(self.prompt)
        return "\0".join(str(turn.get("content", "")).strip() for turn in turns if turn["role"] != "system")


def row_shape(row: Any) -> str | None:
    """Return the shape of one row, or None if it is not a preference row."""
    try:
        row = standard(row)
    except Dropped:
        return None
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
    texts = [value for value in sides if value is not None]
    if all(isinstance(text, str) and text.lstrip().startswith("Human:") and HH_ANSWER in text for text in texts):
        return HH
    return BARE_STRINGS if prompt is None else STRINGS if isinstance(prompt, str) else None


def source_shape(rows: list[Any], label: str, apply_template: bool) -> str:
    """Return the most frequent shape among a source's first rows.

    Raises:
        RequestError: none of them is a preference row, or apply_template is set where nothing shows the prompt.
    """
    if not rows:
        raise RequestError(f"{label}: holds no rows: write at least one with chosen and rejected")
    shape = detect(rows)
    named = {name for row in rows if isinstance(row, dict) for name in row}
    there = [] if any(format_.columns <= named for format_ in FORMATS) else [side in named for side in SIDES]
    if shape is None or sum(there) == 1:
        first = rows[0]
        if {"prompt", "completion", "label"} <= named:
            raise RequestError(f"{label}: no prompt has answers of both labels: {REMEDIES[UNPAIRED]}")
        if isinstance(first, dict) and {"chosen", "rejected"} <= first.keys():
            try:
                check_kinds(first, [side for side in (*SIDES, "prompt") if side in first])
            except Dropped as drop:
                raise RequestError(f"{label}: row 0: {drop.detail}: fix the data") from None
        found = describe_columns(first) if isinstance(first, dict) else f"rows that are {type(first).__name__}"
        if deciding := next(
            (name for name in sorted(named) if re.search("prefer|better|winner|label", str(name))), None
        ):
            raise RequestError(
                f"{label}: found columns {found}: {deciding} seems to say in each row which answer is better, which no map of "
                "names can follow: write the better one as chosen and the other as rejected"
            )
        raise RequestError(
            f"{label}: found columns {found}, expected chosen and rejected (text or messages) and most often a prompt; "
            "map other names with data.columns, for example {prompt: ask, chosen: good, rejected: bad}"
        )
    if shape == BARE_STRINGS and apply_template:
        raise RequestError(
            f"{label}: data.apply_template is set, but the rows are strings without a prompt column, so nothing shows "
            "where the answers start; name the prompt's column with data.columns.prompt or leave apply_template out"
        )
    return shape


def detect(rows: Iterable[Any]) -> str | None:
    """Return the most frequent shape among the rows; None if none of them is a preference row."""
    counts = Counter(shape for row in rows if (shape := row_shape(row)))
    return counts.most_common(1)[0][0] if counts else None


def check_kinds(row: dict[str, Any], columns: Iterable[str]) -> None:
    """Raise Dropped if a column is missing or is neither text nor messages."""
    for column in columns:
        if row.get(column) is None:
            raise Dropped(EMPTY, f"{column} is missing")
        if not isinstance(row[column], str | list | dict):
            raise Dropped(WRONG_TYPES, f"{column} is {kind(row[column])}, expected text or messages")


def to_pair(row: Any, of_source: str, *, strict: bool, apply_template: bool, tool_calls: bool) -> Pair:
    """Convert one row.

    Args:
        row: as read, columns already renamed to the standard names.
        of_source: the shape of its source; a row of another family is refused.
        strict: drop what a curated data set should not hold (empty turns, equal sides, prompts that differ); without
            it rows are taken as TRL takes them.
        apply_template: turn plain strings into one user and one assistant turn, HH strings into their turns.
        tool_calls: whether the template renders `tool_calls`; if not, ShareGPT function calls stay text.

    Raises:
        Dropped: the row cannot or should not be trained on.
    """
    row = standard(row)
    shape = row_shape(row)
    if isinstance(row, dict):
        check_kinds(row, SIDES)
    if shape is None or FAMILY[shape] != FAMILY[of_source]:
        found = f"columns {describe_columns(row)}" if isinstance(row, dict) else kind(row)
        raise Dropped(WRONG_TYPES, f"found {shape or found}, the source is {of_source}")
    if FAMILY[shape] == "conversations":
        prompt, chosen, rejected = conversation_sides(row, shape, strict, tool_calls)
    else:
        prompt, chosen, rejected = string_sides(row, shape, strict)
        if apply_template:
            system = row.get("system")
            named = isinstance(system, str) and system
            prompt = ([{"role": "system", "content": system}] if named else []) + text_turns(prompt)
            texts = (side.strip() if shape == HH else side for side in (chosen, rejected))
            chosen, rejected = ([{"role": "assistant", "content": text}] for text in texts)
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
    """Return prompt, chosen and rejected of a row whose answers are messages."""
    chosen = messages(row["chosen"], "chosen", tool_calls)
    rejected = messages(row["rejected"], "rejected", tool_calls)
    begin = {side[0]["role"] if side else None for side in (chosen, rejected)}
    system: Messages = []
    if isinstance(row.get("system"), str) and row["system"].strip() and (strict or shape in (SHAREGPT, ALPACA)):
        system = [{"role": "system", "content": row["system"]}]
    if shape == ALPACA:
        prompt = alpaca_prompt(row)
    elif shape == SHAREGPT:
        prompt = messages(row["conversations"], "conversations", tool_calls)
    elif shape == EXPLICIT:
        prompt = messages(row["prompt"], "prompt", tool_calls)
    elif shape == ULTRAFEEDBACK and row["prompt"].strip() and begin == {"assistant"}:
        prompt = [{"role": "user", "content": checked_text(row["prompt"], "prompt")}]
    else:
        prompt = None
    # the answers of some data sets begin with the prompt, or with the part of it that the prompt column lacks
    if prompt is not None and strict and begin <= {"system", "user"}:
        chosen, rejected = (side if side[: len(prompt)] == prompt else prompt + side for side in (chosen, rejected))
        prompt = None
    if prompt is None:
        prompt, chosen, rejected = split_conversations(chosen, rejected, strict)
    if system and (not prompt or prompt[0]["role"] != "system"):
        prompt = system + prompt
    if started(prompt) and any(side[:1] == prompt[-1:] for side in (chosen, rejected)):
        prompt = prompt[:-1]  # the conversation holds one of the answers already
    return prompt, chosen, rejected


def started(prompt: Any) -> bool:
    """Return whether a prompt ends in a started answer."""
    return isinstance(prompt, list) and len(prompt) > 1 and prompt[-1]["role"] == "assistant"


def without_system(turns: Messages) -> Messages:
    """Return turns with an opening system turn in front of the first user turn, an empty line between them."""
    if [turn["role"] for turn in turns[:2]] != ["system", "user"]:
        return turns
    system, user, *rest = turns
    return [user | {"content": f"{system['content'].strip()}\n\n{user['content']}"}, *rest]


def split_conversations(chosen: Messages, rejected: Messages, strict: bool) -> tuple[Messages, Messages, Messages]:
    """Split two whole conversations at their last assistant turn."""
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns:
            raise Dropped(EMPTY, f"{side} holds no turn")
        if turns[-1]["role"] != "assistant":
            raise Dropped(WRONG_TYPES, f"{side} ends with a {turns[-1]['role']} turn, expected assistant")
    if chosen[:-1] == rejected[:-1]:
        return chosen[:-1], chosen[-1:], rejected[-1:]
    turns = enumerate(zip(chosen, rejected, strict=False))
    common = next((number for number, (one, other) in turns if one != other), min(len(chosen), len(rejected)))
    ends = [side[common:] for side in (chosen, rejected)]
    # from there on the model acts: calls, what the tools say, answers
    acted = all(turns and turns[0]["role"] == "assistant" for turns in ends) and all(
        turn["role"] in ("assistant", "tool") for turns in ends for turn in turns
    )
    if not common or (strict and not acted):
        raise Dropped(PROMPTS_DIFFER, f"chosen and rejected differ from turn {common + 1}, before the last answer")
    return chosen[:common], chosen[common:], rejected[common:]


def string_sides(row: dict[str, Any], shape: str, strict: bool) -> tuple[str, str, str]:
    """Return prompt, chosen and rejected of a row whose answers are text."""
    chosen, rejected = (checked_text(row[side], side) for side in SIDES)
    if shape == STRINGS:
        return checked_text(row["prompt"], "prompt"), chosen, rejected
    if not chosen or not rejected:
        raise Dropped(EMPTY, f"{'rejected' if chosen else 'chosen'} is empty")
    if shape == BARE_STRINGS:
        return split_strings(chosen, rejected)
    cuts = [text.rfind(HH_ANSWER) + len(HH_ANSWER) for text in (chosen, rejected)]
    prompt, other = chosen[: cuts[0]], rejected[: cuts[1]]
    if prompt != other and not strict:
        return split_strings(chosen, rejected)
    if prompt != other:
        place = len(os.path.commonprefix([chosen, rejected]))
        here, there = chosen[place : place + 30], rejected[place : place + 30]
        raise Dropped(PROMPTS_DIFFER, f"they differ from {here!r} / {there!r}")
    answers = chosen[cuts[0] :], rejected[cuts[1] :]
    if strict:
        for side, answer in zip(SIDES, answers, strict=True):
            if HH_TURN.search(answer):
                raise Dropped(WRONG_TYPES, f"{side} ends with a Human turn, expected Assistant")
        check_turns(text_turns(prompt))
    return prompt, *answers


def split_strings(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split strings without a prompt column by TRL's rule: the prompt is their common prefix without a last space."""
    cut = len(os.path.commonprefix([chosen, rejected]))
    if cut == min(len(chosen), len(rejected)):
        cut -= 1  # one string begins with the other: TRL leaves at least a character
    elif cut and chosen[cut - 1] == " ":
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def alpaca_prompt(row: dict[str, Any]) -> Messages:
    """Return the messages of instruction, input and history."""
    turns: Messages = []
    for past in row.get("history") or []:
        if not (isinstance(past, list | tuple) and len(past) == 2 and all(isinstance(text, str) for text in past)):
            raise Dropped(WRONG_TYPES, "history is not a list of [instruction, answer]")
        turns += [{"role": "user", "content": past[0]}, {"role": "assistant", "content": past[1]}]
    parts = [row["instruction"], row.get("input") or ""]
    if not isinstance(parts[1], str):
        raise Dropped(WRONG_TYPES, f"input is {kind(parts[1])}, expected text")
    text = "\n\n".join(checked_text(part, "instruction") for part in parts if part)
    return [*turns, {"role": "user", "content": text}]


def check(pair: Pair, strict: bool) -> None:
    """Raise Dropped for a pair that cannot be rendered and, if strict, for one that should not be trained on."""
    if isinstance(pair.prompt, list):
        if not pair.prompt:
            raise Dropped(EMPTY_PROMPT, "the prompt holds no turn")
        if pair.prompt[-1]["role"] not in ("user", "tool", "assistant"):
            raise Dropped(WRONG_TYPES, f"the prompt ends with a {pair.prompt[-1]['role']} turn")
        if strict:
            check_turns(pair.prompt)
    elif strict and not pair.prompt.strip():
        raise Dropped(EMPTY_PROMPT, "the prompt is empty")
    for name, side in zip(SIDES, (pair.chosen, pair.rejected), strict=True):
        turns: Messages = [{"role": "assistant", "content": side}] if isinstance(side, str) else side
        if not turns:
            raise Dropped(EMPTY, f"{name} holds no turn")
        if strict and turns[-1]["role"] != "assistant":
            raise Dropped(WRONG_TYPES, f"{name} ends with a {turns[-1]['role']} turn, expected assistant")
        if strict and not any(turn.get("tool_calls") or turn.get("content", "").strip() for turn in turns):
            raise Dropped(EMPTY, f"{name} is empty")
    if strict and pair.chosen == pair.rejected:
        raise Dropped(EQUAL, "chosen and rejected are the same text")


def check_turns(turns: Messages) -> None:
    """Raise Dropped if a user or assistant turn of the prompt is empty."""
    for number, turn in enumerate(turns, 1):
        spoken = turn["role"] in ("user", "assistant") and not turn.get("tool_calls")
        if spoken and not turn.get("content", "").strip():
            raise Dropped(EMPTY_PROMPT, f"turn {number} of the prompt ({turn['role']}) is empty")
