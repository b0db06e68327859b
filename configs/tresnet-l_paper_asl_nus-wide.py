# TResNet-L on NUS-WIDE with ASL (gamma 0 and 4, margin 0.05: App. B) of arXiv 2009.14119.
_base_ = './tresnet-l_paper_bce_nus-wide.py'

model = dict(head=dict(loss=dict(gamma_neg=4.0, clip=0.05)))

# The released file belongs to tresnet-l_paper_asl_nus-wide-240.py. At the 448 px here it has 64.0, which a user measured
# and not the authors (issue 44 of the official repository).
