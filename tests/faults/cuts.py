"""Real checkpoints cut short anywhere: every cut is seen, and the run goes on from the one before.

python -m tests.faults.cuts --harms 300 --resumed 20
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from pathlib import Path

from tests.faults.kills import outcome, words_of


def main(harms: int, resumed: int, seed: int, place: Path) -> str:
    """Harm the newest checkpoint of a stopped run `harms` times; go on to the end after `resumed` of them."""
    from orpo_lite.recipe import Recipe
    from orpo_lite.train.pipeline import run
    from orpo_lite.trainer.checkpoint_folder import checkpoints, damage, newest_good

    chance = random.Random(seed)
    run(Recipe.load("quickstart", words_of(place / "stopped")))
    expected = outcome(place / "stopped")
    for name in ("run.json", "adapter_model.safetensors", "report.html", "README.md"):
        (place / "stopped" / name).unlink()
    before, newest = checkpoints(place / "stopped" / "checkpoints")[-2:]
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    for number in range(harms):
        file = chance.choice(files)
        whole = file.read_bytes()
        file.write_bytes(whole[: chance.randrange(len(whole))])
        found, lines = newest_good(newest.parent)
        assert found == before and file.name in lines[0], (file.name, lines)
        if number % max(harms // max(resumed, 1), 1) == 0 and number // max(harms // max(resumed, 1), 1) < resumed:
            copy = place / "copy"
            shutil.copytree(place / "stopped", copy)
            recipe = (copy / "recipe.yaml").read_text("utf-8").replace(str(place / "stopped"), str(copy))
            (copy / "recipe.yaml").write_text(recipe, "utf-8")
            run(Recipe.load("quickstart", words_of(copy)))
            got = outcome(copy)
            assert all(got[key] == value for key, value in expected.items()), file.name
            shutil.rmtree(copy)
        file.write_bytes(whole)
    assert damage(newest) is None
    return f"{harms} cuts seen and named; {resumed} runs gone on with, all equal"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--harms", type=int, default=300)
    parser.add_argument("--resumed", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        print(main(given.harms, given.resumed, given.seed, Path(made)))
