"""Time and memory to load the annotations of COCO and Open Images, and memory that DataLoader workers do not share.

The files are generated. The default sizes end at the training set of COCO and a tenth of that of Open Images. Set
MMASL_FULL=1 in the environment to add the whole (9,011,219 images, a CSV file of 2.3 GiB).
"""
import csv
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from .measure import in_process, memory_of_process

MIB = 2**20
COCO_SIZES = (5_000, 20_000, 82_783)
OPEN_IMAGES_SIZES = (50_000, 200_000, 800_000)
OPEN_IMAGES_FULL = 9_011_219  # the training set, v1 to v7
OPEN_IMAGES_CLASSES = 9_605
READ_BY_A_WORKER = 20_000  # samples
SLACK = 1.3  # linear cost: time may grow by this factor more than the file
SHARE = 0.1  # shared index: unshared memory of a worker may grow by this share of the growth of the index
COLUMNS = ('seconds', 'cpu_seconds', 'peak_mib', 'index_mib', 'forked_worker_mib', 'spawned_worker_mib')
HEADER = 'ImageID,Source,LabelName,Confidence\n'


# --- files

def write_coco(folder: Path, images: int) -> Path:
    """Write ``instances.json`` like COCO's: 80 categories, 7.3 instances with polygons and 4 kB an image."""
    rng = np.random.default_rng(0)
    polygons = [','.join(f'{x:.2f}' for x in rng.uniform(0, 640, 60)) for _ in range(1000)]
    counts = rng.poisson(7.3, images)
    counts[0] = 1  # keeps the first image, whose file exists
    (folder / f'{0:012}.jpg').touch()
    path, number = folder / 'instances.json', 0
    with open(path, 'w') as file:
        file.write('{"info":{},"licenses":[],"images":[')
        file.writelines(
            f'{"," if i else ""}{{"license":5,"file_name":"{i:012}.jpg","coco_url":'
            f'"http://images.cocodataset.org/train2014/{i:012}.jpg","height":360,"width":640,"date_captured":'
            f'"2013-11-14 11:18:45","flickr_url":"http://farm9.staticflickr.com/8186/{i:010}_z.jpg","id":{i}}}'
            for i in range(images))
        file.write('],"annotations":[')
        for image, count in enumerate(counts.tolist()):
            for kind in rng.integers(0, 80_000, count).tolist():
                file.write(f'{"," if number else ""}{{"segmentation":[[{polygons[kind % 1000]}]],"area":{kind}.25,'
                           f'"iscrowd":0,"image_id":{image},"bbox":[199.84,200.46,77.71,70.88],'
                           f'"category_id":{kind // 1000},"id":{number}}}')
                number += 1
        file.write('],"categories":[' + ','.join(
            f'{{"supercategory":"thing","id":{i},"name":"thing {i}"}}' for i in range(80)) + ']}')
    return path


def write_open_images(folder: Path, images: int) -> Path:
    """Write ``human.csv`` and ``classes.txt`` like those of Open Images.

    There are 9,605 classes with a long tail and 1 to 12 labels an image, half of them negative, in lines of 42 bytes.
    The lines of an image are consecutive. The images are not sorted, which is slower to read than the real files.
    """
    rng = np.random.default_rng(0)
    names = np.array([f'/m/0{number:05x}' for number in range(OPEN_IMAGES_CLASSES)], 'S9')
    (folder / 'classes.txt').write_bytes(b'\n'.join(names.tolist()))
    line = np.dtype([('id', 'S16'), ('source', 'S14'), ('name', 'S9'), ('comma', 'S1'), ('confidence', 'S1'),
                     ('end', 'S1')])
    # Multiples of an odd number are distinct modulo 2^64, so no id repeats.
    ids = np.arange(images, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    (folder / f'{ids.min():016x}.jpg').touch()
    path = folder / 'human.csv'
    with open(path, 'wb') as file:
        file.write(HEADER.encode())
        for part in np.split(ids, range(100_000, images, 100_000)):
            text = np.frombuffer(part.astype('>u8').tobytes().hex().encode(), 'S16')
            counts = rng.integers(1, 13, len(part))
            lines = np.empty(counts.sum(), line)
            lines['id'] = text.repeat(counts)
            lines['source'], lines['comma'], lines['end'] = ',verification,', ',', '\n'
            # Consecutive classes from a random start with a long tail, so no label repeats.
            start = (len(names) ** rng.random(len(part))).astype(np.int64)
            within = np.arange(len(lines)) - (counts.cumsum() - counts).repeat(counts)
            lines['name'] = names[(start.repeat(counts) + within) % len(names)]
            lines['confidence'] = np.array([b'0', b'1'])[rng.integers(0, 2, len(lines))]
            file.write(lines.tobytes())
    return path


# --- measurements, each in a separate process

def load_coco(path: Path) -> Dataset:
    from mmasl.datasets.coco import CocoMultiLabel
    return CocoMultiLabel(str(path), data_prefix=dict(img_path=str(path.parent)))


def load_open_images(path: Path) -> Dataset:
    from mmasl.datasets.open_images import OpenImages
    return OpenImages(str(path), str(path.with_name('classes.txt')), unannotated='ignore',
                      data_prefix=str(path.parent))


def read_json(path: Path) -> object:
    with open(path) as file:
        return json.load(file)


def read_csv(path: Path) -> None:
    with open(path, newline='') as file:
        for _ in csv.reader(file):
            pass


def cost(read: str, path: str, workers: bool) -> dict[str, float]:
    """Measure a reader of this module.

    Args:
        read: Name of the reader.
        path: File to read.
        workers: Also measure the unshared memory of forked and spawned workers.

    Returns:
        Wall-clock and processor seconds, peak memory above that of the process before, and size of the index.
        Processor seconds depend less on other work of the machine.
    """
    reader = globals()[read]
    if read.startswith('load'):
        import mmpretrain.datasets  # noqa: F401, excluded from the measurement
    before = memory_of_process('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
    start, cpu_start = time.perf_counter(), time.process_time()
    result = reader(Path(path))
    row = dict(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu_start,
               peak_mib=(memory_of_process('VmHWM') - before) / MIB)
    if read.startswith('load'):
        row['index_mib'] = _index_bytes(result) / MIB
    if workers:
        row |= dict(forked_worker_mib=_worker_bytes(result, 'fork') / MIB,
                    spawned_worker_mib=_worker_bytes(result, 'spawn') / MIB)
    return row


def _index_bytes(dataset: Any) -> int:
    if dataset.serialize_data:
        return dataset.data_bytes.nbytes + dataset.data_address.nbytes
    return sum(getattr(dataset.data_list, name).nbytes for name in ('ids', 'starts', 'ends', 'labels'))


class Annotations(Dataset):
    """Labels of the samples without their images."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.dataset.get_data_info(index)


def private_bytes(batch: list) -> int:
    """Memory that this process does not share. It is a collate function, so that workers call it."""
    return memory_of_process('Private_Dirty', 'smaps_rollup')


def _worker_bytes(dataset: Any, method: str) -> float:
    """Mean over two workers after they have read random samples."""
    order = np.random.default_rng(0).permutation(len(dataset))[:2 * READ_BY_A_WORKER].tolist()
    loader = DataLoader(Annotations(dataset), batch_size=500, sampler=order, num_workers=2, collate_fn=private_bytes,
                        multiprocessing_context=method)
    return sum(list(loader)[-2:]) / 2


# --- the part

def measure(device: str, full: bool = 'MMASL_FULL' in os.environ) -> Iterator[dict]:
    """Yield a row for each reader and size of a file. All run on the CPU, whatever the device."""
    data = (('COCO', write_coco, COCO_SIZES, dict(load_coco='mmasl.CocoMultiLabel', read_json='json.load')),
            ('Open Images', write_open_images, OPEN_IMAGES_SIZES + (OPEN_IMAGES_FULL, ) * full,
             dict(load_open_images='mmasl.OpenImages', read_csv='csv.reader, keeping nothing')))
    for name, write, sizes, readers in data:
        for images in sizes:
            with tempfile.TemporaryDirectory() as folder:
                path = write(Path(folder), images)
                for read, words in readers.items():
                    workers = read.startswith('load') and images in (sizes[0], sizes[-1])
                    found = in_process('import json; from benchmarks.speed.annotations import cost\n'
                                       f'print(json.dumps(cost({read!r}, {str(path)!r}, {workers})))')
                    yield dict(data=name, reader=words, images=images, file_mib=round(path.stat().st_size / MIB, 1),
                               **{column: round(found[column], 2) if column in found else '' for column in COLUMNS})


def targets(rows: list[dict]) -> list[tuple[str, str, bool]]:
    """Judge the cost against ``json.load``, its growth with the file, and the sharing of the index."""
    def numbers_of(data: str, ours: bool = True) -> list[dict[str, float]]:
        numbers = ('images', 'file_mib', *COLUMNS)
        return [{name: float(row[name]) for name in numbers if row[name] != ''} for row in rows
                if row['data'] == data and row['reader'].startswith('mmasl') == ours]

    result = []
    ours, floor = numbers_of('COCO')[-1], numbers_of('COCO', False)[-1]
    for column, words, unit in (('cpu_seconds', 'time', 's'), ('peak_mib', 'memory', 'MiB')):
        result.append((f"COCO, {ours['images']:,.0f} images: no more {words} than json.load",
                       f'{ours[column]:,.1f} {unit} against {floor[column]:,.1f} {unit}',
                       ours[column] <= floor[column]))
    for data in ('COCO', 'Open Images'):
        first, *_, less, most = numbers_of(data)
        for column, words in (('cpu_seconds', 'time'), ('peak_mib', 'memory')):
            growth = most[column] / less[column] / (most['file_mib'] / less['file_mib'])
            result.append(((f'{data}, second largest to largest file: {words} grows by at most {SLACK} times the '
                            'growth of the file'), f'{growth:.2f} times', growth <= SLACK))
        index = most['index_mib'] - first['index_mib']
        # Spawned workers copy the index of COCO, which is MMEngine's: 9 MiB beside 370 MiB of modules.
        for method in ('forked', ) if data == 'COCO' else ('forked', 'spawned'):
            own = most[f'{method}_worker_mib'] - first[f'{method}_worker_mib']
            result.append((f'{data}: a {method} worker copies at most {SHARE:.0%} of the index',
                           f'{own:.1f} of {index:.1f} MiB', own <= SHARE * index))
    return result
