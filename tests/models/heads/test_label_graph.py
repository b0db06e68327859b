"""ML-GCN against its equations in loops, and the names and shapes of the published weights."""
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mmasl.errors import ConfigError, DataError
from mmasl.models.heads.label_graph_head import LabelGraphHead, adjacency, load_cooccurrence


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
    with pytest.raises(DataError, match='There is no file gone.npz. .* tools/label_graph.py CONFIG'):
        build('gone.npz')
    with pytest.raises(DataError, match=r'big.npz has 7 classes \(c0, c1, c2, ...\), but num_classes=6. Write it'):
        build(write('big.npz', torch.eye(7)))
    np.savez('words.npz', embeddings=np.eye(6))
    with pytest.raises(DataError, match=r"words.npz is not an .npz file with the arrays \['classes', 'cooccurrence'\]"):
        build('words.npz')
    Path('text.npz').write_text('no archive')
    np.savez('object.npz', classes=np.array(list('abcdef')), cooccurrence=np.array([{}], object))
    for path in ('text.npz', 'object.npz'):
        with pytest.raises(DataError, match=f'{path} is not an .npz file'):
            build(path)
    asymmetric, beyond, negative = counts(), counts(), counts()
    asymmetric[0, 1] += 1
    beyond[0, 1] = beyond[1, 0] = 99
    negative[0, 1] = negative[1, 0] = -1
    for wrong in (asymmetric, beyond, negative, counts()[:, :5]):
        with pytest.raises(DataError, match='bad.npz is not a symmetric count'):
            load_cooccurrence(write('bad.npz', wrong), 6)


@pytest.mark.parametrize('kwargs, message', [
    (dict(threshold=0), 'threshold=0 is out of range'), (dict(threshold=1.1), 'threshold=1.1 is out'),
    (dict(neighbor_weight=1), 'neighbor_weight=1 is out of range'),
    (dict(label_embeddings=[[1.]]), r'shape \(1, 1\), but num_classes=6')], ids=['zero', 'above', 'p', 'embeddings'])
def test_arguments(kwargs, message):
    with pytest.raises((ConfigError, DataError), match=message):
        build(**kwargs)
