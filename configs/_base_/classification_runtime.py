_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['mmasl'], allow_failed_imports=False)

# Keep the last and the best checkpoint: one takes 0.5 GB with Adam's state.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1, save_best='multi-label/mAP'))
# p_t+, p_t- and their gap (Fig. 4) of the loss, in the log.
custom_hooks = [dict(type='mmasl.ProbabilityGapHook')]
