# ASL on TResNet-L v2, pretrained on ImageNet-21K (Table 5). The paper calls it TResNet-L; its source [24] has v2.
_base_ = './tresnet-l_paper_asl_coco.py'

model = dict(backbone=dict(model_name='tresnet_v2_l.miil_in21k'), head=dict(in_channels=2048))
