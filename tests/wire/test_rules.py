"""The table of rules: every test that it names exists, every row says something."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (TESTS / "wire" / "RULES.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| section ")
]


def test_the_table_is_a_table() -> None:
    assert len(ROWS) > 150
    assert all(len(row) == 3 and all(row) for row in ROWS)
    assert len({(row[0], row[1]) for row in ROWS}) == len(ROWS), "a rule stands twice"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}: {row[1][:40]}")
def test_a_rule_has_a_test_or_a_reason(row: list[str]) -> None:
    keeper = row[2]
    if keeper.startswith("n/a: "):
        assert len(keeper) > 20
        return
    for entry in keeper.split(", "):
        found = re.fullmatch(r"`([\w/]+\.py)::(test_\w+)`", entry)
        assert found, f"not the name of a test: {entry}"
        path, name = found.groups()
        tree = ast.parse((TESTS / path).read_text())
        functions = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert name in functions
