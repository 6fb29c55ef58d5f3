"""Write the corpus of hostile files: `hostile_corpus.py FOLDER`; the same files every time.

FOLDER/files/<number>-<name>     a file (or a link, a pipe, a folder) for every reader
FOLDER/runs/<number>-<name>/     a faulty run folder for train --resume
FOLDER/good/                     the intact originals
FOLDER/canary/                   a module that writes the marker file when it is imported
"""

import gzip
import io
import itertools
import json
import os
import shutil
import struct
import sys
import tarfile
import zipfile
from base64 import b64encode
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import official_checkpoints  # the script's own folder is on Python's path
import torch
from hostile_payloads import MARK, MODULE, payloads, pickles

from srwm_rl.scripts.main import main as command
from srwm_rl.storage.run_folder import Run
from srwm_rl.storage.safe_file import pack, read_file, serialise, unpack

Files = Iterator[tuple[str, "bytes | Callable[[Path], object]"]]
TRAIN = "train --env recall --levels 0:12 --eval-levels 100:108 --n-envs 4 --n-steps 16 --batch-size 32 --lr-decay none"
TRAIN += " --n-threads 1 --no-progress --core-kwargs hidden_size:8 n_layers:1 --n-epochs 1 -n 64 --verbose 0"
HUGE = 10**9


class Good:
    """Intact files: a model, a run's checkpoint and settings, an official checkpoint."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        assert command([*TRAIN.split(), "-f", str(folder / "logs")]) == 0
        self.run = Path(shutil.move(folder / "logs" / "ppo_srwm" / "recall_1", folder / "run"))
        run = Run.open(self.run)
        self.model, self.checkpoint = (
            shutil.copy(run.files(kind)[-1], folder / kind) for kind in ("model", "checkpoint")
        )
        self.official = official_checkpoints.make_checkpoint(folder / "official.tar")
        self.config = json.loads((self.run / "config.json").read_text())


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> bytes:
    """Return one of our files changed, with a valid sha256."""
    arrays, meta = (deepcopy(each) for each in read_file(path))
    change(arrays, meta)
    return serialise(arrays, meta)


def raw(header: Any, data: bytes = b"") -> bytes:
    """Return a safetensors file with the given header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def zipped(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip archive."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return whole.getvalue()


def saved(content: Any, **how: Any) -> bytes:
    """Return the bytes of torch.save."""
    whole = io.BytesIO()
    torch.save(content, whole, **how)
    return whole.getvalue()


def foreign_files(good: Good, mark: str) -> Files:
    """Yield pickles and foreign files."""
    for name, data in pickles(mark).items():
        yield f"pickle-{name}", data
    for n in (0, 1, 7, 8, 9, 100):
        yield f"empty-{n}", b"\0" * n
    yield "noise", np.random.default_rng(0).bytes(5000)
    yield "png", b"\x89PNG\r\n\x1a\n" + b"\0" * 100
    yield "elf", b"\x7fELF" + b"\2" * 100
    yield "script.py", f"open({mark!r}, 'w')".encode()
    yield "script.sh", f"#!/bin/sh\ntouch {mark}\n".encode()
    yield "html", b"<script>alert(1)</script>"
    yield "model.gz", gzip.compress(good.model.read_bytes(), mtime=0)
    whole = io.BytesIO()
    np.savez(whole, a=np.array([payloads(mark)["system"]], dtype=object))
    yield "objects.npz", whole.getvalue()
    whole = io.BytesIO()
    np.save(whole, np.array([payloads(mark)["system"]], dtype=object), allow_pickle=True)
    yield "objects.npy", whole.getvalue()
    yield "model.json", json.dumps({"core": "os:system"}).encode()
    yield "names\nand\x1b[2Jcodes", b"x"


def archives(good: Good, mark: str) -> Files:
    """Yield zips such as SB3's, torch's files and tars, with payloads in every member."""
    calls = payloads(mark)
    members = ("policy.pth", "policy.optimizer.pth", "pytorch_variables.pth", "_stable_baselines3_version", "data")
    plain = {name: b"{}" if name == "data" else b"2.9.2" for name in (*members, "system_info.txt")}
    for name, member in itertools.product(("system", "exec", "import"), members):
        code = {":type:": "x", ":serialized:": b64encode(pickles(mark)[f"{name}-4"]).decode()}
        data = json.dumps({"policy_class": code, "lr_schedule": code, "unknown": code}).encode()
        yield f"sb3-{name}-{member}.zip", zipped({**plain, member: data if member == "data" else saved(calls[name])})
    weights = torch.load(good.official, weights_only=False)
    for name, call in calls.items():
        yield f"torch-{name}.pt", saved(call)
        yield f"torch-old-{name}.pt", saved(call, _use_new_zipfile_serialization=False)
        yield f"torch-weights-{name}.tar", saved({**weights, "model_state_dict": {"w": call}})
        yield f"torch-key-{name}.tar", saved({"model_state_dict": call})
        yield f"torch-unread-{name}.tar", saved({**weights, "scheduler_state_dict": call})
    for name in ("../../outside", "/tmp/outside", "a/../../outside", "..\\outside", "archive/data.pkl/../x"):
        yield f"zip-name-{len(name)}.zip", zipped({name: b"x", "archive/data.pkl": b"N."})
        whole = io.BytesIO()
        with tarfile.open(fileobj=whole, mode="w") as archive:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        yield f"tar-name-{len(name)}.tar", whole.getvalue()
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        link = tarfile.TarInfo("model.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    yield "tar-link.tar", whole.getvalue()
    for name, data in torch_pickles().items():
        yield f"torch-bomb-{name}.tar", zipped({"a/data.pkl": data, "a/byteorder": b"little", "a/data/0": b"\0" * 12})


def torch_pickles() -> dict[str, bytes]:
    """Return short pickles on which `torch.load(weights_only=True)` needs gigabytes or does not end."""
    gigabytes = b"\x8a\x05" + (2**33).to_bytes(5, "little")
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x03tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00%b\x85K%b\x85\x89}tR"
    key = b"\x80\x02}X\x10\x00\x00\x00model_state_dict}X\x01\x00\x00\x00w"
    shared = b")" + b"q\x00h\x00\x86" * 200  # a pair of a pair of ...: 2**200 leaves to hash
    return {
        "bytearray": key + b"cbuiltins\nbytearray\n" + gigabytes + b"\x85Rss.",
        "tensor": key + b"ctorch\nTensor\n" + gigabytes + b"\x85Rss.",
        "numpy": key + b"cnumpy\nzeros\n" + gigabytes + b"\x85Rss.",
        "stride": key + rebuilt % (gigabytes, b"\x00") + b"ss.",
        "size": key + rebuilt % (gigabytes, b"\x01") + b"ss.",
        "hash": b"\x80\x02}" + shared + b"Ns.",
        "deep": b"\x80\x02)" + b"\x85" * 10**6 + b".",
    }


def bombs(good: Good, mark: str) -> Files:
    """Yield small files that would be large in memory."""
    much = b"\0" * 2**27
    for name in ("archive/data.pkl", "data", "archive/data/0"):
        content = {"archive/version": b"3", "archive/data.pkl": b"N.", name: much}
        yield f"bomb-{name.replace('/', '-')}.zip", zipped(content, zipfile.ZIP_DEFLATED)
    yield "bomb-members.zip", zipped({f"archive/{i}": b"" for i in range(20_000)})
    yield "bomb-nested.zip", zipped({"a.zip": zipped({"data": much}, zipfile.ZIP_DEFLATED)}, zipfile.ZIP_DEFLATED)
    yield "bomb-gzip", gzip.compress(much, mtime=0)
    texts = {
        "deep-lists": b"[" * 100_000 + b"]" * 100_000,
        "deep-dicts": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "deep-little": b"[" * 300 + b"]" * 300,
        "wide": b"[" + b"[]," * 3_000_000 + b"[]]",
        "digits": b"1" * 1_000_000,
        "nan": b'{"a": NaN}',
        "infinity": b'{"a": [1e999, -Infinity]}',
        "twice": b'{"a": 1, "a": 2}',
        "text": b'"' + b"x" * 12_000_000 + b'"',
        "surrogate": b'{"a": "\\ud800"}',
        "bytes": b"\xff\xfe",
    }
    for name, text in texts.items():
        yield f"json-header-{name}", raw(text)
        inner = text.decode("latin-1")
        yield f"json-meta-{name}", raw({"__metadata__": {"srwm_rl": inner}})
        meta = f'{{"meta": {{"policy": {inner}}}, "sha256": "0"}}'
        yield f"json-policy-{name}", raw({"__metadata__": {"srwm_rl": meta}})


def headers(good: Good, mark: str) -> Files:
    """Yield invalid safetensors headers."""
    for size in (0, 1, 2**24 + 1, 10**8, 2**32, 2**63 - 1, 2**63, 2**64 - 1):
        yield f"header-size-{size}", struct.pack("<Q", size) + b"{}" + b" " * 100
    yield "header-large", raw(b"{}" + b" " * (2**24 + 1))
    yield (
        "header-100000-arrays",
        raw({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**5)}),
    )
    blob = good.model.read_bytes()
    size = int.from_bytes(blob[:8], "little")
    header, data = json.loads(blob[8 : 8 + size]), blob[8 + size :]
    name = "value_net.weight"
    entries: dict[str, Any] = {
        "overlap": {"data_offsets": [0, 32]},
        "reversed": {"data_offsets": [32, 0]},
        "negative": {"data_offsets": [-32, 0]},
        "beyond": {"data_offsets": [2**62, 2**63]},
        "float": {"data_offsets": [0.0, 32.0]},
        "overflow": {"shape": [2**32, 2**32]},
        "overflow-to-fit": {"shape": [2**61, 2, 8]},
        "negative-shape": {"shape": [-1, -8]},
        "text-shape": {"shape": "8"},
        "axes": {"shape": [1] * 10_000},
        "bf16": {"dtype": "BF16"},
        "f8": {"dtype": "F8_E4M3"},
        "f4": {"dtype": "F4"},
        "object": {"dtype": "O"},
        "list": {"dtype": ["F32"]},
        "no-shape": {"shape": None},
    }
    for kind, entry in entries.items():
        yield f"header-{kind}", raw({**header, name: {**header[name], **entry}}, data)
    ours = header["__metadata__"]["srwm_rl"]
    for kind, metadata in {
        "none": None,
        "list": [],
        "number": {"srwm_rl": 1},
        "two": {"srwm_rl": ours, "x": "y"},
    }.items():
        yield f"header-metadata-{kind}", raw({**header, "__metadata__": metadata}, data)
    yield "header-other", raw({**header, "__metadata__": {"format": "pt"}}, data)
    yield "header-surplus-bytes", blob + b"\0"
    yield "header-list", raw([header], data)
    yield "header-canonical", raw({**header, "__metadata__": {"srwm_rl": " " + ours}}, data)
    yield "header-entry-list", raw({**header, name: []}, data)


def damage(good: Good, mark: str) -> Files:
    """Yield files cut off at many places, or with bytes changed."""
    for kind, path in {"model": good.model, "checkpoint": good.checkpoint, "official": good.official}.items():
        blob = path.read_bytes()
        for i in range(40):
            yield f"cut-{kind}-{i}", blob[: (len(blob) - 1) * i // 39]
        for i in range(6):
            middle = len(blob) * (2 * i + 1) // 12
            yield f"zeroed-{kind}-{i}", blob[:middle] + b"\xa5" * 16 + blob[middle + 16 :]


def weights(good: Good, mark: str) -> Files:
    """Yield models of wrong shapes, types and numbers."""
    arrays, _ = read_file(good.model)
    for name in [each for each in arrays if not each.startswith("/")][:12]:
        shape, new = arrays[name].shape, {}
        new["doubled"] = np.zeros((2 * shape[0], *shape[1:]), np.float32)
        new["flat"] = arrays[name].reshape(1, -1)
        new["empty"] = np.zeros((0, *shape[1:]), np.float32)
        new |= {kind: arrays[name].astype(kind) for kind in ("float64", "float16", "int64", "bool")}
        for kind, array in new.items():
            if (array.shape, array.dtype) == (shape, np.float32):
                continue
            yield f"weight-{name}-{kind}", changed(good.model, lambda a, m, n=name, x=array: a.update({n: x}))
        for value in (np.nan, np.inf, -np.inf):
            non_finite = arrays[name].copy()
            non_finite.flat[-1] = value
            yield f"weight-{name}-{value}", changed(good.model, lambda a, m, n=name, x=non_finite: a.update({n: x}))
    yield "weight-none", changed(good.model, lambda a, m: a.clear())
    yield "weight-lacks", changed(good.model, lambda a, m: a.pop("value_net.bias"))
    for name in ("surplus", "../../outside", "/etc/passwd", "__class__", "", "\0", "x" * 5000, "\x1b[2J"):
        yield (
            f"weight-named-{len(name)}",
            changed(good.model, lambda a, m, n=name: a.update({n: np.zeros(1, np.float32)})),
        )


def records(good: Good, mark: str) -> Files:
    """Yield models with an invalid record of levels played or an invalid score."""
    folder = "/levels_played/games/recall"
    bits, others = np.zeros(2, np.uint8), np.zeros(0, np.int64)
    new: dict[str, list[np.ndarray]] = {
        "map": [
            bits[:1],
            np.full(2, 255, np.uint8),
            bits,
            bits[None],
            bits.astype(np.float32),
            np.zeros(10**6, np.uint8),
        ],
        "others": [
            np.array([-1]),
            np.array([3]),
            np.array([70, 70]),
            np.array([2**31]),
            np.array([2**62]),
            others[None],
        ],
    }
    new["others"] += [np.array([1.5]), np.array([99], np.int32), np.arange(100, 100 + 2**17)]
    for name, arrays in new.items():
        for i, array in enumerate(arrays):
            yield (
                f"levels-{name}-{i}",
                changed(good.model, lambda a, m, n=name, x=array: a.update({f"{folder}/{n}": x})),
            )
        yield f"levels-{name}-lacks", changed(good.model, lambda a, m, n=name: a.pop(f"{folder}/{n}"))
    yield "levels-surplus", changed(good.model, lambda a, m: a.update({f"{folder}/more": others}))
    yield "levels-without", changed(good.model, _set("levels_played", ...))
    cases = [(f"levels_played/{name}", value) for name in ("start", "stop", "games", "surplus") for value in ODD]
    cases += [(f"levels_played/games/recall{name}", value) for name in ("", "/map", "/low", "/high") for value in ODD]
    cases += [
        ("levels_played/complete", 1),
        ("levels_played/games/recall/complete", 1),
        ("levels_played/stop", 2**31 - 1),
    ]
    cases += [("levels_played", value) for value in ODD] + [("levels_played/games", {"x" * 300: {}})]
    cases += [
        ("levels_played/games/recall/others", {"$array": "value_net.bias"}),
        ("levels_played/games/recall/low", 5),
    ]
    score = {"score": 1.0, "of": "mean return"}
    cases += [("chosen", value) for value in (*ODD, {"score": 1.0}, {**score, "steps": 1})]
    cases += [
        ("chosen", {**score, "score": value}) for value in (*ODD, 1e300) if value not in (-1, 1.5) or value is True
    ]
    cases += [("chosen", {**score, "of": value}) for value in (None, 1, "x" * 300, "a\nb", "\x1b[2J")]
    for i, (path, value) in enumerate(cases):
        yield f"record-{path.replace('/', '.')}-{i}", changed(good.model, _set(path, value))


ODD: tuple[Any, ...] = (None, [], {}, "x", -1, 10**30, 1.5, True)


def _set(path: str, value: Any) -> Callable[[Any, Any], None]:
    def change(_: Any, meta: Any) -> None:
        *folders, last = path.split("/")
        for each in folders:
            meta = meta[each]
        if value is ...:
            del meta[last]
        else:
            meta[last] = value

    return change


def descriptions(good: Good, mark: str) -> Files:
    """Yield models whose description is foreign or absurd, or would start something."""
    cases: list[tuple[str, Any]] = []
    for name in ("format", "kind", "policy", "observation_space", "action_space", "config", "num_timesteps"):
        cases += [(name, value) for value in (..., *ODD) if (name, value) != ("config", {})]
    cases += [("format", 99), ("kind", "checkpoint"), ("surplus", 1), ("__class__", "os:system")]
    cores = (
        "os:system",
        "os.system",
        "builtins:exec",
        f"{MODULE}:Core",
        f"{MODULE}.Core",
        "../core",
        "",
        "srwm\n",
        "SRWM",
    )
    cases += [("policy/core", core) for core in (*cores, "x" * 100_000, "lstm", "gru", ":", "srwm_rl.nn.cores:Core")]
    for name in ("core", "core_kwargs", "encoder_kwargs", "net_arch", "activation_fn", "normalize_images"):
        fits = {"core_kwargs": ({},), "encoder_kwargs": ({},), "net_arch": ([], {}), "normalize_images": (True,)}
        cases += [(f"policy/{name}", value) for value in (..., *ODD) if value is ... or value not in fits.get(name, ())]
    cases += [("policy/optimizer_class", "os:system"), ("policy/use_sde", True), ("policy/activation_fn", "os.system")]
    for name in ("hidden_size", "n_layers", "n_heads", "ff_size"):
        cases += [(f"policy/core_kwargs/{name}", value) for value in (HUGE, 10**30, 512, 0, -1, "8", [8], 8.5)]
    cases += [(f"policy/core_kwargs/{name}", f"{MODULE}:f") for name in ("variant", "norm", "colour", "frozen")]
    cases += [("policy/core_kwargs/query_init", "x"), ("policy/core_kwargs/input_size", HUGE)]
    for value in ([HUGE], [10**5] * 3, [1] * 10**5, "x", [-1], [1.5], HUGE):
        cases += [("policy/encoder_kwargs/mlp", value), ("policy/net_arch", value)]
    cases += [("policy/encoder_kwargs/step_periods", value) for value in (HUGE, -1, "x", 7)]
    cases += [("policy/encoder_kwargs/cnn", value) for value in ({"shape": 1}, "x", HUGE)]
    cases += [("policy/encoder_kwargs/observation_space", 1), ("policy/net_arch", {"pi": [HUGE], "vf": []})]
    box = {"type": "Box", "shape": [HUGE], "dtype": "float32", "low": 0.0, "high": 1.0}
    spaces = [box, {**box, "shape": [2**31] * 4}, {**box, "dtype": "O", "shape": [1]}, {"type": "os:system"}]
    spaces += [{**box, "shape": [3]}, {"type": "Discrete", "n": HUGE, "start": 0, "dtype": "int64"}]
    spaces += [{"type": "Dict", "spaces": [["a", box]]}, {"type": "MultiBinary", "n": [HUGE, HUGE]}]
    cases += [(f"{kind}_space", space) for kind in ("observation", "action") for space in spaces]
    cases += [(f"config/{name}", value) for name, value in settings(good)]
    for i, (path, value) in enumerate(cases):
        yield f"meta-{path.replace('/', '.')}-{i}", changed(good.model, _set(path, value))
    # The recall task has no images.
    yield "meta-unused-cnn", changed(good.model, _set("policy/encoder_kwargs/cnn", {"channels": [HUGE]}))


def settings(good: Good) -> Iterator[tuple[str, Any]]:
    """Yield run settings that are invalid, would start something, or need much memory."""
    for name in ("env", "core", "algo", "mode", "optimizer", "lr_decay"):
        yield from ((name, value) for value in (None, 1, [], {}))
    for name in ("env_kwargs", "core_kwargs", "encoder_kwargs", "inputs"):
        yield from ((name, value) for value in (None, 1, "x", [1], ["x"]))
    for name in ("n_envs", "n_steps", "batch_size", "seed", "n_threads", "bptt", "sequence_length"):
        yield from ((name, value) for value in ("x", [], 1.5, -1, 10**30))
    for name in ("gamma", "learning_rate", "reward_clip", "max_grad_norm"):
        yield from ((name, value) for value in ("x", [], None, -1, 10**30))
    yield from (
        ("env", value) for value in (f"{MODULE}:Env-v0", f"{MODULE}:x", "../recall", "", "no-such-v0", "coinrun")
    )
    yield from (("levels", value) for value in ("x", "0:99999999999", 5, None, "9:1"))
    yield from (("eval_levels", value) for value in ("x", "-1:5", None))
    yield from (("env_kwargs", [value]) for value in (f"n_symbols:{HUGE}", "delay:x", f"{MODULE}:1", "n_symbols:[1]"))
    yield from [("colour", "red"), ("algo", "os:system"), ("mode", "hard"), ("inputs", ["action"]), ("inputs", ["x"])]
    yield from [("n_envs", HUGE), ("n_steps", HUGE), ("n_threads", HUGE), ("env_list", 1), ("dry_run", "x")]


def states(good: Good, mark: str) -> Files:
    """Yield checkpoints whose state is foreign, and models with a simulator's state in them."""
    _, meta = read_file(good.checkpoint)

    def with_state(change: Callable[[dict[str, Any]], object]) -> bytes:
        arrays, meta = read_file(good.checkpoint)
        state = deepcopy(unpack(arrays, meta["state"]))
        change(state)
        arrays, tree = pack(state)
        return serialise(arrays, {**meta, "state": tree})

    optional = {"extra": ({},), "log": ({},), "optimizer": ({},), "episodes": ([],), "successes": ([],)}
    optional |= {"core_state": (None,), "environments": (None,), "metrics": (), "best": (None,)}
    for name in meta["state"]:
        for i, value in enumerate((..., *ODD, b"x" * 99, np.zeros(3), np.zeros((0,), np.float32))):
            fits = any(type(value) is type(each) and value == each for each in optional.get(name, ()))
            if not fits and not (value is ... and name in ("extra", "log", "best", "levels_played")):
                yield (
                    f"state-{name}-{i}",
                    with_state(lambda s, n=name, v=value: s.pop(n) if v is ... else s.update({n: v})),
                )
    for i, value in enumerate((*ODD, np.zeros(3))):
        yield f"state-counter-{i}", with_state(lambda s, v=value: s["counters"].update(num_timesteps=v))
    inner = ("level", "clock", "counts", "pins", "seed", "levels", "settings")
    for name, value in itertools.product(inner, (b"\xff" * 999, "100:108", 10**30, np.full(9, 2**62))):
        yield (
            f"state-env-{name}-{type(value).__name__}",
            with_state(lambda s, n=name, v=value: _batch(s["environments"]).update({n: v})),
        )
    for name in ("torch", "numpy", "python", "cuda"):
        yield f"state-generator-{name}", with_state(lambda s, n=name: s["generators"].update({n: [1, 2, 3]}))
    for i, value in enumerate((-(2**31), -1, 625, 10**8, 2**31 - 1, 2**40, True, None, 1.5, "x")):
        yield f"state-numpy-position-{i}", with_state(lambda s, v=value: s["generators"]["numpy"].__setitem__(2, v))
    for n in (0, 127, 625):
        keys = np.zeros(n, np.uint32)
        yield f"state-numpy-keys-{n}", with_state(lambda s, k=keys: s["generators"]["numpy"].__setitem__(1, k))
    for kind in ("float64", "float16", "int64", "uint8", "bool"):
        yield f"state-memory-{kind}", with_state(lambda s, k=kind: s.update(core_state=s["core_state"].astype(k)))
    yield "state-array-missing", changed(good.checkpoint, _set("state/core_state", {"$array": "/nothing"}))
    yield "state-array-list", changed(good.checkpoint, _set("state/core_state", {"$bytes": [1]}))
    blob = np.frombuffer(b"\0" * 22_000, np.uint8)
    for name in ("/environments/venv/0", "environments", "state"):
        yield f"model-env-array-{len(name)}", changed(good.model, lambda a, m, n=name: a.update({n: blob}))
        yield f"model-env-entry-{len(name)}", changed(good.model, _set(name.replace("/", "."), {"level": [1]}))


def _batch(environments: dict[str, Any]) -> dict[str, Any]:
    while "venv" in environments:
        environments = environments["venv"]
    batch: dict[str, Any] = environments["batch_env"]
    return batch


def special_files(good: Good, mark: str) -> Files:
    """Yield links, pipes, sockets, folders."""
    targets = {"passwd": "/etc/passwd", "zero": "/dev/zero", "null": "/dev/null", "memory": "/proc/self/mem"}
    targets |= {
        "nowhere": "/nowhere",
        "folder": "/etc",
        "outside": "../../outside",
        "stdin": "/dev/stdin",
        "tty": "/dev/tty",
    }
    for name, target in targets.items():
        yield f"link-{name}", lambda path, t=target: path.symlink_to(t)
    yield "link-itself", lambda path: path.symlink_to(path.name)
    yield "pipe", os.mkfifo
    yield "folder", lambda path: path.mkdir()
    yield "folder-dcp", lambda path: (path.mkdir(), (path / ".metadata").write_bytes(pickles(mark)["system-4"]))
    yield "missing", lambda path: None


def run_folders(good: Good) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yield ways to break a run folder: its settings, and links and pipes where files should be."""
    config = good.config
    for i, (name, value) in enumerate(settings(good)):
        text = json.dumps({**config, "train": {**config["train"], name: value}})
        yield f"setting-{name}-{i}", lambda run, t=text: (run / "config.json").write_text(t)
    whole = json.dumps(config)
    texts = [
        "",
        "{",
        "[]",
        "null",
        '{"train": []}',
        '{"train": null}',
        "[" * 100_000,
        whole[:-1],
        whole + "}",
        "\0" * 99,
    ]
    gamma = f'"gamma": {config["train"]["gamma"]}'
    texts += [whole.replace(gamma, '"gamma": NaN'), whole.replace('"seed": 0', '"seed": ' + "9" * 5000)]
    texts += [
        whole.replace('"seed": 0', '"seed": 0, "seed": 1'),
        whole.replace("{", '{"a": "' + "x" * 2**21 + '", ', 1),
    ]
    assert whole not in texts, "a fault was not put in"
    for i, text in enumerate(texts):
        yield f"config-{i}", lambda run, t=text: (run / "config.json").write_text(t)
    for name in ("config.json", "checkpoints"):
        yield f"pipe-{name}", lambda run, n=name: (_remove(run / n), os.mkfifo(run / n))
        yield f"none-{name}", lambda run, n=name: _remove(run / n)
    yield "pipe-metrics.jsonl", lambda run: (_remove(run / "metrics.jsonl"), os.mkfifo(run / "metrics.jsonl"))
    yield "pipe-lock", lambda run: (_remove(run / ".lock"), os.mkfifo(run / ".lock"))
    for name in (".lock", "metrics.jsonl", "tensorboard", "checkpoints", ".tmp-config.json"):
        yield f"link-{name}", lambda run, n=name: _link(run, n)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _link(run: Path, name: str) -> None:
    """Move a part of the run outside it, and put a link in its place."""
    outside = run.parents[1] / "outside"
    outside.mkdir(exist_ok=True)
    target = outside / f"{run.name}-{name}"
    if (run / name).exists():
        shutil.move(run / name, target)
    else:
        target.write_text("keep me")
    (run / name).symlink_to(target)


def main(folder: Path) -> None:
    """Write the corpus."""
    mark = str(folder / MARK)
    good = Good(folder / "good")
    for part in ("files", "runs", "canary"):
        (folder / part).mkdir()
    (folder / "canary" / f"{MODULE}.py").write_text(f"open({mark!r}, 'w').close()\n")
    numbers = itertools.count()
    for make in (
        foreign_files,
        archives,
        bombs,
        headers,
        damage,
        weights,
        records,
        descriptions,
        states,
        special_files,
    ):
        for name, content in make(good, mark):
            path = folder / "files" / f"{next(numbers):04d}-{name}"
            path.write_bytes(content) if isinstance(content, bytes) else content(path)
    for name, change in run_folders(good):
        change(shutil.copytree(good.run, folder / "runs" / f"{next(numbers):04d}-{name}"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
