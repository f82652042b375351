"""Tokenizer of a run: padding token, chat template by name, new tokens; and the one place that reads and renders templates.

Chat templates are programs that come with models, rendered in transformers' sandbox. The sandbox (jinja2's
ImmutableSandboxedEnvironment) keeps a template from files, modules and the objects that it is given. It bounds neither
time nor memory: a template that loops forever has to be stopped by hand.
"""

import logging
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from orpo_lite.common.console import progress
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import counted, nearest, shown
from orpo_lite.model.locating import continued_folder, hub_errors_in_words, locate, read_config
from orpo_lite.recipe import ModelSection
from orpo_lite.recipe.loading import chat_templates, find_template, resolve_path

logger = logging.getLogger(__name__)

PAD_TOKENS = ["<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<PAD>", "<|padding|>", "<|endoftext|>"]
RESERVED_TOKEN = re.compile(r"<\|reserved_special_token_\d+\|>|<\|?(reserved|unused|extra|placeholder)[_a-z]*\d+\|?>")
MARKER = re.compile(r"<\|[\w ]+\|>|<(?:start|end)_of_turn>")


@progress("loading the tokenizer")
def load_tokenizer(spec: ModelSection, continued: str | None = None) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer and set padding token, chat template and new tokens. A run folder works too.

    The decisions are logged once.

    Args:
        continued: adapter.init_from, whose own tokenizer is taken where it has one: its rows in the embeddings are trained.

    Raises:
        RequestError: no such model, template or EOS token.
    """
    folder = Path(os.path.expanduser(resolve_path(spec.name_or_path)))
    if all(os.path.isfile(folder / name) for name in ("adapter_config.json", "tokenizer_config.json")):
        # a run folder's tokenizer is as it was trained with: template, padding and new tokens are in it
        with hub_errors_in_words(str(folder)):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        tokenizer.orpo_lite_new_tokens = spec.new_tokens
        return tokenizer
    name = locate(spec)
    with hub_errors_in_words(spec.name_or_path):
        config = read_config(spec).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    if tokenizer.eos_token_id is None:
        raise RequestError(
            f"model.name_or_path: the tokenizer of {spec.name_or_path} has no EOS token to end answers with: "
            "set eos_token in its tokenizer_config.json"
        )
    if continued and ((folder := continued_folder(continued)) / "tokenizer_config.json").is_file():
        template, known = tokenizer.chat_template, tokenizer.get_vocab()
        with hub_errors_in_words(str(folder)):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        tokenizer.chat_template = tokenizer.chat_template or template
        if more := len(tokenizer.get_vocab().keys() - known):
            logger.warning(f"tokenizer: that of adapter.init_from, {continued}, with {counted(more, 'new token')}")
    choose_pad_token(tokenizer, config.vocab_size)
    if spec.chat_template:
        set_template(tokenizer, spec.chat_template)
    if spec.new_tokens:
        add_tokens(tokenizer, spec.new_tokens)
    tokenizer.orpo_lite_new_tokens = spec.new_tokens
    return tokenizer


def new_tokens(tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """Return the tokens whose embeddings are trained; none for a tokenizer from elsewhere."""
    return list(getattr(tokenizer, "orpo_lite_new_tokens", []))


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Set a padding token that is not EOS and has one of the model's `rows` embeddings, if the vocabulary has any."""
    vocabulary = tokenizer.get_vocab()
    taken = (tokenizer.eos_token, tokenizer.bos_token)
    current: str | None = tokenizer.pad_token  # type: ignore[assignment]
    if current is not None and current not in taken and vocabulary.get(current, rows) < rows:
        return
    reserved = sorted((t for t in vocabulary if RESERVED_TOKEN.fullmatch(t)), key=vocabulary.__getitem__)
    candidates = [*PAD_TOKENS, tokenizer.unk_token, *reserved]
    found = next((t for t in candidates if t and t not in taken and vocabulary.get(t, rows) < rows), None)
    tokenizer.pad_token = found or tokenizer.eos_token
    eos = f"EOS ({tokenizer.eos_token}), for lack of another; masks go by length, so EOS is learned"
    logger.info(
        f"padding token: {found} (the tokenizer's own was {current or 'missing'})" if found else f"padding token: {eos}"
    )


def set_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Set a template by name or from a Jinja file, and say which of its markers the vocabulary lacks.

    Raises:
        RequestError: no such template, or one with a syntax error.
    """
    known = chat_templates()
    stem = find_template(name)
    path = known[stem] if stem else Path(os.path.expanduser(resolve_path(name)))
    if not os.path.isfile(path):
        raise RequestError(
            f"model.chat_template: no template {name!r}{nearest(name, known)}; expected the path of a Jinja file "
            f"or one of: {', '.join(sorted(known))}; pip install 'orpo-lite[trl]' brings TRL's"
        )
    source = path.read_text("utf-8")
    replaced = tokenizer.chat_template is not None and tokenizer.chat_template != source
    tokenizer.chat_template = source
    try:
        render_chat(tokenizer, [{"role": "user", "content": "Hi"}])
    except TemplateRefused as error:
        if error.lineno:
            raise RequestError(f"model.chat_template: {path}, line {error.lineno}: {error}") from None
        # any template may refuse this conversation; the data report counts the rows that it refuses
    note = f"chat template: {name}" + (", in place of the model's own" if replaced else "")
    vocabulary = tokenizer.get_vocab()
    missing = sorted({m for m in MARKER.findall(source) if m not in vocabulary})
    if missing:
        note += (
            f"; {', '.join(missing)}: not in the vocabulary, so written as ordinary text, and an answer ends with EOS "
            f"({tokenizer.eos_token}); model.new_tokens would make them tokens"
        )
    logger.info(note)


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Add tokens. Those that the chat template writes are control tokens, which decoding can skip."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    known = [token for token in tokens if token in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t in template) for t in tokens if t not in known])
    there = f" (in the vocabulary already: {', '.join(known)})" if known else ""
    logger.info(f"new tokens: {', '.join(tokens)}; their embeddings are trained{there}")


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, generation: Any = None) -> list[int]:
    """List the tokens that end an answer: EOS, the special token that the chat template writes, a generation config's."""
    more = getattr(generation, "eos_token_id", None)
    ids = [tokenizer.eos_token_id, *end_of_turn(tokenizer), *(more if isinstance(more, list) else [more])]
    return [i for i in dict.fromkeys(ids) if i is not None]  # type: ignore[misc]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special token that the chat template writes after an answer, if there is one."""
    if tokenizer.chat_template is None:
        return []
    mark = "X9stop"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": mark}]
    try:
        text = render_chat(tokenizer, turns)
    except TemplateRefused:
        return []
    end = tokenizer(text.rpartition(mark)[2].lstrip(), add_special_tokens=False)["input_ids"][:1]
    return [i for i in end if i in tokenizer.added_tokens_decoder]


MAX_CHARACTERS = 10_000_000
"""Longest text that a template may write for one conversation."""


class TemplateRefused(jinja2.TemplateError):
    """A conversation that the template does not take, why in its words, and the line where its syntax is wrong."""

    def __init__(self, reason: str, lineno: int | None = None):
        super().__init__(reason)
        self.lineno = lineno


def render_chat(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, Any]], **options: Any) -> str:
    """Render a conversation with the tokenizer's chat template.

    Raises:
        TemplateRefused: the template does not take it, or writes more than MAX_CHARACTERS.
    """
    try:
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False, **options))
    except Exception as error:  # a template may raise anything, its own refusals included
        line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
        raise TemplateRefused(" ".join(str(error).split())[:500] or type(error).__name__, line) from error
    if len(text) > MAX_CHARACTERS:
        raise TemplateRefused(f"the template writes {len(text):,} characters, at most {MAX_CHARACTERS:,} are allowed")
    return text


MARKS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""transformers' own tags, around what the assistant wrote."""
GIVEN = {"messages", "tools", "add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now"}
"""Variables that every rendering sets by itself, so that a value for them would go unread or do harm."""


def check_variables(tokenizer: PreTrainedTokenizerBase, names: Collection[str], field: str) -> None:
    """Raise RequestError, with the nearest, for a variable that the tokenizer's templates never read; `field` gave it."""
    if not names:
        return
    try:
        read, known = variables(tokenizer)
    except jinja2.TemplateSyntaxError:
        return  # rendering says what is wrong
    unread = [name for name in names if name not in read]
    if not unread:
        return
    lines = []
    for name in unread:
        meant = " (YAML wants a space after the colon)" if ":" in name else nearest(name, known)
        lines.append(shown(name) + (" (a run sets it by itself)" if name in GIVEN else meant))
    there = f"the chat template reads {', '.join(known) or 'no variable'}"
    raise RequestError(
        f"{field}: found {', '.join(lines)}, which would change nothing: "
        f"{there if tokenizer.chat_template else 'there is no chat template'}; correct the name, or set {field}={{}}"
    )


def variables(tokenizer: PreTrainedTokenizerBase) -> tuple[set[str], list[str]]:
    """Return the variables that the tokenizer's templates may read from outside, and among them those that are options.

    Raises:
        jinja2.TemplateSyntaxError: a template cannot be parsed.
    """
    template: Any = tokenizer.chat_template or ""
    trees = [parse(source) for source in (template.values() if isinstance(template, dict) else [template])]
    read = set().union(*map(jinja2.meta.find_undeclared_variables, trees)) - GIVEN
    return read, sorted(name for name in set().union(*map(options, trees)) & read if not name.endswith("_token"))


def parse(source: str) -> jinja2.nodes.Template:
    """Parse a template as transformers does; nothing is rendered."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701 (no page)
    return environment.parse(MARKS.sub("", source))


def options(tree: jinja2.nodes.Template) -> set[str]:
    """Return the names that a template only reads, and those for which it has a default."""
    names = list(tree.find_all(jinja2.nodes.Name))
    asked = {one.node.name for one in tree.find_all((jinja2.nodes.Test, jinja2.nodes.Filter))
             if one.name in ("defined", "undefined", "default", "d") and isinstance(one.node, jinja2.nodes.Name)}  # fmt: skip
    return ({one.name for one in names} - {one.name for one in names if one.ctx != "load"}) | asked
