"""ML-GCN against its equations in loops, the names and shapes of the published weights, and the tool that counts."""
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch.testing import assert_close

from mmasl.datasets.digits import DigitScenes
from mmasl.models.heads.label_graph_head import LabelGraphHead, adjacency, load_cooccurrence

ROOT = Path(__file__).parents[3]
spec = spec_from_file_location('tools_label_graph', ROOT / 'tools' / 'label_graph.py')
TOOL = module_from_spec(spec)
spec.loader.exec_module(TOOL)
CONFIG = ROOT / 'configs/digits/resnet_label_graph_asl_digits.py'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def counts(classes=6, images=60, seed=0):
    labels = torch.rand(images, classes, generator=torch.Generator().manual_seed(seed)) < 0.45
    labels[:, -1] = False  # a class without an image
    labels = labels.double()
    return labels.T @ labels


def write(path='graph.npz', cooccurrence=None, **arrays):
    cooccurrence = counts() if cooccurrence is None else cooccurrence
    np.savez(path, **dict(classes=np.array([f'c{i}' for i in range(len(cooccurrence))]),
                          cooccurrence=np.asarray(cooccurrence).astype(np.int64)) | arrays)
    return path


def build(graph=None, **kwargs):
    torch.manual_seed(0)
    return LabelGraphHead(6, 8, graph=graph or write(), **dict(hidden_channels=5) | kwargs)


# --- the equations

def adjacency_in_loops(cooccurrence, threshold, p):
    count = cooccurrence.tolist()
    size = range(len(count))
    edges = [[1. if count[i][i] and count[i][j] / count[i][i] >= threshold and i != j else 0. for j in size]
             for i in size]
    weights = [[1 - p if i == j else edges[i][j] * p / (sum(edges[i]) or 1) for j in size] for i in size]
    degree = [sum(row) for row in weights]
    return torch.tensor([[degree[i]**-0.5 * weights[i][j] * degree[j]**-0.5 for j in size] for i in size])


@pytest.mark.parametrize('threshold, p', [(0.4, 0.2), (0.45, 0.25), (0.5, 0.), (1., 0.9)], ids=str)
def test_adjacency(threshold, p):
    actual = adjacency(counts(), threshold, p)
    assert actual.dtype == torch.float32
    assert_close(actual, adjacency_in_loops(counts(), threshold, p), rtol=1e-6, atol=1e-7)


def test_adjacency_is_directed_and_its_limits():
    """'surfboard' implies 'person', and not the other way round."""
    graph = adjacency(torch.tensor([[100, 9, 0], [9, 10, 0], [0, 0, 0]]), 0.4, 0.2)
    assert graph[1, 0] > 0 and graph[0, 1] == 0
    assert_close(graph.diagonal()[[0, 2]], torch.ones(2))  # without neighbors, a label is its own
    assert_close(adjacency(counts(), 0.4, 0.), torch.eye(6))
    assert_close(adjacency(counts(), 1., 0.2), torch.eye(6))  # no certain pair
    exact = torch.tensor([[5, 2], [2, 5]])  # at the threshold is an edge
    assert adjacency(exact, 0.4, 0.2)[0, 1] > 0


def test_published_p_is_the_papers():
    """0.25 and a diagonal of 1, as the published code has it, are 0.2 and 0.8: the factor is normalised away."""
    cooccurrence = counts()
    edges = (adjacency_in_loops(cooccurrence, 0.4, 0.2) > 0).double().fill_diagonal_(0)
    assert edges.any() and not edges.all()
    weights = 0.25 * edges / edges.sum(1, keepdim=True).clamp(min=1) + torch.eye(6)
    scale = weights.sum(1)**-0.5
    assert_close(adjacency(cooccurrence, 0.4, 0.2), (scale[:, None] * weights * scale).float())


@pytest.mark.parametrize('width', [None, 3], ids=['one-hot', 'embeddings'])
@torch.no_grad()
def test_equations(width):
    vectors = None if width is None else torch.randn(6, width)
    head, maps = build(label_embeddings=vectors), torch.randn(2, 8, 2, 3)
    vectors = torch.eye(6) if vectors is None else vectors
    graph = adjacency_in_loops(counts(), 0.4, 0.2)
    first, second = (layer.weight for layer in head.layers)
    hidden = [sum(graph[i, j] * (first @ vectors[j]) for j in range(6)) for i in range(6)]
    hidden = [torch.where(x > 0, x, 0.2 * x) for x in hidden]
    classifiers = [sum(graph[i, j] * (second @ hidden[j]) for j in range(6)) for i in range(6)]
    expected = [[sum(classifier[c] * image[c].max() for c in range(8)) for classifier in classifiers] for image in maps]
    assert_close(head((maps, )), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_parameters():
    """Two layers of (300, 1024) and (1024, 2048) on ResNet-101, and nothing else."""
    write('large.npz', torch.eye(80))
    head = LabelGraphHead(80, 2048, graph='large.npz', label_embeddings=torch.zeros(80, 300))
    assert sum(value.numel() for value in head.parameters()) == 300 * 1024 + 1024 * 2048 == 2_404_352
    assert set(head.state_dict()) == {'label_embeddings', 'adjacency', 'layers.0.weight', 'layers.1.weight'}


@torch.no_grad()
def test_official_weights():
    """With the graph that they bring: the published code multiplies by (A D)^T D."""
    vectors, maps = torch.randn(6, 3), torch.randn(2, 8, 2, 3)
    state = {'gc1.weight': torch.randn(3, 5), 'gc2.weight': torch.randn(5, 8), 'A': torch.rand(6, 6) + torch.eye(6)}
    head = build(label_embeddings=vectors)
    incompatible = head.load_state_dict(state | {'features.0.weight': torch.zeros(1)}, strict=False)
    assert incompatible.missing_keys == ['label_embeddings']  # they lie in a file of their own
    assert incompatible.unexpected_keys == ['features.0.weight']
    degree = torch.diag(state['A'].sum(1)**-0.5)
    graph = (state['A'] @ degree).T @ degree
    hidden = torch.nn.functional.leaky_relu(graph @ (vectors @ state['gc1.weight']), 0.2)
    classifiers = graph @ (hidden @ state['gc2.weight'])
    assert_close(head((maps, )), maps.amax((2, 3)) @ classifiers.T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_checkpoint_brings_its_graph():
    head, maps = build(), torch.randn(2, 8, 2, 3)
    other = build(write('other.npz', counts(seed=1)))
    assert not other.adjacency.equal(head.adjacency)
    other.load_state_dict(head.state_dict(), strict=True)
    assert_close(other((maps, )), head((maps, )), rtol=0, atol=0)


# --- refusals

def test_graph_that_is_none():
    with pytest.raises(FileNotFoundError, match='There is no file gone.npz .* tools/label_graph.py CONFIG'):
        build('gone.npz')
    with pytest.raises(ValueError, match=r'big.npz is of 7 classes \(c0, c1, c2, ...\), and num_classes=6: make it'):
        build(write('big.npz', torch.eye(7)))
    np.savez('words.npz', embeddings=np.eye(6))
    with pytest.raises(ValueError, match=r"words.npz is no .npz file with the arrays \['classes', 'cooccurrence'\]"):
        build('words.npz')
    Path('text.npz').write_text('no archive')
    np.savez('object.npz', classes=np.array(list('abcdef')), cooccurrence=np.array([{}], object))
    for path in ('text.npz', 'object.npz'):
        with pytest.raises(ValueError, match=f'{path} is no .npz file'):
            build(path)
    asymmetric, beyond, negative = counts(), counts(), counts()
    asymmetric[0, 1] += 1
    beyond[0, 1] = beyond[1, 0] = 99
    negative[0, 1] = negative[1, 0] = -1
    for wrong in (asymmetric, beyond, negative, counts()[:, :5]):
        with pytest.raises(ValueError, match='bad.npz is no symmetric count'):
            load_cooccurrence(write('bad.npz', wrong), 6)


@pytest.mark.parametrize('kwargs, message', [
    (dict(threshold=0), 'threshold=0 must be above 0'), (dict(threshold=1.1), 'threshold=1.1 must'),
    (dict(neighbor_weight=1), r'neighbor_weight=1 must be in \[0, 1\)'),
    (dict(label_embeddings=[[1.]]), r'shape \(1, 1\), but num_classes=6')], ids=['zero', 'above', 'p', 'embeddings'])
def test_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


# --- the tool

@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    return DigitScenes(train=30, val=1, colors=1, size=96).write(tmp_path_factory.mktemp('data') / 'digits')


def run(monkeypatch, *argv, config=CONFIG):
    monkeypatch.setattr(sys, 'argv', ['label_graph.py', str(config), *map(str, argv)])
    TOOL.main()


def data(root):
    return '--cfg-options', f'train_dataloader.dataset.data_root={root}'


def test_counts_are_those_of_the_annotations(digits, monkeypatch, capsys):
    import json
    run(monkeypatch, '--out', 'made/graph.npz', *data(digits))
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


def test_word_vectors(digits, monkeypatch):
    words = {'red': [1., 0.], **{str(n): [0., n] for n in range(10)}, 'other': [9., 9.]}
    Path('glove.txt').write_text(''.join(f'{word} {a} {b}\n' for word, (a, b) in words.items()))
    run(monkeypatch, '--out', 'graph.npz', '--glove', 'glove.txt', *data(digits))
    with np.load('graph.npz') as made:
        np.testing.assert_array_equal(made['embeddings'], [[0.5, n / 2] for n in range(10)])
    head = LabelGraphHead(10, 8, graph='graph.npz', label_embeddings='graph.npz')
    assert head.layers[0].in_features == 2


def refusal(*args, **kwargs) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*args, **kwargs)
    return str(stop.value.code)


def test_tool_refusals(digits, monkeypatch):
    assert 'graph.txt: the graph is written to an .npz' in refusal(monkeypatch, '--out', 'graph.txt', *data(digits))
    assert 'No such file of word vectors: gone.txt' in refusal(monkeypatch, '--glove', 'gone.txt', *data(digits))
    assert 'Missing data' in refusal(monkeypatch, *data('nowhere'))
    other = ROOT / 'configs/digits/resnet_asl_digits.py'
    assert 'no model.head.graph: say where to write' in refusal(monkeypatch, *data(digits), config=other)
    assert 'No such config: gone.py' in refusal(monkeypatch, config='gone.py')
    ragged = 'red 1\n' + ''.join(f'{n} 1 2\n' for n in range(10))
    for text, message in (('red 1 2\n', 'no vector for 10 words of class names: 0, 1'),
                          ('red 1 x\n', 'line 1: could not'), (ragged, 'vectors of [1, 2] numbers')):
        Path('glove.txt').write_text(text)
        assert message in refusal(monkeypatch, '--out', 'g.npz', '--glove', 'glove.txt', *data(digits))
        assert not Path('g.npz').exists()
    glyphs = DigitScenes(train=12, val=1, size=32, single=True, labels_per_image=1).write('glyphs')
    single = ROOT / 'configs/digits/resnet_ce_glyphs.py'
    assert 'None of the 12 training images of' in refusal(
        monkeypatch, '--out', 'g.npz', *data(glyphs), config=single)


def test_config_and_tool_meet(digits, monkeypatch):
    """By default the tool writes where the config reads."""
    run(monkeypatch, *data(digits))
    assert Path(Config.fromfile(CONFIG).model.head.graph).is_file()
