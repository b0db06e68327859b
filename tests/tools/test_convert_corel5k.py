"""tools/convert_corel5k.py: its annotations as MMPretrain reads them, and refusals."""
from pathlib import Path

import pytest
from mmpretrain.datasets import MultiLabelDataset

from tools import convert_corel5k


@pytest.fixture
def copy(tmp_path) -> Path:
    """A public copy with two images each; '20' is listed twice, and numbers are padded with 0."""
    files = {'labels/words': 'city\nsky\nsun\n', 'labels/training_label': '10 1 3 0 \n11 2\n',
             'labels/test_label': '20 3 2 \n\n21 0\n20 1 3 \n'}
    files |= {f'{split}_jpeg/{name}.jpeg': name for split, names in (('train', (10, 11)), ('test', (20, 21)))
              for name in names}
    for name, text in files.items():
        (tmp_path / 'copy' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'copy' / name).write_text(str(text))
    return tmp_path / 'copy'


def run(copy: Path) -> Path:
    convert_corel5k.main([str(copy), str(copy.with_name('root'))])
    return copy.with_name('root')


def test_mmpretrain_reads_the_annotations(copy):
    root = run(copy)
    for split, expected in (('train', {'10': [0, 2], '11': [1]}), ('test', {'20': [0, 1, 2], '21': []})):
        dataset = MultiLabelDataset(f'annotations/{split}.json', data_root=str(root), data_prefix='images')
        assert dataset.metainfo['classes'] == ['city', 'sky', 'sun']
        found = [dataset.get_data_info(i) for i in range(len(dataset))]
        assert {Path(info['img_path']).stem: info['gt_label'] for info in found} == expected
        assert [Path(info['img_path']).read_text() for info in found] == list(expected)


@pytest.mark.parametrize('change, message', (
    (lambda copy: (copy / 'labels/words').unlink(), 'labels/words does not exist'),
    (lambda copy: (copy / 'train_jpeg/10.jpeg').unlink(), '1 of 4 images are missing, as .*/train_jpeg/10.jpeg'),
    (lambda copy: (copy / 'labels/test_label').write_text('20 1\n21 4\n'), "test_label, line 2: '21 4' must be"),
    (lambda copy: (copy / 'labels/test_label').write_text('20 -1\n'), "test_label, line 1: '20 -1' must be")))
def test_refusals(copy, change, message):
    change(copy)
    with pytest.raises(SystemExit, match=message):
        run(copy)
    assert not copy.with_name('root').exists()
