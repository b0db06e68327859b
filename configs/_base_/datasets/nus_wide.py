# NUS-WIDE in the variant that the authors published: 81 classes; images and CSV as MODEL_ZOO.md of the official
# repository links them.
_base_ = './multilabel_448.py'

train_dataloader = dict(
    dataset=dict(type='mmasl.NUSWide', data_root='data/nus_wide/', ann_file='nus_wid_data.csv', split='train'))
val_dataloader = dict(
    dataset=dict(type='mmasl.NUSWide', data_root='data/nus_wide/', ann_file='nus_wid_data.csv', split='val'))
test_dataloader = val_dataloader
