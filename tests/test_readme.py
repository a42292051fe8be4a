"""The README shows the samples themselves, and says what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from config.agent import Agent
from config.cloud import Cloud
from config.load import load

ROOT = Path(__file__).parents[1]
INCLUDE = re.compile(r"<!-- include: (\S+) -->\n```toml\n(.*?)```\n<!-- end -->", re.DOTALL)


def test_each_included_sample_is_the_file_to_the_letter() -> None:
    found = INCLUDE.findall((ROOT / "README.md").read_text())
    assert len(found) == 2
    for name, shown in found:
        assert shown == (ROOT / name).read_text(), f"README.md shows an old {name}; copy the file in"


def test_the_readmes_first_samples_load(tmp_path: Path) -> None:
    assert load(ROOT / "config/samples/first-device.toml", Agent).device[0].driver == "modbus"
    assert load(ROOT / "config/samples/first-cloud.toml", Cloud).gateway[0].name == "plant-1"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_every_relative_link_leads_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text):
        assert (ROOT / target).exists(), f"{name} links to {target}, which is not there"
