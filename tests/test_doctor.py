"""The doctor: every probe survives what it probes, says what to do, and nothing private leaves the machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
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
from orpo_lite.train import doctor_machine as machine
from orpo_lite.train.doctor import Probe, examine
from orpo_lite.train.doctor_machine import NOTE, OK, PROBLEM, Finding
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


def crashes():
    os.kill(os.getpid(), signal.SIGKILL)
    yield


def hangs():
    time.sleep(60)
    yield


def finds_a_problem():
    yield Finding("driver", PROBLEM, "too old", "update it")


def test_probes_that_raise_or_leave_are_findings_and_the_rest_goes_on(capfd):
    found = list(examine([Probe(f.__name__, f) for f in (raises, leaves, good)]))
    assert [(f.name, f.verdict) for f in found] == [
        ("raises", OK), ("raises", PROBLEM), ("leaves", PROBLEM), ("good", OK)
    ]  # fmt: skip
    assert "RuntimeError: no such thing" in found[1].text and "in raises" in found[1].facts["traceback"][-1]
    assert "SystemExit" in found[2].text
    assert all("--json" in finding.remedy for finding in found[1:3])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("probe", "words"), [(crashes, "Killed"), (hangs, "within 3 s")])
def test_a_probe_that_crashes_or_hangs_is_named_at_the_end(probe, words, capfd, monkeypatch):
    monkeypatch.setattr(doctor, "LIMIT", 3)
    found = list(examine([Probe(f.__name__, f) for f in (good, probe, good)]))
    assert [(f.name, f.verdict) for f in found] == [("good", OK), (probe.__name__, PROBLEM)]
    assert words in found[1].text and "left out" in found[1].text and "--json" in found[1].remedy
    assert capfd.readouterr() == ("", "")


def test_what_needs_a_broken_thing_is_not_looked_at_and_says_so():
    probes = [
        Probe("driver", finds_a_problem),
        Probe("second", crashes, needs=("good", "driver")),
        Probe("third", crashes, needs=("second",)),
        Probe("good", good),
    ]
    found = list(examine(probes))
    assert [finding.verdict for finding in found] == [PROBLEM, NOTE, NOTE, OK]
    assert "problem with driver" in found[1].text and "problem with second" in found[2].text


# ---- the command ---------------------------------------------------------------------------------------------------


def test_one_line_a_finding_and_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PROBES", [Probe("good", good)])
    monkeypatch.setattr(doctor, "SELF_TEST", Probe("driver", finds_a_problem))
    doctor.command(no_self_test=True)
    out = capsys.readouterr().out
    assert "ok       good: well\n" in out and "No problem, 0 note(s): nothing speaks against training here" in out
    with pytest.raises(typer.Exit) as left:
        doctor.command()
    assert left.value.exit_code == 1
    out = capsys.readouterr().out
    assert "problem  driver: too old -> update it\n" in out and "1 problem(s)" in out


def tells_secrets():
    text = f"{CANARY}, https://me:word@hub.example/z, {os.environ['MY_API_KEY']}, savedsecretvalue"
    yield Finding(f"secrets {CANARY}", NOTE, text, remedy=text, facts={"where": [text, {text: 1}]})


@pytest.mark.parametrize("as_json", [True, False])
def test_nothing_secret_is_printed(as_json, monkeypatch, capsys, tmp_path):
    (tmp_path / "stored_tokens").write_text("[mine]\nhf_token = savedsecretvalue\n")
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "stored_tokens"))
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("MY_API_KEY", 'sesame "open" sésame\\')
    monkeypatch.setattr(doctor, "PROBES", [Probe("secrets", tells_secrets)])
    doctor.command(as_json=as_json, no_self_test=True)
    out = capsys.readouterr().out
    assert not [word for word in (CANARY, "sesame", "open", "same", "me:word", "savedsecretvalue") if word in out], out
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
    assert {"python", "packages", "memory", "torch", "driver", "libraries", "precision", "attention"} <= checks.keys()
    assert [checks[name]["verdict"] for name in ("training", "layouts", "hub", "token")] == [OK] * 4, checks
    assert "HF_TOKEN" in checks["token"]["text"]
    assert all("authorization" not in headers.lower() for headers in http.seen) and http.seen
    everything = done.stdout + done.stderr + b"".join(p.read_bytes() for p in home.rglob("*") if p.name != "token" and p.is_file())  # fmt: skip
    for secret in (CANARY, CANARY[3:24]):
        assert secret.encode() not in everything
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "token"]
    assert not left, left


# ---- packages, memory, disk, hub ----------------------------------------------------------------------------------


def test_packages_missing_or_outside_their_range(monkeypatch):
    declared = ["torch>=2.8", "peft>=0.19", "gguf>=1; extra == 'export'"]
    versions = {"torch": "2.13.0+cu126", "peft": "0.21.2"}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    monkeypatch.setattr(metadata, "version", version)
    assert next(machine.packages()).verdict == OK
    versions["peft"] = "0.18.1"
    found = next(machine.packages())
    assert found.verdict == PROBLEM and "peft is 0.18.1" in found.text and "'peft>=0.19'" in found.remedy
    del versions["torch"]
    assert "torch is missing" in next(machine.packages()).text
    monkeypatch.setattr(metadata, "requires", not_installed)
    assert next(machine.packages()).verdict == NOTE


def test_a_library_that_does_not_import_is_named_with_the_package_behind_it(monkeypatch):
    def broken(name):
        if name == "transformers":
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(machine.importlib, "import_module", broken)
    found = list(machine.libraries())
    assert len(found) == 1 and found[0].verdict == PROBLEM
    assert "transformers cannot be imported" in found[0].text and "pip uninstall torchvision" in found[0].remedy


@pytest.mark.parametrize(("free", "verdict"), [(12e9, OK), (4e9, NOTE), (1e9, PROBLEM)])
def test_little_memory(free, verdict, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16e9, available=free))
    found = next(machine.memory())
    assert found.verdict == verdict and "of 16.0 GB" in found.text and bool(found.remedy) == (verdict != OK)


@pytest.mark.parametrize(("free", "verdicts"), [(50e9, [OK, OK]), (8e9, [OK, NOTE]), (0.4e9, [PROBLEM, PROBLEM])])
def test_low_disk(free, verdicts, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    found = list(machine.disk())
    assert [f.verdict for f in found] == verdicts
    assert all(bool(f.remedy) == (f.verdict != OK) and f"{free / 1e9:.1f} GB" in f.text for f in found)


def test_a_folder_that_cannot_be_written_to(monkeypatch):
    def refuse(**kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    found = list(machine.disk())
    assert [f.verdict for f in found] == [NOTE, NOTE] and "Read-only" in found[0].text
    assert "training.output_dir" in found[0].remedy and "HF_HOME" in found[1].remedy


@pytest.mark.parametrize(
    ("fields", "verdict", "words"),
    [
        ({}, OK, "answers"),
        ({"status": 404}, OK, "answers"),  # a mirror need not list models
        ({"status": 503}, NOTE, "status 503"),
        ({"status": 403}, NOTE, "status 403"),
        ({"kind": "text/html; charset=utf-8"}, NOTE, "web page"),
    ],
)
def test_a_hub_that_answers(fields, verdict, words, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with server(**fields) as (http, url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        found = next(machine.hub())
    assert (found.verdict, words in found.text) == (verdict, True), found
    assert url in found.text and http.seen and CANARY not in "".join(http.seen)


def test_a_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with server() as (_, url):
        pass
    monkeypatch.setattr(constants, "ENDPOINT", url)
    found = next(machine.hub())
    assert found.verdict == NOTE and "cannot be reached" in found.text and "network" in found.remedy


def test_a_hub_that_is_not_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = next(machine.hub())
    assert found.verdict == NOTE and "HF_HUB_OFFLINE" in found.text


def test_tokens_are_seen_and_not_shown(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert next(machine.token()).verdict == NOTE
    (tmp_path / "token").write_text(CANARY)
    found = [next(machine.token())]
    monkeypatch.setenv("HF_TOKEN", CANARY)
    found.append(next(machine.token()))
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
             "memory_reserved": lambda *_: 0, "get_arch_list": lambda: ["sm_75", "sm_86"]}  # fmt: skip
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(machine, "product_error", lambda _: None)


def test_a_t4(t4):
    found = machine.driver()
    assert found.verdict == OK and "580.82.07" in found.text
    found = next(machine.cards())
    assert found.verdict == OK and "Tesla T4, compute capability 7.5, 15.5 GB free of 15.8 GB" in found.text
    found = next(doctor.computing())
    assert found.verdict == OK and "float16 computing on a GPU of compute capability 7.5" in found.text


def test_a_card_that_others_use(t4, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (9_000_000_000, 15_800_000_000))
    found = next(machine.cards())
    assert found.verdict == NOTE and "6.8 GB are in use" in found.text and "nvidia-smi" in found.remedy


def test_a_card_that_this_torch_has_no_code_for(t4, monkeypatch):
    monkeypatch.setattr(machine, "product_error", lambda _: "RuntimeError: CUDA error: no kernel image is available")
    found = next(machine.cards())
    assert found.verdict == PROBLEM and "no kernel image" in found.text and "sm_75, sm_86" in found.remedy


def test_a_product_that_fails_or_is_wrong(monkeypatch):
    assert machine.product_error(torch.device("cpu")) is None
    assert machine.product_error(torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "sum", lambda self: self[0, 0])
    assert machine.product_error(torch.device("cpu")) == "its result is wrong"


def test_a_driver_that_is_too_old(smi, monkeypatch):
    smi("NVIDIA GeForce RTX 3060, 470.256.02")

    def unavailable():
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (version 11040)", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    found = machine.driver()
    assert found.verdict == PROBLEM and "version 11040" in found.text and "update the NVIDIA driver" in found.remedy
    assert "470.256.02" in found.text


def test_a_card_that_torch_was_not_built_for(smi, monkeypatch):
    smi("NVIDIA GeForce RTX 3060, 580.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = machine.driver()
    assert found.verdict == PROBLEM and "RTX 3060" in found.text and "CPU alone" in found.text


def test_a_driver_that_does_not_fit_its_kernel_module(smi, monkeypatch):
    smi("Failed to initialize NVML: Driver/library version mismatch", 18)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = machine.driver()
    assert found.verdict == PROBLEM and "version mismatch" in found.text and "restart" in found.remedy


def test_no_card_is_a_note(monkeypatch):
    monkeypatch.setattr(machine, "nvidia_smi", lambda: (None, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    found = machine.driver()
    assert found.verdict == NOTE and "on the CPU" in found.text and "Change runtime type" in found.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert "CUDA_VISIBLE_DEVICES hides" in machine.driver().text
    assert list(machine.cards()) == []


# ---- bitsandbytes and attention -----------------------------------------------------------------------------------


def test_bitsandbytes_that_works():
    [found] = doctor.quantizing()
    assert found.verdict == OK and found.facts["quantizing"] == pytest.approx(0.0926, abs=1e-3), found


def test_bitsandbytes_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    [found] = doctor.quantizing()
    assert found.verdict == PROBLEM and "does not work here" in found.text and "pip install" in found.remedy
    monkeypatch.setattr(sys, "platform", "darwin")
    assert next(doctor.quantizing()).verdict == NOTE


def scales(result):
    return result * 1.1


def zeros(result):
    return torch.zeros_like(result)


def nonsense(result):
    return result * torch.nan


@pytest.mark.parametrize("spoil", [scales, zeros, nonsense])
def test_bitsandbytes_that_quantizes_wrongly(spoil, monkeypatch):
    real = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda *a, **k: spoil(real(*a, **k)))
    found = next(doctor.quantizing())
    assert found.verdict == PROBLEM and "wrong" in found.text and "quantization=none" in found.remedy


def test_bitsandbytes_whose_layer_is_wrong(monkeypatch):
    real = bitsandbytes.nn.Linear4bit.forward
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", lambda self, x: scales(real(self, x)))
    found = next(doctor.quantizing())
    assert found.verdict == PROBLEM and "forward 10" in found.text


def test_kernels_that_work_are_listed(monkeypatch):
    _, found = doctor.computing()
    assert (
        found.verdict == OK and found.facts.keys() == set(doctor.FAST) and "fast kernels for packed pairs" in found.text
    )
    monkeypatch.setattr(doctor, "FAST", ("MATH", "FLASH_ATTENTION"))
    monkeypatch.setattr(doctor, "kernel_error", lambda kernel, *_: None if kernel == "MATH" else "not available")
    assert [*doctor.computing()][1].text.endswith(": math")


# ---- the self-test -------------------------------------------------------------------------------------------------


def first(monkeypatch, method, spoilt, steps=3):
    """The self-test's findings on a trainer with a method that goes wrong."""
    monkeypatch.setattr(doctor, "STEPS", steps)
    real = getattr(ORPOTrainer, method)
    monkeypatch.setattr(ORPOTrainer, method, lambda self, *a, **k: spoilt(self, real, *a, **k))
    return {finding.name: finding for finding in doctor.training()}


def test_self_test_finds_a_loss_that_is_not_finite(monkeypatch):
    found = first(monkeypatch, "compute_loss", lambda self, real, *a, **k: nonsense(real(self, *a, **k)))
    assert found["training"].verdict == PROBLEM and "not finite" in found["training"].text
    assert found["layouts"].verdict == PROBLEM  # nothing agrees with NaN


def test_self_test_finds_an_adapter_that_stays_and_layouts_that_differ(monkeypatch):
    def spoilt(self, real, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * 1.05 if self.layout.name == "packed" else loss * (not self.is_in_train)

    found = first(monkeypatch, "compute_loss", spoilt)
    assert found["training"].verdict == PROBLEM and "did not change" in found["training"].text
    assert found["layouts"].verdict == PROBLEM and "do not agree" in found["layouts"].text
    assert "layout=padded" in found["layouts"].remedy


def test_self_test_finds_a_base_that_changes_and_a_loss_that_does_not_fall(monkeypatch):
    def spoilt(self, real):
        real(self)
        norm = next(p for name, p in self.model.named_parameters() if "norm" in name)
        norm.data += 1

    found = first(monkeypatch, "train", spoilt, steps=2)
    assert found["training"].verdict == PROBLEM and "1 frozen tensor(s) changed" in found["training"].text
    monkeypatch.undo()

    def climbs(self, real, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return 2 * loss.detach() - loss

    found = first(monkeypatch, "compute_loss", climbs)
    assert found["training"].verdict == PROBLEM and "should have fallen" in found["training"].text
