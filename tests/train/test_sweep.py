"""`orpo-lite sweep`: trials are the runs that one would start by hand, and what is said of the winner holds."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from subprocess import TimeoutExpired
from types import SimpleNamespace

import pytest

from orpo_lite.__main__ import load
from orpo_lite.common.console import run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import unlock_folder
from orpo_lite.recipe import Recipe
from orpo_lite.train import sweep
from tests.commands import Command, command

BRIEF = ["training.max_steps=4", "evaluation.samples=2", "evaluation.max_new_tokens=4", "data.max_eval_rows=16",
         "training.logging_steps=1", "training.eval_strategy=no"]  # fmt: skip


class Child(Command):
    """In place of Popen: from the server that has the libraries imported."""

    def __init__(self, args, stdout, **_):
        super().__init__(args[2].removeprefix("orpo_lite."), *args[3:], tty=stdout.name)

    def wait(self, timeout):
        self.process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired(self.args, timeout)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs `orpo-lite sweep` in this process: exit status, what it printed in one line, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep.subprocess, "Popen", Child)
    handlers = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}

    def call(*words, name="quickstart"):
        monkeypatch.setattr(sys, "argv", ["orpo-lite sweep", "--recipe", name, *words])
        with pytest.raises(SystemExit) as stop:
            run_command(load("sweep"))
        for number, handler in handlers.items():
            signal.signal(number, handler)
        unlock_folder(Path("s"))  # as the end of the process does
        out, err = capfd.readouterr()
        return int(stop.value.code or 0), " ".join(out.split()), " ".join(err.split())

    return call


def figures(folder):
    """All that a run measured, without times."""
    record = json.loads((folder / "run.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    timed = ("second", "runtime", "peak_memory")
    metrics = [{key: value for key, value in line.items() if not any(one in key for one in timed)} for line in lines]
    held_out, weights = (folder / "held_out.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()
    return {key: record[key] for key in ("eval", "samples", "rule", "steps", "data")}, metrics, held_out, weights


@pytest.mark.parametrize("text, values", [
    ("2e-5,5e-5,1e-4", ["2e-5", "5e-5", "1e-4"]),
    ("[q_proj,v_proj]", ["[q_proj,v_proj]"]),
    ("[q_proj,v_proj],all-linear", ["[q_proj,v_proj]", "all-linear"]),
    ("'\"a,b.jsonl\"'", ["'\"a,b.jsonl\"'"]),
    ("{r: 8, alpha: 16},{r: 16}", ["{r: 8, alpha: 16}", "{r: 16}"]),
    (".*(q|k)_proj", [".*(q|k)_proj"]),
])  # fmt: skip
def test_commas_separate_values_outside_of_brackets_and_quotes(text, values):
    assert sweep.VALUE.findall(text) == values


@pytest.mark.parametrize("words, said", [
    ([], "found no field with several values"),
    (["training.learning_rate=1e-3"], "found no field with several values"),
    (["training.learning_rte=1e-3,2e-3"], "did you mean training.learning_rate"),
    (["training.learning_rate=1e-3,fast"], "fast"),
    (["orpo.beta=0.1,-1"], "orpo.beta"),
    (["model.name_or_path=a,b"], "orpo-lite report RUN RUN"),
    (["evaluation.samples=1,2"], "evaluation.samples"),
    (["data.max_length=128,256"], "data.max_length"),
    (["data.max_rows=100,200", "data.eval=null"], "data.eval: a sweep decides on held-out pairs"),
    (["orpo.beta=0.1,0.2", "data.train=nowhere.jsonl"], "nowhere.jsonl"),
    (["orpo.beta=0.1,0.2", "--output", "."], "holds something else than a sweep"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_trained(run, words, said, monkeypatch):
    monkeypatch.setattr(sweep.Sweep, "train", lambda *_: pytest.fail("trained"))
    Path("a file").write_text("")
    status, _, err = run(*words)
    assert status == 2 and said in err
    assert os.listdir() == ["a file"]


def test_each_process_of_a_launcher_gives_its_trials_a_card_of_their_own(monkeypatch):
    monkeypatch.setattr(os, "environ", {"PATH": "x"})
    assert sweep.of_one_card() == {"PATH": "x"}
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
                "ACCELERATE_MIXED_PRECISION": "no", "TORCHELASTIC_RUN_ID": "7", "TORCHELASTIC_ERROR_FILE": "e"}  # fmt: skip
    os.environ.update(launched)
    kept = {"PATH": "x", "TORCHELASTIC_RUN_ID": "7"}
    assert sweep.of_one_card() == kept | {"CUDA_VISIBLE_DEVICES": "1"}
    os.environ["CUDA_VISIBLE_DEVICES"] = "4,6"
    assert sweep.of_one_card() == kept | {"CUDA_VISIBLE_DEVICES": "6"}


class Fake:
    """A finished trial that prefers the chosen answer of `right` pairs of 100, from pair `start` on."""

    def __init__(self, right, start=0, margin=1.0, costs=(480, 1000), chosen=-1.0, style=()):
        ranks = [start <= n < start + right for n in range(100)]
        self.margins = [(margin if rank else -0.1) + n / 1000 for n, rank in enumerate(ranks)]
        self.right, self.chosen, self.costs, self.in_style = ranks, [chosen] * 100, costs, list(style)


@pytest.mark.parametrize("trials, winner, tied", [
    ([Fake(60), Fake(90)], 1, []),  # clearly more accurate, whatever it costs
    ([Fake(60, costs=(1, 1)), Fake(90, costs=(960, 9000))], 1, []),
    ([Fake(90, costs=(960, 1000)), Fake(88, start=1)], 1, [0]),  # fewer pairs
    ([Fake(90), Fake(88, costs=(480, 500))], 1, [0]),  # fewer parameters
    ([Fake(90, margin=1.0), Fake(90, margin=2.0)], 1, [0]),  # larger margins
    ([Fake(90, margin=1.0), Fake(90, margin=2.0, chosen=-3.0)], 0, [1]),  # but not at a worse NLL
    ([Fake(90), Fake(90), Fake(91)], 0, [1, 2]),  # the smaller value
    ([Fake(100, style=[0] * 30), Fake(100, style=[0] * 10 + [1] * 20)], 1, []),  # answers tell what accuracy cannot
    ([Fake(90, start=0), Fake(90, start=10)], 0, [1]),  # as many right, on other pairs
])  # fmt: skip
def test_ties_go_to_the_cheaper_and_then_the_smaller(trials, winner, tied):
    best, others = sweep.decide(trials)
    assert best is trials[winner] and others == [trials[place] for place in tied]


def test_optuna_proposes_each_point_once_and_more_of_them_go_on(monkeypatch):
    pytest.importorskip("optuna")
    some, more = sweep.proposed(12, 4), sweep.proposed(12, 11)
    assert len(set(some)) == 4 and len(set(more)) == 11 and set(some) < set(more) and more[-1] < 12
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RequestError, match="pip install"):
        sweep.proposed(12, 4)


@pytest.mark.parametrize("pairs, minutes, tried", [(None, None, 3), (1000, None, 2), (100, None, 0), (None, 0.001, 0)])
def test_budget_is_kept(pairs, minutes, tried, monkeypatch, tmp_path):
    """480 pairs a trial."""
    done = []
    recipe = Recipe.load("quickstart")
    trials = [SimpleNamespace(read=lambda n=n: n in done, recipe=recipe, costs=(480, 1), trouble="", n=n) for n in range(3)]  # fmt: skip
    for one in trials:
        one.tell = lambda: None
    monkeypatch.setattr(sweep.Sweep, "train", lambda _, trial: done.append(trial.n) or True)
    budget = sweep.Sweep("quickstart", tmp_path, minutes, pairs)
    budget.end -= 1 if minutes else 0
    assert budget.run(trials) == trials[:tried] and len(done) == tried and budget.left == trials[tried:]


@pytest.mark.parametrize("words, share, found", [
    ([], 1, []),
    ([], 1 / 3, ["training.max_steps=20"]),
    (["training.max_steps=-1", "training.num_train_epochs=2", "training.warmup_steps=30"], 1 / 9,
     ["training.num_train_epochs=0.222222", "training.warmup_steps=3"]),
])  # fmt: skip
def test_a_rung_is_a_short_run_with_a_schedule_of_its_own(words, share, found):
    assert sweep.shortened(Recipe.load("quickstart", words), share) == found


# ---- real trials -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trials_are_the_runs_by_hand_and_the_base_is_measured_once(run):
    """With dropout, so that training draws random numbers after the base was measured; one trial fails, one diverges."""
    words = [*BRIEF, "orpo.disable_dropout=false", "adapter.dropout=0.1"]
    searched = ["training.learning_rate=4e-3,9e9", "adapter.r=4,8", *words, "--output", "s"]
    status, out, err = run(*searched)
    assert status == 0, out + err
    logs = [path.read_text("utf-8") for path in sorted(Path("s").glob("*/train.log"))]
    assert ["measuring the base" in text for text in logs] == [True, False, False, False]
    assert ["the base's figures: those in" in text for text in logs] == [False, True, True, True]
    by_hand = ["training.learning_rate=4e-3", "adapter.r=8", *words, "training.output_dir=hand"]
    assert command("train", "--recipe", "quickstart", *by_hand).returncode == 0
    assert figures(Path("s/trial-02")) == figures(Path("hand"))
    assert len(re.findall(r"trial-0[34] \(learning_rate=9e9, r=[48]\): (?:failed: NonFinite|diverged)", out)) == 2
    assert re.search("best: trial-0[12] ", out) and Path("s/compare.html").stat().st_size > 10_000
    best = Recipe.load("s/best.yaml")
    assert best.training["learning_rate"] == 4e-3 and "output_dir" not in best.training
    assert best.data == Recipe.load("quickstart", words).data
    assert command("train", "--recipe", "s/best.yaml", "--dry-run").returncode == 0
    status, _, err = run("training.learning_rate=4e-3,1e-3", *searched[1:])
    assert status == 2 and "holds a sweep of other settings" in err and "search.training.learning_rate: was" in err


@pytest.mark.slow
def test_base_is_measured_anew_where_settings_reach_it(run):
    status, out, err = run("orpo.beta=0.1,0.2", "training.learning_rate=2e-3,4e-3", *BRIEF, "--output", "s")
    assert status == 0, out + err
    assert len(list(Path("s").glob("base-*.json"))) == 2
    before = [json.loads(path.read_text("utf-8"))["eval"]["before"] for path in sorted(Path("s").glob("*/run.json"))]
    assert before[0] == before[1] != before[2] == before[3]
    assert before[0]["nll_loss"] == before[2]["nll_loss"] and before[0]["loss"] != before[2]["loss"]


@pytest.mark.slow
def test_stopped_it_goes_on(run):
    words = ["training.learning_rate=2e-3,4e-3", *BRIEF, "training.max_steps=40", "--output", "s"]

    def interrupt():
        metrics = Path("s/trial-02/metrics.jsonl")
        while not metrics.is_file() or b'"step": 5' not in metrics.read_bytes():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    status, out, err = run(*words)
    thread.join()
    assert status == 130 and "stopping trial-02" in err and "the same command goes on with them: trial-02" in out
    assert not Path("s/trial-02/run.json").exists() and list(Path("s/trial-02/checkpoints").glob("checkpoint-*"))
    status, out, err = run(*words)
    assert status == 0, out + err
    assert "resuming from" in Path("s/trial-02/train.log").read_text("utf-8")
    assert "resuming from" not in Path("s/trial-01/train.log").read_text("utf-8")
    by_hand = [word for word in words[:-2] if "learning_rate" not in word]
    assert command("train", "--recipe", "quickstart", "training.output_dir=hand", *by_hand).returncode == 0
    assert figures(Path("s/trial-02")) == figures(Path("hand"))


@pytest.mark.slow
def test_halving_trains_the_best_in_full(run):
    words = ["training.learning_rate=1e-4,1e-3,4e-3", *BRIEF, "training.max_steps=12", "--halving", "--output", "s"]
    status, out, err = run(*words)
    assert status == 0, out + err
    assert "rung 1: 3 trials, 33% of the recipe's steps" in out and "rung 2: 1 trial, 100%" in out
    assert [json.loads(p.read_text("utf-8"))["steps"] for p in sorted(Path("s").glob("rung-1/*/run.json"))] == [4, 4, 4]
    (last,) = Path("s/rung-2").iterdir()
    assert json.loads((last / "run.json").read_text("utf-8"))["steps"] == 12
    assert "best: " in out and Recipe.load("s/best.yaml").training["max_steps"] == 12


@pytest.mark.slow
def test_a_launcher_trains_a_trial_on_each_card(tmp_path):
    """Of three trials one diverges on the other process; both processes, and a sweep without a launcher, come to the same."""
    words = ["training.learning_rate=1e-3,4e-3,9e9", *BRIEF]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for name, launcher in (
        ("two", ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]),
        ("one", []),
    ):
        done = subprocess.run([sys.executable, "-m", *launcher, "orpo_lite", "sweep", "--recipe", "quickstart", *words, "--output", name],
                              cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)  # fmt: skip
        out = " ".join(done.stdout.split())
        assert done.returncode == 0, out + done.stderr
        assert ("3 trials of 3 combinations, 2 at a time" in out) == (name == "two")
        assert [
            out.count(f"trial-0{n} (learning_rate={rate}): ") for n, rate in enumerate(("1e-3", "4e-3", "9e9"), 1)
        ] == [1, 1, 1]
        assert out.count("best: ") == 1
    for trial in ("trial-01", "trial-02"):
        assert figures(tmp_path / "one" / trial) == figures(tmp_path / "two" / trial)
    assert (tmp_path / "one/best.yaml").read_text("utf-8") == (tmp_path / "two/best.yaml").read_text("utf-8")
    began = [
        json.loads((tmp_path / "two" / trial / "run.json").read_text("utf-8")) for trial in ("trial-01", "trial-02")
    ]
    assert all(run["processes"] == 1 for run in began)
