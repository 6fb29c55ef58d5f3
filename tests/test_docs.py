"""The documentation site builds without a warning; its code runs; its reference lists every public name and option."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import srwm_rl
from srwm_rl import agents, envs, scripts
from srwm_rl.scripts.cli import parse
from srwm_rl.scripts.commands.eval import read
from srwm_rl.scripts.main import COMMANDS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for folder in (".", "tutorials", "how-to", "reference") for page in DOCS.glob(f"{folder}/*.md"))
pytest.importorskip("mkdocs", reason="the docs extra is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_page_is_in_the_navigation_and_built(site: Path) -> None:
    for page in PAGES:
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file(), page


@pytest.mark.parametrize("name", ["hidden_controls", "few_shot"])
def test_the_notebooks_are_pages_with_their_outputs(site: Path, name: str) -> None:
    notebook = json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text())
    html = (site / "notebooks" / f"{name}.html").read_text()
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    n_images = sum("image/png" in output.get("data", ()) for output in outputs)
    assert n_images >= 2
    assert [f"{name}_{index}.png" in html for index in range(n_images)] == [True] * n_images
    assert all((site / "notebooks" / f"{name}_{index}.png").is_file() for index in range(n_images))
    printed = [line.rstrip() for output in outputs for line in "".join(output.get("text", ())).splitlines()]
    assert len(printed) > 3
    for line in printed:
        assert escape(line) in html
    assert not [output for output in outputs if output["output_type"] == "error"]


def test_the_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r'src="(?:https?:)?//[^"]+"', text), page
        assert not re.findall(r'<link rel="(?:stylesheet|preconnect|icon)" [^>]*href="https?:[^"]+"', text), page


def test_the_search_works_in_pages_opened_from_a_file(site: Path) -> None:
    page = (site / "how-to" / "resume.html").read_text()
    (script,) = re.findall(r'<script src="(\S+iframe-worker.js)"', page)
    assert (site / "how-to" / script).exists()
    assert (site / "search" / "search_index.js").exists()


def test_a_browser_searches_a_page_opened_from_a_file(site: Path, browse: Any) -> None:
    options = ("--virtual-time-budget=10000", "--dump-dom")
    page = browse(site / "how-to" / "resume.html", *options, query="?q=resume").stdout
    assert re.search(r'<a href="[^"]*how-to/resume.html[^"]*" class="md-search-result__link"', page)


PUBLIC = [
    *(f"srwm_rl.{name}" for name in srwm_rl.__all__),
    *(f"srwm_rl.agents.{name}" for name in agents.__all__),
    *(f"srwm_rl.scripts.{name}" for name in scripts.__all__),
    *(f"srwm_rl.envs.{name}" for name in envs.__all__ if not name.isupper() and not name.endswith("TaskBatch")),
]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_reference_documents_every_public_name(site: Path, name: str) -> None:
    assert f'id="{name}"' in (site / "reference" / "python.html").read_text()


def test_the_reference_lists_every_option(site: Path) -> None:
    html = (site / "reference" / "command_line.html").read_text()
    source = (DOCS / "reference" / "command_line.md").read_text()
    for command in COMMANDS:
        assert f"srwm-rl {command}" in source
    for path in re.findall(r"options: (\S+) -->", source):
        module, _, name = path.rpartition(".")
        for field in fields(getattr(import_module(module), name)):
            assert f"--{field.name.replace('_', '-')}" in html or field.name.upper() in html


CODE_PAGES = [page for page in PAGES if page.parent.name == "tutorials" or page.stem in ("start", "tasks", "tracking")]


@pytest.mark.parametrize("page", CODE_PAGES, ids=lambda page: page.stem)
def test_the_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from srwm_rl.nn.cores import _CORES

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("srwm_rl.nn.cores._CORES", dict(_CORES))
    names: dict[str, object] = {"__name__": page.stem}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(block, names)


def command_lines() -> dict[str, list[str]]:
    """Return the words of every `srwm-rl` command of pages and Makefile, by its text."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, *DOCS.glob("results/*.md")]
    blocks = [
        block
        for page in pages
        for block in re.findall(r"^```sh\n(.*?)^```|`(srwm-rl [^`]*)`", page.read_text(), re.DOTALL | re.MULTILINE)
    ]
    lines = [
        line
        for block, sentence in blocks
        for line in (block.replace("\\\n", " ").splitlines() or [" ".join(sentence.split())])
    ]
    makefile = re.sub(r"\$\(call \w+,\w+\)", "RUN", (ROOT / "Makefile").read_text().replace("\\\n", " "))
    lines += [line.replace("$(BIN)/", "") for line in makefile.splitlines() if line.startswith("\t$(BIN)/srwm-rl")]
    words = {line: shlex.split(line, comments=True) for line in lines}
    return {" ".join(argv): argv[1:] for argv in words.values() if argv[:1] == ["srwm-rl"]}


EXAMPLES = {"TASK": "parity", "ENV": "parity", "CORE": "gru", "SEED": "1", "N": "1", "PRECISION": "float32"}
COMMAND_LINES = {
    line: [EXAMPLES.get(word, word) for word in argv]
    for line, argv in command_lines().items()
    if "--help" not in argv and len(argv) > 1  # a sentence may name a command without its options
}
PARSED = {command for command in COMMANDS if command not in ("bench", "fewshot")}  # whose options depend on the first


@pytest.mark.parametrize("argv", COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_the_commands_have_the_options_that_are_given(argv: list[str]) -> None:
    command, *options = argv
    assert command in COMMANDS
    if command == "eval":
        read(options)
    elif command in PARSED:
        module = import_module(f"srwm_rl.scripts.commands.{command.replace('-', '_')}")
        (config,) = (
            value
            for name, value in vars(module).items()
            if name.endswith("Config") and (value.__module__ == module.__name__ or command == "train")
        )
        parse(config, options, f"srwm-rl {command}")


def test_the_sections_of_the_readme_that_pages_repeat_exist() -> None:
    titles = re.findall(r"<!-- README: (.+) -->", "".join(page.read_text() for page in PAGES))
    assert titles
    assert {*titles} <= {*re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)}


OF_OTHERS = {
    *("requeue", "signal"),  # sbatch
    *("nproc-per-node", "nnodes", "max-restarts", "rdzv-endpoint", "rdzv-id", "standalone"),  # torchrun
    *("user", "gpus", "build-arg"),  # docker
    *("vec-env", "n-trials"),  # rl-zoo3
}


def test_options_that_pages_name_exist() -> None:
    """Those that a sentence names by themselves."""
    names = OF_OTHERS | {"help"}
    for path in (ROOT / "scripts").rglob("*.py"):
        names |= {name.replace("_", "-") for name in re.findall(r"^    (\w+): ", path.read_text(), re.MULTILINE)}
    unknown = {
        f"{page.name}: --{option}"
        for page in [ROOT / "README.md", *PAGES]
        for option in re.findall(r"`--(?:no-)?([a-z-]+)", page.read_text())
        if option not in names
    }
    assert not unknown
