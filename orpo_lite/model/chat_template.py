"""Chat templates are programs that come with models: each is rendered in a process of its own, bounded in time and memory.

transformers' sandbox (ImmutableSandboxedEnvironment) keeps a template from files and objects, not from loops, and not
from texts without end: one multiplication can ask for terabytes.
"""

from __future__ import annotations

import contextlib
import gc
import marshal
import os
import signal
import sys
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import jinja2

from orpo_lite.common.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Job = tuple[list[dict[str, Any]], dict[str, Any]]
"""A conversation, and options of apply_chat_template."""

Answer = str | tuple[str, str, int | None]
"""The rendered text, or "limit" or "refused" with the words why and the template's line."""

SECONDS = 10.0
"""Of processor time, for TOGETHER conversations; the slowest known template takes milliseconds for each."""
TOGETHER = 8
MEMORY = 1_000_000_000
"""Bytes that rendering may take beside what the process holds."""
CHARACTERS = 10_000_000
"""Of one conversation's text, beside ten times what was given to the template."""


class TemplateRefused(jinja2.TemplateError):
    """What a template raised, in its words: not every conversation suits every template."""

    def __init__(self, words: str, lineno: int | None = None):
        super().__init__(words)
        self.lineno = lineno
        """Line of the template, where it cannot be read at all."""


class TemplateUnbounded(RequestError):
    """A template that a limit stopped; `job` counts the conversations that it was given."""

    def __init__(self, text: str, job: int = 0):
        super().__init__(text)
        self.job = job

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.job)


class ChildEnded(Exception):
    """The process that renders is gone: why, and at which job."""

    def __init__(self, why: str, at: int):
        super().__init__(why)
        self.at = at


class Rendering:
    """Renders conversations with a tokenizer's chat template, in a child process that lives as long as this object.

    Where processes cannot fork (Windows), only the size of the text is bounded.

    Args:
        tokenizer: with the template, as it is at the first call.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.child: Child | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "child": None}

    def __enter__(self) -> Rendering:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        if self.child:
            self.child.end()
            self.child = None

    def render(self, jobs: list[Job]) -> list[str | TemplateRefused]:
        """Text of each conversation, or what the template said against it.

        Raises:
            TemplateUnbounded: it takes too long, too much memory, or writes too much.
        """
        results: list[str | TemplateRefused] = []
        while len(results) < len(jobs):
            left = jobs[len(results) :]
            try:
                for answer in self.ask(left) if hasattr(os, "fork") else Answers(self.tokenizer, left):
                    results += map(self.result, answer)
            except ChildEnded as error:
                if len(jobs) == 1:
                    raise TemplateUnbounded(self.explain(str(error))) from None
                at = len(jobs) - len(left) + error.at
                results += self.render(jobs[len(results) : at])  # done, and gone with it
                for job in jobs[at : at + TOGETHER]:  # which of them was it?
                    try:
                        results += self.render([job])
                    except TemplateUnbounded as found:
                        raise TemplateUnbounded(str(found), len(results)) from None
            except TemplateUnbounded as error:
                raise TemplateUnbounded(str(error), len(results)) from None
        return results

    def one(self, conversation: list[dict[str, Any]], **options: Any) -> str:
        """The text of one conversation.

        Raises:
            TemplateRefused: the template takes no such conversation.
            TemplateUnbounded: see `render`.
        """
        [result] = self.render([(conversation, options)])
        if isinstance(result, TemplateRefused):
            raise result
        return result

    def ask(self, jobs: list[Job]) -> Iterator[list[Answer]]:
        if self.child is None or self.child.owner != os.getpid():  # a fork has its parent's pipes, but not its turn
            self.child = Child(self.tokenizer)
        heard = 0
        try:
            self.child.at[0] = 0
            self.child.send(dumped(jobs))
            while heard < len(jobs):
                answer = marshal.loads(self.child.receive())  # noqa: S302 (written by this very program)
                heard += len(answer)
                yield answer
        except (EOFError, OSError):
            child, status = self.child, self.child.end()
            if status == -signal.SIGPROF:
                raise ChildEnded(f"takes more than {SECONDS:g} s of processor time", max(heard, child.at[0])) from None
            why = f"ended its process (status {status}), as a lack of memory does"
            raise ChildEnded(why, max(heard, child.at[0])) from None
        finally:
            if heard < len(jobs):
                self.close()  # what it still has to say would be taken for the next answer

    def result(self, answer: Answer) -> str | TemplateRefused:
        if isinstance(answer, str):
            return answer
        kind, words, line = answer
        if kind == "limit":
            raise TemplateUnbounded(self.explain(words))
        return TemplateRefused(words, line)

    def explain(self, why: str) -> str:
        return (
            f"model.chat_template: {origin(self.tokenizer)} {why} for one conversation: it is broken or hostile; name "
            "another with model.chat_template (chatml, zephyr, llama-3, or the path of a Jinja file)"
        )


def render_chat(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, Any]], **options: Any) -> str:
    """`Rendering.one`, where only one is needed."""
    with Rendering(tokenizer) as rendering:
        return rendering.one(conversation, **options)


def origin(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template in words: its file where that is known, else the tokenizer it came with."""
    given = getattr(tokenizer, "orpo_lite_template", None)
    if given:
        return f"the chat template {given}"
    name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    file = Path(name) / "chat_template.jinja"
    return f"the chat template {file}" if file.is_file() else f"the chat template of the tokenizer {name}"


class Child:
    """A fork that renders; `owner` is the process that may talk to it, `at` holds the number of jobs it has done."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        hear, ask = os.pipe()
        answer, tell = os.pipe()
        import fcntl
        import mmap

        self.at = memoryview(mmap.mmap(-1, 8)).cast("Q")
        with warnings.catch_warnings():
            # Python 3.12 warns of forks beside threads: this one runs pure Python, and takes none of their locks
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            try:
                low, high = sorted((hear, tell))
                for first, last in ((3, low), (low + 1, high), (high + 1, 1 << 16)):
                    os.closerange(first, last)  # what the parent has open is none of the template's business
                serve(tokenizer, os.fdopen(hear, "rb"), os.fdopen(tell, "wb", 1 << 20), self.at)
                os._exit(0)  # no handler, buffer or finalizer of the parent's runs twice
            finally:
                os._exit(1)
        os.close(hear)
        os.close(tell)
        self.owner, self.pid = os.getpid(), pid
        with contextlib.suppress(OSError, AttributeError):  # Linux; fewer turns of sixty-four kilobytes
            fcntl.fcntl(answer, fcntl.F_SETPIPE_SZ, 1 << 20)
        self.asking, self.answering = os.fdopen(ask, "wb"), os.fdopen(answer, "rb", 1 << 20)
        self.end = weakref.finalize(self, end, self.owner, pid, self.asking, self.answering)

    def send(self, content: bytes) -> None:
        self.asking.write(len(content).to_bytes(8, "little") + content)
        self.asking.flush()

    def receive(self) -> bytes:
        return read_message(self.answering)


def end(owner: int, pid: int, *pipes: IO[bytes]) -> int | None:
    """Close the pipes and end the child; its exit status, negative for a signal. None in another process."""
    for pipe in pipes:
        with contextlib.suppress(OSError):
            pipe.close()
    if os.getpid() != owner:
        return None
    # with its pipes closed it ends by itself, unless it is in the middle of something
    with contextlib.suppress(ChildProcessError):
        found, status = os.waitpid(pid, os.WNOHANG)
        for _ in range(100):
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
            found, status = os.waitpid(pid, os.WNOHANG)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None


def read_message(stream: IO[bytes]) -> bytes:
    head = stream.read(8)
    size = int.from_bytes(head, "little")
    content = stream.read(size) if len(head) == 8 else b""
    if len(head) < 8 or len(content) < size:
        raise EOFError
    return content


def dumped(jobs: list[Job]) -> bytes:
    try:
        return marshal.dumps(jobs)
    except ValueError:  # dates and the like
        return marshal.dumps(plain(jobs))


def plain(value: Any) -> Any:
    """Values as templates may see them, as transformers' own rule has it: what JSON knows, and of the rest the type."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return f"<{type(value).__name__}>"


def serve(tokenizer: PreTrainedTokenizerBase, requests: IO[bytes], answers: IO[bytes], at: memoryview) -> None:
    """The child's whole life: answer requests until there are no more."""
    import resource

    gc.disable()  # nothing of the parent's is to be finalised here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    for number in (signal.SIGTERM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF, signal.SIGTERM])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    own, hard = resource.getrlimit(resource.RLIMIT_AS)
    while True:
        try:
            request = read_message(requests)
        except EOFError:
            return
        done = Answers(tokenizer, marshal.loads(request), len(request))  # noqa: S302 (from the parent)
        room = virtual_memory() + MEMORY
        bound_memory(room if own == resource.RLIM_INFINITY else min(room, own), hard)
        # its signal ends the process wherever it is, in the middle of a multiplication too
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        for answer in done:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            at[0] += len(answer)
            content = marshal.dumps(answer)
            answers.write(len(content).to_bytes(8, "little") + content)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.flush()
        bound_memory(own, hard)


def bound_memory(room: int, hard: int) -> None:
    """Bound the address space. macOS may refuse any bound: then time and size of the text are bounded all the same."""
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_AS, (room, hard))
    except (ValueError, OSError):
        if sys.platform == "linux":
            raise


def virtual_memory() -> int:
    """Bytes of address space; more than any process has where the system does not say."""
    if sys.platform != "linux":
        return 1 << 44
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


class Answers:
    """The answer to each job in order, a few at a time: going through the tokenizer one by one costs a quarter more."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, jobs: list[Job], size: int = 0):
        self.tokenizer, self.jobs, self.most = tokenizer, jobs, CHARACTERS + 10 * (size or len(dumped(jobs)))

    def __iter__(self) -> Iterator[list[Answer]]:
        start = 0
        while start < len(self.jobs):
            options, stop = self.jobs[start][1], start + 1
            while stop < min(start + TOGETHER, len(self.jobs)) and self.jobs[stop][1] == options:
                stop += 1
            conversations = [conversation for conversation, _ in self.jobs[start:stop]]
            try:
                texts = self.tokenizer.apply_chat_template(conversations, tokenize=False, **options)
                yield [self.bounded(str(text)) for text in texts]
            except Exception:  # one that the template refuses: each is rendered alone
                for conversation in conversations:
                    yield [self.alone(conversation, options)]
            start = stop

    def alone(self, conversation: list[dict[str, Any]], options: dict[str, Any]) -> Answer:
        try:
            return self.bounded(str(self.tokenizer.apply_chat_template(conversation, tokenize=False, **options)))
        except MemoryError:
            return "limit", f"takes more than {MEMORY / 1e9:g} GB of memory", None
        except Exception as error:  # a template may raise anything, its own refusals included
            line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
            return "refused", " ".join(str(error).split())[:500] or type(error).__name__, line

    def bounded(self, text: str) -> Answer:
        return text if len(text) <= self.most else ("limit", f"writes {len(text):,} characters", None)
