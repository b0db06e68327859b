from .asymmetric_loss import asymmetric_loss

__all__ = ['asymmetric_loss']
