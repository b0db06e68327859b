# The training pipeline of the official train.py, whose RandAugment is that of the PyPI package `randaugment`: 2 of 15
# operations, each skipped with probability 0.5 (MMPretrain's default too), with a magnitude drawn anew. The package
# draws it from nine levels, MMPretrain uniformly between two ends: here the first level and the last. Posterize rounds
# up, to 8, 7, ... 4 bits as often as the package has them, and Cutout down, to 2 to 20 pixels. The package rotates
# counterclockwise only.
official_train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=448, backend='pillow'),
    dict(type='mmasl.Cutout', size=0.5),
    dict(
        type='RandAugment',
        policies=[
            dict(type='AutoContrast'),
            dict(type='Equalize'),
            dict(type='Invert'),
            dict(type='Rotate', magnitude_range=(30 / 9, 30), random_negative_prob=1.),
            dict(type='Posterize', magnitude_range=(7.5, 3)),
            dict(type='Solarize', magnitude_range=(256 * 8 / 9, 0)),
            dict(type='ColorTransform', magnitude_range=(0.1, 0.9)),
            dict(type='Contrast', magnitude_range=(0.1, 0.9)),
            dict(type='Brightness', magnitude_range=(0.1, 0.9)),
            dict(type='Sharpness', magnitude_range=(0.1, 0.9)),
            dict(type='Shear', magnitude_range=(0.3 / 9, 0.3), direction='horizontal', interpolation='bicubic'),
            dict(type='Shear', magnitude_range=(0.3 / 9, 0.3), direction='vertical', interpolation='bicubic'),
            dict(type='Translate', magnitude_range=(150 / 331 / 9, 150 / 331), direction='horizontal'),
            dict(type='Translate', magnitude_range=(150 / 331 / 9, 150 / 331), direction='vertical'),
            dict(type='Cutout', magnitude_range=(2, 21)),
        ],
        num_policies=2,
        magnitude_level=9,
        total_level=9,
        magnitude_std='inf',
        hparams=dict(pad_val=(128, 128, 128))),
    dict(type='PackInputs'),
]
