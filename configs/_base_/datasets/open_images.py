# Open Images v6, the 9,605 trainable classes: the training images that people labelled, and the test set. The images of
# a split lie in one folder; for CVDF's archives see img_name of mmasl.OpenImages.
_base_ = './multilabel_448.py'

# No machine_file: the paper's results were trained without machine-generated labels (issue 52 of the official
# repository). 'ignore' only marks what is not annotated by -1; the loss says what becomes of it, the evaluation leaves
# it out.
train_dataloader = dict(
    dataset=dict(
        type='mmasl.OpenImages',
        data_root='data/open_images/',
        ann_file='oidv6-train-annotations-human-imagelabels.csv',
        class_file='oidv6-classes-trainable.txt',
        description_file='oidv6-class-descriptions.csv',
        unannotated='ignore',
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

# As the authors' evaluation: a class that nobody denied has an average precision of 1 for any scores.
val_evaluator = dict(no_negative='skip')
test_evaluator = val_evaluator
