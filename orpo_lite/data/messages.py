"""Messages and tools in the forms of many data sets -> role/content messages and function schemas."""

import json
import re
from typing import Any

from orpo_lite.data.dropped_rows import WRONG_TYPES, Dropped

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
         "observation": "tool", "function_response": "tool", "tool_response": "tool", "function": "tool"}  # fmt: skip
KNOWN_ROLES = {"user", "assistant", "system", "developer", "tool", "function_call", "tool_call", *ROLES}
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")

REASONING = "reasoning_content"
"""Field of a message that holds the reasoning apart from the answer; `READ_AS` are other names of it."""
READ_AS = ("reasoning", "thinking")

Messages = list[dict[str, Any]]


def text_turns(prompt: str) -> Messages:
    """Return a prompt string as messages: the turns of an HH string, else one user turn."""
    if not prompt.lstrip().startswith("Human:"):
        return [{"role": "user", "content": prompt}]
    parts = HH_TURN.split("\n\n" + prompt.lstrip())
    turns = [
        {"role": "user" if role == "Human" else "assistant", "content": content.strip()}
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def messages(value: Any, place: str, tool_calls: bool) -> Messages:
    """Convert messages in role/content or from/value form to role/content, without null fields."""
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    elif isinstance(value, dict):
        value = [value]
    if not isinstance(value, list | tuple):
        raise Dropped(WRONG_TYPES, f"{place} is {kind(value)}, expected messages")
    return [message(item, f"{place}[{number}]", tool_calls) for number, item in enumerate(value)]


def message(item: Any, place: str, tool_calls: bool) -> dict[str, Any]:
    """Convert one message; `place` names it in errors."""
    if not isinstance(item, dict):
        raise Dropped(WRONG_TYPES, f"{place} is {kind(item)}, expected a message")
    fields = {key: value for key, value in item.items() if value is not None}
    if "role" not in fields and "from" in fields:
        if not isinstance(fields["from"], str) or fields["from"] not in KNOWN_ROLES:
            raise Dropped(
                WRONG_TYPES, f"{place} is from {str(fields['from'])[:40]!r}, expected human, gpt, system, ..."
            )
        fields = {"role": fields["from"], "content": fields.get("value")}
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str):
        raise Dropped(WRONG_TYPES, f"{place} has no role (found {describe_columns(item)})")
    thoughts = [fields.pop(name) for name in (REASONING, *READ_AS) if isinstance(fields.get(name), str)]
    if len({text.strip() for text in thoughts}) > 1:
        raise Dropped(WRONG_TYPES, f"{place} holds different texts as its reasoning, expected one in {REASONING}")
    fields |= {REASONING: thoughts[0]} if thoughts else {}
    if isinstance(content, list):
        thinking = [part for part in content if isinstance(part, dict) and part.get("type") == "thinking"]
        content = joined([part for part in content if part not in thinking], place)
        if thinking:
            given = [part.get("thinking") for part in thinking]
            fields[REASONING] = "".join(
                one if isinstance(one, str) else joined(one, f"{place}.thinking") for one in given
            )
    if fields.get("tool_calls"):
        fields["tool_calls"] = read_calls(fields["tool_calls"], f"{place}.tool_calls")
        if content is None:
            return fields | {"role": ROLES.get(role, role)}
    if not isinstance(content, str):
        raise Dropped(WRONG_TYPES, f"{place} has {kind(content)} as content, expected text")
    checked_text(content, place)
    if "<think>" in content and str(fields.get(REASONING)).strip() in content:
        del fields[REASONING]  # some servers write it twice
    if role in ("function_call", "tool_call"):
        calls = parse_calls(content) if tool_calls else None
        return {"role": "assistant", "content": content} if calls is None else {
            "role": "assistant", "content": "", "tool_calls": calls}  # fmt: skip
    return fields | {"role": ROLES.get(role, role), "content": content}


def joined(parts: Any, place: str) -> str:
    """Join the texts of a list of parts.

    Raises:
        Dropped: another kind of part, such as an image.
    """
    for number, part in enumerate(parts if isinstance(parts, list | tuple) else [parts]):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            what = str(part.get("type"))[:40] if isinstance(part, dict) else kind(part)
            found = f"{place} has a list as content, expected text: part {number} is {what}"
            raise Dropped(WRONG_TYPES, f"{found}, and this trains text only")
    return "".join(part["text"] for part in parts)


def parse_calls(content: str) -> list[dict[str, Any]] | None:
    """Convert ShareGPT's function_call text to OpenAI-style tool calls; None if it is something else."""
    try:
        calls = json.loads(content)
        return read_calls(calls if isinstance(calls, list) else [calls], "function_call") or None
    except (ValueError, RecursionError, Dropped):
        return None


def read_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Convert tool calls to OpenAI's form with their arguments as a mapping, whether those were JSON text or not.

    Raises:
        Dropped: they are not calls with a name and arguments.
    """
    calls = []
    for number, call in enumerate(value if isinstance(value, list | tuple) else [value]):
        function = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Dropped(
                WRONG_TYPES, f"{place}[{number}] is {kind(call)} without a function's name, expected a tool call"
            )
        arguments = next((function[name] for name in ("arguments", "parameters", "args") if function.get(name)), {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                raise Dropped(
                    WRONG_TYPES, f"{place}[{number}]: its arguments are no JSON: {arguments[:60]!r}"
                ) from None
        if not isinstance(arguments, dict):
            raise Dropped(WRONG_TYPES, f"{place}[{number}] has {kind(arguments)} as arguments, expected a mapping")
        rest = {} if function is call else {key: item for key, item in call.items() if item is not None}
        calls.append({"type": "function"} | rest | {"function": {"name": function["name"], "arguments": arguments}})
    return calls


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Convert the tools column (a list of schemas or JSON strings, or one JSON string); None if it is empty."""
    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else value
        value = [value] if isinstance(value, dict) else value or None
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in value] if value else None
    except (ValueError, RecursionError, TypeError):
        raise Dropped(WRONG_TYPES, "tools is not readable as JSON") from None
    if tools and not all(isinstance(tool, dict) for tool in tools):
        raise Dropped(WRONG_TYPES, "tools is not a list of function schemas")
    return tools


def checked_text(value: Any, place: str) -> str:
    """Return the text, or raise Dropped if it is no text or not valid Unicode."""
    if not isinstance(value, str):
        raise Dropped(WRONG_TYPES, f"{place} is {kind(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Dropped(
            WRONG_TYPES, f"{place} holds half a character ({value[error.start]!a}), not valid Unicode"
        ) from None
    return value


def kind(value: Any) -> str:
    """Return what a value is, in words."""
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "null", bool: "true/false",
             int: "a number", float: "a number"}  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")


def describe_columns(row: dict[Any, Any]) -> str:
    """Return the names of a row's columns."""
    return ", ".join(str(key)[:40] for key in list(row)[:12]) or "none"
