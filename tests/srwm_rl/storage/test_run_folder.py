"""Run folders: what a path names, which files are the best models, and what is deleted."""

import os
import shutil
from pathlib import Path

import pytest

from srwm_rl import UserError
from srwm_rl.storage.run_folder import Run, model_files, run_folder, steps_of, title_of


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "logs" / "recall", {"train": {}})


def touch(run: Run, kind: str, *steps: int) -> None:
    for step in steps:
        run.file(kind, step).touch()


def names(files: list[Path]) -> list[str]:
    return [file.name for file in files]


def test_a_path_names_the_newest_model_the_best_or_a_file(run: Run) -> None:
    touch(run, "model", 100, 200, 300)
    touch(run, "best", 90, 150)
    assert [steps_of(file) for file in model_files(run.path)] == [300, 200, 100]
    best = model_files(run.path / "best")
    assert names(best) == ["best-000000000150.safetensors", "best-000000000090.safetensors"]
    assert model_files(best[1]) == [best[1]]
    assert run_folder(run.path / "best") == run_folder(run.path) == run.path
    assert title_of(run.path) == "recall_1"
    assert title_of(run.path / "best") == "recall_1-best"
    assert title_of(best[0]) == "best-000000000150"


def test_the_names_work_from_inside_the_run_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(run, "model", 100)
    touch(run, "best", 90)
    monkeypatch.chdir(run.path)
    assert names(model_files("best")) == ["best-000000000090.safetensors"]
    assert names(model_files(".")) == ["model-000000000100.safetensors"]
    assert (title_of("best"), title_of(".")) == ("recall_1-best", "recall_1")


def test_an_existing_path_named_best_is_preferred(tmp_path: Path, run: Run) -> None:
    touch(run, "best", 90)
    (run.path / "best").touch()
    assert model_files(run.path / "best") == [run.path / "best"]
    named_best = Run.create(tmp_path / "logs" / "x", {"train": {}})
    os.rename(named_best.path, tmp_path / "logs" / "best")
    touch(Run.open(tmp_path / "logs" / "best"), "model", 7)
    assert names(model_files(tmp_path / "logs" / "best")) == ["model-000000000007.safetensors"]


def test_a_run_without_a_best_model_is_refused_with_advice(run: Run, tmp_path: Path) -> None:
    touch(run, "model", 100)
    with pytest.raises(
        UserError, match=r"recall_1 has no best model yet: .*--eval-freq.*until then use .*recall_1, its"
    ):
        model_files(run.path / "best")
    with pytest.raises(UserError, match=r"there is no run at .*nowhere/best;"):
        model_files(tmp_path / "nowhere" / "best")


def test_the_best_models_are_not_swept_while_a_kept_checkpoint_may_name_them(run: Run) -> None:
    touch(run, "best", 1, 5, 12, 13)
    for kind in ("model", "checkpoint"):
        touch(run, kind, 10, 20, 30, 40)
    run.sweep()
    assert [[steps_of(file) for file in run.files(kind)] for kind in ("best", "model", "checkpoint")] == [
        [5, 12, 13],
        [20, 30, 40],
        [20, 30, 40],
    ]
    for steps in (50, 60, 70, 80):
        touch(run, "checkpoint", steps)
        run.sweep()
    assert steps_of(model_files(run.path / "best")[0]) == 13


def test_best_models_after_the_resumed_step_are_deleted(run: Run) -> None:
    touch(run, "best", 1, 5, 12)
    touch(run, "model", 12)
    run.forget_best(5)
    assert [steps_of(file) for file in run.files("best")] == [1, 5]
    run.forget_best(-1)
    assert run.files("best") == []
    assert len(run.files("model")) == 1


def test_a_locked_run_is_refused_and_its_lock_ends_with_the_block(run: Run) -> None:
    with run.lock():
        assert run.is_locked()
        assert (run.path / ".lock").read_text() == str(os.getpid())
        with pytest.raises(UserError, match=rf"recall_1 is being trained by process {os.getpid()}; stop that first"):
            Run.open(run.path).lock().__enter__()
    assert not run.is_locked()
    with Run.open(run.path).lock():
        pass


@pytest.mark.parametrize("lost", ["checkpoints", "config.json", ".lock", "."])
def test_a_run_whose_files_were_deleted_is_made_again_and_locked(lost: str, run: Run) -> None:
    path = run.path / lost
    with run.lock():
        assert not run.restore()
        lock = run._lock
        assert lock is not None
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert run.restore()
        assert lock.closed == (run._lock is not lock) == (lost in (".lock", "."))
        assert not run.restore()
        assert (Run.open(run.path).config, (run.path / "checkpoints").is_dir()) == (run.config, True)
        with pytest.raises(UserError, match="is being trained by process"):
            Run.open(run.path).lock().__enter__()


def test_a_moved_run_is_made_again_unless_another_one_has_its_place(run: Run, tmp_path: Path) -> None:
    with run.lock():
        run.path.rename(tmp_path / "moved")
        other = Run.create(tmp_path / "logs" / "recall", {"train": {"seed": 1}})
        assert other.path == run.path
        with pytest.raises(OSError, match="another run is in this folder now"):
            run.restore()
        assert Run.open(run.path).config == other.config
        shutil.rmtree(run.path)
        shutil.copytree(tmp_path / "moved", run.path)  # brought back, as a copy
        with Run.open(run.path).lock(), pytest.raises(OSError, match="is being trained by process"):
            run.restore()
        assert run.restore()
        assert run.is_locked()


def test_only_the_locked_folder_without_results_is_deleted(run: Run, tmp_path: Path) -> None:
    with run.lock():
        run.path.rename(tmp_path / "moved")
        other = Run.create(tmp_path / "logs" / "recall", {"train": {}})
        run.delete_if_empty()
        assert other.path.exists()
    with other.lock():
        (other.path / "metrics.jsonl").write_text('{"step": 1}\n')
        other.delete_if_empty()
        assert other.path.exists()
        (other.path / "metrics.jsonl").unlink()
        other.delete_if_empty()
        assert not other.path.exists()
