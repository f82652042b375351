"""How to load what a card lies beside: peft, transformers, vLLM, Ollama, with commands that fit the artefact."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_lite.common.markdown import fence, inline
from orpo_lite.recipe.loading import BUILTIN


@dataclass(frozen=True)
class Artefact:
    """What the commands need to know."""

    where: str
    """Hub repository, or the name of the folder."""
    name: str
    base: str
    """Hub id, builtin:..., or the name of a local folder."""
    on_hub: bool
    """Whether `base` is a hub id."""
    vllm_rank: int = 0
    """--max-lora-rank that the adapter needs."""
    vllm_problems: Sequence[str] = ()
    """Why vLLM would not serve the adapter as it is."""
    new_tokens: bool = False
    """Whether the adapter holds rows of a grown vocabulary."""
    seq2seq: bool = False
    revision: str | None = None
    quantization: str = "none"
    """nf4, fp4, int8 or none: how the base is quantised on loading, as in training."""
    double_quant: bool = False
    dtype: str = "auto"
    gguf_file: str | None = None
    trust_remote_code: bool = False
    chat: bool = True
    """Whether prompts go through the chat template."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Folder for the commands that take no repository."""
        return self.name if "/" in self.where else self.where

    @property
    def fetch(self) -> str:
        """The line that makes `folder`, where it is not there already."""
        return f"hf download {shlex.quote(self.where)} --local-dir {self.name}\n" if "/" in self.where else ""

    @property
    def auto(self) -> str:
        return "AutoModelForSeq2SeqLM" if self.seq2seq else "AutoModelForCausalLM"


def adapter_usage(it: Artefact) -> str:
    """Sections for an adapter: as it is, merged, served, and as a GGUF."""
    merged, gguf = f"{it.name}-merged", f"{it.name}.gguf"
    parts = ["### peft", fence(peft_snippet(it), "python"), "### transformers, merged into the base",
             fence(f"{it.fetch}python -m orpo_lite.merge {shlex.quote(it.folder)} --output {merged}", "bash"),
             fence(plain_snippet(it, merged), "python")]  # fmt: skip
    if it.seq2seq:
        return "\n\n".join([*parts, "vLLM and Ollama serve decoders only, and this is an encoder-decoder."])
    if it.vllm_problems:
        serve = ["vLLM does not take this adapter as it is: serve the merged model.",
                 "\n".join(f"- {inline(problem)}" for problem in it.vllm_problems),
                 fence(f"vllm serve {merged}", "bash")]  # fmt: skip
    else:
        base = it.base if it.on_hub else f"PATH/TO/{it.base.rpartition('/')[2]}"
        options = [
            f"vllm serve {shlex.quote(base)}"
            + (f" --revision {shlex.quote(it.revision)}" if it.on_hub and it.revision else ""),
            f"--tokenizer {shlex.quote(it.where)}" + (" --trust-remote-code" if it.trust_remote_code else ""),
            f"--enable-lora --max-lora-rank {it.vllm_rank}",
            f"--lora-modules {shlex.quote(f'{it.name}={it.where}')}",
        ]
        serve = [fence(" \\\n  ".join(options), "bash")]
    parts += ["### vLLM", *serve, "### Ollama"]
    export = f"{it.fetch}python -m orpo_lite.export {shlex.quote(it.folder)} --output {gguf} --ollama"
    return "\n\n".join([*parts, fence(f"{export}\nollama create {it.name} -f Modelfile\nollama run {it.name}", "bash")])


def model_usage(it: Artefact) -> str:
    """Sections for a whole model: merged, or trained whole."""
    parts = ["### transformers", fence(plain_snippet(it, it.where), "python")]
    if it.seq2seq:
        return "\n\n".join([*parts, "vLLM and Ollama serve decoders only, and this is an encoder-decoder."])
    where = shlex.quote(it.where)
    chat = f"transformers serve {where}\ntransformers chat {where}  # in a second terminal"
    export = f"{it.fetch}python -m orpo_lite.export {shlex.quote(it.folder)} --output {it.name}.gguf --ollama"
    return "\n\n".join(
        [
            *parts,
            *(["From the command line:", fence(chat, "bash")] if it.chat else []),
            "### vLLM",
            fence(f"vllm serve {where}" + (" --trust-remote-code" if it.trust_remote_code else ""), "bash"),
            "### Ollama",
            fence(f"{export}\nollama create {it.name} -f Modelfile\nollama run {it.name}", "bash"),
        ]
    )


def gguf_usage(it: Artefact, repo: str | None) -> str:
    """Sections for a GGUF file: Ollama and llama.cpp."""
    if repo:
        lines = [f"ollama run hf.co/{repo}", f"llama-cli -hf {repo}"]
    else:
        lines = [f"ollama create {it.name} -f Modelfile", f"ollama run {it.name}"]
    return "\n\n".join(["### Ollama" + (" and llama.cpp" if repo else ""), fence("\n".join(lines), "bash")])


def peft_snippet(it: Artefact) -> str:
    """Python that puts the adapter on its base, held as in training, and answers once."""
    imports, options = [it.auto, "AutoTokenizer"], []
    if it.on_hub and it.revision:
        options.append(f"revision={quoted(it.revision)},  # the commit it was trained on")
    if it.gguf_file:
        options.append(f"gguf_file={quoted(it.gguf_file)},")
    elif it.quantization in ("nf4", "fp4"):
        imports.append("BitsAndBytesConfig")
        options += ["quantization_config=BitsAndBytesConfig(  # as in training; leave it out for 16-bit weights",
                    f"    load_in_4bit=True, bnb_4bit_quant_type={quoted(it.quantization)}, "
                    f"bnb_4bit_use_double_quant={it.double_quant},",
                    f"    bnb_4bit_compute_dtype={quoted(it.dtype)},",
                    "),"]  # fmt: skip
    elif it.quantization == "int8":
        imports.append("BitsAndBytesConfig")
        options.append("quantization_config=BitsAndBytesConfig(load_in_8bit=True),  # as in training")
    options += [f"dtype={quoted(it.dtype)},", 'device_map="auto",']
    if it.trust_remote_code:
        options.append("trust_remote_code=True,")
    builtin = it.base.startswith(BUILTIN)
    base = f"resolve_path({quoted(it.base)})" if builtin else quoted(it.base if it.on_hub else f"PATH/TO/{it.base}")
    lines = [
        "from peft import PeftModel",
        f"from transformers import {', '.join(imports)}",
        *(["", "from orpo_lite.recipe.loading import resolve_path"] if builtin else []),
        "",
        f"adapter = {quoted(it.where)}",
        "tokenizer = AutoTokenizer.from_pretrained(adapter)",
        f"base = {it.auto}.from_pretrained(",
        f"    {base},",
        *(f"    {option}" for option in options),
        ")",
    ]
    if it.new_tokens:
        lines += ["if len(tokenizer) > base.get_input_embeddings().num_embeddings:  # it has new tokens",
                  "    base.resize_token_embeddings(len(tokenizer))"]  # fmt: skip
    return "\n".join([*lines, "model = PeftModel.from_pretrained(base, adapter)", "", *answer_lines(it)])


def plain_snippet(it: Artefact, where: str) -> str:
    """Python that loads a plain transformers model and answers once."""
    code = ", trust_remote_code=True" if it.trust_remote_code else ""
    return "\n".join(
        [
            f"from transformers import {it.auto}, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({quoted(where)})",
            f'model = {it.auto}.from_pretrained({quoted(where)}, dtype="auto", device_map="auto"{code})',
            "",
            *answer_lines(it),
        ]
    )


def answer_lines(it: Artefact) -> list[str]:
    if it.chat:
        more = "".join(f"{key}={value!r}, " for key, value in it.template_kwargs.items() if key.isidentifier())
        lines = ['messages = [{"role": "user", "content": "Hello. Who are you?"}]',
                 "inputs = tokenizer.apply_chat_template(",
                 f'    messages, {more}add_generation_prompt=True, return_dict=True, return_tensors="pt"',
                 ").to(model.device)"]  # fmt: skip
    else:
        lines = ['inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)']
    start = "" if it.seq2seq else 'inputs["input_ids"].shape[1] :'
    return [
        *lines,
        "output = model.generate(**inputs, max_new_tokens=100)",
        f"print(tokenizer.decode(output[0{f', {start}' if start else ''}], skip_special_tokens=True))",
    ]


def quoted(text: str) -> str:
    """A Python string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's content; empty where there is none."""
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}
