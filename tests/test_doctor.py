"""The doctor: every probe survives what it probes, says what to do, and nothing private leaves the doctor."""

import json
import os
import re
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
import typer
from huggingface_hub import constants

from orpo_lite.train import doctor
from orpo_lite.train.doctor import NOTE, OK, PROBLEM, Finding, examine
from orpo_lite.trainer.trainer import ORPOTrainer

CANARY = "hf_" + "CanaryThatMustNotLeak" * 2


# ---- probes that go wrong ------------------------------------------------------------------------------------------


def good():
    print("library chatter")
    yield Finding("good", OK, "well")


def raises():
    yield Finding("raises", OK, "half of it")
    raise RuntimeError("no\nsuch   thing")


def leaves():
    sys.exit(3)
    yield


class Panic(BaseException):
    """As Rust's libraries raise it."""


def panics():
    print("library chatter", file=sys.stderr)
    raise Panic("at the disco")
    yield


def interrupted():
    raise KeyboardInterrupt
    yield


def test_an_interrupt_ends_the_examination():
    with pytest.raises(KeyboardInterrupt):
        list(examine([interrupted, good]))


def finds_a_problem():
    yield Finding("driver", PROBLEM, "too old", "update it")


def lacks_torch():
    yield Finding("torch", PROBLEM, "cannot be imported", "install it")


def test_probes_that_raise_or_leave_are_findings_and_the_rest_goes_on(capsys):
    found = list(examine([raises, leaves, panics, good]))
    assert [(f.name, f.verdict) for f in found] == [
        ("raises", OK), ("raises", PROBLEM), ("leaves", PROBLEM), ("panics", PROBLEM), ("good", OK)
    ]  # fmt: skip
    assert "RuntimeError: no such thing" in found[1].text and "in raises" in " ".join(found[1].facts["traceback"])
    assert "SystemExit" in found[2].text and "Panic: at the disco" in found[3].text
    assert all("--json" in finding.remedy for finding in found[1:4])
    assert capsys.readouterr() == ("", "")


def test_native_code_that_crashes_is_named_after_what_was_found_before():
    script = (
        "import ctypes\nfrom orpo_lite.train import doctor\n"
        "def good(): yield doctor.Finding('good', doctor.OK, 'well')\n"
        "def crashes(): yield ctypes.string_at(0)\n"
        "doctor.PROBES = [good, crashes]\ndoctor.command(no_self_test=True)"
    )
    own = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=own, capture_output=True, text=True)
    assert done.returncode != 0 and "ok       good: well" in done.stdout
    assert "in crashes" in done.stderr, done.stderr


def test_what_needs_a_broken_thing_is_not_looked_at_and_says_so():
    found = list(examine([finds_a_problem, lacks_torch, leaves, good]))
    assert [(f.name, f.verdict) for f in found] == [
        ("driver", PROBLEM), ("torch", PROBLEM), ("leaves", NOTE), ("good", NOTE)
    ]  # fmt: skip
    assert all("problem with torch" in finding.text for finding in found[2:])


# ---- the command ---------------------------------------------------------------------------------------------------


def test_one_line_a_finding_and_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PROBES", [good])
    monkeypatch.setattr(doctor, "training", finds_a_problem)
    doctor.command(no_self_test=True)
    out = capsys.readouterr().out
    assert "ok       good: well\n" in out and "0 notes: training should work here" in out
    with pytest.raises(typer.Exit) as left:
        doctor.command()
    assert left.value.exit_code == 1
    out = capsys.readouterr().out
    assert "problem  driver: too old -> update it\n" in out and "1 problem: fix" in out
    monkeypatch.setattr(doctor, "training", good)
    doctor.command()
    assert "0 notes: training works here" in capsys.readouterr().out


def tells_secrets():
    text = f"{CANARY}, https://me:word@hub.example/z, {os.environ['MY_API_KEY']}"
    yield Finding(f"secrets {CANARY}", NOTE, text, remedy=text, facts={"where": [text, {text: 1}]})


@pytest.mark.parametrize("as_json", [True, False])
def test_nothing_secret_is_printed(as_json, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("MY_API_KEY", 'sesame "open" sésame\\')
    monkeypatch.setattr(doctor, "PROBES", [tells_secrets])
    doctor.command(as_json=as_json, no_self_test=True)
    out = capsys.readouterr().out
    assert not [word for word in (CANARY, "sesame", "open", "same", "me:word") if word in out], out
    assert "hub.example/z" in out
    if as_json:
        assert json.loads(out)["verdict"] == NOTE


class Hub(BaseHTTPRequestHandler):
    status, kind = 200, "application/json"

    def do_GET(self):
        self.server.seen.append(str(self.headers))
        self.send_response(self.status)
        self.send_header("Content-Type", self.kind)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *args): ...


@contextmanager
def server(**fields):
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Hub,), fields)) as http:
        http.seen = []
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http, f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_whole_command_says_training_works_leaks_no_token_and_leaves_nothing(tmp_path):
    """The real thing in its own process: the self-test, a hub that answers, a token in the environment and in a file."""
    home = tmp_path / "home"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    (home / ".cache" / "huggingface" / "token").write_text(CANARY + "InTheFile")
    with server() as (http, url):
        own = {"HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": CANARY, "OMP_NUM_THREADS": "1",
               "PYTHONPATH": str(Path(__file__).parents[1])}  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))} | own
        done = subprocess.run(
            [sys.executable, "-m", "orpo_lite.doctor", "--json"], cwd=tmp_path, env=environment, capture_output=True
        )
    assert done.returncode == 0, (done.stdout, done.stderr)
    report = json.loads(done.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert {
        "python",
        "packages",
        "memory",
        "torch",
        "driver",
        "libraries",
        "precision",
        "bitsandbytes",
    } <= checks.keys()
    assert [checks[name]["verdict"] for name in ("training", "layout", "hub", "token")] == [OK] * 4, checks
    assert "HF_TOKEN" in checks["token"]["text"]
    assert "nf4, float32" in checks["training"]["text"] and "in 10 steps" in checks["training"]["text"]
    assert "checked exact" in checks["layout"]["text"]
    assert all("authorization" not in headers.lower() for headers in http.seen) and http.seen
    everything = done.stdout + done.stderr + b"".join(p.read_bytes() for p in home.rglob("*") if p.name != "token" and p.is_file())  # fmt: skip
    for secret in (CANARY, CANARY[3:24]):
        assert secret.encode() not in everything
    libraries_own = ("token", "fontlist-v")  # matplotlib, which draws the report, keeps a list of fonts
    left = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(libraries_own)]
    assert not left, left


# ---- packages, memory, hub ----------------------------------------------------------------------------------------


def test_a_missing_package(monkeypatch):
    def version(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return "2.13.0"

    assert list(doctor.packages())[1].verdict == OK
    monkeypatch.setattr(metadata, "version", version)
    found = list(doctor.packages())[1]
    assert found.verdict == PROBLEM and found.text == "missing: peft"


def test_a_library_that_does_not_import_is_named_with_the_package_behind_it(monkeypatch):
    def broken(name):
        if name == "transformers":
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = list(doctor.libraries())
    assert len(found) == 1 and found[0].verdict == PROBLEM
    assert "transformers cannot be imported" in found[0].text and "pip uninstall torchvision" in found[0].remedy


@pytest.mark.parametrize(("free", "verdict"), [(12e9, OK), (4e9, NOTE), (1e9, PROBLEM)])
def test_little_memory(free, verdict, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16e9, available=free))
    found = next(doctor.memory())
    assert found.verdict == verdict and "of 16.0 GB" in found.text and bool(found.remedy) == (verdict != OK)


@pytest.mark.parametrize(
    ("fields", "verdict", "words"),
    [
        ({}, OK, "answers"),
        ({"status": 404}, OK, "answers"),  # a mirror need not list models
        ({"status": 503}, NOTE, "status 503"),
        ({"status": 403}, NOTE, "status 403"),
    ],
)
def test_a_hub_that_answers(fields, verdict, words, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with server(**fields) as (http, url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        found = next(doctor.hub())
    assert (found.verdict, words in found.text) == (verdict, True), found
    assert url in found.text and http.seen and CANARY not in "".join(http.seen)


def test_a_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with server() as (_, url):
        pass
    monkeypatch.setattr(constants, "ENDPOINT", url)
    found = next(doctor.hub())
    assert found.verdict == NOTE and "cannot be reached" in found.text and "network" in found.remedy


def test_a_hub_that_is_not_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = next(doctor.hub())
    assert found.verdict == NOTE and "HF_HUB_OFFLINE" in found.text


def test_tokens_are_seen_and_not_shown(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert list(doctor.hub())[1].verdict == NOTE
    (tmp_path / "token").write_text(CANARY)
    found = [list(doctor.hub())[1]]
    monkeypatch.setenv("HF_TOKEN", CANARY)
    found.append(list(doctor.hub())[1])
    assert "saved" in found[0].text and "HF_TOKEN" in found[1].text
    assert all(f.verdict == OK and CANARY[3:12] not in repr(f) and str(len(CANARY)) not in repr(f) for f in found)


# ---- cards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """smi(text, status): a driver whose nvidia-smi says that."""

    def install(text, status=0):
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


@pytest.fixture
def t4(monkeypatch, smi):
    """A machine with a T4, as far as torch's questions about it go."""
    smi("Tesla T4, 580.82.07")
    facts = {"is_available": lambda: True, "device_count": lambda: 1, "get_device_capability": lambda *_: (7, 5),
             "get_device_name": lambda *_: "Tesla T4", "mem_get_info": lambda *_: (15_500_000_000, 15_800_000_000),
             "get_arch_list": lambda: ["sm_75", "sm_86"]}  # fmt: skip
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, value)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))


def test_a_t4(t4):
    found = list(doctor.driver())[1]
    assert found.verdict == OK and "580.82.07" in found.text
    found = next(doctor.card())
    assert found.verdict == OK and "Tesla T4, compute capability 7.5, 15.5 GB free of 15.8 GB" in found.text
    found = next(doctor.precision())
    assert found.verdict == OK and "float16 computing on a GPU of compute capability 7.5" in found.text


def test_a_card_that_this_torch_has_no_code_for(t4, monkeypatch):
    def refuse(*shape, device):
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(torch, "ones", refuse)
    found = next(doctor.card())
    assert found.verdict == PROBLEM and "no kernel image" in found.text and "sm_75, sm_86" in found.remedy


def test_a_driver_that_is_too_old(smi, monkeypatch):
    smi("NVIDIA GeForce RTX 3060, 470.256.02")

    def unavailable():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (version 11040)", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    found = list(doctor.driver())[1]
    assert found.verdict == PROBLEM and "version 11040" in found.text and "update the NVIDIA driver" in found.remedy
    assert "470.256.02" in found.text


def test_a_card_that_torch_was_not_built_for(smi, monkeypatch):
    smi("NVIDIA GeForce RTX 3060, 580.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = list(doctor.driver())[1]
    assert found.verdict == PROBLEM and "RTX 3060" in found.text and "CPU alone" in found.text


def test_a_driver_that_does_not_fit_its_kernel_module(smi, monkeypatch):
    smi("Failed to initialize NVML: Driver/library version mismatch", 18)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = list(doctor.driver())[1]
    assert found.verdict == PROBLEM and "version mismatch" in found.text and "CPU alone" in found.text
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert "restart" in list(doctor.driver())[1].remedy


def test_no_card_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_smi", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    found = list(doctor.driver())[1]
    assert found.verdict == NOTE and "on the CPU" in found.text and "Change runtime type" in found.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert "CUDA_VISIBLE_DEVICES hides" in list(doctor.driver())[1].text
    assert list(doctor.card()) == []


# ---- bitsandbytes and the self-test -----------------------------------------------------------------------------


def test_bitsandbytes_that_can_and_cannot_be_imported(monkeypatch):
    found = list(doctor.precision())
    assert [(f.name, f.verdict) for f in found][:2] == [("precision", OK), ("bitsandbytes", OK)], found
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    found = list(doctor.precision())[1]
    assert found.verdict == PROBLEM and "does not work here" in found.text and "pip install" in found.remedy
    monkeypatch.setattr(sys, "platform", "darwin")
    assert list(doctor.precision())[1].verdict == NOTE


def self_test(monkeypatch, method, spoilt, kind=ORPOTrainer):
    """The self-test's findings where a method goes wrong."""
    real = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda self, *a, **k: spoilt(self, real, *a, **k))
    return {finding.name: finding for finding in examine([doctor.training])}


def test_self_test_finds_a_loss_that_is_not_finite(monkeypatch):
    found = self_test(monkeypatch, "compute_loss", lambda self, real, *a, **k: real(self, *a, **k) * torch.nan)
    assert found["training"].verdict == PROBLEM and "the loss is nan" in found["training"].text


def test_self_test_finds_an_adapter_that_stays(monkeypatch):
    found = self_test(monkeypatch, "compute_loss", lambda self, real, *a, **k: real(self, *a, **k) * 0)
    assert found["training"].verdict == PROBLEM and "gradient is exactly 0" in found["training"].text


def test_self_test_finds_a_loss_that_does_not_fall(monkeypatch):
    def climbs(self, real, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return 2 * loss.detach() - loss

    found = self_test(monkeypatch, "compute_loss", climbs)
    assert found["training"].verdict == PROBLEM and "should have fallen" in found["training"].text


@pytest.mark.parametrize(("factor", "words"), [(0, "should have fallen|gradient is exactly 0"), (torch.nan, "is nan")])
def test_self_test_finds_bitsandbytes_layers_that_give_zeros_or_nonsense(factor, words, monkeypatch):
    found = self_test(monkeypatch, "forward", lambda self, real, x: real(self, x) * factor, bitsandbytes.nn.Linear4bit)
    assert found["training"].verdict == PROBLEM and re.search(words, found["training"].text), found


def test_self_test_reports_a_layout_that_is_not_exact(monkeypatch):
    monkeypatch.setattr("orpo_lite.objective.layout.inexactness", lambda *_: "it differs by 0.1")
    found = {finding.name: finding for finding in examine([doctor.training])}
    assert found["training"].verdict == OK and found["layout"].verdict == NOTE
    assert "padded: it differs by 0.1" in found["layout"].text and "slower" in found["layout"].remedy
