"""The table in docs/settings.md is that of the code."""

from dataclasses import fields
from pathlib import Path

import pytest

from orpo.cli.arguments import DataArguments, ModelArguments
from orpo.cli.settings_page import settings_table
from orpo.trainer.config import ORPOConfig

TABLE = Path(__file__).resolve().parents[2] / "docs/settings.md"


def test_the_table_is_that_of_the_code():
    assert TABLE.read_text(encoding="utf-8") == settings_table(), "python -m orpo.cli.settings_page > docs/settings.md"


@pytest.mark.parametrize("cls", [ORPOConfig, ModelArguments, DataArguments])
def test_every_setting_of_ours_is_in_it_with_its_help(cls):
    table = settings_table()
    for name in cls.__annotations__:
        if not name.startswith("_"):
            assert f"`{name}`" in table, name


def test_settings_whose_defaults_are_transformers_are_left_to_its_documentation():
    table = settings_table()
    inherited = {field.name for field in fields(ORPOConfig)} - set(ORPOConfig.__annotations__)
    named = [name for name in inherited if f"\n| `{name}` |" in table]
    assert inherited and not named
