# Open Images v6, the 9,605 trainable classes: 9 million training images, many of them labelled by machine alone, and
# the test set. The images of a split lie in one folder; for CVDF's archives see img_name of mmasl.OpenImages.
_base_ = './multilabel_448.py'

# App. F: what is not annotated is negative, "with reduced weights" that are not given; here of weight 1. To ignore it:
# --cfg-options train_dataloader.dataset.unannotated=ignore
train_dataloader = dict(
    dataset=dict(
        type='mmasl.OpenImages',
        data_root='data/open_images/',
        ann_file='oidv6-train-annotations-human-imagelabels.csv',
        machine_file='train-annotations-machine-imagelabels.csv',
        class_file='oidv6-classes-trainable.txt',
        description_file='oidv6-class-descriptions.csv',
        unannotated='negative',
        data_prefix='train'))
val_dataloader = dict(
    dataset=dict(
        type='mmasl.OpenImages',
        data_root='data/open_images/',
        ann_file='test-annotations-human-imagelabels.csv',
        class_file='oidv6-classes-trainable.txt',
        description_file='oidv6-class-descriptions.csv',
        unannotated='ignore',
        data_prefix='test'))
test_dataloader = val_dataloader

# 114,648 test images x 9,605 scores.
val_evaluator = dict(score_dtype='float16')
test_evaluator = val_evaluator
