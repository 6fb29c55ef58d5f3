"""`srwm-rl doctor`: no problem here, and a fix for each problem."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from srwm_rl.envs.procgen import simulator
from srwm_rl.envs.procgen.simulator import find_distribution
from srwm_rl.scripts.commands import doctor


def lines(out: str) -> dict[str, str]:
    return {line[6:].split()[0]: line for line in out.splitlines() if line[:4] in ("ok  ", "FIX ", "note")}


def test_all_is_well_here(call: Any) -> None:
    result = call("doctor")
    assert result.code == 0, result.out
    assert result.out.endswith("all is well\n")
    findings = lines(result.out)
    assert {"python", "torch", "stable-baselines3", "srwm_scan", "training", "gpu", "folder"} <= findings.keys()
    assert re.search(r"128 steps of PPO in \d+\.\d\d s, (\d+) of \1 weights moved", findings["training"])
    if (distribution := find_distribution()) is not None:
        assert findings[distribution.name].startswith("ok")
        assert f"coinrun of {distribution} gives frames" in findings["procgen"]
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
        if name == "scipy":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", missing)
    result = call("doctor")
    finding = lines(result.out)["scipy"]
    assert result.code == 1
    assert finding.startswith("FIX ")
    assert "missing" in finding
    assert "pip install 'scipy" in finding


def test_nothing_is_broken_without_procgen_where_it_has_no_wheels(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [text for text in doctor.requires("srwm-rl") or () if not text.startswith("procgen")]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    monkeypatch.setattr(simulator, "find_spec", lambda name: None)
    result = call("doctor")
    assert result.code == 0
    assert "ProcGen is not installed" in lines(result.out)["procgen"]
    assert lines(result.out)["procgen"].startswith("note")


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
