# Pre-training of the digits' backbone on single glyphs: what ImageNet is to a real one. One label an image, softmax.
# Made by: python tools/make_digits.py data/glyphs --single --size 32
_base_ = [
    '../_base_/models/resnet18_digits.py', '../_base_/datasets/digits_multilabel.py', '../_base_/schedules/digits.py',
    '../_base_/classification_runtime.py'
]

model = dict(head=dict(type='LinearClsHead', in_channels=128, num_classes=40, loss=dict(type='CrossEntropyLoss')))

train_dataloader = dict(
    dataset=dict(
        data_root='data/glyphs/',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomCrop', crop_size=32, padding=4),
            dict(type='PackInputs'),
        ]))
val_dataloader = dict(dataset=dict(data_root='data/glyphs/'))
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='Accuracy')
test_evaluator = val_evaluator

param_scheduler = dict(eta_max=4e-3)
train_cfg = dict(max_epochs=6)
default_hooks = dict(checkpoint=dict(save_best=None))
randomness = dict(seed=0)
custom_hooks = []  # softmax has no probability gap
