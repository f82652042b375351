"""A user's regular expressions, bounded in time: matching one can take longer than anybody waits, and cannot be stopped in its thread."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 10.0
"""For one expression and all its texts; those that are meant well take milliseconds."""
CHILD = """
import json, re, sys
pattern, texts, flags = json.load(sys.stdin)
print(json.dumps([bool(re.search(pattern, text, flags)) for text in texts]))
"""


class Endless(ValueError):
    """An expression that does not come to an end on a text, or is none; the message says what it does and what to do."""


def found_in(pattern: str, texts: Sequence[str], flags: int = 0) -> list[bool]:
    """Whether each text holds a match of the expression, by `re.search`, in a process that is ended after SECONDS.

    Raises:
        Endless: it takes longer, or is no regular expression.
    """
    if not texts:
        return []
    # -I -S: nothing of the user's folder or environment is imported
    command = [sys.executable, "-I", "-S", "-c", CHILD]
    asked = json.dumps([pattern, list(texts), flags])
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=SECONDS, check=True)  # noqa: S603 (our own code)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        why = f"takes more than {SECONDS:g} s to look for in {len(texts)} text(s), the longest of {max(map(len, texts))} characters"
        raise Endless(f"{why}: repetitions inside of repetitions, such as (a+)+, do that; write it without") from None
    except subprocess.CalledProcessError as error:
        why = (error.stderr.splitlines() or [f"status {error.returncode}"])[-1]
        raise Endless(f"cannot be looked for ({why}): write another") from None
