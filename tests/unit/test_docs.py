"""The documents against the program: links lead somewhere, commands are accepted, keys and variables exist."""

from __future__ import annotations

import ast
import contextlib
import re
import shlex
from pathlib import Path
from typing import get_args

import click
import pytest
import yaml
from tests.command_lines import parse_celery, parse_muai

from muai_config.loading import resolve_file
from muai_config.monitoring import AlertType
from muai_config.reference import all_settings
from muai_config.variables import OTHER_PREFIXES, OTHER_VARIABLES, settings_by_variable
from muai_producers import errors
from muai_producers.errors import MuaiError
from muai_producers.gateway.answers import Receipt
from muai_producers.gateway.health import Health
from muai_producers.gateway.openai_api.bodies import ChatCompletionBody
from muai_producers.monitoring.instruments import BY_NAME
from muai_producers.wire import InferenceRequest, Parameters

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
GENERATED = {ROOT / "docs/configuration.md"}
WRITTEN = [path for path in DOCUMENTS if path not in GENERATED]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
PACKAGE_FOLDERS = ("config", "producers", "batching", "workers")
_SECTIONS = ("optimization", "monitoring", "queue", "gateway")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> list[str]:
    return [body for language, body in _FENCE.findall(text_of(path)) if language in languages]


def inline(path: Path) -> list[str]:
    return _CODE.findall(_FENCE.sub("", text_of(path)))


def commands(path: Path) -> list[str]:
    """Every `muai …` and `celery …` command line of a document."""
    lines = [line.strip() for body in blocks(path, "sh") for line in body.splitlines()]
    lines += inline(path)
    return [line for line in lines if re.match(r"(muai|celery) [a-z-]", line) and "…" not in line]


def error_codes() -> set[str]:
    return {found.code for found in vars(errors).values() if isinstance(found, type) and issubclass(found, MuaiError)}


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text_of(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_given_a_document_then_its_links_lead_somewhere(path: Path) -> None:
    for link in _LINK.findall(text_of(path)):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), link
        assert found.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(found), link


@pytest.mark.parametrize(
    ("path", "line"),
    [
        pytest.param(path, line, id=f"{name_of(path)}: {line}")
        for path in WRITTEN
        for line in sorted(set(commands(path)))
    ],
)
def test_given_a_command_line_in_a_document_then_the_program_accepts_it(
    path: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, *arguments = shlex.split(line, comments=True)
    parse = parse_muai if program == "muai" else parse_celery
    if line in inline(path) and all(re.fullmatch("[a-z]+", argument) for argument in arguments):
        # It may just name the command: what it would have to be given is left out.
        with contextlib.suppress(click.MissingParameter, click.exceptions.NoArgsIsHelpError):
            parse(monkeypatch, arguments)
    else:
        parse(monkeypatch, arguments)


def test_given_the_documents_then_each_process_has_its_command_in_them() -> None:
    told = {line.split()[1] for path in WRITTEN for line in commands(path) if line.startswith("muai ")}
    assert {"up", "collector", "worker", "control", "gateway", "flower", "submit", "dead", "config"} <= told


def test_given_readme_then_its_first_two_commands_are_demo_and_test() -> None:
    lines = [line for body in blocks(ROOT / "README.md", "sh") for line in body.splitlines()]
    assert lines[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_given_a_setting_or_variable_in_a_document_then_it_exists(path: Path) -> None:
    keys = {info.key for info in all_settings()}
    others = {*Parameters.__struct_fields__, *InferenceRequest.__struct_fields__, *error_codes()}
    others |= {
        *get_args(AlertType),
        *ChatCompletionBody.model_fields,
        *Receipt.__struct_fields__,
        *Health.__struct_fields__,
    }
    others |= {*BY_NAME, "batch_id", "batch_size"}  # the last two: fields of log lines
    leaves = {key.rpartition(".")[2] for key in keys} | others
    sections = {key.rpartition(".")[0] for key in keys} | set(_SECTIONS)
    for code in inline(path):
        if re.fullmatch(rf"(?:{'|'.join(_SECTIONS)})\.(?!yaml)[a-z_.]+", code):
            assert code in keys | sections, code
        elif re.fullmatch(r"(?:max|min|batch|buffer|adaptive|latency|queue|tenant)_[a-z_]+", code):
            assert code in leaves, code
    variables = set(re.findall(r"\bMUAI_[A-Z_]+\b", text_of(path)))
    ours = {name for name in variables if not name.startswith(OTHER_PREFIXES)}
    assert ours <= {*settings_by_variable(), *OTHER_VARIABLES}


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_given_a_file_of_this_repository_in_a_document_then_it_exists(path: Path) -> None:
    for code in inline(path):
        if re.match(r"(?:config|producers|batching|workers|tests|docs|deploy|benchmarks)/", code):
            assert (ROOT / code).exists(), code


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_given_code_in_a_document_then_it_is_python_and_what_it_imports_of_ours_exists(path: Path) -> None:
    for body in blocks(path, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("muai_"):
                exec(compile(ast.Module([node], []), str(path), "exec"), {})


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_given_settings_in_a_document_then_the_configuration_accepts_them(path: Path, tmp_path: Path) -> None:
    for body in blocks(path, "yaml"):
        assert isinstance(yaml.safe_load(body), dict)
        file = tmp_path / "optimization.yaml"
        file.write_text(body, encoding="utf-8")
        resolve_file(file, {})


def test_given_a_module_in_the_list_of_structures_then_it_exists_and_no_package_is_left_out() -> None:
    text = text_of(ROOT / "docs/structures.md")
    rows = re.findall(r"^\| (`muai_\w+\..*?) \|", text, re.MULTILINE)
    assert rows
    told: set[str] = set()
    for row in rows:
        package, *names = re.findall(r"`(?:muai_\w+)?\.?([\w]+)`", row)
        top = re.findall(r"`(muai_\w+)\.", row)[0]
        told |= {f"{top}.{name}" for name in (package, *names)}
    folders = [path for name in PACKAGE_FOLDERS for path in (ROOT / name).glob("muai_*")]
    modules = {f"{folder.name}.{path.stem}" for folder in folders for path in folder.glob("*.py")}
    packages = {f"{folder.name}.{path.parent.name}" for folder in folders for path in folder.glob("*/__init__.py")}
    assert told <= modules | packages
    assert packages <= told


def test_given_the_records_of_decisions_then_each_has_a_number_of_its_own() -> None:
    numbers = [int(path.name[:4]) for path in (ROOT / "docs/adr").glob("*.md")]
    assert len(numbers) == len(set(numbers))
