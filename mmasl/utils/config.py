"""What the dicts of a config mean: the class of a ``type``, the data sets inside wrappers, and lists in text files."""
import os.path as osp
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS, Registry


def resolve_type(kind: Any, registry: Registry, scope: str | None = None) -> Any:
    """Find the class that a ``type`` of a config names, as MMEngine does when it builds the dict.

    Args:
        kind: A name with or without scope, a dotted path, or the class itself, as in pure Python configs.
        registry: MMEngine's registry of the kind.
        scope: ``default_scope`` of the config; None for the current one.

    Returns:
        The class or function; None if nothing of this name is registered.
    """
    if not isinstance(kind, str):
        return kind
    try:
        with registry.switch_scope_and_registry(scope) as found:
            return found.get(kind)
    except Exception:  # of many kinds; MMEngine reports it when it builds the dict
        return None


def is_kind(kind: Any, base: type | tuple[type, ...], registry: Registry, scope: str | None = None) -> bool:
    """Whether a ``type`` of a config is one of some classes, or a class derived from one.

    Args:
        kind: See :func:`resolve_type`.
        base: The class or classes.
        registry: MMEngine's registry of the kind.
        scope: ``default_scope`` of the config; None for the current one.
    """
    found = resolve_type(kind, registry, scope)
    return isinstance(found, type) and issubclass(found, base)


def iter_dataset_configs(dataset: dict, key: str, scope: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield key and config of the data sets inside wrappers, or of the data set itself.

    A wrapper is a config that contains configs of data sets under any key, alone or in a list.

    Args:
        dataset: Config of a data set.
        key: Its key, such as 'train_dataloader.dataset'.
        scope: ``default_scope`` of the config; None for the current one.
    """
    inner = [(f'{key}.{path}', value) for path, value in _dicts(dataset) if _is_dataset(path, value, scope)]
    if not inner:
        yield key, dataset
    for path, value in inner:
        yield from iter_dataset_configs(value, path, scope)


def _dicts(config: dict) -> Iterator[tuple[str, dict]]:
    for name, value in config.items():
        values = enumerate(value) if isinstance(value, (list, tuple)) else ()
        yield from ((f'{name}.{number}', entry) for number, entry in values if isinstance(entry, dict))
        if isinstance(value, dict):
            yield name, value


def _is_dataset(path: str, config: dict, scope: str | None) -> bool:
    """Whether the config at this path in another is that of a data set. Transforms have a ``type`` too."""
    name = path.split('.')[0]
    if name in ('dataset', 'datasets'):
        return True
    if name in ('pipeline', 'metainfo') or 'type' not in config:
        return False
    found = resolve_type(config['type'], DATASETS, scope)
    return isinstance(found, type) and hasattr(found, '__getitem__') and hasattr(found, '__len__')


def iter_metric_configs(evaluator: Any, key: str) -> Iterator[tuple[str, dict]]:
    """Yield key and config of the metrics of an evaluator: one, a list, or those of MultiDatasetsEvaluator.

    Args:
        evaluator: Value of ``val_evaluator`` or ``test_evaluator``; None for none.
        key: Its key.
    """
    if isinstance(evaluator, (list, tuple)):
        for number, inner in enumerate(evaluator):
            yield from iter_metric_configs(inner, f'{key}.{number}')
    elif evaluator:
        if 'metrics' in evaluator:
            yield from iter_metric_configs(evaluator['metrics'], f'{key}.metrics')
        else:
            yield key, evaluator


def metainfo_classes(metainfo: Any) -> Sequence[str] | None:
    """The class names in the ``metainfo`` of a built data set or of a checkpoint; None without names.

    Args:
        metainfo: A dict; or a list of dicts, which MMDetection's ConcatDataset has if those of its parts differ in
            anything, such as palettes. Parts with different classes have no names in common.
    """
    first, *others = [{str(key).lower(): value for key, value in entry.items()}.get('classes') or ()
                      for entry in (metainfo if isinstance(metainfo, (list, tuple)) else [metainfo])] or [()]
    return first if len(first) and all(list(names) == list(first) for names in others) else None


def drop_empty_lines(names: Any, expand_user: bool = False) -> Any:
    """Read ``classes`` of a data set if it is a file that ends in empty lines, which MMEngine reads as classes.

    Args:
        names: The setting.
        expand_user: Whether the data set expands ``~``, as MMPretrain does in ``classes``.

    Returns:
        The names without empty ones at the end; any other setting as it is.
    """
    if not isinstance(names, str):
        return names
    path = osp.expanduser(names) if expand_user else names
    try:
        found = read_lines(path)
        return names if found == list_from_file(path) else found
    except (OSError, TypeError, ValueError):
        return names  # no file, or the checks report it


def read_lines(path: str) -> list[str]:
    """Read a text file without the empty lines at its end."""
    lines = list(list_from_file(path))
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    return lines
