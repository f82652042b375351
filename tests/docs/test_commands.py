"""Every command in README.md and the pages is run here, or says what it needs and is at least held against its parser."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import typer

from orpo_lite.__main__ import load
from orpo_lite.common import safe_yaml
from orpo_lite.common.console import run_command
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import shipped_recipes
from orpo_lite.train.sweep import searched
from tests.docs.blocks import FIRST, PAGES, ROOT, blocks, inline, parser, words_of

SHELL, NOT_RUN = ("bash",), ("text", "json", "yaml", "jinja", "html", "")
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def page_of(name: str) -> Path:
    return ROOT / name


def files(folder: Path) -> None:
    """What pages take for granted beside the quickstart's run: pairs of one's own, in two files."""
    rows = [
        {"prompt": f"What is {n} plus {n}?", "chosen": f"Certainly, {2 * n}.", "rejected": f"Obviously {2 * n}."}
        for n in range(24)
    ]
    for name, some in {"my.jsonl": rows[:16], "held_out.jsonl": rows[16:]}.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some), "utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options exist, choices are choices, recipes take their overrides: in blocks that need hardware too."""
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    for block in blocks(page_of(name)):
        assert block.language in (*SHELL, "python", *NOT_RUN), f"{block.place}: {block.language}: bash, python or text"
        if block.language == "yaml" and block.body.startswith("name:"):
            assert Recipe.parse(safe_yaml.parse(block.body), block.place)
        if block.language not in SHELL:
            continue
        for line in block.lines:
            ours = words_of(line)
            assert ours or block.needs, f"{block.place}: {line!r} is none of ours: say what it needs in <!-- needs: -->"
            if ours:
                check(block.place, *ours)
    for line in inline(page_of(name)):
        command, words = words_of(line) or ("", [])
        known = {"-h", "--help", "--debug", "--resume=force"}
        known |= {flag for option in parser(command).params for flag in (*option.opts, *option.secondary_opts)}
        assert not [word for word in words if word.startswith("-") and word not in known], f"{name}: `{line}`"


def check(place: str, command: str, words: list[str]) -> None:
    words = ["--resume-force" if word == "--resume=force" else word for word in words if word != "--debug"]
    try:
        context = parser(command).make_context(command, list(words))
    except typer.Exit:  # --help, --architectures
        return
    except Exception as error:
        pytest.fail(f"{place}: {command} {' '.join(words)}: {error}")
    recipe, overrides = context.params.get("recipe"), context.params.get("overrides") or []
    if recipe in shipped_recipes():
        first = searched(overrides) if command == "sweep" else {}
        words = [word for word in overrides if word.partition("=")[0] not in first]
        assert Recipe.load(recipe, [*words, *(f"{key}={values[0]}" for key, values in first.items())])


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the first command of README.md makes."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert shell(FIRST, patch) == 0
    return folder


def shell(line: str, patch: pytest.MonkeyPatch) -> int:
    """Run a command of ours as its own program would, in this process; its exit status."""

    command, words = words_of(line) or ("", [])
    patch.setattr(sys, "argv", [f"orpo-lite {command}", *words])
    try:
        run_command(load(command))
    except SystemExit as done:
        return int(done.code or 0)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_commands_run(name: str, request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The blocks of a page in their order, in one folder that holds the quickstart's run."""
    run = [block for block in blocks(page_of(name)) if block.language in (*SHELL, "python") and not block.needs]
    if not run:
        return
    shutil.copytree(request.getfixturevalue("quickstart") / "outputs", tmp_path / "outputs")
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "page"}
    for block in run:
        if block.language == "python":
            exec(compile(block.body, block.place, "exec"), names)
            continue
        for line in block.lines:
            if line != FIRST:
                status = shell(line, monkeypatch)
                assert status == 0, f"{block.place}: {line}: status {status}\n{capsys.readouterr().err[-2000:]}"


def test_there_are_commands_to_run() -> None:
    """The reader of blocks finds what is there: a page without any would pass all of the above."""
    for name in ("README.md", ".docs/pages/quickstart.md"):
        page = page_of(name)
        assert len(blocks(page)) * 2 == len(re.findall(r"^ *```", page.read_text("utf-8"), re.MULTILINE)) > 6
    found = [line for page in PAGES for block in blocks(page) if block.language == "bash" for line in block.lines]
    assert len([line for line in found if words_of(line)]) > 20 and FIRST in found


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md"])
def test_links_to_files_lead_somewhere(name: str) -> None:
    """mkdocs looks at the links of the pages; these files are read on their own."""
    text = page_of(name).read_text("utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)\s#]+)", text) + re.findall(r'src="(?!https?://)([^"]+)"', text)
    assert not [link for link in links if not (page_of(name).parent / link).exists()]


@pytest.mark.parametrize("state", ["finished", "stopped"])
@pytest.mark.parametrize("adapter", ["null", "{r: 16}"])
def test_what_a_report_says_to_type_next(state, adapter, tmp_path: Path) -> None:
    from orpo_lite.recipe import Recipe
    from orpo_lite.report.page import run_page
    from orpo_lite.trainer.run_record import LoadedRun, RunRecord

    for checkpoint in (None, "checkpoint-10"):
        recipe = Recipe.load("quickstart", [f"adapter={adapter}", "model.quantization=none"])
        run = LoadedRun(tmp_path / "my run", recipe, RunRecord(seed=42), state=state, checkpoint=checkpoint)
        (block,) = re.findall("<pre class=code.*?</pre>", run_page(run).decode("utf-8"), re.DOTALL)
        lines = [html.unescape(line) for line in re.sub("<.*?>", "", block).splitlines() if line.startswith("python")]
        assert len(lines) > 1
        for line in lines:
            check("report.html", *words_of(line))  # type: ignore[misc]
