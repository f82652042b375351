"""Ollama's Modelfile: the chat template as a Go template, stop tokens, parameters."""

from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from orpo_lite.model.tokenizer import TemplateRefused, render_chat

CONTEXT = 8192
"""Largest num_ctx written: Ollama reserves memory for all of it, whatever a conversation needs."""
SYSTEM, USER, ANSWER, AGAIN = "X1system", "X2user", "X3answer", "X4again"
PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""transformers' name -> Ollama's name."""

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Turns:
    """A chat template that puts each message between fixed texts, as most do."""

    system: tuple[str, str] | None
    """None: the template refuses or drops system messages."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    """Text before the answer to be generated."""
    inside: bool = False
    """True where the system message is inside the first user turn, as in Llama 2 and Mistral."""
    default: str | None = None
    """System message of a conversation that has none; may be empty."""
    start: str = ""
    """Text before everything else, where llama.cpp does not add the BOS token itself."""

    def render(self, messages: Messages) -> str:
        """Return the text that Ollama renders from `go()` for a conversation."""
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        out = self.start
        if not system and self.system and self.default is not None:
            out += self.system[0] + self.default + self.system[1]
        for index, message in enumerate(messages):
            text = message["content"]
            if message["role"] == "user":
                if self.inside and self.system and system and index <= 1:
                    text = self.system[0] + system + self.system[1] + text
                out += self.user[0] + text + self.user[1]
            elif message["role"] == "assistant":
                out += self.assistant[0] + text + self.assistant[1]
            elif message["role"] == "system" and self.system and not self.inside:
                out += self.system[0] + text + self.system[1]
        return out + self.prompt

    def go(self) -> str:
        """Return the Go template over Ollama's .Messages and .System that says the same."""
        out = self.start
        first = ""
        if self.system:
            before, after = self.system
            if self.inside:
                first = f"{{{{ if and $.System (le $i 1) }}}}{before}{{{{ $.System }}}}{after}{{{{ end }}}}"
            elif self.default == "":
                # a default that has text is the Modelfile's SYSTEM
                out += f"{{{{ if not .System }}}}{before}{after}{{{{ end }}}}"
        out += "{{ range $i, $m := .Messages }}"
        turn, last = '{{{{ {} eq $m.Role "{}" }}}}{}{}{{{{ $m.Content }}}}{}', "{{ end }}{{ end }}"
        out += turn.format("if", "user", self.user[0], first, self.user[1])
        out += turn.format("else if", "assistant", self.assistant[0], "", self.assistant[1])
        if self.system and not self.inside:
            out += turn.format("else if", "system", self.system[0], "", self.system[1])
        return out + last + self.prompt


def chat(*texts: str, system: str | None = None) -> Messages:
    """Build a conversation of user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def find_turns(tokenizer: PreTrainedTokenizerBase, adds_bos: bool) -> Turns | None:
    """Find the fixed texts of a tokenizer's chat template; None where it is not of that kind.

    They are read from a few rendered conversations and taken only if they reproduce others exactly.
    """
    if not isinstance(tokenizer.chat_template, str):
        return None
    bos = str(tokenizer.bos_token or "")

    def jinja(messages: Messages, prompt: bool = True) -> str:
        return render_chat(tokenizer, messages, add_generation_prompt=prompt).removeprefix(bos)

    try:
        whole, closed = jinja(chat(USER)), jinja(chat(USER), prompt=False)
        head, tail = whole.split(USER)
        after_user = closed.split(USER)[1]
        once = jinja(chat(USER, ANSWER, AGAIN))
        between = once.split(USER)[1].split(ANSWER)[0]
        middle = once.split(ANSWER)[1].split(AGAIN)[0]
        ended = jinja(chat(USER, ANSWER), prompt=False).split(ANSWER)[1]
        opened = bool(bos) and render_chat(tokenizer, chat(USER)).startswith(bos)
    except (TemplateRefused, ValueError, IndexError):
        return None
    # some templates close a conversation that nothing is to be generated for
    closing = str(tokenizer.eos_token)
    after_user = after_user if tail.startswith(after_user) else after_user.removesuffix(closing)
    if head and middle.endswith(head):
        # what stands between an answer and the next turn only, as Llama 2's BOS, counts as the answer's end
        ended = middle.removesuffix(head)
    elif not middle.startswith(ended):
        ended = ended.removesuffix(closing)
    before_user = middle[len(ended) :]
    if not (tail.startswith(after_user) and between.startswith(after_user)):
        return None
    parts = {
        "user": (before_user, after_user),
        "assistant": (between[len(after_user) :], ended),
        "prompt": tail[len(after_user) :],
    }
    candidates: list[Turns] = []
    start = head.removesuffix(before_user)
    try:
        lead, rest = jinja(chat(USER, system=SYSTEM)).split(SYSTEM)
        seam = rest.split(USER)[0]
    except (TemplateRefused, ValueError):
        candidates.append(Turns(None, start=start, **parts))
    else:
        if seam.endswith(before_user):
            system = (lead, seam.removesuffix(before_user))
            candidates.append(Turns(system, **parts))
            if head.startswith(lead) and head.endswith(seam):
                candidates.append(Turns(system, default=head[len(lead) : len(head) - len(seam)], **parts))
        if lead.startswith(head):
            candidates.append(Turns((lead[len(head) :], seam), inside=True, start=start, **parts))
    found = next((turns for turns in candidates if agrees(turns, jinja)), None)
    # Ollama's tokenizer adds the BOS token where the file says so
    return replace(found, start=bos + found.start) if found and opened and not adds_bos else found


def agrees(turns: Turns, jinja: Any) -> bool:
    """Return True if the texts are the same for conversations with and without a system message."""
    long = ("How are you?", "Fine.\n\nAnd you?", 'Good: 1 < 2 & "so" {on}', "Oh?", "Yes.", "Well.", "Bye")
    conversations = [chat(*long[:n]) for n in (1, 3, 5, 7)]
    if turns.system:
        conversations += [chat(*long[:n], system="Be brief.\nBe kind.") for n in (1, 3, 5)]
    try:
        return all(turns.render(messages) == jinja(messages) for messages in conversations)
    except TemplateRefused:
        return False


def stop_text(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the text with which the chat template ends an answer, where that is no token of its own.

    None where it is one, where nothing follows an answer, and below three characters, which occur inside of answers too.
    """
    try:
        text = render_chat(tokenizer, chat(USER, ANSWER)) if tokenizer.chat_template else ""
    except TemplateRefused:
        return None
    end = text.rpartition(ANSWER)[2].strip() if ANSWER in text else ""
    for token in filter(str.strip, map(str, tokenizer.added_tokens_decoder.values())):
        end = end.partition(token)[0].strip()
    end = end.partition("\n")[0].rstrip()
    return end if len(end) > 2 else None


def quoted(text: str) -> str | None:
    """Put text between triple quotes; None where Ollama's parser would not return it unchanged."""
    plain = all(c.isprintable() or c == "\n" for c in text)
    return f'"""{text}"""' if plain and '"""' not in text and not text.endswith('"') else None


def modelfile(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
    generation: GenerationConfig | None,
    context: int | None,
    adds_bos: bool,
    adapter: str | None = None,
) -> tuple[str, list[str]]:
    """Return the text of a Modelfile, and notes on what was decided.

    Args:
        model: source of the weights: a path relative to the Modelfile, or the name of a model in Ollama.
        stops: ids of the tokens that end an answer.
        context: the model's longest, in tokens.
        adds_bos: True where the GGUF file says that a BOS token is to be added.
        adapter: path of a GGUF LoRA file, relative to the Modelfile.
    """
    lines, notes = [f"FROM {model}"], []
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    turns = find_turns(tokenizer, adds_bos)
    texts = [turns.start, *turns.user, *turns.assistant, turns.prompt, *(turns.system or ())] if turns else []
    template = quoted(turns.go()) if turns and not any("{{" in text for text in texts) else None
    default = quoted(turns and turns.default or "")
    if turns and template and default:
        lines.append(f"TEMPLATE {template}")
        notes.append(
            "chat template: written as Ollama's template; it renders probe conversations exactly as the tokenizer does"
        )
        if "strftime_now" in str(tokenizer.chat_template):
            notes.append("the chat template writes today's date: the Modelfile keeps the date of this export")
        if not turns.system:
            notes.append("the chat template has no system message: Ollama drops those that it gets")
        if turns.default:
            lines.append(f"SYSTEM {default}")
    elif tokenizer.chat_template is None:
        notes.append("no chat template: the model gets the bare text from Ollama")
    else:
        notes.append(
            "chat template: none that is known to be the same in Ollama's language, so TEMPLATE is left out and Ollama "
            "uses the template inside the GGUF file, where it knows it; compare an answer before you rely on it"
        )
    ends = [*map(str, tokenizer.convert_ids_to_tokens(stops)), stop_text(tokenizer)]
    lines += [f"PARAMETER stop {quoted(end)}" for end in ends if end and quoted(end)]
    if getattr(generation, "do_sample", False) in (True, None):
        values = {ours: getattr(generation, theirs, None) for theirs, ours in PARAMETERS.items()}
        lines += [f"PARAMETER {name} {value}" for name, value in values.items() if value is not None]
    if context:
        lines.append(f"PARAMETER num_ctx {min(context, CONTEXT)}")
    return "\n".join(lines) + "\n", notes
