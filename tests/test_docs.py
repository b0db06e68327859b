"""The documentation site builds strictly, and its reference has every public name of mmasl."""
import json
import pickle
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from inspect import isclass, isroutine
from pathlib import Path

import pytest

import mmasl

ROOT = Path(__file__).parents[1]
spec = spec_from_file_location('docs_conf', ROOT / 'docs' / 'conf.py')
conf = module_from_spec(spec)
spec.loader.exec_module(conf)


BUILD = """
import sys
from sphinx.cmd.build import main
codes = []
for source in sys.argv[2:]:
    codes.append(main(['-W', '--keep-going', '-q', '-b', 'dummy', '-c', sys.argv[1], source, source + '.out']))
    print('=' * 80, file=sys.stderr)
print(codes)
"""
BROKEN = """# A
[page](docs/no-page.md) [place](#no-place) ![picture](no-picture.svg)

```{eval-rst}
:func:`no_function` :class:`mmasl.NoClass` :class:`torch.Tensor`
```
"""


@pytest.fixture(scope='module')
def builds(tmp_path_factory) -> tuple[Path, list[int], list[str]]:
    """The site and a broken one, as `make docs` builds them, but without writing the pages. The modules, whose import
    takes most of the time, are imported once."""
    folder = tmp_path_factory.mktemp('docs')
    (folder / 'site').symlink_to(ROOT)
    (folder / 'broken' / 'docs').mkdir(parents=True)
    (folder / 'broken' / 'README.md').write_text(BROKEN)
    (folder / 'broken' / 'docs' / 'orphan.md').write_text('# In no navigation\n')
    done = subprocess.run([sys.executable, '-c', BUILD, ROOT / 'docs', folder / 'site', folder / 'broken'],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stderr.split('=' * 80)


@pytest.fixture
def environment(builds):
    folder, (code, _), (messages, *_) = builds
    assert code == 0, messages
    return pickle.loads((folder / 'site.out' / '.doctrees' / 'environment.pickle').read_bytes())


def test_every_public_name_has_an_entry(environment):
    """Classes and functions, in the reference of the module that defines them."""
    entries = environment.domaindata['py']['objects']
    modules = conf.walk()
    assert set(modules) <= set(entries)
    public = {f'{name}.{key}' for name, module in modules.items() for key, value in vars(module).items()
              if not key.startswith('_') and (isclass(value) or isroutine(value)) and value.__module__ == name}
    assert 'mmasl.ops.calibration.posterior' in public and 'mmasl.models.heads.ml_decoder_head.MLDecoderHead' in public
    missing = sorted(public - set(entries))
    assert missing == [], 'what has no docstring has no entry'
    names = {f'mmasl.{key}' for keys in conf.config_names().values() for key in keys}
    names |= {f'{name}.{key}' for name, module in modules.items() for key in getattr(module, '__all__', ())}
    assert len(names) > 25
    for name in names:
        assert conf.find_entry(name) in entries, name


def test_every_page_is_in_the_navigation(environment):
    listed = {re.sub(r'.*<(.*)>', r'\1', page) for pages in conf.NAVIGATION.values() for page in pages} - {'self'}
    pages = {f'docs/{path.stem}' for path in (ROOT / 'docs').glob('*.md')}
    assert pages <= listed <= environment.found_docs


def test_pictures_and_code_are_taken_along(environment):
    """Links out of docs/ and to code work on the site, too."""
    assert 'benchmarks/adaptive/control.svg' in map(str, environment.images)
    assert 'tests/ops/test_peers.py' in map(str, environment.dlfiles)
    content = ['[a](../mmasl/ops/reference.py) [b](../mmasl/reproduce) [c](other.md) [d](../mmasl/reproduce/tables.json)']
    conf.add_navigation(None, 'docs/loss', content)
    assert content[0].split() == ['[a](api/mmasl.ops.reference.rst)', '[b](api/mmasl.paper.rst)', '[c](other.md)',
                                  '[d](../mmasl/reproduce/tables.json)']


def test_the_changelog_names_the_version():
    assert f'{mmasl.__version__}' in (ROOT / 'CHANGELOG.md').read_text()


def test_what_is_broken_fails(builds):
    _, (_, code), (_, messages, _) = builds
    assert code == 1
    for what in ('no-page.md', 'no-place', 'no-picture.svg', 'no_function', 'mmasl.NoClass', 'docs/choosing',
                 "isn't included in any toctree"):
        assert what in messages, what
    assert 'torch.Tensor' not in messages


@pytest.mark.parametrize('name, entry', [
    ('mmasl.AsymmetricLoss', 'mmasl.models.losses.asymmetric_loss.AsymmetricLoss'), ('mmasl.EMAHook', 'mmasl.engine.hooks.ema.EMAHook'),
    ('mmasl.ops.posterior', 'mmasl.ops.calibration.posterior'), ('mmasl.reproduce.FOOTNOTES', 'mmasl.reproduce'),
    ('mmasl.engine.hooks.adaptive_asymmetry.AsymmetricLoss', 'mmasl.models.losses.asymmetric_loss.AsymmetricLoss'), ('mmasl.NoClass', None),
    ('mmasl.engine.hooks.adaptive_asymmetry.NoClass', None), ('mmasl.engine.hooks.adaptive_asymmetry', None), ('torch.Tensor', None)])
def test_references(name, entry):
    conf.walk()
    assert conf.find_entry(name) == entry
