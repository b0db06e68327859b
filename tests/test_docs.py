"""The configuration of the documentation site in docs/conf.py. `make docs` builds the site itself."""
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import mmasl

ROOT = Path(__file__).parents[1]
spec = spec_from_file_location('docs_conf', ROOT / 'docs' / 'conf.py')
conf = module_from_spec(spec)
spec.loader.exec_module(conf)


def test_every_page_is_in_the_navigation():
    listed = {re.sub(r'.*<(.*)>', r'\1', page) for pages in conf.NAVIGATION.values() for page in pages}
    assert {f'docs/{path.stem}' for path in (ROOT / 'docs').glob('*.md')} <= listed


def test_links_to_code_lead_to_its_page():
    content = ['[a](../mmasl/ops/reference.py) [b](../mmasl/reproduce) [c](other.md) [d](../mmasl/reproduce/t.json)']
    conf.add_navigation(None, 'docs/loss', content)
    assert content[0].split() == ['[a](api/mmasl.ops.reference.rst)', '[b](api/mmasl.reproduce.rst)', '[c](other.md)',
                                  '[d](../mmasl/reproduce/t.json)']


def test_the_changelog_names_the_version():
    assert mmasl.__version__ in (ROOT / 'CHANGELOG.md').read_text()
