"""`srwm-rl doctor`: no problem here, and a fix for each problem."""

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from srwm_rl.scripts.commands import doctor


def lines(out: str) -> dict[str, str]:
    return {line[6:].split()[0]: line for line in out.splitlines() if line[:4] in ("ok  ", "FIX ", "note")}


def test_all_is_well_here(call: Any) -> None:
    result = call("doctor")
    assert result.code == 0, result.out
    assert result.out.endswith("all is well\n")
    findings = lines(result.out)
    assert {"python", "torch", "stable-baselines3", "srwm_scan", "gpu", "folder"} <= findings.keys()
    assert version("torch") in findings["torch"]
    assert "FIX" not in result.out


def test_an_unmet_requirement_is_named_with_its_fix(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "tyro" else version(name))
    result = call("doctor")
    assert result.code == 1
    assert lines(result.out)["tyro"].startswith("FIX ")
    assert f"{sys.executable} -m pip install 'tyro" in lines(result.out)["tyro"]
    assert "1 problem(s) to fix" in result.out


def test_a_missing_package_is_named_with_its_fix(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        if name in ("scipy", "procgen", "procgen-mirror"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", missing)
    result = call("doctor")
    findings = lines(result.out)
    assert result.code == 1
    assert "missing" in findings["scipy"]
    assert "pip install 'scipy" in findings["scipy"]
    procgen = next(
        (line for name, line in findings.items() if name.startswith("procgen-") or name == "procgen"), "note"
    )
    assert procgen.startswith("note")  # an extra: nothing is broken without it


def test_a_check_that_breaks_is_a_finding(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Result:
        raise OSError("no such library")

    monkeypatch.setitem(doctor.CHECKS, "srwm_scan", broken)
    result = call("doctor")
    assert result.code == 1
    assert lines(result.out)["srwm_scan"].startswith("FIX ")
    assert "no such library" in lines(result.out)["srwm_scan"]


def test_unknown_option(call: Any) -> None:
    assert "did you mean '--verbose'" in call("doctor", "--verbos").error()
