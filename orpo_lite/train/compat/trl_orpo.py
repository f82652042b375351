"""`python -m orpo_lite.compat.trl_orpo`: TRL's orpo.py by its own flags; needs the extra `trl`."""

from __future__ import annotations

import importlib.util
from typing import Any

from orpo_lite.common.console import guard
from orpo_lite.common.errors import RequestError


def start(**_: Any) -> None:
    """Run the command line with TRL's parser.

    Raises:
        RequestError: TRL is not installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise RequestError("TRL's flags are parsed by TRL, which is not installed: pip install 'orpo_lite[trl]'")
    from orpo_lite.train.trl_command import given, main

    main(given())


if __name__ == "__main__":
    guard(start)
