"""The numbers of arXiv 2009.14119: all 13 tables, and the numbers that the text states about Fig. 2 to 9.

``tables.json`` holds them as printed, with the settings that the paper gives for them. Some settings are given by
reference: App. B states the backbone and the loss, Sec. 4 names data sets that are trained "identically" to MS-COCO.
"""
import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mmasl.errors import ConfigError

DATA = Path(__file__).with_name('tables.json')

# Contradictions in the paper and settings that it does not state.
FOOTNOTES = {
    'kssnet': 'Printed CF1 77.2, but CP 84.6 and CR 73.2 give 78.5. In every other row of Table 8, CF1 is the harmonic '
              'mean of CP and CR.',
    'kssnet-source': 'Cited as [21] in both tables, but KSSNet is the label graph superimposing of [31].',
    'of1': 'Printed OF1 81.8 in Tables 4 and 8, but OP 88.2 and OR 79.2 of Table 8 give 83.5, and ResNet101 has 82.3 '
           'at a lower mAP.',
    'top3': 'OP 92.9 and OR 66.4 at 2.9 labels per image imply 2.1 predictions per image. A label is therefore '
            'predicted if it is among the top 3 and above the threshold.',
    'focal-gamma': 'Fig. 5 has its top scores for gamma from 2 to 4. The paper does not say which of them gave 85.1; '
                   'App. B names 2 for the later experiments.',
    'adaptive': 'The step size is not stated, and the margin only for Fig. 9. The sign of Eq. 11 as printed drives the '
                'gap away from its target.',
    'gap-setting': 'The setting (0, 2) with margin 0.2 occurs neither in Table 2 nor in the other experiments, which '
                   'use (0, 4) with margin 0.05.',
    'architecture': 'Named TResNet-L like the 1K row, but the value fits TResNet-L v2. The 1.8 points from 1K to 21K '
                    'are then not due to the pre-training alone.',
    'model-zoo': 'The released checkpoint with 88.4 is another model: TResNet-XL at resolution 640.',
    'voc-zoo': 'The released checkpoint for Pascal-VOC is a TResNet-XL with 96.0, not the model of this row.',
    'average': "The paper's names differ from common use: 'micro' is the plain mean over classes, 'macro' the mean "
               "weighted by a class's positives.",
    'open-images': 'Trained at resolution 224 for 30 epochs and fine-tuned at 448 for 5. The margin of ASL and the '
                   'weight of untagged labels are not stated.',
    'nus-resolution': 'The text says 448, as on MS-COCO, but the released checkpoint has 65.2 at 240 and 64.0 at 448 '
                      '(issue 44 of the official repository).',
    'herbarium': 'Backbone, input size and margin are not stated. The loss is the sigmoid form (issue 68 of the '
                 'official repository), and the test set is private.',
    'detection': 'Input size, head (FCOS or ATSS), alpha and margin are not stated. 0.4 points are about twice the '
                 'noise between seeds.',
}


@dataclass(frozen=True)
class Entry:
    """One number of the paper and its setting. None marks a setting that the paper does not state.

    Args:
        item: 'Table 1' to 'Table 13', 'Fig. 2' to 'Fig. 9'.
        title: What the item shows, in our words.
        row: Label of the row as printed, with several label columns joined by ', ' and gamma written out. In figures,
            our words.
        column: Label of the column, likewise.
        value: The number as printed; bool in Table 1. None is a dash in a table, or a number that can only be read off
            a plot.
        unit: '%' or ''.
        source: 'ours' for results of the paper's authors, 'cited' for numbers from other papers.
        stated: Where the number is printed; '' if nowhere. A figure's number may be printed elsewhere, for the same
            setting.
        dataset: Name of the data set.
        loss: Name of the loss.
        backbone: Name of the backbone.
        pretrain: Data set of the pre-training.
        input_size: Image size in pixels.
        gamma_pos, gamma_neg, clip: Parameters of the loss, as in :class:`mmasl.AsymmetricLoss`.
        target: Target probability gap of adaptive asymmetry.
        footnotes: Keys of :data:`FOOTNOTES`.
    """
    item: str
    title: str
    row: str
    column: str
    value: float | bool | None
    unit: str
    source: str
    stated: str
    dataset: str | None = None
    loss: str | None = None
    backbone: str | None = None
    pretrain: str | None = None
    input_size: int | None = None
    gamma_pos: float | None = None
    gamma_neg: float | None = None
    clip: float | None = None
    target: float | None = None
    footnotes: tuple[str, ...] = ()


def load() -> list[Entry]:
    """All numbers, in the paper's order of tables, figures, rows and columns."""
    return [entry for item, content in json.loads(DATA.read_text()).items() for entry in _entries(item, content)]


def table(number: int) -> list[Entry]:
    """The numbers of one table.

    Args:
        number: 1 to 13.

    Raises:
        ConfigError: The paper has no such table.
    """
    return _item(f'Table {number}')


def figure(number: int) -> list[Entry]:
    """The numbers of one figure.

    Args:
        number: 2 to 9.

    Raises:
        ConfigError: The paper has no such figure, or states no numbers of it.
    """
    return _item(f'Fig. {number}')


def _item(name: str) -> list[Entry]:
    data = json.loads(DATA.read_text())
    if name not in data:
        raise ConfigError(f'The paper has no numbers for {name}. Choose one of {", ".join(data)}')
    return _entries(name, data[name])


def _entries(item: str, content: dict) -> list[Entry]:
    entries = []
    for row in content['rows']:
        source = 'cited' if row.get('cited') else 'ours'
        for (column, unit), value in zip(content['columns'].items(), row['values'], strict=True):
            setting = {**content.get(source, {}), **row.get('setting', {})}
            if source == 'ours':
                setting.update(content.get('ours_columns', {}).get(column, {}))
            footnotes = tuple(key for key, (rows, columns) in content.get('footnotes', {}).items()
                              if fnmatchcase(row['row'], rows) and fnmatchcase(column, columns))
            stated = '' if value is None else row.get('stated', item)
            entries.append(Entry(item, content['title'], row['row'], column, value, unit, source, stated,
                                 content.get('dataset'), footnotes=footnotes, **setting))
    return entries
