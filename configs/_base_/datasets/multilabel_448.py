# Images of 448 x 448 for multi-label classification.

# App. B of arXiv 2009.14119: RGB scaled to [0, 1], although the backbone was pretrained with ImageNet's mean and std.
data_preprocessor = dict(mean=[0., 0., 0.], std=[255., 255., 255.], to_rgb=True)

# The whole image squeezed to a square, with Pillow's antialiased bilinear filter. App. B names "standard augmentation
# techniques" without a policy; this is RandAugment as MMPretrain uses it for ImageNet, on grey: with pad_val of one
# number it rotates onto blue.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=448, backend='pillow'),
    dict(
        type='RandAugment',
        policies='timm_increasing',
        num_policies=2,
        magnitude_level=9,
        magnitude_std=0.5,
        hparams=dict(pad_val=(128, 128, 128))),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=448, backend='pillow'),
    dict(type='PackInputs'),
]

# 4 GPUs of 32 images. The paper gives no batch size; 128 is the default of its published code.
train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(pipeline=train_pipeline))
auto_scale_lr = dict(base_batch_size=128)
val_dataloader = dict(
    batch_size=32,
    num_workers=8,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(test_mode=True, pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(type='mmasl.MultiLabelMetric', preset='paper')
test_evaluator = val_evaluator
