"""Reading arrays of labels: embeddings for the heads, and .npz files of tools/label_graph.py."""
import os.path as osp
import zipfile
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmasl.errors import DataError


def read_npz(path: str, *keys: str, hint: str) -> list[np.ndarray]:
    """Read arrays of an .npz file.

    Args:
        path: The file; relative paths start at the working directory.
        *keys: Names of the arrays.
        hint: What to do, for the error messages.

    Returns:
        One array for each key.

    Raises:
        DataError: The file does not exist, is damaged, or lacks an array.
    """
    if not osp.isfile(path):
        raise DataError(f'There is no file {path}. {hint}')
    try:
        with np.load(path, allow_pickle=False) as content:
            return [content[key] for key in keys]
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f'{path} is not an .npz file with the arrays {list(keys)} ({error}). {hint}') from error


def load_label_embeddings(source: str | Sequence[Sequence[float]] | np.ndarray | Tensor, num_classes: int) -> Tensor:
    """Load one vector for each class. Nothing in a file is executed.

    Args:
        source: The vectors, or a file: .npy; .npz with ``embeddings``, as tools/label_graph.py --glove writes it; or
            any other suffix for a tensor written by ``torch.save``.
        num_classes: Number of classes C.

    Returns:
        float32 (C, d).

    Raises:
        DataError: The file does not exist, cannot be read, or does not hold C finite vectors.
    """
    where = 'label_embeddings'
    hint = 'Set model.head.label_embeddings to a file with one vector a class, in their order.'
    if isinstance(source, str):
        where = source
        if source.endswith('.npz'):
            source, = read_npz(source, 'embeddings', hint='Write it with tools/label_graph.py CONFIG --glove FILE.')
        elif not osp.isfile(source):
            raise DataError(f'There is no file of label embeddings {source}. {hint}')
        else:
            try:
                source = np.load(source, allow_pickle=False) if source.endswith('.npy') else torch.load(
                    source, map_location='cpu', weights_only=True)
            except Exception as error:  # foreign files make torch.load and np.load raise many types
                raise DataError(f'{where} cannot be read as an array or a tensor ({error}). {hint}') from error
    try:
        vectors = torch.as_tensor(source, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f'{where} is not an array of numbers ({error}). {hint}') from error
    if vectors.dim() != 2 or len(vectors) != num_classes:
        raise DataError(f'{where} has shape {tuple(vectors.shape)}, but num_classes={num_classes} requires '
                        f'({num_classes}, d). {hint}')
    if not vectors.isfinite().all():
        index = (~vectors.isfinite()).any(1).nonzero()[0].item()
        raise DataError(f'{where} is not finite for class {index}. {hint}')
    return vectors
