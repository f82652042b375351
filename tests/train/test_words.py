"""What commands say: missing folders, what a run and a plan print, and the next command of the path from pairs to a file."""

import pytest

from orpo_lite.common.errors import RequestError
from orpo_lite.evaluate.loading import resolve_model
from orpo_lite.export.gguf import export
from orpo_lite.merge.run import merge
from orpo_lite.trainer.run_folder import RunFolder

TAKES_A_FOLDER = {
    "evaluate": resolve_model,
    "merge": lambda path: merge(path, "merged"),
    "export": lambda path: export(path, "made.gguf"),
    "report": RunFolder.open,
}


@pytest.mark.parametrize("take", TAKES_A_FOLDER.values(), ids=TAKES_A_FOLDER)
@pytest.mark.parametrize("path", ["nope", "outputs/quikstart", "./nope", "a/b/c", "/nope/x"])
def test_a_folder_that_does_not_exist_is_said_to_be_missing_before_anything_else(take, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "quickstart").mkdir(parents=True)
    with pytest.raises(RequestError) as caught:
        take(path)
    said = str(caught.value)
    assert said.startswith(f"{path.removeprefix('./')}: there is no such folder") or said.startswith(
        f"{path}: there is no"
    )
    assert ("did you mean quickstart?" in said) == (path == "outputs/quikstart")
    if take in (resolve_model, TAKES_A_FOLDER["merge"]):  # which also take a hub id
        assert ("it is no hub id" in said) == (path == "nope") and said.endswith("or a hub id USER/NAME")
