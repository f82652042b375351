"""Graphics cards by name and by size, and how a plan stands to them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import nearest

if TYPE_CHECKING:
    from orpo_lite.plan.kernels import Target
    from orpo_lite.plan.predict import Plan


@dataclass(frozen=True)
class Card:
    """A card. Its memory is what the driver says is there, where that is less than the name promises."""

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
        """What the step would run on. Cards of a generation take the same kernels, and so the same memory."""
        from orpo_lite.plan.kernels import Target

        return Target("cuda", (8, 6) if self.capability >= (8, 0) else (7, 5))


AMPERE, ADA, HOPPER, BLACKWELL, TURING = (8, 6), (8, 9), (9, 0), (12, 0), (7, 5)
CARDS = {
    card.name: card
    for card in (
        Card("gtx-1080-ti", 11, (6, 1)),
        Card("rtx-2060", 6, TURING),
        Card("rtx-2070", 8, TURING),
        Card("rtx-2080", 8, TURING),
        Card("rtx-2080-ti", 11, TURING),
        Card("rtx-3050", 8),
        Card("rtx-3060", 12),
        Card("rtx-3060-ti", 8),
        Card("rtx-3070", 8),
        Card("rtx-3080", 10),
        Card("rtx-3080-12gb", 12),
        Card("rtx-3090", 24),
        Card("rtx-4060", 8, ADA),
        Card("rtx-4060-ti", 8, ADA),
        Card("rtx-4060-ti-16gb", 16, ADA),
        Card("rtx-4070", 12, ADA),
        Card("rtx-4070-ti", 12, ADA),
        Card("rtx-4070-ti-super", 16, ADA),
        Card("rtx-4080", 16, ADA),
        Card("rtx-4090", 24, ADA),
        Card("rtx-5060-ti-16gb", 16, BLACKWELL),
        Card("rtx-5070", 12, BLACKWELL),
        Card("rtx-5070-ti", 16, BLACKWELL),
        Card("rtx-5080", 16, BLACKWELL),
        Card("rtx-5090", 32, BLACKWELL),
        Card("t4", 15.8, TURING),
        Card("p100", 16, (6, 0)),
        Card("v100-16gb", 16, (7, 0)),
        Card("v100-32gb", 32, (7, 0)),
        Card("rtx-a4000", 16),
        Card("rtx-a5000", 24),
        Card("rtx-a6000", 48),
        Card("a10", 23.6),
        Card("a10g", 23.6),
        Card("l4", 23.6, ADA),
        Card("a40", 47.6),
        Card("l40s", 47.6, ADA),
        Card("rtx-6000-ada", 48, ADA),
        Card("a100-40gb", 40, (8, 0)),
        Card("a100-80gb", 80, (8, 0)),
        Card("h100", 80, HOPPER),
        Card("h200", 141, HOPPER),
    )
}
SIZES = (8, 12, 16, 24, 32, 48, 80)
"""Gigabytes of the cards that recipes are written for."""
SHOWN = [*(Card(f"{size} GB", size) for size in SIZES), CARDS["t4"]]

FITS, TIGHT, NOT = "fits", "tight", "does not fit"


def find_cards(wish: str) -> list[Card]:
    """The cards behind a name, a size such as 12GB, or `all`.

    Raises:
        RequestError: neither; the message names the nearest.
    """
    word = re.sub(r"[\s_]+", "-", wish.strip().lower()).removeprefix("nvidia-").removeprefix("geforce-")
    if word == "all":
        return sorted([*SHOWN[:-1], *CARDS.values()], key=lambda card: card.gigabytes)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)-?(gi?b?)?", word)
    if size and 0 < float(size[1]) <= 1000:
        gigabytes = round(float(size[1]) * (2**30 / 1e9 if "i" in (size[2] or "") else 1), 2)
        return [Card(f"{gigabytes:g} GB", gigabytes)]
    spelt = {re.sub(r"\W", "", name): card for name, card in CARDS.items()}
    found = spelt.get(re.sub(r"\W", "", word)) or spelt.get("rtx" + re.sub(r"\W", "", word))
    if found is None:
        raise RequestError(
            f"--gpu: found {wish!r}{nearest(word, CARDS)}, expected all, a size such as 12GB, or one of {', '.join(CARDS)}"
        )
    return [found]


def verdict(plan: Plan, card: Card) -> str:
    """fits: with every margin; tight: only if the allocator wastes next to nothing; else it does not."""
    from orpo_lite.plan.predict import MARGIN

    room = card.gigabytes * 1e9
    if plan.needed <= room:
        return FITS
    return TIGHT if plan.needed - plan.assumed.get(MARGIN, 0) <= room else NOT
