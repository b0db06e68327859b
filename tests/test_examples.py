"""The examples of README.md, CONTRIBUTING.md, docs/ and the READMEs of configs/ work.

A block of Python that only assigns is a config: it is put on top of a config of the digits and built. The other blocks
of a page are executed in turn, on a few digits and an untrained model. A session (`>>>`) is a doctest. Of a shell
command, in a block or in the text, the tool, target or script must exist and accept the arguments. A block that cannot
be run states the reason in the line above: `<!-- not run: needs ... -->`.
"""
import argparse
import ast
import doctest
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import HOOKS, METRICS, MODELS, DefaultScope
from mmpretrain.apis import ModelHub

from mmasl.datasets.digits import DigitScenes

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text()
         for path in (ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md')),
                      *sorted((ROOT / 'configs').rglob('*.md')))}
CONFIG, CHECKPOINT = 'configs/digits/resnet_asl_digits.py', 'work_dirs/demo/resnet_asl_digits/epoch_4.pth'
LINKED = ('configs', 'model-index.yml', 'metafile.yml')  # from the repository, in the current folder of an example


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    reason: str  # why it is not run, or ''

    @property
    def where(self) -> str:
        return f'{self.page}:{self.line}'


def blocks(page: str, text: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    pattern = r'(?:^<!-- not run: (.*) -->\n)?^```(\w*)\n(.*?)^```$'
    for found in re.finditer(pattern, text, flags=re.MULTILINE | re.DOTALL):
        line = text[:found.start(2)].count('\n') + 1
        yield Block(page, line, found[2], found[3], found[1] or '')


BLOCKS = [block for page, text in PAGES.items() for block in blocks(page, text)]


def is_config(block: Block) -> bool:
    """Whether a block of Python only assigns. A block with an error is not a config, and fails when it is run."""
    try:
        return all(isinstance(statement, ast.Assign) for statement in ast.parse(block.text).body)
    except SyntaxError:  # also a session
        return False


def where(block: Block) -> str:
    return block.where


def python_blocks() -> list[Block]:
    return [block for block in BLOCKS if block.language == 'python' and not block.reason]


def test_blocks_say_what_they_are():
    """Every block has a language that is checked here, or a reason why it is not run."""
    assert len(BLOCKS) == sum(text.count('\n```') for text in PAGES.values()) / 2, 'a fence without its other end'
    for block in BLOCKS:
        assert block.language in ('python', 'shell', 'text'), block.where
        assert not block.reason or block.reason.startswith('needs '), f'{block.where}: what does it need?'


# --- Python

@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A current folder like the repository after `make demo`, but with three digits and an untrained model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(ModelHub, '_models_dict', {})
    monkeypatch.setattr(ModelHub, '_ModelHub__mmpretrain_registered', True)
    for name in LINKED:
        Path(name).symlink_to(ROOT / name)
    Path('_base_').symlink_to(ROOT / 'configs' / '_base_')  # for an example that belongs into configs/
    DigitScenes(train=1, val=2).write('data/digits')
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    Path(CHECKPOINT).parent.mkdir(parents=True)
    meta = dict(dataset_meta=dict(classes=tuple(DigitScenes().classes)))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), CHECKPOINT)
    return tmp_path


@pytest.mark.parametrize('block', [block for block in python_blocks() if is_config(block)], ids=where)
def test_configs_build(block, folder):
    """A block without `_base_` inherits a config of the digits."""
    base = 'fcos_focal_digits' if 'bbox_head' in block.text else 'resnet_bce_digits'
    inherit = '' if '_base_ =' in block.text else f"_base_ = 'configs/digits/{base}.py'\n"
    Path('example.py').write_text(inherit + block.text)
    cfg = Config.fromfile('example.py')
    given = Config.fromfile(f'configs/digits/{base}.py')
    assert cfg.to_dict() != given.to_dict() or 'custom_hooks' in block.text, 'the example changes nothing'
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = cfg.model
        model.backbone.init_cfg = None
        if 'data_preprocessor' in cfg:  # as mmengine's Runner does
            model.setdefault('data_preprocessor', cfg.data_preprocessor)
        model = MODELS.build(model)
        for hook in cfg.get('custom_hooks') or []:
            HOOKS.build(hook)
        if inherit:  # another base may need data that is not here
            metrics = cfg.val_evaluator
            for metric in metrics if isinstance(metrics, list) else [metrics]:
                METRICS.build(metric)
        if 'tta_model' in cfg:
            MODELS.build(ConfigDict(cfg.tta_model, module=model))


@pytest.mark.parametrize('page', sorted({block.page for block in python_blocks() if not is_config(block)}))
def test_python_runs(page, folder, monkeypatch):
    """The blocks of a page share their names. Commands of the page write the ONNX file that a block reads."""
    running = [block for block in python_blocks() if block.page == page and not is_config(block)]
    code = '\n'.join(block.text for block in running)
    for arguments in commands(page):
        if CHECKPOINT in arguments and any(word.endswith('.onnx') and repr(word) in code for word in arguments):
            monkeypatch.setattr(sys, 'argv', arguments[1:])
            tool(arguments[1])['main']()
    names: dict[str, object] = {'__name__': '__example__', 'logits': torch.zeros(2, 3, requires_grad=True),
                                'targets': torch.eye(2, 3)}  # of the reader's own model
    for block in running:
        if block.text.startswith('>>>'):
            session = doctest.DocTestParser().get_doctest(block.text, names, block.where, block.page, block.line)
            failures, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session)
            assert not failures, block.where
        else:
            exec(compile('\n' * block.line + block.text, str(ROOT / page), 'exec'), names)


# --- shell

def shell_lines(page: str) -> Iterator[str]:
    """Commands in the blocks and in the text of a page."""
    for block in BLOCKS:
        if block.page == page and block.language == 'shell':
            yield from filter(None, block.text.replace('\\\n', ' ').splitlines())
    text = re.sub(r'^```.*?^```$', '', PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r'`([^`]+)`', text):
        words = code.split()
        if words[0] in ('python', 'make') or (words[0].startswith('tools/') and words[1:]):
            yield ' '.join(words)


def split(line: str) -> list[str]:
    """Words of a command, without comment and variables. A tool without `python` gets it."""
    words = shlex.split(line, comments=True)
    while words and re.match(r'[A-Z_]+=', words[0]):
        words.pop(0)
    return ['python', *words] if words and words[0].startswith('tools/') and words[0].endswith('.py') else words


def commands(page: str) -> list[list[str]]:
    return [words for words in map(split, shell_lines(page)) if words]


class Parsed(Exception):
    """The arguments are accepted; the tool does not begin."""


@cache
def tool(path: str) -> dict:
    return runpy.run_path(str(ROOT / path), run_name='tool')


def check_tool(path: str, arguments: list[str], flags: list[str], monkeypatch) -> None:
    """The tool's parser accepts the arguments and has the flags."""
    parse = argparse.ArgumentParser.parse_args

    def accept(self, args=None, namespace=None):
        parse(self, args, namespace)
        missing = set(flags) - set(self._option_string_actions)
        assert not missing, f'{path} has no {missing}'
        raise Parsed

    assert (ROOT / path).is_file(), f'there is no {path}'
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', accept)
    monkeypatch.setattr(sys, 'argv', [path, *arguments])
    with pytest.raises((Parsed, SystemExit)) as stop:
        tool(path)['main']()
    monkeypatch.undo()
    if stop.type is SystemExit:
        assert stop.value.code == 0 and '--help' in arguments, f'{path} refuses {arguments}'


def check_script(path: str, arguments: list[str], flags: list[str], monkeypatch, folder: Path) -> None:
    """The tool accepts the command that the script starts. Interpreter and srun only print it."""
    echo = folder / 'srun'
    echo.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    echo.chmod(0o755)
    env = os.environ | dict(PYTHON=str(echo), PATH=f'{folder}:{os.environ["PATH"]}')
    done = subprocess.run([ROOT / path, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, f'{path} refuses {arguments}: {done.stderr}'
    words = done.stdout.splitlines()
    start = next(i for i, word in enumerate(words) if word.endswith('.py') and '/tools/' in word)
    check_tool(os.path.relpath(words[start], ROOT), words[start + 1:], flags, monkeypatch)


def expand(pattern: str) -> list[str]:
    """The shell's braces."""
    match = re.fullmatch(r'(.*?)\{(.*?)\}(.*)', pattern)
    if not match:
        return [pattern]
    before, choices, after = match.groups()
    return [path for choice in choices.split(',') for path in expand(before + choice + after)]


@pytest.mark.parametrize('page', [page for page in PAGES if commands(page)])
def test_commands(page, monkeypatch, tmp_path, capsys):
    for line in shell_lines(page):
        words = split(line)
        if not words:
            continue
        flags = re.findall(r'--[a-z][\w-]*', line.partition(' #')[2])
        for pattern in re.findall(r'\bconfigs/[\w/*.{},-]+', line):
            for path in expand(pattern):
                assert list(ROOT.glob(path)), f'{page}: there is no {path}'
        match words:
            case ['make', *targets]:
                for target in (word for word in targets if '=' not in word):
                    assert re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), re.MULTILINE), f'{page}: {line}'
            case ['python', '-m', 'pytest', *arguments]:
                for path in arguments:
                    assert path.startswith('-') or (ROOT / path.partition('::')[0]).exists(), f'{page}: {line}'
            case ['python', path, *arguments]:
                check_tool(path, arguments, flags, monkeypatch)
            case [path, *arguments] if path.startswith('tools/'):
                check_script(path, arguments, flags, monkeypatch, tmp_path)
            case ['pip', 'install', *_]:
                for extra in re.findall(r'\.\[([\w,]+)\]', line):
                    assert all(f"'{name}': " in (ROOT / 'setup.py').read_text() for name in extra.split(',')), line
            case ['pip', 'download', *_] | ['tar', *_]:
                pass  # of another project's source
            case _:
                raise AssertionError(f'{page}: no check for the command {line!r}')
    capsys.readouterr()


@pytest.mark.parametrize('page', PAGES)
def test_files_that_are_named_exist(page):
    for path in re.findall(r'`((?:benchmarks|configs|docs|mmasl|tests|tools)/[\w./-]+)`', PAGES[page]):
        assert (ROOT / path).exists() or re.search('[A-Z]{4}', path), f'{page}: there is no {path}'


# --- a wrong command fails

@pytest.mark.parametrize('line, message', [
    ('tools/train.py --lerning-rate 1', 'refuses'), ('tools/trian.py c.py', 'there is no'),
    ('tools/train.py c.py  # --resume --resme', "has no {'--resme'}")], ids=['flag', 'tool', 'comment'])
def test_a_wrong_command(line, message, monkeypatch, capsys):
    path, *arguments = shlex.split(line, comments=True)
    with pytest.raises(AssertionError, match=message):
        check_tool(path, arguments, re.findall(r'--[a-z]+', line.partition('#')[2]), monkeypatch)
