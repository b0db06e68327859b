# The official train.py: one cycle over 80 epochs that is left after 41, where the learning rate is still at 67 % of its
# maximum. Adam adds the weight decay to the gradient; biases and other parameters of one dimension have none.
optim_wrapper = dict(
    optimizer=dict(type='Adam', lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=dict(bias_decay_mult=0., flat_decay_mult=0.))
param_scheduler = [
    dict(type='OneCycleLR', eta_max=1e-4, pct_start=0.2, end=80, by_epoch=True, convert_to_iter_based=True),
    dict(type='mmasl.OneCycleMomentum', pct_start=0.2, end=80, by_epoch=True, convert_to_iter_based=True),
]

train_cfg = dict(by_epoch=True, max_epochs=41, val_interval=1)
val_cfg = dict()
test_cfg = dict()
