"""Things that would run something if they were unpickled; each would leave a mark. They are only ever written."""

import builtins
import importlib
import os
import pickle
import runpy
import socket
import subprocess
from collections.abc import Callable
from typing import Any

MODULE = "srwm_rl_canary"  # stands on Python's path of whoever reads the files, and leaves a mark when imported
MARK = "MARK"  # its file's name in the folder above


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def payloads(mark: str) -> dict[str, Call]:
    """Return objects whose unpickling would create the file `mark`, or import or connect."""
    code = f"open({mark!r}, 'w').close()"
    return {
        "system": Call(os.system, f"touch {mark}"),
        "exec": Call(builtins.exec, code),
        "eval": Call(builtins.eval, f"open({mark!r}, 'w')"),
        "popen": Call(subprocess.Popen, ["touch", mark]),
        "import": Call(importlib.import_module, MODULE),
        "runpy": Call(runpy.run_module, MODULE),
        "open": Call(builtins.open, mark, "w"),
        "connect": Call(socket.create_connection, ("127.0.0.1", 9)),
    }


def pickles(mark: str) -> dict[str, bytes]:
    """Return every payload in every protocol, alone and deep inside what looks like a checkpoint."""
    found = {}
    for name, payload in payloads(mark).items():
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            found[f"{name}-{protocol}"] = pickle.dumps(payload, protocol)
        found[f"{name}-inside"] = pickle.dumps({"model_state_dict": {"w": [payload]}, "flags": (payload,)}, 2)
    return found
