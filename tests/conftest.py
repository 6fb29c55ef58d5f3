"""Settings of every test process, made before torch is loaded; which tests are heavy; no GPU tests without a GPU."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

# torch's OpenMP threads spin while they wait; beside another busy process that costs ten times the work itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# SB3 makes a folder of its own in the temporary folder for every model that logs nowhere: thousands in one run.
os.environ.setdefault("SB3_LOGDIR", str(Path(tempfile.gettempdir()) / "srwm-rl-tests-sb3"))
# A shell's background job ignores Ctrl-C, and so would the processes that are tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# Tests that `make test` leaves to `make test-all`, by file: simulated CUDA, torchrun, kills and signals, fuzzing,
# learning. None: every test of the file. tests/test_architecture.py checks that the names exist.
HEAVY: dict[str, tuple[str, ...] | None] = {
    "agents/test_impala.py": ("test_a_small_memory_task_is_learned",),
    "agents/test_ppo.py": (
        "test_a_procgen_rollout_of_64_environments_and_256_steps_fits_in_2_gib",
        "test_a_small_memory_task_is_learned_by_the_srwm_and_not_without_memory",
    ),
    "scripts/commands/test_bench.py": ("test_train_on_frames_against_sb3_contrib",),
    "scripts/commands/test_fewshot.py": ("test_stopped_and_resumed_is_as_if_never_stopped",),
    "scripts/commands/test_few_shot_eval.py": ("test_a_group_of_seeds_has_means_over_runs",),
    "scripts/commands/test_train.py": (
        "test_an_interrupted_extension_resumes_without_flags",
        "test_an_overlapped_run_warns_that_it_is_not_exact",
        "test_interrupted_and_resumed_is_as_if_never_interrupted",
        "test_killed_and_resumed_is_as_if_never_killed",
    ),
    "scripts/seeds/test_train.py": (
        "test_a_failed_seed_does_not_stop_the_others",
        "test_a_group_of_which_every_seed_fails_keeps_their_output",
        "test_a_stopped_group_is_saved_and_resumes_as_if_it_had_not_been",
    ),
    "scripts/test_own_code.py": ("test_a_group_resumes_with_its_code",),
    "scripts/test_third_party.py": ("test_train_resume_eval_watch_and_report",),
    "scripts/training/test_checkpoints.py": (
        "test_a_disk_that_is_full_for_a_while",
        "test_a_disk_that_is_full_to_the_end",
        "test_a_disk_with_too_little_room_is_noticed_before_the_first_step",
    ),
    "scripts/training/test_clusters.py": (
        "test_a_lost_machine_ends_the_job_and_the_run_is_saved",
        "test_the_slurm_script_trains_on_two_machines_and_resumes_when_requeued",
    ),
    "scripts/training/test_launch.py": (
        "test_a_killed_process_ends_the_others_and_the_run_is_saved",
        "test_a_run_of_one_process_resumes_in_two",
        "test_an_error_is_printed_once",
        "test_stopped_in_two_processes_and_resumed_in_one",
        "test_two_processes_write_one_run_and_resume_it_exactly",
    ),
    "scripts/training/test_monitoring.py": None,
    "scripts/training/test_supervise.py": None,
    "simulated_cuda/test_simulated_cuda.py": None,
    "test_notebooks.py": ("test_few_shot", "test_hidden_controls"),
    "srwm_rl/hostile/test_hostile.py": None,
    "srwm_rl/official/test_torch_zip.py": ("test_damaged_files_are_imported_or_refused_and_run_nothing",),
    "srwm_rl/ops/test_triton.py": ("test_random_cases",),
    "srwm_rl/ops/test_triton_delta.py": ("test_random_cases",),
    "srwm_rl/ops/test_triton_table.py": ("test_kernels_of_the_default_head_size",),
}


def pytest_configure(config: pytest.Config) -> None:
    # "auto" means the CPU on every machine, except where a GPU is asked for.
    if "gpu" not in config.getoption("markexpr").replace("not gpu", "") and "torch" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers take all cores already
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = HEAVY.get(item.path.relative_to(ROOT).as_posix() if item.path.is_relative_to(ROOT) else "", ())
        if names is None or getattr(item, "originalname", item.name) in names:
            item.add_marker("heavy")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skip, where ProcGen has no wheels (docs/procgen.md), the tests that fail because it is missing."""
    report = yield
    if report.failed and "ProcGen has no wheels for this Python and platform" in report.longreprtext:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, "Skipped: ProcGen has no wheels for this Python")
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture
def _stop_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process and those that it starts, also where the tests run under nohup."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Return a function that opens a page in headless Chromium."""
    browser = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("there is no Chromium on this machine to open pages with")

    def run(page: Path, *options: str, query: str = "") -> "subprocess.CompletedProcess[str]":
        profile = tmp_path / "profile"
        shutil.rmtree(profile, ignore_errors=True)
        command = [str(browser), *QUIET, f"--user-data-dir={profile}", *options, page.resolve().as_uri() + query]
        result: Any = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        return result

    return run
