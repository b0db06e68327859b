# ResNet-101 at 448 px with ASL and ML-GCN (arXiv 1904.03582) in place of pooling and a linear layer.
# Made by: python tools/label_graph.py configs/heads/resnet101_label_graph_asl_coco.py
_base_ = '../resnet101_asl_coco.py'

# Labels are one-hot. For word vectors, as in the paper, make the graph with --glove glove.6B.300d.txt and set
# label_embeddings='data/coco/label_graph.npz' beside it.
model = dict(neck=None, head=dict(type='mmasl.LabelGraphHead', graph='data/coco/label_graph.npz'))
