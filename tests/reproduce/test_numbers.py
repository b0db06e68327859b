"""The paper's numbers against a second, independent entry, and the arithmetic behind the footnotes.

The data file was typed from the paper. A script that did not read the file made the second entry from the paper's text.
Both agree in all cells. Only the checksums of the second entry are kept, so that both cannot be edited alike.
"""
import hashlib
import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest

from mmasl.reproduce import FOOTNOTES, Entry, figure, load, numbers, table

FIELDS = ('row', 'column', 'value', 'source', 'gamma_pos', 'gamma_neg', 'clip', 'input_size', 'backbone', 'pretrain',
          'target')

# Item -> number of cells, and SHA-256 of the second entry: a line per cell, the fields above separated by tabs.
SECOND_ENTRY = {
    'Table 1': (16, '5aab9b7ffb7cb83a'),
    'Table 2': (5, '8a187032c6aae34a'),
    'Table 3': (8, 'c07d25a89e64b347'),
    'Table 4': (21, '8d7c3a9b8fd2d1ae'),
    'Table 5': (3, 'da4f5ee3bc7c0a53'),
    'Table 6': (14, '36f63f3529da397d'),
    'Table 7': (6, '27f91f1a8c5fe870'),
    'Table 8': (78, '320134fc21febb5e'),
    'Table 9': (6, '2ea6c49697aa94bd'),
    'Table 10': (18, '62c24491264a1d93'),
    'Table 11': (9, '60c6b087299c11e0'),
    'Table 12': (2, 'f3e9ca67f95a5a19'),
    'Table 13': (2, '17aa8f857e097199'),
    'Fig. 2': (3, '13b3f3cb8f890964'),
    'Fig. 3': (4, '71b559a9bfd6ff9a'),
    'Fig. 4': (9, '071c3c0adfbff520'),
    'Fig. 5': (3, '5e0996d1020dd92b'),
    'Fig. 6': (4, '0a4fae324cf5096c'),
    'Fig. 7': (15, '0d2970c178d49f60'),
    'Fig. 8': (9, '73310e3250ff2857'),
    'Fig. 9': (2, '7f82194116dca3ec'),
}


def checksum(entries: list[Entry]) -> str:
    def text(value: object) -> str:
        if value is None or isinstance(value, bool):
            return '+' if value else '-'
        return value if isinstance(value, str) else f'{value:g}'
    lines = ['\t'.join(text(getattr(entry, field)) for field in FIELDS) for entry in entries]
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]


def cell(entries: list[Entry], row: str, column: str) -> Entry:
    found, = (entry for entry in entries if (entry.row, entry.column) == (row, column))
    return found


def marked(key: str) -> set[tuple[str, str, str]]:
    return {(entry.item, entry.row, entry.column) for entry in load() if key in entry.footnotes}


# --- the numbers

def test_items():
    assert list(dict.fromkeys(entry.item for entry in load())) == list(SECOND_ENTRY)


@pytest.mark.parametrize('item', SECOND_ENTRY)
def test_both_entries_agree(item):
    kind, number = item.split()
    entries = table(int(number)) if kind == 'Table' else figure(int(number))
    assert (len(entries), checksum(entries)) == SECOND_ENTRY[item]
    assert entries == [entry for entry in load() if entry.item == item]


@pytest.mark.parametrize('field', FIELDS)
def test_checksum_sees_every_field(field):
    entries = table(8)
    value = getattr(entries[-1], field)
    entries[-1] = replace(entries[-1], **{field: value + '.' if isinstance(value, str) else (value or 0.) + 0.1})
    assert checksum(entries) != SECOND_ENTRY['Table 8'][1]


def test_no_cell_twice():
    keys = [(entry.item, entry.row, entry.column) for entry in load()]
    assert sorted(set(keys)) == sorted(keys)


def test_no_key_twice_in_the_file():
    def unique(pairs: list[tuple[str, object]]) -> dict:
        keys = [key for key, _ in pairs]
        assert sorted(set(keys)) == sorted(keys)
        return dict(pairs)
    json.loads(numbers.DATA.read_text(), object_pairs_hook=unique)


def test_cited_rows_name_their_reference_and_own_rows_their_loss():
    assert {entry.source for entry in load()} == {'ours', 'cited'}
    for entry in load():
        if entry.source == 'cited':
            assert entry.row.endswith(']') and entry.loss is None
        else:
            assert entry.loss is not None


def test_stated_where_there_is_a_number():
    assert all((entry.value is None) == (entry.stated == '') for entry in load())
    assert all(entry.stated == entry.item for entry in load() if entry.item.startswith('Table') and entry.stated)


def test_what_figures_take_from_tables():
    taken = [entry for entry in load() if entry.item.startswith('Fig.') and entry.stated.startswith('Table')]
    assert {(entry.item, entry.stated) for entry in taken} == {('Fig. 7', 'Table 2'), ('Fig. 8', 'Table 2'),
                                                               ('Fig. 8', 'Table 4')}
    for entry in taken:
        assert entry.value in [other.value for other in table(int(entry.stated.split()[1]))]
    assert cell(figure(9), 'target 0.1', 'gamma_neg final').value == cell(table(3), '0.1', 'gamma_neg Final').value


def test_unknown_items():
    with pytest.raises(ValueError, match='no numbers for Table 14. Choose one of Table 1, .* Fig. 9'):
        table(14)
    with pytest.raises(ValueError, match='no numbers for Fig. 1'):
        figure(1)


# --- what is printed twice

def test_table_4_is_part_of_table_8():
    shared = {entry.row for entry in table(4)} & {entry.row for entry in table(8)}
    assert len(shared) == 6
    for row, column in itertools.product(shared, ('mAP', 'CF1', 'OF1')):
        assert cell(table(4), row, column).value == cell(table(8), row, f'All {column}').value


@pytest.mark.parametrize('first, second, rows', [
    (6, 9, ('ASL (TResNet-L)', 'ASL')),
    (10, 11, ('ASL (TResNet-L)', 'ASL (Ours)')),
])
def test_the_same_model_in_two_tables(first, second, rows):
    one, other = ([(entry.column, entry.value, entry.gamma_neg, entry.pretrain) for entry in table(number)
                   if entry.row == row] for number, row in zip((first, second), rows))
    assert one == other and len(one) > 1


def test_best_coco_score_stands_in_five_places():
    best = [entry for entry in load() if entry.dataset == 'MS-COCO' and entry.value == 86.6]
    assert {entry.item for entry in best} == {'Table 2', 'Table 4', 'Table 5', 'Table 8', 'Fig. 8'}
    assert {(entry.gamma_pos, entry.gamma_neg, entry.clip, entry.backbone) for entry in best} == {
        (0, 4, 0.05, 'TResNet-L')}


# --- footnotes

def test_every_footnote_is_used_and_every_mark_has_one():
    assert {key for entry in load() for key in entry.footnotes} == set(FOOTNOTES)
    for item, content in json.loads(numbers.DATA.read_text()).items():
        for key in content.get('footnotes', ()):
            assert any(name == item for name, _, _ in marked(key)), f'{key} of {item} marks no cell'


def test_how_many_cells_each_footnote_marks():
    assert Counter(key for entry in load() for key in entry.footnotes) == {
        'kssnet': 2, 'kssnet-source': 3 + 13, 'of1': 2, 'top3': 6, 'focal-gamma': 3, 'adaptive': 8 + 2,
        'gap-setting': 3, 'architecture': 2, 'model-zoo': 1, 'voc-zoo': 2, 'average': 6, 'open-images': 6,
        'nus-resolution': 2, 'herbarium': 2, 'detection': 2}


def test_f1_is_the_harmonic_mean_but_for_the_two_footnotes():
    def f1(precision: float, recall: float) -> float:
        return 2 * precision * recall / (precision + recall)
    entries, wrong = table(8), {}
    for row, group, kind in itertools.product(dict.fromkeys(entry.row for entry in entries), ('All', 'Top 3'), 'CO'):
        precision, recall, printed = (cell(entries, row, f'{group} {kind}{name}').value for name in ('P', 'R', 'F1'))
        # All three are rounded to 0.05, and F1 rises with both of the others.
        if printed is not None and not (f1(precision - 0.05, recall - 0.05) <= printed + 0.05
                                        and printed - 0.05 <= f1(precision + 0.05, recall + 0.05)):
            wrong['Table 8', row, f'{group} {kind}F1'] = f1(precision, recall)
    kssnet, asl = ('Table 8', 'KSSNet [21]', 'All CF1'), ('Table 8', 'ASL (TResNet-L)', 'All OF1')
    assert set(wrong) == {kssnet, asl}
    assert marked('kssnet') == {kssnet, ('Table 4', 'KSSNet [21]', 'CF1')}
    assert marked('of1') == {asl, ('Table 4', 'ASL (TResNet-L)', 'OF1')}
    assert f'give {wrong[kssnet]:.1f}' in FOOTNOTES['kssnet'] and f'give {wrong[asl]:.1f}' in FOOTNOTES['of1']


def test_of1_of_the_weaker_model_is_higher():
    weak, strong = ({column: cell(table(4), row, column).value for column in ('mAP', 'OF1')}
                    for row in ('ASL (ResNet101)', 'ASL (TResNet-L)'))
    assert weak['mAP'] < strong['mAP'] and weak['OF1'] > strong['OF1']
    assert f'ResNet101 has {weak["OF1"]}' in FOOTNOTES['of1'] and f'Printed OF1 {strong["OF1"]}' in FOOTNOTES['of1']


def test_top3_predicts_fewer_than_three():
    recall, precision = (cell(table(8), 'ASL (TResNet-L)', f'Top 3 {name}').value for name in ('OR', 'OP'))
    # Right predictions an image: recall x labels = precision x predictions; Sec. 4.1.1 has 2.9 labels an image.
    predictions = recall * 2.9 / precision
    assert predictions < 3 and f'{predictions:.1f} predictions per image' in FOOTNOTES['top3']
    assert f'OP {precision} and OR {recall}' in FOOTNOTES['top3']


def test_gap_setting_is_nobody_elses():
    setting, = {(entry.gamma_pos, entry.gamma_neg, entry.clip) for entry in load() if 'gap-setting' in entry.footnotes}
    assert setting == (0, 2, 0.2)
    assert setting not in {(entry.gamma_pos, entry.gamma_neg, entry.clip) for entry in load()
                           if entry.item.startswith('Table')}


def test_gains_that_footnotes_quote():
    rows = [entry.value for entry in table(5)]
    assert f'{rows[1] - rows[0]:.1f} points' in FOOTNOTES['architecture'] and f'{rows[1]}' in FOOTNOTES['model-zoo']
    focal, asl = table(13)
    assert f'{asl.value - focal.value:.1f} points' in FOOTNOTES['detection']
    assert {entry.value for entry in load() if 'focal-gamma' in entry.footnotes} == {85.1}
    assert marked('focal-gamma') == {('Table 2', 'FL', 'mAP'), ('Fig. 5', 'best, gamma 2 to 4', 'mAP'),
                                     ('Fig. 8', 'Focal loss', 'TResNet-L')}
    assert {entry.value for entry in load() if 'nus-resolution' in entry.footnotes} == {65.2}
    assert all(text in FOOTNOTES['nus-resolution'] for text in ('65.2 at 240', '64.0 at 448'))


def test_no_margin_where_the_paper_states_none():
    open_ended = {entry.item for entry in load() if entry.item.startswith('Table') and entry.loss == 'ASL'
                  and entry.value is not None and entry.clip is None}
    assert open_ended == {'Table 1', 'Table 7', 'Table 12', 'Table 13'}
    assert all('margin' in FOOTNOTES[key] for key in ('open-images', 'herbarium', 'detection'))
