"""ruff and mypy find nothing, with the settings of pyproject.toml."""
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize('command', ['ruff check --output-format concise .', 'mypy'], ids=['ruff', 'mypy'])
def test_clean(command):
    pytest.importorskip(command.split()[0], reason='of the lint extra')
    done = subprocess.run([sys.executable, '-m', *command.split()], cwd=Path(__file__).parents[1], text=True,
                          capture_output=True)
    assert done.returncode == 0, f'make lint:\n{done.stdout}{done.stderr}'
