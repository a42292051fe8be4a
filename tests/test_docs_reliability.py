"""docs/reliability.md says what the programs say, and its figures are those of the proofs."""

from __future__ import annotations

from agent.status import Code
from tests.torture.page import ROOT, pages
from tests.torture.report import findings

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_code_is_explained() -> None:
    assert [code.value for code in Code if f"`{code.value}`" not in PAGE] == []


def test_the_figures_are_those_that_the_proofs_wrote() -> None:
    found = findings()
    assert found, "no proof has been run"
    for path, text in pages(found).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: python -m tests.torture.page"


def test_no_proof_has_failed() -> None:
    assert [finding.proof for finding in findings() if not finding.passed] == []
