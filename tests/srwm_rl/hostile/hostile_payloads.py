"""Objects that would run code if they were unpickled, and leave a marker file. The tests only write them."""

import builtins
import importlib
import os
import pickle
import runpy
import socket
import subprocess
from collections.abc import Callable
from typing import Any

MODULE = "srwm_rl_canary"  # on the readers' Python path; leaves a marker file when imported
MARK = "MARK"  # the marker file's name, in the corpus folder


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
    """Return every payload in every protocol, alone and nested in the layout of a checkpoint."""
    contents = {}
    for name, payload in payloads(mark).items():
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            contents[f"{name}-{protocol}"] = pickle.dumps(payload, protocol)
        contents[f"{name}-inside"] = pickle.dumps({"model_state_dict": {"w": [payload]}, "flags": (payload,)}, 2)
    return contents
