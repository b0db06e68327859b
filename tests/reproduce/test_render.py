"""Tables and pictures made from rows, and the committed rows against the configs."""
import re
from pathlib import Path

import pytest

from mmasl.reproduce import FOOTNOTES, load
from mmasl.reproduce.experiments import MISSING_LABELS, OWN, ROOT, items, rows
from mmasl.reproduce.render import best, draw, render_item, rows_table
from mmasl.reproduce.results import Results
from mmasl.reproduce.runs import write_rows


def write(folder: Path, item: str, data: str = 'digits', seeds: int = 3) -> Results:
    """Rows of all trainings of an item. Their mAP is 80, 80.1, ... by training, and 0.5 more by seed."""
    trainings = dict.fromkeys(training for row in rows(item, data) for training in row.trainings)
    write_rows(folder / f'{data}.csv', [
        dict(config=one.config, options=one.overrides, seed=seed, mAP=80 + 0.1 * place + 0.5 * seed, CF1=70., gap=-0.2,
             gamma_neg=3.) for place, one in enumerate(trainings) for seed in range(seeds)])
    return Results(folder, data)


def cells_of(text: str) -> list[list[str]]:
    """The cells of a table, headings first."""
    head, _, *lines = [line for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip().strip('|').split('|')] for line in (head, *lines)]


def test_table(tmp_path):
    text = render_item('Fig. 5', write(tmp_path, 'Fig. 5'))
    head, first, _, third, *_, last = cells_of(text)
    assert head == ['', 'paper, MS-COCO: mAP', 'mAP', 'against the first row', 'CF1', 'gap (validation)', 'seeds']
    assert first == ['gamma 0', '84', '80.5 ± 1.2', '', '70.0 ± 0.0', '-0.20 ± 0.00', '3']
    assert third == ['gamma 2', '', '80.7 ± 1.2', '+0.2 ± 0.0', '70.0 ± 0.0', '-0.20 ± 0.00', '3']
    # Our best of gamma 2, 3 and 4 stands beside the paper's best.
    assert last[:4] == ['best, gamma 2 to 4', '85.1 (1)', '80.9 ± 1.2 (gamma_pos=4.0, gamma_neg=4.0)', '+0.4 ± 0.0']
    assert text.splitlines()[-1] == f'(1) {FOOTNOTES["focal-gamma"]}  '


def test_our_numbers_stand_in_our_columns(tmp_path):
    heads, *lines = cells_of(render_item('Table 4', write(tmp_path, 'Table 4', 'real', 1)))
    paper = {place for place, head in enumerate(heads) if head.startswith('paper')}
    printed = {f'{entry.value:g}' for entry in load() if entry.item == 'Table 4' and entry.value is not None}
    ours = ('', '80.0', '80.1', '80.2', '+0.1', '+0.2', '70.0', '1')
    for cells in lines:
        assert all(not cell or cell.split(' (')[0] in printed for place, cell in enumerate(cells) if place in paper)
        assert all(cells[place] in ours for place in range(1, len(cells)) if place not in paper)
        assert ('(cited)' in cells[0]) == (not cells[-1])


def test_table_without_any_training(tmp_path):
    results = Results(tmp_path, 'digits')
    assert ['FL', '85.1 (1)', *[''] * 8, '0'] in cells_of(render_item('Table 2', results))
    assert not draw('Table 2', results, [tmp_path / 'a.svg'])


def test_differences_are_on_common_seeds(tmp_path):
    results = write(tmp_path, 'Fig. 5')
    first = rows('Fig. 5', 'digits')[0].trainings[0]
    results.rows = [row for row in results.rows if row['seed'] != '0' or row['config'] != first.config]
    results.rows = [dict(row, mAP=float(row['mAP']) - 30 * (row['seed'] == '0')) for row in results.rows]
    assert '| +0.2 ± 0.0 |' in render_item('Fig. 5', results)  # seed 0, 30 points lower, is missing in the first row


def test_points_are_compared_at_the_same_position(tmp_path):
    head, *cells = cells_of(render_item(MISSING_LABELS, write(tmp_path, MISSING_LABELS)))
    place = head.index('against CE, same point')
    assert [line[place] for line in cells] == [*[''] * 5, *['+0.5 ± 0.0'] * 5, *['+1.0 ± 0.0'] * 5]
    for item, count in (('Fig. 8', 3), ('Table 13', 2), *dict.fromkeys(OWN, 3).items()):
        labels = {row.label for row in rows(item, 'digits')}
        assert len({row.against for row in rows(item, 'digits')}) * count == len(labels)
        assert {row.against for row in rows(item, 'digits')} < labels


def test_missing_labels_stand_beside_the_scores(tmp_path):
    one = rows(MISSING_LABELS, 'digits')[3].trainings[0]
    write(tmp_path, MISSING_LABELS)
    write_rows(tmp_path / 'digits_missing.csv', [
        dict(config=one.config, options=one.overrides, seed=seed, p_missing=0.25, gradient_missing=12.34)
        for seed in range(2)])
    head, *cells = cells_of(render_item(MISSING_LABELS, Results(tmp_path, 'digits')))
    p, gradient = head.index('p of missing labels'), head.index('gradient on missing labels [%]')
    assert cells[3][p] == '0.25 ± 0.00' and cells[2][p] == ''
    assert cells[3][gradient] == '12.3 ± 0.0' and cells[3][head.index('seeds')] == '3'


def test_table_1_agrees_with_the_gradients(tmp_path):
    _, *cells = cells_of(render_item('Table 1', Results(tmp_path, 'real')))
    assert len(cells) == 4 and {cell for row in cells for cell in row[1:]} == {'+', '-'}
    assert all(row[1::2] == row[2::2] for row in cells)


@pytest.mark.parametrize('item', ['Fig. 5', 'Fig. 8'])  # lines, dots
def test_pictures_are_reproducible(item, tmp_path):
    paths = [tmp_path / 'a' / 'one.svg', tmp_path / 'again.svg']
    results = write(tmp_path, item)
    assert draw(item, results, paths[:1]) and draw(item, results, paths[1:])
    assert paths[0].stat().st_size > 5000 and paths[0].read_bytes() == paths[1].read_bytes()


def test_the_best_of_several_trainings(tmp_path):
    row = next(row for row in rows('Table 2', 'digits') if len(row.trainings) == 10)
    results = write(tmp_path, 'Table 2')
    assert best(row, results) == row.trainings[-1]
    results.rows = [one for one in results.rows if one['options'] != row.trainings[-1].overrides]
    assert best(row, results) == row.trainings[-2]
    results = write(tmp_path, 'Table 2', seeds=8)
    results.rows = [one for one in results.rows if one['seed'] == '7' or one['options'] != row.trainings[0].overrides]
    assert best(row, results) == row.trainings[-1]  # only the first has the best seed
    assert best(row, Results(tmp_path / 'none', 'digits')) == row.trainings[0]


def test_the_score_comes_first(tmp_path):
    """The paper's Table 3 has gamma_neg first; differences and the picture are of mAP."""
    head, _, second, *_ = cells_of(render_item('Table 3', write(tmp_path, 'Table 3', 'real')))
    against = head.index('against the first row')
    assert head.index('mAP') < against < head.index('final gamma_neg') and second[against] == '+0.1 ± 0.0'


def test_the_best_of_a_curve_stands_beside_the_best_of_the_paper(tmp_path):
    assert '| best, gamma_neg 4 | 0 | 81.2 ± 1.2 (gamma_pos=4.0, gamma_neg=4.0) |' in render_item(
        'Fig. 6', write(tmp_path, 'Fig. 6'))
    assert re.search(r'\| best, gamma 2 \|  \| 0.3 \| 0.4 \| \S+ ± 1.2 \(clip=0.4\)',
                     render_item('Fig. 7', write(tmp_path, 'Fig. 7')))


def test_measured_rows_are_rounded():
    origin = dict(commit='abc', date='2026-01-01', torch='2.11', device='CPU')
    text = rows_table([dict(a_b='1129.93', c='0.0087505', d='', e='100000', f='x') | origin])
    assert text == ('| a b | c | e | f |\n|---|---|---|---|\n| 1130 | 0.00875 | 100000 | x |\n\n'
                    'CPU, torch 2.11, commit abc, 2026-01-01.')


def test_the_committed_rows_are_those_of_the_configs():
    results = Results(ROOT / 'benchmarks' / 'paper', 'digits')
    trainings = {training for item in items('digits') for row in rows(item, 'digits') for training in row.trainings}
    assert results.rows and not [one.name for one in trainings if results.outdated(one)]
    assert all(row[name] for row in results.rows for name in ('commit', 'date', 'torch', 'device'))
    now = {(training.config, training.overrides): training.settings for training in trainings}
    assert all(row['settings'] == now[row['config'], row['options']] for row in results.missing_rows)
