"""A step in one file, to be done again elsewhere: a zip of JSON and safetensors, and no pickle."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from orpo_lite.common.errors import RequestError
from orpo_lite.model import save_adapter
from orpo_lite.trainer.nonfinite_report import Finding, trained

if TYPE_CHECKING:
    from orpo_lite.trainer.nonfinite_guard import WatchingTrainer

FORMAT = "orpo_lite step, version 1"
STEP, TENSORS, WEIGHTS = "step.json", "tensors.safetensors", "weights/"
SECRET = ("token",)
"""Parts of a training field's name whose value stays out of the file."""
EXPANDS = 200
"""Times that a file may grow when unpacked: text that somebody packed again shrinks to a tenth."""
SUFFIXES = (".json", ".safetensors")

Item = list[dict[str, Any]]
"""Micro-batches of one pass."""


@dataclass
class Reproducer:
    """An optimizer step before it was taken.

    Args:
        facts: plain content of step.json: recipe, step, versions, device, totals, what was found, pairs with texts.
        tensors: batches and random states by name.
        weights: a folder with the trained weights as they were before the step, in PEFT's files, or transformers' after
            full fine-tuning.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: Path
    aside: tempfile.TemporaryDirectory

    @classmethod
    def of(cls, trainer: WatchingTrainer, finding: Finding) -> Reproducer | None:
        """The step at hand of all processes, on each of them; None where no process can hold the weights."""
        from orpo_lite import __version__

        plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
        if plugin is not None and plugin.zero_stage == 3:
            return None
        aside = tempfile.TemporaryDirectory()
        folder = Path(aside.name)
        model = trainer.unwrapped()
        if any(isinstance(p, DTensor) for p in model.parameters()):
            full = {n: p.full_tensor().cpu() if isinstance(p, DTensor) else p for n, p in trained(model).items()}
            model.save_pretrained(str(folder), state_dict=full)
        elif trainer.is_world_process_zero():
            save_adapter(model, folder)
        window, rank = trainer._window, trainer.args.process_index
        assert window is not None
        tensors: dict[str, Tensor] = {}
        if window.random is not None:
            tensors[f"{rank}.random"] = window.random
        if window.device_random is not None:
            tensors[f"{rank}.device_random"] = window.device_random
        items: list[list[dict[str, Any]]] = []
        for i, parts in enumerate(trainer.parts()):
            items.append([])
            for k, part in enumerate(parts):
                plain = {name: value for name, value in part.items() if not isinstance(value, Tensor)}
                items[-1].append(plain)
                tensors |= {
                    f"{rank}.{i}.{k}.{n}": v.cpu().contiguous() for n, v in part.items() if isinstance(v, Tensor)
                }
        mine = {"items": items, "losses": [float(loss) for loss in trainer._passes], "tensors": tensors}
        ranks = gather_object([mine]) if trainer.accelerator.num_processes > 1 else [mine]
        scaler = trainer.accelerator.scaler
        totals = trainer._totals
        facts = {
            "format": FORMAT,
            "orpo_lite": __version__,
            "torch": torch.__version__,
            "device": str(trainer.args.device),
            "recipe": safe_recipe(trainer),
            "step": finding.step,
            "layout": trainer.layout.name,  # type: ignore[attr-defined]  # ORPOTrainer's
            "totals": None if totals is None else totals.tolist(),
            "accumulation": len(items),
            "scale": scaler.get_scale() if scaler is not None else None,
            "processes": [{"items": one["items"], "losses": one["losses"]} for one in ranks],
            "found": finding.as_dict(),
            "texts": [texts(trainer, one, r, i, k)
                      for r, one in enumerate(ranks) for i, parts in enumerate(one["items"]) for k in range(len(parts))],
        }  # fmt: skip
        return cls(facts, {k: v for one in ranks for k, v in one["tensors"].items()}, folder, aside)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        try:
            with zipfile.ZipFile(part, "w") as archive:
                archive.writestr(STEP, json.dumps(self.facts, indent=1, ensure_ascii=False))
                archive.writestr(TENSORS, safetensors.torch.save(self.tensors))
                for file in sorted(self.weights.iterdir()):
                    if file.suffix in SUFFIXES:
                        archive.write(file, WEIGHTS + file.name)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Reproducer:
        """Read a file that `write` has made.

        Raises:
            RequestError: there is none, or it is damaged, or of another kind.
        """
        if not path.is_file():
            raise RequestError(
                f"--reproduce: {path}: found no file, expected one that a run wrote: reproduce-step-N.zip"
            )
        wrong = f"--reproduce: {path}"
        aside = tempfile.TemporaryDirectory()
        try:
            with zipfile.ZipFile(path) as archive:
                infos = {info.filename: info for info in archive.infolist()}
                if STEP not in infos or TENSORS not in infos:
                    raise RequestError(
                        f"{wrong}: found a zip without {STEP} and {TENSORS}, expected a reproduce-step-N.zip"
                    )
                if sum(info.file_size for info in infos.values()) > EXPANDS * path.stat().st_size:
                    raise RequestError(
                        f"{wrong}: its content is more than {EXPANDS} times as large as the file: not unpacked"
                    )
                facts = json.loads(archive.read(STEP))
                if not isinstance(facts, dict) or facts.get("format") != FORMAT:
                    found = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
                    raise RequestError(f"{wrong}: {STEP}: format: found {found!r:.80}, expected {FORMAT!r}")
                tensors = safetensors.torch.load(archive.read(TENSORS))
                for name, info in infos.items():
                    # by its last part alone: a name cannot lead out of the folder
                    if name.startswith(WEIGHTS) and Path(name).suffix in SUFFIXES:
                        (Path(aside.name) / Path(name).name).write_bytes(archive.read(info))
        except (zipfile.BadZipFile, SafetensorError, UnicodeDecodeError, json.JSONDecodeError, EOFError, NotImplementedError,
                RuntimeError, RecursionError) as error:  # fmt: skip
            raise RequestError(
                f"{wrong}: damaged or not a reproducer ({type(error).__name__}: {error}): copy it again from the run folder"
            ) from None
        except OSError as error:
            raise RequestError(f"{wrong}: cannot be read ({error.strerror})") from None
        return cls(facts, tensors, Path(aside.name), aside)

    def items(self, rank: int) -> list[Item]:
        """The passes of a process, tensors and all."""
        return [
            [
                {n: [tuple(s) for s in v] if n == "segments" else v for n, v in plain.items()}
                | {key.split(".", 3)[3]: v for key, v in self.tensors.items() if key.startswith(f"{rank}.{i}.{k}.")}
                for k, plain in enumerate(parts)
            ]
            for i, parts in enumerate(self.facts["processes"][rank]["items"])
        ]


def safe_recipe(trainer: WatchingTrainer) -> dict[str, Any] | None:
    """The recipe without credentials."""
    if trainer.recipe is None:
        return None
    content = trainer.recipe.model_dump(mode="json")
    content["training"] = {k: v for k, v in content["training"].items() if not any(word in k for word in SECRET)}
    return content


def texts(trainer: WatchingTrainer, rank: dict[str, Any], r: int, i: int, k: int) -> list[dict[str, Any]]:
    """Rows of a micro-batch in readable form: what was tokenised is not kept, so that tokens are decoded."""
    tokenizer = trainer.tokenizer  # type: ignore[attr-defined]  # ORPOTrainer's
    plain, tensors, name = rank["items"][i][k], rank["tensors"], f"{r}.{i}.{k}."
    rows, ids = tensors[name + "pair_rows"].tolist(), tensors[name + "input_ids"]
    found = []
    for place, row in enumerate(rows):
        if "segments" in plain:
            start, prefix, chosen, rejected = plain["segments"][place]
            line = ids[0, start : start + prefix + chosen + rejected].tolist()
            sides = {"chosen": line[: prefix + chosen], "rejected": line[:prefix] + line[prefix + chosen :]}
        else:
            mask = tensors[name + "attention_mask"].bool()
            both = {"chosen": place, "rejected": place + len(rows)}
            sides = {side: ids[line][mask[line]].tolist() for side, line in both.items()}
            if name + "decoder_input_ids" in tensors:
                answers = tensors[name + "decoder_input_ids"]
                sides = {"prompt": sides["chosen"]} | {side: answers[line].tolist() for side, line in both.items()}
        found.append(
            {"row": row} | {side: {"text": tokenizer.decode(line), "ids": line} for side, line in sides.items()}
        )
    return found
