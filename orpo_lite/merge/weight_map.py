"""Map stored tensors to the parts of parameters that they are, by transformers' own conversion rules.

A checkpoint's keys need not be the model's parameter names: transformers renames them, stacks experts, splits fused
projections. The rules are run on tensors without data; where a rule only takes views, the views' strides show which
block of a stored tensor is which block of a parameter, so weights can be changed where they lie.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key


@dataclass(frozen=True)
class Shared:
    """A dimension that a stored tensor and a parameter have in common, and the part of it that they share."""

    stored_dim: int
    stored_start: int
    dim: int
    start: int
    length: int


@dataclass(frozen=True)
class Link:
    """A block of a stored tensor that is a block of a parameter."""

    parameter: str
    shared: tuple[Shared, ...]
    fixed: tuple[tuple[int, int], ...] = ()
    """(dimension, index) of the parameter where the block is one slice of it: an expert of a stack."""

    @classmethod
    def whole(cls, parameter: str, shape: tuple[int, ...]) -> Link:
        """Link a stored tensor that is the whole parameter."""
        return cls(parameter, tuple(Shared(dim, 0, dim, 0, size) for dim, size in enumerate(shape)))

    def covers(self, shape: tuple[int, ...]) -> bool:
        """Return True if the block is the whole of a parameter of this shape, dimension by dimension."""
        return not self.fixed and all(s.stored_dim == s.dim and s.length == shape[s.dim] for s in self.shared)


class KeyMap:
    """The place of every stored tensor in the model.

    Attributes:
        links: stored key -> blocks of it that are blocks of parameters; empty for tensors that the model does not use.
        unclear: parameter -> why it has no link although the checkpoint holds it.
        held: parameter -> number of its elements that the links cover.

    Args:
        model: skeleton on the meta device, with the vocabulary of the checkpoint.
        shapes: stored key -> shape.

    Raises:
        ValueError: the shape of a stored tensor is not its parameter's.
    """

    def __init__(self, model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]):
        self.model = model
        self.meta: dict[str, Any] = model.state_dict()
        rules = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.links: dict[str, list[Link]] = {key: [] for key in shapes}
        self.unclear: dict[str, str] = {}
        by_pattern = {pattern: rule for rule in self.converters for pattern in rule.source_patterns}
        groups: dict[str, list[tuple[str, str]]] = {}
        # transformers converts in this order, so that expert 10 comes after expert 9
        for key in sorted(shapes, key=dot_natural_key):
            name, pattern = self.name_of(key)
            if name not in self.meta:
                continue
            if pattern is not None:
                groups.setdefault(name, []).append((key, pattern))
            elif tuple(self.meta[name].shape) != tuple(shapes[key]):
                raise ValueError(
                    f"{key} has shape {list(shapes[key])}, but {name} of {type(model).__name__} has "
                    f"{list(self.meta[name].shape)}: config.json and weights belong to different models"
                )
            else:
                self.links[key] = [Link.whole(name, shapes[key])]
        for name, members in groups.items():
            self.convert(name, by_pattern[members[0][1]], members, shapes)
        self.held: Counter[str] = Counter()
        for links in self.links.values():
            for link in links:
                self.held[link.parameter] += math.prod(shared.length for shared in link.shared)

    def name_of(self, key: str) -> tuple[str, str | None]:
        """Return the (first) parameter that a stored key becomes, and the pattern of its conversion if it has one."""
        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, self.renamings, self.converters, prefix, self.meta)
        if name not in self.meta and key in self.meta:
            name, pattern = rename_source_key(key, [], [], prefix, self.meta)
        return name, pattern

    def key_for(self, name: str) -> str:
        """Return a key under which a parameter that has none can be stored: its own name, or one renamed to it.

        Raises:
            ValueError: transformers would read no such key back as this parameter.
        """
        backward: list[Any] = [rule.reverse_transform() for rule in self.renamings[::-1]]
        for key in (name, renamed(name, backward)):
            if self.name_of(key) == (name, None):
                return key
        raise ValueError(f"{name} cannot be stored by itself in a checkpoint of {type(self.model).__name__}")

    def convert(self, name: str, rule: Any, members: list[tuple[str, str]], shapes: dict[str, tuple[int, ...]]) -> None:
        """Link the stored tensors of one conversion with the parameters that it makes."""
        forward = copy.deepcopy(rule)
        for key, pattern in members:
            forward.add_tensor(name, key, pattern, torch.empty(shapes[key], device="meta"))
        made, only_views = self.traced(forward, name)
        made = {target: value[0] if isinstance(value, list) else value for target, value in made.items()}
        odd = [t for t, value in made.items() if t not in self.meta or self.meta[t].shape != value.shape]
        if odd:
            self.unclear |= dict.fromkeys(made, f"{members[0][0]} makes {odd[0]}, which does not fit this model")
            return
        if only_views and len(members) == 1:
            key = members[0][0]
            regions = {target: region(shapes[key], value) for target, value in made.items()}
            if all(found is not None for found in regions.values()):
                for target, found in regions.items():
                    shared = tuple(
                        Shared(dim, start, own, 0, size)
                        for own, (dim, start, size) in enumerate(found)  # type: ignore[arg-type]
                    )
                    self.links[key].append(Link(target, shared))
                return
        if len(made) == 1 and self.convert_back(name, rule, members):
            return
        kinds = ", ".join(type(operation).__name__ for operation in rule.operations)
        for target in made:
            self.unclear[target] = f"the checkpoint stores it in another order of its elements ({kinds})"

    def convert_back(self, name: str, rule: Any, members: list[tuple[str, str]]) -> bool:
        """Link by the reverse conversion, which cuts one parameter into stored tensors; return False if it does more."""
        backward = rule.reverse_transform()
        parameter = torch.empty(self.meta[name].shape, device="meta")
        first, pattern = backward.rename_source_key(name)
        backward.add_tensor(first, name, pattern, parameter)
        cut, only_views = self.traced(backward, first)
        if not only_views or len(cut) != len(members):
            return False
        # the reverse conversion names things as they are after the renamings
        between = {renamed(key, self.renamings): key for key, _ in members}
        found: dict[str, Link] = {}
        for part, value in cut.items():
            value = value[0] if isinstance(value, list) else value
            key = between.get(part) or next((k for n, k in between.items() if part.endswith(f".{n}")), None)
            where = region(tuple(parameter.shape), value)
            if key is None or where is None:
                return False
            shared = tuple(
                Shared(own, 0, dim, start, size) for own, (dim, start, size) in enumerate(where) if dim is not None
            )
            held = {pair.dim for pair in shared}
            fixed = tuple(
                (dim, index) for dim, index in enumerate(first_index(parameter.shape, value)) if dim not in held
            )
            found[key] = Link(name, shared, fixed)
        if len(found) != len(members):
            return False
        for key, link in found.items():
            self.links[key].append(link)
        return True

    def traced(self, rule: Any, name: str) -> tuple[dict[str, Any], bool]:
        """Run a conversion on tensors without data; return its results, and True if all of them are views."""
        again = copy.deepcopy(rule)
        with Views() as views:
            try:
                return rule.convert(name, model=self.model, config=self.model.config), views.only_views
            except RuntimeError:  # it reshapes what is no view any more
                pass
        return again.convert(name, model=self.model, config=self.model.config), False


def renamed(key: str, renamings: list[Any]) -> str:
    """Apply transformers' renamings to a key, one after the other."""
    for rule in renamings:
        key, _ = rule.rename_source_key(key)
    return key


class Views(TorchDispatchMode):
    """A mode in which copies stay views of their input, and which records whether anything but views was made."""

    only_views = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return args[0]
        self.only_views = self.only_views and func.is_view
        return func(*args, **(kwargs or {}))


def first_index(shape: tuple[int, ...], view: torch.Tensor) -> list[int]:
    """Return the index of a view's first element in a contiguous tensor."""
    return [int(index) for index in np.unravel_index(int(view.storage_offset()), shape)]


def region(shape: tuple[int, ...], view: torch.Tensor) -> list[tuple[int, int, int]] | None:
    """Return (dimension of the tensor, start, length) for every dimension of a view of a contiguous tensor.

    None where the view is not a block, if perhaps with its dimensions permuted.
    """
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    starts = first_index(shape, view)
    left = list(range(len(shape)))
    found: list[tuple[int, int, int]] = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        fits = [dim for dim in left if (strides[dim] == stride and shape[dim] > 1) or (size == 1 and shape[dim] == 1)]
        if not fits or starts[fits[0]] + size > shape[fits[0]]:
            return None
        left.remove(fits[0])
        found.append((fits[0], starts[fits[0]], size))
    return found
