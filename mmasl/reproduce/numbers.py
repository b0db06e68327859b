"""The numbers of arXiv 2009.14119: all of its 13 tables, and of Fig. 2 to 9 what the text states.

``tables.json`` holds them as printed. A setting stands there where the paper gives it, be it by reference: App. B for
the backbone and the loss, Sec. 4 for the data sets that are trained "identically" to MS-COCO.
"""
import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

DATA = Path(__file__).with_name('tables.json')

# What a reader who compares with the paper must know: where it contradicts itself, and what it leaves open.
FOOTNOTES = {
    'kssnet': 'Printed CF1 77.2, while CP 84.6 and CR 73.2 give 78.5: the number is not their harmonic mean, which CF1 '
              'is in every other row of Table 8.',
    'kssnet-source': 'Cited as [21] in both tables, but KSSNet is the label graph superimposing of [31].',
    'of1': 'Printed OF1 81.8 in Tables 4 and 8, while OP 88.2 and OR 79.2 of Table 8 give 83.5, and ResNet101 has 82.3 '
           'at a lower mAP.',
    'top3': 'OP 92.9 and OR 66.4 at 2.9 labels an image imply 2.1 predictions an image, so a label counts if it is '
            'among the top 3 and above the threshold too.',
    'focal-gamma': 'Fig. 5 has its top scores for gamma from 2 to 4, and no place says which of them gave 85.1; App. B '
                   'names 2 as the value of the later experiments.',
    'adaptive': 'The step size is not stated, nor the margin but for Fig. 9, and Eq. 11 as printed has the sign that '
                'drives the gap away from its target.',
    'gap-setting': 'The setting (0, 2) with margin 0.2 is none of Table 2 nor the (0, 4) with margin 0.05 of the other '
                   'experiments.',
    'architecture': 'Named TResNet-L as the 1K row is, while the value fits TResNet-L v2, so that the 1.8 points from '
                    '1K to 21K are not the work of the pre-training alone.',
    'model-zoo': 'The released checkpoint with 88.4 is another model: TResNet-XL at resolution 640.',
    'voc-zoo': 'The released checkpoint for Pascal-VOC is TResNet-XL with 96.0, and so not the model of this row.',
    'average': "The names are used against custom: 'micro' is the plain mean over classes, 'macro' the mean weighted "
               "by a class's positives.",
    'open-images': 'Trained at resolution 224 for 30 epochs and fine-tuned at 448 for 5; the margin of ASL and the '
                   'weight of untagged labels are not stated.',
    'nus-resolution': 'By the text at 448 as on MS-COCO, but the released checkpoint has 65.2 at 240 and 64.0 at 448 '
                      "(official repository's issue 44).",
    'herbarium': 'Neither backbone, input size nor margin is stated; the loss is the sigmoid form (issue 68 of the '
                 'official repository), and the test set is private.',
    'detection': 'Neither input size, head (FCOS or ATSS), alpha nor margin is stated, and 0.4 points are about twice '
                 'the noise between seeds.',
}


@dataclass(frozen=True)
class Entry:
    """One number of the paper, with the setting that the paper gives for it; None is what it does not give.

    Args:
        item: 'Table 1' to 'Table 13', 'Fig. 2' to 'Fig. 9'.
        title: What the item shows, in our words.
        row, column: As printed, with several label columns joined by ', ' and gamma written out; figures: our words.
        value: The number as printed, bool in Table 1; None is a dash in a table, and in a figure what can only be
            read off the plot.
        unit: '%' or ''.
        source: 'ours' for runs of the paper's authors, 'cited' for numbers that they take from other papers.
        stated: Where the number is printed; '' if nowhere. A figure's number may stand elsewhere, for the same setting.
        input_size: Pixels.
        target: Of the probability gap, for adaptive asymmetry.
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
    """All numbers, by table and figure, row and column as in the paper."""
    return [entry for item, content in json.loads(DATA.read_text()).items() for entry in _entries(item, content)]


def table(number: int) -> list[Entry]:
    """The numbers of one table.

    Raises:
        ValueError: The paper has no such table.
    """
    return _item(f'Table {number}')


def figure(number: int) -> list[Entry]:
    """The numbers of one figure.

    Raises:
        ValueError: The paper has no such figure, or none with data.
    """
    return _item(f'Fig. {number}')


def _item(name: str) -> list[Entry]:
    data = json.loads(DATA.read_text())
    if name not in data:
        raise ValueError(f'there is no {name} among the numbers of the paper: choose one of {", ".join(data)}')
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
