"""A chat in a real terminal: what is typed, what is shown, Ctrl-C and Ctrl-D, and the choices that are kept."""

import json
import re

import pytest

from tests.security.test_escaping import ACTING

OURS = re.compile(r"\x1b\[[0-9;]*m|\x1b\[[0-9]*[ABCDGJK]|\x1b\[\?(1|7|12|25|2004)[hl]|\r|\x08")
"""Escape sequences of rich and prompt_toolkit."""
BEGUN = r"\?2004l.*\?2004h.{60}"
"""The message is read, and part of its answer written."""


@pytest.mark.slow
def test_answers_stream_and_stop_and_the_chat_goes_on(babbling, terminal):
    chat = terminal("chat", babbling, "--max-new-tokens", "100000", "--temperature", "1.5", "--seed", "1")
    chat.expect("you>")
    chat.send("Hello\n")
    chat.expect(r"Hello[^\n]*\n.{60}")  # the answer is being written: this model never ends one
    chat.send("\x03")
    chat.expect(r"\(stopped\)")
    chat.expect("you>")
    chat.interrupt(r"Ctrl-D or /quit ends")
    chat.expect("you>")
    chat.send("/undo\n")
    chat.expect("taken back: Hello")
    for typed, message in (
        ("half a ", "half a message"),
        ("\x1b[200~two\nlines, \x1b[201~", "two.*lines, message"),  # pasted
    ):
        chat.expect("you>")
        chat.send("Hello\n")
        chat.expect(BEGUN)
        chat.send(typed + "\x03")  # stops the answer, and takes nothing away
        chat.expect(r"\(stopped\)")
        chat.expect("you>")
        chat.send("message\n")
        chat.expect(BEGUN)
        chat.send("\x03")
        chat.expect(r"\(stopped\)")
        chat.send("/undo\n")
        chat.expect("taken back: " + message)
    chat.send("/nothing\n")
    chat.expect("no command /nothing")
    chat.send('"""two\nlines"""\n')
    chat.expect(r"\.\.\.>[^\n]*\n.{60}")
    chat.send("\x03")
    chat.expect("you>")
    chat.send("\x04")
    assert chat.end() == 0
    ours = OURS.sub("", chat.told)
    assert not ACTING.search(ours), ACTING.findall(ours)
    assert "\\x" in ours  # it did write bytes that act, had they come through
    assert "Traceback" not in chat.told


def test_choices_become_training_data(trained, terminal, tmp_path):
    chat = terminal("chat", trained, "--compare", columns=120)
    chat.expect("you>")
    chat.send("How much is 4 plus 5?\n")
    shown = OURS.sub("", chat.expect("better: 1 or 2"))
    assert re.search(r"1 base +2 adapter", shown)  # side by side
    assert len(re.findall(r"-\d\.\d{4}", shown)) >= 4 and "log-odds ratio" in shown
    chat.expect("1, 2 or e>")
    chat.send("2\n")
    chat.expect("kept \\(1 in this chat\\)")
    chat.send("Again?\n")
    chat.expect("1, 2 or e>")
    chat.send("\x1b[D")  # an arrow key
    chat.expect("kept \\(2 in this chat\\)")
    chat.expect("you>")
    chat.send("Why?\n")
    chat.expect("1, 2 or e>")
    chat.send("explain it\n")  # its first letter is no choice, and none is lost
    chat.expect("not kept; the conversation continues with the answer of adapter")
    chat.expect("1, 2 or e>")
    chat.send("e\n")
    chat.expect("better answer>")
    chat.send("My own words.\n")
    chat.expect("kept \\(3 in this chat\\)")
    chat.expect("you>")  # before it, the terminal would keep the end of input to itself
    chat.send("\x04")
    assert chat.end() == 0
    assert "3 pairs appended to preferences.jsonl; the answer of adapter was preferred 1 times" in chat.told
    rows = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "chosen", "rejected"}] * 3
    assert rows[0]["prompt"] == [{"role": "user", "content": "How much is 4 plus 5?"}]
    assert rows[0]["chosen"][0]["content"] in chat.told and rows[0]["chosen"] != rows[0]["rejected"]
    # each goes on with what was chosen before, and the third turn with the adapter's answer
    assert [turn["role"] for turn in rows[2]["prompt"]] == ["user", "assistant"] * 3 + ["user"]
    assert rows[1]["prompt"][:2] == rows[0]["prompt"] + rows[0]["chosen"]
    assert rows[2]["prompt"][:4] == rows[1]["prompt"] + rows[1]["chosen"]
    assert [turn["content"] for turn in rows[2]["prompt"][4::2]] == ["Why?", "explain it"]
    assert rows[2]["chosen"] == [{"role": "assistant", "content": "My own words."}]


@pytest.mark.slow
def test_a_terminal_without_a_cursor_reads_plain_lines(trained, terminal, tmp_path):
    chat = terminal("chat", trained, "--compare", "--max-new-tokens", "8", term="dumb")
    chat.expect("you> ")
    chat.send('"""How much is\n')
    chat.expect("\\.\\.\\.> ")
    chat.send('4 plus 5?"""\n')
    chat.expect("1, 2 or e> ")
    chat.send("explain it\n")
    chat.expect("not kept")
    chat.expect("1, 2 or e> ")
    chat.send("1\n")
    chat.expect("kept \\(1 in this chat\\)")
    chat.send("\x04")
    assert chat.end() == 0 and "\x1b" not in chat.told
    [row] = [json.loads(line) for line in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    assert [turn["content"] for turn in row["prompt"][::2]] == ["How much is\n4 plus 5?", "explain it"]
