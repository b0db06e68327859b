"""Write the handwritten digits, a data set in COCO's layout that needs no download (see mmasl/datasets/digits.py)."""
import argparse
from dataclasses import fields

from mmasl.datasets.digits import DigitScenes


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('root', help='folder to create; left alone if it holds the same digits already')
    parser.add_argument('--train', type=int, default=DigitScenes.train, help='training images')
    parser.add_argument('--val', type=int, default=DigitScenes.val, help='validation images')
    parser.add_argument('--colors', type=int, default=DigitScenes.colors, help='1 to 8: 10 classes each')
    parser.add_argument('--size', type=int, default=DigitScenes.size, help='side of the images in pixels')
    parser.add_argument('--glyph', type=int, nargs=2, default=DigitScenes.glyph, metavar=('MIN', 'MAX'),
                        help='height of the digits in pixels')
    parser.add_argument('--labels-per-image', type=float, default=None,
                        help=f'mean number of digits (default: {DigitScenes.labels_per_image}, or 1 with --single)')
    parser.add_argument('--long-tail', type=float, default=DigitScenes.long_tail,
                        help='the r-th most frequent class is drawn with weight r^-LONG_TAIL')
    parser.add_argument('--missing', type=float, default=DigitScenes.missing,
                        help='share of the training annotations left out')
    parser.add_argument('--single', action='store_true', help='one digit an image, near the middle: for pre-training')
    parser.add_argument('--seed', type=int, default=DigitScenes.seed, help='decides everything that is random')
    parser.add_argument('--overwrite', action='store_true', help='replace digits of other settings in root')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.labels_per_image is None:
        args.labels_per_image = 1. if args.single else DigitScenes.labels_per_image
    args.glyph = tuple(args.glyph)
    try:
        digits = DigitScenes(**{field.name: getattr(args, field.name) for field in fields(DigitScenes)})
        digits.write(args.root, args.overwrite)
    except (ValueError, FileExistsError, ImportError) as error:
        raise SystemExit(str(error)) from error
    print(f'{args.root}: {digits.train} + {digits.val} images, {len(digits.classes)} classes')


if __name__ == '__main__':
    main()
