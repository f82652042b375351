"""The parts of a chat: what is streamed, prompted, scored and kept; and every kind of folder that it takes."""

from __future__ import annotations

import io
import json
import random
import resource
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import orpo_lite.evaluate.chat as chat
import orpo_lite.evaluate.terminal as terminal
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import visible
from orpo_lite.data.messages import messages
from orpo_lite.data.token_cache import TokenizeOptions
from orpo_lite.data.tokenize import PairTokenizer
from orpo_lite.evaluate.answering import PromptFormat, Reply, Sampling, Side, Stream, find_sides
from orpo_lite.evaluate.chat import Chat, Comparison, PreferenceFile
from orpo_lite.evaluate.loading import evaluate_sides, resolve_model
from orpo_lite.merge.run import merge
from orpo_lite.recipe import Recipe
from orpo_lite.train.pipeline import run
from orpo_lite.trainer.run_record import DataFacts, RunRecord, Source
from tests.data.test_conversations import WITHOUT_CALLS, tokenizer_of
from tests.tiny import FAMILIES, base_tokenizer

ASK = [{"role": "user", "content": "How much is 4 plus 5?"}]


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def answerers(trained):
    return find_sides(str(trained))


@pytest.fixture(scope="module")
def answerer(answerers):
    return answerers[-1]


@pytest.fixture
def typed(monkeypatch):
    """typed(lines): what the user will write; then Ctrl-D."""

    def lines(*given):
        left = list(given)

        def read(prompt=""):
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr(terminal, "read_message", read)
        monkeypatch.setattr(terminal, "read_choice", lambda question, answers: read())

    return lines


def comparison(answerers, file, blind=False, seed=0, system=None):
    return Comparison(answerers, Sampling(24), system, PreferenceFile(file), blind, random.Random(seed))


# ---- what reaches the screen --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["a\x1b[31mred\x1b]0;title\x07b", "Zażółć 漢字 🙂 done", "\n\n  two\nlines\n", "\x9b5m\u202eevil \r\x00"]
)
def test_a_stream_is_its_whole_text_made_harmless(text):
    told: list[str] = []
    stream = Stream(Bytes(), lambda part: told.append(visible(part)), strip=False)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for byte in text.encode():
        stream.put(torch.tensor([byte]))
        assert "\ufffd" not in "".join(told) and "\x1b" not in "".join(told)
    stream.end()
    assert "".join(told) == visible(text) + "\n"


def test_bytes_that_never_make_a_character_come_out_in_the_end():
    told: list[str] = []
    stream = Stream(Bytes(), told.append)
    stream.put(torch.tensor([[0]]))
    for byte in b"  a\xff\xfeb\xe2\x82":
        stream.put(torch.tensor([byte]))
    stream.end()
    assert "".join(told) == "a\ufffd\ufffdb\ufffd\n"


# ---- prompts and scores are those of training -----------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.template])
def test_a_prompt_is_what_training_has_before_the_answer(family, trained):
    tokenizer = base_tokenizer(family)
    found = resolve_model(str(trained))
    form = PromptFormat(tokenizer, found)
    turns = [*ASK, {"role": "assistant", "content": "It is 9."}, {"role": "user", "content": "And twice that?"}]
    row = form.row(turns, "18 it is.", "Who knows?")
    work = PairTokenizer(
        tokenizer, TokenizeOptions(max_length=None, completion_end="turn"), "conversations, explicit prompt"
    )
    columns = work([(0, row)]).columns
    [text] = form.texts([turns])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None and ids[0] != tokenizer.bos_token_id:
        ids = [tokenizer.bos_token_id, *ids]
    start = columns["chosen_start"][0]
    assert ids[:start] == columns["chosen_ids"][0][:start] and len(ids) - start <= 4  # Qwen3 writes an empty thought


@pytest.mark.parametrize("name", ["r1", "qwen3", "qwen3.6", "llama-3.1", "gpt-oss", "nemotron", "magistral", "gemma-2"])
def test_reasoning_calls_and_system_turns_are_prompted_as_they_are_trained(name, trained):
    """History with reasoning and calls, and an answer kept from a chat: the prompt of generation is that of training."""
    tokenizer, found = tokenizer_of(name), resolve_model(str(trained))
    assert found.recipe is not None
    found.recipe.data.system = "merge" if name == "gemma-2" else "template"
    form = PromptFormat(tokenizer, found)
    call = {"type": "function", "function": {"name": "stock", "arguments": '{"fruit": "red apples"}'}}
    turns = [*([] if name == "magistral" else [{"role": "system", "content": "Be brief."}]), *ASK,
             {"role": "assistant", "content": "It is 9.", "thinking": "4 and 5."}, {"role": "user", "content": "Sure?"}]  # fmt: skip
    if name not in WITHOUT_CALLS:
        turns[-1:] = [turns[-1], {"role": "assistant", "content": "", "tool_calls": [call]},
                      {"role": "tool", "name": "stock", "content": "12"}]  # fmt: skip
    row = form.row(turns, "I count.</think>\n\n18 it is." if name == "r1" else "18 it is.", "No.</think>Hm.")
    work = PairTokenizer(tokenizer, TokenizeOptions(max_length=None, completion_end="turn", strict=True,
                         system=found.recipe.data.system), "conversations, explicit prompt")  # fmt: skip
    chunk = work([(0, row)])
    assert not chunk.drops
    [text] = form.texts([messages(turns, "prompt", True)])
    start = chunk.columns["chosen_start"][0]
    trained_on = tokenizer.decode(chunk.columns["chosen_ids"][0][:start]).removeprefix(tokenizer.bos_token or "")
    assert text.removeprefix(tokenizer.bos_token or "").startswith(trained_on)
    assert text.endswith(trained_on[-20:]) or "<think>" in text[len(trained_on) - 20 :]
    assert '\\"fruit' not in text and ("Be brief." in text) == (name != "magistral")
    assert (name == "r1") <= (not work.notes(chunk.counts))


def test_strings_are_prompted_as_they_were_trained(answerer, trained):
    found = resolve_model(str(trained))
    shaped = Source(section="train", shape="Anthropic HH strings")
    found.record = RunRecord(data=DataFacts(sources={"a": shaped}))
    form = PromptFormat(answerer.tokenizer, found)
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye"},
    ]
    text = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"
    assert form.texts([turns]) == [text]
    assert form.row(turns, "So long.", "No.") == {"prompt": text, "chosen": " So long.", "rejected": " No."}
    with pytest.raises(RequestError, match="system turn"):
        form.texts([[{"role": "system", "content": "S"}, *turns]])
    shaped.shape = "strings, explicit prompt"
    form = PromptFormat(answerer.tokenizer, found)
    assert form.texts([turns]) == ["Bye"] and "a prompt of its own" in str(form.note) and form.answer(" x") == " x"
    assert found.recipe is not None
    found.recipe.data.apply_template = True
    assert PromptFormat(answerer.tokenizer, found).kind == "template"


def test_log_probs_are_those_of_the_trainer(answerers, trained, tmp_path):
    row = answerers[0].format.row(ASK, "Certainly. The answer is 9.", "Obviously. Leave me alone, it is 9.")
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    found = {one.name: one.mean_logps(ASK, *(row[side][0]["content"] for side in ("chosen", "rejected"))).tolist()
             for one in answerers}  # fmt: skip
    for name, metrics in evaluate_sides(find_sides(str(trained)), str(tmp_path / "one.jsonl"))[0].items():
        assert found[name] == pytest.approx((metrics["logps/chosen"], metrics["logps/rejected"]), abs=1e-5)
    assert abs(found["base"][0] - found["adapter"][0]) > 1e-2  # so the two could be told apart


# ---- what it takes --------------------------------------------------------------------------------------------------


def test_run_adapter_and_merged_model_say_the_same(answerers, trained, tmp_path):
    untrained, said = (one.reply(ASK, Sampling(24)) for one in answerers)
    assert said.ended and said.text != untrained.text
    shutil.copytree(trained, tmp_path / "adapter")
    for name in ("recipe.yaml", "run.json"):
        (tmp_path / "adapter" / name).unlink()
    merged = merge(trained, tmp_path / "merged")
    for folder, kind in ((tmp_path / "adapter", "adapter"), (merged, "model")):
        other = find_sides(str(folder))[-1]
        assert other.source.kind == kind
        assert other.reply(ASK, Sampling(24)) == said, folder
    with pytest.raises(RequestError, match="--compare: .*whole model"):
        chat.command(str(merged), prompt="Hello", compare=True)


def test_a_published_run_has_a_card_and_no_run_json(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "run.json").unlink()
    assert resolve_model(str(copy)).kind == "adapter" and resolve_model(str(copy)).recipe is not None
    (copy / "README.md").write_text("---\nlibrary_name: peft\ntags:\n- lora\n---\n- orpo\n")  # such as PEFT writes
    with pytest.raises(RequestError, match="no run.json, so this run did not finish"):
        resolve_model(str(copy))


def test_a_fine_tuned_run_is_compared_with_what_it_was(tmp_path):
    words = ["model.quantization=none", "adapter=null", "data.max_eval_rows=8", "evaluation.samples=0", "training.max_steps=8",
             "training.learning_rate=3e-3", "training.eval_strategy=no", f"training.output_dir={tmp_path / 'full'}"]  # fmt: skip
    run(Recipe.load("quickstart", words))
    sides = find_sides(str(tmp_path / "full"))
    assert [side.name for side in sides] == ["base", "fine-tuned"]
    logps = [side.mean_logps(ASK, "Certainly. The answer is 9.", "Obviously. The answer is 9.") for side in sides]
    before, after = (chosen - rejected for chosen, rejected in logps)
    assert after > before + 0.1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda place: place / "nothing", "no such folder"),
        (lambda place: place, "neither adapter_config.json nor config.json"),
        (lambda place: (place / "m.gguf").write_bytes(b"GGUF") and place / "m.gguf", "llama-cli or Ollama"),
    ],
)
def test_folders_that_cannot_talk_are_named(make, words, tmp_path):
    with pytest.raises(RequestError, match=words):
        resolve_model(str(make(tmp_path)))


def test_a_run_that_did_not_finish_is_named(trained, tmp_path):
    (tmp_path / "recipe.yaml").write_text((trained / "recipe.yaml").read_text())
    with pytest.raises(RequestError, match="did not finish"):
        resolve_model(str(tmp_path))


# ---- the conversation -------------------------------------------------------------------------------------------------


def test_commands(answerer, typed, capsys):
    talk = Chat([answerer], Sampling(4), None)
    typed("How much is 4 plus 5?", "/system Be brief.", "/system", "Who are you?", "/undo",
          "/undo", "/help", "/clear", "/quit", "never read")  # fmt: skip
    talk.run()
    said = " ".join("".join(capsys.readouterr()).split())
    for words in (
        "system: Be brief.",
        "taken back: Who are you?",
        "nothing to take back",
        "/clear",
        "cut after 4 tokens",
    ):
        assert words in said, words
    assert talk.turns == [] and talk.system == "Be brief."


def test_a_conversation_beyond_the_context_begins_anew_and_that_is_said(answerer, capsys, monkeypatch):
    talk, asked = Chat([answerer], Sampling(8), "Be brief."), []
    talk.answer = lambda turns: asked.append(turns) or "Fine."
    talk.turns = [turn for n in range(20) for turn in ({"role": "user", "content": f"number {n} " * 9},
                                                      {"role": "assistant", "content": "yes " * 9})]  # fmt: skip
    system, whole = {"role": "system", "content": "Be brief."}, [*talk.turns, *ASK]
    full = len(answerer.prompts([[system, *whole]])[0])
    monkeypatch.setattr(type(answerer), "context", full + 8)
    talk.ask(whole)
    assert asked.pop() == [system, *whole] and len(talk.turns) == 42 and not capsys.readouterr().err
    monkeypatch.setattr(type(answerer), "context", full + 7)
    talk.ask(whole)
    assert asked.pop() == [system, *ASK] and talk.turns == [*ASK, {"role": "assistant", "content": "Fine."}]
    assert "begins a new conversation" in capsys.readouterr().err
    monkeypatch.setattr(type(answerer), "context", 10)
    with pytest.raises(RequestError, match="tokens, and the model takes 10"):
        Chat([answerer], Sampling(8), None).ask([{"role": "user", "content": "word " * 50}])


def test_draws_come_again_with_their_seed(answerer):
    def draw(seed):
        torch.manual_seed(seed)
        return [answerer.reply(ASK, Sampling(12, temperature=1.5)).text for _ in range(3)]

    assert draw(1) == draw(1) != draw(2)


def test_a_prompt_from_a_pipe_gets_the_answer_alone(answerer, trained, capsys, monkeypatch):
    said = answerer.reply(ASK, Sampling(24)).text
    monkeypatch.setattr("sys.stdin", io.StringIO(ASK[0]["content"] + "\n"))
    chat.command(str(trained), max_new_tokens=24)
    assert capsys.readouterr().out == said + "\n"
    chat.command(str(trained), prompt=ASK[0]["content"], max_new_tokens=24)
    assert capsys.readouterr().out == said + "\n"
    chat.command(str(trained), prompt=ASK[0]["content"], max_new_tokens=24, compare=True)
    both = capsys.readouterr().out
    assert said in both and "1 base" in both and "log-odds ratio" in both and "better:" not in both


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blind": True}, "--blind goes with --compare"),
        ({"preferences": "x.jsonl"}, "--preferences goes with"),
        ({"prompt": " "}, "empty prompt"),
        ({"top_p": 0.5, "prompt": "x"}, "--temperature"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words, tmp_path):
    with pytest.raises(RequestError, match=words):
        chat.command(str(tmp_path), **options)


# ---- keys ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(monkeypatch):
    """keys(before, after): what is typed before and after the question is there."""
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        monkeypatch.setattr(terminal, "edits", lambda: True)
        waits = terminal.read

        def typed(before="", after=""):
            def late(*given):
                pipe.send_text(after)
                return waits(*given)

            monkeypatch.setattr(terminal, "read", late)
            pipe.send_text(before)

        yield typed


def choice_and_next(keys, before, after):
    """What is chosen, and the next message, where Enter and then another message follow what was typed."""
    keys(before, after)
    found = terminal.read_choice("1, 2 or e> ", ("1", "2", "e"))
    keys("next\r")
    return found, terminal.read_message("you> ")


@pytest.mark.parametrize(
    ("before", "after", "choice", "message"),
    [
        ("", "2\r", "2", "next"),
        ("", " e \r", "e", "next"),
        ("", "\x1b[C", "2", "next"),  # an arrow key, at once
        ("", "\r", "", "next"),
        ("", "explain it\r", "explain it", "next"),  # whole, whatever it begins with
        ("", "2 lines?\r", "2 lines?", "next"),
        ("", "e\x7fWhy?\r", "Why?", "next"),  # edited
        ("", "ab\x1b[D\x1b[Dx\r", "xab", "next"),  # arrows move in what is typed
        ("", "\x1b[200~2 lines\r\nof text\x1b[201~\r", "2 lines\nof text", "next"),
        ("\x1b[C", "\r", "", "next"),  # before the question was there
        ("2", "\r", "2", "next"),  # typed too early, but entered now
        ("2 m", "ore?\r", "2 more?", "next"),
        ("2\r", "", "", "2"),  # typed and entered while the answers were written: they were not read yet
        ("explain it\r", "", "", "explain it"),
    ],
)
def test_a_choice_is_a_whole_line_and_anything_else_a_message(keys, before, after, choice, message):
    assert choice_and_next(keys, before, after) == (choice, message)


def test_a_message_typed_at_the_choice_is_in_the_history(keys):
    keys("explain it\r")
    terminal.read_choice("1, 2 or e> ", ("1", "2", "e"))
    keys("explain it\r1\r")
    assert terminal.read_choice("1, 2 or e> ", ("1", "2", "e")) == ""
    assert terminal.HISTORY.get_strings()[-1] != "1"


def test_control_keys_at_a_question(keys):
    keys(after="\x03")
    with pytest.raises(KeyboardInterrupt):
        terminal.read_choice("1, 2 or e> ", ("1", "2", "e"))
    keys(after="\x04")
    with pytest.raises(EOFError):
        terminal.read_choice("1, 2 or e> ", ("1", "2", "e"))


def test_the_editor_is_imported_by_a_chat_alone():
    code = "import sys, orpo_lite.evaluate.chat; print({'prompt_toolkit', 'torch'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_without_a_terminal_lines_are_read_plainly(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO('one\n"""two\n\n lines"""\nexplain it\n 2 \nlast'))
    assert [terminal.read_message("you> ") for _ in range(2)] == ["one", "two\n\n lines"]
    assert [terminal.read_choice("1, 2 or e> ", ("1", "2", "e")) for _ in range(2)] == ["explain it", "2"]
    assert terminal.read_message("you> ") == "last"
    with pytest.raises(EOFError):
        terminal.read_message("you> ")
    said = capsys.readouterr()
    assert said.err == "you> you> ...> ...> 1, 2 or e> 1, 2 or e> you> you> " and not said.out


def test_messages_of_several_lines_and_earlier_ones(keys):
    keys('one\r"""two\r\r  lines"""\r """three\r\x08"""\r')
    assert terminal.read_message("you> ") == "one"
    assert terminal.read_message("you> ") == "two\n\n  lines"
    assert terminal.read_message("you> ") == "three"
    assert terminal.HISTORY.get_strings()[-3:] == ["one", '"""two\n\n  lines"""', ' """three\n"""']


# ---- choices ------------------------------------------------------------------------------------------------------------


def test_choices_train(answerers, trained, typed, capsys, tmp_path):
    """What is kept goes through `data` and trains a step, as the closing words say."""
    file = tmp_path / "mine.jsonl"
    talk = comparison(answerers, file, system="Be kind.")
    typed(ASK[0]["content"], "2", "Who are you?", "1", "Where is Rome?", "")
    talk.run()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["prompt"][0] == {"role": "system", "content": "Be kind."}
    assert "pairs appended to" in capsys.readouterr().err
    words = [f"data.train={file}", "data.eval_fraction=0", f"adapter.init_from={trained}", "training.max_steps=1", "training.eval_strategy=no",
             f"training.output_dir={tmp_path / 'again'}", "evaluation.samples=0"]  # fmt: skip
    done = run(Recipe.load(trained / "recipe.yaml", words))
    assert done is not None and done.record.steps == 1
    assert done.record.data.train_pairs == 2 and done.record.data.drops.dropped == {}


def test_blind_rounds_are_shuffled_and_told_afterwards(answerers, typed, capsys, tmp_path):
    file = tmp_path / "blind.jsonl"
    base, adapter = (one.reply(ASK, Sampling(24)).text for one in answerers)
    firsts = set()
    for seed in range(6):
        talk = comparison(answerers, file, True, seed)
        typed(ASK[0]["content"], "1")
        talk.run()
        told = capsys.readouterr().out
        before, _, after = told.partition("kept; 1 was ")
        assert "log-odds" not in before and "adapter" not in before and "log-odds" in after
        row = json.loads(file.read_text().splitlines()[-1])
        first = {base: "base", adapter: "adapter"}[row["chosen"][0]["content"]]
        assert after.startswith(first)
        firsts.add(first)
    assert firsts == {"base", "adapter"}


def test_equal_answers_are_no_pair(answerers, typed, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Side, "reply", lambda *_, **__: Reply("the same", 2, True))
    file = tmp_path / "none.jsonl"
    talk = comparison(answerers, file)
    typed("Hello")
    talk.run()
    assert "both answers are the same" in capsys.readouterr().out and not file.exists() and len(talk.turns) == 2


def test_several_chats_append_to_one_file(tmp_path):
    """Whole lines only, also behind a line that a crash left unfinished; what is there stays."""
    file = tmp_path / "shared.jsonl"
    row = {
        "prompt": ASK,
        "chosen": [{"role": "assistant", "content": "y" * 20000}],
        "rejected": [{"role": "assistant", "content": "n"}],
    }
    first = json.dumps(row)
    file.write_text(first)  # no line break at the end
    writers = [PreferenceFile(file) for _ in range(4)]
    assert writers[0].held == 1
    threads = [threading.Thread(target=lambda w=w: [w.append(row) for _ in range(10)]) for w in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = file.read_text().splitlines()
    assert len(lines) == 41 and all(json.loads(line) == row for line in lines)


def test_files_that_hold_something_else_are_left_alone(tmp_path):
    for name, content in (("notes.md", "# Notes\n"), ("rows.jsonl", '{"text": "x"}\n')):
        (tmp_path / name).write_text(content)
        with pytest.raises(RequestError, match=f"line 1 of .*{name}"):
            PreferenceFile(tmp_path / name)
        assert (tmp_path / name).read_text() == content
    for place in (tmp_path, tmp_path / "gone" / "x.jsonl"):
        with pytest.raises(RequestError, match="is not a file that can be written"):
            PreferenceFile(place)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    file = PreferenceFile(tmp_path / "full.jsonl")
    row = {"prompt": ASK, "chosen": "a", "rejected": "b"}
    file.append(row)
    before = file.path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limit[1]))
    try:
        with pytest.raises(RequestError, match="no room on the disk"):
            file.append(row)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert file.path.read_bytes() == before
