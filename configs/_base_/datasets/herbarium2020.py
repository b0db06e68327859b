# Herbarium 2020: 32,094 species, one an image. The labels of the challenge's test set are private; a tenth of each
# species is held out of the training set instead.
_base_ = './multilabel_448.py'

train_dataloader = dict(
    dataset=dict(
        type='mmasl.Herbarium2020', data_root='data/nybg2020/train/', ann_file='metadata.json', split='train'))
val_dataloader = dict(
    dataset=dict(type='mmasl.Herbarium2020', data_root='data/nybg2020/train/', ann_file='metadata.json', split='val'))
test_dataloader = val_dataloader

# SingleLabelMetric would keep the scores of 32,094 classes for each image.
val_evaluator = dict(_delete_=True, type='mmasl.MacroF1')
test_evaluator = val_evaluator
