# Scenes of handwritten digits: 12,000 and 2,000 images of 64 px, 40 classes (10 digits in 4 colours), 2.5 objects each.
# Made by: python tools/make_digits.py data/digits
data_preprocessor = dict(num_classes=40, mean=[0., 0., 0.], std=[255., 255., 255.], to_rgb=True)

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='mmasl.CocoMultiLabel',
        data_root='data/digits/',
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img_path='train/'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomCrop', crop_size=64, padding=4),
            dict(type='PackInputs'),
        ]))
val_dataloader = dict(
    batch_size=100,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='mmasl.CocoMultiLabel',
        data_root='data/digits/',
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img_path='val/'),
        test_mode=True,
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')]))
test_dataloader = val_dataloader

val_evaluator = dict(type='mmasl.MultiLabelMetric', preset='paper')
test_evaluator = val_evaluator
