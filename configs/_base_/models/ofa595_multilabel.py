# OFA-595, pretrained on ImageNet-1K by the authors of Once for All, with one sigmoid per class. A config sets
# num_classes and the loss of the head. The paper does not state which weights it started from. Those of ImageNet-21K
# have smooth activations (https://github.com/Alibaba-MIIL/ImageNet21K, MODEL_ZOO.md):
# --cfg-options model.backbone.smooth=True model.backbone.init_cfg.checkpoint=ofa_flops_595m_s_miil_21k.pth
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmasl.OFA595',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://raw.githubusercontent.com/han-cai/files/master/ofa/ofa_specialized/'
            'flops-595M_top1-80.0_finetune-75/init')),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='MultiLabelLinearClsHead', in_channels=1536))
