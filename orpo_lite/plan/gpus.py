"""Graphics cards by name and size, the one in this machine, and whether a plan fits a card."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orpo_lite.common import safe_yaml
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import nearest

if TYPE_CHECKING:
    import torch

    from orpo_lite.plan.predict import Plan

MARGIN = "fragmentation margin"
"""The assumption without which a plan still fits, if only tightly."""
CONTEXT_BYTES = 500_000_000
"""ASSUMED. Memory that the driver and CUDA's modules take outside the allocator: 0.3 to 0.6 GB on recent cards."""


@dataclass(frozen=True)
class Target:
    """The device that is planned for."""

    kind: str
    """cuda or cpu."""
    capability: tuple[int, int] = (8, 6)
    """CUDA compute capability; it decides the kernels and the 16-bit dtype."""

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self.kind)

    @property
    def block(self) -> int:
        """Bytes that allocations are rounded up to."""
        return 512 if self.kind == "cuda" else 1


@dataclass(frozen=True)
class Card:
    """A card; its memory is what the driver reports, where that is less than the name promises."""

    name: str
    gigabytes: float
    """10^9 bytes."""
    capability: tuple[int, int] = (8, 6)

    @property
    def title(self) -> str:
        """Name and size."""
        size = f"{self.gigabytes:g} GB"
        return self.name if size in self.name else f"{self.name} ({size})"

    @property
    def target(self) -> Target:
        """The device to plan for. Cards of a generation use the same kernels, and so need the same memory."""
        return Target("cuda", (8, 6) if self.capability >= (8, 0) else (7, 5))


CARDS = {
    name: Card(name, size, (int(major), int(minor)))
    for capability, sizes in safe_yaml.read(Path(__file__).with_suffix(".yaml")).items()
    for major, _, minor in [capability.partition(".")]
    for name, size in sizes.items()
}
SIZES = [Card(f"{size} GB", size) for size in (8, 12, 16, 24, 32, 48, 80)]
"""The sizes of card that recipes are written for."""

FITS, TIGHT, NOT = "fits", "tight", "does not fit"


def find_cards(wish: str) -> list[Card]:
    """Return the cards that a name, a size such as 12GB, or `all` stands for.

    Raises:
        RequestError: none of these; the message suggests the nearest name.
    """
    word = re.sub(r"[\s_]+", "-", wish.strip().lower()).removeprefix("nvidia-").removeprefix("geforce-")
    if word == "all":
        return sorted([*SIZES, *CARDS.values()], key=lambda card: card.gigabytes)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)-?(gi?b?)?", word)
    if size and 0 < float(size[1]) <= 1000:
        gigabytes = round(float(size[1]) * (2**30 / 1e9 if "i" in (size[2] or "") else 1), 2)
        return [Card(f"{gigabytes:g} GB", gigabytes)]
    spelled = {re.sub(r"\W", "", name): card for name, card in CARDS.items()}
    found = spelled.get(re.sub(r"\W", "", word)) or spelled.get("rtx" + re.sub(r"\W", "", word))
    if found is None:
        raise RequestError(
            f"--gpu: found {wish!r}{nearest(word, CARDS)}, expected all, a size such as 12GB, or one of {', '.join(CARDS)}"
        )
    return [found]


def card_here(device: torch.device) -> tuple[Card, int]:
    """Return this machine's card with the memory that this process can use, and the bytes that other processes hold."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    # asking created this process's own CUDA context, which a plan counts itself
    ours = CONTEXT_BYTES + torch.cuda.memory_reserved(device)
    others = max(0, total - free - ours)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Card(name, (total - others) / 1e9, capability), others


def verdict(plan: Plan, card: Card) -> str:
    """Judge a plan: it fits with every margin, tightly if the allocator wastes next to nothing, or not at all."""
    room = card.gigabytes * 1e9
    if plan.needed <= room:
        return FITS
    return TIGHT if plan.needed - plan.assumed.get(MARGIN, 0) <= room else NOT
