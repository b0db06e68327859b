"""The generated annotation files, what is measured on them, and that docs/scale.md shows it and adds up."""
import csv
import json
from pathlib import Path

import pytest

from benchmarks.speed import annotations, run

ROOT = Path(__file__).parents[2]
DOC = (ROOT / 'docs' / 'scale.md').read_text()


def test_coco_file(tmp_path):
    path = annotations.write_coco(tmp_path, 400)
    content = json.loads(path.read_text())
    assert len(content['images']) == 400 and 6 < len(content['annotations']) / 400 < 9
    assert 3500 < path.stat().st_size / 400 < 4500
    dataset = annotations.load_coco(path)
    assert 390 < len(dataset) <= 400 and len(dataset.metainfo['classes']) == 80


def test_open_images_file(tmp_path):
    path = annotations.write_open_images(tmp_path, 3000)
    with open(path, newline='') as file:
        rows = [(row['ImageID'], row['LabelName'], row['Confidence']) for row in csv.DictReader(file)]
    assert 6 < len(rows) / 3000 < 7 and {confidence for _, _, confidence in rows} == {'0', '1'}
    assert len({row[:2] for row in rows}) == len(rows), 'no label twice'
    dataset = annotations.load_open_images(path)
    assert len(dataset) == 3000 == len({image for image, *_ in rows}) and len(dataset.class_ids) == 9605
    names = dict(zip(dataset.class_ids, range(9605)))
    info = next(info for info in map(dataset.get_data_info, range(3000)) if info['img_id'] == rows[0][0])
    expected = {names[name]: float(value) for image, name, value in rows if image == rows[0][0]}
    assert {c: value for c, value in enumerate(info['gt_score'].tolist()) if value >= 0} == expected


@pytest.mark.parametrize('read, write', [('load_coco', annotations.write_coco),
                                         ('read_csv', annotations.write_open_images)], ids=['coco', 'csv'])
def test_cost(tmp_path, read, write):
    row = annotations.cost(read, str(write(tmp_path, 2000)), workers=False)
    assert 0 < row['cpu_seconds'] < 60 and row['seconds'] > 0
    if read == 'load_coco':
        assert 0.1 < row['index_mib'] < 1 < row['peak_mib'] < 200


ROWS = [dict(zip(('data', 'reader', 'images', 'file_mib', *annotations.COLUMNS), map(str, row))) for row in (
    ('COCO', 'mmasl.CocoMultiLabel', 100, 1, 1, 1, 10, 1, 20, 300), ('COCO', 'json.load', 100, 1, 1, 1, 9, '', '', ''),
    ('COCO', 'mmasl.CocoMultiLabel', 400, 4, 4, 4, 40, 4, '', ''),
    ('COCO', 'mmasl.CocoMultiLabel', 1600, 16, 17, 17, 160, 21, 21, 320),
    ('COCO', 'json.load', 1600, 16, 18, 18, 150, '', '', ''),
    ('Open Images', 'mmasl.OpenImages', 100, 1, 1, 1, 10, 1, 20, 300),
    ('Open Images', 'mmasl.OpenImages', 400, 4, 4, 4, 40, 4, '', ''),
    ('Open Images', 'mmasl.OpenImages', 1600, 16, 40, 40, 160, 21, 20, 320))]


def test_targets():
    reached = [reached for *_, reached in annotations.targets(ROWS)]
    #                  seconds, memory of json.load; COCO: linear twice, forked; Open Images: the same, and spawned
    assert reached == [True, False, True, True, True, False, True, True, False]


# --- the document

def test_the_document_shows_the_rows():
    current = run.render(DOC, ROOT / 'benchmarks' / 'speed')
    assert current == DOC, 'render docs/scale.md again'
    assert '9011219' in DOC and '**not reached**' not in DOC


def test_the_plan_adds_up():
    """The arithmetic of the last section, from its assumptions."""
    c, d, g, own, labels, flop, rate, shared, single = 100_000, 2048, 64, 64, 10, 24.6e9, 2500, 40e9, 320e9
    assert shared == pytest.approx(0.8 * 400e9 / 8) and single == 8 * shared
    n, ring, parameters = g * own, (g - 1) / g, c * d
    all_reduce, fsdp = 2 * ring * 4 * parameters, ring * (2 * 2 + 4) * parameters
    features = ring * n * d * (2 + 4)
    arithmetic, step = 6 * n * d * c / g, own / rate
    backward = 2 / 3 * step
    assert all_reduce / single < backward < all_reduce / shared, 'where it hides, and where it does not'
    assert all_reduce / features == pytest.approx(4 * c / (3 * n))
    for expected in (
            (f'| {16 * parameters / 1e6:,.0f} MB | {16 * parameters / g / 1e6:.0f} MB and the gathered '
             f'{2 * parameters / 1e6:.0f} MB | {16 * parameters / g / 1e6:.0f} MB |'),
            f'all-reduce of the gradient: {all_reduce / 1e6:,.0f} MB', f'reduce-scatter: {fsdp / 1e6:,.0f} MB',
            f'all-gather and reduce-scatter: {features / 1e6:.1f} MB', f'| {8 * n * labels / 1e6:.1f} MB |',
            *(f'one link per {name} | {1e3 * all_reduce / speed:.1f} ms | {1e3 * fsdp / speed:.1f} ms | '
              f'{1e3 * features / speed:.1f} ms |' for name, speed in (('machine', shared), ('GPU', single))),
            f'{own * c * 4 / 1e6:.1f} MB | {own * c * 4 / 1e6:.1f} MB | {n * c / g * 4 / 1e6:.1f} MB |',
            f'| {arithmetic / 1e9:.0f} GFLOP |',
            f'the backbone takes {1e3 * step:.1f} ms', f'its backward pass of {1e3 * backward:.1f} ms',
            f'{28 * parameters / 1e9:.1f} GB per step, {1e3 * 28 * parameters / 4e12:.1f} ms at 4 TB/s',
            (f'at least {1e3 * (step - backward + all_reduce / shared):.1f} ms with DDP, and '
             f'{1e3 * (step + features / shared):.1f} ms with'),
            f'At 1,000,000 labels the {16 * 10 * parameters / 1e9:.0f} GB of state',
            f'here {all_reduce / features:.0f} : 1', f'{4 * n * c / 1e6:,.0f} MB in float32',
            f'64 samples in float32 is {4 * own * c / 1e6:.1f} MB',
            f'256 classes at a time, each copy in the loss takes {4 * n * 256 / 1e6:.1f} MB',
            f'All classes cost {100 * arithmetic / (own * flop):.1f} %',
            f'images are {2 * 1e5 * c / 1e9:.0f} GB',
            f'{2 * 1e5 * c / g / 1e6:.1f} MB a GPU', f'sends {ring * 2 * 1e5 * c / g / 1e6:.0f} MB a GPU',
            f'{1e5 * 3 * g * 8 / 1e6:.0f} MB for all', f'`fc.weight` of {4 * parameters / 1e6:.0f} MB'):
        assert ' '.join(expected.split()) in ' '.join(DOC.split())
