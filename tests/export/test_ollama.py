"""Modelfiles: parsed as Ollama parses them, their Go templates run by a small interpreter of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import GenerationConfig

from orpo_lite.export.ollama import chat, find_turns, modelfile
from orpo_lite.recipe.loading import chat_templates
from tests.tiny import FAMILIES, base_tokenizer, template_text, tiny_tokenizer
from tests.training import CHATML

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]"
    "['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\n'"
    " + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}"
    "{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ODD = "{% for m in messages %}{{ m['content'] | upper }};{% endfor %}"


def parse(text: str) -> list[tuple[str, str]]:
    """Commands of a Modelfile: name (of the parameter, for PARAMETER) and argument, quotes off."""
    found, rest = [], text
    while rest:
        match = re.match(r'(FROM|ADAPTER|TEMPLATE|SYSTEM|PARAMETER (\w+)) (?:"""(.*?)"""|([^\n"]+))\n', rest, re.DOTALL)
        assert match, rest
        found.append((match[2] or match[1], match[3] if match[4] is None else match[4]))
        rest = rest[match.end() :]
    return found


def go(template: str, messages: list[dict[str, str]]) -> str:
    """Run the part of Go's template language that occurs: range, if, else if, end, eq, not, and, le, fields."""
    words = re.split(r"\{\{ (.*?) \}\}", template)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")

    def value(expression: str, scope: dict) -> object:
        expression = expression.strip()
        if match := re.fullmatch(r'eq \$m\.Role "(\w+)"', expression):
            return scope["m"]["role"] == match[1]
        if match := re.fullmatch(r"and (\S+) \((.*)\)", expression):
            return value(match[1], scope) and value(match[2], scope)
        if match := re.fullmatch(r"le \$i (\d+)", expression):
            return scope["i"] <= int(match[1])
        if match := re.fullmatch(r"not (\S+)", expression):
            return not value(match[1], scope)
        return {".System": system, "$.System": system, "$m.Content": scope.get("m", {}).get("content")}[expression]

    def block(at: int, scope: dict, live: bool) -> tuple[str, int]:
        """Text from word `at` to the `end` or `else` that closes this block, and where that is."""
        out = ""
        while at < len(words):
            if at % 2 == 0:
                out += words[at] if live else ""
                at += 1
            elif words[at] == "end" or words[at].startswith("else"):
                return out, at
            elif words[at].startswith("range"):
                for index, message in enumerate(messages):
                    text, close = block(at + 1, {"i": index, "m": message}, live)
                    out += text
                at = close + 1
            elif words[at].startswith("if"):
                done, condition = False, words[at][3:]
                while True:
                    taken = live and not done and bool(value(condition, scope))
                    text, at = block(at + 1, scope, taken)
                    out, done = out + text, done or taken
                    if words[at] == "end":
                        break
                    condition = words[at].removeprefix("else if ")
                at += 1
            else:
                out += str(value(words[at], scope)) if live else ""
                at += 1
        return out, at

    return block(0, {}, True)[0]


def tokenizer_with(template: str, bos: str | None = "<s>"):
    return tiny_tokenizer(("<|im_start|>", "<|im_end|>", "<|end|>"), template, bos=bos, eos="</s>")


def commands(tokenizer, adds_bos: bool = True, **options):
    text, notes = modelfile("./m.gguf", tokenizer, [tokenizer.eos_token_id], None, 2048, adds_bos, **options)
    return dict(parse(text)), notes


CONVERSATIONS = [
    chat("Hi"),
    chat("Hi", "Hello.", "Tell me: {1} < 2?\n\nPlease"),
    chat("A", "B", "C", "D", "E"),
    chat("Hi", system="Answer in verse."),
    chat("Hi", "Hello.", "Bye", system="Answer in\nverse."),
]
KNOWN = {
    **{name: path.read_text("utf-8") for name, path in chat_templates().items() if name in ("chatml", "mistral", "zephyr")},
    **{name: template_text(f"{name}.jinja") for name in ("llama3", "llama3_2", "gemma", "qwen2_5", "qwen3", "phi3_5")
       if (Path(chat_templates().get(name, "/nowhere"))).is_file()},
    "llama2": LLAMA2,
    "phi3": PHI3,
    "chatml-test": CHATML,
    "r1": template_text("deepseek_r1_distill.jinja"),
}  # fmt: skip


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", KNOWN)
def test_template_says_what_the_tokenizer_says(name, adds_bos):
    tokenizer = tokenizer_with(KNOWN[name])
    turns = find_turns(tokenizer, adds_bos)
    found, _ = commands(tokenizer, adds_bos)
    if turns is None:
        assert "TEMPLATE" not in found
        pytest.skip(f"{name}: left to the template in the GGUF file")
    for messages in CONVERSATIONS:
        if messages[0]["role"] == "system" and turns.system is None:
            continue
        expected = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        if adds_bos:
            expected = expected.removeprefix(tokenizer.bos_token)
        if messages[0]["role"] != "system" and "SYSTEM" in found:
            # Ollama puts the Modelfile's SYSTEM first
            messages = [{"role": "system", "content": found["SYSTEM"]}, *messages]
        assert go(found["TEMPLATE"], messages) == expected


@pytest.mark.parametrize(
    "name",
    ["chatml", "zephyr", "mistral", "phi3", "llama2", "llama3", "gemma", "qwen2_5", "qwen3", "chatml-test", "r1"],
)
def test_these_families_are_known(name):
    assert "TEMPLATE" in commands(tokenizer_with(KNOWN[name]))[0]


@pytest.mark.parametrize("base", [name for name, family in FAMILIES.items() if family.template])
def test_base_models_of_the_recipes(base):
    tokenizer = base_tokenizer(base)
    found, notes = commands(tokenizer, adds_bos=FAMILIES[base].add_bos)
    if "SmolLM3" in base:  # metadata with today's date around every system turn: no fixed texts
        assert "TEMPLATE" not in found and any("TEMPLATE is left out" in note for note in notes)
        return
    assert "TEMPLATE" in found
    if "SmolLM2" in base:
        assert found["SYSTEM"] == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


TURNS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + END }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"  # fmt: skip


@pytest.mark.parametrize(
    ("end", "stops"),
    [
        (r"'\n### End\n\n'", ["</s>", "### End"]),
        (r"' [/ANSWER]' + eos_token + '\n'", ["</s>", "[/ANSWER]"]),
        (r"'<|eot|>\n'", ["</s>", "<|eot|>"]),  # the vocabulary splits it
        (r"'<|im_end|>\n'", ["</s>"]),  # one token, which the caller lists
        (r"' </s>\n'", ["</s>"]),
        (r"eos_token + '### End'", ["</s>"]),
        (r"'\n\n'", ["</s>"]),
        (r"'; '", ["</s>"]),
        (r"'<\"\"\">'", ["</s>"]),  # which a Modelfile cannot quote
    ],
)
def test_stops_come_from_the_end_of_a_turn(end, stops):
    tokenizer = tokenizer_with(TURNS.replace("END", end))
    text, _ = modelfile("./m.gguf", tokenizer, [tokenizer.eos_token_id], None, 2048, True)
    assert [value for name, value in parse(text) if name == "stop"] == stops


def test_unknown_template_is_left_out_and_said():
    found, notes = commands(tokenizer_with(ODD))
    assert "TEMPLATE" not in found and any("left out" in note for note in notes)


def test_what_ollama_would_drop_or_misread_is_left_out():
    odd = "{% for m in messages %}{{ m['role'] + '\x07' + m['content'] + '|' }}{% endfor %}"
    assert "TEMPLATE" not in commands(tokenizer_with(odd))[0]
    braces = "{% for m in messages %}{{ m['role'] + '{' + '{ ' + m['content'] + '|' }}{% endfor %}"
    assert "TEMPLATE" not in commands(tokenizer_with(braces))[0]


def test_parameters():
    tokenizer = tokenizer_with(CHATML)
    generation = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    text, _ = modelfile("./m.gguf", tokenizer, stops, generation, 131072, False, "./a.gguf")
    found = parse(text)
    assert found[:2] == [("FROM", "./m.gguf"), ("ADAPTER", "./a.gguf")]
    assert [value for name, value in found if name == "stop"] == ["</s>", "<|im_end|>"]
    assert {"temperature": "0.6", "top_p": "0.9", "repeat_penalty": "1.1", "num_ctx": "8192"}.items() <= dict(
        found
    ).items()
