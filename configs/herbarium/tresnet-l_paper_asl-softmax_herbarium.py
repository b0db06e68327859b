# TResNet-L on Herbarium 2020 with the official single-label form of ASL, on a softmax. It is not Table 12's.
_base_ = './tresnet-l_paper_asl_herbarium.py'

model = dict(
    head=dict(
        loss=dict(
            _delete_=True, type='mmasl.AsymmetricSoftmaxLoss', gamma_pos=0.0, gamma_neg=4.0, smoothing=0.1)))
# A softmax has no probability gap.
custom_hooks = [dict(type='mmasl.AdaptCheckpointHook')]
