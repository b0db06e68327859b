# MS-COCO 2014 with the categories of an image's instances as its labels: 82,081 and 40,137 images, 80 classes.
_base_ = './multilabel_448.py'

train_dataloader = dict(
    dataset=dict(
        type='mmasl.CocoMultiLabel',
        data_root='data/coco/',
        ann_file='annotations/instances_train2014.json',
        data_prefix=dict(img_path='train2014/')))
val_dataloader = dict(
    dataset=dict(
        type='mmasl.CocoMultiLabel',
        data_root='data/coco/',
        ann_file='annotations/instances_val2014.json',
        data_prefix=dict(img_path='val2014/')))
test_dataloader = val_dataloader
