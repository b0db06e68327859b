# The digits with ASL and ML-GCN (arXiv 1904.03582) in place of pooling and a linear layer.
# Made by: python tools/label_graph.py configs/digits/resnet_label_graph_asl_digits.py
_base_ = './resnet_asl_digits.py'

# Digits are drawn independently of each other, so that few pairs or none reach a threshold of 0.4.
model = dict(
    neck=None,
    head=dict(
        type='mmasl.LabelGraphHead',
        graph='data/digits/label_graph.npz',
        hidden_channels=128,
        threshold=0.05,
        init_cfg=None))
# No search was made.
param_scheduler = dict(eta_max=2e-3)
