"""Every reader refuses a corpus of hostile files with one clear line each and runs nothing from them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
READERS = ("load", "eval", "resume", "import")
MIN_FILES = 300
TIMEOUT = 800  # seconds: two processes on a loaded machine need several of the suite's minutes
pytestmark = pytest.mark.timeout(TIMEOUT * 2)
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux")


def start(script: str, *arguments: object, timeout: float = TIMEOUT) -> str:
    command = [sys.executable, "-X", "faulthandler", str(FOLDER / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    start("hostile_corpus.py", folder)
    return folder


def read(corpus: Path, *arguments: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(start("hostile_reader.py", corpus, *arguments).splitlines()[-1])
    return report


@needs_proc
def test_hostile_files_run_nothing_and_get_one_line_of_error(corpus: Path) -> None:
    report = read(corpus)
    assert report["wrong"] == []
    n_files, n_runs = (len(list((corpus / part).iterdir())) for part in ("files", "runs"))
    assert n_files >= MIN_FILES
    assert n_runs >= 100
    assert report["counts"].keys() == {*READERS, "resume a folder"}
    assert all(report["counts"][reader] >= n_files for reader in READERS)
    assert report["counts"]["resume a folder"] == n_runs


DETECTED = {
    "pickle-system-4": "os.system",
    "pickle-eval-4": "pickle.find_class",
    "pickle-import-4": "it was run!",
    "pickle-popen-4": "subprocess.Popen",
    "pickle-open-4": "it was run!",
    "bomb-gzip": "MB for",
    "noise": "Error",
    "empty-0": "took it",
}


@needs_proc
def test_the_audit_detects_an_unsafe_reader(corpus: Path) -> None:
    wrong = read(corpus, "--unsafe", *DETECTED)["wrong"]
    for name, part in DETECTED.items():
        assert any(f"-{name}'" in fault and part in fault for fault in wrong), (name, wrong)


@pytest.mark.slow
@pytest.mark.timeout(0)  # SRWM_RL_FUZZ_SECONDS may be hours; the fuzzer stops by itself
def test_randomly_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    seconds = float(os.environ.get("SRWM_RL_FUZZ_SECONDS", "120"))
    seed = os.environ.get("SRWM_RL_FUZZ_SEED", "0")
    report = json.loads(start("hostile_fuzz.py", tmp_path, seconds, seed, timeout=seconds + 300).splitlines()[-1])
    assert report["faults"] == []
    ends = {
        f"read_{what}: {end}" for what in ("model", "official", "checkpoint", "config") for end in ("read", "refused")
    }
    assert report["counts"].keys() >= ends, "a reader that refuses all files or none is not tested"
