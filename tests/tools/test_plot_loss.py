"""The tool's table, which docs/analysis.md shows, its figures, and its refusals."""
import re
import shlex
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mmasl.analysis.gradient import Setting, analyse_gradient
from mmasl.analysis.loss_plots import FIGURE_2, FIGURE_3, draw_gradient, draw_loss
from tools import plot_loss as tool

ROOT = Path(__file__).parents[2]
CONFIG = """
model = dict(neck=None, heads=[dict(loss=dict(type='mmasl.AsymmetricLoss', gamma_neg=3., detach_focusing=True)),
                               dict(loss=dict(type='AsymmetricLoss', gamma_neg=5.))],
             rpn=dict(loss_cls=dict(type='mmasl.AsymmetricLoss', gamma_pos=1., gamma_neg=2., clip=0., alpha=0.25)))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(capsys, *argv):
    """What the tool prints as it refuses; argparse exits with 2 and writes to stderr."""
    with pytest.raises(SystemExit) as stop:
        tool.main(argv)
    return str(stop.value.code) if stop.value.code != 2 else capsys.readouterr().err


@pytest.fixture
def unsaved(monkeypatch):
    monkeypatch.setattr(tool, 'save_figure', lambda *args: None)


# --- table

def test_the_table_in_the_docs_is_what_its_commands_print(unsaved, capsys):
    page = (ROOT / 'docs' / 'analysis.md').read_text()
    # A command in backquotes, which may be broken over lines, and the table behind it.
    found = re.findall(r'`python tools/plot_loss\.py([^`]*)`\n\n((?:\|.*\n)+)', page)
    assert len(found) == 2
    for command, table in found:
        tool.main([*shlex.split(command), '--out', 'figures'])
        assert capsys.readouterr().out.startswith(table)


def test_default_table_is_the_papers(unsaved, capsys):
    tool.main([])
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in capsys.readouterr().out.splitlines()[2:6]]
    assert {row[0]: ''.join(cell[0] for cell in row[3:7]) for row in rows} == {
        'CE': '---+', 'AF': '-+-+', 'CE+PS': '+-+-', 'ASL': '++++'}
    assert {row[2] for row in rows} == {'Eq. 8'}


# --- figures

@pytest.mark.parametrize('name', ['loss.svg', 'gradient.svg'])
def test_figures_in_the_docs_are_small(name):
    figure = ROOT / 'docs' / 'figures' / name
    assert f'figures/{name}' in (ROOT / 'docs' / 'analysis.md').read_text()
    assert 5000 < figure.stat().st_size < 150_000


def test_figures_are_reproducible(folder):
    for out in ('first', 'second'):
        tool.main(['--out', out])
    for name in ('loss.svg', 'gradient.svg'):
        first = (folder / 'first' / name).read_bytes()
        assert first == (folder / 'second' / name).read_bytes() and b'<dc:date>' not in first


@pytest.mark.parametrize('options, panels', [([], 2), (['--detach-focusing', 'both'], 3), (['--positives'], 4)])
def test_one_file_holds_all_panels(folder, options, panels):
    tool.main([*options, '--out', 'new/all.svg'])
    assert (folder / 'new' / 'all.svg').read_text().count('<g id="axes_') == panels
    assert len(list((folder / 'new').iterdir())) == 1


def test_png(folder):
    tool.main(['--out', 'all.png', '--setting', '4,0.05'])
    assert plt.imread(folder / 'all.png').shape[1] > 500


def drawn(draw, *arguments):
    _, axes = plt.subplots()
    draw(axes, *arguments)
    return axes, {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith('_')}


def test_loss_curves():
    _, lines = drawn(draw_loss, FIGURE_2, False)
    assert list(lines) == ['CE', r'focal, $\gamma_- = 2$', r'focal+PS, $\gamma_- = 2$, $m = 0.2$']
    for points, (gamma, clip) in zip(lines.values(), ((0, 0), (2, 0), (2, 0.2))):
        p, loss = points.T
        p_m = np.maximum(p - clip, 0)
        np.testing.assert_allclose(loss, -p_m**gamma * np.log(1 - p_m), rtol=1e-6, atol=1e-9)


def test_gradient_curves_regimes_and_p_star():
    axes, lines = drawn(draw_gradient, FIGURE_3, False)
    found = [analyse_gradient(setting) for setting in FIGURE_3]
    assert [label.split(',')[0] for label in lines] == ['CE', 'AF', 'CE+PS', 'ASL']
    for label, points, properties in zip(lines, lines.values(), found):
        assert points[:, 1].max() == 1
        assert (f'p^* = {properties.p_star}'[:10] in label) if properties.p_star else ('p^*' not in label)
    assert [text.get_text() for text in axes.texts] == ['hard threshold', 'soft threshold', 'mislabelled']
    edges = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    np.testing.assert_allclose(edges, list(found[-1].regimes.values()))
    markers = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == 'o']
    np.testing.assert_allclose(markers, [properties.p_star for properties in found[1:]])


def test_positives_share_curves():
    axes, lines = drawn(draw_gradient, [Setting(0, 0, 0), Setting(0, 4, 0.05), Setting(2, 2, 0)], True)
    assert list(lines) == ['CE, ASL', r'focal, $\gamma_+ = 2$'] and not axes.texts
    np.testing.assert_allclose(lines['CE, ASL'][:, 1], 1 - lines['CE, ASL'][:, 0], atol=2e-6)


# --- settings

def test_settings(unsaved, capsys):
    tool.main(['--setting', '3,0.1', '--setting', '1,2,0', '--setting', '0,0'])
    rows = capsys.readouterr().out.splitlines()[2:-2]
    assert [row.split(' | ')[1] for row in rows] == ['0, 0, 0', '0, 3, 0.1', '1, 2, 0']


def test_losses_of_a_config(folder, unsaved, capsys):
    """Those with the scope, with the config's gradient forms, unless another form is asked for."""
    (folder / 'config.py').write_text(CONFIG)
    assert tool.read_settings('config.py') == [Setting(0, 3, 0.05, None, True), Setting(1, 2, 0, 0.25, False)]
    for options, expected in (([], ['CE Eq. 8', 'AF Eq. 8', 'CE constant weight', 'ASL constant weight']),
                              (['--detach-focusing', 'True'],
                               ['CE constant weight', 'ASL constant weight', 'AF constant weight'])):
        tool.main(['--config', 'config.py', *options])
        rows = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines()[2:-2]]
        assert [f'{row[0]} {row[2]}' for row in rows] == expected


@pytest.mark.parametrize('argv, message', [
    (['--setting', '4'], "'4': give GAMMA_NEG,CLIP"),
    (['--setting', '4,x'], "'4,x': give GAMMA_NEG,CLIP"),
    (['--setting', '4,1.5'], r'4,1.5: clip=1.5 must be a number in [0, 1)'),
    (['--setting', '-1,0'], 'expected one argument'),
    (['--out', 'a.jpg'], 'give an .svg or .png file'),
    (['--config', 'missing.py'], 'No such config: missing.py')])
def test_refusals(capsys, argv, message):
    assert message in refusal(capsys, *argv)


@pytest.mark.parametrize('loss, message', [
    ("dict(type='AsymmetricLoss')", "config.py has no loss with type='mmasl.AsymmetricLoss'"),
    ("dict(type='mmasl.AsymmetricLoss', clip=[0., 0.1])", 'model.loss: clip=[0.0, 0.1] has one value per class'),
    ("dict(type='mmasl.AsymmetricLoss', gamma_neg=-1.)", 'config.py, model.loss: gamma_neg=-1.0 must be'),
    ("dict(type='mmasl.AsymmetricLoss', alpha=1.)", 'has no gradient at any negative: lower gamma_neg, clip or alpha')])
def test_refused_configs(folder, capsys, loss, message):
    (folder / 'config.py').write_text(f'model = dict(loss={loss})\n')
    assert message in refusal(capsys, '--config', 'config.py')
