"""tools/label_graph.py: its counts, word vectors and refusals."""
import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config

from mmasl.datasets.digits import DigitScenes
from mmasl.models.heads.label_graph_head import LabelGraphHead
from tools import label_graph

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'configs/digits/resnet_label_graph_asl_digits.py'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    return DigitScenes(train=30, val=1, colors=1, size=96).write(tmp_path_factory.mktemp('data') / 'digits')


def run(*argv, config=CONFIG):
    label_graph.main([str(config), *map(str, argv)])


def data(root):
    return '--cfg-options', f'train_dataloader.dataset.data_root={root}'


def test_counts_are_those_of_the_annotations(digits, capsys):
    run('--out', 'made/graph.npz', *data(digits))
    content = json.loads((digits / 'annotations' / 'instances_train.json').read_text())
    place = {category['id']: i for i, category in enumerate(content['categories'])}
    expected = np.zeros((10, 10), int)
    for image in content['images']:
        labels = {place[ann['category_id']] for ann in content['annotations'] if ann['image_id'] == image['id']}
        for i in labels:
            for j in labels:
                expected[i, j] += 1
    with np.load('made/graph.npz') as made:
        assert set(made) == {'classes', 'cooccurrence'}
        np.testing.assert_array_equal(made['cooccurrence'], expected)
        assert made['classes'].tolist() == [category['name'] for category in content['categories']]
    printed = capsys.readouterr().out
    assert '30 images, 10 classes' in printed and 'made/graph.npz: classes, cooccurrence' in printed
    shared = expected - np.diag(expected.diagonal())
    assert f'= {(shared / expected.diagonal()[:, None]).max():.2f} ' in printed
    LabelGraphHead(10, 8, graph='made/graph.npz')


def test_word_vectors(digits):
    words = {'red': [1., 0.], **{str(n): [0., n] for n in range(10)}, 'other': [9., 9.]}
    Path('glove.txt').write_text(''.join(f'{word} {a} {b}\n' for word, (a, b) in words.items()))
    run('--out', 'graph.npz', '--glove', 'glove.txt', *data(digits))
    with np.load('graph.npz') as made:
        np.testing.assert_array_equal(made['embeddings'], [[0.5, n / 2] for n in range(10)])
    head = LabelGraphHead(10, 8, graph='graph.npz', label_embeddings='graph.npz')
    assert head.layers[0].in_features == 2


def refusal(*args, **kwargs) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*args, **kwargs)
    return str(stop.value.code)


def test_tool_refusals(digits):
    assert 'graph.txt does not end in .npz' in refusal('--out', 'graph.txt', *data(digits))
    assert 'No such file of word vectors: gone.txt' in refusal('--glove', 'gone.txt', *data(digits))
    assert 'Missing data' in refusal(*data('nowhere'))
    other = ROOT / 'configs/digits/resnet_asl_digits.py'
    assert 'has no model.head.graph; name the output' in refusal(*data(digits), config=other)
    assert 'No such config: gone.py' in refusal(config='gone.py')
    ragged = 'red 1\n' + ''.join(f'{n} 1 2\n' for n in range(10))
    for text, message in (('red 1 2\n', 'no vector for 10 words of class names: 0, 1'),
                          ('red 1 x\n', 'line 1: could not'), (ragged, 'vectors of [1, 2] numbers')):
        Path('glove.txt').write_text(text)
        assert message in refusal('--out', 'g.npz', '--glove', 'glove.txt', *data(digits))
        assert not Path('g.npz').exists()
    glyphs = DigitScenes(train=12, val=1, size=32, single=True, labels_per_image=1).write('glyphs')
    single = ROOT / 'configs/digits/resnet_ce_glyphs.py'
    assert 'None of the 12 training images of' in refusal(
        '--out', 'g.npz', *data(glyphs), config=single)


def test_config_and_tool_meet(digits):
    """By default the tool writes where the config reads."""
    run(*data(digits))
    assert Path(Config.fromfile(CONFIG).model.head.graph).is_file()
