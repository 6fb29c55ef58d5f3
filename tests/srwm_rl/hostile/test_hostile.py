"""A corpus of hostile files, given to everything that reads files: nothing runs, and each gets one clear line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
READERS = ("load", "eval", "resume", "import")
LEAST = 300
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux")


def start(script: str, *words: object, timeout: float = 280) -> str:
    command = [sys.executable, "-X", "faulthandler", str(FOLDER / script), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    start("hostile_corpus.py", folder)
    return folder


def read(corpus: Path, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(start("hostile_reader.py", corpus, *words).splitlines()[-1])
    return found


@needs_proc
def test_nothing_runs_and_each_hostile_file_gets_one_clear_line(corpus: Path) -> None:
    found = read(corpus)
    assert found["wrong"] == []
    n_files, n_runs = (len(list((corpus / part).iterdir())) for part in ("files", "runs"))
    assert n_files >= LEAST
    assert n_runs >= 100
    assert found["counts"].keys() == {*READERS, "resume a folder"}
    assert all(found["counts"][reader] >= n_files for reader in READERS)
    assert found["counts"]["resume a folder"] == n_runs


CAUGHT = {
    "pickle-system-4": "os.system",
    "pickle-eval-4": "pickle.find_class",
    "pickle-import-4": "it was run!",
    "pickle-popen-4": "subprocess.Popen",
    "pickle-open-4": "it was run!",
    "bomb-gzip": "took 5",  # hundred megabytes
    "noise": "Error",
    "empty-0": "took it",
}


@needs_proc
def test_a_careless_reader_is_caught(corpus: Path) -> None:
    wrong = read(corpus, "--careless", *CAUGHT)["wrong"]
    for name, part in CAUGHT.items():
        assert any(f"-{name}'" in each and part in each for each in wrong), (name, wrong)


@pytest.mark.slow
@pytest.mark.timeout(0)  # SRWM_RL_FUZZ_SECONDS may be hours; the fuzzer has its own end
def test_files_changed_at_random_are_taken_or_refused(tmp_path: Path) -> None:
    seconds = float(os.environ.get("SRWM_RL_FUZZ_SECONDS", "120"))
    seed = os.environ.get("SRWM_RL_FUZZ_SEED", "0")
    found = json.loads(start("hostile_fuzz.py", tmp_path, seconds, seed, timeout=seconds + 300).splitlines()[-1])
    assert found["faults"] == []
    ends = {
        f"give_{what}: {end}" for what in ("model", "official", "checkpoint", "config") for end in ("taken", "refused")
    }
    assert found["counts"].keys() >= ends, "what is always refused, or never, is not tested"
