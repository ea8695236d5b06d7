"""What the documentation shows is whole commands."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _as_users_run_them(unhooked_file: None) -> None:
    del unhooked_file
