# Pascal VOC 2007 at 224 px: 5,011 trainval and 4,952 test images, 20 classes. Labels as in voc2007_multilabel.py.
_base_ = './multilabel_224.py'

# OmitLabels removes no label here. Experiments with missing labels raise its share.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=224, interpolation='bicubic', backend='pillow'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='mmasl.OmitLabels', share=0.),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    dataset=dict(
        type='mmasl.VOCMultiLabel', data_root='data/VOCdevkit/VOC2007', split='trainval', difficult='positive',
        pipeline=train_pipeline))
val_dataloader = dict(
    dataset=dict(type='mmasl.VOCMultiLabel', data_root='data/VOCdevkit/VOC2007', split='test', difficult='ignore'))
test_dataloader = val_dataloader
