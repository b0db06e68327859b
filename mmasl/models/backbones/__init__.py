from .ofa import OFA595

__all__ = ['OFA595']
