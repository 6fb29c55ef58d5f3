"""Ask pip-audit about every pinned package, and fail unless it answered for each of them: `audit.py PIP_AUDIT`.

Without its advisories pip-audit may audit nothing and report success.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lock import pinned  # the script's own folder is on Python's path


def faults(report: dict[str, Any], wanted: set[str]) -> list[str]:
    """Return what keeps an audit from being a success: a vulnerability each, and each package that was not audited."""
    answered = {each["name"].lower().replace("_", "-"): each for each in report.get("dependencies", [])}
    found = []
    for name in sorted(wanted):
        answer = answered.get(name.lower().replace("_", "-"))
        if answer is None or "vulns" not in answer:
            found.append(f"{name} was not audited: {(answer or {}).get('skip_reason', 'no answer')}")
        else:
            found += [f"{name} {answer['version']}: {each['id']}" for each in answer["vulns"]]
    return found if wanted else ["nothing was audited"]


def main() -> int:
    """Audit the versions for the Python that runs this; return the exit code."""
    wanted = {
        each.name: f"{each.name}{each.specifier}" for each in pinned(f"{sys.version_info[0]}.{sys.version_info[1]}")
    }
    with tempfile.TemporaryDirectory() as folder:
        pins, answer = Path(folder) / "pins.txt", Path(folder) / "answer.json"
        pins.write_text("\n".join(wanted.values()) + "\n")
        command = [sys.argv[1], "--strict", "--no-deps", "--disable-pip", "-r", pins, "--format", "json", "-o", answer]
        code = subprocess.run(command).returncode
        report = json.loads(answer.read_text()) if answer.exists() else {}
    found = faults(report, set(wanted))
    print("\n".join(found) if found else f"{len(wanted)} packages audited, no known vulnerability")
    return 1 if found or code else 0


if __name__ == "__main__":
    sys.exit(main())
