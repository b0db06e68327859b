# ResNet-101 at 448 px with ASL and ML-Decoder (arXiv 2111.12933) in place of pooling and a linear layer.
_base_ = '../resnet101_asl_coco.py'

# A query for each of the 80 classes. For thousands, num_groups=100 or so; see docs/heads.md.
model = dict(neck=None, head=dict(type='mmasl.MLDecoderHead', num_groups=80))
