# Corel-5k at 224 px: 4,500 training and 499 test photographs, 374 words, 3.5 of them annotated in an image.
# Made by: python tools/convert_corel5k.py corel-5k data/corel5k
_base_ = './multilabel_224.py'

train_dataloader = dict(
    dataset=dict(
        type='MultiLabelDataset',
        data_root='data/corel5k',
        ann_file='annotations/train.json',
        data_prefix='images'))
val_dataloader = dict(
    dataset=dict(
        type='MultiLabelDataset', data_root='data/corel5k', ann_file='annotations/test.json', data_prefix='images'))
test_dataloader = val_dataloader
