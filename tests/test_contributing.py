"""The first contribution that CONTRIBUTING.md walks through fails and then passes as it says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.scheduler import test_queue_order
from workbench.scheduler import policy
from workbench.scheduler.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def test_the_first_contribution_goes_from_a_failing_test_to_green(monkeypatch):
    written_test, written_policy, registered = blocks("python")
    assert written_test.startswith("# tests/scheduler/test_queue_order.py\n")
    beside_the_others = dict(vars(test_queue_order))
    exec(written_test, beside_the_others)
    (name,) = set(beside_the_others) - set(vars(test_queue_order))
    (said,) = blocks("text")
    with pytest.raises(ConfigError, match="^" + re.escape(said.strip())):
        beside_the_others[name]()

    in_its_module = dict(vars(policy))
    monkeypatch.setattr(policy, "POLICIES", dict(policy.POLICIES))
    in_its_module["POLICIES"] = policy.POLICIES
    for written in (written_policy, registered):
        assert written.startswith("# workbench/scheduler/policy.py\n")
        exec(written, in_its_module)
    beside_the_others[name]()


def test_the_table_of_settings_names_every_policy():
    (row,) = re.findall(r"^\| the queue \|.*--policy.*$", (ROOT / "README.md").read_text(), re.M)
    assert [name for name in policy.POLICIES if not re.search(rf"(`|--policy ){name}`", row)] == []


def test_every_file_and_folder_that_is_named_is_there():
    named = set(re.findall(r"`?((?:tests|workbench|docs|benchmarks|examples)/[\w/.-]*\w)`?", TEXT))
    named |= set(re.findall(r"\b([A-Z]+(?:\.md)?)\b", TEXT)) & {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "ARCHITECTURE.md",
    }
    assert len(named) > 6
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_hooks_run_what_make_test_runs_before_the_tests():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = (ROOT / "Makefile").read_text().partition("\ntest:")[2].partition("\n\n")[0]
    made = {
        " ".join(line.split()[:2]) for line in recipe.replace("$(BIN)", ".venv/bin").splitlines() if "venv/bin" in line
    }
    made = {line for line in made if "pytest" not in line and " -m" not in line}
    hooked = {" ".join(hook["entry"].split()[:2]) for hook in hooks if ".venv" in hook["entry"]}
    assert hooked == made and len(made) == 3


def test_the_licence_is_the_one_that_the_package_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"
    (file,) = project["license-files"]
    text = (ROOT / file).read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
