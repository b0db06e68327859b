"""The paper's tables and figures as data."""
from mmasl.reproduce.numbers import FOOTNOTES, Entry, figure, load, table

__all__ = ['FOOTNOTES', 'Entry', 'figure', 'load', 'table']
