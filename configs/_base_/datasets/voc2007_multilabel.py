# Pascal VOC 2007: 5,011 trainval and 4,952 test images, 20 classes.
_base_ = './multilabel_448.py'

# Classes of which an image shows only objects marked difficult: positive in training and left out of the evaluation, as
# ML-GCN has it. The paper does not say.
train_dataloader = dict(
    dataset=dict(
        type='mmasl.VOCMultiLabel', data_root='data/VOCdevkit/VOC2007', split='trainval', difficult='positive'))
val_dataloader = dict(
    dataset=dict(type='mmasl.VOCMultiLabel', data_root='data/VOCdevkit/VOC2007', split='test', difficult='ignore'))
test_dataloader = val_dataloader
