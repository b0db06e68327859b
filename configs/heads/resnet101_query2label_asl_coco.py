# ResNet-101 at 448 px with ASL and Query2Label (arXiv 2107.10834) in place of pooling and a linear layer.
_base_ = '../resnet101_asl_coco.py'

# The sizes of the published model: 151 million parameters. embed_dims=512, feedforward_channels=2048 makes 11 of them.
model = dict(neck=None, head=dict(type='mmasl.Query2LabelHead'))
