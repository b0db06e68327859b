from pathlib import Path

import pytest
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from mmasl.datasets.nus_wide import CONCEPTS, NUSWide
from mmasl.errors import ConfigError, DataError

CLOUDS, PERSON, SKY, ZEBRA = (CONCEPTS.index(name) for name in ('clouds', 'person', 'sky', 'zebra'))
HEADER = 'filepath,label,split_name\n'
ROWS = """images/1.jpg,"['sky', 'clouds']",train
images/2.jpg,"[person]",val
images/3.jpg,[],train
images/4.jpg,"[zebra, person, sky]",train
images/5.jpg,['sky'],val
images/6.jpg,,train
"""


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / 'images').mkdir()
    for i in range(1, 7):
        Image.new('RGB', (8, 8), (i, i, i)).save(tmp_path / 'images' / f'{i}.jpg')
    save(tmp_path, HEADER + ROWS)
    return tmp_path


def save(root: Path, text: str) -> None:
    (root / 'nus_wid_data.csv').write_text(text)


def load(root: Path, split: str = 'train', **kwargs) -> NUSWide:
    return NUSWide(**dict(ann_file='nus_wid_data.csv', data_root=str(root), split=split) | kwargs)


def labels(dataset: NUSWide) -> list[tuple[str, list[int]]]:
    return [(Path(info['img_path']).stem, info['gt_label']) for info in map(dataset.get_data_info, range(len(dataset)))]


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    found = []
    for module in ('nus_wide', 'validation'):
        monkeypatch.setattr(f'mmasl.datasets.{module}.print_log', lambda message, *_: found.append(message))
    return found


def test_concepts():
    assert len(CONCEPTS) == 81 and sorted(set(CONCEPTS)) == list(CONCEPTS)


def test_labels_with_and_without_quotes(root):
    assert labels(load(root)) == [('1', [CLOUDS, SKY]), ('4', [PERSON, SKY, ZEBRA])]
    assert labels(load(root, 'val')) == [('2', [PERSON]), ('5', [SKY])]
    assert load(root).metainfo == dict(classes=CONCEPTS)
    assert load(root)[0]['img_path'] == str(root / 'images' / '1.jpg')
    assert load(root).get_cat_ids(1) == [PERSON, SKY, ZEBRA]


def test_keep_empty(root):
    assert labels(load(root, keep_empty=True)) == [('1', [CLOUDS, SKY]), ('3', []), ('4', [PERSON, SKY, ZEBRA]),
                                                   ('6', [])]


def test_columns_may_stand_in_another_order(root):
    save(root, 'split_name,id,filepath,label\ntrain,1,images/1.jpg,"[sky, sun]"\n')
    assert labels(load(root)) == [('1', [SKY, CONCEPTS.index('sun')])]


def test_file_paths_start_from_data_prefix(root):
    (root / 'images' / 'images').symlink_to(root / 'images')
    assert load(root, data_prefix='images')[0]['img_path'] == str(root / 'images' / 'images' / '1.jpg')


def test_other_classes_and_warnings(root, warnings):
    assert labels(load(root, classes=['zebra', 'sky', 'dog'])) == [('1', [1]), ('4', [0, 1])]
    path = root / 'nus_wid_data.csv'
    assert warnings == [f'{path} (train): 2 of 4 images have no label and are omitted',
                        f'{path} (train) has no image of 1 classes: dog',
                        f'{path} (train) has labels that were skipped, of 2 classes: clouds, person']


def test_from_a_config(root):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(dict(type='mmasl.NUSWide', ann_file='nus_wid_data.csv', data_root=str(root),
                                      split='val', pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
    assert dataset[0]['data_samples'].gt_label.tolist() == [PERSON]
    assert (dataset[0]['inputs'] == 2).all()


def test_a_row_that_is_cut_off_in_its_split(root, warnings):
    save(root, HEADER + ROWS + 'images/7.jpg,"[sky]",tra')
    assert len(load(root)) == 2
    assert warnings[0].endswith("has rows of the unknown splits ['tra']; check that it is not cut off")


# ----------------------------------------------------------------------------------------------------------- errors

def test_no_text(root):
    (root / 'nus_wid_data.csv').write_bytes(b'filepath,\xff\xfe')
    with pytest.raises(DataError, match='nus_wid_data.csv is not a text file .*Download'):
        load(root)


def test_missing_files(root):
    with pytest.raises(DataError, match=r'no annotation file .*other\.csv.*MODEL_ZOO.*digits'):
        load(root, ann_file='other.csv')
    (root / 'images' / '1.jpg').unlink()
    with pytest.raises(DataError, match=r'no image .*images/1\.jpg.*data_prefix.*digits'):
        load(root)


@pytest.mark.parametrize('text, message', [
    ('filepath,labels\n1.jpg,sky\n', r"lacks the columns \['label', 'split_name'\] and has \['filepath', 'labels'\]"),
    ('', r"lacks the columns \['filepath', 'label', 'split_name'\] and has None"),
    (HEADER + ROWS + 'images/7.jpg,[sky, sun],train\n', 'line 8: expected 3 columns. .* in double quotes'),
    (HEADER + ROWS + 'images/7.jpg,[sky]\n', 'line 8: expected 3 columns'),
    (HEADER + ROWS + 'images/2.jpg,[sky],train\n', "lists 'images/2.jpg' 2 times"),
    (HEADER + ROWS + 'images/7.jpg,"[sky, tram]",train\n',
     r"labels images/7.jpg with \['tram'\], which are not among the 81 concepts. .*metainfo=dict\(classes="),
    (HEADER + 'images/1.jpg,[],train\n', "No image of split 'train' in .* a label of the 81 classes. Correct"),
], ids=['columns', 'nothing', 'too many', 'too few', 'twice', 'unknown', 'no labels'])
def test_damaged_files(root, text, message):
    save(root, text)
    with pytest.raises(DataError, match=f'nus_wid_data.csv.*{message}' if 'No image' not in message else message):
        load(root)


def test_wrong_arguments(root):
    with pytest.raises(ConfigError, match=r"split='test' is not in .*nus_wid_data.csv; set one of \['train', 'val'\]"):
        load(root, 'test')
    with pytest.raises(ConfigError, match="classes has 'sky' 2 times"):
        load(root, classes=('sky', 'sun', 'sky'))
    with pytest.raises(DataError, match=r"No image .* of the 1 classes; the labels are \['clouds', 'person'"):
        load(root, classes=('Sky', ))
