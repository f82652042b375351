"""The run folder: one place that every later command takes."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import LOCK, lock_folder, unlock_folder, write_atomically
from orpo_lite.recipe import ModelSection, Recipe
from orpo_lite.recipe.loading import check_folder
from orpo_lite.trainer.checkpoint_folder import clean, manifest, newest_good

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAME_RESULT = re.compile(r"memory\.|orpo\.tokens_per_batch: was \d+, is \d+$|training\.per_device_eval_batch_size: ")
"""Changes with which a run resumes to the same result: of memory and speed."""
OTHER_RUN = re.compile(
    r"pairs per optimizer step|model\.(?!attention)|adapter\b|data\.(?!max_eval_rows)"
    r"|training\.(seed|data_seed|optim|optim_args|optim_target_modules|train_sampling_strategy|group_by_length)\b"
)
"""Changes with which no run can resume: other weights, other pairs, another order, another optimizer's state."""
LOG = "train.log"
"""What a run prints, where a sweep keeps it."""
LEFT_BY_A_KILL = {LOCK, "recipe.yaml.part", LOG}
"""Files that are in a folder before its run has begun: of one killed right at its start, and the log."""

Resume = bool | Literal["force"]


@dataclass
class RunFolder:
    """A run's folder and its files."""

    path: Path
    checkpoint: Path | None = None
    """The newest good checkpoint, from which `create` resumes."""
    notes: list[str] = field(default_factory=list)
    """Notes of `create` for the user: damaged checkpoints, forced changes."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def before(self) -> Path:
        """Evaluation and samples before training, for a resumed run."""
        return self.path / "before.json"

    @property
    def finished(self) -> bool:
        """True where run.json and everything after it were written completely."""
        return (self.path / "run.json").is_file() and self.read().get("finished", True)

    @classmethod
    def create(cls, recipe: Recipe, resume: Resume = False, processes: int = 1) -> RunFolder:
        """Create the folder of a new run, or open the one to resume; locked until `unlock`.

        An unfinished run of the same recipe, apart from settings of memory, is resumed from its newest good checkpoint.
        A folder that holds anything else is not touched: the next free number is appended.

        Args:
            resume: refuse to start a new run; "force" resumes despite changes where that is meaningful.
            processes: number of processes of the run.

        Raises:
            RequestError: `resume`, but there is no checkpoint; the recipe or the number of processes has changed;
                another process trains in the folder; or it cannot be read or written.
        """
        folder = cls(recipe.folder)
        try:
            if (folder.path / "recipe.yaml").is_file() and not folder.finished:
                with contextlib.ExitStack() as stack:
                    lock_folder(folder.path)
                    stack.callback(unlock_folder, folder.path)
                    if folder._resumes(recipe, resume, processes):
                        stack.pop_all()
                        return folder
            elif resume:
                done = (folder.path / "run.json").is_file()
                why = "is a finished run; start without --resume for a new one" if done else no_checkpoint([])
                raise RequestError(f"--resume: {folder.path} {why}")
            return folder._begin(recipe)
        except OSError as error:
            raise RequestError(
                f"training.output_dir: {error.filename or folder.path} cannot be written ({error.strerror}): choose another "
                "folder, or mount its drive again"
            ) from None

    def _resumes(self, recipe: Recipe, resume: Resume, processes: int) -> bool:
        """Decide whether this unfinished run is resumed, and find its newest good checkpoint.

        Raises:
            RequestError: `resume`, but there is no checkpoint, or changes forbid it.
        """
        clean(self.checkpoints)
        self.checkpoint, damaged = newest_good(self.checkpoints)
        self.notes = [f"damaged, so not resumed from: {line}" for line in damaged]
        if resume and self.checkpoint is None:
            raise RequestError(f"--resume: {self.path} {no_checkpoint(damaged)}")
        if self.checkpoint is None:
            self.notes.append("the run there was stopped before it had a good checkpoint: it starts from the beginning")
        changes = self.changes(recipe)
        changed = [line for line in changes if not SAME_RESULT.match(line)]
        if changed and not resume:
            return False
        if self.checkpoint is not None:
            changed += changes_of_step(manifest(self.checkpoint), recipe, processes)
        never = [line for line in changed if OTHER_RUN.match(line)]
        if never or changed and resume != "force":
            lines = "".join(f"\n  - {line}" for line in (never if resume == "force" else changed))
            way = "" if never else ", or resume with them: --resume=force"
            raise RequestError(
                f"--resume: {self.path} was started with other settings:{lines}\nundo the changes, or start without --resume "
                f"in another training.output_dir{way}"
            )
        self.notes += [f"resuming with a change: {line}" for line in changed]
        if changes:
            recipe.save(self.path / "recipe.yaml")
        return True

    def _begin(self, recipe: Recipe) -> RunFolder:
        path, number = self.path, 2
        while path.exists() and any(one.name not in LEFT_BY_A_KILL for one in path.iterdir()):
            path, number = self.path.with_name(f"{self.path.name}-{number}"), number + 1
        folder = RunFolder(path)
        path.mkdir(parents=True, exist_ok=True)
        lock_folder(path)
        if path != recipe.folder:  # its own recipe leads back to it, also to resume
            folder.notes.append(f"{recipe.folder} is not empty, so this run has a folder of its own: {path}")
            recipe = recipe.model_copy(update={"training": recipe.training | {"output_dir": str(path)}})
        recipe.save(path / "recipe.yaml")
        folder.checkpoints.mkdir(exist_ok=True)  # last: what a kill leaves before is LEFT_BY_A_KILL
        return folder

    def unlock(self) -> None:
        """Let other processes train in this folder."""
        unlock_folder(self.path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open an existing run folder.

        Raises:
            RequestError: no such folder, or not a run folder.
        """
        folder = cls(Path(path))
        check_folder(path, "a run folder of orpo_lite.train", on_hub=False)
        if not (folder.path / "recipe.yaml").is_file():
            raise RequestError(f"{path}: found no recipe.yaml, expected a run folder of orpo_lite.train")
        return folder

    def recipe(self) -> Recipe:
        """Load the run's recipe."""
        # by its file: a folder may have the name of a shipped recipe
        return Recipe.load(self.path / "recipe.yaml")

    def changes(self, recipe: Recipe) -> list[str]:
        """List the fields in which the recipe differs from the one that this folder was started with."""
        return list(differences(self.recipe().model_dump(mode="json"), recipe.model_dump(mode="json")))

    def read(self) -> dict[str, Any]:
        """Read run.json.

        Raises:
            RequestError: there is none yet, or it is broken.
        """
        path = self.path / "run.json"
        try:
            return json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise RequestError(
                f"{self.path}: no run.json, so this run did not finish; train it with --resume"
            ) from None
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path} is broken JSON ({error}): copy the run again, or train it again") from None

    def read_before(self, path: Path | None = None) -> dict[str, Any] | None:
        """Read before.json, or one of another run; None where it cannot be read, since it can be made again."""
        try:
            return json.loads((path or self.before).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return None

    def write(self, facts: dict[str, Any]) -> None:
        """Write run.json, whole or not at all."""
        write_atomically(self.path / "run.json", json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=True))


def no_checkpoint(damaged: list[str]) -> str:
    """Say that there is no checkpoint to resume from, and why."""
    if damaged:
        lines = "".join(f"\n  - {line}" for line in damaged)
        return f"holds no good checkpoint to resume from; start without --resume, from the beginning:{lines}"
    return (
        "holds no checkpoint to resume from (training.save_strategy, save_steps and save_minutes say when one is written); "
        "start without --resume"
    )


def changes_of_step(facts: dict[str, Any], recipe: Recipe, processes: int) -> list[str]:
    """Write a line for each way in which an optimizer step differs from those before a checkpoint, by its manifest."""
    pairs = processes * recipe.pairs_at_once * (recipe.training.get("gradient_accumulation_steps") or 1)
    now = {"processes": processes, "pairs_per_step": pairs}
    names = {"processes": "processes", "pairs_per_step": "pairs per optimizer step"}
    return [f"{words}: was {facts[key]}, is {now[key]}" for key, words in names.items() if facts[key] != now[key]]


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Write a line for every leaf in which two recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{place}.{key}".strip("."))]
    return [] if old == new else [f"{place}: was {old!r}, is {new!r}"]


def base_section(folder: Path, base: str | None = None, trust_remote_code: bool = False) -> ModelSection:
    """Return the model that an adapter belongs to: `base`, else the run's recipe, else what adapter_config.json names.

    Code of its repository runs only where the caller says so, whatever the folder's recipe says.

    Raises:
        RequestError: nothing names a base, the adapter cannot be read, or the base would leave out another adapter.
    """
    from peft import PeftConfig

    from orpo_lite.model.locating import check_no_adapter_is_lost, hub_errors_in_words, renaming_field

    if (folder / "recipe.yaml").is_file():
        spec = RunFolder(folder).recipe().model.model_copy(update={"trust_remote_code": trust_remote_code})
    else:
        with renaming_field("adapter"), hub_errors_in_words(str(folder)):
            config = PeftConfig.from_pretrained(str(folder))
        name = config.base_model_name_or_path or base
        if not name:
            raise RequestError(f"{folder}: adapter_config.json names no base model: give it with --base")
        spec = ModelSection(name_or_path=name, revision=config.revision, quantization="none",
                            trust_remote_code=trust_remote_code)  # fmt: skip
    check_no_adapter_is_lost(spec.name_or_path, base, str(folder), spec.revision)
    return spec.model_copy(update={"name_or_path": base, "revision": None, "gguf_file": None}) if base else spec


def naming_base(folder: Path, spec: ModelSection) -> contextlib.AbstractContextManager[None]:
    """Report errors about the base `spec` of an adapter by the name of what chose it, with the option for another."""
    from orpo_lite.model.locating import renaming_field
    from orpo_lite.model.untrusted_files import read_object

    if (folder / "recipe.yaml").is_file():
        field, named = "model.name_or_path", RunFolder.open(folder).recipe().model.name_or_path
    else:
        path = folder / "adapter_config.json"
        field, named = f"{path}, base_model_name_or_path", read_object(path).get("base_model_name_or_path")
    own = named == spec.name_or_path
    return renaming_field(field if own else "--base", " (--base names another base)" * own)


def tokenizer_of(folder: Path, spec: ModelSection) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the folder was trained with, else the base's; a chat template that it lacks is the base's."""
    from transformers import AutoTokenizer

    from orpo_lite.model import load_tokenizer
    from orpo_lite.model.locating import hub_errors_in_words, locate

    if not (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(spec)
    own = {"name_or_path": str(folder), "gguf_file": None, "revision": None}
    tokenizer = load_tokenizer(spec.model_copy(update=own))
    if tokenizer.chat_template is None and (folder / "adapter_config.json").is_file():
        with hub_errors_in_words(spec.name_or_path):
            options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
            tokenizer.chat_template = AutoTokenizer.from_pretrained(locate(spec), **options).chat_template
        if tokenizer.chat_template:
            console.print(f"chat template: that of {spec.name_or_path}, for {folder} has none", markup=False)
    return tokenizer


def check_tokens_have_rows(
    tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path, spec: ModelSection
) -> dict[str, int]:
    """Return the tokens (name -> id) that have no embedding in the base either, as Gemma 3's image token.

    Args:
        tokenizer: that of the adapter in `folder` on the base `spec`.
        rows: rows of the embeddings that they have together.

    Raises:
        RequestError: text can produce tokens that the adapter's tokenizer added, and that have no embedding.
    """
    from orpo_lite.model import load_tokenizer

    known, lacking = {}, tokens_from(tokenizer, rows)
    if lacking:
        with contextlib.suppress(RequestError):
            known = load_tokenizer(spec.model_copy(update={"new_tokens": [], "chat_template": None})).get_vocab()
    if added := [token for token, i in lacking.items() if known.get(token) != i]:
        raise RequestError(
            f"{folder}: its tokenizer has {len(added)} token(s) without an embedding: {', '.join(added[:8])}; there are {rows} "
            "rows, and the adapter holds no more: save it again with its embeddings (PEFT's save_embedding_layers=True), or, "
            f"where no text uses the tokens, copy the tokenizer files of {spec.name_or_path} over those in {folder}"
        )
    return lacking


def tokens_from(tokenizer: PreTrainedTokenizerBase, start: int) -> dict[str, int]:
    """List the tokens from the id `start` on that text can produce: name -> id."""
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= start)
    return {
        token: i for i, token in beyond if i in tokenizer.encode(str(tokenizer.decode([i])), add_special_tokens=False)
    }
