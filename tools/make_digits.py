"""Generate images of handwritten digits in COCO's layout, without a download. See mmasl/datasets/digits.py."""
import argparse
from dataclasses import fields

from mmasl.datasets.digits import DigitScenes
from mmasl.utils.tools import exit_on_user_error


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('root', help='folder to create; unchanged if it already contains the same digits')
    parser.add_argument('--train', type=int, default=DigitScenes.train, help='number of training images')
    parser.add_argument('--val', type=int, default=DigitScenes.val, help='number of validation images')
    parser.add_argument('--colors', type=int, default=DigitScenes.colors, help='1 to 8, with 10 classes each')
    parser.add_argument('--size', type=int, default=DigitScenes.size, help='side of the images in pixels')
    parser.add_argument('--glyph', type=int, nargs=2, default=DigitScenes.glyph, metavar=('MIN', 'MAX'),
                        help='height of the digits in pixels')
    parser.add_argument('--labels-per-image', type=float, default=None,
                        help=f'mean number of digits (default: {DigitScenes.labels_per_image}, or 1 with --single)')
    parser.add_argument('--long-tail', type=float, default=DigitScenes.long_tail,
                        help='weight the r-th most frequent class by r^-LONG_TAIL')
    parser.add_argument('--missing', type=float, default=DigitScenes.missing,
                        help='share of the training annotations to omit')
    parser.add_argument('--single', action='store_true', help='draw one centered digit an image, for pre-training')
    parser.add_argument('--seed', type=int, default=DigitScenes.seed, help='seed of everything that is random')
    parser.add_argument('--overwrite', action='store_true', help='replace digits with other settings in root')
    return parser


@exit_on_user_error()
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.labels_per_image is None:
        args.labels_per_image = 1. if args.single else DigitScenes.labels_per_image
    args.glyph = tuple(args.glyph)
    digits = DigitScenes(**{field.name: getattr(args, field.name) for field in fields(DigitScenes)})
    digits.write(args.root, args.overwrite)
    print(f'{args.root}: {digits.train} + {digits.val} images, {len(digits.classes)} classes')


if __name__ == '__main__':
    main()
