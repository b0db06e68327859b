"""Dependencies are declared and pinned, generated files are current, and MMPretrain's ModelHub builds our models."""
import ast
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns
from unittest.mock import patch

import pytest
import torch
from mmpretrain.apis import ModelHub, get_model, list_models
from packaging.requirements import Requirement

from benchmarks import model_index

ROOT = Path(__file__).parents[1]
# Modules that no requirement names: another requirement installs them, or any of several distributions may.
COMES_WITH = dict(
    cv2='onedl-mmcv', PIL='onedl-mmcv',
    rich='onedl-mmengine', yaml='onedl-mmengine', packaging='onedl-mmengine',
    pycocotools='onedl-mmdetection', triton='torch', fontTools='matplotlib')
OPTIONAL = {'deepspeed', 'transformers', 'pip', 'setuptools', 'modelindex'}
OUTDATED = 'write constraints.txt anew, its first lines say how'


# --- dependencies

def canonical(name: str) -> str:
    return re.sub('[-_.]+', '-', name).lower()


@pytest.fixture(scope='module')
def setup() -> dict:
    """The arguments of setup.py."""
    with patch('setuptools.setup') as called, patch('os.getcwd', return_value=str(ROOT)):
        runpy.run_path(str(ROOT / 'setup.py'))
    return called.call_args.kwargs


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """Requirements by name, of those that hold for this Python."""
    found = [Requirement(line) for line in lines]
    return {canonical(one.name): one for one in found if one.marker is None or one.marker.evaluate(dict(extra=''))}


def imported(folder: str) -> dict[str, str]:
    """Modules of other projects that the files of a folder import, with one of these files."""
    found = {}
    for path in (ROOT / folder).rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [
                node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.split('.')[0]: str(path) for name in names if not (
                path.parent / f'{name.split(".")[0]}.py').exists()}
    own = {'mmasl', 'tools', 'benchmarks'}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | own}


@pytest.mark.parametrize('folder', ['mmasl', 'tools', 'benchmarks', 'tests'])
def test_every_import_is_declared(folder, setup):
    declared = set(requirements([*setup['install_requires'], *sum(
        (lines for extra, lines in setup['extras_require'].items() if folder != 'mmasl' or extra != 'test'), [])]))
    distributions, missing = importlib.metadata.packages_distributions(), {}
    for name, path in imported(folder).items():
        giver = COMES_WITH.get(name)
        sources = requirements(importlib.metadata.requires(giver)) if giver in declared else declared
        if name not in OPTIONAL and not {canonical(one) for one in distributions.get(name, [name])} & set(sources):
            missing[name] = path
    assert not missing, 'setup.py must name these'


def test_everything_that_is_installed_is_pinned(setup):
    pins, choices = (requirements(re.findall('^[^#\\s].*', (ROOT / name).read_text(), re.MULTILINE))
                     for name in ('constraints.txt', 'constraints.in'))
    assert all(re.fullmatch('==[^*,]+', str(pin.specifier)) for pin in pins.values())
    for name, choice in choices.items():
        assert str(pins[name].specifier).startswith(str(choice.specifier)), f'{name}: {OUTDATED}'
    waiting, seen = list(requirements([*setup['install_requires'], *sum(setup['extras_require'].values(), [])])), set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            assert name in pins, f'{name}: {OUTDATED}'
            # The requirements of another version may differ.
            if str(pins[name].specifier) == f'=={importlib.metadata.version(name)}':
                waiting += requirements(importlib.metadata.requires(name) or [])
    assert len(seen) > 50


# --- generated files of configs/

def test_generated_files_are_current():
    outdated = [path.relative_to(ROOT).as_posix() for path, content in model_index.files().items()
                if path.read_text() != content]
    assert not outdated, 'run python benchmarks/model_index.py'


@pytest.mark.parametrize('path', model_index.config_files(), ids=lambda path: path.stem)
def test_every_config_is_in_the_table_of_its_folder(path):
    """The tables keep published numbers and ours in columns of their own."""
    lines = path.with_name('README.md').read_text().splitlines()
    row, = (line for line in lines if line.startswith(f'| [{path.stem}]({path.name}) |'))
    heads = lines[max(number for number, line in enumerate(lines[:lines.index(row)]) if line.startswith('| config |'))]
    cells = dict(zip(heads.strip('| ').split(' | '), row.removeprefix('| ').removesuffix(' |').split(' | ')))
    assert cells['command'] == f'`python tools/train.py {path.relative_to(ROOT)}`'
    assert 'Table' not in cells.get('ours', '') and 'http' not in cells.get('ours', '')
    assert bool(cells.get('released checkpoint')) == ('released = dict(' in path.read_text())


def test_names_are_unique_and_state_loss_and_data():
    names = [path.stem for path in model_index.config_files()]
    assert len(names) == len(set(names)) > 70
    assert model_index.describe('resnet_adaptive_digits_hard')['data'] == 'digits, long tail and missing labels'
    assert model_index.describe('tresnet-l_paper_asl_voc-from-coco')['data'] == 'Pascal VOC 2007'
    for name in ('resnet_asl', 'resnet_coco', 'resnet_asl_cocoa'):
        with pytest.raises(ValueError, match=f'{name}.py: the name has no'):
            model_index.describe(name)


# --- ModelHub

@pytest.fixture(scope='module')
def classifiers():
    """Names of the classifiers, which a ModelHub without MMPretrain's models has."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ModelHub, '_models_dict', {})
        patched.setattr(ModelHub, '_ModelHub__mmpretrain_registered', True)
        ModelHub.register_model_index(ROOT / 'model-index.yml')
        yield list_models()


def test_model_hub_lists_every_classifier(classifiers):
    assert set(classifiers) == {path.stem for path in model_index.config_files() if not model_index.is_detector(path)}
    assert {'resnet_asl_digits_hard', 'resnet_bce_digits_paper'} <= set(list_models(task='Multi-Label Classification'))


@pytest.mark.parametrize('name, changes, device', [
    ('resnet_asl_digits', dict(init_cfg=None), 'cpu'), ('resnet101_query2label_asl_coco', dict(init_cfg=None), 'cpu'),
    ('tresnet-l_paper_asl-softmax_herbarium', dict(pretrained=False), 'meta')])
def test_model_hub_builds(name, changes, device, classifiers):
    with torch.device(device):
        model = get_model(name, backbone=changes)
    assert type(model.head.loss_module).__module__.startswith('mmasl.models.losses.')
    assert not model._metainfo.weights, 'no checkpoint of ours is published'


# --- the wheel

@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    """site-packages of an environment with the wheel of a copy of the working tree, and no checkout.

    The dependencies are those of this environment; its own editable install of mmasl is not visible there.
    """
    source, env = (tmp_path_factory.mktemp(name) for name in ('source', 'env'))
    for name in ('setup.py', 'README.md', 'MANIFEST.in', 'LICENSE', 'model-index.yml', 'metafile.yml'):
        copy2(ROOT / name, source)
    for name in ('mmasl', 'configs', 'tools'):
        copytree(ROOT / name, source / name, ignore=ignore_patterns('__pycache__'))
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation',
                    '-w', source / 'dist', source], check=True)
    path, = (source / 'dist').glob('mmasl-*.whl')
    venv.create(env, with_pip=False)
    site, = env.glob('lib/python*/site-packages')
    (site / 'dependencies.pth').write_text(sysconfig.get_path('purelib'))
    subprocess.run([sys.executable, '-m', 'pip', '--python', env, 'install', '-q', '--no-deps', '--no-index',
                    '--ignore-installed', path], check=True)
    return site


def test_wheel_has_every_file(wheel):
    def files(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob('*')
                if path.is_file() and path.suffix != '.pyc' and '.mim' not in path.relative_to(folder).parts}

    assert files(wheel / 'mmasl') == files(ROOT / 'mmasl')
    mim = wheel / 'mmasl' / '.mim'
    assert files(mim / 'configs') == files(ROOT / 'configs')
    assert files(mim / 'tools') == files(ROOT / 'tools') - {'setup_env.sh'}


@pytest.mark.slow
def test_wheel_builds_models_and_runs_tools(wheel, tmp_path):
    code = f"""
import runpy, sys
from pathlib import Path
import mmasl
from mmpretrain.apis import ModelHub, get_model
mim = Path(mmasl.__file__).parent / '.mim'
assert mim == Path({str(wheel / 'mmasl' / '.mim')!r}), mim
ModelHub._ModelHub__mmpretrain_registered = True
ModelHub.register_model_index(mim / 'model-index.yml')
print(type(get_model('resnet_asl_digits', backbone=dict(init_cfg=None)).head.loss_module))
sys.argv = ['train.py', '--help']
runpy.run_path(str(mim / 'tools' / 'train.py'), run_name='__main__')
"""
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    python = wheel.parents[2] / 'bin' / 'python'
    done = subprocess.run([python, '-c', code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'mmasl.models.losses.asymmetric_loss.AsymmetricLoss' in done.stdout and '--cfg-options' in done.stdout
