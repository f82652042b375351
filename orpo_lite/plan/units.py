"""What several GPUs share a model by: the strategy, and the units of parameters that are cut and gathered together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from orpo_lite.common.errors import RequestError
from orpo_lite.model.inspection import unwrap
from orpo_lite.plan.extrapolate import period
from orpo_lite.plan.meta_model import build, label_of
from orpo_lite.plan.predict import Study

STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")
SHARDED = ("fsdp2", "zero3")
"""Strategies that spread the weights, and so can let them wait on the host."""


@dataclass(frozen=True)
class Spread:
    """How many GPUs share a recipe, and how.

    Raises:
        RequestError: there is no such strategy, or it has nothing to offload.
    """

    gpus: int
    strategy: str = "ddp"
    offload: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise RequestError(f"--strategy: found {self.strategy!r}, expected one of {', '.join(STRATEGIES)}")
        if self.gpus < 2:
            raise RequestError(f"--gpus: found {self.gpus}, expected 2 or more; a plan without it is that of one card")
        if self.offload and self.strategy not in SHARDED:
            raise RequestError(
                f"--offload: {self.strategy} keeps every weight on every card: take --strategy fsdp2 or zero3"
            )

    def __str__(self) -> str:
        return f"{self.gpus} GPUs by {self.strategy}{', offloaded' if self.offload else ''}"


@dataclass(frozen=True)
class Piece:
    """A parameter, as it is cut into rows of its first dimension."""

    rows: int
    stored: int
    """Bytes of a row at rest."""
    travelling: int
    """Bytes of a row as it is gathered: in the compute dtype, 4-bit weights packed as they are."""
    numbers: int
    """Of a row, as DeepSpeed counts them: packed ones by their storage."""
    label: str
    trained: bool

    def held(self, gpus: int) -> int:
        """Bytes of the largest shard; the last GPUs may hold less, and are padded to it while they travel."""
        return -(-self.rows // gpus) * self.stored

    def gathered(self, gpus: int) -> int:
        """Bytes of the parameter when it is whole again, padding included."""
        return -(-self.rows // gpus) * gpus * self.travelling


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together: a decoder layer, the embeddings, or the norm and head behind the layers."""

    pieces: tuple[Piece, ...]
    times: int = 1
    """Units like it."""

    def gathered(self, gpus: int) -> int:
        return sum(piece.gathered(gpus) for piece in self.pieces)

    def held(self, gpus: int) -> int:
        return sum(piece.held(gpus) for piece in self.pieces)


@dataclass(frozen=True)
class Units:
    """A model's units, by where they are in a step."""

    start: Unit
    layers: tuple[Unit, ...]
    end: Unit
    tied: bool
    """Whether embeddings and head are one, which is then gathered all the time."""

    def each(self) -> Iterator[tuple[Piece, int]]:
        """Every piece, and how often it is there."""
        for unit in (self.start, *self.layers, self.end):
            for piece in unit.pieces:
                yield piece, unit.times

    def total(self, gpus: int, label: str | None = None, trained: bool | None = None) -> int:
        """Bytes that one of the GPUs holds, of some label, of what is trained or frozen."""
        return sum(
            times * piece.held(gpus)
            for piece, times in self.each()
            if label in (None, piece.label) and trained in (None, piece.trained)
        )

    def gathered(self, gpus: int) -> int:
        return sum(unit.times * unit.gathered(gpus) for unit in (self.start, *self.layers, self.end))

    def numbers(self, trained: bool | None = None) -> int:
        return sum(t * p.rows * p.numbers for p, t in self.each() if trained in (None, p.trained))

    @property
    def largest(self) -> Unit:
        """The layer that takes the most."""
        return max(self.layers, key=lambda unit: unit.gathered(1)) if self.layers else self.end


def units_of(study: Study, spread: Spread) -> Units:
    """The units of a study's model; layers of a kind counted, not built.

    Raises:
        RequestError: weights in int8, which no strategy can spread.
    """
    recipe, dtype = study.recipe, study.dtype
    if spread.strategy in SHARDED and recipe.model.quantization == "int8" and recipe.adapter is not None:
        raise RequestError(
            f"model.quantization: int8 weights cannot be sharded by {spread.strategy}: set model.quantization=nf4, or take "
            "--strategy ddp"
        )
    kinds = period(study.layers) if study.layers else None
    model = build(recipe, study.config, dtype, kinds, False)
    base = unwrap(model)
    names = set(base._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    deepspeed = spread.strategy.startswith("zero")
    taken: set[int] = set()

    def unit(modules: list[nn.Module], times: int = 1) -> Unit:
        found = []
        for module in modules:
            for name, parameter in module.named_parameters():
                if id(parameter) not in taken:
                    taken.add(id(parameter))
                    found.append(piece(parameter, label_of(model, name, parameter, module in ends), dtype, deepspeed))
        return Unit(tuple(found), times)

    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    ends = [module for module in (embeddings, head) if module is not None]
    tied = head is None or embeddings.weight is head.weight
    count = len(study.layers) or len(layers)
    made = tuple(unit([layer], -(-(count - i) // len(layers))) for i, layer in enumerate(layers))
    start = Unit(()) if tied else unit([embeddings])
    named = unit([module for module in ends if module is not None])
    rest = unit([model])
    return Units(start, made, Unit(named.pieces + rest.pieces), tied)


def piece(parameter: Any, label: str, dtype: Any, deepspeed: bool) -> Piece:
    size = parameter.element_size()
    if getattr(parameter, "quant_state", None) is not None:
        # bnb_4bit_quant_storage is the compute dtype, else the weights could not be spread
        size = dtype.itemsize
        return Piece(-(-parameter.nbytes // size), size, size, 1, label, False)
    if deepspeed and parameter.requires_grad:
        size = dtype.itemsize  # the engine's weights; its float32 ones count as optimizer states
    rows = parameter.shape[0] if parameter.ndim and not deepspeed else parameter.numel()
    width = parameter.numel() // rows
    travelling = dtype.itemsize if parameter.is_floating_point() else size
    return Piece(rows, width * size, width * travelling, width, label, parameter.requires_grad)
